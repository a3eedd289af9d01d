"""MEMO beyond its golden logits: nothing is remembered, AugMix against the Python Imaging Library."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import tta
from tta.methods import _augmix as augmix


@pytest.fixture
def picture():
    """uint8 (3, 40, 48), smooth with some noise, and darker than full range."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(1, 3, 5, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (40, 48), mode="bilinear")[0] * 180 + 20
    return (smooth + 8 * torch.randn(smooth.shape, generator=generator)).clamp(0, 255).round()


def by_pil(picture, operation):
    image = Image.fromarray(picture.byte().permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(operation(image))).permute(2, 0, 1).float()


def ours(picture, operation, level=1.0, sign=1):
    out = operation(picture[None] / 255, torch.tensor([level]), torch.tensor([sign]))
    return augmix._rounded(out)[0] * 255


@pytest.mark.parametrize(
    ("operation", "level", "theirs", "largest"),
    [
        (augmix._autocontrast, 1.0, ImageOps.autocontrast, 1.01),  # they truncate
        (augmix._equalize, 1.0, ImageOps.equalize, 0.01),
        (augmix._posterize, 1.0, lambda image: ImageOps.posterize(image, 4), 0.01),
        (augmix._solarize, 0.5, lambda image: ImageOps.solarize(image, 256 - 12), 0.01),
        (augmix._solarize, 1.0, lambda image: ImageOps.solarize(image, 256 - 25), 0.01),
    ],
)
def test_colour_operations_are_those_of_pil(picture, operation, level, theirs, largest):
    picture[:, 0, :8] = torch.arange(248, 256)  # something to solarize
    assert (ours(picture, operation, level) - by_pil(picture, theirs)).abs().max() < largest


GREY = (128, 128, 128)


def affine(*coefficients):
    return lambda image: image.transform(
        image.size, Image.Transform.AFFINE, coefficients, Image.Resampling.BILINEAR, fillcolor=GREY
    )


@pytest.mark.parametrize(
    ("operation", "sign", "theirs"),
    [
        (augmix._rotate, 1, lambda image: image.rotate(3, Image.Resampling.BILINEAR, fillcolor=GREY)),
        (augmix._rotate, -1, lambda image: image.rotate(-3, Image.Resampling.BILINEAR, fillcolor=GREY)),
        (augmix._shear_x, 1, affine(1, 0.03, 0, 0, 1, 0)),
        (augmix._shear_y, -1, affine(1, 0, 0, -0.03, 1, 0)),
        (augmix._translate_x, 1, affine(1, 0, int(48 / 30), 0, 1, 0)),
        (augmix._translate_y, -1, affine(1, 0, 0, 0, 1, -int(40 / 30))),
    ],
)
def test_maps_are_those_of_pil_inside_the_border(picture, operation, sign, theirs):
    difference = (ours(picture, operation, 1.0, sign) - by_pil(picture, theirs)).abs()
    assert difference[:, 4:-4, 4:-4].max() <= 1.01


def test_views_are_images_and_follow_the_generator(picture):
    for image in (picture / 255, torch.rand(3, 120, 130)):
        first, second = (augmix.augmix_views(image, 6, torch.Generator().manual_seed(1)) for _ in range(2))
        assert first.shape == (6, *image.shape)
        assert first.min() >= 0
        assert first.max() <= 1
        assert torch.equal(first, second)
        assert len(first.unique(dim=0)) == 6


def test_nothing_is_remembered_between_images(cnn, golden_images):
    """One image after another gives what each gives alone; weights and optimizer are the source's again."""
    settings = {"augment": "none", "views": 2, "optimizer": "adamw", "lr": 1e-3}
    adapter, fresh = tta.adapt(cnn, "memo", **settings), tta.adapt(cnn, "memo", **settings).state_dict()
    logits = adapter(golden_images[:4])
    state = adapter.state_dict()
    assert all(torch.equal(state[key], value) for key, value in fresh.items())
    assert state.keys() == fresh.keys()
    alone = torch.cat([tta.adapt(cnn, "memo", **settings)(image) for image in golden_images[:4].split(1)])
    assert torch.equal(logits, alone)
    assert not torch.equal(logits, cnn.eval()(golden_images[:4]))


def test_step_lowers_the_marginal_entropy(cnn, golden_images):
    image = golden_images[:1]
    adapter = tta.adapt(cnn, "memo", augment="none", views=1, prior=None, lr=1e-3)
    (source,) = torch.distributions.Categorical(logits=cnn.eval()(image)).entropy()
    (adapted,) = torch.distributions.Categorical(logits=adapter(image)).entropy()
    assert adapted < source


def test_views_go_on_where_a_saved_state_left_off(cnn, golden_images):
    """The random numbers are part of the state, and a reset starts them anew."""
    first, second = (tta.adapt(cnn, "memo", views=2) for _ in range(2))
    whole = first(golden_images[:4])
    first.reset()
    begun = first(golden_images[:2])
    second.load_state_dict(first.state_dict())
    assert torch.equal(torch.cat([begun, second(golden_images[2:4])]), whole)
