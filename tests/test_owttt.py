"""OWTTT recomputed plainly, on a stream with unknown classes in it."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal, kl_divergence
from torch.nn import functional as F

import tta

WIDTH, CLASSES, DELTA = 6, 3, 0.1


def colours(count, seed, *, unknown):
    """Images of one of three colours and, if asked for, grey ones of high contrast among them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(count, 3, 1, 1, generator=generator) * torch.rand(count, 3, 8, 8, generator=generator) * 0.5
    x[torch.arange(count), torch.arange(count) % 3] += 0.4
    if unknown:
        x[::3] = (torch.rand(len(x[::3]), 1, 8, 8, generator=generator) > 0.5).float()
    return x


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(0)
    model = small_cnn(WIDTH, CLASSES)
    x, labels = colours(96, 0, unknown=False), torch.arange(96) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), labels).backward()
        optimizer.step()
    return model.eval()


def otsu(scores):
    best, found = np.inf, 0.0
    for threshold in np.arange(0, 1, 0.01):
        above, below = scores[scores >= threshold], scores[scores < threshold]
        if len(above) and len(below):
            within = (len(above) * above.var() + len(below) * below.var()) / len(scores)
            if within < best:
                best, found = within, threshold
    return found


def expanded(pool, unit, known, threshold, far, largest):
    """The pool after a batch: visit samples, the least known first."""
    visited = set()
    while len(visited) < len(unit):
        row = min((r for r in range(len(unit)) if r not in visited), key=lambda r: known[r])
        if 1 - known[row] <= threshold:
            break
        visited.add(row)
        if 1 - max([known[row], *(float(unit[row] @ p) for p in pool)]) > far:
            pool = [*pool, unit[row]][-largest:]
    return pool


def test_recomputed_plainly(model):
    lr, largest, queue = 0.02, 2, 80
    adapter = tta.adapt(
        model, "owttt", source=colours(60, 1, unknown=False), lr=lr, max_prototypes=largest, queue_size=queue
    )
    with torch.no_grad():
        features = model.features(colours(60, 1, unknown=False))
        predicted = model.fc(features).argmax(1)
    prototypes = F.normalize(torch.stack([features[predicted == c].mean(0) for c in range(CLASSES)]))
    cov = torch.cov(features.T, correction=0)
    ridge = cov.max() / 30 * torch.eye(WIDTH)
    origin = MultivariateNormal(features.mean(0), cov + ridge)
    student = copy.deepcopy(model)
    parameters = [*student.conv.parameters(), *student.norm.parameters()]
    optimizer = torch.optim.SGD(parameters, lr, momentum=0.9)
    training, inference, pool, sizes, both = [], [], [], [], 0
    mean, spread, count = torch.zeros(WIDTH), torch.zeros(WIDTH, WIDTH), 0
    for batch in range(6):
        x = colours(36, 10 + batch, unknown=batch > 0)
        output = adapter.step(x)

        unit = F.normalize(student.features(x))
        known = unit @ prototypes.T
        score = 1 - known.amax(1).detach()
        training = [*training, *score.tolist()][-queue:]
        threshold = otsu(np.array(training))
        seen, unseen = score < threshold, score >= threshold
        losses = []
        far_from = known.amax(1).detach()
        if pool:
            nearest = (unit @ torch.stack(pool).T).amax(1, keepdim=True)
            far_from = torch.maximum(far_from, nearest[:, 0].detach())
            kept_seen, kept_unseen = seen, unseen
            if seen.any() and unseen.any():
                ranked = score[seen].sort(descending=True).values
                half = int(seen.sum()) // 2
                kept_seen = seen & (score < ranked[-half if half else 0])
                ranked = score[unseen].sort(descending=True).values
                kept_unseen = unseen & (score > ranked[int(unseen.sum()) // 2])
            logits = torch.cat([known, nearest], 1) / DELTA
            if kept_seen.any():
                ours = logits[kept_seen, :CLASSES]
                losses.append(0.2 / 2 * F.cross_entropy(ours, ours.argmax(1)))
            if kept_unseen.any():
                ours = logits[kept_unseen]
                losses.append(0.2 / 2 * F.cross_entropy(ours, torch.full((len(ours),), CLASSES)))
        if unseen.any():
            far = otsu((1 - far_from)[unseen].double().numpy())
            pool = expanded(pool, unit.detach(), known.amax(1).tolist(), threshold, far, largest)
        both += len(losses) == 2
        gradients = [torch.zeros_like(p) for p in parameters]
        for loss in losses:
            more = torch.autograd.grad(loss, parameters, retain_graph=True)
            gradients = [g + m for g, m in zip(gradients, more, strict=True)]
        if seen.sum() > 1:
            student.train()
            own = student.features(x[seen])
            student.eval()
            count += len(own)
            a = 1 / min(count, 1280)
            d = own - mean
            new = mean + a * d.sum(0)
            new_spread = spread + a * (d.T @ d - len(own) * spread) - torch.outer(a * d.sum(0), a * d.sum(0))
            mean, spread = new.detach(), new_spread.detach()
            now = MultivariateNormal(new, new_spread + ridge)
            loss = 0.05 * (kl_divergence(origin, now) + kl_divergence(now, origin))
            gradients = [g + m for g, m in zip(gradients, torch.autograd.grad(loss, parameters), strict=True)]
        if losses or seen.sum() > 1:
            for p, g in zip(parameters, gradients, strict=True):
                p.grad = g
            optimizer.step()
        with torch.no_grad():
            cosines = F.normalize(student.features(x)) @ prototypes.T
        score = 1 - cosines.amax(1)
        inference = [*inference, *score.tolist()][-queue:]
        torch.testing.assert_close(output.logits, cosines / DELTA, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(output.outlier_score, score, rtol=1e-3, atol=1e-4)
        assert adapter.threshold.item() == pytest.approx(otsu(np.array(inference)), abs=1e-9)
        sizes.append(len(pool))
        assert adapter.number_unknown.item() == len(pool)
        if pool:
            torch.testing.assert_close(
                adapter.unknown_prototypes[-len(pool) :], torch.stack(pool), rtol=1e-3, atol=1e-4
            )
    assert max(sizes) == largest  # the pool was full, and gave up prototypes
    assert both > 0


def test_unknown_images_have_the_higher_scores(model):
    """On the last of some batches with a third of unknown images, the score tells them apart."""
    adapter = tta.adapt(model, "owttt", source=colours(60, 1, unknown=False), lr=1e-3)
    for batch in range(4):
        output = adapter.step(colours(36, 10 + batch, unknown=True))
    unknown = torch.arange(36) % 3 == 0
    known_scores, unknown_scores = output.outlier_score[~unknown], output.outlier_score[unknown]
    assert (unknown_scores[:, None] > known_scores).float().mean() > 0.9  # the area under the ROC curve
    with adapter.paused():
        assert adapter(colours(4, 1, unknown=False)).shape == (4, CLASSES)
