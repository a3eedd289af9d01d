"""A run batch by batch: error, confidence and signs of collapse, as columns and as a Parquet file."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Predictions

NEEDED = ("batch", "seconds", "confidence", "entropy")  # optional columns of the predictions that curves need
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
        * ``seconds``: from the start of the run to the batch's logits (on a GPU: until they were requested).

    Raises:
        ValueError: the predictions lack those columns.
    """
    batch = predictions.column("batch")
    starts = np.flatnonzero(np.diff(batch, prepend=-1))
    ends = np.append(starts[1:], len(batch))
    spans = list(zip(starts.tolist(), ends.tolist(), strict=True))
    known, wrong = predictions.known, predictions.known & ~predictions.correct
    scored = _sums(known, starts)
    with np.errstate(invalid="ignore"):
        error = np.where(scored > 0, 100.0 * _sums(wrong, starts) / scored, np.nan)
    signs = [_signs(predictions, known, min(start, max(0, end - WINDOW)), end) for start, end in spans]
    class_entropy, label_entropy, largest_share = zip(*signs, strict=True) if signs else ((), (), ())
    return {
        "batch": batch[starts],
        "domain": [domains[number] for number in predictions.domain[starts]],
        "samples": ends - starts,
        "error": error,
        "confidence": _sums(predictions.column("confidence"), starts) / (ends - starts),
        "entropy": _sums(predictions.column("entropy"), starts) / (ends - starts),
        "classes": [_histogram(predictions.prediction[start:end]) for start, end in spans],
        "class_entropy": np.array(class_entropy),
        "label_entropy": np.array(label_entropy),
        "largest_share": np.array(largest_share),
        "seconds": predictions.column("seconds")[starts],
    }


def collapse(columns: dict[str, Any]) -> dict[str, Any]:
    """Summary of the curves that shows a collapse: their first and last tenth, and the worst batch.

    Args:
        columns: from :func:`per_batch`.

    Returns:
        ``entropy``, ``class_entropy``, ``label_entropy``, ``largest_share``: the means over the ``first`` and the
        ``last`` tenth of the batches; ``worst``: the batch whose class entropy is farthest below its label entropy, or
        lowest if no label is known.
    """
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
    """Write the columns of :func:`per_batch` as a Parquet file; ``classes`` as a map from int32 to int32."""
    import pyarrow  # here, because it takes a quarter of a second and only runs that save need it
    from pyarrow import parquet

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
