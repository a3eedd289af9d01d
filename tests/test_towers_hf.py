"""CLIP and SigLIP of transformers, from a folder: what the classifier gives is what the library's own model gives."""

import json
import pickle

import pytest
import torch
from torch.nn import functional as F

import tta
from tta.models.vision_language import Tokenizer
from tta.towers import WordTokenizer

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install 'tta-toolkit[hf]'")

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
NAMES = ["cat", "red_dog", "owl"]
SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VISION = {**SMALL, "image_size": 32, "patch_size": 16}
METHODS = tta.list_methods(two_towers=True)


def spell_out(folder):
    """Write the files of a tokenizer of CLIP that knows letters alone."""
    letters = [*"abcdefghijklmnopqrstuvwxyz."]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "CLIPTokenizer"}))
    return len(tokens)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A folder with a random CLIP, and its model."""
    folder = tmp_path_factory.mktemp("clip")
    words = spell_out(folder)
    text = {
        **SMALL,
        "vocab_size": words,
        "max_position_embeddings": 40,
        "bos_token_id": words - 2,
        "eos_token_id": words - 1,
    }
    config = transformers.CLIPConfig(text_config={**text, "pad_token_id": 0}, vision_config=VISION, projection_dim=8)
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    return folder, model


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    """A folder with a random SigLIP, and its model."""
    folder = tmp_path_factory.mktemp("siglip")
    text = {**SMALL, "vocab_size": 16, "max_position_embeddings": 12, "projection_size": 16}
    config = transformers.SiglipConfig(
        text_config={**text, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}, vision_config=VISION
    )
    torch.manual_seed(0)
    model = transformers.SiglipModel(config).eval()
    torch.nn.init.constant_(model.logit_bias, -3.0)
    model.save_pretrained(folder)
    return folder, model


def padded(texts):
    words = WordTokenizer(["<pad>", "a", "photo", "of", ".", "cat", "red", "dog", "owl", "<start>", "<end>"], 12)
    ids = words(texts)
    return F.pad(ids, (0, 12 - ids.shape[1]))


def test_a_clip_gives_its_own_logits(clip):
    folder, model = clip
    ours = tta.load_model(f"hf-clip:{folder}", classes=NAMES)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(
        ["a photo of a cat.", "a photo of a red dog.", "a photo of a owl."], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        expected = model(pixel_values=(IMAGES - ours.mean) / ours.std, **ids).logits_per_image
        found = ours(IMAGES)
    assert torch.allclose(found, expected, atol=2e-5)
    assert expected.std(0).min() > 1e-3
    assert ours.preprocessing["mean"] == pytest.approx([0.48145466, 0.4578275, 0.40821073])
    assert (ours.preprocessing["input_size"], ours.preprocessing["crop"]) == ([32, 32], "center")


def test_a_siglip_gives_its_own_logits_with_its_bias(siglip):
    folder, model = siglip
    ours = tta.load_model(f"hf-clip:{folder}", classes=NAMES, tokenize=padded)
    ids = padded(["a photo of a cat.", "a photo of a red dog.", "a photo of a owl."])
    with torch.no_grad():
        expected = model(pixel_values=IMAGES * 2 - 1, input_ids=ids).logits_per_image
        found = ours(IMAGES)
    assert torch.allclose(found, expected, atol=2e-5)
    assert ours.model.logit_bias == -3


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_model_that_was_saved_whole_or_sent_to_a_process_predicts_the_same(kind, request, tmp_path):
    own = {"tokenize": padded} if kind == "siglip" else {}
    model = tta.load_model(f"hf-clip:{request.getfixturevalue(kind)[0]}", classes=NAMES, **own)
    adapter = tta.adapt(model, "tda")
    torch.save(adapter, tmp_path / "adapter.pt")
    saved, sent = torch.load(tmp_path / "adapter.pt", weights_only=False), pickle.loads(pickle.dumps(model))
    assert torch.equal(saved(IMAGES), adapter(IMAGES))
    texts = ["a photo of a owl.", "a red cat."]
    assert torch.equal(sent.model.encode(texts), model.model.encode(texts))


def test_small_letters_and_one_length_are_siglips_alone():
    class Spelling:
        def __call__(self, texts, padding, truncation, max_length, return_tensors):
            assert (truncation, return_tensors) == (True, "pt")
            return {"input_ids": (texts, padding, max_length)}

    assert Tokenizer(Spelling(), True, 12)(["A Cat"]) == (["a cat"], "max_length", 12)
    assert Tokenizer(Spelling(), False, 40)(["A Cat"]) == (["A Cat"], True, 40)


@pytest.mark.slow
@pytest.mark.parametrize("method", [*METHODS, "tent", "sar", "cotta", "t3a", "lame"])
def test_every_method_adapts_a_siglip(siglip, method):
    model = tta.load_model(f"hf-clip:{siglip[0]}", classes=NAMES, tokenize=padded)
    views = {"views": 4} if hasattr(tta.adapt(model, method).config, "views") and method in METHODS else {}
    adapter = tta.adapt(model, method, **views)
    first = adapter(IMAGES)
    assert first.isfinite().all()
    state = adapter.state_dict()
    twin = tta.adapt(model, method, **views)
    twin.load_state_dict(state)
    assert torch.equal(adapter(IMAGES), twin(IMAGES))
    adapter.reset()
    assert torch.equal(adapter(IMAGES), first)


def test_weights_of_a_checkpoint_are_loaded(clip, tmp_path):
    folder, model = clip
    torch.save(
        {name: value + 0.1 for name, value in model.state_dict().items() if value.is_floating_point()},
        tmp_path / "w.pt",
    )
    own, given = (
        tta.load_model(f"hf-clip:{folder}", classes=NAMES, **more) for more in ({}, {"checkpoint": tmp_path / "w.pt"})
    )
    assert torch.allclose(given.model.image.projection.weight, own.model.image.projection.weight + 0.1)
    assert not torch.allclose(given.model.class_features, own.model.class_features, atol=1e-3)


def test_what_is_missing_is_said(clip, tmp_path):
    with pytest.raises(ValueError, match=r"classifies by names: give classes=\[...\]"):
        tta.load_model(f"hf-clip:{clip[0]}")
    with pytest.raises(ValueError, match=r"num_classes=4, and .* has 3 names"):
        tta.load_model(f"hf-clip:{clip[0]}", classes=NAMES, num_classes=4)
    transformers.ViTConfig(**VISION).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a 'vit'; expected one of clip, siglip"):
        tta.load_model(f"hf-clip:{tmp_path}", classes=NAMES)
    with pytest.raises(ValueError, match="cannot be loaded"):
        tta.load_model(f"hf-clip:{tmp_path / 'nowhere'}", classes=NAMES)
