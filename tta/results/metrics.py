"""Metrics computed from predictions: pure functions of tensors, and ``torchmetrics`` classes that torchmetrics lacks.

Errors, ECE, AUROC and H-scores are in percent, as the papers print them; NLL and entropies in nats. Undefined values, such
as the error of a domain without known classes, are NaN.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error, multiclass_accuracy

from tta import functional
from tta.labels import UNKNOWN
from tta.results import boxes, maps, numbers
from tta.results.curves import histogram_entropy
from tta.results.predictions import Predictions
from tta.results.result import Row
from tta.tasks import CLASSIFICATION, mean_of_known

BINS = 15

# Mean error in percent of AlexNet, the reference of mCE, over the five severities of ImageNet-C (50 000 images each):
# Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
# with the digits that AugMix's evaluation (Hendrycks et al., ICLR 2020) copies from the benchmark's repository.
ALEXNET_ERRORS = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
SEVERITIES = (1, 2, 3, 4, 5)


# ---------------------------------------------------------------------- pure functions


def per_sample(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Class, confidence, entropy and losses of each prediction, from one softmax.

    Args:
        logits: (batch, classes).
        labels: (batch,), int64, on the same device; -1 for an unknown class.

    Returns:
        Each (batch,): ``prediction``; ``confidence``, the highest probability; ``entropy`` in nats; ``nll``, minus the
        log-probability of the label; ``brier``, the squared distance of the probabilities to the label's, in [0, 2].
        The last two are NaN for an unknown class; a label beyond the model's classes has probability 0.
    """
    return CLASSIFICATION.columns(logits, labels)


def balanced_error(prediction: Tensor, label: Tensor) -> float:
    """Mean over classes of the error in each, in percent; classes without a sample do not count.

    (In torchmetrics' macro average a class that is predicted but has no sample counts as an error of 100 %.)

    Args:
        prediction: (n,), int64.
        label: (n,), int64, 0 or more.
    """
    if not len(label):
        return math.nan
    classes = int(torch.maximum(prediction.max(), label.max())) + 1
    if classes == 1:
        return 0.0
    accuracy = multiclass_accuracy(prediction, label, classes, average="none")
    return 100.0 * (1 - float(accuracy[torch.unique(label)].double().mean()))


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """ECE: mean gap between confidence and accuracy over 15 bins of confidence, by their share of samples, in percent.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        confidence: (n,), probability of the predicted class.
        correct: (n,), boolean.
    """
    if not len(confidence) or confidence.isnan().any():
        return math.nan
    below_one = confidence.float().clamp(max=1 - 2**-24)  # torchmetrics has a separate bin for exactly 1
    return 100.0 * float(binary_calibration_error(below_one, correct.long(), n_bins=BINS))


def auroc(score: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve of a score that should be higher for unknown classes, in percent.

    Args:
        score: (n,), any scale.
        unknown: (n,), boolean.

    Returns:
        NaN unless there are known and unknown classes.
    """
    if not 0 < int(unknown.sum()) < len(unknown) or score.isnan().any():
        return math.nan
    # torchmetrics applies a sigmoid to scores outside [0, 1], which makes large ones equal: give it ranks in [0, 1).
    levels, rank = torch.unique(score, return_inverse=True)
    return 100.0 * float(binary_auroc(rank.double() / len(levels), unknown.long()))


def rejection_threshold(score: Tensor) -> float:
    """Otsu's threshold between low and high scores, midway between the two groups.

    The best of all possible thresholds, not of a histogram; see :func:`tta.functional.otsu_threshold`.

    Args:
        score: (n,).

    Returns:
        NaN if all scores are equal, or one is not finite.
    """
    distinct = torch.unique(score.double())
    if len(distinct) < 2 or not distinct.isfinite().all():
        return math.nan
    midway = (distinct[1:] + distinct[:-1]) / 2
    return float(functional.otsu_threshold(score, torch.ones_like(score, dtype=torch.bool), midway))


def h_score(accuracy: float, other: float) -> float:
    """Harmonic mean of two percentages; 0 if both are."""
    return 2 * accuracy * other / (accuracy + other) if accuracy + other else 0.0


def open_set(score: Tensor, correct: Tensor, unknown: Tensor) -> dict[str, float]:
    """Metrics of separating unknown classes from known ones, alone and combined with accuracy, in percent.

    Args:
        score: (n,), higher = more likely an unknown class.
        correct: (n,), boolean, whether the predicted class is right; false where ``unknown``.
        unknown: (n,), boolean.

    Returns:
        ``auroc``; ``h_score``, the harmonic mean of AUROC and accuracy on the known classes: Yu et al., "STAMP:
        Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024; ``h_score_otsu``, the harmonic mean of
        the share of known samples that are accepted and right and the share of unknown ones that are rejected, at Otsu's
        threshold: Li et al., "On the Robustness of Open-World Test-Time Training: Self-Training with Dynamic Prototype
        Expansion", ICCV 2023 (which computes the threshold again from the latest 512 scores).
    """
    area = auroc(score, unknown)
    if math.isnan(area):
        return {"auroc": math.nan, "h_score": math.nan, "h_score_otsu": math.nan}
    accuracy = _percent(correct[~unknown])
    rejected = score > rejection_threshold(score)
    kept, refused = _percent((correct & ~rejected)[~unknown]), _percent(rejected[unknown])
    return {"auroc": area, "h_score": h_score(accuracy, area), "h_score_otsu": h_score(kept, refused)}


def mean_corruption_error(errors: Mapping[tuple[str, int], float]) -> float:
    """mCE of ImageNet-C in percent: for each of 15 corruptions the error over five severities relative to AlexNet's, averaged.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
    AlexNet's errors are those on 50 000 images, even if ``errors`` are on a subset.

    Args:
        errors: (corruption, severity) -> error in percent; entries beyond the 15 x 5 are ignored.

    Returns:
        NaN unless all 15 corruptions have all five severities: mCE is not defined for severity 5 alone.
    """
    if any((name, severity) not in errors for name in ALEXNET_ERRORS for severity in SEVERITIES):
        return math.nan
    relative = [
        math.fsum(errors[name, severity] for severity in SEVERITIES) / (len(SEVERITIES) * alexnet)
        for name, alexnet in ALEXNET_ERRORS.items()
    ]
    return 100.0 * math.fsum(relative) / len(relative)


# ---------------------------------------------------------------------- torchmetrics classes


class _MeanOverSamples(Metric):
    """Mean of a column of :func:`per_sample` over the samples of known classes."""

    column: str
    is_differentiable = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits (batch, classes), labels (batch,), -1 for an unknown class."""
        known = labels != UNKNOWN
        self.total += per_sample(logits[known], labels[known])[self.column].double().sum()
        self.count += known.sum()

    def compute(self) -> Tensor:
        """The mean; NaN without samples."""
        return (self.total / self.count).float()


class NegativeLogLikelihood(_MeanOverSamples):
    """Mean negative log-likelihood of the labels in nats.

    Example:
        >>> import torch
        >>> metric = NegativeLogLikelihood()
        >>> metric.update(torch.zeros(4, 10), torch.tensor([3, 1, 4, -1]))
        >>> metric.compute()
        tensor(2.3026)
    """

    column = "nll"
    higher_is_better = False


class BrierScore(_MeanOverSamples):
    """Mean squared distance of the predicted probabilities to the label's, summed over classes: between 0 and 2.

    Brier, "Verification of Forecasts Expressed in Terms of Probability", Monthly Weather Review, 1950.
    """

    column = "brier"
    higher_is_better = False


class HScore(Metric):
    """Harmonic mean of the accuracy on known classes and the AUROC of detecting unknown ones, in percent.

    Yu et al., "STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    score: list[Tensor]
    correct: list[Tensor]
    unknown: list[Tensor]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name in ("score", "correct", "unknown"):
            self.add_state(name, [], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor, outlier_score: Tensor | None = None) -> None:
        """Add a batch.

        Args:
            logits: (batch, classes).
            labels: (batch,), -1 for an unknown class.
            outlier_score: (batch,), higher = more likely an unknown class; default: 1 - the highest probability.
        """
        found = per_sample(logits, labels)
        self.score.append(1 - found["confidence"] if outlier_score is None else outlier_score)
        self.correct.append(found["prediction"] == labels)
        self.unknown.append(labels == UNKNOWN)

    def compute(self) -> Tensor:
        """The H-score; NaN unless there were samples of known and of unknown classes."""
        score, correct, unknown = (
            torch.cat(parts) if isinstance(parts, list) else parts for parts in (self.score, self.correct, self.unknown)
        )
        return torch.tensor(open_set(score, correct, unknown)["h_score"])


class ClassEntropy(Metric):
    """Entropy in nats of the predicted classes' frequencies: ln(classes) if all are equal, 0 after a collapse to one class.

    Args:
        classes: number of classes.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Add a batch of logits (batch, classes)."""
        self.counts += logits.argmax(dim=1).bincount(minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The entropy; NaN without samples."""
        shares = self.counts / self.counts.sum()
        entropy: Tensor = -torch.special.xlogy(shares, shares).sum()
        return entropy


# ---------------------------------------------------------------------- a whole run


def summary(predictions: Predictions, rows: Sequence[Row], *, classes: int) -> dict[str, Any]:
    """The metrics of a run, each an unweighted mean over domains, as the papers report the error.

    Args:
        predictions: with the columns of :func:`per_sample`.
        rows: of the result.
        classes: number of the model's classes; mCE needs ImageNet's 1000.

    Returns:
        ``sample_weighted_error``, ``balanced_error``, ``ece``, ``nll``, ``brier``; with unknown classes in the stream
        ``auroc``, ``h_score``, ``h_score_otsu`` and the name of their ``outlier_score``; ``mce`` if it is defined;
        ``domains``: the values in each domain. Of maps those of :func:`tta.results.maps.summary`, of regression
        those of :func:`tta.results.numbers.summary`, of detection those of :func:`tta.results.boxes.summary`.
    """
    if predictions.confusion is not None:
        return maps.summary(predictions, [row.domain for row in rows])
    if predictions.value is not None:
        return numbers.summary(predictions, [row.domain for row in rows])
    if predictions.found is not None:
        return boxes.summary(predictions, rows)
    domains = {row.domain: of_domain(predictions.select(predictions.domain == n)) for n, row in enumerate(rows)}
    samples = sum(row.samples for row in rows)
    found: dict[str, Any] = {
        "sample_weighted_error": 100.0 * sum(row.errors for row in rows) / samples if samples else math.nan
    }
    for name in ("balanced_error", "ece", "nll", "brier", "auroc", "h_score", "h_score_otsu"):
        found[name] = mean_of_known(values[name] for values in domains.values() if name in values)
    if predictions.known.all():
        del found["auroc"], found["h_score"], found["h_score_otsu"]
    else:
        found["outlier_score"] = "1 - max probability" if predictions.outlier_score is None else "the method's own"
    mce = mean_corruption_error(corruption_errors(rows)) if classes == 1000 else math.nan
    if not math.isnan(mce):
        found["mce"] = mce
    return {**found, "domains": domains}


def of_domain(predictions: Predictions) -> dict[str, float]:
    """The metrics of one domain's predictions."""
    known = torch.from_numpy(predictions.known)
    correct = torch.from_numpy(predictions.correct)
    label, prediction = torch.from_numpy(predictions.label), torch.from_numpy(predictions.prediction)
    confidence, entropy, nll, brier = (
        torch.from_numpy(predictions.column(name)) for name in ("confidence", "entropy", "nll", "brier")
    )
    found = {
        "balanced_error": balanced_error(prediction[known], label[known]),
        "ece": calibration_error(confidence[known], correct[known]),
        "nll": float(nll[known].double().mean()),
        "brier": float(brier[known].double().mean()),
        "entropy": float(entropy.double().mean()),
        "class_entropy": histogram_entropy(np.bincount(predictions.prediction)),
        "label_entropy": histogram_entropy(np.bincount(predictions.label[predictions.known])),
    }
    if not known.all():
        own = predictions.outlier_score
        found |= open_set(1 - confidence if own is None else torch.from_numpy(own), correct, ~known)
    return found


def corruption_errors(rows: Iterable[Row], severity: int | None = None) -> dict[tuple[str, int], float]:
    """Error in percent by corruption and severity over all visits, for :func:`mean_corruption_error`.

    Args:
        rows: with names like ``fog-3``, or ``fog-3@2`` on a second visit.
        severity: of rows without a severity in their name, such as ``fog``; default: such rows are skipped.

    Example:
        The mCE of five runs, one per severity::

            errors = {}
            for severity, result in enumerate(results, start=1):
                errors |= corruption_errors(result.rows, severity)
            mean_corruption_error(errors)
    """
    tally: dict[tuple[str, int], list[int]] = {}
    for row in rows:
        match = re.fullmatch(r"(\w+?)(?:-([1-5]))?(?:@\d+)?", row.domain)
        at = int(match[2]) if match and match[2] else severity
        if match and at is not None:
            counts = tally.setdefault((match[1], at), [0, 0])
            counts[0] += row.errors
            counts[1] += row.samples
    return {key: 100.0 * errors / samples for key, (errors, samples) in tally.items() if samples}


def _percent(which: Tensor) -> float:
    return 100.0 * float(which.double().mean())
