"""SAR: every step recomputed plainly, recovery, empty selections, and what is not adapted."""

import copy
import math

import pytest
import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.nn import functional as F

import tta
from tta import norms
from tta.adapter import Adapter
from tta.functional import entropy

CLASSES = 5


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(8), nn.Linear(8, CLASSES),
    ).eval()  # fmt: skip


@pytest.fixture
def batches():
    return torch.rand(14, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def plain_sar(model, batches, *, lr, margin, threshold, rho, recovery, momentum=0.9):
    """The algorithm of the paper, sample by sample and parameter by parameter. Yields logits and whether it recovered."""
    model = copy.deepcopy(model)
    source = copy.deepcopy(model)
    weights = [p for i in (1, 4, 8) for p in (model[i].weight, model[i].bias)]
    originals = [p.detach().clone() for i in (1, 4, 8) for p in (source[i].weight, source[i].bias)]
    velocity = [torch.zeros_like(p) for p in weights]
    average = None

    def forward(x):
        for layer in model:
            batch = isinstance(layer, nn.BatchNorm2d)
            x = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True) if batch else layer(x)
        return x

    def entropies(logits):
        return [-sum(p * p.log() for p in row.softmax(0)) for row in logits]

    for x in batches:
        logits = forward(x)
        first = entropies(logits)
        kept = [i for i, value in enumerate(first) if value < margin]
        recovered = False
        if kept:
            gradients = torch.autograd.grad(sum(first[i] for i in kept) / len(kept), weights)
            norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
            before = [p.detach().clone() for p in weights]
            for p, g in zip(weights, gradients, strict=True):
                p.data += rho * g / norm
            second = entropies(forward(x))
            kept = [i for i in kept if second[i] < margin]
            if kept:
                loss = sum(second[i] for i in kept) / len(kept)
                gradients = torch.autograd.grad(loss, weights)
                average = loss.item() if average is None else 0.9 * average + 0.1 * loss.item()
            for p, old in zip(weights, before, strict=True):
                p.data.copy_(old)
            if kept:
                for p, g, v in zip(weights, gradients, velocity, strict=True):
                    v.mul_(momentum).add_(g)
                    p.data -= lr * v
        if average is not None and average < threshold:
            recovered = True
            for p, original, v in zip(weights, originals, velocity, strict=True):
                p.data.copy_(original)
                if recovery == "full":
                    v.zero_()
            if recovery == "full":
                average = None
        yield logits.detach(), recovered, len(kept)


@pytest.mark.parametrize(
    ("margin", "threshold", "recovery", "recoveries"),
    [
        (9.0, 0.0, "full", 0),  # every sample, never recovering
        (1.45, 0.0, "full", 0),  # at first some samples
        (1.45, 1.3, "full", 1),
        (1.45, 1.3, "weights", 4),
    ],
)
def test_recomputed_plainly(model, batches, margin, threshold, recovery, recoveries):
    settings = {"lr": 0.5, "rho": 0.3, "recovery": recovery}
    adapter = tta.adapt(model, "sar", margin_e0=margin, reset_constant=threshold, **settings)
    seen = list(plain_sar(model, batches, margin=margin, threshold=threshold, **settings))
    for x, (logits, _, _) in zip(batches, seen, strict=True):
        torch.testing.assert_close(adapter(x), logits, atol=2e-5, rtol=1e-4)
    assert (margin < 9) == any(kept < len(batches[0]) for _, _, kept in seen)
    assert sum(recovered for _, recovered, _ in seen) == recoveries


def test_without_batch_norm_the_second_forward_is_of_the_reliable_samples_only(model, batches):
    model[4] = nn.GroupNorm(2, 8).eval()
    settings = {"lr": 0.5, "rho": 0.3, "recovery": "full"}
    adapter = tta.adapt(model, "sar", margin_e0=1.5, reset_constant=0.0, **settings)
    images = []
    adapter.model.register_forward_pre_hook(lambda _, inputs: images.append(len(inputs[0])))
    for x, (logits, _, _) in zip(
        batches, plain_sar(model, batches, margin=1.5, threshold=0.0, **settings), strict=True
    ):
        torch.testing.assert_close(adapter(x), logits, atol=2e-5, rtol=1e-4)
    assert len(images) == 2 * len(batches)
    assert any(0 < count < len(batches[0]) for count in images[1::2])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_recovery_brings_back_weights_moments_and_average(model, batches, optimizer):
    adapter, fresh = (tta.adapt(model, "sar", optimizer=optimizer, lr=0.1, margin_e0=9.0) for _ in range(2))
    adapter.config.reset_constant = 0.0
    for x in batches[:3]:
        adapter(x)
    adapter.config.reset_constant = 9.0  # collapsed, it believes
    adapter(batches[3])
    adapter.config.reset_constant = fresh.config.reset_constant = 0.0
    assert adapter.average_loss.isinf()
    for x in batches[4:]:
        assert torch.equal(adapter(x), fresh(x))
    assert torch.equal(adapter.average_loss, fresh.average_loss)


@pytest.mark.parametrize("which", ["first", "second"])
def test_empty_selection_makes_no_step(model, batches, which):
    """Nothing reliable at the weights, or nothing left at the perturbed weights: no step, though momentum is there."""
    adapter = tta.adapt(model, "sar", lr=0.1, margin_e0=9.0)
    adapter(batches[0])
    before = adapter.state_dict()
    assert any(value.any() for key, value in before.items() if key.endswith("momentum_buffer"))
    entropies = entropy(adapter.predict(batches[1]).detach())
    adapter.config.margin_e0 = float(entropies.min()) + (-1e-3 if which == "first" else 1e-6)
    adapter(batches[1])
    after = adapter.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert adapter.skipped_updates == 0


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("at", [1, 2], ids=["at the weights", "at the perturbed weights"])
def test_non_finite_gradient_is_skipped_and_counted(model, batches, at, fused, monkeypatch):
    monkeypatch.setattr(Adapter, "_FUSED_ON", ("cpu",) if fused else ())  # fused: the way of a GPU
    adapter = tta.adapt(model, "sar", lr=0.1, margin_e0=9.0)
    adapter(batches[0])
    before, calls = adapter.state_dict(), []

    def spoil(gradient):
        calls.append(1)
        return gradient * (math.inf if len(calls) == at else 1)

    handle = adapter.model[4].weight.register_hook(spoil)
    with pytest.warns(RuntimeWarning, match="skipped"):
        adapter(batches[1])
    handle.remove()
    after = adapter.state_dict()
    assert adapter.skipped_updates == 1
    assert all(torch.equal(before[key], after[key]) for key in before if key != "_counters")


def test_fused_first_step_that_is_skipped_leaves_no_momentum(model, batches, monkeypatch):
    plain = tta.adapt(model, "sar", lr=0.1, margin_e0=9.0)
    monkeypatch.setattr(Adapter, "_FUSED_ON", ("cpu",))
    fused = tta.adapt(model, "sar", lr=0.1, margin_e0=0.0)
    fused(batches[0])
    fused.config.margin_e0 = 9.0
    for x in batches[1:4]:
        torch.testing.assert_close(fused(x), plain(x))


def test_thresholds_scale_with_the_number_of_classes(model, batches):
    """The paper's 0.4 ln 1000 and 0.2 mean the same share of the largest entropy for 5 classes."""
    margin, constant = 0.4 * math.log(CLASSES), 0.2 * math.log(CLASSES) / math.log(1000)
    model[9].weight.data *= 6  # confident enough for some samples to be reliable
    scaled, given = (
        tta.adapt(model, "sar", lr=0.5),
        tta.adapt(model, "sar", lr=0.5, margin_e0=margin, reset_constant=constant),
    )
    for x in batches:
        assert torch.equal(scaled(x), given(x))
    assert given.average_loss.isfinite()


def changed(model, **hparams):
    adapter = tta.adapt(model, "sar", **hparams)
    return {name.rpartition(".")[0] for name, p in adapter.model.named_parameters() if p.requires_grad}


def test_top_of_a_vit_and_of_a_resnet_are_left_alone():
    vit = timm.create_model("vit_tiny_patch16_224", num_classes=4, img_size=32)
    assert changed(vit) == {f"blocks.{block}.norm{n}" for block in range(9) for n in (1, 2)}
    assert "layer3.0.bn1" in changed(timm.create_model("resnet18"))
    assert not any("layer4" in name for name in changed(nn.Sequential(timm.create_model("resnet18"))))


def below(*modules):
    """Whether a name lies in one of the modules."""
    return lambda name: any(f"{name}.".startswith(f"{module}.") for module in modules)


def transformers_model(kind, **settings):
    transformers = pytest.importorskip("transformers", reason="models of Hugging Face need the extra 'hf'")
    return transformers.AutoModelForImageClassification.from_config(getattr(transformers, f"{kind}Config")(**settings))


SMALL = {"hidden_size": 24, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32}
# architecture -> what its top is called
TOPS = {
    "resnet50": (lambda: timm.create_model("resnet50"), below("layer4")),
    "torchvision resnet18": (torchvision.models.resnet18, below("layer4")),
    "wrapped": (lambda: nn.Sequential(nn.Identity(), timm.create_model("resnet18")), below("1.layer4")),
    "regnet": (lambda: timm.create_model("regnety_002"), below("s4")),
    "deit distilled": (
        lambda: timm.create_model("deit_tiny_distilled_patch16_224", img_size=32),
        below("blocks.9", "blocks.10", "blocks.11", "norm"),
    ),
    "24 blocks": (
        lambda: VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=24, num_heads=1),
        below(*(f"blocks.{number}" for number in range(18, 24)), "norm"),
    ),
    "2 blocks": (lambda: VisionTransformer(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1), below("norm")),
    "vit_b_16": (
        lambda: torchvision.models.VisionTransformer(32, 8, 12, 2, 24, 24),
        below(*(f"encoder.layers.encoder_layer_{number}" for number in (9, 10, 11)), "encoder.ln"),
    ),
    "convnext": (lambda: timm.create_model("convnext_atto"), below("stages.3", "head.norm")),
    "torchvision convnext": (
        torchvision.models.convnext_tiny,  # features.6 is what shrinks the maps before the last stage, a part of it in timm
        below("features.6", "features.7", "classifier.0"),
    ),
    "swin": (lambda: timm.create_model("swin_s3_tiny_224"), below("layers.3", "norm")),
    "nextvit": (lambda: timm.create_model("nextvit_small"), below("stages.3", "norm")),
    "edgenext": (lambda: timm.create_model("edgenext_xx_small"), below("stages.3", "head.norm")),
    "hf convnext": (
        lambda: transformers_model("ConvNext", hidden_sizes=[8] * 4, depths=[2, 2, 3, 2]),
        below("convnext.encoder.stages.3", "convnext.layernorm"),
    ),
    "hf swin": (lambda: transformers_model("Swin", embed_dim=24), below("swin.encoder.layers.3", "swin.layernorm")),
}


@pytest.mark.parametrize("name", TOPS)
def test_the_top_is_found_by_structure(name):
    """The last of four stages or the last quarter of the blocks, and the final norm: not whatever is called norm."""
    make, is_top = TOPS[name]
    model = make()
    names = {name for name, _ in norms.named_layers(model)}
    assert changed(model) == {name for name in names if not is_top(name)} < names


def test_the_top_of_a_vit_of_transformers():
    model = transformers_model("ViT", **SMALL)
    left_out = {name for name, _ in norms.named_layers(model)} - changed(model)
    last = {name for name in left_out if any(part in ("9", "10", "11") for part in name.split("."))}
    assert left_out - last == {"vit.layernorm"}
    assert len(last) == 6


@pytest.mark.parametrize("make", [lambda: timm.create_model("vgg11_bn"), lambda: timm.create_model("hrnet_w18_small")])
def test_a_network_without_four_stages_has_no_top(make):
    assert norms.top(make()) == []


def test_excluded_names_are_parts_of_dotted_names(vit):
    assert changed(vit, exclude=["blocks.1"]) == {"norm", *(f"blocks.{b}.norm{n}" for b in (0, 2, 3) for n in (1, 2))}
    assert len(changed(vit, exclude=[])) == 9
    with pytest.raises(
        ValueError, match=r"All 9 normalisation layers of VisionTransformer are excluded.*blocks.0.norm1"
    ):
        tta.adapt(vit, "sar", exclude=["blocks", "norm"])


def test_model_without_normalisation_is_refused():
    with pytest.raises(ValueError, match="looked for: BatchNorm, GroupNorm, LayerNorm"):
        tta.adapt(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), "sar")


@pytest.mark.parametrize(("hparams", "message"), [({"rho": 0.0}, "rho=0.0"), ({"recovery": "never"}, "never")])
def test_wrong_values_are_named(model, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, "sar", **hparams)
