"""Regression: one number an image, or several."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.labels import UNKNOWN
from tta.tasks.task import Scored, Tally, Task

if TYPE_CHECKING:
    from torch import Tensor


class Regression(Task):
    """Numbers of each image, scored by the mean absolute error (MAE). Said by the user: numbers look like logits."""

    name = "regression"
    outputs = "numbers (batch,) or (batch, values)"
    lacking = (
        "a regression model gives numbers, no class probabilities. Methods for regression: actmad, norm, source, ssa."
    )
    score_name = "MAE"
    direction = "down"
    unit = ""

    def read(self, output: Any, images: "Tensor") -> "Tensor":
        """Numbers (batch, values), float32, from a tensor or an object with ``.logits``; of (batch,) one each."""
        import torch

        found = getattr(output, "logits", output)
        if not isinstance(found, torch.Tensor):
            raise TypeError(
                f"The model returned {type(output).__name__}; task='regression' expects {self.outputs}. Pass outputs= with a "
                "function that takes them out."
            )
        if found.dim() not in (1, 2) or len(found) != len(images):
            raise ValueError(
                f"The model returned a tensor of shape {tuple(found.shape)} for {len(images)} images; task='regression' expects "
                f"{self.outputs}."
            )
        return found.float() if found.dim() == 2 else found.float()[:, None]

    def finite(self, output: Any) -> "Tensor":
        return output.isfinite()  # type: ignore[no-any-return]  # minus infinity is no number that an image has

    def columns(self, output: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """Predicted and true numbers.

        Args:
            output: (batch, values).
            labels: (batch, values) or, of one value, (batch,); NaN where it is not known.

        Returns:
            ``value`` and ``target``, (batch, values), float32; ``label`` and ``prediction``, (batch,), -1: there is no class.
        """
        import torch

        none = torch.full((len(output),), UNKNOWN, device=output.device)
        return {"label": none, "prediction": none, "value": output, "target": labels.float().view_as(output)}

    def check_labels(self, labels: "Tensor", output: Any) -> None:
        """Raise a ValueError unless the labels are as many numbers an image as the model gives."""
        if labels.numel() != output.numel() or not labels.is_floating_point():
            raise ValueError(
                f"The labels of a batch are {labels.dtype} of shape {tuple(labels.shape)}; the model gives {output.shape[1]} "
                "numbers an image. Make the stream with task='regression', of datasets of (image, numbers)."
            )

    def tally(self, predictions: Any) -> Tally:
        """Sums over the images whose numbers are all known; each sum is a list with an entry for each value."""
        value, target = (predictions.column(name).astype(np.float64) for name in ("value", "target"))
        known = ~np.isnan(target).any(1)
        value, target = value[known], target[known]
        difference = value - target
        sums = {
            "absolute": np.abs(difference),
            "squared": difference**2,
            "target": target,
            "target_squared": target**2,
        }
        return Tally(len(value), 0, {name: part.sum(0).tolist() for name, part in sums.items()})

    def value(self, row: Scored) -> float:
        """Mean absolute error over the images and the values of each, in the unit of the labels."""
        return float(np.mean(row.sums["absolute"])) / row.samples if row.samples else math.nan


def errors_of(value: NDArray[Any], target: NDArray[Any]) -> dict[str, float]:
    """MAE, RMSE, R2 and Pearson's r, each of every value by itself and then averaged over the values.

    R2 is 1 - (sum of squared errors) / (sum of squared distances to the mean of these targets), so that it depends on which
    images are taken together.

    Args:
        value, target: (n, values); images with an unknown target (NaN) are left out.

    Returns:
        ``mae``, ``rmse``, ``r2``, ``pearson``; NaN where it is not defined.
    """
    value, target = value.astype(np.float64), target.astype(np.float64)
    known = ~np.isnan(target).any(1)
    value, target = value[known], target[known]
    if not len(value):
        return dict.fromkeys(("mae", "rmse", "r2", "pearson"), math.nan)
    difference, spread, own = value - target, target - target.mean(0), value - value.mean(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        r2 = 1 - (difference**2).sum(0) / np.where(spread.any(0), (spread**2).sum(0), np.nan)
        pearson = (spread * own).sum(0) / np.sqrt((spread**2).sum(0) * (own**2).sum(0))
    return {
        "mae": float(np.abs(difference).mean()),
        "rmse": float(np.sqrt((difference**2).mean(0)).mean()),
        "r2": float(r2.mean()),
        "pearson": float(pearson.mean()),
    }
