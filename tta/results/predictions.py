"""All predictions of a run as columns in stream order; every number of a result is computed from them."""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta.labels import UNKNOWN

# Of a guard with a batch: learn from it, only predict it, let the source model answer.
ACTIONS = ("learned", "held", "source")
SHAPES = {  # of columns that hold more than one number a sample
    **dict.fromkeys(("value", "target"), ("samples", "values")),
    **dict.fromkeys(("found", "truth"), ("samples", "most", "6")),
}
Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Scores = NDArray[np.floating[Any]]
Booleans = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class Predictions:
    """Every prediction of a run, in stream order.

    All arrays have the shape (samples,), but those with their shape below; the first five are int64. The arrays after ``prediction`` may be None: results of earlier versions were saved without them.

    Attributes:
        domain: position in the result's rows.
        index: number of the image in its source; the same image has the same number in every domain.
        label: its class; -1 for an unknown class, which is left out of the errors, and for an image that has many or none.
        prediction: the predicted class; -1 where the task predicts another thing.
        batch: number of the sample's batch.
        seconds: from the start of the run to the logits of the sample's batch.
        confidence: the highest probability.
        entropy: of the predicted distribution, in nats.
        nll: minus the log-probability of the label; NaN for an unknown class.
        brier: squared distance of the probabilities to the label's; NaN for an unknown class.
        outlier_score: the method's own, higher = more likely an unknown class; None if it gives none.
        guard: what the guard did with the sample's batch, a place in :data:`ACTIONS`; None without a guard.
        confusion: (samples, classes, classes), int32, of maps: pixels of the image by true, then predicted class, void left
            out. ``confidence`` and ``entropy`` are then means over pixels of the image.
        found, truth: (samples, most, 6), of detection: left, top, right, bottom, class, then the score of a box found, and whether
            a true box is a crowd; NaN in the rows behind the last box of an image.
        value, target: (samples, values), of regression: the predicted and the true numbers; NaN where these are not known.
    """

    domain: Integers
    index: Integers
    label: Integers
    prediction: Integers
    batch: Integers | None = None
    seconds: Floats | None = None
    confidence: Scores | None = None
    entropy: Scores | None = None
    nll: Scores | None = None
    brier: Scores | None = None
    outlier_score: Scores | None = None
    guard: Integers | None = None
    confusion: NDArray[np.int32] | None = None
    value: Scores | None = None
    target: Scores | None = None
    found: Scores | None = None
    truth: Scores | None = None

    def __post_init__(self) -> None:
        for name in ("domain", "index", "label", "prediction", "batch", "guard"):
            if getattr(self, name) is None:
                continue
            values = np.asarray(getattr(self, name))
            if values.ndim != 1 or not (np.issubdtype(values.dtype, np.integer) or values.size == 0):
                raise ValueError(f"{name}: expected integers of shape (samples,); got {values.dtype} {values.shape}.")
            object.__setattr__(self, name, values.astype(np.int64))
        for name, values in self.columns():
            if name == "confusion":
                self._check_confusion(values)
            elif name in SHAPES:
                if values.ndim != len(SHAPES[name]) or values.dtype.kind != "f":
                    raise ValueError(
                        f"{name}: expected floating-point numbers of shape ({', '.join(SHAPES[name])}); got {values.dtype} "
                        f"{values.shape}."
                    )
            elif values.ndim != 1 or values.dtype.kind not in "iuf":
                raise ValueError(f"{name}: expected numbers of shape (samples,); got {values.dtype} {values.shape}.")
        lengths = {name: len(values) for name, values in self.columns()}
        if len(set(lengths.values())) > 1:
            found = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise ValueError(f"Predictions need arrays of one length; got {found}.")

    def _check_confusion(self, values: NDArray[Any]) -> None:
        if values.ndim != 3 or values.shape[1] != values.shape[2] or values.dtype.kind not in "iu":
            raise ValueError(
                f"confusion: expected integers of shape (samples, classes, classes); got {values.dtype} {values.shape}."
            )
        object.__setattr__(self, "confusion", values.astype(np.int32))

    def __len__(self) -> int:
        return len(self.label)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Predictions):
            return NotImplemented
        mine, theirs = dict(self.columns()), dict(other.columns())
        return mine.keys() == theirs.keys() and all(
            np.array_equal(values, theirs[name], equal_nan=values.dtype.kind == "f") for name, values in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]

    @property
    def correct(self) -> Booleans:
        """Whether each prediction is right, shape (samples,); always false for an unknown class."""
        right: Booleans = (self.prediction == self.label) & self.known
        return right

    @property
    def known(self) -> Booleans:
        """Whether each sample has a class that can be scored, shape (samples,)."""
        known: Booleans = self.label != UNKNOWN
        return known

    def columns(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """Names and arrays of all columns that are not None."""
        for field in fields(self):
            values = getattr(self, field.name)
            if values is not None:
                yield field.name, values

    def column(self, name: str) -> NDArray[Any]:
        """The array of this name.

        Raises:
            ValueError: the column is None.
        """
        values: NDArray[Any] | None = getattr(self, name)
        if values is None:
            raise ValueError(f"These predictions were kept without '{name}'; those of tta.evaluate have it. Run again.")
        return values

    def select(self, which: NDArray[Any]) -> "Predictions":
        """The predictions at some positions, given as a mask or as integers."""
        return Predictions(**{name: values[which] for name, values in self.columns()})
