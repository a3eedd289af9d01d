"""Accuracy matrices of CCC: accuracy of a source model under two corruptions at a time, given or measured.

An accuracy matrix is float64 (21, 21): accuracy in percent, with the first corruption at severities 0, 0.25, ... 5 in rows
and the second, applied after it, in columns. The protocol is in :mod:`tta.datasets.ccc`.
"""

import contextlib
import hashlib
import json
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tta import fingerprint
from tta.datasets.corruptions import HIGHEST, QUARTERS, corrupt
from tta.datasets.domains import to_float

Accuracies = NDArray[np.float64]
Pair = tuple[str, str]
Severities = tuple[int, int]
Progress = Callable[[Sequence[Severities]], Iterable[Severities]]  # wraps the cells of a pair while they are measured

LEVELS = QUARTERS * HIGHEST + 1
BATCH = 100  # images per forward pass of the calibration
_PUBLISHED_NAMES = {"elastic": "elastic_transform", "jpeg": "jpeg_compression"}


class AccuracyMatrix:
    """Accuracy matrices of ordered pairs of corruptions: ``matrix["fog", "snow"]``.

    Args:
        of_pair: the matrices, by pairs like ``("fog", "snow")`` or by their published names, ``"n1_fog_n2_snow"``.
        calibration: how the matrices were measured, None for the published ones; with it a stream is called
            ``ccc-style``.

    Raises:
        ValueError: another name, a matrix of another shape, not in percent, or not finite.
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
    def origin(self) -> str:
        """Description of where the accuracies come from."""
        if self.calibration is None:
            return "the given matrix"
        return f"calibration on {self.calibration['images']} images, grid {self.calibration['grid']:g}"

    def describe(self, of: Iterable[Pair]) -> dict[str, Any]:
        """The manifest entry for some pairs: a hash over their matrices, and how they were measured."""
        arrays = [(f"{pair[0]}+{pair[1]}", torch.from_numpy(self[pair])) for pair in dict.fromkeys(of)]
        return {"matrix": fingerprint.of_tensors(arrays), "calibration": self.calibration}

    @classmethod
    def read(cls, file: str | Path) -> "AccuracyMatrix":
        """Read matrices from a file of :meth:`save`, or a mapping of arrays named like ``n1_fog_n2_snow``.

        Either ``.npz`` or pickled like the published one (``ccc_accuracy_matrix.pickle``,
        https://github.com/oripress/CCC). A pickle is read without running code from it: one that holds anything but
        numpy arrays is refused.

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
                        f"'{file}' is neither an .npz file nor a pickle of numpy arrays ({error}). If you trust it, "
                        "load it yourself and write its arrays with numpy.savez(file, **arrays)."
                    ) from None
        if not isinstance(arrays, dict):
            raise ValueError(f"'{file}' holds a {type(arrays).__name__}; expected arrays by names like n1_fog_n2_snow.")
        return cls(arrays, calibration)

    def save(self, file: str | Path) -> None:
        """Write the matrices as ``.npz``; a reader sees the old file or the complete new one."""
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
    """Accuracy matrices of your own model; a pair is measured on first use.

    Args:
        model: takes (n, 3, height, width) float32 in [0, 1], gives logits (n, classes).
        images: (n, 3, height, width), uint8, clean.
        labels: (n,), int64.
        recipe: of the corruptions, see :func:`tta.datasets.corrupt`.
        seed: of the corruptions' draws.
        grid: step between measured severities; the accuracies in between are interpolated linearly. 0.25 measures all
            441 cells of a pair, as published, 1 the 36 cells of whole severities. Where accuracy falls steeply in
            between, the stream's accuracy is off by up to 6 points with 0.5 and 11 with 1 (digits, contrast).
        cache: a folder for the measured matrices, in a file named by a hash of the model's weights, the images and these
            settings; needs an ``nn.Module``.
        progress: wraps the cells of a pair while they are measured, as a progress bar does.

    Raises:
        ValueError: a grid that does not fit, no images, or a cache for a model that is not an ``nn.Module``.
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
            raise ValueError(f"cache keeps the accuracies of an nn.Module, identified by its weights; got {model!r}.")
        weights = fingerprint.of_model(model) if isinstance(model, nn.Module) else None
        content = fingerprint.of_tensors([("images", images), ("labels", labels)])
        measured = {
            "images": len(images),
            "grid": grid,
            "recipe": recipe,
            "seed": seed,
            "model": weights,
            "content": content,
        }
        super().__init__({}, measured)
        self._model, self._images, self._labels = model, images, labels
        self._settings: dict[str, Any] = {"recipe": recipe, "seed": seed}
        self._levels = range(0, LEVELS, int(grid * QUARTERS))
        self._progress = progress or iter
        self._file: Path | None = None
        if cache is not None:
            key = hashlib.sha256(json.dumps(measured).encode()).hexdigest()
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
        interpolated: Accuracies = np.stack([np.interp(every, levels, values) for values in rows.T]).T
        return interpolated

    def _accuracy(self, images: Tensor) -> float:
        """Accuracy in percent."""
        place = next(self._model.parameters(), images) if isinstance(self._model, nn.Module) else images
        logits = torch.cat([self._model(to_float(part.to(place.device))) for part in torch.split(images, BATCH)])
        return 100 * (logits.argmax(1).cpu() == self._labels).double().mean().item()


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Put a module into evaluation mode, and restore the mode of each of its parts afterwards."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


_NUMPY_CORE = ("numpy.core", "numpy._core")  # before and since numpy 2
_ARRAYS = {
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
    *((f"{core}.multiarray", "_reconstruct") for core in _NUMPY_CORE),
    *((f"{core}.numeric", "_frombuffer") for core in _NUMPY_CORE),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickler for dictionaries, lists and numpy arrays; anything else is refused before it is created."""

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
