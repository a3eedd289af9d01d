"""SimATTA: updates recomputed, source-like samples, and its questions against a plain restatement of the clusters."""

import copy

import pytest
import torch
from sklearn.cluster import KMeans

import tta
from tta.methods.simatta import _first_of

CLASSES = 5


@pytest.fixture
def model(small_cnn):
    torch.manual_seed(0)
    network = small_cnn(8, CLASSES)
    network.norm.running_mean.normal_()
    network.norm.running_var.uniform_(0.5, 2)
    network.fc.weight.data *= 20  # so that some predictions are surer than others
    network.fc.bias.data.zero_()
    return network


@pytest.fixture
def images():
    return torch.rand(3, 12, 3, 9, 9, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.2, 3, 12).view(
        -1, 1, 1, 1
    )


def entropies(logits):
    probabilities = logits.softmax(1)
    return -(probabilities * probabilities.log()).sum(1)


@pytest.mark.parametrize(("cold_start", "e_low"), [(0, 1.0), (100, 1.0), (0, 1e-9), (100, 1e-9)])
def test_updates_recomputed(model, images, cold_start, e_low):
    """Two batches, of which the first is answered in part; with few source-like anchors or none, before and after the cold start."""
    adapter = tta.adapt(model, "simatta", lr=0.05, steps=3, cold_start=cold_start, e_low=e_low)
    plain, source = copy.deepcopy(model).eval(), copy.deepcopy(model).eval()
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, momentum=0.9)
    output = adapter.step(images[0])
    with torch.no_grad():
        logits = source(images[0])
    assert torch.equal(output.logits, logits)

    sure = [i for i in range(12) if entropies(logits)[i] < e_low]
    assert 0 < len(sure) < 12 or e_low < 1e-3
    labelled, labels = [0, 3, 4, 9], torch.tensor([1, 2, 0, 4])
    adapter.feedback(labelled, labels=labels)
    share = 4 / (4 + len(sure))
    share = min(share, 0.2) if len(sure) < cold_start else share
    for _ in range(3):
        of_labelled = torch.stack(
            [-plain(images[0][i, None]).log_softmax(1)[0, y] for i, y in zip(labelled, labels, strict=True)]
        )
        loss = share * of_labelled.mean()
        if sure:
            of_sure = [-plain(images[0][i, None]).log_softmax(1)[0, logits[i].argmax()] for i in sure]
            loss = loss + (1 - share) * torch.stack(of_sure).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        expected = plain(images[1])
    assert (adapter(images[1]) - expected).abs().max() < 1e-4
    assert (expected - source(images[1])).abs().max() > 0.05
    assert torch.equal(adapter.model.norm.running_mean, model.norm.running_mean)


def test_source_like_samples_are_the_surest_of_the_source_model(model, images):
    adapter = tta.adapt(model, "simatta", lr=0.05, e_low=1.0, source_per_batch=3)
    adapter(images[0])
    adapter.feedback([0, 1], labels=[0, 1])
    adapter(images[1])  # after a step: the source model still decides
    with torch.no_grad():
        logits = model.eval()(images[1])
    found = entropies(logits).argsort()[:3]
    held, labels = adapter.source_like.contents()
    assert torch.equal(held[3:], images[1][found])
    assert torch.equal(labels[3:], logits[found].argmax(1))


def test_steps_draw_as_many_anchors_of_each_kind(model, images, monkeypatch):
    adapter = tta.adapt(model, "simatta", steps=1, e_low=10.0, anchors_per_step=5)
    sizes, predict = [], adapter.predict
    adapter(images[0])
    adapter.feedback(range(9), labels=[0] * 9)
    monkeypatch.setattr(adapter, "predict", lambda x: sizes.append(len(x)) or predict(x))
    adapter(images[1])
    assert sizes == [10, 12]


def plain_questions(points, known, weights, groups, seed):
    """Rows to ask about, each with its weight, and the weights of the known after it; by the rule of the paper."""
    total = torch.cat([weights, torch.ones(len(points) - known)])
    found = KMeans(groups, n_init=10, random_state=seed).fit(points.numpy(), sample_weight=total.numpy())
    asked, weights = [], weights.clone()
    for group in range(groups):
        members = [i for i in range(len(points)) if found.labels_[i] == group]
        old, new = [i for i in members if i < known], [i for i in members if i >= known]
        if old:
            for i in old:
                weights[i] += len(new) / len(old)
        elif new:
            distances = {i: float((points[i] - torch.from_numpy(found.cluster_centers_[group])).norm()) for i in new}
            asked.append((min(new, key=distances.get) - known, len(new)))
    return sorted(asked, key=lambda pair: -pair[1]), weights


def test_questions_are_one_for_each_new_cluster(model, images, monkeypatch):
    adapter = tta.adapt(model, "simatta", e_high=0.8, clusters=6, clusters_increase=1, steps=1)
    seeds, randint = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: seeds.append(randint(*args, **kwargs)) or seeds[-1])
    weights = torch.zeros(0)
    known = torch.zeros(0, 3, 9, 9)
    for number, x in enumerate(images):
        first = int(adapter.step(x).ids[0])
        plain = copy.deepcopy(adapter.model)
        with torch.no_grad():
            uncertain = (entropies(plain(x)) >= 0.8).nonzero()[:, 0]
            assert 6 < len(uncertain) < 12
            points = plain.features(torch.cat([known, x[uncertain]]))
        ids = adapter.queries(4)
        expected, weights = plain_questions(points, len(known), weights, min(6 + number, len(points)), int(seeds[-1]))
        assert sorted(size for _, size in expected[:4]) == sorted(
            int(adapter.waiting.notes[adapter.waiting.slots(torch.tensor([i]))]) for i in ids
        )
        pairs = [(int(uncertain[row]) + first, size) for row, size in expected]
        assert set(ids) <= {i for i, _ in pairs}
        assert len(ids) == min(4, len(pairs))
        asked = [(i, dict(pairs)[i]) for i in ids]
        adapter.feedback(ids, labels=[i % CLASSES for i in ids])
        known = torch.cat([known, x[[i - first for i, _ in asked]]])
        weights = torch.cat([weights, torch.tensor([float(size) for _, size in asked])])
        assert torch.allclose(adapter.labelled.weights[adapter.labelled.slots()], weights)


def test_a_sample_that_waits_covers_its_cluster(model, images):
    """The same batch again: every cluster already has a sample asked about, answered or not."""
    adapter = tta.adapt(model, "simatta", e_high=0.0, clusters=4, clusters_increase=0)
    adapter(images[0])
    first = adapter.queries(4)
    assert len(first) == 4
    with torch.no_grad():
        adapter.waiting.add(images[0], torch.zeros(12, CLASSES))
    assert adapter.queries(4) == []
    assert adapter.waiting.notes[adapter.waiting.slots(torch.tensor(first))].sum() == 24


def test_sure_samples_are_not_asked_about(model, images):
    adapter = tta.adapt(model, "simatta", e_high=100.0)
    adapter(images[0])
    assert adapter.queries(5) == []


def test_the_budget_can_be_used_up_batch_after_batch(model, images):
    adapter = tta.adapt(model, "simatta", e_high=0.0, clusters=2)
    for x in images:
        adapter(x)
        assert 2 <= len(adapter.queries(5)) <= 5
    assert int(adapter.clusters) == 2 + 3 * 5


@pytest.mark.parametrize("points", [1, 2, 30])
def test_nearest_point_of_each_cluster(points):
    draws = torch.Generator().manual_seed(points)
    cluster, distance = torch.randint(6, (points,), generator=draws), torch.rand(points, generator=draws)
    found = _first_of(cluster, distance, 6).tolist()
    for group in range(6):
        own = [i for i in range(points) if cluster[i] == group]
        assert found[group] == (min(own, key=lambda i: distance[i].item()) if own else -1)


def test_batch_statistics_are_a_choice(model, images):
    plain, by_batch = (tta.adapt(model, "simatta", statistics=kind)(images[0]) for kind in ("source", "batch"))
    assert torch.equal(plain, model.eval()(images[0]).detach())
    assert torch.allclose(by_batch, tta.adapt(model, "norm")(images[0]), atol=1e-5)
    assert not torch.allclose(plain, by_batch, atol=1e-2)


@pytest.mark.parametrize("change", [{"clusters": 0}, {"e_high": -1.0}, {"clusters_increase": -1}, {"statistics": "x"}])
def test_settings_that_do_not_fit_are_refused(model, change):
    with pytest.raises(ValueError, match=next(iter(change))):
        tta.adapt(model, "simatta", **change)
