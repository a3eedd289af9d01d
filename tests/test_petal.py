"""PETAL: the prior from a file, and what the golden stream does not see."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tta


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5)).eval()


@pytest.fixture
def batches():
    return torch.rand(3, 8, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def roll(x):
    return x.roll(1, 3)


def test_variances_from_a_file_weigh_each_weight(model, batches, tmp_path):
    """After a step away from the source, the gradient of the prior is the distance over the variance."""
    variances = {name: torch.rand_like(p) - 0.1 for name, p in model.named_parameters()}
    save_file(variances, tmp_path / "variances.safetensors")
    settings = {
        "optimizer": "sgd",
        "lr": 1e-3,
        "momentum": 0.0,
        "augment": roll,
        "ap": 1.0,
        "views": 1,
        "quantile": 0.0,
    }
    path, weight = str(tmp_path / "variances.safetensors"), 1e-3
    free = tta.adapt(model, "petal", prior_weight=0.0, **settings)
    held = tta.adapt(model, "petal", prior_weight=weight, prior_variance=path, **settings)
    free(batches[0])
    held(batches[0])  # at the source the prior has no gradient: both take the same step
    before = {name: p.detach().clone() for name, p in free.model.named_parameters()}
    for name, p in held.model.named_parameters():
        assert torch.equal(p, before[name])
    free(batches[1])
    held(batches[1])
    source = dict(model.named_parameters())
    for (name, ours), (_, without) in zip(held.model.named_parameters(), free.model.named_parameters(), strict=True):
        precision = 1 / (variances[name].clamp(min=0) + 1e-6)
        pull = 1e-3 * weight * precision * (before[name] - source[name].detach())
        torch.testing.assert_close(without - ours, pull, rtol=1e-2, atol=1e-6)


def test_the_least_important_weights_return(model, batches):
    adapter = tta.adapt(model, "petal", augment=roll, ap=1.0, views=1, quantile=0.25)
    source = torch.cat([p.detach().flatten() for p in model.parameters()])
    for batch in batches:
        adapter(batch)
        now = torch.cat([p.detach().flatten() for p in adapter.model.parameters()])
        assert (now == source).float().mean() == pytest.approx(0.25, abs=0.02)


def test_a_file_that_does_not_fit_says_which_parameter(model, tmp_path):
    path = str(tmp_path / "variances.safetensors")
    save_file({"0.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"for '0.weight' \(6, 3, 3, 3\) it holds one of shape \(2,\)"):
        tta.adapt(model, "petal", prior_variance=path)
