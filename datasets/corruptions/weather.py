"""Weather corruptions: their draws (``draw_...``) and their effect; the constants are in ``recipes.py``."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tta.datasets.corruptions import blur, pixels
from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size
from tta.datasets.corruptions.pixels import to_uint8, unit


def draw_snow(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"layer": random.normal(keys("layer"), size), **blur.draw_angle(-135, -45)(keys, setting, size)}


def snow(images: Tensor, draws: Draws, setting: tuple[float, ...]) -> Tensor:
    mean, std, zoom, threshold, radius, sigma, keep = setting
    layer = pixels.centre_zoom((draws["layer"] * std + mean).permute(1, 2, 0), zoom).permute(2, 0, 1)[:, None]
    flakes = to_uint8(torch.where(layer < threshold, torch.zeros_like(layer), layer)).contiguous()
    flakes = pixels.motion(unit(flakes), draws["angle"], radius, sigma)
    x = unit(images)
    grey = 0.299 * x[:, :1] + 0.587 * x[:, 1:2] + 0.114 * x[:, 2:]
    whitened = keep * x + (1 - keep) * torch.maximum(x, grey * 1.5 + 0.5)
    return whitened + flakes + flakes.flip((2, 3))


def draw_crop(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {what: random.uniform(keys(what), ()).float() for what in ("picture", "top", "left")}


def frost(images: Tensor, draws: Draws, setting: tuple[float, float], pictures: Sequence[Tensor]) -> Tensor:
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
        # As in the published code, the last position is never drawn, unless it is the only one.
        top = (draws["top"][chosen] * room[0]).long()[:, None] + torch.arange(height, device=images.device)
        left = (draws["left"][chosen] * room[1]).long()[:, None] + torch.arange(width, device=images.device)
        layer[chosen] = picture.to(images.device)[:, top[:, :, None], left[:, None, :]].transpose(0, 1)
    return keep * unit(images) + strength * unit(layer)


def draw_plasma(keys: Keys, setting: Setting, size: Size) -> Draws:
    side = 2 ** max(1, math.ceil(math.log2(max(size))))
    return {"plasma": (random.uniform(keys("plasma"), (side, side)) * 2 - 1).float()}


def _plasma(displacement: Tensor, decay: float) -> Tensor:
    """Diamond-square fractal on a torus, (n, s, s), scaled to [0, 1]; ``displacement``: one number in [-1, 1) per point."""
    heights = torch.zeros_like(displacement)
    step, wibble = heights.shape[1], 100.0
    while step >= 2:
        on, between = slice(0, None, step), slice(step // 2, None, step)

        def fill(rows: slice, columns: slice, total: Tensor, scale: float = wibble**2) -> None:
            # Squared: the published code multiplies a number in [-wibble, wibble) by wibble.
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


def fog(images: Tensor, draws: Draws, setting: tuple[float, float]) -> Tensor:
    strength, decay = setting
    x = unit(images)
    brightest = x.amax((1, 2, 3), keepdim=True)
    plasma = _plasma(draws["plasma"], decay)[:, None, : x.shape[2], : x.shape[3]]
    return (x + strength * plasma) * brightest / (brightest + strength)
