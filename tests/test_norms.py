"""Normalisation layers: the three modes of `norm`, recomputed plainly; which layers `tent` finds."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta import norms


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3), nn.Flatten(), nn.Linear(4 * 36, 5))
    model[1].running_mean.uniform_(-1, 1)
    model[1].running_var.uniform_(0.5, 2)
    nn.init.uniform_(model[1].weight)
    return model.eval()


@pytest.fixture
def batches():
    return torch.rand(3, 6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def expected(model, x, mean, var):
    conv, bn, flatten, linear = model
    y = (conv(x) - mean.view(1, -1, 1, 1)) / (var.view(1, -1, 1, 1) + bn.eps).sqrt()
    return linear(flatten(y * bn.weight.view(1, -1, 1, 1) + bn.bias.view(1, -1, 1, 1))).detach()


def statistics(model, x, correction):
    y = model[0](x)
    return y.mean((0, 2, 3)), y.var((0, 2, 3), correction=correction)


def test_batch_statistics_use_the_biased_variance(model, batches):
    adapter = tta.adapt(model, "norm")
    for x in batches:
        torch.testing.assert_close(adapter(x), expected(model, x, *statistics(model, x, correction=0)))


def test_blend_uses_source_and_unbiased_batch_statistics(model, batches):
    adapter = tta.adapt(model, "norm", alpha=0.3)
    for x in batches:
        mean, var = statistics(model, x, correction=1)
        bn = model[1]
        blend = 0.7 * bn.running_mean + 0.3 * mean, 0.7 * bn.running_var + 0.3 * var
        torch.testing.assert_close(adapter(x), expected(model, x, *blend))


def test_moving_average_takes_each_batch_in_before_using_it(model, batches):
    adapter = tta.adapt(model, "norm", momentum=0.2)
    mean, var = model[1].running_mean.clone(), model[1].running_var.clone()
    for x in batches:
        batch_mean, batch_var = statistics(model, x, correction=1)
        mean, var = 0.8 * mean + 0.2 * batch_mean, 0.8 * var + 0.2 * batch_var
        torch.testing.assert_close(adapter(x), expected(model, x, mean, var))


def test_alpha_zero_is_the_source_model(model, batches):
    torch.testing.assert_close(tta.adapt(model, "norm", alpha=0.0)(batches[0]), model(batches[0]).detach())


def test_one_value_a_channel(batches):
    """A batch of one with 1x1 maps: the blend serves it, pure batch statistics say why they cannot."""
    model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten()).eval()
    x = batches[0][:1]
    assert tta.adapt(model, "norm", alpha=0.1)(x).isfinite().all()
    with pytest.raises(ValueError, match=r"batch of 1 .* alpha below 1"):
        tta.adapt(model, "norm")(x)


def test_norm_refuses_a_model_without_batch_norm(vit):
    with pytest.raises(
        ValueError, match=r"no normalisation layer of the kinds looked for: BatchNorm. It has LayerNorm"
    ):
        tta.adapt(vit, "norm")


def test_only_layers_count_as_similar_ones():
    """Not a block or a network that is called after the norms that it does without."""

    class NormFreeBlock(nn.Sequential):
        pass

    model = NormFreeBlock(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(ValueError, match=r"InstanceNorm\. Use a method that does not adapt normalisation layers"):
        tta.adapt(model, "tent")
    with pytest.raises(ValueError, match=r"BatchNorm\. It has LayerNorm\. Use"):
        tta.adapt(NormFreeBlock(nn.Conv2d(3, 4, 3), nn.LayerNorm(6), nn.Flatten(), nn.Linear(144, 5)), "norm")
    with pytest.raises(ValueError, match=r"It has LayerNorm2d\. To have LayerNorm2d adapted, derive the class"):
        tta.adapt(NormFreeBlock(nn.Conv2d(3, 4, 3), LayerNorm2d(4), nn.Flatten(), nn.Linear(144, 5)), "tent")


def test_norm_refuses_a_blend_without_source_statistics():
    with pytest.raises(ValueError, match="no running statistics"):
        tta.adapt(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "norm", alpha=0.5)


def test_norm_refuses_layers_that_normalise_by_the_batch_already(batches):
    """On them it would be the source model, without a word."""
    layer = nn.BatchNorm2d(4, track_running_stats=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.Flatten(), nn.Linear(144, 5))
    with pytest.raises(ValueError, match=r"The 1 BatchNorm layers of Sequential keep no running .*Use one that learns"):
        tta.adapt(model, "norm")
    assert tta.adapt(model, "tent")(batches[0]).isfinite().all()


def test_norm_refuses_alpha_and_momentum_together(model):
    with pytest.raises(ValueError, match="one of the two"):
        tta.adapt(model, "norm", alpha=0.5, momentum=0.1)


class GroupNormNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize("kind", ["batch", "group", "layer", "timm"])
def test_tent_adapts_every_kind_of_normalisation(kind, cnn, vit):
    models = {"batch": lambda: cnn, "group": GroupNormNet, "layer": lambda: vit}
    # EfficientNet: BatchNormAct2d, a subclass that applies the activation too
    model = models.get(kind, lambda: timm.create_model("efficientnet_lite0", num_classes=10))()
    adapter = tta.adapt(model, "tent")
    before = [parameter.clone() for parameter in adapter.parameters_to_adapt()]
    adapter(torch.rand(4, 3, 32, 32))
    affine = sum(bool(layer.elementwise_affine if kind == "layer" else True) for layer in norms.layers(model))
    assert len(before) == 2 * affine
    changed = [not torch.equal(a, b) for a, b in zip(before, adapter.parameters_to_adapt(), strict=True)]
    assert all(changed)


class LayerNorm2d(nn.Module):
    """A normalisation layer of a user's own: over the channels of each place."""

    def __init__(self, channels):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        x = x - x.mean(1, keepdim=True)
        return (
            self.weight[:, None, None] * x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
            + self.bias[:, None, None]
        )


class PlainNorm(nn.Module):
    """One without parameters."""

    def forward(self, x):
        return x / x.norm(dim=1, keepdim=True)


class NormedBlock(nn.Sequential):
    """A container that is called after its norm."""


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    block = NormedBlock(nn.Conv2d(4, 4, 1), LayerNorm2d(4))
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block, LayerNorm2d(4), PlainNorm(), nn.Flatten(), nn.Linear(144, 5))  # fmt: skip


@pytest.mark.parametrize("method", ["tent", "eata", "sar", "deyo", "rpl", "shot", "pl", "actmad"])
def test_unknown_kinds_are_named_once(method, mixed, batches):
    settings = {"parameters": "norm"} if method in ("shot", "pl") else {}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tta.adapt(mixed, method, source=batches[0], **settings)
    (warning,) = said
    assert "not known here: 2 LayerNorm2d. The method passes them over and works on the 1 of" in str(warning.message)
    assert [name for name, _ in norms.unknown_layers(mixed)] == ["2.1", "3"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("method", "settings"), [("norm", {}), ("note", {}), ("rotta", {}), ("shot", {}), ("cotta", {}), ("t3a", {})]
)
def test_a_method_whose_own_rule_leaves_them_out_says_nothing(method, settings, mixed):
    tta.adapt(mixed, method, **settings)


@pytest.mark.filterwarnings("error")
def test_known_kinds_say_nothing(cnn, vit):
    for model in (cnn, vit, timm.create_model("convnext_atto"), timm.create_model("efficientnet_lite0")):
        tta.adapt(model, "tent")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("layer", [nn.RMSNorm((6, 6)), nn.InstanceNorm2d(4, affine=True)])
def test_rms_and_instance_norms_adapt(layer, batches):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))
    adapter = tta.adapt(model, "tent")
    before = [parameter.detach().clone() for parameter in adapter.parameters_to_adapt()]
    assert len(before) == sum(1 for _ in layer.parameters()) > 0
    adapter(batches[0])
    assert not any(torch.equal(a, b) for a, b in zip(before, adapter.parameters_to_adapt(), strict=True))


@pytest.mark.parametrize("method", ["tent", "eata", "sar", "cmf", "rmt", "psmt"])
def test_layers_without_a_scale_are_refused_or_served(method, batches):
    """Nothing to adapt in the normalisation layers is a sentence, not an error of autograd."""
    plain = nn.BatchNorm2d(4, affine=False)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), plain, nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    if method in ("rmt", "psmt"):
        assert tta.adapt(model, method, source=batches[0])(batches[1]).isfinite().all()
    else:
        with pytest.raises(ValueError, match=r"no parameters to adapt .*affine=False\)\. Use|no scale and shift"):
            tta.adapt(model, method, source=batches[0])


def test_tent_recomputed_plainly(model, batches):
    """Two Adam steps by hand on one layer's scale and shift."""
    adapter = tta.adapt(model, "tent", lr=0.01)
    conv, bn, flatten, linear = model
    weight, bias = bn.weight.detach().clone().requires_grad_(), bn.bias.detach().clone().requires_grad_()
    moments = {id(p): [torch.zeros_like(p), torch.zeros_like(p)] for p in (weight, bias)}
    for step, x in enumerate(batches, start=1):
        y = F.batch_norm(conv(x), None, None, weight, bias, training=True, eps=bn.eps)
        logits = linear(flatten(y))
        probabilities = logits.softmax(1)
        torch.testing.assert_close(adapter(x), logits.detach())
        loss = -(probabilities * probabilities.log()).sum(1).mean()
        for p, g in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            first, second = moments[id(p)]
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            p.data -= 0.01 * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)


def test_frozen_parameters_get_no_gradient(cnn):
    adapter = tta.adapt(cnn, "tent")
    assert {n for n, p in adapter.named_parameters() if p.requires_grad} == {
        f"model.{name}.{leaf}" for name, _ in norms.named_layers(cnn) for leaf in ("weight", "bias")
    }


def in_rows(layer, x):
    """Value and gradients of a layer, and whether they came the channels-last way."""
    x = x.detach().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)
    gradients = torch.autograd.grad((y * weights).sum(), (x, layer.weight, layer.bias))
    return (y.detach(), *gradients), "NormaliseRows" in y.grad_fn.name()


@pytest.mark.parametrize("shape", [(100, 8, 32, 32), (7, 3, 5, 1), (2, 4, 1, 1)])
def test_channels_last_batch_statistics_are_exact(shape):
    torch.manual_seed(0)
    layer = nn.BatchNorm2d(shape[1], eps=1e-3)
    nn.init.uniform_(layer.weight)
    norms.use_batch_statistics(layer)
    x = torch.randn(shape).relu() + 0.5
    expected, rows = in_rows(copy.deepcopy(layer).double(), x.double())
    assert not rows
    ours, rows = in_rows(layer, x.to(memory_format=torch.channels_last))
    assert rows
    for value, exact in zip(ours, expected, strict=True):
        torch.testing.assert_close(value.double(), exact, atol=2e-5 * float(exact.abs().max()), rtol=1e-4)
    _, rows = in_rows(layer, x.contiguous())
    assert rows == (shape[2:] == (1, 1))  # of one pixel the two layouts are the same


def test_an_activation_may_replace_channels_last_outputs_in_place():
    layer = nn.BatchNorm2d(4)
    norms.use_batch_statistics(layer)
    x = torch.randn(8, 4, 5, 5).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(layer(x).relu().square().sum(), x)[0]
    torch.testing.assert_close(torch.autograd.grad(layer(x).relu_().square().sum(), x)[0], expected)


def test_channels_last_batch_statistics_under_vmap():
    layer = nn.BatchNorm2d(4)
    norms.use_batch_statistics(layer)
    views = torch.rand(3, 8, 5, 5, 4).permute(0, 1, 4, 2, 3)
    with torch.no_grad():
        together = torch.vmap(layer)(views)
        torch.testing.assert_close(together, torch.stack([layer(view) for view in views]))


@pytest.mark.parametrize("kind", [norms.RobustBatchNorm, norms.MovingBatchNorm, norms.BlendedBatchNorm])
def test_blended_statistics_are_the_same_channels_last(kind):
    """Output, gradients and stored statistics; the gradient through the batch's share alone is a fifth of the whole."""

    def learned(memory_format):
        torch.manual_seed(0)
        model = nn.Sequential(nn.BatchNorm2d(16))
        nn.init.uniform_(model[0].weight, 0.5, 1.5)
        norms.blend_statistics(model, 0.3, kind)
        x = (2 * torch.randn(8, 16, 6, 6) + 1).to(memory_format=memory_format).requires_grad_()
        with norms.remembering(model):
            out = model(x)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        layer = model[0].layer
        return out, x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var

    for last, first in zip(learned(torch.channels_last), learned(torch.contiguous_format), strict=True):
        torch.testing.assert_close(last, first, rtol=1e-4, atol=1e-4)
