"""Pixel operations shared by several corruptions: borders, smoothing, resampling, and the recipe's last step.

Sums are loops over kernel taps, never a convolution or matrix product: the order of summation of those depends on the
batch size, and the last step of the recipe, truncation to uint8, makes every rounding error visible.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Border = Callable[[Tensor, int], Tensor]

# In grey levels: above the rounding error of the dtype, far below a visible difference.
_GUARD = {torch.float32: 2.0**-10, torch.float64: 2.0**-20}


def unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> floating point in [0, 1]."""
    return images.to(dtype) / 255


def to_uint8(x: Tensor) -> Tensor:
    """The recipe's last step: clip to [0, 1], times 255, truncate. uint8 images are not changed.

    A value just below a whole grey level by rounding error counts as that level: without the guard, a blurred white
    region becomes 254 on one device and 255 on another.
    """
    return x if x.dtype == torch.uint8 else (x.clamp(0, 1) * 255 + _GUARD[x.dtype]).to(torch.uint8)


def nearest(position: Tensor, length: int) -> Tensor:
    """Border rule a a | a b c | c c."""
    return position.clamp(0, length - 1)


def mirror(position: Tensor, length: int) -> Tensor:
    """Border rule b a | a b c | c b (SciPy's "reflect")."""
    folded = position.remainder(2 * length)
    return torch.minimum(folded, 2 * length - 1 - folded)


def mirror_101(position: Tensor, length: int) -> Tensor:
    """Border rule c b | a b c | b a (OpenCV's "reflect 101")."""
    period = max(1, 2 * length - 2)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded)


def padded(x: Tensor, reach: int, border: Border) -> Tensor:
    """(..., h, w) -> (..., h + 2 reach, w + 2 reach)."""
    return _padded(_padded(x, -2, reach, border), -1, reach, border)


def _padded(x: Tensor, dim: int, reach: int, border: Border) -> Tensor:
    length = x.shape[dim]
    return x.index_select(dim, border(torch.arange(-reach, length + reach, device=x.device), length))


def gaussian_weights(sigma: float, reach: int) -> NDArray[np.float64]:
    """The Gaussian at -reach .. reach, summing to 1."""
    weights: NDArray[np.float64] = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-12)) ** 2)
    weights /= weights.sum()
    return weights


def gaussian(x: Tensor, sigma: float, border: Border, truncate: float = 4.0) -> Tensor:
    """Gaussian smoothing of the last two dimensions as SciPy does it: the kernel ends at int(truncate sigma + .5)."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return x
    weights = gaussian_weights(sigma, reach)
    for dim in (-2, -1):
        x = _weighted(x, dim, weights, border) if 2 * reach < x.shape[dim] else _folded(x, dim, weights, border)
    return x


def _weighted(x: Tensor, dim: int, weights: NDArray[np.float64], border: Border) -> Tensor:
    """Correlation along one dimension, one step per tap."""
    length = x.shape[dim]
    around = _padded(x, dim, len(weights) // 2, border)
    out = torch.zeros_like(x)
    for tap, weight in enumerate(weights.tolist()):
        out += around.narrow(dim, tap, length) * weight
    return out


def _folded(x: Tensor, dim: int, weights: NDArray[np.float64], border: Border) -> Tensor:
    """The same for a kernel longer than the image: sums the weights of repeated pixels first; one step per pixel."""
    length, reach = x.shape[dim], len(weights) // 2
    target = torch.arange(length)[:, None]
    source = border(target + torch.arange(-reach, reach + 1), length)
    matrix = torch.zeros(length, length, dtype=torch.float64)
    matrix.index_put_((target.expand_as(source), source), torch.from_numpy(weights).expand(source.shape), True)
    matrix = matrix.to(x)
    out = torch.zeros_like(x)
    for pixel in range(length):
        column = matrix[:, pixel, None] if dim == -2 else matrix[:, pixel]
        out += x.narrow(dim, pixel, 1) * column
    return out


def at(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of (n, c, h, w) at whole rows and columns, (n, *any) each -> (n, c, *any)."""
    flat = (rows * x.shape[3] + columns).reshape(len(x), 1, -1).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, flat).reshape(*x.shape[:2], *rows.shape[1:])


def bilinear(x: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """(n, c, h, w) at fractional rows and columns, float64 (n, h, w) -> (n, c, h, w)."""
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).to(x.dtype)[:, None], (columns - left).to(x.dtype)[:, None]
    height, width = x.shape[2:]
    r0, r1 = (border(top.long() + k, height) for k in (0, 1))
    c0, c1 = (border(left.long() + k, width) for k in (0, 1))
    upper = at(x, r0, c0) * (1 - right) + at(x, r0, c1) * right
    lower = at(x, r1, c0) * (1 - right) + at(x, r1, c1) * right
    return upper * (1 - down) + lower * down


def centre_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the centre of (h, w, ...) linearly, end points on end points, and trim to the same size."""
    for dim in (0, 1):
        length = x.shape[dim]
        crop = math.ceil(length / factor)
        zoomed = round(crop * factor)
        trim = (zoomed - length) // 2
        position = np.arange(trim, trim + length) * ((crop - 1) / max(1, zoomed - 1))
        first = np.minimum(position.astype(np.int64), max(0, crop - 2))
        share = torch.from_numpy(position - first).to(x)
        share = share.reshape(-1, *[1] * (x.dim() - 1 - dim))
        start = torch.from_numpy(first + (length - crop) // 2).to(x.device)
        last = (length - crop) // 2 + crop - 1
        x = x.index_select(dim, start) * (1 - share) + x.index_select(dim, (start + 1).clamp(max=last)) * share
    return x


def motion(x: Tensor, angle: Tensor, radius: float, sigma: float) -> Tensor:
    """Blur of (n, c, h, w) along a line from each pixel at an angle (n,), in degrees clockwise from the right.

    The published generator calls ImageMagick's motion blur: width 2 radius + 1 with the radius rounded up, half a
    Gaussian, offsets rounded to whole pixels, repeated edge pixels, result rounded to 8 bits.
    """
    width_of_blur = 2 * math.ceil(radius) + 1
    steps = torch.arange(width_of_blur, device=x.device)
    weights = np.exp(-(np.arange(width_of_blur) ** 2) / (2 * sigma**2))
    radians = torch.deg2rad(angle.double())[:, None]
    down = (steps * radians.sin() - 0.5).ceil().long()
    right = (steps * radians.cos() - 0.5).ceil().long()
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)
    out = torch.zeros_like(x)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        r = nearest(rows + down[:, step, None, None], height)
        c = nearest(columns + right[:, step, None, None], width)
        out += at(x, *torch.broadcast_tensors(r, c)) * weight  # type: ignore[no-untyped-call]
    return (out * 255).round() / 255
