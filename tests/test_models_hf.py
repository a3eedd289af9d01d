"""Classifiers of transformers: saved in a folder and loaded from it; the library's own processor is the oracle."""

import sys

import pytest
import torch

import tta
from tta.models import HALF


def test_without_transformers_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tta-toolkit\[hf\]'"):
        tta.load_model("hf:google/vit-base-patch16-224")


def save(folder, kind):
    """A small classifier of random weights with the image processor of its family; the two are saved."""
    transformers = pytest.importorskip("transformers", reason="hf: models need the extra 'hf'")
    torch.manual_seed(0)
    if kind == "vit":
        config = transformers.ViTConfig(
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
        processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    elif kind == "convnext":
        config = transformers.ConvNextConfig(hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], image_size=32)
        processor = transformers.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8, resample=2)
    elif kind == "resnet":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1])
        processor = transformers.ViTImageProcessor(do_normalize=False, size={"height": 32, "width": 32})
    else:
        config = transformers.EfficientNetConfig(
            image_size=32, width_coefficient=0.2, depth_coefficient=0.1, hidden_dim=256
        )
        processor = transformers.EfficientNetImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.4, 0.5, 0.6], image_std=[0.2, 0.25, 0.3]
        )
    config.num_labels = 5
    network = transformers.AutoModelForImageClassification.from_config(config).eval()
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return network, transformers.AutoImageProcessor.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["vit", "convnext", "resnet", "efficientnet"])
def test_normalisation_is_that_of_the_processor_once(tmp_path, kind):
    network, processor = save(tmp_path, kind)
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    still = {"do_resize": False, "do_center_crop": False} if kind == "efficientnet" else {"do_resize": False}
    with torch.no_grad():
        expected = network(**processor(images=list(images), return_tensors="pt", **still)).logits
        model = tta.load_model(f"hf:{tmp_path}")
        torch.testing.assert_close(model(images / 255), expected, rtol=1e-4, atol=1e-5)
    assert model.preprocessing["input_size"] == [32, 32]
    assert model.spec == f"hf:{tmp_path}"


def test_geometry_and_checkpoint(tmp_path):
    save(tmp_path / "a", "convnext")
    model = tta.load_model(f"hf:{tmp_path / 'a'}")
    found = model.preprocessing
    assert (found["interpolation"], found["resize"], found["crop"]) == ("bilinear", 40, "center")
    torch.save(model.model.network.state_dict(), tmp_path / "w.pt")
    loaded = tta.load_model(f"hf:{tmp_path / 'a'}", checkpoint=tmp_path / "w.pt")
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images), model(images))
    assert tta.load_model(f"hf:{tmp_path / 'a'}", pretrained=False, num_classes=3)(images).shape == (1, 3)
    with pytest.raises(ValueError, match="are for 5 classes; num_classes=3"):
        tta.load_model(f"hf:{tmp_path / 'a'}", num_classes=3)


def test_a_network_without_a_trained_classifier_is_refused(tmp_path):
    save(tmp_path, "vit")
    import transformers

    config = transformers.AutoConfig.from_pretrained(tmp_path)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="without weights for classifier"):
        tta.load_model(f"hf:{tmp_path}")


def test_no_such_folder(tmp_path):
    pytest.importorskip("transformers", reason="hf: models need the extra 'hf'")
    with pytest.raises(ValueError, match="cannot be loaded"):
        tta.load_model(f"hf:{tmp_path / 'none'}")


def test_vit_geometry(tmp_path):
    save(tmp_path, "vit")
    found = tta.load_model(f"hf:{tmp_path}").preprocessing
    assert (found["resize"], found["crop"], found["mean"]) == (32, "squash", list(HALF))
