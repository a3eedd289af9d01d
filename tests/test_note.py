"""NOTE beyond its golden logits: the reservoir against its rule, and independence of how the stream is cut."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import tta
from tta import norms
from tta.memory import PredictionBalancedReservoir

COMMUNITY = Path(__file__).parent / "golden" / "community"


class PlainReservoir:
    """The paper's rule, one sample at a time: a list and a counter for each class."""

    def __init__(self, capacity, classes, below, chance):
        self.capacity, self.below, self.chance = capacity, below, chance
        self.data, self.counter = [[] for _ in range(classes)], [0] * classes

    def add(self, sample, label):
        self.counter[label] += 1
        sizes = [len(items) for items in self.data]
        if sum(sizes) >= self.capacity:
            largest = [c for c, size in enumerate(sizes) if size == max(sizes)]
            if label not in largest:
                loser = self.data[largest[self.below(len(largest))]]
            elif self.chance(sizes[label], self.counter[label]):
                loser = self.data[label]
            else:
                return
            loser.pop(self.below(len(loser)))
        self.data[label].append(sample)

    def contents(self):
        return [sample for items in self.data for sample in items]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_reservoir_follows_its_rule(data):
    """For any capacity, classes, order, and cut into batches; both are given the same draws."""
    capacity = data.draw(st.integers(2, 12), "capacity")
    classes = data.draw(st.integers(1, 8), "classes")
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=1, max_size=80), "labels")
    first, second = random.Random(0), random.Random(0)
    bank = PredictionBalancedReservoir(capacity)
    plain = PlainReservoir(capacity, classes, second.randrange, lambda held, of: second.randrange(of) < held)
    start = 0
    while start < len(labels):
        part = labels[start : start + data.draw(st.integers(1, 20), "batch")]
        numbers = torch.arange(start, start + len(part)).float()
        bank.add(numbers[:, None], torch.tensor(part), classes, first.randrange)
        for number, label in zip(numbers.tolist(), part, strict=True):
            plain.add(number, label)
        start += len(part)
        assert sorted(bank.contents()[:, 0].tolist()) == sorted(plain.contents())
    assert bank.offered == len(labels)


@pytest.mark.parametrize("key", ["note", "note_pbrs_bn"])
def test_rule_is_that_of_the_released_code(key):
    """On its predictions, with Python's random numbers seeded as there, the plain rule keeps the samples that it kept."""
    labels = np.load(COMMUNITY / "logits.npz")[key].argmax(1).tolist()
    held = np.load(COMMUNITY / "aux.npz")[f"{key}_memory_ids"]
    draws = random.Random(0)
    plain = PlainReservoir(64, 10, draws.randrange, lambda held, of: draws.uniform(0, 1) <= held / of)
    for number, label in enumerate(labels):
        plain.add(number, label)
        if number % 64 == 63:
            assert plain.contents() == held[number // 64].tolist()


def test_results_do_not_depend_on_the_cut_into_batches(cnn, golden_images):
    images = golden_images[:192]
    whole, parts = (tta.adapt(cnn, "note", update_frequency=40, memory_size=32, lr=1e-2) for _ in range(2))
    expected = torch.cat([parts(batch) for batch in images.split(7)])
    torch.testing.assert_close(whole(images), expected, atol=1e-4, rtol=0)
    assert torch.equal(whole.memory.arrivals, parts.memory.arrivals)


def test_a_large_k_leaves_batchnorm_as_it_is():
    layer = nn.BatchNorm2d(4).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(norms.InstanceAwareBatchNorm(layer, 0.1, k=1e6)(x), layer(x))


def test_k_of_zero_is_instance_normalisation():
    layer = nn.BatchNorm2d(4).eval()
    x = torch.randn(3, 4, 5, 5) * 3 + 1
    mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True)
    ours = norms.InstanceAwareBatchNorm(layer, 0.1, k=0.0)(x)
    torch.testing.assert_close(ours, (x - mean) / (var + layer.eps).sqrt(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (6, 4, 1, 1), (6, 4, 7)])
def test_moving_batchnorm_is_training_mode(shape):
    kind = nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d
    layer, reference = kind(4, momentum=0.3), kind(4, momentum=0.3).train()
    moving = norms.MovingBatchNorm(layer, 0.3)
    x = torch.randn(shape) * 2 + 1
    with norms.remembering(moving):
        torch.testing.assert_close(moving(x), reference(x))
    torch.testing.assert_close(layer.running_mean, reference.running_mean)
    torch.testing.assert_close(layer.running_var, reference.running_var)
    torch.testing.assert_close(moving(x), reference.eval()(x))
