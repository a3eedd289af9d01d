"""Model specs: what is loaded, what is refused, and that normalisation happens once."""

import huggingface_hub
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.models._hub import has_hf_hub

import tta
from tta.datasets import digits
from tta.models import EMBEDDED, HALF, IMAGENET_MEAN, IMAGENET_STD, ImageClassifier
from tta.models.checkpoints import load_weights
from tta.models.networks import PaddedShortcut


def per_channel(values):
    return torch.tensor(values).view(1, 3, 1, 1)


@pytest.mark.parametrize(
    ("spec", "mean", "size", "resize", "interpolation"),
    [
        ("timm:resnet18.a1_in1k", IMAGENET_MEAN, 224, 235, "bicubic"),
        ("timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k", HALF, 224, 248, "bicubic"),
        ("timm:convnext_atto.d2_in1k", IMAGENET_MEAN, 224, 256, "bicubic"),
        ("timm:tf_efficientnet_lite0.in1k", HALF, 224, 256, "bicubic"),
        ("torchvision:resnet18/IMAGENET1K_V1", IMAGENET_MEAN, 224, 256, "bilinear"),
        pytest.param("torchvision:vit_b_16/IMAGENET1K_V1", IMAGENET_MEAN, 224, 256, "bilinear", marks=pytest.mark.slow),
        ("torchvision:convnext_tiny/IMAGENET1K_V1", IMAGENET_MEAN, 224, 236, "bilinear"),
        ("torchvision:efficientnet_b0/IMAGENET1K_V1", IMAGENET_MEAN, 224, 256, "bicubic"),
    ],
)
def test_mean_and_std_are_applied_once_and_recorded(spec, mean, size, resize, interpolation):
    model = tta.load_model(spec, pretrained=False, num_classes=7)
    found = model.preprocessing
    assert found == {
        "input_size": [size, size],
        "interpolation": interpolation,
        "resize": resize,
        "crop": "center",
        "mean": list(mean),
        "std": list(HALF if mean == HALF else IMAGENET_STD),
    }
    side = size if "vit" in spec else 64
    images = torch.rand(1, 3, side, side)
    seen = []
    model.model.register_forward_pre_hook(lambda network, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        logits = model(images)
        assert torch.equal(seen[0], (images - per_channel(mean)) / per_channel(found["std"]))
        assert torch.equal(logits, model.model(seen[0]))
    assert logits.shape == (1, 7)


@pytest.mark.parametrize("name", [name for name, own in EMBEDDED.items() if own.clean_error is not None])
def test_embedded_models_promise_the_error_that_they_have(name):
    images, labels, _ = digits.split("test")
    model = tta.load_model(name)
    with torch.no_grad():
        logits = model(images.float() / 255)
    known = labels < logits.shape[1]
    wrong = (logits.argmax(1) != labels)[known].float().mean().item()
    assert model.clean_error == pytest.approx(100 * wrong, abs=0.01)
    assert model.clean_error < 4
    assert not model.training
    assert tta.load_model(name, pretrained=False).clean_error is None


@pytest.mark.parametrize(
    ("depth", "parameters"), [(20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962)]
)
def test_cifar_resnets_have_the_published_sizes(depth, parameters):
    """0.27, 0.46, 0.66, 0.85 and 1.7 million in He et al., table 6."""
    model = tta.load_model(f"cifar-resnet{depth}", pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    names = set(model.model.state_dict())
    last = (depth - 2) // 6 - 1
    assert {"conv1.weight", "bn1.running_var", f"layer3.{last}.bn2.weight", "linear.bias"} <= names
    assert not any("shortcut" in name for name in names)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_option_a_shortcut_takes_every_second_pixel_and_pads_channels():
    x = torch.rand(2, 16, 8, 8)
    padded = PaddedShortcut(16, 32, 2)(x)
    assert torch.equal(padded[:, 8:24], x[:, :, ::2, ::2])
    assert padded[:, :8].abs().sum() == padded[:, 24:].abs().sum() == 0


def test_a_spec_without_weights_asks_for_a_checkpoint():
    with pytest.raises(ValueError, match="'cifar-resnet20' has no weights of its own: give checkpoint=PATH"):
        tta.load_model("cifar-resnet20")


def test_given_mean_and_std_replace_those_of_the_spec(tmp_path):
    model = tta.load_model("cifar-resnet20", pretrained=False, mean=(0.4914, 0.4822, 0.4465), std=(0.2, 0.2, 0.3))
    assert model.preprocessing["mean"] == [0.4914, 0.4822, 0.4465]
    assert model.std.flatten().tolist() == pytest.approx([0.2, 0.2, 0.3])
    with pytest.raises(ValueError, match="three numbers each"):
        tta.load_model("cifar-resnet20", pretrained=False, mean=(0.5,))


def test_torchvision_reads_the_weights_that_the_spec_names(tmp_path, monkeypatch):
    """The library's own cache stands in for its server; it holds random weights under the published name."""
    donor = torchvision.models.resnet18()
    published = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    cache = tmp_path / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    torch.save(donor.state_dict(), cache / published.url.rpartition("/")[2])
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    model = tta.load_model("torchvision:resnet18/DEFAULT")
    assert torch.equal(model.model.fc.weight, donor.fc.weight)
    assert model.spec == "torchvision:resnet18/IMAGENET1K_V1"
    assert model.clean_error == pytest.approx(30.242)
    assert model.class_names == published.meta["categories"]
    assert not model.training
    with pytest.warns(UserWarning, match="'torchvision:resnet18/IMAGENET1K_V1' was trained for 1000 classes: the head"):
        model = tta.load_model("torchvision:resnet18/DEFAULT", num_classes=7, new_head=True)
    assert torch.equal(model.model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert (model.model.fc.out_features, model.class_names) == (7, None)


@pytest.mark.skipif(not has_hf_hub(), reason="timm 1.0.3 does not import today's huggingface_hub")
def test_timm_reads_the_weights_of_the_tag(tmp_path, monkeypatch):
    """The hub's own cache stands in for its server; it holds random weights under the published name."""
    donor = timm.create_model("resnet18")
    folder = tmp_path / "models--timm--resnet18.a1_in1k"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(donor.state_dict(), folder / "snapshots" / ("0" * 40) / "model.safetensors")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    model = tta.load_model("timm:resnet18")
    assert torch.equal(model.model.fc.weight, donor.fc.weight)
    assert model.spec == "timm:resnet18.a1_in1k"
    assert [model.class_names[0], model.class_names[999]] == [
        "tench, Tinca tinca",
        "toilet tissue, toilet paper, bathroom tissue",
    ]
    with pytest.warns(
        UserWarning, match=r"'timm:resnet18.a1_in1k' was trained for 1000 classes: the head \(fc\) starts"
    ):
        model = tta.load_model("timm:resnet18", num_classes=7, new_head=True)
    assert torch.equal(model.model.layer4[1].conv2.weight, donor.layer4[1].conv2.weight)
    assert (model.model.fc.out_features, model.class_names) == (7, None)
    assert model.clean_error is None


@pytest.mark.parametrize(
    ("spec", "settings", "message"),
    [
        ("digits-cn", {}, "No model 'digits-cn'. Did you mean 'digits-cnn'"),
        ("tmm:resnet18", {}, "No model 'tmm:resnet18'. Did you mean 'timm:resnet18'"),
        ("timm:", {}, "No model 'timm:'"),
        ("timm:resnet19x", {}, "timm has no model 'resnet19x'. Did you mean"),
        (
            "timm:resnet18.a9_in1k",
            {},
            "'timm:resnet18' has no weights 'a9_in1k'. Did you mean 'a.*There are: .*a1_in1k",
        ),
        ("timm:resnet18.a1_in1k", {"num_classes": 10}, "are for 1000 classes; num_classes=10 would leave"),
        ("torchvision:resnet19", {}, "torchvision has no classifier 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:resnet18/BEST", {}, "'resnet18' has no weights 'BEST'. There are: IMAGENET1K_V1"),
        ("torchvision:resnet50", {}, "names no weights: say torchvision:resnet50/IMAGENET1K_V1 or .*V2"),
        ("torchvision:resnet18/DEFAULT", {"num_classes": 10}, "are for 1000 classes; num_classes=10"),
        ("robustbench:Standrd", {}, "No model 'robustbench:cifar10/Standrd' here. Did you mean 'cifar10/Standard'"),
        ("robustbench:cifar100/Standard", {}, "No model 'robustbench:cifar100/Standard' here"),
        ("robustbench:cifar10/Standard", {"num_classes": 100}, "are for 10 classes; num_classes=100"),
        ("timm:models", {}, "timm has no model"),
        ("json:laods", {}, "Module 'json' has no function 'laods'. Did you mean 'loads'"),
        ("no.such.module:build", {}, "No model 'no.such.module:build'"),
    ],
)
def test_unknown_specs_are_answered(spec, settings, message):
    with pytest.raises(ValueError, match=message):
        tta.load_model(spec, **settings)


def test_a_function_of_yours_makes_the_network(tmp_path, monkeypatch):
    (tmp_path / "my_models.py").write_text(
        "import torch\n"
        "def small(num_classes=3):\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, num_classes))\n"
        "def number(): return 7\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    model = tta.load_model("my_models:small", num_classes=4)
    images = torch.rand(2, 3, 2, 2)
    assert torch.equal(model(images), model.model(images))
    assert model(images).shape == (2, 4)
    assert model.spec == "my_models:small"
    scaled = tta.load_model("my_models:small", mean=HALF, std=HALF)
    assert torch.allclose(scaled(images), scaled.model(2 * images - 1))
    torch.save(model.model.state_dict(), tmp_path / "w.pt")
    loaded = tta.load_model("my_models:small", checkpoint=tmp_path / "w.pt", num_classes=4)
    assert torch.equal(loaded(images), model(images))
    with pytest.raises(TypeError, match=r"returned int; expected a torch\.nn\.Module"):
        tta.load_model("my_models:number")


@pytest.fixture
def linear():
    return torch.nn.Linear(3, 2)


WRAPS = [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {**s}}, lambda s: {"net": s, "epoch": 3}]


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model.", "backbone.net."])
@pytest.mark.parametrize("wrap", WRAPS)
def test_checkpoints_are_unwrapped(linear, tmp_path, wrap, prefix):
    state = {f"{prefix}{key}": torch.full_like(value, 2.0) for key, value in linear.state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    assert load_weights(linear, tmp_path / "weights.pth") is None
    assert (linear.weight == 2).all()


def test_a_prefix_of_the_network_itself_is_added(linear, tmp_path):
    save_file(linear.state_dict(), tmp_path / "w.safetensors")
    outer = torch.nn.Module()
    outer.network = torch.nn.Linear(3, 2)
    load_weights(outer, tmp_path / "w.safetensors")
    assert torch.equal(outer.network.weight, linear.weight)


@pytest.mark.parametrize(("mean", "std"), [("mu", "sigma"), ("normalize.mean", "normalize.std"), ("mean", "std")])
def test_normalisation_that_a_checkpoint_brings_is_used(tmp_path, mean, std):
    """Found once: in the checkpoint. Its network would be wrong by any other."""
    donor = tta.load_model("digits-cnn")
    state = {f"model.{key}" if "." in mean else key: value for key, value in donor.model.state_dict().items()}
    state |= {mean: torch.tensor([0.4, 0.5, 0.6]).view(1, 3, 1, 1), std: torch.full((1, 3, 1, 1), 0.25)}
    torch.save(state, tmp_path / "w.pt")
    model = tta.load_model("digits-cnn", checkpoint=tmp_path / "w.pt")
    assert model.preprocessing["mean"] == pytest.approx([0.4, 0.5, 0.6])
    assert model.std.flatten().tolist() == [0.25] * 3
    assert model.clean_error is None
    assert tta.load_model("digits-cnn", checkpoint=tmp_path / "w.pt", mean=HALF).preprocessing["mean"] == list(HALF)


def test_a_saved_classifier_loads_as_it_was(tmp_path):
    donor = tta.load_model("digits-cnn", mean=(0.1, 0.2, 0.3))
    save_file(donor.state_dict(), tmp_path / "w.safetensors")
    loaded = tta.load_model("digits-cnn", checkpoint=tmp_path / "w.safetensors")
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded(images), donor(images))


def test_a_checkpoint_for_other_classes_says_how_many(tmp_path):
    donor = tta.load_model("cifar-resnet20", pretrained=False, num_classes=100)
    save_file(donor.model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="It is for 100 classes, the network is for 10: num_classes=100"):
        tta.load_model("cifar-resnet20", checkpoint=tmp_path / "w.safetensors")
    assert tta.load_model("cifar-resnet20", checkpoint=tmp_path / "w.safetensors", num_classes=100)


@pytest.mark.parametrize(
    ("spec", "heads"),
    [
        ("cifar-resnet20", ["linear"]),
        ("timm:deit_tiny_distilled_patch16_224", ["head", "head_dist"]),
        ("torchvision:squeezenet1_1", ["classifier.1"]),
    ],
)
def test_a_new_head_is_as_it_starts_and_all_other_weights_are_the_checkpoints(spec, heads, tmp_path):
    donor = tta.load_model(spec, pretrained=False, num_classes=12)
    save_file({key: value.contiguous() for key, value in donor.model.state_dict().items()}, tmp_path / "w.safetensors")
    torch.manual_seed(1)
    start = tta.load_model(spec, pretrained=False, num_classes=7).model.state_dict()
    torch.manual_seed(1)
    said = rf"was trained for 12 classes: the head \({', '.join(heads)}\) starts at random for 7, all other"
    with pytest.warns(UserWarning, match=said):
        model = tta.load_model(spec, checkpoint=tmp_path / "w.safetensors", num_classes=7, new_head=True)
    for key, value in model.model.state_dict().items():
        assert torch.equal(value, (start if key.rpartition(".")[0] in heads else donor.model.state_dict())[key])


def test_a_new_head_is_made_only_where_the_number_of_classes_differs(tmp_path, recwarn):
    donor = tta.load_model("digits-cnn-8")
    save_file(donor.model.state_dict(), tmp_path / "w.safetensors")
    checkpoint = {"checkpoint": tmp_path / "w.safetensors", "new_head": True}
    same = tta.load_model("digits-cnn-8", **checkpoint)
    assert torch.equal(same.model.fc.weight, donor.model.fc.weight)
    with pytest.raises(ValueError, match="does not fit DigitsGN"):
        tta.load_model("digits-gn", num_classes=5, **checkpoint)
    wider = donor.model.state_dict() | {"fc.weight": torch.zeros(8, 65)}
    save_file(wider, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"1 of another shape: fc.weight \(8, 65\) instead of \(8, 64\)\.$"):
        tta.load_model("digits-cnn-8", **checkpoint)
    assert not recwarn.list


def test_a_new_head_on_the_weights_of_the_spec():
    donor = tta.load_model("digits-cnn-8")
    with pytest.raises(ValueError, match="num_classes=8 makes one for 8; `tta train` with num_classes=10 trains a new"):
        tta.load_model("digits-cnn-8", num_classes=10)
    with pytest.warns(UserWarning, match=r"'digits-cnn-8' was trained for 8 classes: the head \(fc\) starts at random"):
        model = tta.load_model("digits-cnn-8", num_classes=10, new_head=True)
    assert torch.equal(model.model.layer3.conv2.weight, donor.model.layer3.conv2.weight)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert (model.class_names, model.clean_error, model.spec) == (None, None, "digits-cnn-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><html>Quota exceeded</html>", "is a web page, not a checkpoint"),
        (b"", "has 0 bytes and may be truncated"),
        (b"PK\x03\x04" + bytes(100), "may be truncated"),
    ],
)
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
def test_a_broken_file_is_said_to_be_broken(linear, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_weights(linear, tmp_path / name)


def test_a_flipped_byte_is_a_sentence(linear, tmp_path):
    torch.save(linear.state_dict(), tmp_path / "w.pt")
    whole = (tmp_path / "w.pt").read_bytes()
    at = whole.index(b"weight")
    (tmp_path / "w.pt").write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
    with pytest.raises(ValueError, match=r"w\.pt' cannot be read as a checkpoint: .* truncated or damaged"):
        load_weights(linear, tmp_path / "w.pt")


def test_a_file_without_weights_names_what_it_holds(linear, tmp_path):
    torch.save({"epoch": 3, "optimizer": {}}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match=r"holds no weights by name.*it holds: epoch, optimizer"):
        load_weights(linear, tmp_path / "w.pt")


def test_a_checkpoint_that_does_not_fit_lists_the_names(linear, tmp_path):
    save_file({"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit Linear") as error:
        load_weights(linear, tmp_path / "w.safetensors")
    for part in ("1 missing: bias", "1 unexpected: scale", "1 of another shape: weight (2, 4) instead of (2, 3)"):
        assert part in str(error.value)


@pytest.mark.parametrize("name", ["w.pt", "w.safetensors"])
@pytest.mark.parametrize(
    ("bias", "message"),
    [
        (torch.tensor([0.0, float("nan")]), "'.*' holds weights that are NaN or infinite: bias"),
        (torch.tensor([float("-inf"), 0.0]).half(), "NaN or infinite: bias"),
        (torch.tensor([1e300, 0.0], dtype=torch.float64), "NaN or infinite: bias"),  # infinite in the network's float32
        (torch.tensor([1, 2], dtype=torch.int8), r"not floating-point numbers, .*: bias \(torch.int8\)"),
        (torch.tensor([True, False]), r"not floating-point numbers, .*: bias \(torch.bool\)"),
    ],
)
def test_weights_that_no_network_can_use_are_named(linear, tmp_path, name, bias, message):
    state, before = {"weight": torch.ones(2, 3), "bias": bias}, linear.weight.clone()
    torch.save(state, tmp_path / name) if name == "w.pt" else save_file(state, tmp_path / name)
    with pytest.raises(ValueError, match=message) as error:
        load_weights(linear, tmp_path / name)
    assert str(tmp_path / name) in str(error.value)
    assert "weight," not in str(error.value)  # only the bad one
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_finite_weights_of_other_widths_are_taken(linear, tmp_path, dtype):
    torch.save({key: value.to(dtype) for key, value in linear.state_dict().items()}, tmp_path / "w.pt")
    load_weights(linear, tmp_path / "w.pt")
    assert linear.weight.dtype == torch.float32


def test_normalisation_that_is_not_finite_is_refused(tmp_path):
    donor = tta.load_model("digits-cnn")
    torch.save(
        {**donor.model.state_dict(), "mu": torch.tensor([0.5, 0.5, float("nan")]), "sigma": torch.ones(3)},
        tmp_path / "w.pt",
    )
    with pytest.raises(ValueError, match="mean and std are three numbers each"):
        tta.load_model("digits-cnn", checkpoint=tmp_path / "w.pt")


def test_a_function_whose_network_is_not_finite_is_refused(tmp_path, monkeypatch):
    (tmp_path / "bad_models.py").write_text(
        "import torch\n"
        "def bad():\n"
        "    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 2))\n"
        "    torch.nn.init.constant_(net[1].weight, float('nan'))\n"
        "    return net\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"'bad_models:bad' holds weights that are NaN or infinite: 1\.weight"):
        tta.load_model("bad_models:bad", mean=HALF, std=HALF)


def test_checkpoint_speaks_with_every_spec(tmp_path):
    donor = tta.load_model("digits-cnn")
    save_file({key: value + 1 for key, value in donor.model.state_dict().items()}, tmp_path / "w.safetensors")
    loaded = tta.load_model("digits-cnn", checkpoint=tmp_path / "w.safetensors")
    assert torch.equal(loaded.model.fc.bias, donor.model.fc.bias + 1)
    with pytest.raises(FileNotFoundError, match="No checkpoint at"):
        tta.load_model("digits-cnn", checkpoint=tmp_path / "none.pt")


def test_a_pickle_with_code_is_not_run(linear, tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "made"), "w"))

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match=r"holds more than weights \(an object of type \w+\.open\)\. If you trust"):
        load_weights(linear, tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_classifier_normalises_inside():
    model = ImageClassifier(torch.nn.Identity(), (0.5,) * 3, (0.25,) * 3, "toy", None)
    assert torch.equal(model(torch.full((1, 3, 2, 2), 0.75)), torch.ones(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("spec", "classes", "parameters", "names"),
    [
        ("robustbench:Standard", 10, 36_479_194, {"block1.layer.0.convShortcut.weight", "block3.layer.3.conv2.weight"}),
        ("robustbench:Hendrycks2020AugMix_WRN", 10, 2_243_546, {"block1.layer.5.bn2.running_var", "fc.bias"}),
        ("robustbench:cifar100/Hendrycks2020AugMix_ResNeXt", 100, 6_900_132, {"stage_1.0.downsample.1.weight"}),
        ("cifar-resnet26-gn", 10, 366_938, {"layer3.3.bn2.bias", "bn.weight", "fc.bias"}),
    ],
)
def test_published_networks_have_the_published_names(spec, classes, parameters, names):
    model = tta.load_model(spec, pretrained=False)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert names <= set(model.model.state_dict())
    assert model.clean_error is None
    with torch.no_grad():
        assert model(torch.rand(1, 3, 32, 32)).shape == (1, classes)


def test_robustbench_weights_are_found_in_the_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TTA_DATA", str(tmp_path))
    spec = "robustbench:cifar100/Hendrycks2020AugMix_WRN"
    with pytest.raises(
        FileNotFoundError, match=r"models/cifar100/corruptions/Hendrycks2020AugMix_WRN.pt.*drive.google"
    ):
        tta.load_model(spec)
    donor = tta.load_model(spec, pretrained=False)
    file = tmp_path / "models" / "cifar100" / "corruptions" / "Hendrycks2020AugMix_WRN.pt"
    file.parent.mkdir(parents=True)
    torch.save({"state_dict": {f"module.{k}": v for k, v in donor.model.state_dict().items()}}, file)
    for model in (tta.load_model(spec), tta.load_model(spec, checkpoint=file)):
        assert torch.equal(model.model.fc.weight, donor.model.fc.weight)
        assert model.clean_error == 23.72
        assert model.preprocessing["mean"] == list(HALF)
    assert tta.load_model("robustbench:Standard", pretrained=False).preprocessing["std"] == [1.0] * 3


def test_classes_have_names_where_the_weights_say_them():
    assert tta.load_model("digits-cnn-8").class_names == list("01234567")
    assert tta.load_model("digits-cnn").select_logits([7, 3]).class_names == ["7", "3"]
    assert tta.load_model("torchvision:resnet18", pretrained=False).class_names is None
    assert tta.load_model("timm:resnet18", pretrained=False).class_names is None
