"""Frames: a few pictures of a run with their truth and prediction, kept for figures."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a run.

    Attributes:
        position: its place in the stream, from 0.
        domain: number of its domain, the place in :attr:`tta.Result.rows`.
        scale: pixels of ``image`` for each pixel of the picture that the model saw.
        image: (rows, columns, 3), uint8.
        truth: (rows, columns), int16, the true class of each pixel, -1 for void; of detection (0, 0), as the boxes are in
            :attr:`tta.Result.predictions`.
        predicted: likewise.
    """

    position: int
    domain: int
    scale: float
    image: NDArray[np.uint8]
    truth: NDArray[np.int16]
    predicted: NDArray[np.int16]


def save(frames: Iterable[Frame], stream: BinaryIO) -> None:
    """Write frames as a compressed ``.npz``: ``0_image``, ``0_truth`` ... of the first."""
    arrays: dict[str, Any] = {
        f"{number}_{field.name}": np.asarray(getattr(frame, field.name))
        for number, frame in enumerate(frames)
        for field in fields(Frame)
    }
    np.savez_compressed(stream, **arrays)


def load(file: Any) -> tuple[Frame, ...]:
    """The frames that :func:`save` wrote."""
    with np.load(file, allow_pickle=False) as arrays:
        count = sum(name.endswith("_position") for name in arrays.files)
        return tuple(
            _frame({field.name: arrays[f"{number}_{field.name}"] for field in fields(Frame)}) for number in range(count)
        )


def _frame(arrays: dict[str, NDArray[Any]]) -> Frame:
    numbers: dict[str, Any] = {"position": int(arrays["position"]), "domain": int(arrays["domain"])}
    return Frame(**{**arrays, **numbers, "scale": float(arrays["scale"])})
