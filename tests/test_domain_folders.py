"""DomainNet-126, PACS and Office-Home: the published folders and lists."""

import pytest
import torch
from PIL import Image

import tta
from tta.datasets import catalog, domain_folders


def build(folder, domains, classes):
    for place, domain in enumerate(domains):
        for label, name in enumerate(classes):
            (folder / domain / name).mkdir(parents=True)
            for number in range(2):
                colour = (60 * place, 20 * label, 90 * number)
                Image.new("RGB", (300, 280), colour).save(folder / domain / name / f"{number:05d}.jpg")


PACS_CLASSES = ("dog", "elephant", "giraffe", "guitar", "horse", "house", "person")


@pytest.mark.parametrize("inside", ["", "PACS", "PACS/kfold"])
def test_pacs(tmp_path, inside):
    build(tmp_path / inside, domain_folders.PACS.domains, PACS_CLASSES)
    made = tta.stream("pacs", root=tmp_path, batch_size=14)
    assert [domain.name for domain in made.domains] == ["art_painting", "cartoon", "photo", "sketch"]
    assert made.classes.count == 7
    for place, batch in enumerate(made):
        assert batch.images.shape == (14, 3, 224, 224)
        red, green = ((255 * batch.images[:, c, 9, 9]).round() for c in (0, 1))
        assert (red - 60 * place).abs().max() <= 3
        assert (green - 20 * batch.labels).abs().max() <= 3
        assert batch.labels.tolist() != sorted(batch.labels.tolist())
    assert made.domains[0].describe()["geometry"] == "both sides to 224"
    few = tta.stream("pacs", root=tmp_path, domains=["sketch", "photo"], samples=3, by_class=True)
    assert [(domain.name, domain.labels.tolist()) for domain in few.domains] == [
        ("sketch", [0, 0, 1]),
        ("photo", [0, 0, 1]),
    ]


def test_one_domain_of_pacs_is_left_out_of_training(tmp_path):
    build(tmp_path, domain_folders.PACS.domains, PACS_CLASSES)
    stream = tta.stream("pacs", root=tmp_path, held_out="cartoon", resize=16, batch_size=20)
    assert [domain.name for domain in stream.domains] == ["cartoon"]
    rest = catalog.source_images("pacs", stream={"root": tmp_path, "held_out": "cartoon", "resize": 16})
    reds = [float(image[0, 5, 5]) for image, _ in rest]
    assert len(rest) == 3 * 14
    assert {round(red / 60) for red in reds} == {0, 2, 3}  # the second domain is the cartoons
    with pytest.raises(ValueError, match=r"stream\.held_out= one of art_painting, cartoon, photo, sketch; got 'comic'"):
        catalog.source_images("pacs", stream={"root": tmp_path, "held_out": "comic"})
    with pytest.raises(ValueError, match="'digits-c' has no setting 'held_out' for its training images"):
        catalog.source_images("digits-c", stream={"held_out": "fog"})


@pytest.mark.parametrize("real", ["Real World", "Real_World"])
def test_officehome(tmp_path, monkeypatch, real):
    monkeypatch.setattr(domain_folders, "OFFICEHOME", domain_folders.OFFICEHOME._replace(classes=2))
    build(tmp_path / "OfficeHomeDataset_10072016", ["Art", "Clipart", "Product", real], ["Alarm_Clock", "Backpack"])
    made = tta.stream("officehome", root=tmp_path, domains=["real_world", "art"], batch_size=4)
    assert [domain.name for domain in made.domains] == ["real_world", "art"]
    assert made[0].images.shape == (4, 3, 224, 224)
    assert made[0].images[:, 0, 9, 9].tolist() == pytest.approx([180] * 4, abs=3)


@pytest.mark.parametrize(
    ("name", "kind"), [("officehome", "OFFICEHOME"), ("pacs", "PACS"), ("domainnet-126", "DOMAINNET_126")]
)
def test_classes_that_somebody_numbered_need_an_order(tmp_path, monkeypatch, name, kind):
    published = getattr(domain_folders, kind)
    monkeypatch.setattr(domain_folders, kind, published._replace(classes=3))
    build(tmp_path, [folders[0] for folders in published.domains.values()], ["1", "2", "10"])

    def found(**settings):
        made = tta.stream(name, root=tmp_path, by_class=True, **settings)
        return [domain.labels.tolist() for domain in made.domains]

    with pytest.warns(UserWarning, match="order 1, 10, 2; as numbers 1, 2, 10.*class_order="):
        assert found() == [[0, 0, 1, 1, 2, 2]] * 4
    assert found(class_order="number") == [[0, 0, 2, 2, 1, 1]] * 4  # the files come in the order of the text


@pytest.fixture
def domainnet(tmp_path, monkeypatch):
    """Three classes, of which the lists name two."""
    monkeypatch.setattr(domain_folders, "DOMAINNET_126", domain_folders.DOMAINNET_126._replace(classes=2))
    root = tmp_path / "domainnet-126"
    build(root, ["clipart", "painting", "real", "sketch"], ["aardvark", "bus", "cup"])
    for name in ("clipart", "sketch"):
        lines = [
            f"{name}/{label}/0000{number}.jpg {place}"
            for place, label in enumerate(("bus", "cup"))
            for number in (1, 0)
        ]
        (root / f"{name}_list.txt").write_text("\n".join(lines) + "\n")
    return root


def test_domainnet_lists_choose_and_count_the_classes(domainnet, tmp_path):
    made = tta.stream("domainnet-126", root=tmp_path, domains=["sketch", "clipart"], by_class=True, batch_size=4)
    assert made.domains[1].labels.tolist() == [0, 0, 1, 1]
    batch = made[0]
    assert batch.images.shape == (4, 3, 224, 224)
    assert batch.images[:, 1, 9, 9].tolist() == pytest.approx([20, 20, 40, 40], abs=3)
    assert batch.images[:, 2, 9, 9].tolist() == pytest.approx([90, 0, 90, 0], abs=4)
    elsewhere = tmp_path / "lists"
    elsewhere.mkdir()
    (domainnet / "clipart_list.txt").rename(elsewhere / "clipart_list.txt")
    again = tta.stream("domainnet-126", root=domainnet, lists=elsewhere, domains=["clipart"])
    assert sorted(again.domains[0].labels.tolist()) == [0, 0, 1, 1]
    with pytest.raises(FileNotFoundError, match=r"no list of images '.*sketch_list\.txt'"):
        tta.stream("domainnet-126", root=domainnet, lists=elsewhere, domains=["sketch"])


@pytest.mark.parametrize(
    ("line", "error", "message"),
    [
        (
            "clipart/bus/00000.jpg 2",
            ValueError,
            r"line 1: .* of no known class \(expected a path and a number from 0 to 1\)",
        ),
        ("clipart/bus/00000.jpg", ValueError, "line 1: .* of no known class"),
        ("clipart/bus/9.jpg 0", FileNotFoundError, r"1 of 1 images are not in .*: clipart/bus/9\.jpg"),
    ],
)
def test_a_bad_list_is_named(domainnet, line, error, message):
    (domainnet / "clipart_list.txt").write_text(line)
    with pytest.raises(error, match=message):
        tta.stream("domainnet-126", root=domainnet, domains=["clipart"])


def test_what_is_missing_is_named(domainnet, tmp_path):
    with pytest.raises(
        ValueError, match=r"painting' has 3 class folders; expected 2; of the full DomainNet .*lists=PATH"
    ):
        tta.stream("domainnet-126", root=domainnet, domains=["painting"])
    with pytest.raises(ValueError, match=r"one or more of clipart, painting, real, sketch; got \['infograph'\]"):
        tta.stream("domainnet-126", root=domainnet, domains=["infograph"])
    with pytest.raises(FileNotFoundError, match=r"No PACS/ or .*Looked for art_painting/CLASS/IMAGE, from https"):
        tta.stream("pacs", root=tmp_path / "nowhere")
    build(tmp_path / "PACS", ["photo"], PACS_CLASSES)
    with pytest.raises(FileNotFoundError, match=r"PACS' has no domain 'cartoon': it holds photo\. Get it"):
        tta.stream("pacs", root=tmp_path, domains=["photo", "cartoon"])
    build(tmp_path / "PACS", ["cartoon"], PACS_CLASSES[1:])
    with pytest.raises(ValueError, match=r"cartoon' has 6 class folders; expected 7\. Missing: dog"):
        tta.stream("pacs", root=tmp_path, domains=["photo", "cartoon"])


def test_a_stream_of_other_classes_than_the_models_is_refused(tmp_path):
    build(tmp_path, domain_folders.PACS.domains, PACS_CLASSES)
    model = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(3, 10))
    stream = tta.stream("pacs", root=tmp_path, samples=2, resize=32)
    with pytest.raises(ValueError, match="Stream 'pacs' has 7 classes; the model gives 10 logits"):
        tta.evaluate(tta.adapt(model, "source"), stream, progress=False, accelerator="cpu")
