"""shot, pl and conjugate_pl beyond their golden logits: losses in the plainest way, batches that teach nothing."""

import pytest
import torch
from torch.nn import functional as F

import tta
from tta.methods.conjugate_pl import conjugate_poly_loss


def weights_of(adapter):
    return {name: parameter.detach().clone() for name, parameter in adapter.model.named_parameters()}


def changed(adapter, before):
    return {name for name, parameter in adapter.model.named_parameters() if not torch.equal(parameter, before[name])}


def test_shot_follows_the_gradient_of_information_maximisation(cnn, golden_images):
    batch = golden_images[:32]
    adapter = tta.adapt(cnn, "shot", lr=0.1, momentum=0.0, statistics="source")
    p = cnn.eval()(batch).softmax(1)
    mean = p.mean(0)
    loss = -(p * p.log()).sum(1).mean() + (mean * (mean + 1e-5).log()).sum()
    (gradient,) = torch.autograd.grad(loss, [cnn.layer1.conv1.weight])
    adapter(batch)
    torch.testing.assert_close(adapter.model.layer1.conv1.weight, cnn.layer1.conv1.weight - 0.1 * gradient)


def test_shot_never_touches_the_head(cnn, golden_images):
    adapter = tta.adapt(cnn, "shot")
    before = weights_of(adapter)
    adapter(golden_images[:16])
    assert changed(adapter, before) == set(before) - {"fc.weight", "fc.bias"}


@pytest.mark.parametrize("statistics", ["batch", "source", "mixed"])
def test_shot_learns_nothing_from_a_single_image(cnn, golden_images, statistics):
    adapter = tta.adapt(cnn, "shot", statistics=statistics, weight_decay=0.1)
    before = weights_of(adapter)
    adapter(golden_images[:1])
    assert changed(adapter, before) == set()


@pytest.mark.parametrize("parameters", ["norm", "head", "all"])
def test_pl_makes_no_step_without_a_sure_sample(cnn, golden_images, parameters):
    """Adam would go on by its moments; the first batch gives it some."""
    adapter = tta.adapt(cnn, "pl", parameters=parameters)
    adapter(golden_images[:16])
    adapter.config.threshold = 1.0
    before = weights_of(adapter)
    adapter(golden_images[16:32])
    assert changed(adapter, before) == set()


def test_pl_learns_from_the_sure_samples_alone(cnn, golden_images):
    batch, threshold = golden_images[:32], 0.6
    adapter = tta.adapt(cnn, "pl", optimizer="sgd", momentum=0.0, lr=0.1, statistics="source", threshold=threshold)
    logits = cnn.eval()(batch)
    confidence, labels = logits.softmax(1).max(1)
    kept = confidence > threshold
    assert 0 < kept.sum() < 32
    (gradient,) = torch.autograd.grad(F.cross_entropy(logits[kept], labels[kept]), [cnn.layer2.bn1.weight])
    adapter(batch)
    torch.testing.assert_close(adapter.model.layer2.bn1.weight, cnn.layer2.bn1.weight - 0.1 * gradient)


@pytest.mark.parametrize("method", ["shot", "pl"])
def test_mixed_statistics_leave_the_stored_ones_alone(cnn, golden_images, method):
    adapter = tta.adapt(cnn, method, statistics="mixed", score="after")
    scored = adapter(golden_images[:32])
    for name, value in adapter.model.named_buffers():
        assert torch.equal(value, cnn.get_buffer(name))
    with torch.no_grad():
        assert torch.equal(scored, adapter.predict(golden_images[:32]))


@pytest.mark.parametrize("epsilon", [0.0, 1.0, 6.0])
def test_conjugate_label_solves_its_equation(epsilon):
    """Loss and gradient equal those of the label found by solving the linear system, as the released code does."""
    logits = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2
    logits.requires_grad_()
    p = logits.softmax(1)
    matrix = torch.eye(7).double() + epsilon * (torch.diag_embed(p) - p[:, :, None] * p[:, None, :])
    label = torch.linalg.solve(matrix, p[:, :, None])[:, :, 0]
    expected = logits.logsumexp(1) - (label * (logits - epsilon * (1 - p))).sum(1)
    ours = conjugate_poly_loss(logits, epsilon)
    torch.testing.assert_close(ours, expected)
    for mine, theirs in zip(*(torch.autograd.grad(loss.sum(), logits) for loss in (ours, expected)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_conjugate_pl_of_the_cross_entropy_is_tent(cnn, golden_images):
    conjugate, tent = tta.adapt(cnn, "conjugate_pl", epsilon=0.0), tta.adapt(cnn, "tent")
    for batch in golden_images[:96].split(32):
        torch.testing.assert_close(conjugate(batch), tent(batch), atol=1e-4, rtol=0)
