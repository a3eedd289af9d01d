"""A run batch by batch: error, confidence and signs of collapse, as columns and as a Parquet file."""

from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tta.results import boxes, maps, numbers
from tta.results.predictions import ACTIONS, Predictions

NEEDED = ("batch", "seconds", "confidence", "entropy")  # optional columns of the predictions that curves need
KINDS = (NEEDED, ("batch", "seconds", "value", "target"), ("batch", "seconds", "found", "truth"))  # or of other tasks
# A histogram of fewer predictions than this does not show a collapse: the entropy of a single prediction is always 0.
WINDOW = 100


def histogram_entropy(counts: NDArray[Any]) -> float:
    """Entropy in nats of a histogram of classes: 0 if only one occurs.

    Args:
        counts: (classes,), 0 or more each.
    """
    shares = counts[counts > 0] / max(1, counts.sum())
    return float(-(shares * np.log(shares)).sum()) + 0.0


def per_batch(predictions: Predictions, domains: Sequence[str]) -> dict[str, Any]:
    """Columns with one entry per batch, in stream order.

    Args:
        predictions: with the columns that :func:`tta.evaluate` keeps.
        domains: names of the domains.

    Returns:
        * ``batch``: its number; ``domain``: of its first sample; ``samples``: their number;
        * ``error``: in percent, over known classes; NaN if there is none;
        * ``confidence``, ``entropy``: mean highest probability, mean entropy of the predicted distributions in nats;
        * ``classes``: number of predictions of each class, ``{class: count}``, without classes that were not predicted;
        * ``class_entropy``, ``label_entropy``, ``largest_share``: entropy in nats of the predicted classes, of the true
          classes, and the share of the most frequent predicted class, over the batch or, if it is smaller, over the last
          100 samples. Class entropy well below label entropy is a collapse; if both are low, the stream is one-sided;
        * ``guard``: ``learned``, ``held`` (only predicted) or ``source`` (the source model answered); not without a guard;
        * ``miou``: of maps alone, in percent; there ``error``, ``classes`` and the entropies of classes count pixels;
        * ``seconds``: from the start of the run to the batch's logits (on a GPU: until they were requested);
        * of regression only ``batch``, ``domain``, ``samples``, ``mae``, ``value`` (mean prediction), ``seconds``, ``guard``; of
          detection ``boxes`` and ``score`` (of the highest box of each image, a mean) in place of the two in the middle.

    Raises:
        ValueError: the predictions lack those columns.
    """
    batch = predictions.column("batch")
    starts = np.flatnonzero(np.diff(batch, prepend=-1))
    return {
        "batch": batch[starts],
        "domain": [domains[number] for number in predictions.domain[starts]],
        "samples": np.diff(np.append(starts, len(batch))),
        **_own_columns(predictions)(predictions, starts),
        "seconds": predictions.column("seconds")[starts],
        **({} if predictions.guard is None else {"guard": [ACTIONS[action] for action in predictions.guard[starts]]}),
    }


def _own_columns(predictions: Predictions) -> Callable[[Predictions, NDArray[np.int64]], dict[str, Any]]:
    """The function that makes the columns of the predictions' task alone."""
    if predictions.confusion is not None:
        return maps.per_batch
    if predictions.value is not None:
        return numbers.per_batch
    return _of_classes if predictions.found is None else boxes.per_batch


def _of_classes(predictions: Predictions, starts: NDArray[np.int64]) -> dict[str, Any]:
    """Columns of one class an image."""
    ends = np.append(starts[1:], len(predictions))
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    known, wrong = predictions.known, predictions.known & ~predictions.correct
    scored = _sums(known, starts)
    with np.errstate(invalid="ignore"):
        error = np.where(scored > 0, 100.0 * _sums(wrong, starts) / scored, np.nan)
    signs = [_signs(predictions, known, min(start, max(0, end - WINDOW)), end) for start, end in spans]
    class_entropy, label_entropy, largest_share = zip(*signs, strict=True) if signs else ((), (), ())
    return {
        "error": error,
        "confidence": _sums(predictions.column("confidence"), starts) / (ends - starts),
        "entropy": _sums(predictions.column("entropy"), starts) / (ends - starts),
        "classes": [_histogram(predictions.prediction[start:end]) for start, end in spans],
        "class_entropy": np.array(class_entropy),
        "label_entropy": np.array(label_entropy),
        "largest_share": np.array(largest_share),
    }


def collapse(columns: dict[str, Any]) -> dict[str, Any]:
    """Summary of the curves that shows a collapse: their first and last tenth, and the worst batch.

    Args:
        columns: from :func:`per_batch`.

    Returns:
        ``entropy``, ``class_entropy``, ``label_entropy``, ``largest_share``: the means over the ``first`` and the
        ``last`` tenth of the batches; ``worst``: the batch whose class entropy is farthest below its label entropy, or
        lowest if no label is known. Empty without classes.
    """
    if "class_entropy" not in columns:
        return {}
    batches = len(columns["batch"])
    tenth = max(1, batches // 10)
    found: dict[str, Any] = {
        name: {"first": float(np.mean(columns[name][:tenth])), "last": float(np.mean(columns[name][-tenth:]))}
        for name in ("entropy", "class_entropy", "label_entropy", "largest_share")
    }
    gap = columns["class_entropy"] - np.nan_to_num(columns["label_entropy"])
    at = int(gap.argmin())
    keys = ("batch", "domain", "class_entropy", "label_entropy", "largest_share")
    return {**found, "worst": {key: columns[key][at] for key in keys}}


def write_parquet(columns: dict[str, Any], file: BinaryIO) -> None:
    """Write the columns of :func:`per_batch` as a Parquet file; ``classes``, if there, as a map from int32 to int32."""
    import pyarrow  # here, because it takes a quarter of a second and only runs that save need it
    from pyarrow import parquet

    if "classes" not in columns:
        parquet.write_table(pyarrow.table(columns), file)
        return
    counts = pyarrow.array(
        [list(histogram.items()) for histogram in columns["classes"]], pyarrow.map_(pyarrow.int32(), pyarrow.int32())
    )
    parquet.write_table(pyarrow.table({**columns, "classes": counts}), file)


def _sums(values: NDArray[Any], starts: NDArray[Any]) -> NDArray[Any]:
    return np.add.reduceat(values.astype(np.float64), starts) if len(starts) else np.zeros(0)


def _signs(predictions: Predictions, known: NDArray[np.bool_], start: int, end: int) -> tuple[float, float, float]:
    counts = np.bincount(predictions.prediction[start:end])
    labels = predictions.label[start:end][known[start:end]]
    label_entropy = histogram_entropy(np.bincount(labels)) if len(labels) else np.nan
    return histogram_entropy(counts), label_entropy, float(counts.max() / counts.sum())


def _histogram(classes: NDArray[np.int64]) -> dict[int, int]:
    values, counts = np.unique(classes, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))
