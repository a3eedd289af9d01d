"""What predictions are worth: pure functions of tensors, and ``torchmetrics`` classes of what that library lacks.

Errors, ECE, AUROC and H-scores are in percent, as the papers print them; NLL and entropies in nats. What is not defined,
such as the error of a domain without known classes, is NaN.
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
from tta.results.curves import histogram_entropy
from tta.results.predictions import Predictions
from tta.results.result import Row

BINS = 15

# Mean error in percent over the five severities of ImageNet-C (50 000 images each) of the AlexNet that mCE divides by:
# Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019,
# with the digits that AugMix's evaluation (Hendrycks et al., ICLR 2020) takes over from the benchmark's repository.
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
    """What each prediction says and what it is worth, from one softmax.

    Args:
        logits: (batch, classes).
        labels: (batch,), int64, on the same device; -1 for an unknown class.

    Returns:
        Each (batch,): ``prediction``; ``confidence``, the highest probability; ``entropy`` in nats; ``nll``, minus the
        log-probability of the label; ``brier``, the squared distance of the probabilities to the label's, in [0, 2].
        The last two are NaN for an unknown class; to a class that the model does not have it gives no probability.
    """
    log_probabilities = logits.log_softmax(dim=1)
    probabilities = log_probabilities.exp()
    has_it = labels < logits.shape[1]
    place = labels.clamp(0, logits.shape[1] - 1)[:, None]
    of_label = torch.where(has_it, log_probabilities.gather(1, place)[:, 0], -torch.inf)
    nll = torch.where(labels == UNKNOWN, torch.nan, -of_label)
    return {
        "prediction": logits.argmax(dim=1),
        "confidence": probabilities.amax(dim=1),
        "entropy": -(probabilities * log_probabilities).sum(dim=1),
        "nll": nll,
        "brier": probabilities.square().sum(dim=1) - 2 * (-nll).exp() + 1,
    }


def balanced_error(prediction: Tensor, label: Tensor) -> float:
    """Mean over classes of the error in each, in percent; classes without a sample do not count.

    (torchmetrics' macro average counts a class that is predicted though no sample is of it as an error of 100 %.)

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
    return 100.0 * (1 - float(accuracy[label.unique()].double().mean()))


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """ECE: mean gap between confidence and accuracy over 15 bins of confidence, by their share of samples, in percent.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.

    Args:
        confidence: (n,), probability of the predicted class.
        correct: (n,), boolean.
    """
    if not len(confidence) or confidence.isnan().any():
        return math.nan
    below_one = confidence.float().clamp(max=1 - 2**-24)  # torchmetrics gives exactly 1 a bin of its own
    return 100.0 * float(binary_calibration_error(below_one, correct.long(), n_bins=BINS))


def auroc(score: Tensor, unknown: Tensor) -> float:
    """Area under the ROC curve of a score that should be higher for unknown classes, in percent.

    Args:
        score: (n,), any scale.
        unknown: (n,), boolean; NaN unless there are some of both.
    """
    if not 0 < int(unknown.sum()) < len(unknown) or score.isnan().any():
        return math.nan
    # torchmetrics squashes scores outside [0, 1] by a sigmoid, after which large ones are equal: ranks are not large.
    levels, rank = score.unique(return_inverse=True)
    return 100.0 * float(binary_auroc(rank.double() / len(levels), unknown.long()))


def rejection_threshold(score: Tensor) -> float:
    """The threshold that splits scores into two groups of the least variance within, midway between the two.

    See :func:`tta.functional.otsu_threshold`; exact instead of over a histogram.

    Args:
        score: (n,); NaN if all of them are equal, or one is not finite.
    """
    distinct = score.double().unique()
    if len(distinct) < 2 or not distinct.isfinite().all():
        return math.nan
    midway = (distinct[1:] + distinct[:-1]) / 2
    return float(functional.otsu_threshold(score, torch.ones_like(score, dtype=torch.bool), midway))


def h_score(accuracy: float, other: float) -> float:
    """Harmonic mean of two percentages; 0 where both are."""
    return 2 * accuracy * other / (accuracy + other) if accuracy + other else 0.0


def open_set(score: Tensor, correct: Tensor, unknown: Tensor) -> dict[str, float]:
    """How well unknown classes are told from known ones, and both together, in percent.

    Args:
        score: (n,), higher = more likely an unknown class.
        correct: (n,), boolean, whether the class predicted is right; false where ``unknown``.
        unknown: (n,), boolean.

    Returns:
        ``auroc``; ``h_score``, the harmonic mean of AUROC and accuracy on the known classes: Yu et al., "STAMP:
        Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024; ``h_score_otsu``, that of the share of
        known samples both accepted and right and of the share of unknown ones rejected, at Otsu's threshold: Li et al., "On
        the Robustness of Open-World Test-Time Training: Self-Training with Dynamic Prototype Expansion", ICCV 2023
        (which finds the threshold anew in the latest 512 scores).
    """
    area = auroc(score, unknown)
    if math.isnan(area):
        return {"auroc": math.nan, "h_score": math.nan, "h_score_otsu": math.nan}
    accuracy = _percent(correct[~unknown])
    rejected = score > rejection_threshold(score)
    kept, refused = _percent((correct & ~rejected)[~unknown]), _percent(rejected[unknown])
    return {"auroc": area, "h_score": h_score(accuracy, area), "h_score_otsu": h_score(kept, refused)}


def mean_corruption_error(errors: Mapping[tuple[str, int], float]) -> float:
    """mCE of ImageNet-C in percent: per corruption the errors of the five severities over AlexNet's, averaged over 15.

    Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR 2019.
    AlexNet's are those of 50 000 images, also where the errors are of a subset.

    Args:
        errors: (corruption, severity) -> error in percent; more than the 15 x 5 do no harm.

    Returns:
        NaN unless all 15 corruptions are there in all five severities: there is no mCE of severity 5 alone.
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
        """Take in a batch: logits (batch, classes), labels (batch,), -1 for an unknown class."""
        known = labels != UNKNOWN
        self.total += per_sample(logits[known], labels[known])[self.column].double().sum()
        self.count += known.sum()

    def compute(self) -> Tensor:
        """The mean; NaN where there was no sample."""
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
    """Harmonic mean of the accuracy on known classes and the AUROC of telling unknown ones, in percent.

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
        """Take in a batch.

        Args:
            logits: (batch, classes).
            labels: (batch,), -1 for an unknown class.
            outlier_score: (batch,), higher = more likely an unknown class; left out: 1 - the highest probability.
        """
        found = per_sample(logits, labels)
        self.score.append(1 - found["confidence"] if outlier_score is None else outlier_score)
        self.correct.append(found["prediction"] == labels)
        self.unknown.append(labels == UNKNOWN)

    def compute(self) -> Tensor:
        """The H-score; NaN unless there were samples of both kinds."""
        score, correct, unknown = (
            torch.cat(parts) if isinstance(parts, list) else parts for parts in (self.score, self.correct, self.unknown)
        )
        return torch.tensor(open_set(score, correct, unknown)["h_score"])


class ClassEntropy(Metric):
    """Entropy in nats of how often each class is predicted: ln(classes) where all are alike, 0 after a collapse to one.

    Args:
        classes: how many there are.
    """

    is_differentiable = False
    full_state_update = False
    counts: Tensor

    def __init__(self, classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("counts", torch.zeros(classes, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor) -> None:
        """Take in a batch of logits (batch, classes)."""
        self.counts += logits.argmax(dim=1).bincount(minlength=len(self.counts))

    def compute(self) -> Tensor:
        """The entropy; NaN where there was no sample."""
        shares = self.counts / self.counts.sum()
        return -torch.special.xlogy(shares, shares).sum()


# ---------------------------------------------------------------------- a whole run


def summary(predictions: Predictions, rows: Sequence[Row], *, classes: int) -> dict[str, Any]:
    """The metrics of a run, each the unweighted mean over domains of its value in them, as the papers report the error.

    Args:
        predictions: with the columns of :func:`per_sample`.
        rows: of the result.
        classes: of the model: mCE is that of ImageNet's 1000.

    Returns:
        ``sample_weighted_error``, ``balanced_error``, ``ece``, ``nll``, ``brier``; with unknown classes in the stream
        ``auroc``, ``h_score``, ``h_score_otsu`` and which ``outlier_score`` they are of; ``mce`` where it is defined;
        ``domains``: the values in each domain.
    """
    domains = {row.domain: of_domain(predictions.select(predictions.domain == n)) for n, row in enumerate(rows)}
    samples = sum(row.samples for row in rows)
    found: dict[str, Any] = {
        "sample_weighted_error": 100.0 * sum(row.errors for row in rows) / samples if samples else math.nan
    }
    for name in ("balanced_error", "ece", "nll", "brier", "auroc", "h_score", "h_score_otsu"):
        found[name] = _mean(values[name] for values in domains.values() if name in values)
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
    """Error in percent by corruption and severity, all visits of one together, for :func:`mean_corruption_error`.

    Args:
        rows: called ``fog-3``, or ``fog-3@2`` on a second visit.
        severity: of rows whose name says none, such as ``fog``. Left out: those are skipped.

    Example:
        The mCE of five runs, one a severity::

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


def _mean(values: Iterable[float]) -> float:
    defined = [value for value in values if not math.isnan(value)]
    return math.fsum(defined) / len(defined) if defined else math.nan


def _percent(which: Tensor) -> float:
    return 100.0 * float(which.double().mean())
