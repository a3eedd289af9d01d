"""Auto: its statistics recomputed plainly, its regimes, what it costs, and models without BatchNorm."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta import norms, pooled
from tta.methods._doubt import Doubt
from tta.results.cost import Passes


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def plain_alike(h, norm):
    """Likeness of each two images, by the log deviations of their channels about the source's."""
    logs = []
    for image in h:
        rows = zip(image, norm.running_var + norm.eps, strict=True)
        logs.append(torch.stack([(channel.flatten().var(correction=0) / var).log() / 2 for channel, var in rows]))
    return torch.stack([torch.stack([torch.exp(-((a - b) ** 2).mean() / (2 * 0.7**2)) for b in logs]) for a in logs])


def plain_logits(net, x, weights, prior):
    """Logits by the statistics that each image's row of weights gives, and these statistics; an image after the other."""
    h, norm = net.conv(x), net.norm
    source_mean, source_var = norm.running_mean, norm.running_var
    scale = source_var + norm.eps
    shifts = torch.stack([(image - source_mean[:, None, None]).mean((1, 2)) / scale.sqrt() for image in h])
    ratios = torch.stack([((image - source_mean[:, None, None]) ** 2).mean((1, 2)) / scale for image in h])
    logits, means, variances = [], [], []
    for image, row in zip(h, weights, strict=True):
        row = row / row.sum()
        number = 1 / (row**2).sum()
        shift, ratio = (row[:, None] * shifts).sum(0), (row[:, None] * ratios).sum(0)
        moments, centre = torch.cat((shifts, ratios), 1), torch.cat((shift, ratio))
        chance = (row[:, None] * (moments - centre) ** 2).sum(0).mean() / (number - 1)
        distance = torch.cat((shift, ratio - 1)).square().mean()
        share = 1 / (1 + prior / number + 1 / (distance / chance - 1).clamp(min=1e-3))
        mean, var = shift * scale.sqrt(), (ratio - shift**2) * scale
        mean, var = source_mean + share * mean, (1 - share) * source_var + share * var
        out = F.batch_norm(image[None], mean, var, norm.weight, norm.bias, eps=norm.eps)
        logits.append(net.fc(out.relu().mean((2, 3)))[0])
        means.append(mean)
        variances.append(var)
    return torch.stack(logits), torch.stack(means), torch.stack(variances)


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
    second = second * torch.linspace(0.1, 1, 40)[:, None, None, None]
    adapter = tta.adapt(net, "auto", posterior=False, memory_size=64, guard=False)
    expected, _, _ = plain_logits(net, first, plain_alike(net.conv(first), net.norm), 8.0)
    torch.testing.assert_close(adapter(first), expected, rtol=1e-4, atol=1e-5)

    adapter.correlated.fill_(True)  # from here on by the pool
    adapter.credit.fill_(1000)
    guesses = net(second).argmax(1)  # no statistics are kept yet: by the source's
    held = adapter.memory.labels >= 0
    assert len(set(guesses.tolist())) > 1
    images = torch.cat((second, adapter.memory.samples[held]))
    classes = torch.cat((guesses, adapter.memory.labels[held]))
    near = plain_alike(net.conv(images), net.norm)
    assert near.min() < 0.3  # there are images that hardly count for others
    weights = near.clone()
    for image in range(len(images)):
        for other in range(len(images)):
            weights[image, other] /= near[image][classes == classes[other]].sum() + 0.5
    expected, mean, var = plain_logits(net, images, weights, 16.0)
    torch.testing.assert_close(adapter(second), expected[:40], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.model.norm.kept_mean, mean[:40].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapter.model.norm.kept_var, var[:40].mean(0), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_images_like_the_sources_keep_its_statistics_and_others_do_not(net):
    images = torch.rand(640, 3, 8, 8, generator=seeded())
    h = net.conv(images)
    net.norm.running_mean.copy_(h.mean((0, 2, 3)))
    net.norm.running_var.copy_(h.var((0, 2, 3), correction=0))

    def share(x):
        centred = net.conv(x) - net.norm.running_mean[:, None, None]
        moments = centred.mean((2, 3)), centred.square().mean((2, 3)), net.norm.running_var + net.norm.eps
        pool = pooled.Pool(lambda looks: torch.ones(len(looks), len(looks)), 8.0)
        pool.begin(*moments)
        return float(pool.statistics(*moments)[2].mean())

    assert share(images[:64]) < 0.5
    assert share(images[:64] * 2) > 0.85
    assert share(images[:1] * 2) < 0.2  # a single image says little


@torch.no_grad()
def test_two_domains_in_one_batch_are_served_as_if_each_came_alone(net):
    dark, bright = torch.rand(2, 32, 3, 8, 8, generator=seeded())
    dark = dark * 0.02
    model = copy.deepcopy(net)
    norms.blend_statistics(model, 1.0, pooled.PooledBatchNorm)

    def logits(x):
        with pooled.pooling(model, pooled.Pool(pooled.alike, 8.0)):
            return model(x)

    alone = torch.cat((logits(dark), logits(bright)))
    torch.testing.assert_close(logits(torch.cat((dark, bright))), alone, rtol=1e-3, atol=1e-4)
    by_all = tta.adapt(net, "norm")(torch.cat((dark, bright)))
    assert (by_all - alone).abs().max() > 0.1


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
        assert (forwards < 1.3) == (name == "random")
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
    near = pooled.alike(torch.cat((looks, looks + 1)))
    assert (near.diagonal() == 1).all()
    # an image whose channels all vary e times as much lies one log standard deviation away
    torch.testing.assert_close(near[:64, 64:].diagonal(), torch.full((64,), math.exp(-1 / (2 * 0.7**2))))


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


class ActivatedBatchNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_activation_inside_a_layer_stays(net, layout):
    x = torch.rand(20, 3, 8, 8, generator=seeded(2)).to(memory_format=layout)
    activated = copy.deepcopy(net)
    activated.norm.__class__ = ActivatedBatchNorm
    for adapted in (net, activated):
        adapted.norm.bias.data.uniform_(-0.5, 0.5, generator=seeded(3))
    values, rectified = (pooled.PooledBatchNorm(adapted.norm, 1.0) for adapted in (net, activated))
    h = net.conv(x)
    for layer in (values, rectified):
        layer.pool = pooled.Pool(pooled.alike, 8.0)
    found = values(h)
    assert (found < -0.1).any()
    torch.testing.assert_close(rectified(h), found.relu(), rtol=1e-4, atol=1e-5)


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


def predictions(sure, classes, right, seed):
    """Logits of images that get their own class with the share ``right``, else class 0, with the probability ``sure``."""
    labels = torch.arange(64) % classes
    answered = torch.where(torch.rand(64, generator=seeded(seed)) < right, labels, 0)
    rest = math.log((1 - sure) / (classes - 1))
    return torch.where(F.one_hot(answered, classes) > 0, math.log(sure), rest)


def test_doubt_is_raised_by_loss_of_information_not_by_being_unsure_alone():
    classes = 20
    clear, collapsed = predictions(0.8, classes, 1, 0), predictions(0.999, classes, 0, 1)
    unsure = predictions(0.5, classes, 1, 2)
    for adapted, source, raised in ((clear, collapsed, False), (collapsed, clear, True), (unsure, clear, True)):
        doubt = Doubt()
        assert doubt.due()
        assert not doubt.raised()
        doubt.compare(adapted, source)
        assert doubt.raised() == raised
        assert doubt.due() == raised
    both = torch.stack((unsure, clear)).softmax(-1)
    plain = [
        -(p.mean(0) * p.mean(0).log()).sum()
        + (p * p.log()).sum(1).mean()  # entropy of the mean, minus the mean entropy
        for p in both
    ]
    torch.testing.assert_close(doubt.information, torch.stack(plain))


def test_doubt_compares_one_batch_in_eight_and_forgets():
    doubt, clear, collapsed = Doubt(), predictions(0.8, 20, 1, 0), predictions(0.999, 20, 0, 1)
    doubt.compare(clear, clear)
    for _ in range(7):
        assert not doubt.due()
        doubt.skip()
    assert doubt.due()
    doubt.compare(collapsed, clear)
    assert doubt.raised()
    for _ in range(6):
        doubt.compare(clear, clear)
    assert not doubt.raised()
    before = doubt.state_dict()
    doubt.compare(torch.full_like(clear, torch.nan), clear)
    assert all(torch.equal(before[name], value) for name, value in doubt.state_dict().items() if name != "batches")


def test_comparisons_of_a_long_random_stream_leave_credit_for_pools(digits):
    model, images, labels = digits
    adapter = tta.adapt(model, "auto", guard=False)
    for _ in range(4):
        run(adapter, images, labels, 64)
    assert adapter.credit >= 0
    runs = in_runs(labels)
    _, forwards = run(adapter, images[runs], labels[runs], 64)
    assert forwards > 2


def test_an_adapter_in_doubt_answers_by_both(digits):
    model, images, _ = digits
    adapter = tta.adapt(model, "auto", guard=False)
    adapter.doubt.compare(torch.zeros(64, 10), predictions(0.9, 10, 1, 0))
    assert adapter.doubt.raised()
    plain = tta.adapt(model, "auto", guard=False)
    plain.doubt.batches.zero_()  # not due
    x = images[:64]
    with torch.no_grad():
        expected = (plain(x).log_softmax(1) + model(x).log_softmax(1)) / 2
        assert not plain.doubt.raised()
        torch.testing.assert_close(adapter.predict(x), expected)
        adapter.doubt.compare(torch.zeros(64, 10), predictions(0.9, 10, 1, 0))
        torch.testing.assert_close(adapter(x), expected)
