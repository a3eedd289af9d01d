"""Auto: its statistics recomputed plainly, its regimes, what it costs, and models without BatchNorm."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta import pooled
from tta.results.cost import Passes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_looks(h, norm):
    """Each image's channel means and log deviations about the source's, one image and channel after the other."""
    rows = []
    for image in h:
        means, logs = [], []
        for channel, mean, var in zip(image, norm.running_mean, norm.running_var + norm.eps, strict=True):
            values = channel.flatten()
            means.append((values.mean() - mean) / var.sqrt())
            logs.append((values.var(correction=0) / var).log() / 2)
        rows.append(torch.stack(means + logs))
    return torch.stack(rows)


def plain_logits(net, x, weights, prior):
    """Logits by the weighted statistics of the images and the source's, and these statistics."""
    h, norm = net.conv(x), net.norm
    weights = weights / weights.sum()
    number = 1 / (weights**2).sum()
    source_mean, source_var = norm.running_mean, norm.running_var
    ratios = torch.stack([((image - source_mean[:, None, None]) ** 2).mean((1, 2)) for image in h]) / (
        source_var + norm.eps
    )
    centre = sum(w * ratio for w, ratio in zip(weights, ratios, strict=True))
    noise = sum(w * (ratio - centre) ** 2 for w, ratio in zip(weights, ratios, strict=True)) / (number - 1)
    excess = ((centre - 1) ** 2).mean() / noise.mean()
    share = 1 / (1 + prior / number + 1 / excess)
    mean = sum(w * image.mean((1, 2)) for w, image in zip(weights, h, strict=True))
    square = sum(w * (image**2).mean((1, 2)) for w, image in zip(weights, h, strict=True))
    mean, var = (1 - share) * source_mean + share * mean, (1 - share) * source_var + share * (square - mean**2)
    out = F.batch_norm(h, mean, var, norm.weight, norm.bias, eps=norm.eps)
    return net.fc(out.relu().mean((2, 3))), mean, var


@pytest.fixture
def net(small_cnn):
    torch.manual_seed(0)
    model = small_cnn(6, 4).eval()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.2, 2)
    with torch.no_grad():  # predictions of several classes
        features = model.features(torch.rand(200, 3, 8, 8, generator=seeded(1)))
        model.fc.weight.mul_(20)
        model.fc.bias.copy_(-(model.fc.weight @ features.mean(0)))
    return model


@torch.no_grad()
def test_a_batch_and_a_pool_recomputed_plainly(net):
    first, second = torch.rand(2, 40, 3, 8, 8, generator=seeded())
    second = second * torch.linspace(0.2, 1, 40)[:, None, None, None]
    adapter = tta.adapt(net, "auto", posterior=False, memory_size=64)
    expected, _, _ = plain_logits(net, first, torch.ones(40), 8.0)
    torch.testing.assert_close(adapter(first), expected, rtol=1e-4, atol=1e-5)

    adapter.correlated.fill_(True)  # from here on by the pool
    adapter.credit.fill_(1000)
    guesses = net(second).argmax(1)  # no statistics are kept yet: by the source's
    held = adapter.memory.labels >= 0
    assert len(set(guesses.tolist())) > 1
    images = torch.cat((second, adapter.memory.samples[held]))
    classes = torch.cat((guesses, adapter.memory.labels[held]))
    looks = plain_looks(net.conv(images), net.norm)
    centre = looks[:40].mean(0)
    distances = ((looks - centre) ** 2).mean(1).sqrt()
    spread = distances[:40].mean() + 0.02
    weights = []
    for number, (distance, label) in enumerate(zip(distances, classes, strict=True)):
        alike = 1.0 if number < 40 else torch.exp(-(distance / spread - 1).clamp(min=0))
        weights.append(alike / ((classes == label).sum() + 0.5))
    expected, mean, var = plain_logits(net, images, torch.tensor(weights), 16.0)
    torch.testing.assert_close(adapter(second), expected[:40], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.model.norm.kept_mean, mean, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.model.norm.kept_var, var, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.look[:-1], centre, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_like_the_sources_keep_its_statistics_and_others_do_not(net):
    images = torch.rand(640, 3, 8, 8, generator=seeded())
    h = net.conv(images)
    net.norm.running_mean.copy_(h.mean((0, 2, 3)))
    net.norm.running_var.copy_(h.var((0, 2, 3), correction=0))

    def share(x):
        pool = pooled.Pool(torch.ones(len(x)), 8.0)
        adapter = tta.adapt(net, "auto")
        with pooled.pooling(adapter.model, pool):
            adapter.model(x)
        return float(pool.share)

    assert share(images[:64]) < 0.6
    assert share(images[:64] * 2) > 0.85
    assert share(images[:1] * 2) < 0.2  # a single image says little


@pytest.fixture(scope="module")
def digits():
    """Images and labels of a damaged domain, and the model that they are for."""
    stream = tta.stream("digits-c", corruptions=["impulse_noise"], samples=640, batch_size=640)
    batch = next(iter(stream))
    return tta.load_model("digits-cnn"), batch.images, batch.labels


def run(adapter, images, labels, batch):
    wrong, passes = [], Passes()
    passes.attach(adapter)
    for x, y in zip(images.split(batch), labels.split(batch), strict=True):
        wrong.append(adapter(x).argmax(1) != y)
    passes.detach()
    return 100 * float(torch.cat(wrong).float().mean()), passes.forwards / len(images)


def in_runs(labels):
    """Positions in an order in which labels come in runs of a random length about 20."""
    order, generator = [], seeded(5)
    left = {c: (labels == c).nonzero()[:, 0].tolist() for c in range(10)}
    while any(left.values()):
        c = int(torch.randint(10, (), generator=generator))
        take = int(torch.randint(10, 30, (), generator=generator))
        order += left[c][:take]
        left[c] = left[c][take:]
    return torch.tensor(order)


def test_each_regime_is_reached_and_pays(digits):
    model, images, labels = digits
    runs = in_runs(labels)
    blocks = torch.cat([part[torch.randperm(len(part), generator=seeded())] for part in runs.split(64)])
    errors = {}
    for name, order in (("random", torch.arange(len(labels))), ("runs", runs), ("shuffled", blocks)):
        adapter = tta.adapt(model, "auto")
        errors[name], forwards = run(adapter, images[order], labels[order], 64)
        found = adapter.labels_chain.read(adapter(images[order[:64]]))
        assert (bool(found.staying), bool(adapter.correlated)) == (name == "runs", name != "random")
        assert (forwards == 1) == (name == "random")
        raw, _ = run(tta.adapt(model, "auto", posterior=False), images[order], labels[order], 64)
        norm, _ = run(tta.adapt(model, "norm"), images[order], labels[order], 64)
        if name == "random":
            assert errors[name] == raw
        else:
            assert errors[name] < raw < norm - 5


@pytest.mark.parametrize("batch", [1, 10, 40, 64, 200])
@pytest.mark.parametrize("correlated", [False, True])
def test_it_costs_three_forwards_at_most(digits, batch, correlated):
    model, images, labels = digits
    order = in_runs(labels) if correlated else torch.arange(len(labels))
    adapter = tta.adapt(model, "auto")
    _, forwards = run(adapter, images[order], labels[order], batch)
    assert 1 <= forwards <= 3
    assert len(adapter.memory) > 32


def test_images_one_by_one_are_served_better_than_by_the_source():
    images = next(iter(tta.stream("digits-c", corruptions=["contrast"], samples=300, batch_size=300)))
    model = tta.load_model("digits-cnn")
    source, _ = run(tta.adapt(model, "source"), images.images, images.labels, 1)
    ours, _ = run(tta.adapt(model, "auto"), images.images, images.labels, 1)
    assert ours < source - 20


def test_a_model_without_batch_norm_is_the_source_with_the_chain(digits):
    _, images, labels = digits
    vit, runs = tta.load_model("digits-vit"), in_runs(labels)
    auto, chained = (tta.adapt(vit, name) for name in ("auto", "chain:source"))
    uneven = torch.cat([part[torch.randperm(len(part), generator=seeded())] for part in runs.split(64)])
    for order in (runs, uneven):
        for x in images[order].split(64):
            assert torch.equal(auto(x), chained(x))
        assert auto.labels_chain.read(vit(x)).uneven
    assert len(auto.memory) == 0


def test_an_image_of_another_size_is_refused_and_changes_nothing(cnn):
    adapter = tta.adapt(cnn, "auto")
    adapter(torch.rand(8, 3, 32, 32, generator=seeded()))
    before = adapter.state_dict()
    with pytest.raises(ValueError, match="memory holds images of shape"):
        adapter(torch.rand(8, 3, 40, 40, generator=seeded()))
    assert all(torch.equal(before[key], value) for key, value in adapter.state_dict().items())


@torch.no_grad()
def test_kept_statistics_stand_in_for_images_that_look_alike_only():
    known = torch.rand(64, 5, 6, 6, generator=seeded())
    looks = pooled.signature(known.mean((2, 3)), known.square().mean((2, 3)), torch.ones(5))
    seen = pooled.look(looks, torch.ones(64, dtype=torch.bool))
    assert pooled.familiarity(looks[:32], seen) == 1
    assert pooled.familiarity(looks + 1, seen) < 1e-3
    alike = pooled.resemblance(torch.cat((looks, looks + 1)), torch.arange(128) < 64)
    assert (alike[:64] == 1).all()
    assert alike[64:].max() < 1e-3


class Tokens(nn.Module):
    """A BatchNorm layer that is given the pixels of all images as rows, as LeViT's are."""

    def __init__(self, norm):
        super().__init__()
        self.norm = nn.BatchNorm1d(norm.num_features)
        self.norm.load_state_dict(norm.state_dict())

    def forward(self, h):
        tokens = h.flatten(2).transpose(1, 2)
        return self.norm(tokens.flatten(0, 1)).view_as(tokens).transpose(1, 2).view_as(h)


def test_rows_of_tokens_count_by_their_image(small_cnn):
    torch.manual_seed(0)
    model = small_cnn(6, 4).eval()
    second = nn.BatchNorm2d(6)
    second.running_var.uniform_(0.2, 2)
    map_of = nn.Sequential(model.conv, model.norm, nn.ReLU(), second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.fc)
    rows_of = copy.deepcopy(map_of)
    rows_of[3] = Tokens(second)
    x = torch.rand(8, 3, 8, 8, generator=seeded(2))
    found = [tta.adapt(net, "auto", guard=False)(x) for net in (map_of, rows_of)]
    assert torch.allclose(*found, atol=1e-5)
    assert not torch.allclose(found[0], map_of.eval()(x), atol=1e-2)


def test_rows_that_belong_to_no_image_are_refused(small_cnn):
    model = small_cnn(6, 4).eval()
    odd = nn.Sequential(model.conv, model.norm, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Unflatten(0, (1, -1)))

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.fc = odd, nn.BatchNorm1d(6), model.fc

        def forward(self, x):
            rows = self.first(x)[0]
            return self.fc(self.norm(torch.cat([rows, rows[:1]]))[: len(x)])

    with pytest.raises(ValueError, match=r"was given 9 rows for 8 images"):
        tta.adapt(Odd(), "auto", guard=False)(torch.rand(8, 3, 8, 8))
