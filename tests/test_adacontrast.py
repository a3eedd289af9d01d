"""AdaContrast recomputed plainly with its own settings; the golden stream tests the released ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta

WIDTH, CLASSES, SIZE = 6, 4, 20


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, CLASSES)

    def forward(self, x):
        self.seen = self.norm(self.conv(x)).relu().mean((2, 3))
        return self.fc(self.seen)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Small().eval()
    with torch.no_grad():
        model(torch.rand(256, 3, 8, 8))
        model.fc.weight.copy_(torch.randn(CLASSES, WIDTH) / model.seen.std(0).clamp(min=0.1))
        model.fc.bias.copy_(-(model.fc.weight @ model.seen.mean(0)))  # every class is predicted
    return model


class Views:
    """Views that differ: the n-th call of all rolls by n pixels."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.roll(self.calls, 3)


def test_recomputed_plainly(model):
    """Five batches of 8 round queues of 20, with pseudo-labels from three neighbours after the second."""
    keys = F.normalize(torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(1)))
    key_labels = torch.randint(CLASSES, (SIZE,), generator=torch.Generator().manual_seed(2))
    weights = {"alpha": 0.7, "beta": 1.3, "eta": 0.4}
    settings = {
        "lr": 0.02,
        "mt_alpha": 0.8,
        "temperature": 0.2,
        "queue_size": SIZE,
        "neighbours": 3,
        "refine_after": 16,
    }
    adapter = tta.adapt(
        model, "adacontrast", augment=Views(), initial_keys=keys, initial_labels=key_labels, **settings, **weights
    )
    views, student, teacher = Views(), copy.deepcopy(model), copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(student.parameters(), 0.02, momentum=0.9, weight_decay=1e-4, nesterov=True)
    bank, negatives, changed = [], list(zip(keys, key_labels.tolist(), strict=True)), 0
    for number, x in enumerate(torch.rand(5, 8, 3, 8, 8, generator=torch.Generator().manual_seed(3))):
        logits = adapter(x)
        weak, query, key = views(x), views(x), views(x)
        student.train()
        with torch.no_grad():
            probabilities = student(weak).softmax(1)
            features = student.seen
            labels = probabilities.argmax(1)
            if number >= 2:
                for row, own in enumerate(F.normalize(features)):
                    nearest = sorted(bank, key=lambda item, own=own: -float(own @ F.normalize(item[0], dim=0)))[:3]
                    refined = sum(item[1] for item in nearest).argmax()
                    changed += int(refined != labels[row])
                    labels[row] = refined
        predicted = student(query)
        unit = F.normalize(student.seen)
        with torch.no_grad():
            for ours, theirs in zip(teacher.parameters(), student.parameters(), strict=True):
                ours.copy_(0.8 * ours + 0.2 * theirs)
            teacher(key)
            new = F.normalize(teacher.seen)
        instances = 0
        for row in range(8):
            others = [unit[row] @ k for k, label in negatives if label != labels[row]]
            instances = instances + F.cross_entropy(torch.stack([unit[row] @ new[row], *others]) / 0.2, torch.tensor(0))
        negatives = [*negatives, *zip(new, labels.tolist(), strict=True)][-SIZE:]
        mean = predicted.softmax(1).mean(0)
        loss = 0.7 * F.cross_entropy(predicted, labels) + 1.3 * instances / 8 + 0.4 * (mean * (mean + 1e-8).log()).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            probabilities = teacher(weak).softmax(1)
            bank = [*bank, *zip(teacher.seen, probabilities, strict=True)][-SIZE:]
            student.eval()
            torch.testing.assert_close(logits, student(x), rtol=1e-4, atol=1e-4)
    assert changed > 0
    assert torch.equal(keys, F.normalize(torch.randn(SIZE, WIDTH, generator=torch.Generator().manual_seed(1))))


def test_the_paper_views_change_with_the_generator_and_return_with_a_reset(model):
    x = torch.rand(8, 3, 8, 8)
    adapter = tta.adapt(model, "adacontrast", queue_size=SIZE, lr=0.1)
    first, second = adapter(x), adapter(x)
    assert not torch.equal(first, second)
    adapter.reset()
    assert torch.equal(adapter(x), first)


def test_a_queue_of_another_shape_is_refused(model):
    with pytest.raises(ValueError, match=r"initial_keys of shape \(6, 20\)"):
        tta.adapt(model, "adacontrast", queue_size=SIZE, initial_keys=torch.zeros(WIDTH, SIZE))
