"""One update of SSA in the plainest way, and its source statistics."""

import pytest
import torch
from torch import nn

import tta


@pytest.fixture
def regressor(small_cnn):
    torch.manual_seed(0)
    model = small_cnn(6, 2).eval()
    with torch.no_grad():
        model.norm.weight.fill_(100.0)  # variances near 1, to which 1e-8 adds nothing
    return model


def images(count, seed=0):
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def adapted(model, **hparams):
    return tta.adapt(model, "ssa", source=images(40), task="regression", source_batch_size=7, **hparams)


def test_the_subspace_is_that_of_a_singular_value_decomposition(regressor):
    adapter = adapted(regressor, components=4)
    with torch.no_grad():
        features = regressor.features(images(40)).double()
    _, values, right = torch.linalg.svd(features - features.mean(0), full_matrices=False)
    assert torch.allclose(adapter.mean.double(), features.mean(0), atol=1e-5)
    assert torch.allclose(adapter.variance.double(), values[:4].square() / 39, rtol=1e-4)
    assert torch.allclose((adapter.basis.double().T @ right[:4].T).abs(), torch.eye(4).double(), atol=1e-3)


def test_directions_without_variance_are_left_out(regressor):
    with torch.no_grad():
        regressor.norm.weight[0], regressor.norm.bias[0] = 0.0, -1.0  # behind the ReLU always 0
    assert adapted(regressor).basis.shape == (6, 5)


def test_one_update_is_the_weighted_divergence(regressor):
    adapter, x = adapted(regressor, components=3, optimizer="sgd", momentum=0.0, lr=1e-3, weight_bias=0.5), images(5, 1)
    plain = type(regressor)(6, 2)
    plain.load_state_dict(regressor.state_dict())
    features = plain.train().features(x)  # by the batch
    loss = torch.zeros(())
    for direction in range(3):
        along = (features - adapter.mean) @ adapter.basis[:, direction]
        target = torch.distributions.Normal(along.mean(), along.var().sqrt())
        source = torch.distributions.Normal(torch.zeros(()), adapter.variance[direction].sqrt())
        both = torch.distributions.kl_divergence(target, source) + torch.distributions.kl_divergence(source, target)
        change = plain.fc.weight.detach() @ adapter.basis[:, direction]  # of the two numbers along this direction
        loss = loss + (change.square().sum().sqrt() + 0.5) * both
    loss.backward()
    values = adapter(x)
    assert torch.allclose(values, plain.fc(features), atol=1e-4)  # scored before the step
    for name in ("weight", "bias"):
        expected = getattr(plain.norm, name) - 1e-3 * getattr(plain.norm, name).grad
        assert torch.allclose(getattr(adapter.model.norm, name), expected, atol=1e-4), name
        assert not torch.allclose(expected, getattr(plain.norm, name), atol=1e-3), name
    assert torch.equal(adapter.model.fc.weight, regressor.fc.weight)
    assert torch.equal(adapter.model.conv.weight, regressor.conv.weight)


def test_a_single_image_is_predicted_and_counted(regressor):
    adapter = adapted(regressor, statistics="source")
    with torch.no_grad():
        assert torch.allclose(adapter(images(1, 2)), regressor(images(1, 2)), atol=1e-4)
    assert adapter.progress().filtered == 1


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"components": 0}, "1 direction or more"),
        ({"weight_bias": -1.0}, "0 or more"),
        ({"source_batch_size": 0}, "1 or more"),
    ],
)
def test_settings_are_checked(regressor, setting, said):
    with pytest.raises(ValueError, match=said):
        tta.adapt(regressor, "ssa", source=images(8), task="regression", **setting)


def test_a_model_without_a_linear_head_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 1, 8), nn.BatchNorm2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"nn\.Linear"):
        tta.adapt(model, "ssa", source=images(8), task="regression")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:.*round away")
def test_a_model_of_another_precision_is_served(dtype, regressor):
    adapter = tta.adapt(regressor.to(dtype), "ssa", source=images(40).to(dtype), task="regression", lr=0.1)
    adapter(images(8, 1).to(dtype))
    assert adapter.progress().updates == 1
