"""EATA recomputed in the plainest way: both filters, the penalty, the moving average, and batches that teach nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tta
from tta.functional import masked_mean, reliable, unlike

SETTINGS = {"optimizer": "sgd", "lr": 0.05, "momentum": 0.9}
MARGIN = 0.4 * math.log(10)


def affine(model):
    return [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]


def plain_fisher(model, batches):
    """Square of each batch's mean gradient, averaged over batches; ``model`` is in training mode."""
    total = [torch.zeros_like(p) for p in affine(model)]
    for x in batches:
        logits = model(x)
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), affine(model))
        total = [t + g**2 for t, g in zip(total, gradients, strict=True)]
    return [t / len(batches) for t in total]


def plain_eata(source_model, batches, *, fisher=None, alpha=0.0, e_margin=MARGIN, d_margin=0.4, average=None):
    """Logits of each batch and the last moving average, sample by sample."""
    model = copy.deepcopy(source_model).train()
    anchors = [p.detach().clone() for p in affine(model)]
    optimizer = torch.optim.SGD(affine(model), 0.05, 0.9)
    collected = []
    for x in batches:
        logits = model(x)
        collected.append(logits.detach())
        losses, taught = [], []
        for z in logits:
            p = z.softmax(0)
            h = -(p * p.log()).sum()
            redundant = average is not None and abs(F.cosine_similarity(p, average, dim=0)) >= d_margin
            if h < e_margin and not redundant:
                losses.append(torch.exp(e_margin - h.detach()) * h)
                taught.append(p.detach())
        if not losses:
            continue
        loss = torch.stack(losses).mean()
        for p, f, anchor in zip(affine(model), fisher or [], anchors, strict=fisher is not None):
            loss = loss + alpha * (f * (p - anchor) ** 2).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        new = torch.stack(taught).mean(0)
        average = new if average is None else 0.9 * average + 0.1 * new
    return torch.cat(collected), average


def run(adapter, batches):
    return torch.cat([adapter(x) for x in batches])


@pytest.fixture
def batches(golden_images):
    return list(golden_images[: 6 * 32].split(32))


@pytest.mark.parametrize("d_margin", [0.4, 0.9])
def test_eta_is_the_plain_recomputation(cnn, batches, d_margin):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=MARGIN, d_margin=d_margin, **SETTINGS)
    expected, average = plain_eata(cnn, batches, d_margin=d_margin)
    torch.testing.assert_close(run(adapter, batches), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.average, average, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_the_plain_recomputation(cnn, batches, golden_source):
    """With a large weight, so that leaving the penalty out, or scaling it wrongly, is seen."""
    source = golden_source[:80]  # a whole batch and a smaller one, which count the same
    fisher = plain_fisher(copy.deepcopy(cnn).train(), source.split(64))
    assert fisher[0].max() > 0
    adapter = tta.adapt(cnn, "eata", source=source, fisher_alpha=1e5, **SETTINGS)
    logits = run(adapter, batches)
    expected, _ = plain_eata(cnn, batches, fisher=fisher, alpha=1e5)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)
    without = run(tta.adapt(cnn, "eata", fisher_alpha=0.0, **SETTINGS), batches)
    assert (without - expected).abs().max() > 0.1
    torch.testing.assert_close(adapter.fisher, torch.cat([f.flatten() for f in fisher]), rtol=1e-4, atol=1e-9)


def test_the_fisher_information_belongs_to_its_batch_size(cnn, golden_source):
    source = golden_source[:128]
    by_name = {
        name: tta.adapt(cnn, "eata", source=source, **{name: 32}).fisher
        for name in ("fisher_batch_size", "source_batch_size")
    }
    assert torch.equal(by_name["fisher_batch_size"], by_name["source_batch_size"])
    expected = plain_fisher(copy.deepcopy(cnn).train(), source.split(32))
    torch.testing.assert_close(
        by_name["fisher_batch_size"], torch.cat([f.flatten() for f in expected]), rtol=1e-4, atol=1e-9
    )


@pytest.mark.parametrize(("settings", "empty"), [({"e_margin": 1e-9}, "reliable"), ({"d_margin": 1e-6}, "unlike")])
def test_a_batch_that_teaches_nothing_changes_nothing(cnn, batches, settings, empty):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, **SETTINGS)
    adapter(batches[0])  # momentum and moving average are there to drift
    assert adapter.average.any()
    state = adapter.state_dict()
    for name, value in settings.items():
        setattr(adapter.config, name, value)
    logits = adapter(batches[1])
    assert logits.isfinite().all()
    assert {key for key, value in adapter.state_dict().items() if not torch.equal(value, state[key])} == set()
    assert adapter.skipped_updates == 0


def test_a_first_batch_that_teaches_nothing_leaves_the_average_to_the_next(cnn, batches):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=1e-9, **SETTINGS)
    adapter(batches[0])
    assert not adapter.average.any()
    adapter.config.e_margin = MARGIN
    adapter(batches[1])
    _, average = plain_eata(cnn, batches[1:2])
    torch.testing.assert_close(adapter.average, average)


def test_no_backward_pass_where_nothing_teaches(cnn, batches, monkeypatch):
    adapter = tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=1e-9)
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_: pytest.fail("a backward pass for no sample"))
    before = adapter.state_dict()["model.fc.weight"]
    adapter(batches[0])
    assert torch.equal(adapter.state_dict()["model.fc.weight"], before)


def test_the_average_is_forgotten_by_a_reset_unless_asked_to_stay(cnn, batches):
    sane = tta.adapt(cnn, "eata", fisher_alpha=0.0, **SETTINGS)
    released = tta.adapt(cnn, "eata", fisher_alpha=0.0, keep_average=True, **SETTINGS)
    for adapter in (sane, released):
        run(adapter, batches[:3])
    kept = released.average.clone()
    sane.reset()
    released.reset()
    assert sane.average is None
    assert torch.equal(released.average, kept)
    expected, _ = plain_eata(cnn, batches[3:])
    torch.testing.assert_close(run(sane, batches[3:]), expected, rtol=1e-4, atol=1e-4)
    filtered, _ = plain_eata(cnn, batches[3:], average=kept)
    torch.testing.assert_close(run(released, batches[3:]), filtered, rtol=1e-4, atol=1e-4)
    assert (expected - filtered).abs().max() > 1e-2


def test_the_default_entropy_margin_follows_the_number_of_classes(cnn, batches):
    given = run(tta.adapt(cnn, "eata", fisher_alpha=0.0, e_margin=MARGIN), batches[:3])
    assert torch.equal(run(tta.adapt(cnn, "eata", fisher_alpha=0.0), batches[:3]), given)


def test_source_is_asked_for_only_by_the_penalty(cnn, batches):
    with pytest.raises(ValueError, match=r"EATA needs to know the source domain \(fisher\)\. Pass source="):
        tta.adapt(cnn, "eata")
    assert tta.adapt(cnn, "eata", fisher_alpha=0.0).fisher is None


def test_group_norm_is_served_and_no_norm_refused(batches):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 4), nn.GroupNorm(2, 8), nn.Flatten(), nn.Linear(8 * 64, 4))
    adapter = tta.adapt(model, "eata", source=batches[0].split(1), e_margin=2.0)  # no layer needs a second image
    before = adapter.model[1].weight.clone()
    adapter(batches[0])
    assert not torch.equal(adapter.model[1].weight, before)
    with pytest.raises(ValueError, match="no normalisation layer of the kinds looked for"):
        tta.adapt(nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)), "eata", fisher_alpha=0.0)


@pytest.mark.parametrize("setting", [{"e_margin": 0.0}, {"d_margin": 0.0}, {"fisher_alpha": -1.0}])
def test_settings_out_of_range_are_refused(cnn, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        tta.adapt(cnn, "eata", **setting)


def test_filters_are_the_plain_formulas():
    torch.manual_seed(0)
    probabilities = torch.randn(50, 4).softmax(1)
    average = torch.tensor([0.7, 0.1, 0.1, 0.1])
    cosine = torch.stack([(p @ average) / (p.norm() * average.norm()) for p in probabilities])
    assert torch.equal(unlike(probabilities, average, 0.7), cosine < 0.7)
    assert unlike(probabilities, torch.zeros(4), 0.05).all()
    assert reliable(torch.tensor([0.1, 0.5, 0.9]), 0.5).tolist() == [True, False, False]
    mask = torch.tensor([True, False, True])
    values = torch.tensor([[1.0, 2.0], [float("nan"), 0.0], [3.0, 6.0]])
    assert torch.equal(masked_mean(values, mask), torch.tensor([2.0, 4.0]))
    assert torch.equal(masked_mean(values, ~mask & False), torch.zeros(2))
