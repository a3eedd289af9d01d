"""Bootstrap intervals of errors, and of the error difference of two methods on the same images."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tta.results.predictions import Floats, Integers, Predictions
from tta.results.result import Result

NO_INTERVAL = "There is no interval of mAP: it is no mean over images, so that every resample would be matched anew."


@dataclass(frozen=True)
class Interval:
    """A number with its bootstrap interval, in percent or percentage points, of regression in the unit of the labels."""

    estimate: float
    low: float
    high: float


def error_interval(result: Result, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Bootstrap interval of one result's mean error, of maps of its mIoU, of regression of its MAE (see :func:`paired_bootstrap`).

    Raises:
        ValueError: a result without predictions, or without scored samples.
    """
    own = _predictions(result)
    if own.found is not None:
        raise ValueError(NO_INTERVAL)
    if own.confusion is not None:
        return _bootstrap(own.domain, own.index, _OfMaps([own.confusion]), resamples, seed, level)
    if own.value is not None:
        own = own.select(_scored(own))
        return _bootstrap(own.domain, own.index, _OfErrors(_absolute(own) / 100), resamples, seed, level)
    own = own.select(own.known)
    return _bootstrap(own.domain, own.index, _OfErrors(~own.correct), resamples, seed, level)


def compare_errors(a: Result, b: Result, *, resamples: int = 2000, seed: int = 0, level: float = 0.95) -> Interval:
    """Mean error of ``b`` minus that of ``a`` in percentage points, over the domains (by name) and images both share.

    Of maps it is the mean mIoU of ``b`` minus that of ``a``, where more is better; of regression the mean MAE.

    Raises:
        ValueError: results of two tasks, a result without predictions, and as :func:`paired_bootstrap`.
    """
    first, second = _predictions(a), _predictions(b)
    position = {row.domain: number for number, row in enumerate(a.rows)}
    to_a = np.array([position.get(row.domain, -1) for row in b.rows], dtype=np.int64)
    domain = to_a[second.domain]
    if a.task == b.task == "detection":
        raise ValueError(NO_INTERVAL)
    if a.task != b.task:
        raise ValueError(f"One of the two results is of {a.task}, the other of {b.task}: there is nothing to pair.")
    moved = Predictions(
        domain=domain,
        index=second.index,
        label=second.label,
        prediction=second.prediction,
        confusion=second.confusion,
        value=second.value,
        target=second.target,
    )
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
    maps = a.confusion is not None and b.confusion is not None
    numbers = a.value is not None and b.value is not None
    if numbers:
        a, b = a.select(_scored(a)), b.select(_scored(b))
    elif not maps:
        a, b = a.select(a.known), b.select(b.known)
    in_a, in_b = _matched(a, b)
    if not len(in_a):
        raise ValueError("The two results have no image in common: there is nothing to pair.")
    a, b = a.select(in_a), b.select(in_b)
    if (a.label != b.label).any():
        raise ValueError("The same image numbers have different labels in the two results: they are of different data.")
    if a.confusion is not None and b.confusion is not None:
        if not np.array_equal(a.confusion.sum(2), b.confusion.sum(2)):
            raise ValueError(
                "The same image numbers have different masks in the two results: they are of different data."
            )
        return _bootstrap(a.domain, a.index, _OfMaps([a.confusion, b.confusion]), resamples, seed, level)
    if numbers:
        if not np.array_equal(a.column("target"), b.column("target")):
            raise ValueError(
                "The same image numbers have different targets in the two results: they are of different data."
            )
        change = _absolute(b) - _absolute(a)
        # a mean of errors is turned into percent, and this one is none
        return _bootstrap(a.domain, a.index, _OfErrors(change / 100), resamples, seed, level)
    return _bootstrap(a.domain, a.index, _OfErrors((~b.correct).astype(int) - ~a.correct), resamples, seed, level)


def _scored(predictions: Predictions) -> NDArray[np.bool_]:
    """Whether all numbers of each image are known."""
    known: NDArray[np.bool_] = ~np.isnan(predictions.column("target")).any(1)
    return known


def _absolute(predictions: Predictions) -> Floats:
    """Absolute error of each image, the mean over its values."""
    difference = predictions.column("value").astype(np.float64) - predictions.column("target")
    errors: Floats = np.abs(difference).mean(1)
    return errors


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
    domain: Integers, index: Integers, found: "_OfErrors | _OfMaps", resamples: int, seed: int, level: float
) -> Interval:
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"Expected resamples >= 1 and 0 < level < 1; got resamples={resamples}, level={level}.")
    if not len(domain):
        raise ValueError("No sample of a known class: there is no error to give an interval for.")
    domains, row = np.unique(domain, return_inverse=True)
    images, column = np.unique(index, return_inverse=True)
    shape = len(domains), len(images)
    found.arrange(row, column, shape)
    generator = np.random.default_rng(seed)
    chunk = max(1, 4_000_000 // len(images))  # draws in memory at a time: 32 MB
    means = np.concatenate(
        [
            found.means(_draw(generator, min(chunk, resamples - done), len(images)))
            for done in range(0, resamples, chunk)
        ]
    )
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    estimate = found.means(np.ones((1, len(images))))[0]
    return Interval(float(estimate), float(low), float(high))


class _OfErrors:
    """Mean error of weighted images, from the errors of samples (or the difference of those of two methods)."""

    def __init__(self, wrong: NDArray[Any]) -> None:
        self._wrong = wrong

    def arrange(self, row: Integers, column: Integers, shape: tuple[int, int]) -> None:
        """Sum the samples by domain (rows) and image (columns)."""
        cell, cells = row * shape[1] + column, shape[0] * shape[1]
        self._errors: Floats = np.bincount(cell, weights=self._wrong, minlength=cells).reshape(shape).astype(np.float64)
        self._samples: Floats = np.bincount(cell, minlength=cells).reshape(shape).astype(np.float64)

    def means(self, weights: NDArray[Any]) -> Floats:
        """The mean for several weightings of the images, (resamples, images) -> (resamples,)."""
        return weighted_mean_error(weights, self._errors, self._samples)


class _OfMaps:
    """Mean mIoU of weighted images, from confusion matrices of samples; of two methods the second's minus the first's."""

    def __init__(self, confusions: Sequence[NDArray[Any]]) -> None:
        self._confusions = confusions

    def arrange(self, row: Integers, column: Integers, shape: tuple[int, int]) -> None:
        """Sum what an IoU is made of by domain and image: intersection and union of each class."""
        self._parts = []
        for confusion in self._confusions:
            inside = np.diagonal(confusion, axis1=1, axis2=2).astype(np.float64)
            either = confusion.sum(1) + confusion.sum(2) - inside
            summed = np.zeros((*shape, 2, confusion.shape[1]))
            np.add.at(summed, (row, column), np.stack([inside, either], 1))
            self._parts.append(summed)

    def means(self, weights: NDArray[Any]) -> Floats:
        """The mean for several weightings of the images, (resamples, images) -> (resamples,)."""
        each = [self._mean(weights.astype(np.float64), summed) for summed in self._parts]
        means: Floats = each[0] if len(each) == 1 else each[1] - each[0]
        return means

    @staticmethod
    def _mean(weights: Floats, summed: Floats) -> Floats:
        of_domains = []
        for domain in summed:  # (images, 2, classes)
            inside, either = np.moveaxis(np.tensordot(weights, domain, 1), 1, 0)
            iou = np.divide(100.0 * inside, either, out=np.zeros_like(inside), where=either > 0)
            classes = (either > 0).sum(1)
            of_domains.append(np.divide(iou.sum(1), classes, out=np.full(len(weights), math.nan), where=classes > 0))
        found = np.stack(of_domains)
        known = ~np.isnan(found)
        total = np.where(known, found, 0).sum(0)
        means: Floats = np.divide(total, known.sum(0), out=np.full(len(weights), math.nan), where=known.any(0))
        return means


def _draw(generator: np.random.Generator, resamples: int, images: int) -> Integers:
    """Number of draws of each image, (resamples, images): one draw per image, with replacement."""
    draws = generator.integers(0, images, size=(resamples, images))
    draws += np.arange(resamples)[:, None] * images
    return np.bincount(draws.ravel(), minlength=resamples * images).reshape(resamples, images)
