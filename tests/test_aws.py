"""AWS recomputed plainly: there are no golden logits of it."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

import tta

WIDTH, CLASSES, BATCH = 4, 3, 6


def cosine(a, b):
    return (a @ b) / (a.norm() * b.norm())


@pytest.mark.parametrize("absent", [False, True])
def test_recomputed_plainly(absent, small_cnn):
    torch.manual_seed(0)
    model = small_cnn(WIDTH, CLASSES).train()
    for layer in (model.conv, model.fc):
        layer.weight.data.mul_(3)
    images, x = torch.rand(30, 3, 8, 8), torch.rand(BATCH, 3, 8, 8) ** 2
    labels = torch.arange(30) % (2 if absent else 3)
    settings = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.0, "temperature": 0.5, "source_batch_size": 30}
    weights = {"lambda_con": 0.5, "lambda_kd": 2.0, "lambda_mutual": 3.0}
    flip = {"augment": lambda batch: batch.flip(3)}
    adapter = tta.adapt(
        model, "aws", source=TensorDataset(images, labels), source_labels=True, **settings, **weights, **flip
    )
    logits = adapter(x)

    target, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        source = model.features(images)
        means = [source[labels == c].mean(0) for c in range(2 if absent else 3)]
        first = model.features(x)
    features, views, own = target.features(x), target.features(x.flip(3)), other.features(x)
    expected = target.fc(features)
    torch.testing.assert_close(logits, expected.detach())

    vectors = [*features, *views]
    contrast = 0
    for i in range(2 * BATCH):
        terms = {j: (cosine(vectors[i], vectors[j]) / 0.5).exp() for j in range(2 * BATCH) if j != i}
        contrast = contrast - (terms[(i + BATCH) % (2 * BATCH)] / sum(terms.values())).log() / (2 * BATCH)
    drift = sum(2 - cosine(a, c) - cosine(b, c) for a, b, c in zip(features, own, first, strict=True)) / BATCH
    p = expected.softmax(1)
    mean = p.mean(0)
    information = -(mean * mean.log()).sum() + (p * p.log()).sum(1).mean()
    rows = [[cosine(f, m) for m in means] + [torch.tensor(-1.0)] * absent for f in own]
    by_prototypes = torch.stack([torch.stack(row) for row in rows]) / 0.5
    learned = -(p.detach() * by_prototypes.log_softmax(1)).sum(1).mean()
    loss = 0.5 * contrast + 2 * drift + 3 * (learned - information)
    ours = [
        *adapter.model.parameters(),
        *adapter.prototypical.conv.parameters(),
        *adapter.prototypical.norm.parameters(),
    ]
    theirs = [*target.parameters(), *other.conv.parameters(), *other.norm.parameters()]
    for after, before, gradient in zip(ours, theirs, torch.autograd.grad(loss, theirs), strict=True):
        torch.testing.assert_close(after.data, before.data - 0.05 * gradient, atol=1e-5, rtol=1e-4)
    assert torch.equal(adapter.prototypical.fc.weight, model.fc.weight)
