"""Corruptions by light, processing and storage: their draws (``draw_...``) and their effect; the constants are in
``recipes.py``."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions import pixels
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size
from tta.datasets.corruptions.pixels import unit


def brightness(images: Tensor, draws: Draws, lift: float) -> Tensor:
    x = unit(images)
    value = x.amax(1, keepdim=True)
    lifted = (value + lift).clamp(max=1)
    # Hue and saturation stay if the channels keep their ratios. Black has no hue and becomes grey.
    return torch.where(value > 0, x / value.clamp(min=1 / 255) * lifted, lifted)


def saturate(images: Tensor, draws: Draws, setting: tuple[float, float]) -> Tensor:
    times, plus = setting
    x = unit(images)
    value = x.amax(1, keepdim=True)
    below = value - x  # hue and value stay if the channels keep the ratios of their distances to the largest one
    spread = below.amax(1, keepdim=True)
    saturation = spread / value.clamp(min=1 / 255)
    target = (saturation * times + plus).clamp(0, 1)
    # Grey has no hue; the published code makes it red.
    red = torch.tensor([0.0, 1.0, 1.0], device=x.device)[:, None, None]
    return value - value * target * torch.where(spread > 0, below / spread.clamp(min=1 / 255), red)


def contrast(images: Tensor, draws: Draws, keep: float) -> Tensor:
    levels = images.sum((2, 3), keepdim=True)  # whole numbers: exact in any order of summation
    mean = (levels.double() / (255 * images.shape[2] * images.shape[3])).float()
    return (unit(images) - mean) * keep + mean


def draw_elastic(keys: Keys, setting: Setting, size: Size) -> Draws:
    shapes = {"points": (3, 2), "rows": size, "columns": size}
    return {what: (random.uniform(keys(what), shape) * 2 - 1).float() for what, shape in shapes.items()}


def elastic_transform(images: Tensor, draws: Draws, setting: tuple[float, float, float]) -> Tensor:
    affine, elastic = _moves(images, draws, setting)
    moved = pixels.bilinear(unit(images), *affine, pixels.mirror_101)
    return moved if elastic is None else pixels.bilinear(moved, *elastic, pixels.mirror)


def elastic_masks(masks: Tensor, draws: Draws, setting: tuple[float, float, float]) -> Tensor:
    """Masks (n, height, width) of images that :func:`elastic_transform` moves: each pixel's class is that of the nearest."""
    x = masks[:, None]
    for grid, border in zip(_moves(x, draws, setting), (pixels.mirror_101, pixels.mirror), strict=True):
        if grid is not None:
            places = (border(part.round().long(), size) for part, size in zip(grid, x.shape[2:], strict=True))
            x = pixels.at(x, *places)
    return x[:, 0]


def _moves(
    images: Tensor, draws: Draws, setting: tuple[float, float, float]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    """Rows and columns that each pixel is taken from: by the affine map, then by the elastic one, if there is one."""
    amplitude, sigma, jitter = setting
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device, dtype=torch.float64)[:, None]
    columns = torch.arange(width, device=images.device, dtype=torch.float64)
    third = min(height, width) // 3
    middle = (height // 2, width // 2)
    corners = [(third, third), (third, -third), (-third, -third)]
    points = rows.new_tensor([(middle[0] + a, middle[1] + b) for a, b in corners])
    x, y = _affine_back(points, points + draws["points"].double() * jitter, columns, rows)
    if amplitude == 0:
        return (y, x), None
    down, right = (
        pixels.gaussian(draws[axis].double(), sigma, pixels.mirror, 3.0) * amplitude for axis in ("rows", "columns")
    )
    return (y, x), (rows + down, columns + right)


def _affine_back(points: Tensor, moved: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Points (x, y) mapped back by the affine map that moves three points (3, 2) to (n, 3, 2): (n, h, w) each."""
    edges = points[:2] - points[2]
    (ax, ay), (bx, by) = ((moved[:, k] - moved[:, 2])[:, :, None, None].unbind(1) for k in (0, 1))
    px, py = (grid - origin[:, None, None] for grid, origin in zip((x, y), moved[:, 2].unbind(1), strict=True))
    area = ax * by - ay * bx
    a, b = (px * by - py * bx) / area, (py * ax - px * ay) / area  # (x, y) in terms of the moved edges
    back_x, back_y = (points[2, k] + a * edges[0, k] + b * edges[1, k] for k in (0, 1))
    return back_x, back_y


def pixelate(images: Tensor, draws: Draws, share: float) -> Tensor:
    height, width = images.shape[2:]
    small = _box_resize(_box_resize(images, 3, max(1, int(width * share))), 2, max(1, int(height * share)))
    return _box_resize(_box_resize(small, 3, width), 2, height)


def _box_resize(images: Tensor, dim: int, length: int) -> Tensor:
    """Pillow's BOX filter along one dimension, uint8 -> uint8: mean of the pixels with their centre in the box."""
    there = images.shape[dim]
    scale = there / length
    box = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    distance = (np.arange(there)[:, None] + 0.5 - centres) / box
    inside = (distance > -0.5) & (distance <= 0.5)  # (there, length)
    first, count = inside.argmax(0), inside.sum(0)
    shape = (length, 1) if dim == 2 else (length,)

    def tensor(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(images.device)

    size = list(images.shape)
    size[dim] = length
    total = torch.zeros(size, dtype=torch.int64, device=images.device)
    for tap in range(int(count.max())):
        taken = images.index_select(dim, tensor((first + tap).clip(max=there - 1)))
        total += taken * tensor(tap < count).reshape(shape)
    parts = tensor(count).reshape(shape)
    return ((2 * total + parts) // (2 * parts)).to(torch.uint8)


def jpeg_compression(images: Tensor, draws: Draws, quality: int) -> Tensor:
    out = torch.empty_like(images, device="cpu")
    for number, image in enumerate(images.cpu()):
        out[number] = decode_jpeg(encode_jpeg(image, quality=quality))
    return out.to(images.device)
