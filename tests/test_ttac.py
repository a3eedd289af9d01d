"""TTAC: its queue recomputed plainly, and what the golden stream does not see."""

import copy
import math

import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

import tta
from tta.memory import ReviewQueue

WIDTH, CLASSES = 4, 3


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(3)
    model = small_cnn(WIDTH, CLASSES)
    with torch.no_grad():
        model.train()
        for _ in range(60):
            model(torch.rand(32, 3, 8, 8))
        model.eval()
        features = model.features(torch.rand(256, 3, 8, 8))
        model.fc.weight.copy_(30 * torch.randn(CLASSES, WIDTH) / features.std(0) / 10)
        model.fc.bias.copy_(-(model.fc.weight @ features.mean(0)))  # every class is predicted
    return model


@pytest.fixture
def source():
    return torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def gaussian(mean, cov, ridge):
    return MultivariateNormal(mean, cov + ridge * torch.eye(WIDTH))


def plain_statistics(model, images):
    with torch.no_grad():
        features = model.features(images)
        labels = model.fc(features).argmax(1)
    ours = [features[labels == c] for c in range(CLASSES)]
    assert min(map(len, ours)) > 1
    cov = torch.cov(features.T, correction=0)
    return [(f.mean(0), torch.cov(f.T, correction=0)) for f in ours], (features.mean(0), cov), cov.max() / 30


class PlainRunning:
    def __init__(self, mean, cov, length):
        self.mean, self.cov, self.length, self.n = mean, cov, length, 0

    def add(self, features):
        self.n += len(features)
        a = 1 / min(self.n, self.length)
        d = features - self.mean
        mean = self.mean + a * d.sum(0)
        cov = self.cov + a * (d.T @ d - len(d) * self.cov) - torch.outer(a * d.sum(0), a * d.sum(0))
        self.mean, self.cov = mean.detach(), cov.detach()
        return mean, cov


def test_queue_recomputed_plainly(model, source):
    """Three batches through a queue of 16: passes, random order, trust, and the classes in the second half alone."""
    settings = {"queue_size": 16, "queue_batch_size": 6, "queue_passes": 3, "queue_tolerance": 0.02, "lr": 0.05}
    settings |= {"confidence": 0.5, "min_class_count": 3, "class_length": 10, "global_length": 20, "loss_scale": 0.2}
    adapter = tta.adapt(model, "ttac", source=source, **settings)
    of_classes, of_all, ridge = plain_statistics(model, source)
    running = [PlainRunning(mean, cov, 10) for mean, cov in of_classes]
    total = PlainRunning(torch.zeros(WIDTH), torch.zeros(WIDTH, WIDTH), 20)
    student = copy.deepcopy(model)
    parameters = [*student.conv.parameters(), *student.norm.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    generator = torch.Generator().manual_seed(0)
    images, average, distrust = torch.zeros(16, 3, 8, 8), torch.zeros(16, CLASSES), [0] * 16
    offered = aligned = mistrusted = 0
    for x in torch.rand(3, 8, 3, 8, 8, generator=torch.Generator().manual_seed(2)) ** 1.3:
        logits = adapter(x)
        for image in x:
            slot = offered % 16
            images[slot], average[slot], distrust[slot] = image, 0, 0
            offered += 1
        held = min(offered, 16)
        for number in range(1, min(3, held // 6 + 1) + 1):
            distrust = [max(0, left - 1) for left in distrust]
            for slots in torch.randperm(held, generator=generator).split(6):
                if len(slots) < 6:
                    continue
                student.train()
                features = student.features(images[slots])
                student.eval()
                with torch.no_grad():
                    predicted = student(images[slots]).softmax(1)
                picked = [[] for _ in range(CLASSES)]
                for row, slot in enumerate(slots.tolist()):
                    top = int(predicted[row].argmax())
                    if predicted[row, top] <= average[slot, top] - 0.02:
                        distrust[slot] = 5
                        mistrusted += 1
                    new = predicted[row]
                    average[slot] = new if not average[slot].any() else 0.1 * average[slot] + 0.9 * new
                    label = int(average[slot].argmax())
                    if distrust[slot] == 0 and average[slot, label] > 0.5:
                        picked[label].append(row)
                mean, cov = total.add(features)
                p, q = gaussian(*of_all, ridge), gaussian(mean, cov, ridge)
                loss = kl_divergence(p, q) + kl_divergence(q, p)
                for c, rows in enumerate(picked):
                    if rows:
                        mean, cov = running[c].add(features[rows])
                        if number > 3 // 2 and running[c].n >= 3:
                            aligned += 1
                            p, q = gaussian(*of_classes[c], ridge), gaussian(mean, cov, ridge)
                            loss = loss + (kl_divergence(p, q) + kl_divergence(q, p)) / CLASSES
                optimizer.zero_grad()
                (0.2 * loss).backward()
                optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(logits, student(x), rtol=1e-3, atol=1e-3)
    assert aligned > 5
    assert mistrusted > 0


@pytest.mark.parametrize("kind", ["full", "diagonal"])
def test_one_step_with_the_imagenet_settings(model, source, kind):
    """Classes that start with samples of their own, and a weight that is not 1 / classes."""
    settings = {
        "class_count": 2,
        "min_class_count": 5,
        "class_weight": 1.0,
        "class_covariance": kind,
        "confidence": 0.4,
    }
    adapter = tta.adapt(model, "ttac", source=source, lr=0.1, loss_scale=1.0, momentum=0.0, **settings)
    of_classes, of_all, ridge = plain_statistics(model, source)
    student = copy.deepcopy(model).train()
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(2)) ** 1.3
    features = student.features(x)
    sure, labels = student.fc(features).softmax(1).max(1)
    mean, cov = PlainRunning(torch.zeros(WIDTH), torch.zeros(WIDTH, WIDTH), 1280).add(features)
    p, q = gaussian(*of_all, ridge), gaussian(mean, cov, ridge)
    loss = kl_divergence(p, q) + kl_divergence(q, p)
    used = 0
    for c in range(CLASSES):
        own = features[(labels == c) & (sure > 0.4)]
        state = PlainRunning(*of_classes[c], 128)
        state.n = 2
        if len(own) + 2 >= 5:
            used += 1
            mean, cov = state.add(own)
            expected = of_classes[c][1]
            if kind == "diagonal":
                cov, expected = cov.diagonal().diag(), expected.diagonal().diag()
            p, q = gaussian(of_classes[c][0], expected, ridge), gaussian(mean, cov, ridge)
            loss = loss + kl_divergence(p, q) + kl_divergence(q, p)
    assert used > 0
    parameters = [*student.conv.parameters(), *student.norm.parameters()]
    gradients = torch.autograd.grad(loss, parameters)
    adapter(x)
    ours = [*adapter.model.conv.parameters(), *adapter.model.norm.parameters()]
    for mine, parameter, gradient in zip(ours, parameters, gradients, strict=True):
        torch.testing.assert_close(mine, parameter - 0.1 * gradient, rtol=1e-3, atol=1e-4)
    assert torch.equal(adapter.model.fc.weight, model.fc.weight)


def test_queue_keeps_the_last_images_and_forgets_what_it_thought_of_the_others():
    queue = ReviewQueue(5, 0.1)
    queue.add(torch.arange(4.0)[:, None], classes=2)
    trusted = queue.review(torch.arange(4), torch.tensor([[0.8, 0.2]] * 4))
    assert torch.equal(trusted, torch.tensor([[0.8, 0.2]] * 4))
    queue.add(torch.arange(4.0, 7.0)[:, None], classes=2)
    assert queue.images.flatten().tolist() == [5, 6, 2, 3, 4]
    assert queue.predictions[:, 0].tolist() == pytest.approx([0, 0, 0.8, 0.8, 0])
    queue.review(torch.tensor([2]), torch.tensor([[0.6, 0.4]]))  # fell by 0.2
    passes = 0
    while not queue.review(torch.tensor([2]), torch.tensor([[0.7, 0.3]])).any():
        queue.begin_pass()
        passes += 1
    assert passes == 5
    queue.add(torch.arange(20.0)[:, None], classes=2)
    assert sorted(queue.images.flatten().tolist()) == [15, 16, 17, 18, 19]
    assert math.isclose(F.relu(queue.predictions).sum().item(), 0)


def test_a_class_that_the_source_never_shows_is_left_alone(model, source):
    """With the head biased towards one class, two have no source images: the loss stays finite."""
    with torch.no_grad():
        model.fc.bias[0] += 100
    adapter = tta.adapt(model, "ttac", source=source, min_class_count=0)
    with torch.no_grad():
        adapter.model.fc.bias[1] += 200
    assert adapter(source[:16]).isfinite().all()
    assert adapter.skipped_updates == 0
