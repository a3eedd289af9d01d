"""Pictures for the corruption ``frost``: a procedural texture, or a folder of photographs.

We may not ship the photographs of the published generator. The texture replaces them: patches of needle-like crystals in
cool grey-blue, at the scale of the recipe (CIFAR's shrinks the photographs to a fifth), five pictures that are as bright,
as uneven and as tinted as the five photographs that it uses. CIFAR-10 images have a PSNR of 18.2, 14.8, 13.9, 14.7 and
14.9 dB at severity 1 to 5 of CIFAR's recipe; with the photographs 18.3, 14.9, 14.0, 14.8 and 15.0 dB.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from tta.datasets.corruptions import draws

SIDE = {"cifar": 256, "imagenet": 512}  # of a texture, in pixels; it repeats seamlessly
# Scale of the crystals. With 5, as in the photographs, an image of 224 pixels would show too few of them.
_SCALE = {"cifar": 1.0, "imagenet": 3.0}
_RELEASED = {f"frost{number}" for number in range(1, 7)}  # names of the published photographs, without their endings
_STRIDE = {"cifar": 5, "imagenet": 1}  # of the used pixels of a photograph
_SUFFIXES = {".png", ".jpg", ".jpeg"}


class _Look(NamedTuple):
    """Statistics of a picture, before clipping.

    Attributes:
        mean, std: of its grey levels in [0, 1].
        skew: above 0 bright crystals on a dark ground, below 0 dark gaps in a bright cover.
        tint: of red, green and blue, on average 1; ice is more or less blue.
    """

    mean: float
    std: float
    skew: float
    tint: tuple[float, float, float]


# Those of the five photographs that the released generator draws from (the grey levels at a fifth of their size), so that
# an image loses as much as there.
_LOOKS = (
    _Look(0.513, 0.075, 0.2, (0.59, 1.14, 1.27)),
    _Look(0.811, 0.085, -0.2, (0.97, 0.99, 1.04)),
    _Look(0.811, 0.085, -0.2, (0.97, 0.99, 1.04)),
    _Look(0.597, 0.122, 0.1, (0.91, 1.01, 1.08)),
    _Look(0.484, 0.172, 0.3, (0.91, 1.00, 1.09)),
)
_ORIENTATIONS = 7


def pictures(recipe: str, folder: str | Path | None, size: tuple[int, int]) -> Sequence[Tensor]:
    """Pictures of frost at the recipe's scale: the photographs of a folder, or textures of at least this size."""
    if folder is None:
        copies = [math.ceil(side / SIDE[recipe]) for side in size]
        return [texture.repeat(1, *copies) for texture in textures(recipe)]
    every = _STRIDE[recipe]
    # OpenCV's linear resize to 20 % takes the middle one of five pixels.
    return [photo[:, every // 2 :: every, every // 2 :: every] for photo in photographs(folder)]


@lru_cache(maxsize=2)
def textures(recipe: str = "cifar") -> tuple[Tensor, ...]:
    """Five procedural pictures of frost, always the same: uint8 (3, side, side) each, on the CPU."""
    return tuple(_texture(number, look, SIDE[recipe], _SCALE[recipe]) for number, look in enumerate(_LOOKS))


def photographs(folder: str | Path) -> tuple[Tensor, ...]:
    """All pictures of a folder (.png, .jpg, .jpeg), sorted by name: uint8 (3, height, width) each, on the CPU.

    Of the six published photographs, frost1 to frost6, the first five: the released generators list all six and draw from
    the first five, so that the sixth, the darkest, is in no published image. A folder of other names, or of some of these
    and others, is used as it is.

    Raises:
        ValueError: the folder does not exist or has no picture.
    """
    every = sorted(file for file in Path(folder).glob("[!.]*") if file.suffix.lower() in _SUFFIXES)
    files = every[:-1] if [file.stem.lower() for file in every] == sorted(_RELEASED) else every
    if not files:
        raise ValueError(
            f"frost_photographs is a folder with at least one .png, .jpg or .jpeg file; found none in '{folder}'. "
            "Leave it out for the procedural texture."
        )
    return tuple(decode_image(read_file(str(file)), mode=ImageReadMode.RGB) for file in files)


def _texture(number: int, look: _Look, side: int, scale: float) -> Tensor:
    seeds = draws.keys(torch.tensor([number]), seed=0, purpose="frost texture")
    noise = draws.normal(seeds, (2 * _ORIENTATIONS + 3, side, side))[0].double()
    waves = torch.fft.fft2(noise)

    def smooth(field: int, along: float, across: float, angle: float = 0.0) -> Tensor:
        return _smooth(waves[field], scale * along, scale * across, angle)

    def needles(field: int) -> Tensor:
        """Thin bright needles in one direction, of three sizes."""
        angle = field * math.pi / _ORIENTATIONS
        sizes = ((1.0, 14.0, 2.0), (0.6, 8.0, 1.2), (0.4, 4.0, 0.6))
        layers = [weight * _ridged(smooth(field, along, across, angle)) for weight, along, across in sizes]
        return _standard(torch.stack(layers).sum(0))

    # Crystals grow in patches: each has one main orientation, chosen by the largest of smooth random fields.
    patches = torch.stack([smooth(n, 12.0, 12.0) for n in range(_ORIENTATIONS, 2 * _ORIENTATIONS)])
    crystals = torch.stack([needles(n) for n in range(_ORIENTATIONS)])
    feathers = (crystals * (2.5 * patches).softmax(0)).sum(0)
    veins = _standard(sum(_ridged(smooth(-1, width, width)) / 2**k for k, width in enumerate((10.0, 5.0, 2.5, 1.25))))
    # Fine grains are what hides an image's own detail: with them neighbouring pixels correlate by .6 at CIFAR's scale, as
    # in the photographs, and a ResNet-20 errs on 32 % at severity 5; with a third of them by .84, and on 24 %.
    grains = smooth(-2, 0.3, 0.3)
    cover = smooth(-3, 24.0, 24.0)
    height = _standard(_standard(feathers) + 0.7 * veins + 1.2 * grains + 0.8 * cover)
    # The exponential gives a long tail on one side: bright crystals on a dark ground, or dark gaps in a bright cover.
    height = _standard(height.mul(look.skew).exp()) * math.copysign(1, look.skew)
    tint = torch.tensor(look.tint, dtype=height.dtype)[:, None, None]
    return ((look.mean + look.std * height) * tint).clamp(0, 1).mul(255).round().to(torch.uint8)


def _ridged(field: Tensor) -> Tensor:
    """Bright where the field crosses zero: curves instead of blobs."""
    return (1 - field.abs()).clamp(min=0).square()


def _smooth(waves: Tensor, along: float, across: float, angle: float) -> Tensor:
    """Noise, given by its transform, smoothed by a rotated Gaussian (sigmas in pixels); periodic, mean 0, deviation 1."""
    rows, columns = torch.meshgrid(*[torch.fft.fftfreq(len(waves), dtype=torch.float64)] * 2, indexing="ij")
    u = columns * math.cos(angle) + rows * math.sin(angle)
    v = rows * math.cos(angle) - columns * math.sin(angle)
    response = (-2 * torch.pi**2 * ((along * u) ** 2 + (across * v) ** 2)).exp()
    return _standard(torch.fft.ifft2(waves * response).real)


def _standard(field: Tensor) -> Tensor:
    return (field - field.mean()) / field.std()
