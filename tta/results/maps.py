"""Metrics and curves of maps, all from the confusion matrix of each image."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Predictions
from tta.tasks import class_iou, mean_iou


def summary(predictions: Predictions, domains: Sequence[str]) -> dict[str, Any]:
    """The metrics of a run of maps, in percent but for entropies (nats). What is summed before a ratio is taken differs:

    * ``miou_stream``: one matrix of the whole stream, as CarlaTTA is reported;
    * ``miou_image``: the mean over the images of a domain of the mIoU of each, then over domains, as medical papers report;
    * ``miou_class``: the IoU of each class averaged over the domains that have it, then over the classes, as the SHIFT
      challenge is reported, where a domain is a sequence.

    :attr:`tta.Result.score` sums over the images of a domain, then takes the mean over domains, as Cityscapes to ACDC is
    reported. In all of them a class that is neither true nor predicted does not count, nor does a void pixel.

    Returns:
        Those, and ``pixel_error``, ``entropy``, ``confidence``, means over domains; ``domains``: the values in each, and
        ``class_iou``, by class, NaN for a class without pixels.
    """
    confusion = predictions.column("confusion")
    parts = {name: predictions.select(predictions.domain == number) for number, name in enumerate(domains)}
    found = {name: _of_domain(part) for name, part in parts.items() if len(part)}
    by_class = np.array([values["class_iou"] for values in found.values()])
    return {
        "miou_stream": mean_iou(confusion.sum(0, dtype=np.int64)),
        "miou_class": _mean(_mean_of_columns(by_class)),
        **{
            name: _mean(np.array([values[name] for values in found.values()]))
            for name in ("miou_image", "pixel_error", "entropy", "confidence")
        },
        "domains": found,
    }


def _of_domain(predictions: Predictions) -> dict[str, Any]:
    matrices = predictions.column("confusion")
    whole = matrices.sum(0, dtype=np.int64)
    return {
        "miou": mean_iou(whole),
        "miou_image": _mean(np.array([mean_iou(matrix) for matrix in matrices])),
        "pixel_error": _error(whole),
        "entropy": float(predictions.column("entropy").astype(np.float64).mean()),
        "confidence": float(predictions.column("confidence").astype(np.float64).mean()),
        "class_iou": class_iou(whole).tolist(),
    }


def per_batch(predictions: Predictions, starts: NDArray[np.int64]) -> dict[str, Any]:
    """Columns of maps in :func:`tta.results.curves.per_batch`: those of a classifier, but of pixels, and ``miou``.

    Args:
        predictions: of the whole run.
        starts: place of the first image of each batch.
    """
    from tta.results.curves import histogram_entropy

    matrices = np.add.reduceat(predictions.column("confusion").astype(np.int64), starts)
    predicted, true = matrices.sum(1), matrices.sum(2)
    size = np.diff(np.append(starts, len(predictions)))
    return {
        "error": np.array([_error(matrix) for matrix in matrices]),
        "miou": np.array([mean_iou(matrix) for matrix in matrices]),
        "confidence": np.add.reduceat(predictions.column("confidence").astype(np.float64), starts) / size,
        "entropy": np.add.reduceat(predictions.column("entropy").astype(np.float64), starts) / size,
        "classes": [{int(k): int(counts[k]) for k in np.flatnonzero(counts)} for counts in predicted],
        "class_entropy": np.array([histogram_entropy(counts) for counts in predicted]),
        "label_entropy": np.array([histogram_entropy(counts) if counts.any() else np.nan for counts in true]),
        "largest_share": predicted.max(1) / predicted.sum(1).clip(1),
    }


def _error(matrix: NDArray[Any]) -> float:
    pixels = matrix.sum()
    return float(100.0 * (pixels - np.trace(matrix)) / pixels) if pixels else np.nan


def _mean(values: NDArray[Any]) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _mean_of_columns(values: NDArray[Any]) -> NDArray[Any]:
    return np.array([_mean(column) for column in values.T])
