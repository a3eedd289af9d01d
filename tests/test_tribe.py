"""TRIBE: balanced statistics and one update recomputed plainly; what the three networks share, and models without BatchNorm."""

import copy
import math

import pytest
import torch
from torch import nn

import tta
from tta import ema, norms
from tta.methods.tribe import BalancedBatchNorm, balanced

CLASSES = 4


@pytest.fixture
def model(small_cnn, images):
    """It predicts all classes: its logits are centred over the images."""
    torch.manual_seed(0)
    model = small_cnn(6, CLASSES).eval()
    model.norm.running_mean.uniform_(-0.5, 0.5)
    model.norm.running_var.uniform_(0.02, 0.1)
    model.fc.weight.data *= 5
    with torch.no_grad():
        model.fc.bias -= model(images).mean(0)
        assert model(images).argmax(1).bincount(minlength=CLASSES).min() > 2
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(40, 3, 8, 8, generator=generator) * torch.rand(40, 3, 1, 1, generator=generator)


class Balanced:
    """The statistics of one layer, class by class, sample by sample."""

    def __init__(self, mean, var, eta, gamma):
        self.mean, self.var = [mean.clone()] * CLASSES, [var.clone()] * CLASSES
        self.eta, self.gamma = eta, gamma
        self.total = (mean.clone(), var.clone())

    def take_in(self, x, labels):
        """Mean and variance of the mixture of classes, with gradients, after taking in x (batch, channels, ...)."""
        shifts, gaps, gone = {}, {}, {}
        for k in sorted(set(labels.tolist())):
            members = [row for row, label in zip(x, labels.tolist(), strict=True) if label == k]
            weight = min(self.eta, 1 / len(members))
            away = [row.flatten(1) - self.mean[k][:, None] for row in members]
            shifts[k] = weight * sum(row.mean(1) for row in away)
            gaps[k] = weight * sum((row**2).mean(1) for row in away) - shifts[k] ** 2
            gone[k] = weight * len(members)
        own, every, met = 1 - self.gamma, self.gamma, len(shifts)
        mean = [m + own * shifts.get(k, 0) + every * sum(shifts.values()) / met for k, m in enumerate(self.mean)]
        var = [v + own * (gaps[k] - gone[k] * v) if k in gaps else v for k, v in enumerate(self.var)]
        var = [v + every * (sum(gaps.values()) / met - sum(gone.values()) / met * v) for v in var]
        center = sum(mean) / CLASSES
        spread = sum(var) / CLASSES + sum((m - center) ** 2 for m in mean) / (CLASSES - 1)
        self.mean, self.var = [m.detach() for m in mean], [v.detach() for v in var]
        self.total = (center.detach(), spread.detach())
        return center, spread


def normalised(x, statistics, affine):
    scale, shift, mean, var = (value.view(1, -1, *[1] * (x.dim() - 2)) for value in (*affine, *statistics))
    return (x - mean) / (var + 1e-5).sqrt() * scale + shift


def plain_tribe(model, images, *, batch, eta, gamma, h0, lambda_, lr, view):
    """The released algorithm. Yields logits before each update; at last the weights and the statistics."""
    layer = model.norm
    start = [layer.weight.detach().clone(), layer.bias.detach().clone()]
    affine = start
    student, teacher, anchor = (Balanced(layer.running_mean, layer.running_var, eta, gamma) for _ in range(3))

    def logits(x, statistics, affine, labels=None):
        x = model.conv(x)
        taken = statistics.total if labels is None else statistics.take_in(x, labels)
        return model.fc(normalised(x, taken, affine).relu().mean((2, 3)))

    for x in images.split(batch):
        before = logits(x, teacher, affine).detach()
        labels = before.argmax(1)
        affine = [p.requires_grad_() for p in affine]
        taught, learned = logits(x, teacher, affine, labels), logits(view(x), student, affine, labels)
        anchored = logits(x, anchor, start, labels).detach()
        entropies = -(taught.softmax(1) * taught.log_softmax(1)).sum(1)
        sure = (entropies < h0 * math.log(CLASSES)).nonzero()[:, 0].tolist()
        terms = [
            -learned[i].log_softmax(0)[taught[i].argmax()] + lambda_ * ((taught[i] - anchored[i]) ** 2).mean()
            for i in sure
        ]
        assert sure
        gradients = torch.autograd.grad(sum(terms) / len(terms), affine)
        affine = [(p - lr * g).detach() for p, g in zip(affine, gradients, strict=True)]
        yield before, affine, (student, teacher, anchor)


@pytest.mark.parametrize(("eta", "gamma"), [(0.05, 0.0), (0.4, 0.3)])
def test_recomputed_plainly(model, images, eta, gamma):
    view = lambda x: x.roll(1, 1)  # noqa: E731  # other colours: the student answers otherwise
    settings = {"eta": eta, "gamma": gamma, "h0": 0.6, "lambda_": 0.1, "lr": 1.0}
    adapter = tta.adapt(model, "tribe", optimizer="sgd", momentum=0.0, augment=view, **settings)
    steps = list(plain_tribe(model, images, batch=10, view=view, **settings))
    ours = torch.cat([adapter(x) for x in images.split(10)])
    torch.testing.assert_close(ours, torch.cat([logits for logits, *_ in steps]), atol=1e-4, rtol=1e-4)
    _, affine, statistics = steps[-1]
    layers = [network.norm for network in (adapter.model, adapter.teacher, adapter.anchor)]
    torch.testing.assert_close([layers[0].layer.weight, layers[0].layer.bias], affine, atol=1e-5, rtol=1e-4)
    assert (affine[0] - model.norm.weight).abs().max() > 0.01
    for layer, plain in zip(layers, statistics, strict=True):
        torch.testing.assert_close(layer.class_mean, torch.stack(plain.mean), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(layer.class_var, torch.stack(plain.var), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(
            (layer.layer.running_mean, layer.layer.running_var), plain.total, atol=1e-5, rtol=1e-4
        )


@pytest.mark.parametrize("shape", [(16, 6, 5, 5), (16, 6)])
def test_balanced_batch_norm_recomputed(shape):
    """Values and gradients, for maps and vectors."""
    torch.manual_seed(0)
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer.weight)
    plain = Balanced(layer.running_mean, layer.running_var, 0.2, 0.4)
    ours = BalancedBatchNorm(copy.deepcopy(layer), 0.2, 0.4)
    x, weights = torch.randn(shape, requires_grad=True), torch.randn(shape)
    torch.testing.assert_close(ours(x), layer.eval()(x))  # no labels: stored statistics
    labels = torch.tensor([0] * 9 + [1] * 4 + [3] * 3)
    with balanced(ours, labels, CLASSES, when=torch.tensor(True)):
        found = ours(x)
    expected = normalised(x, plain.take_in(x[..., None], labels), [layer.weight, layer.bias])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    gradients = [torch.autograd.grad((y * weights).sum(), x)[0] for y in (found, expected)]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-4)


def test_a_frequent_class_weighs_as_much_as_a_rare_one():
    """After many batches of 90 % one class the statistics are those of equal shares, which batch statistics are not."""
    torch.manual_seed(0)
    layer = BalancedBatchNorm(nn.BatchNorm1d(1), 0.05, 0.0)
    labels = torch.tensor([0] * 18 + [1] * 2)
    for _ in range(200):
        x = torch.randn(20, 1) + 10.0 * labels[:, None]
        with balanced(layer, labels, 2, when=torch.tensor(True)):
            layer(x)
    assert layer.layer.running_mean.item() == pytest.approx(5, abs=0.3)  # of all samples it is 1
    assert layer.class_mean[:, 0].tolist() == pytest.approx([0, 10], abs=0.5)


def test_eta_follows_the_number_of_classes():
    layer = BalancedBatchNorm(nn.BatchNorm1d(3), None, 0.0)
    with balanced(layer, torch.tensor([5]), 100, when=torch.tensor(True)):
        layer(torch.full((1, 3), 2.0))
    torch.testing.assert_close(layer.class_mean[5], torch.full((3,), 0.05 * 2))  # 0.0005 x 100


def weights(network):
    return dict(network.named_parameters())


def test_student_and_teacher_share_weights_through_everything(model, images):
    adapter = tta.adapt(model, "tribe", h0=1.0, augment="none", lr=0.1)
    first = adapter.state_dict()
    adapter(images)
    duplicate = copy.deepcopy(adapter)
    loaded = tta.adapt(model, "tribe", h0=1.0, augment="none", lr=0.1)
    loaded.load_state_dict(adapter.state_dict())
    adapter.reset()
    assert all(torch.equal(adapter.state_dict()[key], value) for key, value in first.items())
    for one in (adapter, duplicate, loaded):
        one(images)
        mine, theirs, source = weights(one.model), weights(one.teacher), weights(one.anchor)
        assert all(mine[name] is theirs[name] for name in mine)
        assert all(torch.equal(source[f"norm.layer.{n}"], getattr(model.norm, n)) for n in ("weight", "bias"))
        assert not torch.equal(mine["norm.layer.weight"], source["norm.layer.weight"])


def test_sharing_copy_has_buffers_of_its_own(model):
    copied = ema.sharing_copy(model)
    copied.norm.running_mean.add_(1)
    assert copied.norm.weight is model.norm.weight
    assert not torch.equal(copied.norm.running_mean, model.norm.running_mean)


def test_batch_without_a_sure_sample_moves_by_moments_alone(model, images):
    """As in the released code: statistics move; weights only where there are moments."""
    adapter = tta.adapt(model, "tribe", h0=1e-9, augment="none", lr=0.1)
    before = adapter.model.norm.layer.weight.clone()
    adapter(images)
    assert torch.equal(adapter.model.norm.layer.weight, before)
    assert not torch.equal(adapter.teacher.norm.layer.running_mean, model.norm.running_mean)


def test_single_images_are_served_and_learned_from(model, images):
    adapter = tta.adapt(model, "tribe", h0=1.0, augment="none", lr=0.1)
    assert torch.cat([adapter(image[None]) for image in images[:8]]).isfinite().all()
    assert not torch.equal(adapter.model.norm.layer.weight, model.norm.weight)


def test_export_holds_the_teacher(model, images):
    adapter = tta.adapt(model, "tribe", h0=1.0, augment="none", lr=0.1)
    adapter(images)
    plain = adapter.export()
    assert type(plain.norm) is nn.BatchNorm2d
    with torch.no_grad(), adapter.paused():
        torch.testing.assert_close(plain(images), adapter(images), atol=1e-5, rtol=1e-5)


def test_layers_stay_as_they_were_after_a_batch(model, images):
    adapter = tta.adapt(model, "tribe", augment="none")
    adapter(images)
    layers = [m for m in adapter.modules() if isinstance(m, norms.BlendedBatchNorm)]
    assert len(layers) == 3
    assert all(layer.labels is None and not layer.remember for layer in layers)


def test_vit_is_refused_with_what_was_looked_for(vit):
    with pytest.raises(ValueError, match=r"looked for: BatchNorm. It has LayerNorm"):
        tta.adapt(vit, "tribe")


def test_model_with_one_logit_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, 1))
    with pytest.raises(ValueError, match="single logit"):
        tta.adapt(model, "tribe")(torch.rand(2, 3, 8, 8))


class TwoFrames(nn.Module):
    """Takes the halves of each image as images of their own and averages their logits."""

    def __init__(self):
        super().__init__()
        self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(96, 3)

    def forward(self, x):
        halves = self.norm(torch.cat(x.chunk(2, dim=2)))
        return self.head(halves.flatten(1)).unflatten(0, (2, -1)).mean(0)


def test_model_that_folds_parts_into_the_batch_is_refused():
    """A part has no predicted class."""
    with pytest.raises(ValueError, match="sees 4 rows for 2 images"):
        tta.adapt(TwoFrames(), "tribe")(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"eta": 0.0}, "eta=0.0"),
        ({"gamma": 1.5}, "gamma=1.5"),
        ({"h0": 0.0}, "h0=0.0"),
        ({"lambda_": -1.0}, "lambda_=-1.0"),
        ({"augment": "auto"}, "'auto'"),
    ],
)
def test_wrong_values_are_named(model, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, "tribe", **hparams)
