"""Models of open_clip, from a folder with their configuration: weights in OpenAI's layout agree with our own towers."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

import tta

pytest.importorskip("open_clip", reason="needs open_clip: pip install 'tta-toolkit[clip]'")

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
WEIGHTS = Path(tta.__file__).parent / "weights" / "digits_clip.safetensors"
CONFIG = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 3, "width": 64, "patch_size": 8, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 48, "width": 64, "heads": 4, "layers": 3},
}


@pytest.fixture
def folder(tmp_path):
    cfg = {"mean": [0.48145466, 0.4578275, 0.40821073], "std": [0.26862954, 0.26130258, 0.27577711]}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": CONFIG, "preprocess_cfg": cfg}))
    save_file(load_file(WEIGHTS), tmp_path / "open_clip_model.safetensors")
    return tmp_path


@pytest.fixture
def digits():
    return tta.load_model("digits-clip")


def load(folder, digits, **more):
    def tokenize(texts):
        ids = digits.model.tokenize(texts)
        return F.pad(ids, (0, 16 - ids.shape[1]))

    return tta.load_model(f"open_clip:{folder}", classes=digits.class_names, tokenize=tokenize, **more)


def test_weights_in_openais_layout_agree(folder, digits):
    model = load(folder, digits)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), digits(IMAGES), atol=2e-5)
    assert model.preprocessing == digits.preprocessing


def test_a_checkpoint_takes_the_place_of_the_folders_weights(folder, digits, tmp_path):
    (folder / "open_clip_model.safetensors").unlink()
    model = load(folder, digits, checkpoint=WEIGHTS)
    with torch.no_grad():
        assert torch.allclose(model(IMAGES), digits(IMAGES), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", tta.list_methods(two_towers=True))
def test_every_method_gives_the_logits_of_our_own_towers(folder, digits, method):
    views = torch.stack([IMAGES, IMAGES.flip(3), IMAGES.flip(2)], dim=1)
    batch = IMAGES if method in ("batclip", "onzeta") else views
    ours, theirs = (tta.adapt(model, method) for model in (digits, load(folder, digits)))
    for _ in range(2):
        assert torch.allclose(ours(batch), theirs(batch), atol=1e-3)


def test_without_open_clip_the_command_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'tta-toolkit\[clip\]'"):
        tta.load_model("open_clip:ViT-B-32/openai", classes=["cat", "dog"])


def test_what_does_not_exist_is_said():
    with pytest.raises(ValueError, match=r"no model 'ViT-B-33', and there is no such folder. Did you mean 'ViT-B-32'"):
        tta.load_model("open_clip:ViT-B-33/openai", classes=["cat", "dog"])
    with pytest.raises(ValueError, match=r"has no weights 'opnai'. Did you mean 'openai'"):
        tta.load_model("open_clip:ViT-B-32/opnai", classes=["cat", "dog"])
    with pytest.raises(ValueError, match="classifies by names"):
        tta.load_model("open_clip:ViT-B-32/openai")
