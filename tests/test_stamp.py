"""STAMP: its memory against a plain re-statement, and what the golden stream does not see."""

import math
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta.memory import ReplayMemory


class PlainReplay:
    """The memory as the paper states its rule: a list for each class."""

    def __init__(self, capacity, classes, pick):
        self.capacity, self.pick = capacity, pick
        self.data = [[] for _ in range(classes)]
        self.seen = torch.zeros(classes)

    def add(self, sample, label):
        if sum(map(len, self.data)) == self.capacity:
            filled = [c for c, items in enumerate(self.data) if items]
            most = max(self.seen[c] for c in filled)
            self.data[self.pick([c for c in filled if self.seen[c] == most])].pop(0)
        self.data[label].append(sample)

    def read(self):
        for c, items in enumerate(self.data):
            self.seen[c] = 0.9 * self.seen[c] + 0.1 * len(items)
        return [sample for items in self.data for sample in items]


@pytest.mark.parametrize("seed", range(4))
def test_memory_is_the_plain_one(seed):
    generator = torch.Generator().manual_seed(seed)
    ours, plain = ReplayMemory(12), PlainReplay(12, 4, random.Random(seed).choice)
    pick = random.Random(seed).choice
    for batch in range(12):
        size = int(torch.randint(0, 9, (), generator=generator))
        samples = torch.rand(size, 2, generator=generator)
        labels = torch.randint(4, (size,), generator=generator).square() % 4  # the classes are not alike
        ours.add(samples, labels, 4, pick)
        for sample, label in zip(samples, labels.tolist(), strict=True):
            plain.add(sample, label)
        if batch % 3 and len(ours):
            assert torch.equal(ours.read(), torch.stack(plain.read()))


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()
    model[4].weight.data.mul_(2)
    return model


def forward(model, scale, shift, x):
    x = F.batch_norm(model[0](x), None, None, scale, shift, training=True)
    return model[4](x.relu().flatten(1))


@pytest.mark.parametrize(("weights", "schedule"), [("samples", None), ("capacity", 3)])
def test_recomputed_plainly(model, weights, schedule):
    """Three batches, too few to fill the memory: views, the weights, the sharpness-aware step and the learning rate."""
    alpha, lr, rho, capacity = 0.9, 0.3, 0.2, 64
    settings = {"alpha": alpha, "lr": lr, "rho": rho, "weights": weights, "schedule": schedule, "capacity": capacity}
    rolls = iter(range(1, 100))
    adapter = tta.adapt(model, "stamp", views=2, augment=lambda x: x.roll(next(rolls), 3), **settings)
    scale, shift = (p.detach().clone() for p in model[1].parameters())

    def gradients(held, scale, shift):
        scale, shift = scale.clone().requires_grad_(), shift.clone().requires_grad_()
        logits = forward(model, scale, shift, held)
        h = -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
        total = len(held) if weights == "samples" else capacity
        loss = (total * (-h).exp() / (-h).exp().sum() * h).mean()
        return torch.autograd.grad(loss, (scale, shift))

    held = torch.zeros(0, 3, 8, 8)  # in the order of arrival: a sum over the memory does not see its order
    for number, x in enumerate(torch.rand(3, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))):
        output = adapter.step(x)
        views = [x, x.roll(2 * number + 1, 3), x.roll(2 * number + 2, 3)]
        with torch.no_grad():
            mean = sum(forward(model, scale, shift, view).softmax(1) for view in views) / 3
            labels = forward(model, scale, shift, x).argmax(1)
            anchor = forward(model, *model[1].parameters(), x).argmax(1)
        entropies = -(mean * (mean + 1e-5).log()).sum(1)
        torch.testing.assert_close(output.logits.exp(), mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(output.outlier_score, entropies, rtol=1e-4, atol=1e-5)
        chosen = (entropies < alpha * math.log(5)) & (labels == anchor)
        assert 0 < chosen.sum() < 8
        held = torch.cat([held, x[chosen]])
        first = gradients(held, scale, shift)
        norm = torch.cat(first).norm()
        second = gradients(held, scale + rho * first[0] / norm, shift + rho * first[1] / norm)
        rate = lr if schedule is None else lr * (1 + math.cos(math.pi * number / schedule)) / 2
        scale, shift = scale - rate * second[0], shift - rate * second[1]
        torch.testing.assert_close(adapter.model[1].weight.detach(), scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(adapter.model[1].bias.detach(), shift, rtol=1e-4, atol=1e-5)


def test_a_batch_without_a_sure_sample_teaches_nothing(model):
    adapter = tta.adapt(model, "stamp", alpha=1e-6, augment="none")
    before = adapter.state_dict()
    logits = adapter(torch.rand(8, 3, 8, 8))
    assert logits.isfinite().all()
    after = adapter.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before if "memory" not in key)
    assert len(adapter.memory) == 0


def test_all_layers_excluded_is_an_error(model):
    with pytest.raises(ValueError, match="All 1 normalisation layers"):
        tta.adapt(model, "stamp", exclude=("1",))
