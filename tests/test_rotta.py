"""RoTTA: layer, memory, student, teacher and statistics recomputed plainly; batches and updates."""

import copy
import math

import pytest
import timm
import torch
from torch import nn

import tta
from tta import norms

CLASSES = 4


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, eps=1e-3), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 16, CLASSES),
    ).eval()  # fmt: skip
    for layer in (model[1], model[4]):
        layer.running_mean.uniform_(-0.5, 0.5)
        layer.running_var.uniform_(0.2, 1)
    return model


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(1)
    return torch.rand(60, 3, 8, 8, generator=generator) * torch.rand(60, 1, 1, 1, generator=generator)


class Plain:
    """A network whose BatchNorm parameters and statistics are lists, so that every formula is seen."""

    def __init__(self, model, alpha):
        self.model, self.alpha = model, alpha
        layers = [model[1], model[4]]
        self.affine = [p.detach().clone() for layer in layers for p in (layer.weight, layer.bias)]
        self.statistics = [[layer.running_mean.clone(), layer.running_var.clone()] for layer in layers]
        self.eps = [layer.eps for layer in layers]

    def norm(self, x, i, learn):
        mean, var = self.statistics[i]
        if learn:
            center = x.mean((0, 2, 3))
            spread = ((x - center.view(1, -1, 1, 1)) ** 2).mean((0, 2, 3))
            mean, var = (1 - self.alpha) * mean + self.alpha * center, (1 - self.alpha) * var + self.alpha * spread
            self.statistics[i] = [mean.detach(), var.detach()]
        mean, std = mean.view(1, -1, 1, 1), (var + self.eps[i]).sqrt().view(1, -1, 1, 1)
        return (x - mean) / std * self.affine[2 * i].view(1, -1, 1, 1) + self.affine[2 * i + 1].view(1, -1, 1, 1)

    def __call__(self, x, learn=False):
        m = self.model
        x = self.norm(m[0](x), 0, learn).relu()
        return m[7](self.norm(m[3](x), 1, learn).relu().flatten(1))


def plain_rotta(model, images, memory, *, capacity, every, nu, alpha, lr, momentum, view):
    """The published algorithm, image by image. Yields each prediction, made one at a time, and the two networks."""
    student, teacher = Plain(model, alpha), Plain(model, alpha)
    velocity = [torch.zeros_like(p) for p in student.affine]
    for number, image in enumerate(images, start=1):
        logits = teacher(image[None]).detach()
        p = logits[0].softmax(0)
        memory.add(image, int(p.argmax()), float(-(p * (p + 1e-6).log()).sum()))
        yield logits, student, teacher, memory
        if number % every == 0:
            samples, ages = memory.contents()
            samples = torch.stack(samples)
            targets = teacher(samples, learn=True).detach()
            student.affine = [p.requires_grad_() for p in student.affine]
            outputs = student(view(samples), learn=True)
            loss = 0.0
            for target, output, age in zip(targets, outputs, ages, strict=True):
                weight = math.exp(-age / capacity) / (1 + math.exp(-age / capacity))
                loss = loss - weight * (target.softmax(0) * output.log_softmax(0)).sum() / len(ages)
            gradients = torch.autograd.grad(loss, student.affine)
            student.affine = [p.detach() for p in student.affine]
            for i, (p, g, v) in enumerate(zip(student.affine, gradients, velocity, strict=True)):
                v.mul_(momentum).add_(g)
                student.affine[i] = p - lr * v
            teacher.affine = [(1 - nu) * t + nu * s for t, s in zip(teacher.affine, student.affine, strict=True)]


def affine(network):
    return [p for index in (1, 4) for p in (network[index].layer.weight, network[index].layer.bias)]


def statistics(network):
    return [[network[index].layer.running_mean, network[index].layer.running_var] for index in (1, 4)]


@pytest.mark.parametrize(
    ("capacity", "every", "batch", "nu"),
    [(8, 5, 1, 0.5), (8, 5, 5, 0.5), (16, 10, 5, 0.5), (6, 20, 10, 0.001), (64, 10, 10, 0.5)],
)
def test_recomputed_plainly(plain_memory, model, images, capacity, every, batch, nu):
    """A student that ascends, a teacher that stands still or weights that ignore ages would all be seen."""
    shared = {"nu": nu, "alpha": 0.2, "lr": 0.5, "momentum": 0.9}
    view = lambda x: x.flip(3) * 0.8  # noqa: E731
    adapter = tta.adapt(
        model, "rotta", memory_size=capacity, update_frequency=every, optimizer="sgd", augment=view, **shared
    )
    steps = plain_rotta(
        model, images, plain_memory(capacity, CLASSES, 1.0, 1.0), capacity=capacity, every=every, view=view, **shared
    )
    for x in images.split(batch):
        logits = adapter(x)
        seen = [next(steps) for _ in x]
        torch.testing.assert_close(logits, torch.cat([row for row, *_ in seen]), atol=1e-4, rtol=1e-4)
    next(steps, None)  # the last update
    _, student, teacher, memory = seen[-1]
    for ours, theirs in ((adapter.model, student), (adapter.teacher, teacher)):
        torch.testing.assert_close(affine(ours), theirs.affine, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(statistics(ours), theirs.statistics, atol=1e-4, rtol=1e-4)
        moved = max(
            float((a - p.affine[i]).abs().max()) for p in [Plain(model, 0)] for i, a in enumerate(theirs.affine)
        )
        assert moved > (0.01 if nu == 0.5 else 1e-6)
    samples, ages = adapter.memory.contents()
    expected, expected_ages = memory.contents()
    assert torch.equal(samples, torch.stack(expected))
    assert ages.tolist() == expected_ages
    assert len(set(expected_ages)) > 1


def test_batch_beyond_the_update_frequency_is_predicted_whole_first(model, images):
    settings = {"update_frequency": 10, "augment": "none", "lr": 0.05, "nu": 0.5, "alpha": 0.5}
    whole, cut = tta.adapt(model, "rotta", **settings), tta.adapt(model, "rotta", **settings)
    first = whole(images[:40])
    torch.testing.assert_close(first, model(images[:40]).detach())
    expected = torch.cat([cut(x) for x in images[:40].split(10)])
    assert torch.equal(first[:10], expected[:10])
    assert not torch.allclose(first[10:], expected[10:], atol=1e-3)
    assert int(whole.memory.offered) == 40


def test_updates_come_every_so_many_samples_not_batches(model, images):
    adapter, updates = tta.adapt(model, "rotta", update_frequency=16, augment="none"), []
    adapter._learn = lambda: updates.append(int(adapter.memory.offered))
    for x in images.split(7):
        adapter(x)
    assert updates == [16, 32, 48]


def test_predict_moves_no_statistics(model, images):
    adapter = tta.adapt(model, "rotta", update_frequency=10, alpha=0.5)
    adapter(images[:10])
    before = copy.deepcopy(statistics(adapter.teacher))
    with torch.no_grad():
        alone = torch.cat([adapter.predict(image[None]) for image in images[:8]])
        torch.testing.assert_close(adapter.predict(images[:8]), alone, atol=1e-5, rtol=1e-5)
    assert all(
        torch.equal(a, b)
        for one, two in zip(before, statistics(adapter.teacher), strict=True)
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("shape", [(16, 6, 5, 5), (16, 6)])
def test_robust_batch_norm_recomputed(shape):
    """Values, stored statistics and gradients; the batch's share carries gradient, the stored one none."""
    torch.manual_seed(0)
    layer = (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(6, eps=1e-2)
    layer.running_mean.uniform_(-1, 1)
    layer.running_var.uniform_(0.5, 2)
    nn.init.uniform_(layer.weight)
    robust = norms.RobustBatchNorm(copy.deepcopy(layer), 0.3)
    x = torch.randn(shape, requires_grad=True)
    torch.testing.assert_close(robust(x), layer.eval()(x))  # not remembering: stored statistics
    dims, view = [d for d in range(len(shape)) if d != 1], [1, -1, *[1] * (len(shape) - 2)]
    mean = 0.7 * layer.running_mean + 0.3 * x.mean(dims)
    var = 0.7 * layer.running_var + 0.3 * ((x - x.mean(dims, keepdim=True)) ** 2).mean(dims)
    expected = (x - mean.view(view)) / (var.view(view) + 1e-2).sqrt() * layer.weight.view(view)
    with norms.remembering(robust):
        y = robust(x)
    torch.testing.assert_close(y, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(robust.layer.running_mean, mean.detach())
    torch.testing.assert_close(robust.layer.running_var, var.detach())
    weights = torch.randn(shape)
    ours = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(ours, torch.autograd.grad((expected * weights).sum(), x), atol=1e-5, rtol=1e-4)


def test_layers_that_normalise_and_activate_work():
    """timm's BatchNormAct2d applies its activation after the affine map, in either state of the layer."""
    model = timm.create_model("efficientnet_lite0", num_classes=5)
    adapter = tta.adapt(model, "rotta", update_frequency=4, memory_size=4, alpha=0.0, augment="none")
    x = torch.rand(4, 3, 32, 32)
    with torch.no_grad(), norms.remembering(adapter.model):  # alpha 0: the statistics are the source's
        torch.testing.assert_close(adapter.model(x), model.eval()(x), atol=1e-4, rtol=1e-3)
    assert adapter(x).isfinite().all()


def test_statistics_stay_float32_under_autocast(model, images):
    adapter = tta.adapt(model, "rotta", update_frequency=10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        adapter(images[:10])
    for mean, var in statistics(adapter.teacher) + statistics(adapter.model):
        assert mean.dtype == var.dtype == torch.float32
    assert adapter.memory.samples.dtype == torch.float32


def test_bad_batch_on_a_gpu_does_not_enter_the_memory(model, images):
    """The deferred path, on the CPU: the flag of the input is set to not finite."""
    adapter = tta.adapt(model, "rotta", update_frequency=10)
    adapter(images[:10])
    before = adapter.state_dict()
    adapter._input_is_finite = torch.tensor(False)
    adapter.adapt(images[10:20])
    after = adapter.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_vit_is_refused_with_what_was_looked_for(vit):
    with pytest.raises(ValueError, match=r"looked for: BatchNorm. It has LayerNorm"):
        tta.adapt(vit, "rotta")


def test_model_without_source_statistics_is_refused():
    with pytest.raises(ValueError, match="no running statistics"):
        tta.adapt(nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False)), "rotta")


def test_model_with_one_logit_is_refused():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(3 * 64, 1))
    with pytest.raises(ValueError, match="single logit"):
        tta.adapt(model, "rotta")(torch.rand(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"memory_size": 0}, "memory_size=0"),
        ({"update_frequency": 0}, "update_frequency=0"),
        ({"nu": 1.5}, "nu=1.5"),
        ({"alpha": -0.1}, "alpha=-0.1"),
        ({"augment": "auto"}, "'auto'"),
    ],
)
def test_wrong_values_are_named(model, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, "rotta", **hparams)
