"""DeYO recomputed in the plainest way; how objects are destroyed; batches that teach nothing."""

import copy
import math

import pytest
import torch
from torch import nn
from torchvision.transforms import functional as T

import tta
from tta.methods.deyo import cover_middle, shuffle_patches, shuffle_pixels


@pytest.fixture
def batches(golden_images):
    return list(golden_images[: 4 * 24].split(24))


def affine(model):
    return [p for m in model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]


def plain_deyo(source_model, batches, destroy, *, threshold, e0, reweight_ent=True, reweight_plpd=True, margin=None):
    """Logits of each batch, sample by sample, and how many samples taught."""
    model = copy.deepcopy(source_model).train()
    optimizer = torch.optim.SGD(affine(model), 0.05, 0.9)
    collected, taught = [], 0
    margin = 0.5 * math.log(10) if margin is None else margin
    for x in batches:
        logits = model(x)
        collected.append(logits.detach())
        entropies = [-(z.softmax(0) * z.log_softmax(0)).sum() for z in logits]
        sure = [i for i, h in enumerate(entropies) if h < margin]
        if not sure:
            continue
        with torch.no_grad():
            destroyed = model(destroy(x[sure])).softmax(1)
        losses = []
        for row, i in enumerate(sure):
            p = logits[i].detach().softmax(0)
            drop = p.max() - destroyed[row][p.argmax()]
            if drop > threshold:
                weight = reweight_ent * torch.exp(e0 - entropies[i].detach()) + reweight_plpd * torch.exp(drop)
                losses.append((weight if reweight_ent or reweight_plpd else 1) * entropies[i])
        taught += len(losses)
        if losses:
            optimizer.zero_grad()
            torch.stack(losses).mean().backward()
            optimizer.step()
    return torch.cat(collected), taught


@pytest.mark.parametrize(
    "settings", [{}, {"reweight_ent": False}, {"reweight_plpd": False}, {"reweight_ent": False, "reweight_plpd": False}]
)
def test_deyo_is_the_plain_recomputation(cnn, batches, settings):
    adapter = tta.adapt(
        cnn, "deyo", optimizer="sgd", lr=0.05, augment="occ", plpd_threshold=0.3, margin=0.3, margin_e0=0.5, **settings
    )
    logits = torch.cat([adapter(x) for x in batches])

    def occluded(x):
        x = x.clone()
        for image in x:
            image[:, 8:24, 8:24] = image.mean((1, 2), keepdim=True)
        return x

    expected, taught = plain_deyo(cnn, batches, occluded, threshold=0.3, e0=0.5, margin=0.3, **settings)
    assert 0 < taught < 4 * 24
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("settings", [{"margin": 1e-9}, {"plpd_threshold": 1.5}])
def test_a_batch_that_teaches_nothing_changes_nothing(cnn, batches, settings):
    adapter = tta.adapt(cnn, "deyo", augment="occ", **settings)
    before = adapter.state_dict()
    assert adapter(batches[0]).isfinite().all()
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


@pytest.fixture
def images():
    return torch.rand(3, 2, 12, 12, generator=torch.Generator().manual_seed(0))


def test_patches_are_shuffled_image_by_image(images):
    shuffled = shuffle_patches(images, 4, torch.Generator().manual_seed(1))
    order = torch.rand(3, 16, generator=torch.Generator().manual_seed(1)).argsort(1)
    for image, result, permutation in zip(images, shuffled, order, strict=True):
        for place, origin in enumerate(permutation.tolist()):
            (y, x), (v, u) = divmod(place, 4), divmod(origin, 4)
            assert torch.equal(result[:, 3 * y :, 3 * x :][:, :3, :3], image[:, 3 * v :, 3 * u :][:, :3, :3])
    assert not torch.equal(order[0], order[1])


def test_sides_that_cannot_be_divided_are_resized_there_and_back():
    image = torch.rand(2, 3, 14, 14, generator=torch.Generator().manual_seed(2))
    inner = shuffle_patches(T.resize(image, [12, 12]), 4, torch.Generator().manual_seed(3))
    expected = T.resize(inner, [14, 14])
    torch.testing.assert_close(shuffle_patches(image, 4, torch.Generator().manual_seed(3)), expected)


def test_pixels_are_shuffled_in_one_order(images):
    shuffled = shuffle_pixels(images, 4, torch.Generator().manual_seed(1))
    assert not torch.equal(shuffled, images)
    numbers = torch.arange(144.0).view(1, 1, 12, 12)
    order = shuffle_pixels(numbers, 4, torch.Generator().manual_seed(1)).flatten().long()
    assert torch.equal(shuffled.flatten(2), images.flatten(2)[..., order])


def test_the_middle_is_covered_by_the_mean_colour(images):
    before = images.clone()
    covered = cover_middle(images, 4, torch.Generator())
    assert torch.equal(images, before)
    assert torch.allclose(covered[1, 1, 3:9, 3:9], images[1, 1].mean().expand(6, 6))
    covered[..., 3:9, 3:9] = images[..., 3:9, 3:9]
    assert torch.equal(covered, images)


def test_the_top_is_left_alone_and_must_not_be_all(cnn):
    model = nn.Sequential()
    model.add_module("layer1", nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    model.add_module("layer4", nn.Sequential(nn.BatchNorm2d(4), nn.Flatten(), nn.LazyLinear(3)))
    model(torch.rand(2, 3, 6, 6))
    adapted = {id(p) for p in tta.adapt(model, "deyo", copy=False).parameters_to_adapt()}
    assert adapted == {id(p) for p in model.layer1[1].parameters()}
    with pytest.raises(ValueError, match=r"All 7 normalisation layers of GoldenCNN are excluded"):
        tta.adapt(cnn, "deyo", exclude=["layer1", "layer2", "layer3", "stem"])


@pytest.mark.parametrize(
    ("settings", "message"), [({"augment": "patches"}, "patch, pixel, occ"), ({"patch_len": 0}, "patch_len=0")]
)
def test_settings_out_of_range_are_named(cnn, settings, message):
    with pytest.raises(ValueError, match=message):
        tta.adapt(cnn, "deyo", **settings)
