"""Blur corruptions: their draws (``draw_...``) and their effect; the constants are in ``recipes.py``."""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions import pixels
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size
from tta.datasets.corruptions.pixels import to_uint8, unit

_NEGLIGIBLE = 1e-9  # smaller weights change no grey level


def gaussian_blur(images: Tensor, draws: Draws, sigma: float) -> Tensor:
    return pixels.gaussian(unit(images, torch.float64), sigma, pixels.nearest)


@lru_cache(maxsize=16)
def _disk(radius: float, alias_sigma: float) -> NDArray[np.float64]:
    """The antialiased disk of the recipe, a square of weights with odd sides.

    As published, disks of radius 8 and 10 touch the border of the square; its reflection adds to their weights and
    brightens images by about 1 %.
    """
    half = 8 if radius <= 8 else math.ceil(radius)
    soft = 1 if radius <= 8 else 2
    grid = np.arange(-half, half + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(np.float64)
    weights = pixels.gaussian_weights(alias_sigma, soft)
    padded = np.pad(disk / disk.sum(), soft, mode="reflect")
    padded = sum(w * padded[k : k + len(grid)] for k, w in enumerate(weights))
    return np.asarray(sum(w * padded[:, k : k + len(grid)] for k, w in enumerate(weights)))


def defocus_blur(images: Tensor, draws: Draws, setting: tuple[float, float]) -> Tensor:
    kernel = _disk(*setting)
    reach = len(kernel) // 2
    height, width = images.shape[2:]
    # float64: the weight beside a narrow kernel's centre is of the order of float32's rounding error, and truncates
    padded = pixels.padded(unit(images, torch.float64), reach, pixels.mirror_101)
    out = torch.zeros_like(images, dtype=torch.float64)
    for row, weights in enumerate(kernel[: reach + 1].tolist()):
        if max(weights) < _NEGLIGIBLE:
            continue
        pair = padded[..., row : row + height, :]
        if row < reach:  # the kernel is symmetric: add the two rows with equal weights first
            pair = pair + padded[..., 2 * reach - row : 2 * reach - row + height, :]
        for column, weight in enumerate(weights):
            if weight > _NEGLIGIBLE:
                out += pair[..., column : column + width] * weight
    return out


def draw_neighbours(keys: Keys, setting: tuple[float, int, int], size: Size) -> Draws:
    _, reach, passes = setting

    def offsets(axis: str) -> Tensor:
        drawn = random.uniform(keys(axis), (passes, *size))
        return ((drawn * (2 * reach)).floor() - reach).to(torch.int8)

    return {"rows": offsets("rows"), "columns": offsets("columns")}


def glass_blur(images: Tensor, draws: Draws, setting: tuple[float, int, int]) -> Tensor:
    """Smooth, let each pixel copy a neighbour, smooth again.

    The published line swaps ``x[h, w]`` and ``x[h', w']`` of an array (H, W, 3), which are views: the second assignment
    reads what the first has written, so the pixel takes its neighbour's value and the neighbour keeps its own.
    """
    sigma, reach, passes = setting
    height, width = images.shape[2:]
    pixel = torch.arange(height * width, device=images.device)
    row, column = pixel // width, pixel % width
    visited = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    x = to_uint8(gaussian_blur(images, {}, sigma)).flatten(2)
    for number in range(passes):
        offset = draws["rows"][:, number].long() * width + draws["columns"][:, number].long()
        source = torch.where(visited, pixel + offset.flatten(1), pixel)
        # Pixels are visited from the last to the first. A source visited before holds a copy itself: follow the chain to
        # its end, doubling the stride. With offsets of -1 and 0 no source was visited, and the pass is one gather.
        link = torch.where(visited[source] & (source > pixel), source, pixel)
        while not torch.equal(further := link.gather(1, link), link):
            link = further
        source = source.gather(1, link)
        x = x.gather(2, source[:, None].expand(-1, 3, -1))
    return gaussian_blur(x.reshape(images.shape), {}, sigma)


def draw_angle(low: float, high: float) -> Callable[[Keys, Setting, Size], Draws]:
    def angle(keys: Keys, setting: Setting, size: Size) -> Draws:
        return {"angle": (random.uniform(keys("angle"), ()) * (high - low) + low).float()}

    return angle


def motion_blur(images: Tensor, draws: Draws, setting: tuple[float, float]) -> Tensor:
    return pixels.motion(unit(images), draws["angle"], *setting)


def zoom_blur(images: Tensor, draws: Draws, setting: tuple[float, float, float]) -> Tensor:
    factors = np.arange(*setting)  # as published: rounding error decides whether the end is included
    x = unit(images.permute(2, 3, 0, 1).contiguous())
    out = x.clone()
    for factor in factors.tolist():
        out += pixels.centre_zoom(x, factor)
    return (out / (len(factors) + 1)).permute(2, 3, 0, 1)
