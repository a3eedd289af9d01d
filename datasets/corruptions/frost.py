"""Pictures for the corruption ``frost``: a procedural texture, or a folder of photographs.

We may not ship the photographs of the published generator. The texture replaces them: patches of needle-like crystals on
a dark background, in cool grey-blue, at the scale of the recipe (CIFAR's shrinks the photographs to a fifth).
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image, read_file

from tta.datasets.corruptions import draws

SIDE = {"cifar": 256, "imagenet": 512}  # of a texture, in pixels; it repeats seamlessly
# Scale of the crystals. With 5, as in the photographs, an image of 224 pixels would show too few of them.
_SCALE = {"cifar": 1.0, "imagenet": 3.0}
_STRIDE = {"cifar": 5, "imagenet": 1}  # of the used pixels of a photograph
_SUFFIXES = {".png", ".jpg", ".jpeg"}
# Mean and standard deviation of the five textures before clipping, from thin to dense; on average .45 and .2.
_LOOKS = ((0.45, 0.20), (0.38, 0.21), (0.52, 0.19), (0.41, 0.22), (0.49, 0.18))
_TINT = (0.93, 1.0, 1.07)  # ice is slightly blue
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
    return tuple(_texture(number, *look, SIDE[recipe], _SCALE[recipe]) for number, look in enumerate(_LOOKS))


def photographs(folder: str | Path) -> tuple[Tensor, ...]:
    """All pictures of a folder (.png, .jpg, .jpeg), sorted by name: uint8 (3, height, width) each, on the CPU.

    Raises:
        ValueError: the folder does not exist or has no picture.
    """
    files = sorted(file for file in Path(folder).glob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise ValueError(
            f"frost_photographs is a folder with at least one .png, .jpg or .jpeg file; found none in '{folder}'. "
            "Leave it out for the procedural texture."
        )
    return tuple(decode_image(read_file(str(file)), mode=ImageReadMode.RGB) for file in files)


def _texture(number: int, mean: float, std: float, side: int, scale: float) -> Tensor:
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
    grains = smooth(-2, 0.6, 0.6)
    cover = smooth(-3, 24.0, 24.0)
    height = _standard(_standard(feathers) + 0.7 * veins + 0.35 * grains + 0.8 * cover)
    # Bright crystals on a dark background: the exponential gives a mostly dark distribution with a bright tail.
    height = _standard(height.mul(0.45).exp())
    tint = torch.tensor(_TINT, dtype=height.dtype)[:, None, None]
    return ((mean + std * height) * tint).clamp(0, 1).mul(255).round().to(torch.uint8)


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
