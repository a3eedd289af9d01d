"""CoTTA: whole steps recomputed plainly, the restored weights, and who decides about views."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta

VIEWS = 3


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)
    ).eval()
    model[1].running_mean.uniform_(-1, 1)  # must play no part
    return model


@pytest.fixture
def batches():
    return torch.rand(6, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


class Views:
    """Views that differ: the n-th call of all rolls by n pixels."""

    def __init__(self):
        self.calls = 0

    def __call__(self, x):
        self.calls += 1
        return x.roll(self.calls, 3)


def forward(weights, x):
    conv, scale, shift, fc, fc_bias = weights
    x = F.conv2d(x, conv)
    x = (x - x.mean((0, 2, 3), keepdim=True)) / (x.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
    x = x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
    return x.relu().flatten(1) @ fc.T + fc_bias


@pytest.mark.parametrize("symmetric", [False, True])
def test_recomputed_plainly(model, batches, symmetric):
    """Six batches; which weights returned to the source is read off the adapter, everything else is recomputed."""
    alpha, lr, ap = 0.8, 0.01, 0.2925
    settings = {"mt_alpha": alpha, "lr": lr, "ap": ap, "views": VIEWS, "rst_m": 0.25, "symmetric": symmetric}
    adapter, views = tta.adapt(model, "cotta", augment=Views(), **settings), Views()
    source = [p.detach().clone() for p in model.parameters()]
    student, teacher = ([p.clone() for p in source] for _ in range(2))
    moments = [[torch.zeros_like(p), torch.zeros_like(p)] for p in source]
    averaged = returned = total = 0
    # First a batch with views: without, teacher equals student, the gradient is rounding, and Adam follows its sign.
    for step, x in enumerate(batches[[1, 0, 2, 3, 4, 5]], start=1):
        logits = adapter(x)
        student = [p.requires_grad_() for p in student]
        predicted = forward(student, x)
        target = forward(teacher, x)
        if forward(source, x).softmax(1).max(1).values.mean() < ap:
            averaged += 1
            target = sum(forward(teacher, views(x)) for _ in range(VIEWS)) / VIEWS
        torch.testing.assert_close(logits, target, atol=1e-4, rtol=1e-4)
        loss = -(target.softmax(1) * predicted.log_softmax(1)).sum(1).mean()
        if symmetric:
            loss = 0.5 * loss - 0.5 * (predicted.softmax(1) * target.log_softmax(1)).sum(1).mean()
        gradients = torch.autograd.grad(loss, student)
        student = [p.detach() for p in student]
        for index, (p, g, (first, second)) in enumerate(zip(student, gradients, moments, strict=True)):
            first.mul_(0.9).add_(0.1 * g)
            second.mul_(0.999).add_(0.001 * g * g)
            stepped = p - lr * (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
            teacher[index] = alpha * teacher[index] + (1 - alpha) * stepped  # before the restoring
            ours = list(adapter.model.parameters())[index].detach()
            back = ours == source[index]
            returned, total = returned + int(back.sum()), total + back.numel()
            student[index] = torch.where(back, source[index], stepped)
            torch.testing.assert_close(ours, student[index], atol=1e-4, rtol=1e-3)
            averages = list(adapter.teacher.parameters())
            torch.testing.assert_close(averages[index], teacher[index], atol=1e-4, rtol=1e-3)
    assert 0 < averaged < len(batches)
    assert returned / total == pytest.approx(0.25, abs=0.03)


def test_restored_entries_are_drawn_anew_one_by_one(model, batches):
    adapter = tta.adapt(model, "cotta", lr=0.01, rst_m=0.5, augment="none")
    masks = []
    for x in batches[:3]:
        adapter(x)
        masks.append(adapter.model[4].weight == model[4].weight)
    # 4 standard deviations of 1080 draws. More weights than those drawn may be the source's: with the kernels for SSE4.1,
    # which draw the same, 34 more are so after the first step (0.554, elsewhere 0.522).
    tolerance = 4 * 0.5 / masks[0].numel() ** 0.5
    for mask in masks:
        assert mask.float().mean() == pytest.approx(0.5, abs=tolerance)
        assert mask.float().mean(1).min() > 0  # within every row
    assert (masks[0] == masks[1]).float().mean() == pytest.approx(0.5, abs=tolerance)


@pytest.mark.parametrize("rst_m", [0.0, 1.0])
def test_restoring_none_or_all(model, batches, rst_m):
    adapter = tta.adapt(model, "cotta", lr=0.01, mt_alpha=0.5, rst_m=rst_m, augment="none")
    for x in batches[:2]:
        adapter(x)
    same = [torch.equal(a, b) for a, b in zip(adapter.model.parameters(), model.parameters(), strict=True)]
    assert all(same) if rst_m else not any(same)
    assert not torch.equal(adapter.teacher[4].weight, model[4].weight)  # never restored itself


@pytest.mark.parametrize("ap", [0.2, 1.0])
def test_the_anchor_decides_about_views(model, batches, ap):
    """The confidence is that of the source weights: neither sure nor unsure teachers and students change it."""
    views = Views()
    adapter = tta.adapt(model, "cotta", lr=1e-6, ap=0.5, views=2, augment=views)
    with torch.no_grad():
        confidence = adapter.predict(batches[0]).softmax(1).amax(1).mean()
        adapter.config.ap = float(confidence) + (0.01 if ap == 1.0 else -0.01)
        for network in (adapter.teacher, adapter.model):
            network[4].weight.mul_(100 if ap == 1.0 else 0)
    adapter(batches[0])
    assert views.calls == (2 if ap == 1.0 else 0)


def test_anchor_uses_the_batch_and_not_the_source_statistics(model, batches):
    adapter = tta.adapt(model, "cotta", ap=0.0)
    anchor = forward([p.detach() for p in model.parameters()], batches[0]).softmax(1).amax(1).mean()
    stored = model(batches[0]).softmax(1).amax(1).mean()
    assert abs(anchor - stored) > 2e-3
    for offset, uncertain in ((1e-4, True), (-1e-4, False)):
        adapter.config.ap = float(anchor) + offset
        with torch.no_grad():
            assert adapter._is_uncertain(batches[0]) is uncertain


@pytest.mark.parametrize("at_once", [2, 3, 8])
def test_views_at_once_changes_no_logits(cnn, golden_images, at_once):
    settings = {"ap": 1.0, "views": 5, "rst_m": 0.0, "optimizer": "sgd", "lr": 0.01}
    one = tta.adapt(cnn, "cotta", **settings)
    many = tta.adapt(cnn, "cotta", views_at_once=at_once, **settings)
    for x in golden_images[:96].split(32):
        torch.testing.assert_close(many(x), one(x), atol=1e-3, rtol=1e-3)


def test_views_at_once_on_a_vit(vit, golden_images):
    one, many = (tta.adapt(vit, "cotta", ap=1.0, views=4, views_at_once=n) for n in (1, 4))
    torch.testing.assert_close(many(golden_images[:8]), one(golden_images[:8]), atol=1e-4, rtol=1e-4)
    assert not any(torch.equal(one.model.cls_token, p) for p in one.parameters_to_adapt() if p.shape == (1, 1, 64))


def test_no_views_without_augmentation(model, batches):
    none = tta.adapt(model, "cotta", augment="none", ap=1.0, rst_m=0.0)
    never = tta.adapt(model, "cotta", augment="paper", ap=0.0, rst_m=0.0)
    for x in batches:
        assert torch.equal(none(x), never(x))


def test_skipped_step_teaches_neither_student_nor_teacher(model, batches):
    adapter = tta.adapt(model, "cotta", lr=0.01, mt_alpha=0.5, rst_m=0.5, augment="none")
    adapter(batches[0])
    before = copy.deepcopy(adapter.state_dict())
    adapter.model[4].weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.warns(RuntimeWarning, match="skipped"):
        adapter(batches[1])
    after = adapter.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before if k not in ("_counters", "generator"))


def test_steps_repeat_the_whole_update(model, batches):
    once, thrice = (tta.adapt(model, "cotta", lr=0.01, steps=n, augment="none") for n in (1, 3))
    for _ in range(3):
        expected = once(batches[0])
    assert torch.equal(thrice(batches[0]), expected)


def test_grey_images_are_refused_with_what_to_do(batches):
    adapter = tta.adapt(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)), "cotta", ap=1.0)
    with pytest.raises(ValueError, match="needs 3 channels; the images have 1"):
        adapter(batches[0][:, :1])


def test_model_without_parameters_is_refused():
    with pytest.raises(ValueError, match="no parameter called weight or bias, which CoTTA adapts; it has no param"):
        tta.adapt(nn.Sequential(nn.Flatten()), "cotta")


@pytest.mark.parametrize(
    ("hparams", "message"),
    [
        ({"mt_alpha": 1.5}, "mt_alpha=1.5"),
        ({"rst_m": -1.0}, "rst_m"),
        ({"views": 0}, "views=0"),
        ({"augment": "x"}, "'x'"),
    ],
)
def test_wrong_values_are_named(model, hparams, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(model, "cotta", **hparams)
