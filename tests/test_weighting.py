"""ROID and CMF where the golden stream does not look: weights, losses and priors sample by sample, filters, small batches."""

import math

import pytest
import torch
from torch.nn import functional as F

import tta
from tta.functional import symmetric_cross_entropy
from tta.methods._weighting import certainty_diversity, prior_corrected, soft_likelihood_ratio


@pytest.fixture
def logits():
    return 3 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def batches(golden_images):
    return list(golden_images[:64].split(16))


def plain_entropy(p):
    return -sum(float(q) * math.log(float(q)) for q in p)


def test_weights_are_the_plain_recomputation(logits):
    average = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    rows = [z.softmax(0) for z in logits]
    diversity = [1 - float(p @ average) / (float(p.norm()) * float(average.norm())) for p in rows]
    certainty = [-plain_entropy(p) for p in rows]

    def rescaled(values):
        return [(v - min(values)) / (max(values) - min(values)) for v in values]

    diversity, certainty = rescaled(diversity), rescaled(certainty)
    mean = sum(diversity) / len(diversity)
    expected = [0 if d < mean else math.exp(d * c / 0.5) for d, c in zip(diversity, certainty, strict=True)]
    assert 0 < expected.count(0) < len(expected)
    torch.testing.assert_close(certainty_diversity(logits, average, 0.5), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_equal_samples_weigh_the_same(logits):
    assert torch.equal(certainty_diversity(logits[:1], torch.full((5,), 0.2), 1 / 3), torch.ones(1))
    alike = logits[:1].repeat(4, 1)
    assert torch.equal(certainty_diversity(alike, torch.full((5,), 0.2), 1 / 3), torch.ones(4))


def test_soft_likelihood_ratio_is_the_plain_recomputation(logits):
    expected = [
        -sum(min(p, 0.99) * math.log(min(p, 0.99) / (1 - min(p, 0.99)) + 1e-5) for p in row)
        for row in logits.softmax(1).tolist()
    ]
    torch.testing.assert_close(soft_likelihood_ratio(logits), torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_a_certain_prediction_has_a_finite_loss_and_no_gradient():
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    loss = soft_likelihood_ratio(logits).sum()
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss.isfinite()
    assert torch.equal(gradient, torch.zeros(1, 3))


def test_symmetric_cross_entropy_is_the_mean_of_both_directions(logits):
    one, other = logits[:6], logits[6:]
    p, q = one.softmax(1), other.softmax(1)
    expected = -0.5 * (q * p.log()).sum(1) - 0.5 * (p * q.log()).sum(1)
    torch.testing.assert_close(symmetric_cross_entropy(one, other), expected)


@pytest.mark.parametrize("images", [12, 2])
def test_prior_is_the_plain_recomputation(logits, images):
    z = logits[:images]
    prior = z.softmax(1).mean(0)
    smooth = max(1 / images, 1 / 5) / prior.max()
    prior = (prior + smooth) / (1 + 5 * smooth)
    assert float(prior.sum()) == pytest.approx(1)
    weighted = z.softmax(1) * prior
    torch.testing.assert_close(prior_corrected(z, "probabilities").softmax(1), weighted / weighted.sum(1, keepdim=True))
    torch.testing.assert_close(prior_corrected(z, "logits"), z * prior)
    assert prior_corrected(z, "none") is z


@pytest.mark.parametrize("method", ["roid", "cmf"])
def test_correction_and_divisor_are_options_of_one_path(cnn, batches, method):
    """Weights do not depend on the form of the correction; a batch of the size given is divided as by default."""
    settings = {"augment": "none", "lr": 0.01}
    plain = tta.adapt(cnn, method, prior_correction="none", **settings)
    corrected = tta.adapt(cnn, method, **settings, batch_size=16)
    for batch in batches:
        expected = prior_corrected(plain(batch), "probabilities")
        torch.testing.assert_close(corrected(batch), expected, rtol=0, atol=1e-5)


def test_a_given_divisor_makes_small_batches_make_small_steps(cnn, batches):
    small, whole = (
        tta.adapt(cnn, "roid", optimizer="sgd", lr=0.1, augment="none", momentum_src=1.0, batch_size=size)
        for size in (160, None)
    )
    before = [parameter.clone() for parameter in small.parameters_to_adapt()]
    for adapter in (small, whole):
        adapter(batches[0])
    for start, one, other in zip(before, small.parameters_to_adapt(), whole.parameters_to_adapt(), strict=True):
        torch.testing.assert_close((other - start) / 10, one - start, rtol=1e-2, atol=1e-7)
    assert not torch.equal(before[0], next(iter(small.parameters_to_adapt())))


def test_momentum_src_draws_the_weights_to_the_source(cnn, batches):
    free, bound = (
        tta.adapt(cnn, "roid", optimizer="sgd", lr=0.1, augment="none", momentum_src=share) for share in (1.0, 0.75)
    )
    source = [parameter.clone() for parameter in free.parameters_to_adapt()]
    free(batches[0])
    bound(batches[0])
    for start, one, other in zip(source, free.parameters_to_adapt(), bound.parameters_to_adapt(), strict=True):
        torch.testing.assert_close(other - start, 0.75 * (one - start), rtol=1e-3, atol=1e-6)


def test_the_filter_is_the_scalar_kalman_filter(cnn, batches):
    """On one weight, with plain floats."""
    adapter = tta.adapt(cnn, "cmf", optimizer="sgd", lr=0.1, momentum=0.0, alpha=0.8, gamma=0.7, q=8.0)
    weight = adapter.parameters_to_adapt()[0].detach()  # the same memory
    assert sum(p.numel() for p in adapter.parameters_to_adapt()) == 480
    q, source = 8.0 * 480 / 38400, float(weight[3])
    hidden, variance, shares = source, 0.0, []
    steps = iter([0.5, -0.2, 0.4, 0.3])
    adapter.update = lambda loss: weight[3].add_(next(steps)).isfinite()
    for batch, step in zip(batches, [0.5, -0.2, 0.4, 0.3], strict=True):
        stepped = float(weight[3]) + step
        adapter(batch)
        hidden = 0.8 * hidden + 0.2 * source
        variance = 0.64 * variance + q
        beta = max((1 - q) / (variance + 1 - q), 0.89)
        variance *= beta
        hidden = beta * hidden + (1 - beta) * stepped
        shares.append(beta)
        assert float(weight[3]) == pytest.approx(0.7 * stepped + 0.3 * hidden, abs=1e-6)
        assert float(adapter.variance) == pytest.approx(variance, abs=1e-6)
    assert len(set(shares)) > 1
    adapter.reset()
    assert float(adapter.variance) == 0


def test_a_skipped_step_moves_nothing(cnn, batches):
    for method in ("roid", "cmf"):
        adapter = tta.adapt(cnn, method, augment="none")
        adapter(batches[0])
        state = adapter.state_dict()
        view = torch.full_like(batches[1], torch.nan)
        adapter.config.augment = lambda x, view=view: view[: len(x)]
        with pytest.warns(RuntimeWarning, match="non-finite"):
            adapter(batches[1])
        changed = {key for key, value in adapter.state_dict().items() if not torch.equal(value, state[key])}
        assert changed == {"_counters"}


def test_too_much_noise_is_refused_with_the_limit(cnn):
    with pytest.raises(ValueError, match=r"q=80.0; expected less than 80"):
        tta.adapt(cnn, "cmf", q=80.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prior_correction": "odds"}, "prior_correction"),
        ({"temperature": 0.0}, "temperature=0.0"),
        ({"momentum_src": 1.5}, "momentum_src=1.5"),
        ({"augment": "papers"}, "augment='papers'"),
    ],
)
def test_settings_out_of_range_are_named(cnn, settings, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(cnn, "roid", **settings)


def test_views_teach_those_that_teach_alone(cnn, batches):
    """The view is made of the samples with a weight, in order."""
    seen = []
    adapter = tta.adapt(cnn, "roid", augment=lambda x: seen.append(x) or x)
    logits = tta.adapt(cnn, "norm")(batches[0])
    weights = certainty_diversity(logits, torch.full((10,), 0.1), 1 / 3)
    adapter(batches[0])
    assert 0 < len(seen[0]) < 16
    assert torch.equal(seen[0], batches[0][weights > 0])
    assert F.cosine_similarity(adapter.self_training.average[None], logits.softmax(1).mean(0)[None]) > 0
