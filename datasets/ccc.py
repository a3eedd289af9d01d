"""CCC, continuously changing corruptions: two at a time, along paths on which a source model's accuracy hardly changes.

Press, Schneider, Kümmerer & Bethge, "RDumb: A simple approach that questions our progress in continual test-time
adaptation", NeurIPS 2023. The protocol ``ccc`` (:mod:`tta.datasets.protocols`) puts together what is here: the pairs of
corruptions, the accuracy matrix of each pair, the path through it, and the images.

An accuracy matrix is float64 (21, 21): accuracy in percent, the first corruption at severities 0, 0.25, ... 5 in rows, the
second, applied after it, in columns.
"""

import contextlib
import hashlib
import json
import math
import os
import pickle
import random
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tta import fingerprint
from tta.datasets.corruptions import CORRUPTIONS, HIGHEST, QUARTERS, constants, corrupt
from tta.datasets.domains import Domain, to_float

Accuracies = NDArray[np.float64]
Pair = tuple[str, str]
Cell = tuple[int, int]
Progress = Callable[[Sequence[Cell]], Iterable[Cell]]  # wraps the cells of a pair while they are measured

LEVELS = QUARTERS * HIGHEST + 1
HARD = ("gaussian_noise", "shot_noise", "impulse_noise", "contrast")
BATCH = 100  # images through the model at once while calibrating
_PUBLISHED_NAMES = {"elastic": "elastic_transform", "jpeg": "jpeg_compression"}


# ---------------------------------------------------------------------- the schedule


def pool(target: float) -> tuple[str, ...]:
    """The corruptions that can reach a target accuracy (percent): fewer, the lower it is, as published."""
    if target < 20:
        return HARD
    mild = ("brightness",) if target >= 40 else ("brightness", "jpeg_compression")
    return tuple(name for name in CORRUPTIONS if name not in mild)


def pairs(names: Sequence[str], seed: int) -> Iterator[Pair]:
    """Pairs of different corruptions, without end; the second of one is the first of the next.

    Drawn by Python's generator as in the released code: the same pairs from the same names and seed.
    """
    draw = random.Random(seed)
    first = second = draw.choice(names)
    while True:
        while second == first:
            second = draw.choice(names)
        yield first, second
        first = second


def path(accuracy: Accuracies, target: float) -> list[Cell]:
    """Cells (row, column) of an accuracy matrix, from the first corruption alone to the second alone.

    A step takes a quarter of severity from the first corruption or adds one to the second. From each cell on, the path
    takes the step after which its mean accuracy to the end is closer to the target (of two equal ones, that of the second
    corruption); of the paths from all severities above 0 of the first, the one whose mean is closest (the least severe of
    equal ones). As released: the mean of a path is near the target, a cell alone need not be.
    """
    rows, columns = accuracy.shape
    # of the path from a cell to its end: the sum of its accuracies, and its length; to the right of the grid there is none
    total = {(row, columns): math.inf for row in range(rows)} | {(0, n): float(a) for n, a in enumerate(accuracy[0])}
    length = dict.fromkeys(total, 1)
    following: dict[Cell, Cell] = {}
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
    """One stop of the stream: two corruptions and how severe they are, and the accuracy (percent) to expect."""

    first: str
    second: str
    severity_1: float
    severity_2: float
    accuracy: float


def stops(of: Iterable[Pair], matrix: "AccuracyMatrix", target: float) -> Iterator[Step]:
    """The paths of pairs (:func:`path`), one after another, in corruptions and severities.

    Of the matrix only those pairs are asked for that are arrived at.
    """
    for pair in of:
        accuracy = matrix[pair]
        for row, column in path(accuracy, target):
            yield Step(*pair, row / QUARTERS, column / QUARTERS, float(accuracy[row, column]))


def arrivals(images: int, count: int, speed: int, seed: int) -> Tensor:
    """Which of so many images come at each of so many stops, (count * speed,) int64.

    ``speed`` different ones, drawn anew for each stop; where there are fewer, all of them before any comes again.
    """
    rng = np.random.RandomState(seed)
    rounds = -(-speed // images)
    drawn = [np.concatenate([rng.permutation(images) for _ in range(rounds)])[:speed] for _ in range(count)]
    return torch.from_numpy(np.concatenate(drawn))


# ---------------------------------------------------------------------- accuracy matrices


class AccuracyMatrix:
    """An accuracy matrix for each of some ordered pairs of corruptions: ``matrix["fog", "snow"]``.

    Args:
        of_pair: the matrices, by pairs like ``("fog", "snow")`` or by their published names, ``"n1_fog_n2_snow"``.
        calibration: how they were measured where they are not the published ones; its presence makes a stream
            ``ccc-style``.

    Raises:
        ValueError: another name, a matrix of another shape, not in percent, or with numbers that are none.
    """

    def __init__(self, of_pair: Mapping[Any, Any], calibration: Mapping[str, Any] | None = None) -> None:
        self.of_pair = {_pair(name): _checked(name, values) for name, values in of_pair.items()}
        self.calibration = None if calibration is None else dict(calibration)
        if calibration is None and self.of_pair and max(values.max() for values in self.of_pair.values()) <= 1:
            raise ValueError("Accuracies are in percent, 0 to 100; these are at most 1. Multiply them by 100.")

    def __getitem__(self, pair: Pair) -> Accuracies:
        if pair not in self.of_pair:
            there = ", ".join(f"{first}+{second}" for first, second in self.of_pair) or "none"
            raise ValueError(f"The accuracy matrix has no pair {pair[0]}+{pair[1]}; it has: {there}.")
        return self.of_pair[pair]

    @property
    def told(self) -> str:
        """Where the accuracies come from, in words."""
        if self.calibration is None:
            return "the given matrix"
        return f"calibration on {self.calibration['images']} images, grid {self.calibration['grid']:g}"

    def describe(self, of: Iterable[Pair]) -> dict[str, Any]:
        """What a manifest says of the matrices of some pairs: a hash over them, and how they were measured."""
        arrays = [(f"{pair[0]}+{pair[1]}", torch.from_numpy(self[pair])) for pair in dict.fromkeys(of)]
        return {"matrix": fingerprint.of_tensors(arrays), "calibration": self.calibration}

    @classmethod
    def read(cls, file: str | Path) -> "AccuracyMatrix":
        """From a file: what :meth:`save` wrote, or a mapping from ``n1_fog_n2_snow`` and so on to arrays.

        As ``.npz``, or pickled as the published one is (``ccc_accuracy_matrix.pickle``, https://github.com/oripress/CCC).
        A pickle is read without running anything that is in it: one that holds more than numpy's arrays is refused.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it holds something else.
        """
        file = Path(file)
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no accuracy matrix '{file}'. The published one is ccc_accuracy_matrix.pickle of "
                "https://github.com/oripress/CCC."
            )
        calibration = None
        if zipfile.is_zipfile(file):
            with np.load(file, allow_pickle=False) as stored:
                arrays = dict(stored)
            if "calibration" in arrays:
                calibration = json.loads(str(arrays.pop("calibration")))
        else:
            with file.open("rb") as stream:
                try:
                    arrays = _ArraysOnly(stream).load()
                except Exception as error:
                    raise ValueError(
                        f"'{file}' is neither an .npz file nor a pickle of numpy arrays ({error}). Where you trust it, "
                        "load it yourself and write its arrays with numpy.savez(file, **arrays)."
                    ) from None
        if not isinstance(arrays, dict):
            raise ValueError(f"'{file}' holds a {type(arrays).__name__}; expected arrays by names like n1_fog_n2_snow.")
        return cls(arrays, calibration)

    def save(self, file: str | Path) -> None:
        """Write the matrices as ``.npz``; a reader sees the old file or the whole new one."""
        file = Path(file)
        arrays: dict[str, Any] = {f"n1_{first}_n2_{second}": values for (first, second), values in self.of_pair.items()}
        if self.calibration is not None:
            arrays["calibration"] = np.array(json.dumps(self.calibration))
        file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_name(f"{file.name}.{os.getpid()}")
        with unfinished.open("wb") as stream:
            np.savez(stream, **arrays)
        unfinished.replace(file)


class Calibration(AccuracyMatrix):
    """Accuracy matrices of a model of yours; a pair is measured when it is first asked for.

    Args:
        model: takes (n, 3, height, width) float32 in [0, 1], gives logits (n, classes).
        images: (n, 3, height, width), uint8, clean.
        labels: (n,), int64.
        recipe: of the corruptions, see :func:`tta.datasets.corrupt`.
        seed: of the corruptions' draws.
        grid: distance of the severities that are measured; the accuracies in between are interpolated linearly. 0.25
            measures all 441 of a pair, as published, 1 the 36 whole ones. Where accuracy falls steeply in between, the
            stream's is off by as much as 6 points with 0.5 and 11 with 1 (digits, contrast).
        cache: a folder where what was measured is kept, in a file named by the model's weights, the images and these
            settings; needs an ``nn.Module``.
        progress: wraps the cells of a pair while they are measured, as a progress bar does.

    Raises:
        ValueError: a grid that does not fit, no images, or a cache for a model without weights to tell it by.
    """

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        *,
        recipe: str = "imagenet",
        seed: int = 0,
        grid: float = 0.5,
        cache: str | PurePath | None = None,
        progress: Progress | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model gives logits for images; got {model!r}.")
        if grid * QUARTERS not in range(1, LEVELS) or (LEVELS - 1) % (grid * QUARTERS):
            raise ValueError(f"grid is 0.25, 0.5, 1, 1.25, 2.5 or 5; got {grid!r}.")
        if not len(images) or len(images) != len(labels):
            raise ValueError(f"Calibration needs images with labels; got {len(images)} and {len(labels)}.")
        if cache is not None and not isinstance(model, nn.Module):
            raise ValueError(f"cache keeps the accuracies of an nn.Module, told by its weights; got {model!r}.")
        weights = fingerprint.of_model(model) if isinstance(model, nn.Module) else None
        content = fingerprint.of_tensors([("images", images), ("labels", labels)])
        how = {
            "images": len(images),
            "grid": grid,
            "recipe": recipe,
            "seed": seed,
            "model": weights,
            "content": content,
        }
        super().__init__({}, how)
        self._model, self._images, self._labels = model, images, labels
        self._settings: dict[str, Any] = {"recipe": recipe, "seed": seed}
        self._levels = range(0, LEVELS, int(grid * QUARTERS))
        self._progress = progress or iter
        self._file: Path | None = None
        if cache is not None:
            key = hashlib.sha256(json.dumps(how).encode()).hexdigest()
            self._file = Path(cache) / f"ccc-{key[:16]}.npz"
            if self._file.exists():
                self.of_pair = AccuracyMatrix.read(self._file).of_pair

    def __getitem__(self, pair: Pair) -> Accuracies:
        if pair not in self.of_pair:
            self.of_pair[pair] = self._measure(pair)
            if self._file is not None:
                self.save(self._file)
        return self.of_pair[pair]

    def _measure(self, pair: Pair) -> Accuracies:
        levels = self._levels
        measured = np.empty((len(levels), len(levels)))
        once = self._images
        with torch.no_grad(), _evaluating(self._model):
            for row, column in self._progress([(r, c) for r in range(len(levels)) for c in range(len(levels))]):
                if column == 0:
                    once = corrupt(self._images, pair[0], levels[row] / QUARTERS, **self._settings)
                twice = corrupt(once, pair[1], levels[column] / QUARTERS, **self._settings)
                measured[row, column] = self._accuracy(twice)
        every = np.arange(LEVELS)
        rows = np.stack([np.interp(every, levels, values) for values in measured])
        return np.stack([np.interp(every, levels, values) for values in rows.T]).T

    def _accuracy(self, images: Tensor) -> float:
        """In percent."""
        place = next(self._model.parameters(), images) if isinstance(self._model, nn.Module) else images
        logits = torch.cat([self._model(to_float(part.to(place.device))) for part in images.split(BATCH)])
        return 100 * (logits.argmax(1).cpu() == self._labels).double().mean().item()


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
        model: as in :class:`Calibration`, and so are the other settings.
        images: (n, 3, height, width), uint8, clean.
        labels: (n,), int64.
        of: pairs to measure; left out, all ordered pairs of the corruptions of CCC-Easy, 182.

    Raises:
        ValueError: as :class:`Calibration`.
    """
    calibration = Calibration(model, images, labels, **settings)
    easy = pool(100)
    for pair in [(a, b) for a in easy for b in easy if a != b] if of is None else of:
        calibration[pair]
    return AccuracyMatrix(calibration.of_pair, calibration.calibration)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """A module is in evaluation mode; afterwards each of its parts has the mode it had."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


_NUMPY_CORE = ("numpy.core", "numpy._core")  # before numpy 2, and from it on
_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"{core}.multiarray", "_reconstruct") for core in _NUMPY_CORE),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY_CORE),
}


class _ArraysOnly(pickle.Unpickler):
    """Reads dictionaries, lists and numpy arrays; anything else in a pickle is refused before it is made."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAYS:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


def _pair(name: Any) -> Pair:
    if isinstance(name, tuple) and len(name) == 2:
        return name
    match = re.fullmatch(r"n1_(.+)_n2_(.+)", str(name))
    if match is None:
        raise ValueError(f"An accuracy matrix is named after its pair, like n1_fog_n2_snow; got {name!r}.")
    first, second = (_PUBLISHED_NAMES.get(part, part) for part in match.groups())
    return first, second


def _checked(name: Any, values: Any) -> Accuracies:
    array = np.asarray(values)
    if array.shape != (LEVELS, LEVELS) or array.dtype.kind not in "fiu":
        raise ValueError(
            f"The accuracy matrix of {name} is ({LEVELS}, {LEVELS}) numbers; got {array.dtype} of shape {array.shape}."
        )
    array = array.astype(np.float64)
    if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 100):
        raise ValueError(
            f"The accuracy matrix of {name} is in percent, 0 to 100; got {array.min():g} to {array.max():g}."
        )
    return array


# ---------------------------------------------------------------------- the images


def to_uint8(images: Tensor) -> Tensor:
    """Floating-point images in [0, 1] as uint8, rounded; uint8 images as they are."""
    return (images * 255).round().to(torch.uint8) if images.is_floating_point() else images


class Walk:
    """A domain under two corruptions, one after the other, whose severities change from stop to stop.

    Images are made when they are asked for and not kept: none comes twice, each arrival has draws of its own.

    Args:
        name: of the domain.
        clean: the images.
        chosen: (n,), int64, positions in ``clean``, in order of arrival.
        stops: as many as are needed.
        speed: images a stop.
        recipe: of the corruptions.
        seed: of their draws.
        target: accuracy in percent that the stops were chosen for.
        matrix: where their accuracies come from.
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
            constants(corruption, 1 / QUARTERS, recipe)  # refuses what there is not, now and not at the first image
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
            f"{mean:.1f} % by {matrix.told} (target {target:g} %)"
        )

    @property
    def pairs(self) -> tuple[Pair, ...]:
        """The pairs of corruptions in their order."""
        every = [(step.first, step.second) for step in self.steps]
        return tuple(pair for n, pair in enumerate(every) if n == 0 or pair != every[n - 1])

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8."""
        clean = to_uint8(self._clean.images(self._chosen[positions]))
        out = torch.empty_like(clean)
        stop = positions // self.speed
        for number in stop.unique().tolist():
            here, step = stop == number, self.steps[number]
            once = corrupt(clean[here], step.first, step.severity_1, index=positions[here], **self._settings)
            out[here] = corrupt(once, step.second, step.severity_2, index=positions[here], **self._settings)
        return out

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images: how they were made, from which bytes, along which path."""
        severities = torch.tensor([(step.severity_1, step.severity_2) for step in self.steps])
        return {
            "origin": self.origin,
            "generated": {**self._settings, "speed": self.speed},
            "pairs": [f"{first}+{second}" for first, second in self.pairs],
            "path": fingerprint.of_tensors([("severities", severities)]),
            **self._accuracies,
            "clean": self._clean.describe(),
        }
