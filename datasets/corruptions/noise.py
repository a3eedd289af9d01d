"""Noise corruptions: their draws (``draw_...``) and their effect; the constants are in ``recipes.py``."""

import math
from functools import lru_cache

import torch
from torch import Tensor

from tta.datasets.corruptions import draws as random
from tta.datasets.corruptions.draws import Draws, Keys, Setting, Size
from tta.datasets.corruptions.pixels import unit


def draw_normal(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"noise": random.normal(keys("noise"), (3, *size))}


def gaussian_noise(images: Tensor, draws: Draws, scale: float) -> Tensor:
    return unit(images) + draws["noise"] * scale


def speckle_noise(images: Tensor, draws: Draws, scale: float) -> Tensor:
    x = unit(images)
    return x + x * draws["noise"] * scale


def draw_uniform(keys: Keys, setting: Setting, size: Size) -> Draws:
    return {"uniform": random.uniform(keys("uniform"), (3, *size))}


@lru_cache(maxsize=32)
def _poisson_table(photons: float) -> Tensor:
    """Cumulative Poisson distributions of the 256 grey levels, each plus its level: one increasing sequence, float64.

    Counts of ``photons`` and more are white, so each row ends before that count.
    """
    counts = torch.arange(math.ceil(photons), dtype=torch.float64)
    levels = torch.arange(256, dtype=torch.float64)[:, None]
    rate = levels / 255 * photons
    log_probability = torch.xlogy(counts, rate) - rate - torch.lgamma(counts + 1)
    return (log_probability.exp().cumsum(1).clamp(max=1) + levels).flatten()


def shot_noise(images: Tensor, draws: Draws, photons: float) -> Tensor:
    table = _poisson_table(photons).to(images.device)
    passed = torch.searchsorted(table, images + draws["uniform"], right=True)
    count = passed - images.long() * math.ceil(photons)
    return (count.double() / photons).float()


def impulse_noise(images: Tensor, draws: Draws, fraction: float) -> Tensor:
    uniform = draws["uniform"]
    return images.masked_fill(uniform < fraction, 255).masked_fill(uniform < fraction / 2, 0)
