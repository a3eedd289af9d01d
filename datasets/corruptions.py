"""The fifteen common corruptions at five severities, as batched tensor operations on the images' device.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
The constants and the steps are those of the published generator; its random draws are not reproducible, ours are: each
is a hash of image number, seed, corruption and severity (``tta.datasets.draws``). Drawing (:func:`draw`) and
applying (:func:`apply`) are separate, so that known draws can be put in.

Sums are written as loops over kernel taps and never as a convolution or matrix product: those choose another order of
summation for another batch size, and the last step of the recipe, truncation to uint8, shows every rounding error.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.io import decode_jpeg, encode_jpeg

from tta.datasets import draws as random
from tta.datasets import frost

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
RECIPES: tuple[str, ...] = ("cifar",)

Draws = dict[str, Tensor]
Size = tuple[int, int]
Setting = Any  # one column of a row of the table: a number or a tuple, as the corruption's functions take it

_VALUES_AT_ONCE = 2**21  # larger batches are worked through in parts: intermediate results stay in cache and bounded
# in grey levels: above the rounding error of the type, far below what anybody sees
_GUARD = {torch.float32: 2.0**-10, torch.float64: 2.0**-20}


def corrupt(
    images: Tensor,
    name: str,
    *,
    severity: int = 5,
    seed: int = 0,
    recipe: str = "cifar",
    index: Tensor | None = None,
    frost_photographs: str | Path | None = None,
) -> Tensor:
    """Damage images by one of the fifteen common corruptions; the same image number gives the same damage in any batch.

    Args:
        images: (n, 3, height, width), uint8.
        name: one of ``CORRUPTIONS``.
        severity: 1 to 5.
        seed: of the draws.
        recipe: whose constants; ``"cifar"`` is made for images of about 32 pixels.
        index: (n,), int64, image numbers that seed the draws; ``0 .. n-1`` if left out.
        frost_photographs: folder of pictures that ``frost`` uses in place of the procedural texture; the others
            ignore it.

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
    _setting(name, severity, recipe)
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


def draw(
    name: str,
    index: Tensor,
    *,
    severity: int,
    seed: int,
    size: Size,
    recipe: str = "cifar",
    device: torch.device | str | None = None,
) -> Draws:
    """The random numbers of one corruption, and nothing else: what :func:`apply` then uses. All are (n, ...).

    ============== =================================================================================================
    gaussian_noise ``noise`` (3, H, W) standard normal
    shot_noise     ``uniform`` (3, H, W) float64 in [0, 1): where in the Poisson distribution a value falls
    impulse_noise  ``uniform`` (3, H, W) in [0, 1): below half the fraction gives 0, below the fraction gives 1
    glass_blur     ``rows``, ``columns`` (passes, H, W) int8: whom each pixel copies, as offsets
    motion_blur    ``angle`` () in degrees
    snow           ``layer`` (H, W) standard normal; ``angle`` () in degrees
    frost          ``picture``, ``top``, ``left`` () in [0, 1): which picture, where its crop begins
    fog            ``plasma`` (S, S) in [-1, 1): the displacement of each point; S is the power of 2 that covers H and W
    elastic_transform ``points`` (3, 2) in [-1, 1): jitter of three points (x, y); ``rows``, ``columns`` (H, W) in
                   [-1, 1): the raw displacement fields
    ============== =================================================================================================

    The others draw nothing.

    Args:
        name: one of ``CORRUPTIONS``.
        index: (n,), int64, image numbers.
        severity: 1 to 5; each has draws of its own, as in the published data sets.
        seed: any whole number.
        size: (height, width) of the images.
        recipe: whose constants.
        device: where the numbers are made; the index's if left out. They are the same on each.

    Raises:
        ValueError: unknown name, severity or recipe; an index that is no list of whole numbers.
    """
    setting = _setting(name, severity, recipe)
    if index.dim() != 1 or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"index is a tensor (n,) of int64 image numbers; got {index.dtype} of shape {tuple(index.shape)}. "
            "Give torch.arange(n) for images without numbers."
        )
    index = index.to(device=index.device if device is None else device, dtype=torch.int64)

    def keys(purpose: str) -> Tensor:
        return random.keys(index, seed=seed, purpose=f"{name} {severity} {purpose}")

    return _TABLE[name].draw(keys, setting, size)


def apply(
    name: str,
    images: Tensor,
    draws: Draws,
    *,
    severity: int,
    recipe: str = "cifar",
    frost_photographs: str | Path | None = None,
) -> Tensor:
    """Damage images with given draws: what :func:`corrupt` does after :func:`draw`.

    Args:
        name: one of ``CORRUPTIONS``.
        images: (n, 3, height, width), uint8.
        draws: as :func:`draw` gives them, on the images' device.
        severity: 1 to 5.
        recipe: whose constants.
        frost_photographs: folder of pictures that ``frost`` uses in place of the procedural texture.

    Returns:
        (n, 3, height, width), uint8, on the images' device.

    Raises:
        ValueError: as :func:`corrupt`.
    """
    _setting(name, severity, recipe)
    _check_images(images)
    size = (images.shape[2], images.shape[3])
    return _apply(name, images, draws, severity, recipe, _frost_pictures(name, recipe, frost_photographs, size))


def _apply(
    name: str, images: Tensor, draws: Draws, severity: int, recipe: str, pictures: Sequence[Tensor] | None
) -> Tensor:
    setting = _setting(name, severity, recipe)
    images = images.contiguous()
    if pictures is not None:
        return _to_uint8(_frost(images, draws, setting, pictures))
    return _to_uint8(_TABLE[name].apply(images, draws, setting))


def _setting(name: str, severity: int, recipe: str) -> Setting:
    """The constants of a corruption at a severity; everything unknown is refused here."""
    if name not in _TABLE:
        match = difflib.get_close_matches(str(name), CORRUPTIONS, n=1, cutoff=0.5)
        hint = f" Did you mean '{match[0]}'?" if match else ""
        raise ValueError(f"No corruption '{name}'.{hint} There are: {', '.join(CORRUPTIONS)}.")
    if recipe not in RECIPES:
        raise ValueError(f"No recipe '{recipe}' for generating corruptions. There are: {', '.join(RECIPES)}.")
    if severity not in range(1, 6):
        raise ValueError(f"severity is 1, 2, 3, 4 or 5; got {severity!r}.")
    return _TABLE[name].settings[recipe][int(severity) - 1]


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


# --- what several corruptions use ------------------------------------------------------------------------------------


def _unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """uint8 -> floating point in [0, 1]."""
    return images.to(dtype) / 255


def _to_uint8(x: Tensor) -> Tensor:
    """The recipe's last step: clip to [0, 1], times 255, truncate. uint8 stays as it is.

    A value that rounding error has pushed just below a whole grey level counts as that level: without the guard, a
    flat white region comes out of a blur as 254 or 255 by chance of device.
    """
    return x if x.dtype == torch.uint8 else (x.clamp(0, 1) * 255 + _GUARD[x.dtype]).to(torch.uint8)


def _nearest(position: Tensor, length: int) -> Tensor:
    """Border rule a a | a b c | c c."""
    return position.clamp(0, length - 1)


def _mirror(position: Tensor, length: int) -> Tensor:
    """Border rule b a | a b c | c b (SciPy's "reflect")."""
    folded = position.remainder(2 * length)
    return torch.minimum(folded, 2 * length - 1 - folded)


def _mirror_101(position: Tensor, length: int) -> Tensor:
    """Border rule c b | a b c | b a (OpenCV's "reflect 101")."""
    period = max(1, 2 * length - 2)
    folded = position.remainder(period)
    return torch.minimum(folded, period - folded)


Border = Callable[[Tensor, int], Tensor]


def _padded(x: Tensor, dim: int, reach: int, border: Border) -> Tensor:
    length = x.shape[dim]
    return x.index_select(dim, border(torch.arange(-reach, length + reach, device=x.device), length))


def _gaussian_weights(sigma: float, reach: int) -> np.ndarray:
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(sigma, 1e-12)) ** 2)
    return weights / weights.sum()


def _gaussian(x: Tensor, sigma: float, border: Border, truncate: float = 4.0) -> Tensor:
    """Gaussian smoothing of the last two dimensions as SciPy does it: the kernel ends at int(truncate sigma + .5)."""
    reach = int(truncate * sigma + 0.5)
    if reach == 0:
        return x
    weights = _gaussian_weights(sigma, reach).tolist()
    for dim in (-2, -1):
        length = x.shape[dim]
        padded = _padded(x, dim, reach, border)
        x = torch.zeros_like(x)
        for tap, weight in enumerate(weights):
            x += padded.narrow(dim, tap, length) * weight
    return x


def _at(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels of (n, c, h, w) at whole rows and columns, (n, *any) each -> (n, c, *any)."""
    flat = (rows * x.shape[3] + columns).reshape(len(x), 1, -1).expand(-1, x.shape[1], -1)
    return x.flatten(2).gather(2, flat).reshape(*x.shape[:2], *rows.shape[1:])


def _bilinear(x: Tensor, rows: Tensor, columns: Tensor, border: Border) -> Tensor:
    """(n, c, h, w) at fractional rows and columns, float64 (n, h, w) -> (n, c, h, w)."""
    top, left = rows.floor(), columns.floor()
    down, right = (rows - top).to(x.dtype)[:, None], (columns - left).to(x.dtype)[:, None]
    height, width = x.shape[2:]
    r0, r1 = (border(top.long() + k, height) for k in (0, 1))
    c0, c1 = (border(left.long() + k, width) for k in (0, 1))
    upper = _at(x, r0, c0) * (1 - right) + _at(x, r0, c1) * right
    lower = _at(x, r1, c0) * (1 - right) + _at(x, r1, c1) * right
    return upper * (1 - down) + lower * down


def _centre_zoom(x: Tensor, factor: float) -> Tensor:
    """Enlarge the centre of (n, c, h, w) linearly, end points on end points, and trim to the same size."""
    for dim in (2, 3):
        length = x.shape[dim]
        crop = math.ceil(length / factor)
        zoomed = round(crop * factor)
        trim = (zoomed - length) // 2
        position = np.arange(trim, trim + length) * ((crop - 1) / max(1, zoomed - 1))
        first = np.minimum(position.astype(np.int64), max(0, crop - 2))
        share = torch.from_numpy(position - first).to(x)
        share = share[:, None] if dim == 2 else share
        start = torch.from_numpy(first + (length - crop) // 2).to(x.device)
        last = (length - crop) // 2 + crop - 1
        x = x.index_select(dim, start) * (1 - share) + x.index_select(dim, (start + 1).clamp(max=last)) * share
    return x


def _motion(x: Tensor, angle: Tensor, radius: int, sigma: float) -> Tensor:
    """Blur along a line that leaves each pixel of (n, c, h, w) at an angle (n,), in degrees clockwise from the right.

    The published generator calls ImageMagick's motion blur: width 2 radius + 1, half a Gaussian, offsets rounded to
    whole pixels, edge pixels repeated, the result rounded to 8 bits.
    """
    steps = torch.arange(2 * radius + 1, device=x.device)
    weights = np.exp(-(np.arange(2 * radius + 1) ** 2) / (2 * sigma**2))
    radians = torch.deg2rad(angle.double())[:, None]
    down = (steps * radians.sin() - 0.5).ceil().long()
    right = (steps * radians.cos() - 0.5).ceil().long()
    height, width = x.shape[2:]
    rows = torch.arange(height, device=x.device)[:, None]
    columns = torch.arange(width, device=x.device)
    out = torch.zeros_like(x)
    for step, weight in enumerate((weights / weights.sum()).tolist()):
        r = _nearest(rows + down[:, step, None, None], height)
        c = _nearest(columns + right[:, step, None, None], width)
        out += _at(x, *torch.broadcast_tensors(r, c)) * weight
    return (out * 255).round() / 255


# --- the corruptions: what each draws, what each does ---------------------------------------------------------------

Keys = Callable[[str], Tensor]


def _draw_nothing(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {}


def _draw_noise(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"noise": random.normal(keys("noise"), (3, *size))}


def _gaussian_noise(images: Tensor, draws: Draws, scale: float) -> Tensor:
    return _unit(images) + draws["noise"] * scale


def _draw_uniform(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"uniform": random.uniform(keys("uniform"), (3, *size))}


@lru_cache(maxsize=8)
def _poisson_table(photons: float) -> Tensor:
    """Distribution functions of the 256 grey levels, each raised by its level: one increasing sequence, float64.

    Counts from ``photons`` on are white whatever they are, so each row ends before that count.
    """
    counts = torch.arange(math.ceil(photons), dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64)[:, None]
    rate = levels / 255 * photons
    log_probability = torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)
    return (log_probability.exp().cumsum(1).clamp(max=1) + levels).flatten()


def _shot_noise(images: Tensor, draws: Draws, photons: float) -> Tensor:
    table = _poisson_table(photons).to(images.device)
    passed = torch.searchsorted(table, images + draws["uniform"], right=True)
    count = passed - images.long() * math.ceil(photons)
    return (count.double() / photons).float()


def _impulse_noise(images: Tensor, draws: Draws, fraction: float) -> Tensor:
    uniform = draws["uniform"]
    return images.masked_fill(uniform < fraction, 255).masked_fill(uniform < fraction / 2, 0)


@lru_cache(maxsize=16)
def _disk(radius: float, alias_sigma: float) -> np.ndarray:
    """The antialiased disk of the recipe, an odd square of weights."""
    half = 8 if radius <= 8 else int(radius)
    soft = 1 if radius <= 8 else 2
    grid = np.arange(-half, half + 1)
    disk = (grid[:, None] ** 2 + grid**2 <= radius**2).astype(np.float64)
    weights = _gaussian_weights(alias_sigma, soft)
    padded = np.pad(disk / disk.sum(), soft, mode="reflect")
    padded = sum(w * padded[k : k + len(grid)] for k, w in enumerate(weights))
    return np.asarray(sum(w * padded[:, k : k + len(grid)] for k, w in enumerate(weights)))


def _defocus_blur(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    kernel = _disk(*setting)
    reach = len(kernel) // 2
    height, width = images.shape[2:]
    # float64: the weight beside a narrow kernel's centre is of the order of float32's rounding error, and truncates
    x = _unit(images, torch.float64)
    padded = _padded(_padded(x, 2, reach, _mirror_101), 3, reach, _mirror_101)
    out = torch.zeros_like(padded[..., :height, :width])
    for row, column in zip(*np.nonzero(kernel > 1e-9), strict=True):
        out += padded[..., row : row + height, column : column + width] * float(kernel[row, column])
    return out


def _draw_neighbours(keys: Keys, setting: Setting, size: Size) -> Draws:
    _, reach, passes = setting

    def offsets(axis: str) -> Tensor:
        drawn = random.uniform(keys(axis), (passes, *size))
        return ((drawn * (2 * reach)).floor() - reach).to(torch.int8)

    return {"rows": offsets("rows"), "columns": offsets("columns")}


def _glass_blur(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    """Smooth, let each pixel copy a neighbour, smooth again.

    The published line swaps ``x[h, w]`` and ``x[h', w']`` of an array (H, W, 3), which are views: the second assignment
    reads what the first has written, so the pixel takes its neighbour's value and the neighbour keeps its own.
    """
    sigma, reach, passes = setting
    height, width = images.shape[2:]
    pixel = torch.arange(height * width, device=images.device)
    row, column = pixel // width, pixel % width
    visited = (row > reach) & (row <= height - reach) & (column > reach) & (column <= width - reach)
    x = _to_uint8(_gaussian(_unit(images, torch.float64), sigma, _nearest)).flatten(2)
    for number in range(passes):
        offset = draws["rows"][:, number].long() * width + draws["columns"][:, number].long()
        source = torch.where(visited, pixel + offset.flatten(1), pixel)
        # Pixels are visited from the last to the first. A source that was visited before holds a copy itself: follow
        # the chain to its end, doubling the stride. With offsets of -1 and 0 no source was, and the pass is one gather.
        link = torch.where(visited[source] & (source > pixel), source, pixel)
        while not torch.equal(further := link.gather(1, link), link):
            link = further
        source = source.gather(1, link)
        x = x.gather(2, source[:, None].expand(-1, 3, -1))
    return _gaussian(_unit(x.reshape(images.shape), torch.float64), sigma, _nearest)


def _draw_angle(low: float, high: float) -> Callable[[Keys, Setting, Size], Draws]:
    def angle(keys: Keys, setting: Setting, size: Size) -> Draws:
        return {"angle": (random.uniform(keys("angle"), ()) * (high - low) + low).float()}

    return angle


def _motion_blur(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    return _motion(_unit(images), draws["angle"], *setting)


def _zoom_blur(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    factors = np.arange(*setting)  # as published: whether the end is among them hangs on its rounding error
    x = _unit(images)
    out = x.clone()
    for factor in factors.tolist():
        out += _centre_zoom(x, factor)
    return out / (len(factors) + 1)


def _draw_snow(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"layer": random.normal(keys("layer"), size), **_draw_angle(-135, -45)(keys, setting, size)}


def _snow(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    mean, std, zoom, threshold, radius, sigma, keep = setting
    layer = _centre_zoom((draws["layer"] * std + mean)[:, None], zoom)
    flakes = _to_uint8(torch.where(layer < threshold, torch.zeros_like(layer), layer))
    flakes = _motion(_unit(flakes), draws["angle"], radius, sigma)
    x = _unit(images)
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    whitened = keep * x + (1 - keep) * torch.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes.flip((2, 3))


def _draw_crop(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {what: random.uniform(keys(what), ()).float() for what in ("picture", "top", "left")}


def _frost_pictures(name: str, recipe: str, folder: str | Path | None, size: Size) -> Sequence[Tensor] | None:
    """The pictures of frost at the recipe's scale; None for the other corruptions."""
    if name != "frost":
        return None
    if folder is None:
        copies = [math.ceil(side / frost.SIDE) for side in size]  # the texture is seamless
        return [texture.repeat(1, *copies) for texture in frost.textures()]
    every = _FROST_STRIDE[recipe]
    # OpenCV's linear resize to 20 % puts each output pixel on the middle one of five
    return [photo[:, every // 2 :: every, every // 2 :: every] for photo in frost.photographs(folder)]


def _frost(images: Tensor, draws: Draws, setting: Setting, pictures: Sequence[Tensor]) -> Tensor:
    keep, strength = setting
    height, width = images.shape[2:]
    which = (draws["picture"] * len(pictures)).long().clamp(max=len(pictures) - 1)
    layer = torch.empty_like(images)
    for number, picture in enumerate(pictures):
        chosen = (which == number).nonzero()[:, 0]
        room = (picture.shape[1] - height, picture.shape[2] - width)
        if min(room) < 0:
            raise ValueError(
                f"Pictures of frost are at least as large as the images, {height} x {width}; number {number} has "
                f"{picture.shape[1]} x {picture.shape[2]} pixels at the recipe's scale. Give larger photographs."
            )
        # the last position is never drawn, as in the published code, unless it is the only one
        top = (draws["top"][chosen] * room[0]).long()[:, None] + torch.arange(height, device=images.device)
        left = (draws["left"][chosen] * room[1]).long()[:, None] + torch.arange(width, device=images.device)
        layer[chosen] = picture.to(images.device)[:, top[:, :, None], left[:, None, :]].transpose(0, 1)
    return keep * _unit(images) + strength * _unit(layer)


def _draw_plasma(keys: Keys, setting: Setting, size: Size) -> Draws:
    side = 2 ** max(1, math.ceil(math.log2(max(size))))
    return {"plasma": (random.uniform(keys("plasma"), (side, side)) * 2 - 1).float()}


def _plasma(displacement: Tensor, decay: float) -> Tensor:
    """Diamond-square fractal on a torus, (n, s, s), scaled to [0, 1]; ``displacement``: a number in [-1, 1) a point."""
    heights = torch.zeros_like(displacement)
    step, wibble = heights.shape[1], 100.0
    while step >= 2:
        on, between = slice(0, None, step), slice(step // 2, None, step)

        def fill(rows: slice, columns: slice, total: Tensor, scale: float = wibble**2) -> None:
            # wibble squared: the published code multiplies a number in [-wibble, wibble) by wibble
            heights[:, rows, columns] = total / 4 + displacement[:, rows, columns] * scale

        corners = heights[:, on, on]
        pairs = corners + corners.roll(-1, 1)
        fill(between, between, pairs + pairs.roll(-1, 2))
        centres = heights[:, between, between]
        fill(on, between, (centres + centres.roll(1, 1)) + (corners + corners.roll(-1, 2)))
        fill(between, on, (centres + centres.roll(1, 2)) + (corners + corners.roll(-1, 1)))
        step //= 2
        wibble /= decay
    heights = heights - heights.amin((1, 2), keepdim=True)
    return heights / heights.amax((1, 2), keepdim=True)


def _fog(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    strength, decay = setting
    x = _unit(images)
    brightest = x.amax((1, 2, 3), keepdim=True)
    plasma = _plasma(draws["plasma"], decay)[:, None, : x.shape[2], : x.shape[3]]
    return (x + strength * plasma) * brightest / (brightest + strength)


def _brightness(images: Tensor, draws: Draws, lift: float) -> Tensor:
    x = _unit(images)
    value = x.amax(1, keepdim=True)
    lifted = (value + lift).clamp(max=1)
    # hue and saturation stay: the channels keep their ratios; black has no hue and becomes grey
    return torch.where(value > 0, x / value.clamp(min=1 / 255) * lifted, lifted)


def _contrast(images: Tensor, draws: Draws, keep: float) -> Tensor:
    levels = images.sum((2, 3), keepdim=True)  # whole numbers: exact in any order of summation
    mean = (levels.double() / (255 * images.shape[2] * images.shape[3])).float()
    return (_unit(images) - mean) * keep + mean


def _draw_elastic(keys: Keys, setting: Setting, size: Size) -> Draws:
    shapes = {"points": (3, 2), "rows": size, "columns": size}
    return {what: (random.uniform(keys(what), shape) * 2 - 1).float() for what, shape in shapes.items()}


def _elastic_transform(images: Tensor, draws: Draws, setting: Setting) -> Tensor:
    amplitude, sigma, jitter = setting
    height, width = images.shape[2:]
    rows = torch.arange(height, device=images.device, dtype=torch.float64)[:, None]
    columns = torch.arange(width, device=images.device, dtype=torch.float64)
    third = min(height, width) // 3
    middle = (height // 2, width // 2)
    corners = [(third, third), (third, -third), (-third, -third)]
    points = rows.new_tensor([(middle[0] + a, middle[1] + b) for a, b in corners])
    x, y = _affine_back(points, points + draws["points"].double() * jitter, columns, rows)
    moved = _bilinear(_unit(images), y, x, _mirror_101)
    if amplitude == 0:
        return moved
    down, right = (_gaussian(draws[axis], sigma, _mirror, 3.0).double() * amplitude for axis in ("rows", "columns"))
    return _bilinear(moved, rows + down, columns + right, _mirror)


def _affine_back(points: Tensor, moved: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Where (x, y) came from under the affine map that takes three points (3, 2) to (n, 3, 2): (n, h, w) each."""
    edges = points[:2] - points[2]
    (ax, ay), (bx, by) = ((moved[:, k] - moved[:, 2])[:, :, None, None].unbind(1) for k in (0, 1))
    px, py = (grid - origin[:, None, None] for grid, origin in zip((x, y), moved[:, 2].unbind(1), strict=True))
    area = ax * by - ay * bx
    a, b = (px * by - py * bx) / area, (py * ax - px * ay) / area  # (x, y) in terms of the moved edges
    return tuple(points[2, k] + a * edges[0, k] + b * edges[1, k] for k in (0, 1))  # type: ignore[return-value]


def _pixelate(images: Tensor, draws: Draws, share: float) -> Tensor:
    height, width = images.shape[2:]
    small = _box_resize(_box_resize(images, 3, max(1, int(width * share))), 2, max(1, int(height * share)))
    return _box_resize(_box_resize(small, 3, width), 2, height)


def _box_resize(images: Tensor, dim: int, length: int) -> Tensor:
    """Pillow's BOX filter along one dimension, uint8 -> uint8: mean of the pixels whose centres fall into the box."""
    there = images.shape[dim]
    scale = there / length
    box = max(scale, 1.0)
    centres = (np.arange(length) + 0.5) * scale
    distance = (np.arange(there)[:, None] + 0.5 - centres) / box
    inside = (distance > -0.5) & (distance <= 0.5)  # (there, length)
    first, count = inside.argmax(0), inside.sum(0)
    shape = (length, 1) if dim == 2 else (length,)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64)).to(images.device)

    size = list(images.shape)
    size[dim] = length
    total = torch.zeros(size, dtype=torch.int64, device=images.device)
    for tap in range(int(count.max())):
        taken = images.index_select(dim, tensor((first + tap).clip(max=there - 1)))
        total += taken * tensor(tap < count).reshape(shape)
    parts = tensor(count).reshape(shape)
    return ((2 * total + parts) // (2 * parts)).to(torch.uint8)


def _jpeg_compression(images: Tensor, draws: Draws, quality: int) -> Tensor:
    out = torch.empty_like(images, device="cpu")
    for number, image in enumerate(images.cpu()):
        out[number] = decode_jpeg(encode_jpeg(image, quality=quality))
    return out.to(images.device)


@dataclass(frozen=True)
class _Corruption:
    draw: Callable[[Keys, Setting, Size], Draws]
    apply: Callable[..., Tensor]
    settings: dict[str, tuple[Setting, ...]]  # recipe -> constants at severity 1 to 5


def _times(side: float, *settings: tuple[float, ...]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(side * value for value in setting) for setting in settings)


_FROST_STRIDE = {"cifar": 5}

_TABLE: dict[str, _Corruption] = {
    # standard deviation
    "gaussian_noise": _Corruption(_draw_noise, _gaussian_noise, {"cifar": (0.04, 0.06, 0.08, 0.09, 0.10)}),
    # photons of a white pixel
    "shot_noise": _Corruption(_draw_uniform, _shot_noise, {"cifar": (500, 250, 100, 75, 50)}),
    # fraction of the values
    "impulse_noise": _Corruption(_draw_uniform, _impulse_noise, {"cifar": (0.01, 0.02, 0.03, 0.05, 0.07)}),
    # radius, sigma of the antialiasing
    "defocus_blur": _Corruption(
        _draw_nothing, _defocus_blur, {"cifar": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))}
    ),
    # sigma, reach, passes
    "glass_blur": _Corruption(
        _draw_neighbours,
        _glass_blur,
        {"cifar": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2))},
    ),
    # radius, sigma
    "motion_blur": _Corruption(
        _draw_angle(-45, 45), _motion_blur, {"cifar": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))}
    ),
    # first zoom, end, step
    "zoom_blur": _Corruption(
        _draw_nothing,
        _zoom_blur,
        {"cifar": ((1, 1.06, 0.01), (1, 1.11, 0.01), (1, 1.16, 0.01), (1, 1.21, 0.01), (1, 1.26, 0.01))},
    ),
    # mean, standard deviation, zoom, threshold, radius, sigma, what is kept of the image
    "snow": _Corruption(
        _draw_snow,
        _snow,
        {
            "cifar": (
                (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
                (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
                (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
                (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
                (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
            )
        },
    ),
    # share of the image, share of the frost
    "frost": _Corruption(_draw_crop, _frost, {"cifar": ((1, 0.2), (1, 0.3), (0.9, 0.4), (0.85, 0.4), (0.75, 0.45))}),
    # strength, decay
    "fog": _Corruption(_draw_plasma, _fog, {"cifar": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))}),
    # added to the value of HSV
    "brightness": _Corruption(_draw_nothing, _brightness, {"cifar": (0.05, 0.1, 0.15, 0.2, 0.3)}),
    # what is kept of the contrast
    "contrast": _Corruption(_draw_nothing, _contrast, {"cifar": (0.75, 0.5, 0.4, 0.3, 0.15)}),
    # amplitude, sigma, jitter, in sides of a CIFAR image -> pixels
    "elastic_transform": _Corruption(
        _draw_elastic,
        _elastic_transform,
        {
            "cifar": _times(
                32, (0, 0, 0.08), (0.05, 0.2, 0.07), (0.08, 0.06, 0.06), (0.1, 0.04, 0.05), (0.1, 0.03, 0.03)
            )
        },
    ),
    # share of the pixels along a side
    "pixelate": _Corruption(_draw_nothing, _pixelate, {"cifar": (0.95, 0.9, 0.85, 0.75, 0.65)}),
    # quality
    "jpeg_compression": _Corruption(_draw_nothing, _jpeg_compression, {"cifar": (80, 65, 58, 50, 40)}),
}
