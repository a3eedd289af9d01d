"""Model specs: what is loaded, what is refused, and that normalisation happens once."""

import pytest
import timm
import torch
from safetensors.torch import save_file

import tta
from tta.datasets import digits
from tta.models import EMBEDDED, ImageClassifier, load_weights
from tta.networks import PaddedShortcut


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_models_know_the_digits(name):
    images, labels, _ = digits.split("test")
    model = tta.load_model(name)
    with torch.no_grad():
        wrong = (model(images.float() / 255).argmax(1) != labels).float().mean()
    assert wrong < 0.04
    assert not model.training


def test_mean_and_std_are_applied_once_and_recorded():
    model = tta.load_model("timm:resnet18", pretrained=False, num_classes=7)
    plain = timm.create_model("resnet18", num_classes=7).eval()
    plain.load_state_dict(model.model.state_dict())
    cfg = timm.data.resolve_model_data_config(plain)
    images = torch.rand(2, 3, 64, 64)
    mean, std = (torch.tensor(cfg[key]).view(1, 3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(model(images), plain((images - mean) / std))
    assert model.preprocessing == {"mean": list(cfg["mean"]), "std": list(cfg["std"]), "input_size": [224, 224]}


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


def test_torchvision_spec_without_weights_is_untrained():
    model = tta.load_model("torchvision:resnet18", num_classes=5)
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digits-cn", "No model 'digits-cn'. Did you mean 'digits-cnn'"),
        ("timm:resnet19x", "timm has no model 'resnet19x'. Did you mean"),
        ("torchvision:resnet19", "torchvision has no classifier 'resnet19'. Did you mean 'resnet18'"),
        ("torchvision:resnet18/BEST", "'resnet18' has no weights 'BEST'. There are: IMAGENET1K_V1"),
        ("timm:", "No model 'timm:'"),
    ],
)
def test_unknown_specs_are_answered(spec, message):
    with pytest.raises(ValueError, match=message):
        tta.load_model(spec)


@pytest.fixture
def linear():
    return torch.nn.Linear(3, 2)


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {**s}}])
def test_checkpoints_are_unwrapped(linear, tmp_path, wrap):
    state = {f"module.{key}": torch.full_like(value, 2.0) for key, value in linear.state_dict().items()}
    torch.save(wrap(state), tmp_path / "weights.pth")
    load_weights(linear, tmp_path / "weights.pth")
    assert (linear.weight == 2).all()


def test_a_checkpoint_that_does_not_fit_lists_the_names(linear, tmp_path):
    save_file({"weight": torch.zeros(2, 4), "scale": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="does not fit Linear") as error:
        load_weights(linear, tmp_path / "w.safetensors")
    for part in ("1 missing: bias", "1 unexpected: scale", "1 of another shape: weight (2, 4) instead of (2, 3)"):
        assert part in str(error.value)


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
    with pytest.raises(Exception, match=r"(?i)weights"):
        load_weights(linear, tmp_path / "evil.pth")
    assert not (tmp_path / "made").exists()


def test_classifier_normalises_inside():
    model = ImageClassifier(torch.nn.Identity(), (0.5,) * 3, (0.25,) * 3, "toy", None)
    assert torch.equal(model(torch.full((1, 3, 2, 2), 0.75)), torch.ones(1, 3, 2, 2))
