"""Source statistics: recorded once, saved, checked on use. And the taps that they are recorded with."""

import copy
import json
import os

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

import tta
from tta import taps
from tta.benchmark import runs
from tta.cli import main
from tta.datasets import catalog
from tta.methods import source_needs
from tta.source import Need, SourceStatistics


def known(model, need, source, **settings):
    return SourceStatistics.record(model, [need], source, **settings).get(need)


@pytest.fixture
def features():
    return Need("feature_moments", ("fc",))


def plain_features(cnn, images):
    with torch.no_grad():
        return nn.Sequential(*list(cnn.eval().children())[:-1])(images).mean((2, 3))


def test_feature_moments_are_over_all_images(cnn, golden_source, features):
    found = known(cnn, features, golden_source[:100])
    expected = plain_features(cnn, golden_source[:100])
    torch.testing.assert_close(found["mean"], expected.mean(0))
    torch.testing.assert_close(found["std"], expected.std(0))


def test_feature_moments_of_the_first_confident_images(cnn, golden_source):
    with torch.no_grad():
        probabilities = cnn.eval()(golden_source).softmax(1)
    entropies = -(probabilities * probabilities.log()).nan_to_num().sum(1)
    threshold = entropies.median().item()
    expected = plain_features(cnn, golden_source[entropies < threshold][:40])
    need = Need("feature_moments", ("fc",), settings={"samples": 40, "max_entropy": threshold})
    torch.testing.assert_close(known(cnn, need, golden_source)["mean"], expected.mean(0))
    with pytest.raises(ValueError, match="0 source images are left"):
        known(cnn, Need("feature_moments", ("fc",), settings={"max_entropy": 0.0}), golden_source[:64])


def test_replay_keeps_a_random_sample_of_the_images_with_their_labels(cnn):
    images = (torch.arange(200) / 255)[:, None, None, None].expand(200, 3, 8, 8)
    need = Need("replay", labels=True, settings={"samples": 50})
    found = known(cnn, need, TensorDataset(images, torch.arange(200)))
    assert found["images"].dtype == torch.uint8
    assert torch.equal(found["images"][:, 0, 0, 0].long(), found["labels"])
    assert len(found["labels"].unique()) == 50
    assert 70 < found["labels"].float().mean() < 130  # of a sample: 99.5 with a standard error of 7; the first 50: 24.5
    assert torch.equal(known(cnn, Need("replay", settings={"samples": 500}), images)["labels"], torch.full((200,), -1))


@pytest.mark.parametrize("labels", [True, False])
def test_class_moments(cnn, golden_source, labels):
    images, given = golden_source[:100], torch.arange(100) % 9
    found = known(
        cnn, Need("class_moments", ("fc",), labels=labels), [(images[:60], given[:60]), (images[60:], given[60:])]
    )
    classes = given if labels else cnn.eval()(images).argmax(1)
    expected = plain_features(cnn, images)
    for c in range(10):
        mine = expected[classes == c]
        torch.testing.assert_close(found["mean"][c], mine.mean(0) if len(mine) else torch.zeros(64))
        torch.testing.assert_close(found["prior"][c], torch.tensor(len(mine) / 100))


def test_labels_are_asked_for_where_a_need_has_them(cnn, golden_source):
    with pytest.raises(ValueError, match=r"needs labelled source images: pass batches \(images, labels\)"):
        known(cnn, Need("class_moments", ("fc",), labels=True), golden_source[:64])


def test_every_form_of_source_gives_the_same(cnn, golden_source, tmp_path):
    images = golden_source[:150]
    labels = torch.zeros(150)
    forms = {
        "tensor": images,
        "uint8": (images * 255).round().to(torch.uint8),
        "dataset": TensorDataset(images, labels),
        "loader": DataLoader(TensorDataset(images), batch_size=64),
        "pairs": list(zip(images.split(64), labels.split(64), strict=True)),
        "generator": (x for x in images.split(64)),
        "statistics": SourceStatistics.record(cnn, source_needs(cnn, "eata"), images),
    }
    forms["statistics"].save(tmp_path / "source.safetensors")
    forms["path"] = tmp_path / "source.safetensors"
    forms["text"] = str(forms["path"])
    expected = tta.adapt(cnn, "eata", source=images).fisher
    for form, source in forms.items():
        torch.testing.assert_close(tta.adapt(cnn, "eata", source=source).fisher, expected, msg=form)


def test_an_iterable_keeps_its_own_batch_size(cnn, golden_source):
    own = tta.adapt(cnn, "eata", source=golden_source[:96].split(32))
    split = tta.adapt(cnn, "eata", source=golden_source[:96], source_batch_size=32)
    assert torch.equal(own.fisher, split.fisher)
    assert own.source_statistics[0]["batch_size"] == 32


def test_batches_are_regrouped_for_each_need(cnn, golden_source):
    class Counting(TensorDataset):
        read = 0

        def __getitem__(self, i):
            Counting.read += 1
            return super().__getitem__(i)

    layers = source_needs(cnn, "eata")[0].layers
    needs = [Need("fisher", layers, "batch", size) for size in (10, 64, 30)]
    recorded = SourceStatistics.record(cnn, needs, Counting(golden_source[:97], torch.zeros(97)), batch_size=25)
    assert Counting.read == 97  # images are decoded once for all that is recorded
    for need in needs:
        alone = known(cnn, need, golden_source[:97].split(need.batch_size))
        for name, value in recorded.get(need).items():
            torch.testing.assert_close(value, alone[name])


def test_the_model_is_left_as_it_was(cnn, golden_source):
    cnn.train()
    before = copy.deepcopy(cnn.state_dict())
    SourceStatistics.record(cnn, source_needs(cnn, "eata"), golden_source[:64])
    assert all(torch.equal(value, before[name]) for name, value in cnn.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in cnn.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in cnn.parameters())


def test_a_saved_file_comes_back_whole(cnn, golden_source, features, tmp_path):
    needs = [*source_needs(cnn, "eata"), features]
    statistics = SourceStatistics.record(cnn, needs, golden_source[:80])
    statistics.save(tmp_path / "source.safetensors")
    loaded = SourceStatistics.load(tmp_path / "source.safetensors")
    assert loaded.model == statistics.model
    assert loaded.describe() == statistics.describe()
    assert [entry.images for entry in loaded.entries] == [80, 80]
    for need in needs:
        assert all(torch.equal(value, loaded.get(need)[name]) for name, value in statistics.get(need).items())


def test_a_file_is_written_whole_or_not_at_all(cnn, golden_source, features, tmp_path, monkeypatch):
    file = tmp_path / "source.safetensors"
    statistics = SourceStatistics.record(cnn, [features], golden_source)
    statistics.save(file)
    before = file.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(OSError, match="no space left"):
        statistics.save(file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_another_model_is_refused(cnn, golden_source):
    statistics = SourceStatistics.record(cnn, source_needs(cnn, "eata"), golden_source[:64])
    with torch.no_grad():
        cnn.fc.bias[0] += 1e-6
    with pytest.raises(ValueError, match="recorded with other weights: fingerprint"):
        tta.adapt(cnn, "eata", source=statistics)


def test_other_settings_are_refused_by_name(cnn, golden_source, features):
    statistics = SourceStatistics.record(cnn, [*source_needs(cnn, "eata"), features], golden_source[:64])
    with pytest.raises(ValueError, match=r"batch_size \(64 recorded, 32 asked for\)"):
        tta.adapt(cnn, "eata", source=statistics, fisher_batch_size=32)
    with pytest.raises(ValueError, match=r"layers \(1 asked for, 1 recorded; missing: \['layer1'\]\)"):
        statistics.get(Need("feature_moments", ("layer1",)))
    with pytest.raises(ValueError, match=r"settings \({} recorded, {'samples': 3} asked for\)"):
        statistics.get(Need("feature_moments", ("fc",), settings={"samples": 3}))
    with pytest.raises(ValueError, match="class_moments asked for: they hold feature_moments, fisher"):
        statistics.get(Need("class_moments", ("fc",)))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (torch.rand(3, 32, 32), r"found a tensor of shape \(3, 32, 32\)"),
        (list(torch.rand(2, 3, 32, 32)), r"found a tensor of shape \(3, 32, 32\)"),
        ({"images": 1}, "found str"),
        ([], "holds no images"),
        (torch.rand(0, 3, 32, 32), "holds no images"),
        (torch.rand(1, 3, 32, 32), "No source batch holds two images"),
        ("nowhere.safetensors", "No source statistics at 'nowhere.safetensors'"),
    ],
)
def test_what_is_no_source_is_named(cnn, source, message):
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        tta.adapt(cnn, "eata", source=source)


def test_other_files_are_refused(cnn, tmp_path):
    (tmp_path / "text").write_text("no tensors here")
    with pytest.raises(ValueError, match="does not hold source statistics"):
        SourceStatistics.load(tmp_path / "text")
    save_file({"weight": torch.zeros(1)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="does not hold source statistics, or was written by another version"):
        SourceStatistics.load(tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match="No kind of source statistics 'fishes'"):
        SourceStatistics.record(cnn, [Need("fishes")], torch.rand(2, 3, 32, 32))


def test_the_manifest_names_what_was_known(cnn, golden_source):
    stream = tta.stream({"a": TensorDataset(golden_source[:32], torch.zeros(32, dtype=torch.int64))})
    result = tta.evaluate(tta.adapt(cnn, "eata", source=golden_source[:70]), stream, progress=False)
    (entry,) = result.manifest["source_statistics"]
    assert (entry["kind"], entry["batch_size"], entry["images"]) == ("fisher", 64, 70)
    assert len(entry["content"]) == 64


def test_a_method_without_need_does_not_look_at_the_source(cnn):
    assert tta.adapt(cnn, "tent", source=object()).source_statistics == []


# ---------------------------------------------------------------------- taps


class Wrapped(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: timm.create_model("resnet10t", num_classes=5), "fc"),
        (lambda: timm.create_model("convnext_atto", num_classes=5), "head.fc"),
        (lambda: timm.create_model("vit_tiny_patch16_224", num_classes=5, depth=1), "head"),
        (lambda: torchvision.models.mobilenet_v3_small(num_classes=5), "classifier.3"),
    ],
)
def test_features_are_the_input_of_the_head(make, name):
    torch.manual_seed(0)
    model = Wrapped(make().eval())
    found = taps.head(model)
    assert found == f"inner.{name}"
    with torch.no_grad(), taps.inputs(model, found) as seen:
        logits = model(torch.rand(2, 3, 224, 224))
    assert len(seen) == 1
    torch.testing.assert_close(model.get_submodule(found)(seen[0]), logits)
    assert not any(module._forward_pre_hooks for module in model.modules())


class Classifier(nn.Module):
    """A small network of which a subclass decides how features become logits; ``last`` comes after the head, unused."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc, self.last = (
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.Linear(4, 5),
            nn.Linear(5, 2),
        )

    def features(self, x):
        return self.norm(self.conv(x)).relu().mean((2, 3))

    def forward(self, x):
        return self.fc(self.features(x))


class Functional(Classifier):
    def forward(self, x):
        return 3 * nn.functional.linear(self.features(x), self.fc.weight)


class Detached(Classifier):
    def forward(self, x):
        return self.fc(self.features(x).detach())


class DetachedInput(Classifier):
    def forward(self, x):
        return super().forward(x.detach().mul(255).round())


class WithoutGradient(Classifier):
    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


class Scaled(Classifier):
    def __init__(self):
        super().__init__()
        self.temperature, self.after = nn.Parameter(torch.ones(5)), nn.BatchNorm1d(5)

    def forward(self, x):
        return self.after(super().forward(x)) * self.temperature


class WeightNormed(Classifier):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.weight_norm(self.fc)


class TwoHeads(Classifier):
    def __init__(self):
        super().__init__()
        self.second = nn.Linear(4, 5)

    def forward(self, x):
        return (self.fc(self.features(x)) + self.second(self.features(x))) / 2


class FixedSize(Classifier):
    def forward(self, x):
        assert x.shape[2:] == (28, 28)
        return super().forward(x)


class Grey(Classifier):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3)


HEADED = [Classifier, Functional, Detached, DetachedInput, WithoutGradient, Scaled, WeightNormed, FixedSize, Grey]


@pytest.mark.parametrize("kind", HEADED)
def test_the_head_is_what_makes_the_logits(kind):
    """Not the last linear layer in the model, which nothing reaches."""
    model = kind().train().requires_grad_(False)
    assert taps.head(model) == "fc"
    assert all(module.training for module in model.modules())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert int(model.norm.num_batches_tracked) == 0
    assert not any(module._forward_hooks for module in model.modules())


def test_finding_the_head_draws_no_numbers():
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    model = Classifier()
    torch.manual_seed(3)
    taps.head(model)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (TwoHeads, ["fc", "second"]),
        (
            lambda: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5, img_size=32, depth=1),
            ["head", "head_dist"],
        ),
    ],
)
def test_two_heads_stay_and_a_method_that_needs_one_says_so(make, names):
    model = make()
    assert taps.heads(model) == names
    taps.unfreeze(model, "features")
    assert [n.rpartition(".")[0] for n, p in model.named_parameters() if not p.requires_grad][::2] == names
    taps.unfreeze(model, "head")
    assert [n.rpartition(".")[0] for n, p in model.named_parameters() if p.requires_grad][::2] == names
    with pytest.raises(
        ValueError, match=rf"2 layers that make the logits together \({', '.join(names)}\); expected one"
    ):
        tta.adapt(model, "t3a")


def test_a_convolution_that_makes_the_logits_is_kept_and_is_no_linear_head():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    adapter = tta.adapt(model, "shot")
    assert [name for name, p in adapter.model.named_parameters() if not p.requires_grad] == ["2.weight", "2.bias"]
    with pytest.raises(ValueError, match=r"made by Conv2d '2', which is no nn\.Linear"):
        tta.adapt(model, "t3a")


def test_a_model_that_takes_no_noise_has_its_last_linear_layer_as_head():
    class Tokens(Classifier):
        def forward(self, x):
            raise KeyError("pixels of its own")

    assert taps.heads(Tokens()) == ["last"]
    assert taps.heads(nn.Sequential(nn.Flatten(), nn.Linear(3 * 17 * 17, 5))) == ["1"]


def test_a_model_of_transformers_is_looked_at_in_its_own_size():
    """Smaller images would change the windows of this one for good."""
    transformers = pytest.importorskip("transformers", reason="models of Hugging Face need the extra 'hf'")
    config = transformers.SwinConfig(embed_dim=24, depths=[1, 1, 1, 1])
    model = transformers.AutoModelForImageClassification.from_config(config).eval()
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x).logits
        assert taps.head(model) == "classifier"
        assert torch.equal(model(x).logits, expected)


def test_a_head_may_be_named(cnn):
    assert taps.head(cnn, "fc") == "fc"
    with pytest.raises(ValueError, match=r"GoldenCNN has no linear layer 'head'\. It has: fc"):
        taps.head(cnn, "head")
    with pytest.raises(ValueError, match=r"no nn\.Linear"):
        taps.head(nn.Conv2d(3, 3, 3))


def test_activations_are_seen_before_an_in_place_relu_and_at_every_call():
    bn = nn.BatchNorm2d(3)
    model = nn.Sequential(bn, nn.ReLU(inplace=True), bn).eval()
    x = torch.randn(4, 3, 5, 5)
    with taps.activations(model, ["0"], torch.Tensor.clone) as seen:
        model(x)
    assert list(seen) == ["0", "0:1"]
    torch.testing.assert_close(seen["0"], bn(x))
    torch.testing.assert_close(seen["0:1"], bn(bn(x).relu()))


def test_layers_are_chosen_by_pattern_from_any_dot_on():
    names = ["model.bn1", "model.layer3.0.bn1", "model.layer3.0.bn2", "model.layer30.bn1"]
    assert taps.select(names, None) == names
    assert taps.select(names, ["layer3.*"]) == names[1:3]
    assert taps.select(names, ["bn1"]) == [names[0], names[1], names[3]]
    with pytest.raises(ValueError, match=r"No layer matches 'layer9\.\*'. There are: model\.bn1"):
        taps.select(names, ["bn1", "layer9.*"])


# ---------------------------------------------------------------------- command line


def result_of(folder, method):
    (file,) = folder.rglob(f"{method}/result.json")
    return json.loads(file.read_text())


def test_run_gives_methods_the_source_images_of_the_stream(tmp_path, capsys):
    words = ["digits-c", "eata", "corruptions=[fog]", "samples=100", "severity=3"]
    assert main(["run", *words, "--out", str(tmp_path)]) == 0
    (entry,) = result_of(tmp_path, "eata")["manifest"]["source_statistics"]
    assert (entry["kind"], entry["images"]) == ("fisher", 997)


def test_recorded_statistics_stand_in_for_the_images(tmp_path, capsys):
    file, words = str(tmp_path / "new" / "source.safetensors"), ["eata", "actmad", "eata.lr=0.01"]
    assert main(["source", "digits-cnn", "digits-c", *words, "-o", file]) == 0
    assert {entry.need.kind for entry in SourceStatistics.load(file).entries} == {"fisher", "activation_moments"}
    words = ["digits-c", *words, "corruptions=[fog]", "samples=100"]
    assert main(["run", *words, "--out", str(tmp_path / "images")]) == 0
    assert main(["run", *words, f"source={file}", "--out", str(tmp_path / "file")]) == 0
    for method in ("eata", "actmad"):
        with_images, with_file = (result_of(tmp_path / kind, method) for kind in ("images", "file"))
        assert with_images["errors"] == with_file["errors"]
        assert with_images["manifest"]["source_statistics"] == with_file["manifest"]["source_statistics"]


def test_statistics_that_are_there_are_replaced_only_by_force(tmp_path, capsys, monkeypatch):
    file = tmp_path / "source.safetensors"
    file.write_bytes(b"hours of work")
    words = ["source", "digits-cnn", "digits-c", "eata", "-o", str(file)]
    with monkeypatch.context() as patched:
        patched.setattr(runs, "record", lambda *_, **__: pytest.fail("an image was read"))
        assert main(words) == 2
    assert f"'{file}' exists: name another file, or replace it with --force." in capsys.readouterr().err
    assert file.read_bytes() == b"hours of work"
    assert main([*words, "--force"]) == 0
    assert [entry.need.kind for entry in SourceStatistics.load(file).entries] == ["fisher"]


def test_a_folder_of_images_is_a_source(tmp_path, capsys):
    for label in ("cat", "dog"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for number in range(6):
            pixels = torch.randint(0, 256, (3, 48, 40), dtype=torch.uint8)
            to_pil_image(pixels).save(tmp_path / "images" / label / f"{number}.png")
    file = tmp_path / "source.safetensors"
    assert main(["source", "digits-vit", str(tmp_path / "images"), "dpcore", "-o", str(file)]) == 0
    assert SourceStatistics.load(file).entries[0].images == 12
    words = ["digits-c", "eata", f"source={tmp_path / 'images'}", "corruptions=[fog]", "samples=100"]
    assert main(["run", *words, "--out", str(tmp_path)]) == 0
    first = [catalog.source_images(str(tmp_path / "images"), {"input_size": [32, 32]})[i] for i in range(6)]
    assert first[0][0].shape == (3, 32, 32)
    assert {label for _, label in first} == {0, 1}
    assert catalog.source_images(str(tmp_path / "images"), {"input_size": [48, 40]})[0][0].shape == (3, 48, 40)


def test_a_folder_of_images_alone_is_a_source_without_labels(tmp_path):
    for number in range(6):
        pixels = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
        to_pil_image(pixels).save(tmp_path / f"{number}.png")
    images = catalog.source_images(str(tmp_path))
    assert {tuple(images[i].shape) for i in range(len(images))} == {(3, 32, 32)}
    model = tta.load_model("digits-cnn")
    one, two = (
        SourceStatistics.record(model, source_needs(model, "eata"), images, num_workers=n).entries[0] for n in (0, 2)
    )
    assert one.images == 6
    assert all(torch.equal(value, two.known[key]) for key, value in one.known.items())
    labelled = [Need("class_moments", ("fc",), labels=True)]
    with pytest.raises(ValueError, match="class_moments needs labelled source images"):
        SourceStatistics.record(model, labelled, images)


def test_a_broken_source_image_is_named_or_skipped(tmp_path, capsys):
    images = tmp_path / "images" / "cat"
    images.mkdir(parents=True)
    for number in range(6):
        to_pil_image(torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)).save(images / f"{number}.png")
    (images / "3.png").write_text("<html>")
    statistics = ["-o", str(tmp_path / "source.safetensors")]
    for workers in ("num_workers=0", "num_workers=1"):
        assert main(["source", "digits-cnn", str(tmp_path / "images"), "eata", workers, *statistics]) == 1
        shown = capsys.readouterr().err
        assert f"tta: '{images / '3.png'}' cannot be used as an image: cannot identify image file. It has 6" in shown
        assert "Traceback" not in shown
    with pytest.warns(UserWarning, match=r"1 of 6 files .* skipped: cat/3\.png"):
        assert len(catalog.source_images(str(tmp_path / "images"), on_error="skip")) == 5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["digits-cnn", "digits-c", "tent"], "Nothing to record: tent need not know the source domain"),
        (["digits-cnn", "nowhere", "eata"], "No folder of images or stream 'nowhere'"),
        (["digits-cnn", "digits-c", "eata", "severity=3"], "'severity' is a setting of a stream"),
        (["digits-cnn", "digits-c", "dpcore"], "Looked for a timm VisionTransformer"),
    ],
)
def test_what_cannot_be_recorded_is_a_usage_error(words, message, tmp_path, capsys):
    assert main(["source", *words, "-o", str(tmp_path / "file")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "file").exists()


def test_a_run_without_source_says_what_to_give(tmp_path, capsys, monkeypatch):
    monkeypatch.delattr("tta.datasets.digits_c.source_images")
    assert main(["run", "digits-c", "eata", "--out", str(tmp_path)]) == 2
    assert "Stream 'digits-c' offers no source images. Name a folder of images, or stat" in capsys.readouterr().err
    assert main(["run", "digits-c", "eata", "source=nowhere", "--out", str(tmp_path)]) == 2
    assert "No source statistics at 'nowhere'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "entries",
    ["", "5", "[1]", "[{}]", '[{"need": {"kind": "x"}, "images": 1}]', '[{"need": {"layers": 3}, "images": 1}]', None],
)
def test_broken_statistics_are_named_with_the_file(tmp_path, entries):
    header = {"source_statistics": "1", "model": "m"} | ({} if entries is None else {"entries": entries})
    save_file({"0.x": torch.zeros(1)}, tmp_path / "s.safetensors", header)
    with pytest.raises(ValueError, match=r"s\.safetensors' does not hold source statistics that can be read"):
        tta.SourceStatistics.load(tmp_path / "s.safetensors")
