"""The common corruptions at five severities, as batched tensor operations on the images' device.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
The constants and the steps are those of the published generator. Its random draws are not reproducible; ours are: each
is a hash of image number, seed, corruption and severity (``tta.datasets.corruptions.draws``). Drawing (:func:`draw`) and
applying (:func:`apply`) are separate, so that known draws can be used.

Between whole severities the constants are interpolated linearly, starting at severity 0, which does not change the image.
This follows the generator of Press et al., "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023, for the ImageNet recipe of fourteen corruptions and brightness. Special cases: for shot noise
the inverse of the photon count is interpolated; reach and passes of glass blur and the quality of a JPEG are rounded to
integers; the radius of a motion blur is rounded up. Cases that the generator does not cover are ours: the other recipe;
the three other corruptions (spatter has whole severities only, because water cannot turn into mud gradually); and defocus
blur at 4.25 and 4.75, whose disk here has a centre pixel (there it has none, which moves the image by half a pixel).
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path

import torch
from torch import Tensor

from tta.datasets.corruptions import blur, digital, noise, pixels, spatter, weather
from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions import frost as ice
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size

CORRUPTIONS: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
# Tune on these and report on the fifteen.
VALIDATION_CORRUPTIONS: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
RECIPES: tuple[str, ...] = ("cifar", "imagenet")
HIGHEST, QUARTERS = 5, 4  # severities are 0 to 5 in steps of a quarter

_VALUES_AT_ONCE = 2**19  # larger batches are processed in parts, so that intermediate results stay in the cache


def corrupt(
    images: Tensor,
    name: str,
    severity: float = 3,
    seed: int = 0,
    recipe: str = "cifar",
    index: Tensor | None = None,
    *,
    frost_photographs: str | Path | None = None,
) -> Tensor:
    """Damage images by one of the common corruptions; the same image number gives the same damage in any batch.

    Args:
        images: (n, 3, height, width), uint8.
        name: one of ``CORRUPTIONS`` or ``VALIDATION_CORRUPTIONS``.
        severity: 0 to 5 in steps of 0.25; the data sets have 1 to 5, and 0 does not change the images.
        seed: of the draws.
        recipe: set of constants; ``"cifar"`` is for images of about 32 pixels, ``"imagenet"`` for about 224.
        index: (n,), int64, image numbers that seed the draws; default: ``0 .. n-1``.
        frost_photographs: folder of pictures that ``frost`` uses instead of the procedural texture; other corruptions
            ignore it. Of the published frost1 to frost6 the sixth is never drawn, as in the released generators.

    Returns:
        (n, 3, height, width), uint8, on the images' device.

    Raises:
        ValueError: unknown name, severity or recipe; images or index of another type or shape; a folder without
            pictures, or pictures smaller than the images.

    Source: Hendrycks and Dietterich, ICLR 2019.

    Example:
        >>> import torch
        >>> corrupt(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "fog", severity=3).shape
        torch.Size([2, 3, 32, 32])
    """
    constants(name, severity, recipe)
    _check_images(images)
    if index is None:
        index = torch.arange(len(images))
    elif index.shape != (len(images),):
        raise ValueError(
            f"index has one image number for each of the {len(images)} images, shape ({len(images)},); got shape "
            f"{tuple(index.shape)}."
        )
    size = (images.shape[2], images.shape[3])
    pictures = _frost_pictures(name, recipe, frost_photographs, size)
    part = max(1, _VALUES_AT_ONCE // max(1, math.prod(images.shape[1:])))
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), part):
        at = slice(start, start + part)
        drawn = draw(name, index[at], severity=severity, seed=seed, size=size, recipe=recipe, device=images.device)
        out[at] = _apply(name, images[at], drawn, severity, recipe, pictures)
    return out


def corrupt_masks(
    masks: Tensor, name: str, severity: float = 3, seed: int = 0, recipe: str = "cifar", index: Tensor | None = None
) -> Tensor:
    """Masks of images that :func:`corrupt` damages with the same settings: they move with the pixels of ``elastic_transform``.

    The other corruptions change or blur pixels where they are (``glass_blur`` by 1 to 4 of them) and leave masks alone.

    Args:
        masks: (n, height, width), of the size of the images.
        name, severity, seed, recipe, index: as of :func:`corrupt`.

    Returns:
        As ``masks``.
    """
    setting = constants(name, severity, recipe)
    if name != "elastic_transform" or not severity:
        return masks
    index = torch.arange(len(masks)) if index is None else index
    size = (masks.shape[1], masks.shape[2])
    drawn = draw(name, index, severity=severity, seed=seed, size=size, recipe=recipe, device=masks.device)
    return digital.elastic_masks(masks, drawn, setting)


def draw(
    name: str,
    index: Tensor,
    *,
    severity: float,
    seed: int,
    size: Size,
    recipe: str = "cifar",
    device: torch.device | str | None = None,
) -> Draws:
    """The random numbers of one corruption, for :func:`apply`. All are (n, ...).

    ============== =================================================================================================
    gaussian_noise ``noise`` (3, H, W) standard normal; speckle_noise too
    shot_noise     ``uniform`` (3, H, W) float64 in [0, 1): quantile of the Poisson distribution of a value
    impulse_noise  ``uniform`` (3, H, W) in [0, 1): below half the fraction gives 0, below the fraction gives 1
    glass_blur     ``rows``, ``columns`` (passes, H, W) int8: offsets of the pixel that each pixel copies
    motion_blur    ``angle`` () in degrees
    snow           ``layer`` (H, W) standard normal; ``angle`` () in degrees
    frost          ``picture``, ``top``, ``left`` () in [0, 1): choice of the picture, start of its crop
    fog            ``plasma`` (S, S) in [-1, 1): the displacement of each point; S is the power of 2 that covers H and W
    elastic_transform ``points`` (3, 2) in [-1, 1): jitter of three points (x, y); ``rows``, ``columns`` (H, W) in
                   [-1, 1): the raw displacement fields
    spatter        ``layer`` (H, W) standard normal
    ============== =================================================================================================

    The others draw nothing.

    Args:
        name: one of ``CORRUPTIONS`` or ``VALIDATION_CORRUPTIONS``.
        index: (n,), int64, image numbers.
        severity: as in :func:`corrupt`; each severity has its own draws, as in the published data sets.
        seed: any integer.
        size: (height, width) of the images.
        recipe: set of constants.
        device: of the numbers, which are the same on every device; default: that of ``index``.

    Raises:
        ValueError: unknown name, severity or recipe; an index that is not a list of integers.
    """
    setting = constants(name, severity, recipe)
    if not severity:
        return {}
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"index is a tensor (n,) of int64 image numbers; got {index.dtype} of shape {tuple(index.shape)}. "
            "Give torch.arange(n) for images without numbers."
        )
    index = index.to(device=index.device if device is None else device, dtype=torch.int64)

    def keys(purpose: str) -> Tensor:
        return random.keys(index, seed=seed, purpose=f"{name} {severity:g} {purpose}")

    return _TABLE[name].draw(keys, setting, size)


def apply(
    name: str,
    images: Tensor,
    draws: Draws,
    *,
    severity: float,
    recipe: str = "cifar",
    frost_photographs: str | Path | None = None,
) -> Tensor:
    """Damage images with given draws: the second step of :func:`corrupt`, after :func:`draw`.

    Args:
        name: one of ``CORRUPTIONS`` or ``VALIDATION_CORRUPTIONS``.
        images: (n, 3, height, width), uint8.
        draws: from :func:`draw`, on the images' device.
        severity: as in :func:`corrupt`.
        recipe: set of constants.
        frost_photographs: folder of pictures that ``frost`` uses instead of the procedural texture.

    Returns:
        (n, 3, height, width), uint8, on the images' device.

    Raises:
        ValueError: as in :func:`corrupt`.
    """
    constants(name, severity, recipe)
    _check_images(images)
    size = (images.shape[2], images.shape[3])
    return _apply(name, images, draws, severity, recipe, _frost_pictures(name, recipe, frost_photographs, size))


def _apply(
    name: str, images: Tensor, draws: Draws, severity: float, recipe: str, pictures: Sequence[Tensor] | None
) -> Tensor:
    if not severity:
        return images.clone()
    setting = constants(name, severity, recipe)
    further = () if pictures is None else (pictures,)
    damaged: Tensor = _TABLE[name].apply(images.contiguous(), draws, setting, *further)
    return pixels.to_uint8(damaged)


def _frost_pictures(name: str, recipe: str, folder: str | Path | None, size: Size) -> Sequence[Tensor] | None:
    return ice.pictures(recipe, folder, size) if name == "frost" else None


def constants(name: str, severity: float, recipe: str) -> Setting:
    """The constants of a corruption at a severity; raises a ValueError for an unknown name, recipe or severity."""
    if name not in _TABLE:
        match = difflib.get_close_matches(str(name), _TABLE, n=1, cutoff=0.5)
        hint = f" Did you mean '{match[0]}'?" if match else ""
        raise ValueError(f"No corruption '{name}'.{hint} There are: {', '.join(_TABLE)}.")
    if recipe not in RECIPES:
        raise ValueError(f"No recipe '{recipe}' for generating corruptions. There are: {', '.join(RECIPES)}.")
    if not isinstance(severity, Real) or QUARTERS * severity not in range(QUARTERS * HIGHEST + 1):
        raise ValueError(f"severity is 0 (none) to 5, in steps of 0.25; got {severity!r}.")
    row = _TABLE[name]
    settings = row.cifar if recipe == "cifar" else row.imagenet
    whole = int(severity)
    share = float(severity) - whole
    if not share:
        return settings[whole]
    if row.between is None:
        raise ValueError(f"{name} has whole severities only; got {severity!r}.")
    return row.between(settings[whole], settings[whole + 1], share)


def _check_images(images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise ValueError(
            f"images are a uint8 tensor (n, 3, height, width); got {type(images).__name__}. "
            "An array (n, height, width, 3) becomes one by torch.from_numpy(images).permute(0, 3, 1, 2)."
        )
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(
            f"images are uint8 of shape (n, 3, height, width); got {images.dtype} of shape {tuple(images.shape)}. "
            "Images in [0, 1] become uint8 by (images * 255).round().to(torch.uint8), grey ones have three channels "
            "by images.expand(-1, 3, -1, -1)."
        )


def _linear(below: Setting, above: Setting, share: float) -> Setting:
    if isinstance(below, tuple):
        return tuple(_linear(a, b, share) for a, b in zip(below, above, strict=True))
    return below + (above - below) * share


def _photons(below: float, above: float, share: float) -> float:
    return 1 / float(_linear(1 / below, 1 / above, share))


def _swaps(below: Setting, above: Setting, share: float) -> Setting:
    sigma, reach, passes = _linear(below, above, share)
    return sigma, max(1, round(reach)), round(passes)


def _whole(below: int, above: int, share: float) -> int:
    return round(float(_linear(below, above, share)))


@dataclass(frozen=True)
class _Corruption:
    draw: Callable[[Keys, Setting, Size], Draws]
    apply: Callable[..., Tensor]
    cifar: tuple[Setting, ...]  # constants at severity 0 (they leave an image alone) to 5
    imagenet: tuple[Setting, ...]
    between: Callable[[Setting, Setting, float], Setting] | None = _linear


def _draw_nothing(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {}


def _times(side: float, *settings: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(side * value for value in setting) for setting in settings)


_TABLE: dict[str, _Corruption] = {
    # standard deviation
    "gaussian_noise": _Corruption(
        noise.draw_normal,
        noise.gaussian_noise,
        cifar=(0, 0.04, 0.06, 0.08, 0.09, 0.10),
        imagenet=(0, 0.08, 0.12, 0.18, 0.26, 0.38),
    ),
    # photons of a white pixel
    "shot_noise": _Corruption(
        noise.draw_uniform,
        noise.shot_noise,
        cifar=(math.inf, 500, 250, 100, 75, 50),
        imagenet=(math.inf, 60, 25, 12, 5, 3),
        between=_photons,
    ),
    # fraction of the values
    "impulse_noise": _Corruption(
        noise.draw_uniform,
        noise.impulse_noise,
        cifar=(0, 0.01, 0.02, 0.03, 0.05, 0.07),
        imagenet=(0, 0.03, 0.06, 0.09, 0.17, 0.27),
    ),
    # radius, sigma of the antialiasing
    "defocus_blur": _Corruption(
        _draw_nothing,
        blur.defocus_blur,
        cifar=((0, 0), (0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        imagenet=((0, 0), (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
    ),
    # sigma, reach, passes
    "glass_blur": _Corruption(
        blur.draw_neighbours,
        blur.glass_blur,
        cifar=((0, 0, 0), (0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        imagenet=((0, 0, 0), (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        between=_swaps,
    ),
    # radius, sigma
    "motion_blur": _Corruption(
        blur.draw_angle(-45, 45),
        blur.motion_blur,
        cifar=((0, 0), (6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        imagenet=((0, 0), (10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
    ),
    # first zoom, end, step
    "zoom_blur": _Corruption(
        _draw_nothing,
        blur.zoom_blur,
        cifar=((1, 1, 0.01), (1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01)),
        imagenet=((1, 1, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.02), (1, 1.26, 0.02), (1, 1.31, 0.03)),
    ),
    # mean, standard deviation, zoom, threshold, radius, sigma, share of the image that is kept
    "snow": _Corruption(
        weather.draw_snow,
        weather.snow,
        cifar=(
            (0.1, 0.2, 1, 1, 8, 3, 1),
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        imagenet=(
            (0.1, 0.3, 3, 1, 10, 4, 1),
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
    ),
    # share of the image, share of the frost
    "frost": _Corruption(
        weather.draw_crop,
        weather.frost,
        cifar=((1, 0), (1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45)),
        imagenet=((1, 0), (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)),
    ),
    # strength, decay
    "fog": _Corruption(
        weather.draw_plasma,
        weather.fog,
        cifar=((0, 3), (0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        imagenet=((0, 2), (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
    ),
    # added to the value of HSV
    "brightness": _Corruption(
        _draw_nothing, digital.brightness, cifar=(0, 0.05, 0.1, 0.15, 0.2, 0.3), imagenet=(0, 0.1, 0.2, 0.3, 0.4, 0.5)
    ),
    # share of the contrast that is kept
    "contrast": _Corruption(
        _draw_nothing, digital.contrast, cifar=(1, 0.75, 0.5, 0.4, 0.3, 0.15), imagenet=(1, 0.4, 0.3, 0.2, 0.1, 0.05)
    ),
    # amplitude, sigma, jitter; given in sides of an image -> pixels
    "elastic_transform": _Corruption(
        digital.draw_elastic,
        digital.elastic_transform,
        cifar=_times(
            32, (0, 0, 0), (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
        ),
        # 244 instead of 224 is a mistake in the published code, and so in the published files.
        imagenet=(
            (0, 999, 0),
            *_times(244, (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02)),
        ),
    ),
    # share of the pixels along a side
    "pixelate": _Corruption(
        _draw_nothing, digital.pixelate, cifar=(1, 0.95, 0.9, 0.85, 0.75, 0.65), imagenet=(1, 0.6, 0.5, 0.4, 0.3, 0.25)
    ),
    # quality
    "jpeg_compression": _Corruption(
        _draw_nothing,
        digital.jpeg_compression,
        cifar=(85, 80, 65, 58, 50, 40),
        imagenet=(85, 25, 18, 15, 10, 7),
        between=_whole,
    ),
    # standard deviation, in units of the value
    "speckle_noise": _Corruption(
        noise.draw_normal,
        noise.speckle_noise,
        cifar=(0, 0.06, 0.1, 0.12, 0.16, 0.2),
        imagenet=(0, 0.15, 0.2, 0.35, 0.45, 0.6),
    ),
    # sigma
    "gaussian_blur": _Corruption(
        _draw_nothing, blur.gaussian_blur, cifar=(0, 0.4, 0.6, 0.7, 0.8, 1), imagenet=(0, 1, 2, 3, 4, 6)
    ),
    # mean, standard deviation, sigma, threshold, strength of the water or sigma of the mud, 0 for water and 1 for mud
    "spatter": _Corruption(
        spatter.draw_layer,
        spatter.spatter,
        cifar=(
            None,
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        imagenet=(
            None,
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        between=None,
    ),
    # saturation of HSV: times, plus
    "saturate": _Corruption(
        _draw_nothing,
        digital.saturate,
        cifar=((1, 0), (0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
        imagenet=((1, 0), (0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    ),
}
