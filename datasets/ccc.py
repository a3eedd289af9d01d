"""CCC, continuously changing corruptions: two at a time, along paths on which a source model's accuracy hardly changes.

Press, Schneider, Kümmerer & Bethge, "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023. The protocol ``ccc`` (:mod:`tta.datasets.protocols`) combines the parts in this file: the pairs
of corruptions, the path through the accuracy matrix of each pair (:mod:`tta.datasets.accuracy_matrix`), and the images.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from tta import fingerprint
from tta.datasets.accuracy_matrix import Accuracies, AccuracyMatrix, Calibration, Pair, Severities
from tta.datasets.corruptions import CORRUPTIONS, QUARTERS, constants, corrupt
from tta.datasets.domains import Domain

HARD = ("gaussian_noise", "shot_noise", "impulse_noise", "contrast")


# ---------------------------------------------------------------------- the schedule


def pool(target: float) -> tuple[str, ...]:
    """The corruptions that can reach a target accuracy (percent), as published: the lower, the fewer."""
    if target < 20:
        return HARD
    mild = ("brightness",) if target >= 40 else ("brightness", "jpeg_compression")
    return tuple(name for name in CORRUPTIONS if name not in mild)


def pairs(names: Sequence[str], seed: int) -> Iterator[Pair]:
    """An endless sequence of pairs of different corruptions; the second of one is the first of the next.

    Drawn by Python's generator as in the released code: the same pairs from the same names and seed.
    """
    draw = random.Random(seed)
    first = second = draw.choice(names)
    while True:
        while second == first:
            second = draw.choice(names)
        yield first, second
        first = second


def path(accuracy: Accuracies, target: float) -> list[Severities]:
    """Cells (row, column) of an accuracy matrix, from the first corruption alone to the second alone.

    A step takes a quarter of severity from the first corruption or adds one to the second. At each cell the path takes
    the step after which the mean accuracy of the rest is closer to the target (if equal, the step of the second
    corruption). Of the paths from all severities above 0 of the first corruption, the result is the one with the closest
    mean (if equal, the least severe). As released: the mean of a path is near the target, a single cell need not be.
    """
    rows, columns = accuracy.shape
    # For the path from each cell to its end: sum of accuracies and length. To the right of the grid there is no path.
    total = {(row, columns): math.inf for row in range(rows)} | {(0, n): float(a) for n, a in enumerate(accuracy[0])}
    length = dict.fromkeys(total, 1)
    following: dict[Severities, Severities] = {}
    for row in range(1, rows):
        for column in reversed(range(columns)):
            cell, here = (row, column), float(accuracy[row, column])
            steps = ((row, column + 1), (row - 1, column))
            step = min(steps, key=lambda to: abs((total[to] + here) / (length[to] + 1) - target))
            following[cell], total[cell], length[cell] = step, total[step] + here, length[step] + 1
    starts = [(row, 0) for row in range(1, rows)]
    cells = [min(starts, key=lambda start: abs(total[start] / length[start] - target))]
    while cells[-1] in following:
        cells.append(following[cells[-1]])
    return cells


class Step(NamedTuple):
    """One stop of the stream: two corruptions, their severities, and the expected accuracy (percent)."""

    first: str
    second: str
    severity_1: float
    severity_2: float
    accuracy: float


def stops(of: Iterable[Pair], matrix: AccuracyMatrix, target: float) -> Iterator[Step]:
    """The stops on the paths of some pairs (:func:`path`), pair after pair; reads a pair's matrix when it comes to it."""
    for pair in of:
        accuracy = matrix[pair]
        for row, column in path(accuracy, target):
            yield Step(*pair, row / QUARTERS, column / QUARTERS, float(accuracy[row, column]))


def arrivals(images: int, count: int, speed: int, seed: int) -> Tensor:
    """Image indices for each stop, (count * speed,) int64.

    Each stop has ``speed`` different images, drawn independently; if there are fewer, all come before any is repeated.

    Args:
        images: number of images.
        count: number of stops.
        speed: images per stop.
        seed: of the draws.
    """
    rng = np.random.RandomState(seed)
    rounds = -(-speed // images)
    drawn = [np.concatenate([rng.permutation(images) for _ in range(rounds)])[:speed] for _ in range(count)]
    return torch.from_numpy(np.concatenate(drawn))


# ---------------------------------------------------------------------- calibration


def calibrate(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    of: Iterable[Pair] | None = None,
    **settings: Any,
) -> AccuracyMatrix:
    """Accuracy of a model under pairs of corruptions, for ``tta.stream(..., protocol="ccc", matrix=...)``.

    Args:
        model: as in :class:`~tta.datasets.accuracy_matrix.Calibration`.
        images: (n, 3, height, width), uint8, clean.
        labels: (n,), int64.
        of: pairs to measure; default: all 182 ordered pairs of the corruptions of CCC-Easy.
        settings: further settings of :class:`~tta.datasets.accuracy_matrix.Calibration`.

    Raises:
        ValueError: as in :class:`~tta.datasets.accuracy_matrix.Calibration`.
    """
    calibration = Calibration(model, images, labels, **settings)
    easy = pool(100)
    for pair in [(a, b) for a in easy for b in easy if a != b] if of is None else of:
        calibration[pair]
    return AccuracyMatrix(calibration.of_pair, calibration.calibration)


# ---------------------------------------------------------------------- the images


def to_uint8(images: Tensor) -> Tensor:
    """Floating-point images in [0, 1] as uint8, rounded; uint8 images are not changed."""
    return (images * 255).round().to(torch.uint8) if images.is_floating_point() else images


class Walk:
    """A domain under two corruptions, one applied after the other, whose severities change from stop to stop.

    Images are corrupted on each access and not kept: none comes twice, each arrival has its own draws.

    Args:
        name: of the domain.
        clean: the images.
        chosen: (n,), int64, positions in ``clean``, in order of arrival.
        stops: in order; enough of them for ``chosen``.
        speed: images per stop.
        recipe: of the corruptions.
        seed: of their draws.
        target: accuracy in percent for which the stops were chosen.
        matrix: the source of their accuracies.
    """

    def __init__(
        self,
        name: str,
        clean: Domain,
        chosen: Tensor,
        stops: Sequence[Step],
        speed: int,
        *,
        recipe: str,
        seed: int,
        target: float,
        matrix: AccuracyMatrix,
    ) -> None:
        for corruption in {name for step in stops for name in step[:2]}:
            constants(corruption, 1 / QUARTERS, recipe)  # raises on unknown settings now, not at the first image
        self.name = name
        self.labels = clean.labels[chosen]
        self.index = clean.index[chosen]
        self.steps = tuple(stops)
        self.speed = speed
        self._clean, self._chosen = clean, chosen
        self._settings: dict[str, Any] = {"recipe": recipe, "seed": seed}
        self._accuracies = matrix.describe(self.pairs)
        names = [self.pairs[0][0], *(second for _, second in self.pairs)]
        route = " > ".join(names if len(names) <= 6 else [*names[:5], "..."])
        mean = np.mean([step.accuracy for step in stops])
        self.origin = (
            f"generated by the {recipe} recipe, seed {seed}, two corruptions at a time, from "
            f"{clean.origin.removeprefix('not corrupted: ')}: {route}; {len(stops)} stops of {speed} images, accuracy "
            f"{mean:.1f} % by {matrix.origin} (target {target:g} %)"
        )

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of corruptions in their order of arrival."""
        every = [(step.first, step.second) for step in self.steps]
        return tuple(pair for n, pair in enumerate(every) if n == 0 or pair != every[n - 1])

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8."""
        clean = to_uint8(self._clean.images(self._chosen[positions]))
        out = torch.empty_like(clean)
        stop = positions // self.speed
        for number in torch.unique(stop).tolist():
            here, step = stop == number, self.steps[number]
            once = corrupt(clean[here], step.first, step.severity_1, index=positions[here], **self._settings)
            out[here] = corrupt(once, step.second, step.severity_2, index=positions[here], **self._settings)
        return out

    def describe(self) -> dict[str, Any]:
        """The manifest entry: how the images were made, from which bytes, and a hash of the path."""
        severities = torch.tensor([(step.severity_1, step.severity_2) for step in self.steps])
        return {
            "origin": self.origin,
            "generated": {**self._settings, "speed": self.speed},
            "pairs": [f"{first}+{second}" for first, second in self.pairs],
            "path": fingerprint.of_tensors([("severities", severities)]),
            **self._accuracies,
            "clean": self._clean.describe(),
        }
