"""The chain of labels: forward-backward against enumeration, its tests of order, and what it leaves alone."""

from itertools import product

import pytest
import torch
from torch import nn

import tta
from tta import methods
from tta.methods import _chain
from tta.methods._chain import LabelChain, class_prior, serial_correlation, spread, sweep


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def enumerated(evidence, before, prior, rho):
    """Posterior of each label, expected stays and jumps, and the likelihood, summed over all paths and all choices to stay."""
    count, classes = evidence.shape
    labels, stays, jumps, total = torch.zeros_like(evidence), 0.0, torch.zeros_like(prior), 0.0
    for start, *path in product(range(classes), repeat=count + 1):
        for stayed in product([True, False], repeat=count):
            chance, last = before[start], start
            for t, label in enumerate(path):
                step = rho * (label == last) if stayed[t] else (1 - rho) * prior[label]
                chance, last = chance * step * evidence[t, label], label
            total += chance
            stays += chance * sum(stayed)
            for t, label in enumerate(path):
                labels[t, label] += chance
                jumps[label] += chance * (not stayed[t])
    return labels / total, stays / total, jumps / total, total.log()


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.9])
def test_forward_backward_equals_the_sum_over_all_paths(rho):
    evidence = torch.rand(4, 3, generator=seeded(), dtype=torch.float64)
    before, prior = torch.tensor([0.7, 0.1, 0.2]).double(), torch.tensor([0.2, 0.5, 0.3]).double()
    found = sweep(evidence, before, prior, torch.tensor(rho).double())
    labels, stays, jumps, likelihood = enumerated(evidence, before, prior, rho)
    torch.testing.assert_close(found.labels, labels)
    torch.testing.assert_close(found.filtered, labels[-1])
    torch.testing.assert_close(found.stays, torch.as_tensor(stays).double())
    torch.testing.assert_close(found.jumps, jumps)
    torch.testing.assert_close(found.log_likelihood, likelihood)


def test_several_chains_at_once_are_those_one_by_one():
    evidence = torch.rand(6, 2, 5, generator=seeded())
    prior, rho = torch.rand(2, 5, generator=seeded(1)).softmax(1), torch.tensor([0.1, 0.8])
    together = sweep(evidence, prior, prior, rho)
    for chain in range(2):
        alone = sweep(evidence[:, chain], prior[chain], prior[chain], rho[chain])
        torch.testing.assert_close(together.labels[:, chain], alone.labels)
        torch.testing.assert_close(together.log_likelihood[chain], alone.log_likelihood)


def test_class_frequencies_are_where_the_likelihood_is_stationary():
    """At the fixed point of EM each class's share is the mean of its posteriors."""
    evidence = torch.rand(40, 4, generator=seeded(), dtype=torch.float64) ** 3
    prior = class_prior(evidence, 1e-9, steps=2000)
    posterior = evidence * prior
    torch.testing.assert_close((posterior / posterior.sum(1, keepdim=True)).mean(0), prior, rtol=1e-4, atol=1e-5)
    assert class_prior(evidence, 1e9).std() < 1e-6


def test_serial_correlation_has_the_moments_of_random_orders():
    rows = torch.rand(30, 4, generator=seeded()) ** 2
    sums, generator = [], seeded(1)
    for _ in range(4000):
        order = rows[torch.randperm(30, generator=generator)] - rows.mean(0)
        sums.append((order[1:] * order[:-1]).sum())
    sums = torch.stack(sums)
    excess, variance = serial_correlation(rows)
    centred = rows - rows.mean(0)
    plain = (centred[1:] * centred[:-1]).sum()
    assert abs(plain - sums.mean() - excess) < 4 * sums.std() / 4000**0.5
    assert abs(sums.var() / variance - 1) < 0.1


def test_serial_correlation_of_some_rows_is_theirs_alone():
    rows = torch.rand(20, 4, generator=seeded())
    padded = torch.cat((torch.full((5, 4), 7.0), rows))
    for part, whole in zip(serial_correlation(padded, torch.arange(25) >= 5), serial_correlation(rows), strict=True):
        torch.testing.assert_close(part, whole)


def test_spread_is_one_on_average_for_batches_of_one_distribution():
    earlier = torch.rand(64, 8, generator=seeded()) ** 4
    ratios = [
        spread(torch.rand(64, 8, generator=seeded(s)) ** 4, earlier.mean(0), torch.tensor(64.0)) for s in range(1, 200)
    ]
    assert 0.8 < torch.stack(ratios).mean() < 1.4  # one earlier batch is the same in all of them
    assert spread(earlier + 1, earlier.mean(0), torch.tensor(64.0)) > 20


def stream(labels, classes, *, sure=3.0, noise=1.7, seed=0):
    """Logits that are right in about two of three cases."""
    return sure * nn.functional.one_hot(labels, classes) + noise * torch.randn(
        len(labels), classes, generator=seeded(seed)
    )


def answers(logits, batch, chain=None):
    chain, given = chain or LabelChain(3.5, 64), []
    for part in logits.split(batch):
        found = chain.read(part)
        chain.remember(found, torch.tensor(True))
        given.append(torch.where(found.sticky, found.chained, part))
    return torch.cat(given)


def error(logits, labels):
    return float((logits.argmax(1) != labels).float().mean())


@pytest.mark.parametrize("batch", [1, 16, 64, 200])
def test_a_random_order_leaves_the_answers_alone(batch):
    labels = torch.randint(10, (1600,), generator=seeded(3))
    logits = stream(labels, 10)
    logits[:, 4] += 2  # a class predicted too often makes no order
    assert torch.equal(answers(logits, batch), logits)


@pytest.mark.parametrize("batch", [1, 16, 64, 200])
def test_runs_of_labels_are_found_and_used(batch):
    labels = torch.randint(10, (160,), generator=seeded(3)).repeat_interleave(10)
    logits = stream(labels, 10)
    before, after = error(logits, labels), error(answers(logits, batch), labels)
    assert before > 0.3
    assert after < (0.6 if batch == 1 else 0.25) * before  # alone, an image knows those before it only


@pytest.mark.parametrize("name", ["a run of one class", "a thousand classes", "certainty"])
def test_extremes_stay_finite(name):
    logits = {
        "a run of one class": stream(torch.zeros(256, dtype=torch.int64), 10),
        "a thousand classes": stream(
            torch.randint(1000, (32,), generator=seeded()).repeat_interleave(8), 1000, sure=9.0
        ),
        "certainty": 1e4 * stream(torch.randint(10, (256,), generator=seeded()), 10),
    }[name]
    chain = LabelChain(3.5, 64)
    assert not answers(logits, 64, chain).isnan().any()
    assert all(value.isfinite().all() for value in chain.state_dict().values())


def test_with_a_thousand_classes_a_random_order_is_left_alone_and_runs_are_used():
    labels = torch.randint(1000, (512,), generator=seeded())
    logits = stream(labels, 1000, sure=6.0)
    assert torch.equal(answers(logits, 64), logits)
    runs = labels[:64].repeat_interleave(8)
    logits = stream(runs, 1000, sure=6.0)
    assert error(answers(logits, 64), runs) < 0.5 * error(logits, runs)


def test_the_temperature_is_softer_where_neighbours_contradict():
    labels = torch.randint(10, (64,), generator=seeded()).repeat_interleave(10)
    chosen, left = [], []
    for wrong in (0.02, 0.3):
        shown = torch.where(
            torch.rand(640, generator=seeded(1)) < wrong, torch.randint(10, (640,), generator=seeded(2)), labels
        )
        chain = LabelChain(3.5, 64)
        left.append(error(answers(6.0 * nn.functional.one_hot(shown, 10), 64, chain), labels))
        chosen.append(_chain.TEMPERATURES[int(chain.fitness.argmax())])
    assert chosen[0] < chosen[1]
    assert left[0] < 0.02
    assert left[1] < 0.1


def test_around_a_method_its_weights_are_those_without(cnn, golden_images):
    wrapped, plain = (tta.adapt(cnn, name) for name in ("chain:tent", "tent"))
    chain = LabelChain(3.5, 64)
    for x in golden_images[:256].split(64):
        logits = plain(x)
        found = chain.read(logits)
        chain.remember(found, torch.tensor(True))
        assert torch.equal(wrapped(x), torch.where(found.sticky, found.chained, logits))
    assert all(map(torch.equal, wrapped.model.parameters(), plain.model.parameters()))


def test_names_settings_and_what_is_refused(cnn, golden_images):
    kind = methods.find("chain:rotta")
    assert methods.name_of(kind) == "chain:rotta"
    assert kind is methods.find("chain:rotta")
    assert tta.adapt(cnn, "chain:tent", preset="imagenet-c").config.lr == 2.5e-4
    assert torch.equal(tta.adapt(cnn, "chain")(golden_images[:64]), tta.adapt(cnn, "chain:source")(golden_images[:64]))
    with pytest.raises(ValueError, match="around a method once"):
        tta.adapt(cnn, "chain:chain")
    with pytest.raises(ValueError, match="evidence_for=0"):
        tta.adapt(cnn, "chain", evidence_for=0)
    with pytest.raises(ValueError, match="Export the method that it wraps"):
        tta.adapt(cnn, "chain:rotta").export(golden_images[:64])
