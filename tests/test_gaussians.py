"""Tools of methods that compare features: Gaussians, quantiles and thresholds, each against the plainest way."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, kl_divergence

import tta
from tta import norms
from tta.functional import below_quantile, otsu_threshold, symmetric_kl, weighted_distance
from tta.memory import RunningGaussian
from tta.source import Need


def draws(seed=0):
    return torch.Generator().manual_seed(seed)


def covariance(width, seed):
    root = torch.randn(width, width, generator=draws(seed))
    return root @ root.T + torch.eye(width)


def test_symmetric_kl_is_that_of_torch():
    mean, other = torch.randn(2, 5, generator=draws())
    first, second = covariance(5, 1), covariance(5, 2)
    one, two = MultivariateNormal(mean, first), MultivariateNormal(other, second)
    expected = kl_divergence(one, two) + kl_divergence(two, one)
    torch.testing.assert_close(symmetric_kl(mean, first, other, second), expected, rtol=1e-4, atol=1e-4)


def test_symmetric_kl_of_variances_is_that_of_diagonal_covariances():
    mean, other = torch.randn(2, 3, 5, generator=draws())
    first, second = torch.rand(2, 3, 5, generator=draws(1)) + 0.1
    expected = symmetric_kl(mean, first.diag_embed(), other, second.diag_embed())
    torch.testing.assert_close(symmetric_kl(mean, first, other, second), expected, rtol=1e-4, atol=1e-4)


def test_symmetric_kl_is_nan_where_a_covariance_is_not_positive_definite():
    bad = torch.stack([torch.eye(3), -torch.eye(3)])
    mean = torch.zeros(2, 3)
    value = symmetric_kl(mean, bad, mean, torch.eye(3).expand(2, 3, 3))
    assert value.isnan().tolist() == [False, True]


@pytest.mark.parametrize("diagonal", [False, True])
def test_running_gaussian_without_a_length_gives_the_moments_of_all(diagonal):
    features = torch.randn(50, 4, generator=draws()) * 3 + 1
    labels = torch.randint(3, (50,), generator=draws(1))
    start = torch.ones(3, 4)
    running = RunningGaussian(start, start if diagonal else start[:, :, None] * torch.eye(4))
    for part in torch.arange(50).split(7):
        running.add(features[part], labels[part, None] == torch.arange(3))
    for group in range(3):
        own = features[labels == group]
        expected = torch.cov(own.T, correction=0)
        torch.testing.assert_close(running.mean[group], own.mean(0))
        found = running.covariance[group]
        torch.testing.assert_close(found, expected.diagonal() if diagonal else expected, rtol=1e-4, atol=1e-5)
    assert running.count.tolist() == torch.bincount(labels, minlength=3).tolist()


def test_running_gaussian_forgets_as_published_and_keeps_no_gradient():
    """With a length of 8 after 12 samples: each of four newcomers moves the mean by an eighth of its distance."""
    running = RunningGaussian(torch.zeros(1, 2), torch.eye(2)[None], length=8, count=8)
    features = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0], [2.0, 2.0]], requires_grad=True)
    mean, cov = running.add(features, torch.ones(4, 1, dtype=torch.bool))
    delta = features.detach().sum(0) / 8
    expected = torch.eye(2) + (features.T @ features - 4 * torch.eye(2)).detach() / 8 - torch.outer(delta, delta)
    torch.testing.assert_close(mean[0], delta)
    torch.testing.assert_close(cov[0], expected)
    assert torch.autograd.grad(mean.sum() + cov.sum(), features)[0].abs().min() > 0
    assert not running.mean.requires_grad


def test_running_gaussian_stays_a_covariance_in_batches_beyond_its_length():
    running = RunningGaussian(torch.zeros(1, 3), 4 * torch.eye(3)[None], length=8, count=8)
    running.add(torch.randn(64, 3, generator=draws()), torch.ones(64, 1, dtype=torch.bool))
    assert torch.linalg.eigvalsh(running.covariance[0]).min() > 0


def test_running_gaussian_keeps_nothing_that_is_not_finite():
    running = RunningGaussian(torch.zeros(1, 2), torch.eye(2)[None])
    running.add(torch.tensor([[1.0, math.nan]]), torch.ones(1, 1, dtype=torch.bool))
    assert running.mean.tolist() == [[0, 0]]
    assert running.count.tolist() == [0]


@pytest.mark.parametrize("share", [0.0, 0.03, 0.1, 0.5, 1.0])
def test_below_quantile_is_that_of_torch(share):
    values = [torch.randn(7, 5, generator=draws()), torch.randn(11, generator=draws(1))]
    flat = torch.cat([value.flatten() for value in values])
    expected = flat < flat.quantile(share)
    found = below_quantile(values, share)
    assert [mask.shape for mask in found] == [value.shape for value in values]
    assert torch.equal(torch.cat([mask.flatten() for mask in found]), expected)


def test_weighted_distance():
    value = weighted_distance(
        [torch.tensor([1.0, 2.0]), torch.tensor(3.0)], [torch.zeros(2), torch.tensor(1.0)], [2.0, 0.5]
    )
    assert value.item() == 2 * (1 + 4) + 0.5 * 4


HUNDREDTHS = 0.01 * torch.arange(100, dtype=torch.float64)


def plain_otsu(scores):
    """The released search: over 100 thresholds, the weighted variances of the groups."""
    best, found = math.inf, 0.0
    for threshold in np.arange(0, 1, 0.01):
        above, below = scores[scores >= threshold], scores[scores < threshold]
        if len(above) and len(below):
            within = (len(above) * above.var() + len(below) * below.var()) / len(scores)
            if within < best:
                best, found = within, threshold
    return found


@pytest.mark.parametrize("seed", range(5))
def test_otsu_threshold_is_the_plain_search(seed):
    scores = torch.rand(40, generator=draws(seed))
    valid = torch.rand(40, generator=draws(seed + 100)) < 0.7
    expected = plain_otsu(scores[valid].double().numpy())
    found = otsu_threshold(scores.masked_fill(~valid, torch.inf), valid, HUNDREDTHS)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_otsu_threshold_of_equal_scores_is_the_first():
    assert otsu_threshold(torch.full((5,), 0.5), torch.ones(5, dtype=torch.bool), HUNDREDTHS) == 0
    assert otsu_threshold(torch.ones(3), torch.zeros(3, dtype=torch.bool), HUNDREDTHS) == 0


def test_training_statistics_is_training_mode():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=0.3), nn.ReLU(), nn.Dropout(0.5)).eval()
    plain = nn.Sequential(model[0], nn.BatchNorm2d(4, momentum=0.3), nn.ReLU()).train()
    x = torch.randn(6, 3, 8, 8)
    with norms.training_statistics(model):
        found = model(x)
    assert torch.equal(found, plain(x))
    assert torch.equal(model[1].running_mean, plain[1].running_mean)
    assert torch.equal(model[1].running_var, plain[1].running_var)
    assert torch.equal(model[1].num_batches_tracked, plain[1].num_batches_tracked)
    assert not model[1].training
    found.sum().backward()


def test_training_statistics_forgets_what_is_not_finite():
    layer = nn.BatchNorm2d(2).eval()
    x = torch.randn(4, 2, 3, 3)
    x[0, 1] = math.nan
    with norms.training_statistics(layer):
        layer(x)
    assert layer.running_mean.isfinite().all()
    assert layer.running_mean[0] != 0
    assert layer.running_mean[1] == 0


@pytest.mark.parametrize("setting", ["full", "diagonal", "none"])
def test_class_gaussians_recomputed_plainly(cnn, golden_source, setting):
    need = Need("class_gaussians", ("fc",), settings={"covariance": setting})
    known = tta.SourceStatistics.record(cnn, [need], golden_source[:200], batch_size=48).get(need)
    with torch.no_grad():
        cnn.eval()
        features = cnn.layer3(cnn.layer2(cnn.layer1(cnn.stem(golden_source[:200])))).mean((2, 3))
        classes = cnn.fc(features).argmax(1)
    torch.testing.assert_close(known["mean"], features.mean(0))
    torch.testing.assert_close(known["covariance"], torch.cov(features.T, correction=0), rtol=1e-4, atol=1e-5)
    assert known["class_count"].tolist() == torch.bincount(classes, minlength=10).tolist()
    for number in range(10):
        own = features[classes == number]
        torch.testing.assert_close(known["class_mean"][number], own.mean(0), rtol=1e-4, atol=1e-5)
        if setting != "none":
            expected = torch.cov(own.T, correction=0)
            expected = expected if setting == "full" else expected.diagonal()
            torch.testing.assert_close(known["class_covariance"][number], expected, rtol=1e-4, atol=1e-5)
    assert ("class_covariance" in known) == (setting != "none")


@pytest.mark.parametrize("method", ["cafa", "owttt", "ttac"])
def test_features_that_are_the_same_for_all_images_have_no_gaussian(cnn, golden_source, method):
    """Not an error of the Cholesky decomposition, and no adapter whose every step is skipped."""
    torch.nn.init.zeros_(cnn.stem[0].weight)
    with pytest.raises(ValueError, match=r"hardly differ from image to image: by \S+, of a size of .* Pass source"):
        tta.adapt(cnn, method, source=golden_source[:32])
