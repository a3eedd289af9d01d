"""Metrics and curves of detection, from the boxes found in each image and its true ones."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Predictions
from tta.tasks import mean_of_known, precision

if TYPE_CHECKING:
    from tta.results.result import Row


def summary(predictions: Predictions, rows: "Sequence[Row]") -> dict[str, Any]:
    """The metrics of a run of detection in percent, see :func:`tta.tasks.precision`.

    Args:
        predictions: of the whole run.
        rows: of the result, which hold the numbers of each domain.

    Returns:
        ``map``, ``map_50``, ``map_75``: means over domains; ``map_stream`` and so on: of all images of the stream together, which is
        no mean of the others; ``domains``: the values in each, and ``classes``, the mAP of each class.
    """
    each = {row.domain: dict(row.sums) for row in rows if row.samples}
    found, truth = predictions.column("found"), predictions.column("truth")
    whole = next(iter(each.values())) if len(each) == 1 else precision(found, truth)
    numbers = [name for name in whole if name != "classes"]
    return {
        **{name: mean_of_known([of_domain[name] for of_domain in each.values()]) for name in numbers},
        **{f"{name}_stream": whole[name] for name in numbers},
        "domains": each,
    }


def per_batch(predictions: Predictions, starts: NDArray[np.int64]) -> dict[str, Any]:
    """Columns that detection alone has in :func:`tta.results.curves.per_batch`.

    Args:
        predictions: of the whole run.
        starts: place of the first image of each batch.

    Returns:
        ``boxes``: number of boxes found in an image, ``score``: highest score in it (0 without a box); means over the batch.
    """
    scores = predictions.column("found")[:, :, 5]
    count = (~np.isnan(scores)).sum(1).astype(np.float64)
    best = np.nan_to_num(scores, nan=0.0).max(1, initial=0.0).astype(np.float64)
    size = np.diff(np.append(starts, len(scores)))
    return {"boxes": np.add.reduceat(count, starts) / size, "score": np.add.reduceat(best, starts) / size}
