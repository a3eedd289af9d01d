"""The protocol ``outliers``, images of unknown classes among a stream's own, and the sources of these images."""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tta.datasets import orders
from tta.datasets.domains import DatasetImages, Domain, classes_in, gather
from tta.datasets.orders import Planned, check_parameter
from tta.datasets.stream import in_turn
from tta.labels import UNKNOWN


def outliers(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    rate: float = 0.2,
    outliers: Any = "gaussian-noise",
    order: int | None = None,
) -> Planned:
    """Images of unknown classes mixed into each domain at a rate, reset before each domain.

    Yu et al., "STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024. Each domain's images
    and the first outliers are shuffled; each comes once. Outliers have the label -1 and are left out of the errors.

    Args:
        rate: share of outliers in a domain; 0.2 gives the paper's 2 500 outliers beside 10 000 images.
        outliers: ``"gaussian-noise"``, one of the paper's sources, or a dataset of your own, used unchanged (its labels
            are ignored). The paper corrupts photographs like the domain's images: for that, pass a mapping from domain
            names to datasets.
        order: as in ``continual``.
    """
    check_parameter(0 <= rate < 1, "rate", rate, "a share from 0 up to, not including, 1")
    check_parameter(
        not isinstance(outliers, str) or outliers == "gaussian-noise", "outliers", outliers, "'gaussian-noise'"
    )
    rng = np.random.RandomState(seed)
    rows: list[Domain] = []
    parts = []
    for number, domain in enumerate(orders.arranged(domains, order)):
        count = round(len(domain.index) * rate / (1 - rate))
        if isinstance(outliers, str):
            others: Domain = GaussianNoise(domain, count)
        else:
            own = isinstance(outliers, Mapping)
            check_parameter(
                not own or domain.name in outliers, "outliers", outliers, f"a dataset for '{domain.name}' too"
            )
            others = DatasetImages("outliers", outliers[domain.name] if own else outliers)
        rows.append(WithOutliers(domain, others, count))
        parts.append((number, torch.from_numpy(rng.permutation(len(rows[-1].index)))))
    return rows, in_turn(parts, batch_size)


class WithOutliers:
    """A domain followed by images of unknown classes, all with the label -1.

    Args:
        domain: gives the name and the images of known classes.
        outliers: gives the others in its order; their image numbers continue those of ``domain``.
        count: number of outliers; the first ones are taken.

    Raises:
        ValueError: there are fewer outliers than ``count``.
    """

    def __init__(self, domain: Domain, outliers: Domain, count: int) -> None:
        if count > len(outliers.index):
            raise ValueError(
                f"Domain '{domain.name}' needs {count} outliers; there are {len(outliers.index)}. Lower the rate, or "
                "pass more of them."
            )
        self.name = domain.name
        self.origin = f"{domain.origin}; {count} outliers, {outliers.origin}"
        self.labels = torch.cat([domain.labels, torch.full((count,), UNKNOWN)])
        first = int(domain.index.max()) + 1 if len(domain.index) else 0
        self.index = torch.cat([domain.index, torch.arange(first, first + count)])
        self.classes = classes_in(domain)
        self._parts = domain, outliers

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions."""
        domain, outliers = self._parts
        own = positions < len(domain.index)
        theirs = positions[~own] - len(domain.index)
        return gather(len(positions), [(own, domain.images, positions[own]), (~own, outliers.images, theirs)])

    def describe(self) -> dict[str, Any]:
        """The manifest entry: both parts."""
        domain, outliers = self._parts
        return {**domain.describe(), "outliers": outliers.describe()}


class GaussianNoise:
    """Outliers that need no files: pixels from a normal distribution with mean 0.5 and variance 1, clipped to [0, 1].

    Args:
        like: a domain whose images have the size to use.
        count: number of images.
    """

    name = "outliers"
    origin = "Gaussian noise"

    def __init__(self, like: Domain, count: int) -> None:
        self.index = torch.arange(count)
        self.labels = torch.full((count,), UNKNOWN)
        self._like = like

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8."""
        _, height, width = self._like.images(torch.tensor([0])).shape[1:]
        return _noise(len(self.index), height, width)[positions]

    def describe(self) -> dict[str, Any]:
        """The manifest entry; the seed is always 1."""
        return {"origin": self.origin, "count": len(self.index), "seed": 1}


@cache
def _noise(count: int, height: int, width: int) -> Tensor:
    rng = np.random.RandomState(1)
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for image in images:  # one at a time: all of them in float64 would take eight times the memory
        pixels = np.clip(rng.randn(height, width, 3) + 0.5, 0, 1) * 255
        image.copy_(torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1))
    return images
