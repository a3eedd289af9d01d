"""Metrics and curves of regression, all from the predicted and the true numbers of each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Predictions
from tta.tasks import errors_of, mean_of_known


def summary(predictions: Predictions, domains: Sequence[str]) -> dict[str, Any]:
    """The metrics of a run of regression, see :func:`tta.tasks.errors_of`.

    Returns:
        ``mae``, ``rmse``, ``r2``, ``pearson``: means over domains; ``r2_stream`` and so on: of all images of the stream together,
        as the papers report a stream of one domain; ``domains``: the values in each.
    """
    value, target = predictions.column("value"), predictions.column("target")
    found = {name: predictions.domain == number for number, name in enumerate(domains)}
    each = {name: errors_of(value[where], target[where]) for name, where in found.items() if where.any()}
    whole = errors_of(value, target)
    return {
        **{name: mean_of_known([of_domain[name] for of_domain in each.values()]) for name in whole},
        **{f"{name}_stream": number for name, number in whole.items()},
        "domains": each,
    }


def per_batch(predictions: Predictions, starts: NDArray[np.int64]) -> dict[str, Any]:
    """Columns that regression alone has in :func:`tta.results.curves.per_batch`.

    Args:
        predictions: of the whole run.
        starts: place of the first image of each batch.

    Returns:
        ``mae``: see :func:`tta.tasks.errors_of`; ``value``: mean prediction.
    """
    value, target = (np.split(predictions.column(name), starts[1:]) for name in ("value", "target"))
    return {
        "mae": np.array([errors_of(found, true)["mae"] for found, true in zip(value, target, strict=True)]),
        "value": np.array([float(found.mean()) for found in value]),
    }
