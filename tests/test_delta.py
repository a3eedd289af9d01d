"""DELTA: one update recomputed plainly, its layer's values and gradients, and the weights of the classes."""

import copy
import math

import pytest
import torch
from torch import nn

import tta
from tta.methods.delta import RenormalisedBatchNorm
from tta.norms import remembering

CLASSES = 5


@pytest.fixture
def batches():
    return torch.rand(3, 12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def model(small_cnn, batches):
    """Predicts several classes, sure of some images and unsure of others."""
    torch.manual_seed(0)
    model = small_cnn(6, CLASSES).eval()
    with torch.no_grad():
        model.fc.weight.mul_(40)
        model.norm.train()
        model.fc.bias.copy_(-model.fc.weight @ model.features(batches[0]).mean(0))
        model.norm.eval()
    return model


def plain_loss(logits, kind):
    """Loss of each sample, by loops; None for one that does not count."""
    losses = []
    for row in logits:
        p = row.softmax(0)
        entropy = -sum(q * q.log() for q in p)
        if kind == "entropy":
            losses.append(entropy)
        elif kind == "weighted":
            weight = math.exp(0.5 * math.log(CLASSES) - entropy.item())
            losses.append(weight * entropy if weight > 1 else None)
        else:
            losses.append(-p.max().log() if p.max() > 0.4 else None)
    return losses


def plain_delta(model, batches, *, kind, lr, momentum, prior, dot):
    """The algorithm of the paper with plain statistics. Yields the logits of each batch."""
    model = copy.deepcopy(model)
    norm, frequencies, kept = model.norm, [1 / CLASSES] * CLASSES, None
    velocity = [torch.zeros_like(norm.weight), torch.zeros_like(norm.bias)]
    for x in batches:
        features = model.conv(x)
        mean = features.mean((0, 2, 3), keepdim=True)
        std = ((features - mean).square().mean((0, 2, 3), keepdim=True) + norm.eps).sqrt()
        batch = mean.detach(), std.detach()
        kept = batch if kept is None else kept
        renormalised = (features - mean) / std * (batch[1] / kept[1]) + (batch[0] - kept[0]) / kept[1]
        kept = tuple(prior * old + (1 - prior) * new for old, new in zip(kept, batch, strict=True))
        scaled = renormalised * norm.weight[:, None, None] + norm.bias[:, None, None]
        logits = model.fc(scaled.relu().mean((2, 3)))
        predicted = logits.argmax(1).tolist()
        weights = [1 / frequencies[c] for c in predicted]
        weights = [weight * len(x) / sum(weights) for weight in weights]
        losses = [w * loss for w, loss in zip(weights, plain_loss(logits, kind), strict=True) if loss is not None]
        gradients = torch.autograd.grad(sum(losses) / len(losses), (norm.weight, norm.bias))
        for p, g, v in zip((norm.weight, norm.bias), gradients, velocity, strict=True):
            v.mul_(momentum).add_(g)
            p.data -= lr * v
        average = logits.detach().softmax(1).mean(0).tolist()
        frequencies = [dot * old + (1 - dot) * new for old, new in zip(frequencies, average, strict=True)]
        yield logits.detach()


@pytest.mark.parametrize("kind", ["entropy", "weighted", "pseudo"])
def test_every_step_is_the_plain_one(kind, model, batches):
    settings = {"lr": 0.2, "momentum": 0.9, "dot": 0.7}
    adapter = tta.adapt(model, "delta", loss=kind, optimizer="sgd", old_prior=0.6, **settings)
    for x, expected in zip(batches, plain_delta(model, batches, kind=kind, prior=0.6, **settings), strict=True):
        torch.testing.assert_close(adapter(x), expected, rtol=1e-4, atol=1e-4)
    assert adapter.progress().updates == 3


def test_layer_has_the_values_of_stored_and_the_gradients_of_batch_statistics():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(6, 3, 4, 4, generator=generator, dtype=torch.float32) * 2 + 1 for _ in range(2))
    layer = RenormalisedBatchNorm(nn.BatchNorm2d(3).eval(), 0.1)
    with remembering(layer):
        layer(y)
    stored = copy.deepcopy(layer.layer)
    torch.testing.assert_close(stored.running_mean, y.mean((0, 2, 3)))  # the first batch replaces the source's
    x.requires_grad_(True)
    out = layer(x)
    torch.testing.assert_close(out, stored(x))
    direction = torch.randn(out.shape, generator=generator)
    (gradient,) = torch.autograd.grad((out * direction).sum(), x)
    batch = nn.BatchNorm2d(3).train()
    (of_batch,) = torch.autograd.grad((batch(x) * direction).sum(), x)
    gain = ((x.var((0, 2, 3), correction=0) + 1e-5) / (stored.running_var + 1e-5)).sqrt()
    torch.testing.assert_close(gradient, of_batch * gain[:, None, None], rtol=1e-3, atol=1e-5)


def test_rare_classes_weigh_more(model, batches):
    adapter = tta.adapt(model, "delta")
    adapter.frequencies = torch.tensor([0.4, 0.3, 0.2, 0.1, 0.0])
    weights = adapter._weights(torch.eye(CLASSES)[[0, 1, 3]])
    torch.testing.assert_close(weights, torch.tensor([2.5, 10 / 3, 10.0]) / ((2.5 + 10 / 3 + 10) / 3))
    assert adapter._weights(torch.eye(CLASSES)).isfinite().all()


def test_a_batch_without_a_confident_sample_makes_no_step(model, batches):
    for parameter in model.fc.parameters():
        parameter.data.mul_(1e-3)
    for kind in ("weighted", "pseudo"):
        adapter = tta.adapt(model, "delta", loss=kind)
        adapter(batches[0])
        assert (adapter.progress().updates, adapter.progress().filtered) == (0, 1)


def test_a_model_without_batchnorm_is_refused(vit):
    with pytest.raises(ValueError, match="has no normalisation layer of the kinds looked for: BatchNorm"):
        tta.adapt(vit, "delta")
