"""Bootstrap intervals of errors, and of the error difference of two methods on the same images."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Floats, Integers, Predictions
from tta.results.result import Result


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval, in percent or percentage points."""

    estimate: float
    low: float
    high: float


def error_interval(result: Result, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Bootstrap interval of one result's mean error, in percent (see :func:`paired_bootstrap`).

    Raises:
        ValueError: a result without predictions, or without scored samples.
    """
    own = _predictions(result)
    own = own.select(own.known)
    return _bootstrap(own.domain, own.index, ~own.correct, resamples, seed, level)


def compare_errors(a: Result, b: Result, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean error of ``b`` minus that of ``a`` in percentage points, over the domains (by name) and images both share.

    Raises:
        ValueError: a result without predictions, and as :func:`paired_bootstrap`.
    """
    first, second = _predictions(a), _predictions(b)
    position = {row.domain: number for number, row in enumerate(a.rows)}
    to_a = np.array([position.get(row.domain, -1) for row in b.rows], dtype=np.int64)
    domain = to_a[second.domain]
    moved = Predictions(domain=domain, index=second.index, label=second.label, prediction=second.prediction)
    return paired_bootstrap(first, moved.select(domain >= 0), resamples=resamples, seed=seed, level=level)


def paired_bootstrap(
    a: Predictions, b: Predictions, *, resamples: int = 2000, seed: int = 0, level: float = 0.95
) -> Interval:
    """Mean error of ``b`` minus that of ``a`` in percentage points, with a percentile bootstrap interval.

    Over the samples that both predicted, matched by domain and image number (if an image comes again, the n-th visit
    with the n-th). Images are resampled: one draw takes an image in all of its domains at once and for both methods,
    because its errors there are not independent. The interval covers other images drawn from the same source, not other
    orders, seeds or source models.

    Efron & Tibshirani, "An Introduction to the Bootstrap", 1993, chapters 8 (data with structure) and 13 (percentiles).

    Args:
        a: the baseline.
        b: the predictions to compare; a position in ``domain`` means the same domain in both.
        resamples: number of resamples.
        seed: of the draws.
        level: share of the resamples inside the interval.

    Raises:
        ValueError: no sample in common, or the same image with different labels.
    """
    a, b = a.select(a.known), b.select(b.known)
    in_a, in_b = _matched(a, b)
    if not len(in_a):
        raise ValueError("The two results have no image in common: there is nothing to pair.")
    a, b = a.select(in_a), b.select(in_b)
    if (a.label != b.label).any():
        raise ValueError("The same image numbers have different labels in the two results: they are of different data.")
    return _bootstrap(a.domain, a.index, (~b.correct).astype(int) - ~a.correct, resamples, seed, level)


def weighted_mean_error(weights: NDArray[Any], errors: Floats, samples: Floats) -> Floats:
    """Mean over domains of the error in percent, for several weightings of the images at once.

    Args:
        weights: (resamples, images), how often each image counts.
        errors: (domains, images), errors on an image in a domain (or the difference of the errors of two methods).
        samples: (domains, images), how often an image was scored in a domain.

    Returns:
        (resamples,); a domain without samples in a resample does not count in it, NaN if the resample has none at all.
    """
    weights = weights.astype(np.float64)
    wrong, seen = weights @ errors.T, weights @ samples.T
    present = seen > 0
    rates = np.divide(wrong, seen, out=np.zeros_like(wrong), where=present)
    count = present.sum(1)
    means: Floats = np.divide(100.0 * rates.sum(1), count, out=np.full(len(weights), math.nan), where=count > 0)
    return means


def _predictions(result: Result) -> Predictions:
    if result.predictions is None:
        raise ValueError(f"{result!r} has no predictions, and an interval needs them: predictions.npz is missing.")
    return result.predictions


def _matched(a: Predictions, b: Predictions) -> tuple[Integers, Integers]:
    """Positions in ``a`` and in ``b`` of their common samples."""
    _, image = np.unique(np.concatenate([a.index, b.index]), return_inverse=True)
    domain = np.concatenate([a.domain, b.domain])
    cell = domain * (image.max(initial=0) + 1) + image
    keys = [_visits(part) * (cell.max(initial=0) + 1) + part for part in (cell[: len(a)], cell[len(a) :])]
    _, in_a, in_b = np.intersect1d(keys[0], keys[1], assume_unique=True, return_indices=True)
    return in_a, in_b


def _visits(cell: Integers) -> Integers:
    """Number of earlier occurrences of each value: [7, 8, 7, 7] -> [0, 0, 1, 2]."""
    order = np.argsort(cell, kind="stable")
    ranked = cell[order]
    visits = np.empty_like(cell)
    visits[order] = np.arange(len(cell)) - np.searchsorted(ranked, ranked, side="left")
    return visits


def _bootstrap(
    domain: Integers, index: Integers, wrong: NDArray[Any], resamples: int, seed: int, level: float
) -> Interval:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"Expected resamples >= 1 and 0 < level < 1; got resamples={resamples}, level={level}.")
    if not len(domain):
        raise ValueError("No sample of a known class: there is no error to give an interval for.")
    domains, row = np.unique(domain, return_inverse=True)
    images, column = np.unique(index, return_inverse=True)
    shape = len(domains), len(images)
    cell = row * len(images) + column
    errors: Floats = np.bincount(cell, weights=wrong, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)
    samples: Floats = np.bincount(cell, minlength=shape[0] * shape[1]).reshape(shape).astype(np.float64)

    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(images))  # draws in memory at a time: 32 MB
    means = np.concatenate(
        [
            weighted_mean_error(_draw(generator, min(chunk, resamples - done), len(images)), errors, samples)
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    estimate = weighted_mean_error(np.ones((1, len(images))), errors, samples)[0]
    return Interval(float(estimate), float(low), float(high))


def _draw(generator: np.random.Generator, resamples: int, images: int) -> Integers:
    """Number of draws of each image, (resamples, images): one draw per image, with replacement."""
    draws = generator.integers(0, images, size=(resamples, images))
    draws += np.arange(resamples)[:, None] * images
    return np.bincount(draws.ravel(), minlength=resamples * images).reshape(resamples, images)
