"""SoTTA: its memory against a plain re-statement, one update recomputed, and the rule of its threshold."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tta
from tta.memory import UniformMemory

CLASSES = 5


class PlainMemory:
    """The paper's rule, one sample at a time: a list for each class."""

    def __init__(self, capacity, classes, below):
        self.capacity, self.below = capacity, below
        self.data = [[] for _ in range(classes)]

    def add(self, sample, label):
        sizes = [len(items) for items in self.data]
        if sum(sizes) >= self.capacity:
            largest = [c for c, size in enumerate(sizes) if size == max(sizes)]
            loser = self.data[label if label in largest else largest[self.below(len(largest))]]
            loser.pop(self.below(len(loser)))
        self.data[label].append(sample)

    def contents(self):
        return [sample for items in self.data for sample in items]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_memory_follows_its_rule(data):
    """For any capacity, classes, confidences, order, and cut into batches; both are given the same draws."""
    capacity = data.draw(st.integers(2, 12), "capacity")
    classes = data.draw(st.integers(1, 8), "classes")
    stream = data.draw(st.lists(st.tuples(st.integers(0, classes - 1), st.booleans()), min_size=1, max_size=80))
    bank, plain = UniformMemory(capacity), PlainMemory(capacity, classes, random.Random(0).randrange)
    draw, start = random.Random(0).randrange, 0
    while start < len(stream):
        part = stream[start : start + data.draw(st.integers(1, 20), "batch")]
        labels, sure = (torch.tensor(column) for column in zip(*part, strict=True))
        numbers = torch.arange(start, start + len(part)).float()
        bank.add_sure(numbers[:, None], labels, sure, classes, draw)
        for number, (label, confident) in zip(numbers.tolist(), part, strict=True):
            if confident:
                plain.add(number, label)
        start += len(part)
        assert sorted(bank.contents()[:, 0].tolist()) == sorted(plain.contents())
        assert bank.offered == start


def plain_forward(model, x):
    """As in training mode, by which the stored statistics follow."""
    model.norm.train()
    logits = model(x)
    model.norm.eval()
    return logits


def plain_update(model, samples, *, lr, rho, momentum):
    """One sharpness-aware SGD step on the entropy, parameter by parameter; changes the model."""
    model.norm.momentum = momentum
    weights = [model.norm.weight, model.norm.bias]

    def gradients():
        rows = plain_forward(model, samples).softmax(1)
        return torch.autograd.grad(sum(-sum(p * p.log() for p in row) for row in rows) / len(samples), weights)

    first = gradients()
    norm = sum(float(g.square().sum()) for g in first) ** 0.5
    before = [weight.detach().clone() for weight in weights]
    for weight, g in zip(weights, first, strict=True):
        weight.data += rho * g / norm
    for weight, old, g in zip(weights, before, gradients(), strict=True):
        weight.data = old - lr * g


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(0)
    model = small_cnn(6, CLASSES).eval()
    model.fc.weight.data.mul_(8)
    return model


def test_an_update_is_the_plain_one(model):
    images = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = copy.deepcopy(model)
    with torch.no_grad():
        confidences = plain(images).softmax(1).amax(1)
    threshold = float(confidences.median())
    chosen = images[confidences >= threshold]
    plain_update(plain, chosen, lr=0.5, rho=0.3, momentum=0.2)
    shared = {"update_frequency": 24, "optimizer": "sgd", "momentum": 0.0}
    adapter = tta.adapt(model, "sotta", lr=0.5, rho=0.3, high_threshold=threshold, **shared)
    torch.testing.assert_close(adapter(images), model(images))
    ours = adapter.model.norm.layer
    assert len(adapter.memory) == len(chosen) < 24
    for name in ("weight", "bias", "running_mean", "running_var"):
        torch.testing.assert_close(getattr(ours, name), getattr(plain.norm, name), rtol=1e-4, atol=1e-5)
    assert (ours.weight - model.norm.weight).abs().max() > 1e-3


@pytest.mark.parametrize(("classes", "threshold"), [(2, 0.99), (10, 0.99), (100, 0.66), (1000, 0.33)])
def test_the_threshold_is_the_published_one(classes, threshold, small_cnn):
    """Of two images that lie just above and just below it one is kept."""
    adapter = tta.adapt(small_cnn(2, classes), "sotta")
    logits = torch.zeros(2, classes)
    for row, confidence in zip(logits, (threshold + 1e-3, threshold - 1e-3), strict=True):
        row[0] = torch.tensor(confidence * (classes - 1) / (1 - confidence)).log()
    adapter._remember(torch.rand(2, 3, 8, 8), logits)
    assert len(adapter.memory) == 1
    assert adapter.memory.offered == 2


def test_nothing_is_learned_from_fewer_than_two(model):
    images = torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    adapter = tta.adapt(model, "sotta", update_frequency=4, high_threshold=1.0)
    before = {name: value.clone() for name, value in adapter.model.state_dict().items()}
    adapter(images)
    assert len(adapter.memory) == 0
    assert all(torch.equal(value, before[name]) for name, value in adapter.model.state_dict().items())


def test_results_do_not_depend_on_the_cut_into_batches(cnn, golden_images):
    images, some = golden_images[:192], {"update_frequency": 40, "memory_size": 32, "high_threshold": 0.5, "lr": 1e-2}
    whole, parts = (tta.adapt(cnn, "sotta", **some) for _ in range(2))
    expected = torch.cat([parts(batch) for batch in images.split(7)])
    torch.testing.assert_close(whole(images), expected, atol=1e-4, rtol=0)
    assert torch.equal(whole.memory.labels, parts.memory.labels)


def test_the_top_of_a_transformer_is_left_alone(vit):
    adapter = tta.adapt(vit, "sotta")
    adapted = {name for name, parameter in adapter.model.named_parameters() if parameter.requires_grad}
    assert adapted == {
        f"blocks.{block}.norm{n}.{kind}" for block in range(3) for n in (1, 2) for kind in ("weight", "bias")
    }
