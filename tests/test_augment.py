"""The paper's view against the same pipeline built from torchvision, step by step; draws; choices."""

import itertools

import pytest
import torch
from torchvision.transforms import functional as T

from tta import augment
from tta.augment import ViewFactors, draw_factors, paper_view, sharp_view


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def published(x, factors, padding="edge"):
    """Jitter, padding by half the size, affine map, blur (ROID: none), centre crop, flip, as the released code does it."""
    height, width = x.shape[2:]
    jitter = [
        lambda x: T.adjust_brightness(x, factors.brightness),
        lambda x: T.adjust_contrast(x, factors.contrast),
        lambda x: T.adjust_saturation(x, factors.saturation),
        lambda x: T.adjust_hue(x, factors.hue),
        lambda x: T.adjust_gamma(x.clamp(1e-8, 1), factors.gamma),
    ]
    x = x.clamp(0, 1)
    for operation in factors.order:
        x = jitter[operation](x)
    x = T.pad(x, [width // 2, height // 2], padding_mode=padding)
    shift = [round(share * size) for share, size in zip(factors.shift, (width, height), strict=True)]
    x = T.affine(x, factors.angle, shift, factors.scale, [0.0], interpolation=T.InterpolationMode.BILINEAR, fill=0)
    if padding == "edge":
        x = T.gaussian_blur(x, [5, 5], [factors.sigma, factors.sigma])
    x = T.center_crop(x, [height, width])
    return T.hflip(x) if factors.flip else x


SINGLE = [
    {},
    {"brightness": 1.4},
    {"contrast": 0.7},
    {"contrast": 1.3},
    {"saturation": 0.5},
    {"saturation": 1.5},
    {"hue": 0.06},
    {"hue": -0.06},
    {"gamma": 0.7},
    {"angle": 15.0},
    {"angle": -7.0, "scale": 0.9},
    {"shift": (0.125, -0.09)},
    {"angle": 15.0, "shift": (-0.125, 0.125), "scale": 0.9},  # the farthest that a crop looks
    {"sigma": 0.5},
    {"flip": True},
]


@pytest.mark.parametrize("given", SINGLE, ids=str)
def test_each_operation_is_the_published_one(images, given):
    factors = ViewFactors(**given)
    torch.testing.assert_close(paper_view(images, factors), published(images, factors), atol=2e-5, rtol=1e-4)
    sharp = published(images, factors, padding="reflect")
    torch.testing.assert_close(sharp_view(images, factors), sharp, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(32, 32), (24, 24), (16, 20)])
def test_whole_view_is_the_published_one(shape):
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        images = torch.rand(2, 3, *shape, generator=generator) * 1.2 - 0.1  # clipped first
        factors = draw_factors(generator)
        torch.testing.assert_close(paper_view(images, factors), published(images, factors), atol=5e-5, rtol=1e-3)
        sharp = published(images, factors, padding="reflect")
        torch.testing.assert_close(sharp_view(images, factors), sharp, atol=5e-5, rtol=1e-3)


def test_hue_of_grey_black_and_white_stays(images):
    grey = images[:, :1].expand(-1, 3, -1, -1).clone()
    grey[0], grey[1] = 0, 1
    torch.testing.assert_close(augment.shift_hue(grey, 0.05), grey)


def test_input_and_memory_format_do_not_matter(images):
    factors = draw_factors(torch.Generator().manual_seed(2))
    before = images.clone()
    view = paper_view(images.to(memory_format=torch.channels_last), factors)
    assert torch.equal(view, paper_view(images, factors))
    assert torch.equal(images, before)


def test_factors_fill_the_published_ranges():
    generator = torch.Generator().manual_seed(3)
    drawn = [draw_factors(generator) for _ in range(2000)]
    ranges = {
        "brightness": (0.6, 1.4),
        "contrast": (0.7, 1.3),
        "saturation": (0.5, 1.5),
        "hue": (-0.06, 0.06),
        "gamma": (0.7, 1.3),
        "angle": (-15, 15),
        "scale": (0.9, 1.1),
        "sigma": (0.001, 0.5),
    }
    values = {name: torch.tensor([getattr(factors, name) for factors in drawn]) for name in ranges}
    values["x"], values["y"] = torch.tensor([factors.shift for factors in drawn]).T
    for name, (low, high) in {**ranges, "x": (-0.125, 0.125), "y": (-0.125, 0.125)}.items():
        share = (values[name] - low) / (high - low)
        assert 0 <= share.min() < 0.01, name
        assert 0.99 < share.max() <= 1, name
        assert share.mean() == pytest.approx(0.5, abs=0.03), name
    assert {factors.order for factors in drawn} == set(itertools.permutations(range(5)))
    assert sum(factors.flip for factors in drawn) == pytest.approx(1000, abs=100)


def test_paper_views_differ_and_repeat_with_the_generator(images):
    first = augment.augmentation("paper", torch.Generator().manual_seed(4))
    second = augment.augmentation("paper", torch.Generator().manual_seed(4))
    views = [first(images), first(images)]
    assert not torch.allclose(views[0], views[1], atol=0.05)
    assert torch.equal(second(images), views[0])
    assert torch.equal(second(images), views[1])


def test_paper_view_ends_with_noise_and_clipping():
    generator = torch.Generator().manual_seed(5)
    view = augment.augmentation("paper", generator)(torch.full((8, 3, 32, 32), 0.5))
    assert view.std(dim=(2, 3)).mean() == pytest.approx(0.005, rel=0.05)
    white = augment.augmentation("paper", generator)(torch.ones(1, 3, 32, 32) * 2)
    assert white.max() <= 1


def test_sharp_views_are_drawn_from_the_generator_and_have_no_noise(images):
    view = augment.augmentation("paper", torch.Generator().manual_seed(5), sharp=True)
    factors = draw_factors(torch.Generator().manual_seed(5))
    assert torch.equal(view(images), sharp_view(images, factors).clamp(0, 1))
    assert not torch.allclose(view(images), view(images), atol=0.05)


def test_choices(images):
    generator = torch.Generator()
    state = generator.get_state()
    assert augment.augmentation("none", generator)(images) is images
    assert torch.equal(augment.augmentation(lambda x: x.flip(2), generator)(images), images.flip(2))
    assert torch.equal(generator.get_state(), state)
    for choice in ("paper", "none", images.flip):
        augment.check(choice)
    with pytest.raises(ValueError, match="Got augment='papers'; expected 'paper', 'none' or a callable"):
        augment.check("papers")


def test_grey_images_are_refused_with_what_to_do(images):
    with pytest.raises(ValueError, match=r"needs 3 channels; the images have 1.*augment='none'"):
        paper_view(images[:, :1], ViewFactors())


def test_generator_on_a_device_follows_the_one_that_seeds_it():
    one, other = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    cpu = torch.device("cpu")
    draws = [torch.rand(4, generator=augment.generator_on(cpu, seeding)) for seeding in (one, one, other)]
    assert torch.equal(draws[0], draws[2])
    assert not torch.equal(draws[0], draws[1])


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_each_image_is_blurred_by_its_own_sigma(sigma):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    blurred = augment._blurred_each(images, torch.tensor([1.3, sigma, 0.5]))
    expected = T.gaussian_blur(images[1], [13, 13], [sigma, sigma])  # mirrors the edge, which is repeated here
    torch.testing.assert_close(blurred[1, :, 6:-6, 6:-6], expected[:, 6:-6, 6:-6], rtol=1e-4, atol=1e-5)


def test_moco_view_changes_the_published_share_of_images():
    """Of a thousand images: flips, greys, and the colours of those that are neither grey nor blurred."""
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    image[1] = 0.5 * image[0]
    views = augment.moco_view(image.expand(1000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert views.min() >= 0
    assert views.max() <= 1
    grey = (views[:, 0] - views[:, 1]).abs().amax((1, 2)) < 1e-6
    assert grey.float().mean() == pytest.approx(0.2, abs=0.04)
    plain = [(views - x).abs().amax((1, 2, 3)) < 1e-6 for x in (image, image.flip(2))]
    assert [p.float().mean().item() for p in plain] == pytest.approx([0.2 * 0.8 * 0.5 * 0.5] * 2, abs=0.02)
    again = augment.moco_view(image.expand(1000, -1, -1, -1), torch.Generator().manual_seed(0))
    assert torch.equal(again, views)


def test_flipped_tosses_for_each_image():
    images = torch.rand(200, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    views = augment.flipped(images, torch.Generator().manual_seed(0))
    turned = (views == images.flip(3)).flatten(1).all(1)
    assert torch.equal(views[~turned], images[~turned])
    assert turned.float().mean() == pytest.approx(0.5, abs=0.1)
