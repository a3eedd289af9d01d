"""CAFA recomputed plainly: there are no golden logits of it."""

import copy

import pytest
import torch
from torch.utils.data import TensorDataset

import tta

WIDTH, CLASSES = 4, 3


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(0)
    return small_cnn(WIDTH, CLASSES).eval()


@pytest.mark.parametrize("labelled", [False, True])
def test_recomputed_plainly(model, labelled):
    images = torch.rand(90, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.fc.weight.mul_(20)
        model.fc.bias.copy_(-(model.fc.weight @ model.features(images).mean(0)))
        features = model.features(images)
        labels = torch.arange(90) % 3 if labelled else model(images).argmax(1)
    assert torch.bincount(labels, minlength=CLASSES).min() > 3
    means = torch.stack([features[labels == c].mean(0) for c in range(CLASSES)])
    centred = features - means[labels]
    within = centred.T @ centred / len(features)
    within = 0.8 * within + 0.2 * within.diagonal().mean() * torch.eye(WIDTH)
    inverse = torch.linalg.inv(within)
    source = TensorDataset(images, labels) if labelled else images
    adapter = tta.adapt(
        model, "cafa", source=source, shrinkage=0.2, labelled=labelled, optimizer="sgd", lr=0.1, momentum=0.0
    )
    plain = copy.deepcopy(model).train()
    x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(2)) ** 1.5
    logits = adapter(x)
    found = plain.features(x)
    expected = plain.fc(found)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    loss = 0
    for f, c in zip(found, expected.argmax(1).tolist(), strict=True):
        distances = [(f - m) @ inverse @ (f - m) for m in means]
        loss = loss + (distances[c] / sum(d for k, d in enumerate(distances) if k != c)).log() / 16
    gradients = torch.autograd.grad(loss, plain.norm.parameters())
    for ours, theirs, gradient in zip(adapter.model.norm.parameters(), plain.norm.parameters(), gradients, strict=True):
        torch.testing.assert_close(ours, theirs - 0.1 * gradient, rtol=1e-3, atol=1e-4)
    assert torch.equal(adapter.model.conv.weight, model.conv.weight)


def test_labels_are_asked_for(model):
    with pytest.raises(ValueError, match="needs labelled source images"):
        tta.adapt(model, "cafa", source=torch.rand(8, 3, 8, 8), labelled=True)
