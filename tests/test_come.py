"""COME: the entropy of opinions by its formula, what its gradient leaves alone, and the options of tent, eata and sar."""

import math

import pytest
import torch

import tta
from tta.functional import entropy, opinion_entropy


@pytest.fixture
def logits():
    return 3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_opinion_entropy_by_its_formula(logits):
    """Belief e_k / S and uncertainty K / S of evidence e = exp(logits), S = sum(e) + K."""
    evidence = logits.exp()
    total = evidence.sum(1, keepdim=True) + 10
    parts = torch.cat([evidence / total, 10 / total], dim=1)
    torch.testing.assert_close(opinion_entropy(logits).double(), -(parts * parts.log()).sum(1), atol=1e-5, rtol=1e-5)


def test_the_gradient_does_not_lengthen_the_logits(logits):
    logits = logits.float().requires_grad_()
    (along,) = torch.autograd.grad(opinion_entropy(logits).sum(), logits)
    length = logits.norm(dim=1)
    assert (along * logits).sum(1).div(length).abs().max() < 1e-5
    (plain,) = torch.autograd.grad(entropy(logits).sum(), logits)
    assert (plain * logits).sum(1).div(length).abs().max() > 0.05  # minimising the entropy does


def test_no_evidence_is_no_certainty():
    """All logits low: the rest takes all, while softmax sees one class far above the others."""
    low = torch.tensor([[-40.0, -60.0, -60.0]])
    assert opinion_entropy(low).item() < 1e-5
    low.requires_grad_()
    (gradient,) = torch.autograd.grad(opinion_entropy(low).sum(), low)
    assert gradient.abs().max() < 1e-5


@pytest.mark.parametrize("values", [torch.zeros(2, 5), torch.full((2, 5), 1e4), torch.tensor([[300.0, -300.0]])])
def test_extreme_logits_stay_finite(values):
    values.requires_grad_()
    found = opinion_entropy(values)
    (gradient,) = torch.autograd.grad(found.sum(), values)
    assert found.isfinite().all()
    assert gradient.isfinite().all()
    assert found.max() <= math.log(values.shape[1] + 1) + 1e-6


def test_tents_step_recomputed(small_cnn):
    torch.manual_seed(0)
    model, x = small_cnn(4, 3), torch.rand(8, 3, 6, 6)
    adapter = tta.adapt(model, "tent", optimizer="sgd", lr=0.5, momentum=0.0, loss="come")
    adapter(x)
    logits = model.train()(x)
    length = logits.norm(dim=1, keepdim=True)
    evidence = (logits / length * length.detach()).exp()
    parts = torch.cat([evidence, torch.full((8, 1), 3.0)], dim=1)
    parts = parts / parts.sum(1, keepdim=True)
    loss = -(parts * parts.log()).sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, model.norm.weight)
    assert gradient.abs().max() > 1e-4
    torch.testing.assert_close(adapter.model.norm.weight, model.norm.weight - 0.5 * gradient)


@pytest.mark.parametrize("method", ["tent", "eata", "sar"])
def test_another_word_is_named(cnn, golden_source, method):
    with pytest.raises(ValueError, match="comet"):
        tta.adapt(cnn, method, source=golden_source, loss="comet")


def test_several_labels_an_image_are_served(cnn, golden_images):
    """Each label is a row of two classes."""
    adapter = tta.adapt(cnn, "tent", outputs="sigmoid", loss="come")
    assert adapter(golden_images[:16]).shape == (16, 10)
