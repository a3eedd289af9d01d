"""UnMix-TNS: its layer recomputed image by image and component by component, and its edges."""

import math

import pytest
import torch
from torch import nn

import tta
from tta.methods.unmix_tns import UnMixedBatchNorm
from tta.norms import remembering


def layer_of(channels, **settings):
    layer = nn.BatchNorm2d(channels, **settings).eval()
    generator = torch.Generator().manual_seed(3)
    for tensor, low in ((layer.running_mean, -1), (layer.running_var, 0.5), (layer.weight, 0.5), (layer.bias, -1)):
        tensor.data.uniform_(low, 2, generator=generator)
    return layer


@torch.no_grad()
def plain_unmix(x, means, variances, layer, rate):
    """One forward and one update by loops over images, components and channels: outputs, new means, new variances."""
    out, components, channels = torch.empty_like(x), len(means), x.shape[1]
    new_means, new_variances = means.clone(), variances.clone()
    for image, result in zip(x, out, strict=True):
        own = torch.stack([image[c].mean() for c in range(channels)])
        spread = torch.stack([(image[c] - image[c].mean()).square().mean() for c in range(channels)])
        cosines = [float(own @ mean / own.norm() / mean.norm()) for mean in means]
        total = sum(math.exp(cosine / 0.07) for cosine in cosines)
        shares = [math.exp(cosine / 0.07) / total for cosine in cosines]
        mixed = [(1 - p) * mean + p * own for p, mean in zip(shares, means, strict=True)]
        within = [(1 - p) * var + p * spread for p, var in zip(shares, variances, strict=True)]
        mean = sum(mixed) / components
        var = sum(within) / components + sum(m**2 for m in mixed) / components - mean**2
        for c in range(channels):
            result[c] = (image[c] - mean[c]) / (var[c] + layer.eps).sqrt() * layer.weight[c] + layer.bias[c]
        for k, p in enumerate(shares):
            new_means[k] += rate * p * (own - means[k]) / len(x)
            new_variances[k] += rate * p * (spread - variances[k]) / len(x)
    return out, new_means, new_variances


@pytest.mark.parametrize(("components", "images"), [(5, 6), (1, 4), (3, 1)])
def test_layer_is_the_plain_one(components, images):
    generator = torch.Generator().manual_seed(0)
    layer = layer_of(4, momentum=0.3)
    unmixed = UnMixedBatchNorm(layer, 1 / 8, torch.randn(components, 4, generator=generator))
    for _ in range(3):
        x = torch.rand(images, 4, 3, 5, generator=generator) * 3
        rate = 1 - 0.7 ** (images / 8)
        expected, means, variances = plain_unmix(x, unmixed.means, unmixed.variances, layer, rate)
        with remembering(unmixed):
            torch.testing.assert_close(unmixed(x), expected, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(unmixed.means, means)
        torch.testing.assert_close(unmixed.variances, variances)


def test_components_begin_with_the_source_variance_together():
    layer = layer_of(3)
    unmixed = UnMixedBatchNorm(layer, 1.0, torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0)))
    total = unmixed.variances.mean(0) + unmixed.means.var(0)
    torch.testing.assert_close(total, layer.running_var, rtol=0.05, atol=0)
    torch.testing.assert_close(unmixed.means.mean(0), layer.running_mean, rtol=0, atol=0.05)
    one = UnMixedBatchNorm(layer, 1.0, torch.ones(1, 3))
    torch.testing.assert_close(one.means[0], layer.running_mean)
    torch.testing.assert_close(one.variances[0], layer.running_var)


def test_an_image_is_predicted_alone_as_in_a_batch(cnn, golden_images):
    adapter = tta.adapt(cnn, "unmix_tns")
    with adapter.paused():
        alone = torch.cat([adapter(image[None]) for image in golden_images[:8]])
        torch.testing.assert_close(adapter(golden_images[:8]), alone, rtol=0, atol=1e-4)


def test_two_halves_of_a_batch_teach_about_as_much_as_the_whole(cnn, golden_images):
    whole, halves = tta.adapt(cnn, "unmix_tns"), tta.adapt(cnn, "unmix_tns")
    begun = whole.model.stem[1].means.clone()
    whole(golden_images[:64])
    for half in golden_images[:64].split(32):
        halves(half)
    moved, twice = whole.model.stem[1].means - begun, halves.model.stem[1].means - begun
    assert moved.abs().max() > 1e-3
    assert (moved - twice).norm() < 0.1 * moved.norm()


def test_layers_without_pixels_keep_the_source_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)).eval()
    adapter = tta.adapt(model, "unmix_tns")
    x = torch.rand(5, 3, 2, 2)
    for _ in range(2):
        torch.testing.assert_close(adapter(x), model(x))


def test_a_model_without_batchnorm_is_refused(vit):
    with pytest.raises(ValueError, match="has no normalisation layer of the kinds looked for: BatchNorm"):
        tta.adapt(vit, "unmix_tns")
