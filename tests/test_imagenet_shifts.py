"""ImageNet-A, -R, -V2 and -Sketch: the published folders, and which logits they are scored on."""

import copy
import hashlib

import pytest
import timm
import torch
from PIL import Image

import tta
from tta.cli import main
from tta.datasets import imagenet_shifts
from tta.datasets.imagenet_classes import IMAGENET_A, IMAGENET_R, WNIDS
from tta.models import ImageClassifier, load_model


def build(folder, names, suffix="jpg", count=1):
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            Image.new("L", (40, 36), label % 256).save(folder / name / f"{number}.{suffix}", quality=95)


@pytest.fixture
def few(monkeypatch):
    """One image a class is all that is expected."""
    for name in ("A", "R"):
        monkeypatch.setattr(imagenet_shifts, f"{name}_IMAGES", 200)
    for name in ("V2", "SKETCH"):
        monkeypatch.setattr(imagenet_shifts, f"{name}_IMAGES", 1000)


# The md5 sums are of the lists in the benchmarks' own evaluation code.
@pytest.mark.parametrize(
    ("name", "outputs", "md5"),
    [
        ("a", IMAGENET_A, "d7f0200436c722caadd2c4f90d78fb59"),
        ("r", IMAGENET_R, "262ba6a49c36cd825c5a20ff74ec8d61"),
    ],
)
def test_the_masks_are_the_published_ones(name, outputs, md5):
    assert hashlib.md5(",".join(map(str, outputs)).encode()).hexdigest() == md5
    assert len(set(outputs)) == 200
    assert list(outputs) == sorted(outputs)
    assert len(set(IMAGENET_A) & set(IMAGENET_R)) == 86


def test_the_classes_are_in_the_order_of_timms_models():
    info = timm.data.ImageNetInfo()
    assert tuple(info.label_names()) == WNIDS


@pytest.mark.parametrize(("name", "outputs"), [("imagenet-a", IMAGENET_A), ("imagenet-r", IMAGENET_R)])
def test_two_hundred_classes_are_scored_on_their_own_logits(tmp_path, few, name, outputs):
    build(tmp_path / name, [WNIDS[output] for output in outputs])
    (tmp_path / name / "README.txt").write_text("")
    made = tta.stream(name, root=tmp_path, resize=36, crop=32, batch_size=200)
    assert made.classes == (200, outputs, 1000)
    (batch,) = made
    assert batch.images.shape == (200, 3, 32, 32)
    assert torch.equal((255 * batch.images[:, 0, 16, 16]).round().long(), batch.labels)  # grey tells the folder
    assert batch.labels.tolist() != list(range(200))
    assert tta.stream(name, root=tmp_path / name, by_class=True).domains[0].labels.tolist() == list(range(200))


class Knowing(torch.nn.Module):
    """1000 logits: an image of grey g is of the g-th class of the mask, but another class outside is always likelier."""

    def __init__(self, outputs, outside):
        super().__init__()
        self.outputs, self.outside = torch.tensor(outputs), outside
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, images):
        grey = (255 * images[:, 0, 16, 16]).round().long()
        logits = torch.nn.functional.one_hot(self.outputs[grey], 1000) + self.weight
        logits[:, self.outside] = 2
        return logits


def test_a_model_is_scored_within_the_mask(tmp_path, few):
    build(tmp_path / "imagenet-r", [WNIDS[output] for output in IMAGENET_R])
    made = tta.stream("imagenet-r", root=tmp_path, resize=36, crop=32)
    network = Knowing(IMAGENET_R, outside=0)
    model = ImageClassifier(network, (0, 0, 0), (1, 1, 1), "knowing", None)
    with pytest.raises(ValueError, match=r"200 classes; the model gives 1000 logits.*select_logits\(stream\.classes"):
        tta.evaluate(tta.adapt(model, "source"), made, progress=False, accelerator="cpu")
    model.select_logits(made.classes.logits, made.classes.of)
    result = tta.evaluate(tta.adapt(model, "source"), made, progress=False, accelerator="cpu")
    assert result.errors == {"imagenet-r": 0.0}
    assert list(result.manifest["data"]["classes"]["logits"]) == list(IMAGENET_R)


def test_source_statistics_are_recorded_for_the_classes_of_the_stream(tmp_path, monkeypatch, capsys):
    build(tmp_path / "clean", WNIDS[:2], count=2)
    recorded = []
    monkeypatch.setattr(tta.SourceStatistics, "record", lambda model, *args, **kwargs: recorded.append(model))
    model = load_model("cifar-resnet20", pretrained=False, num_classes=1000)
    monkeypatch.setattr(tta, "load_model", lambda *args, **kwargs: copy.deepcopy(model))
    for of_stream in ([], ["imagenet-r"]):
        main(
            [
                "source",
                "cifar-resnet20",
                str(tmp_path / "clean"),
                "eata",
                *of_stream,
                "-o",
                str(tmp_path / "s.safetensors"),
            ]
        )
    everything, masked = recorded
    assert everything.selection is None
    assert masked.selection.tolist() == list(IMAGENET_R)


def test_v2_folders_are_numbers_and_not_text(tmp_path, few):
    build(tmp_path / "imagenetv2-matched-frequency-format-val", [str(number) for number in range(1000)], "jpeg")
    made = tta.stream("imagenet-v2", root=tmp_path, by_class=True, resize=36, crop=32)
    assert made.classes == (1000, None, 1000)
    (domain,) = made.domains
    assert domain.labels.tolist() == list(range(1000))
    images = domain.images(torch.tensor([0, 9, 10, 100, 255]))
    assert images[:, 0, 16, 16].tolist() == [0, 9, 10, 100, 255]


@pytest.mark.parametrize("inside", ["ImageNet-Sketch/sketch", "sketch"])
def test_sketch_has_all_classes(tmp_path, few, inside):
    build(tmp_path / inside, WNIDS, "JPEG")
    made = tta.stream("imagenet-sketch", root=tmp_path, by_class=True)
    assert made.classes == (1000, None, 1000)
    assert made.domains[0].labels.tolist() == list(range(1000))


def test_what_is_missing_is_named(tmp_path, few):
    names = [WNIDS[output] for output in IMAGENET_A]
    with pytest.raises(FileNotFoundError, match=r"No imagenet-a/ .*natural-adv-examples \(`tta download imagenet-a`\)"):
        tta.stream("imagenet-a", root=tmp_path)
    build(tmp_path / "imagenet-a", names[:-1])
    with pytest.raises(ValueError, match=rf"has 199 class folders; expected 200\. Missing: {names[-1]}"):
        tta.stream("imagenet-a", root=tmp_path)
    build(tmp_path / "imagenet-a", names[-1:], count=2)
    with pytest.raises(ValueError, match="holds 201 images; expected 200"):
        tta.stream("imagenet-a", root=tmp_path)
    with pytest.raises(ValueError, match=r"Unknown: n"):  # one set taken for the other
        tta.stream("imagenet-r", root=tmp_path / "imagenet-a")


def test_the_published_numbers_of_images():
    counts = [getattr(imagenet_shifts, f"{name}_IMAGES") for name in ("A", "R", "V2", "SKETCH")]
    assert counts == [7_500, 30_000, 10_000, 50_889]
