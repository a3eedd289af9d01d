"""Check of a source model before a benchmark: is its error on clean images the published one?

Most wrong numbers of this field come from images that are normalised twice, never, or for other weights. All of these
show before anything is adapted.
"""

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta.models.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD, NO_MEAN, NO_STD

MARGIN = 2.0  # % of error beyond chance: other decoders and resizing cost about as much
BATCH = 64
TRIED = 256  # images that a possible cause is tried on
AT_ONCE = 32  # images of a step; a cause that makes the error larger so far is dropped after it
SURE = 0.001  # p-value below which a cause is reported: about the share of correct models that are warned of
KNOWN = {  # mean and std that are common in this field
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
    "0.5 and 0.5": (HALF, HALF),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


class PreflightWarning(UserWarning):
    """The source model does worse on clean images than its weights promise."""


@dataclass(frozen=True)
class Preflight:
    """Result of the check.

    Attributes:
        error: of the source model on the clean images, %.
        expected: published error, %; None if there is none.
        images: number of images predicted.
        problem: description of the problem and its likely cause; None if there is no problem.
    """

    error: float
    expected: float | None
    images: int
    problem: str | None = None

    def __str__(self) -> str:
        low, high = _interval(self.error / 100, self.images)
        promise = "" if self.expected is None else f", {self.expected:.1f} % published"
        return (
            self.problem
            or f"clean error {self.error:.1f} % of {self.images} images (95 % interval {low:.1f} to {high:.1f}){promise}"
        )


@torch.no_grad()
def preflight(model: nn.Module, images: Tensor, labels: Tensor, expected: float | None = None) -> Preflight:
    """Compare the source model's error on clean images with the published one, and warn of a likely mistake.

    A warning is given if the error is above the published one by more than two points plus three standard errors (or
    three images); without a published one, if it is no better than guessing. The possible causes are tried out, and the
    one that explains the error is named. For a smaller excess the causes are tried out too: one is warned of if undoing
    it makes significantly more of the same images right than wrong (sign test, one in a thousand), because a wrong mean
    and standard deviation may cost fewer points than the uncertainty of the error of a few hundred images.

    Args:
        model: a source model as :func:`tta.adapt` takes it, not adapted; it predicts in ``eval()`` mode and is not changed.
        images: (n, 3, height, width), uint8 or in [0, 1], of the domain that the model was trained on.
        labels: (n,), int64; images of an unknown class (-1) are left out.
        expected: error in %; left out: ``clean_error`` of a model by :func:`tta.load_model`.

    Raises:
        ValueError: no image of a known class, or not as many labels.

    Example:
        >>> import tta
        >>> from tta.datasets import digits
        >>> images, labels, _ = digits.split("test")
        >>> tta.preflight(tta.load_model("digits-cnn"), images, labels).problem is None
        True
    """
    if not len(images) or len(images) != len(labels) or not bool((labels >= 0).any()):
        raise ValueError(
            f"Expected images and as many labels, some of them 0 or more; got {len(images)} and {len(labels)}."
        )
    images, labels = images[labels >= 0], labels[labels >= 0]
    expected = getattr(model, "clean_error", None) if expected is None else expected
    device = next((tensor.device for tensor in [*model.parameters(), *model.buffers()]), images.device)
    images, labels = images.to(device), labels.to(device)
    images = images / 255 if images.dtype == torch.uint8 else images
    logits = _predict(model, images)
    classes = logits.shape[1]
    error = _error(logits, labels)
    promised = 100 * (1 - 1 / classes) if expected is None else expected
    spread = max(3 * math.sqrt(promised * (100 - promised) / len(images)), 300 / len(images))  # or three images
    limit = promised - spread if expected is None else promised + MARGIN + spread
    against = f"no better than guessing among {classes} classes" if expected is None else f"expected {expected:.1f} %"
    problem = None
    if error > limit:
        good = error / 2 if expected is None else (error + expected) / 2
        cause = _cause(model, images, labels, logits, good)
        problem = f"The source model errs on {error:.1f} % of {len(images)} clean images; {against}. {cause}"
    elif error > (expected or 0.0):
        trial = _best_trial(model, images, labels, logits)
        if trial is not None and trial.p_value < SURE:
            problem = (
                f"The source model errs on {trial.before:.1f} % of {trial.images} clean images, on {trial.after:.1f} % of "
                f"the same with one thing changed. {trial.cause}"
            )
    if problem is not None:
        warnings.warn(problem, PreflightWarning, stacklevel=3)
    return Preflight(error, expected, len(images), problem)


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat([model(batch).float() for batch in torch.split(images, BATCH)])
    finally:
        for module, training in modes.items():
            module.training = training


def _error(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) != labels).float().mean())


def _interval(share: float, count: int) -> tuple[float, float]:
    """95 % interval of a share, in % (Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927)."""
    z2 = 1.96**2
    middle = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = math.sqrt(z2 * (share * (1 - share) + z2 / (4 * count)) / count) / (1 + z2 / count)
    return 100 * max(0.0, middle - half), 100 * min(1.0, middle + half)


@dataclass(frozen=True)
class _Trial:
    """Errors on some images in %, before and after undoing a possible cause, and the p-value of the improvement."""

    cause: str
    images: int
    before: float
    after: float
    p_value: float


def _causes(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Descriptions of possible mistakes of the normalisation, each with the scale and shift of the images that undo it."""
    own: Any = getattr(model, "preprocessing", {})
    mine = (tuple(own["mean"]), tuple(own["std"])) if "mean" in own else (NO_MEAN, NO_STD)
    inside = {} if mine == (NO_MEAN, NO_STD) else {"the model's own": mine}
    others = {name: pair for name, pair in KNOWN.items() if pair != mine}
    for name, pair in {**inside, **others}.items():
        mean, std = _channels(*pair)
        yield f"It is normalised twice, by {name} mean and std: take one of the two away.", std, mean
    wrong = "normalised by other values than the weights expect:" if inside else "never normalised: the weights expect"
    m, s = _channels(*mine)  # the model removes these again
    for name, pair in others.items():
        mean, std = _channels(*pair)
        yield f"It is {wrong} {name} mean and std. Give them as mean=, std=.", s / std, m - mean * s / std


def _channels(*values: Any) -> Iterator[Tensor]:
    return (torch.tensor(each).view(1, 3, 1, 1) for each in values)


def _best_trial(model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor) -> _Trial | None:
    """The cause that, when undone, corrects most of the first images; None if each makes the error larger."""
    images, labels = images[:TRIED], labels[:TRIED]
    right = logits[:TRIED].argmax(1) == labels
    best: tuple[int, int, str] | None = None
    for cause, scale, shift in _causes(model):
        scale, shift = scale.to(images.device), shift.to(images.device)
        fixed = broken = 0
        for some, known, before in zip(*(torch.split(t, AT_ONCE) for t in (images, labels, right)), strict=True):
            after = _predict(model, some * scale + shift).argmax(1) == known
            fixed += int((after & ~before).sum())
            broken += int((before & ~after).sum())
            if fixed < broken:
                break
        else:
            if best is None or fixed - broken > best[0] - best[1]:
                best = fixed, broken, cause  # among equals the first: the model's own
    if best is None:
        return None
    fixed, broken, cause = best
    changed = fixed + broken
    p_value = sum(math.comb(changed, n) for n in range(fixed, changed + 1)) / 2**changed  # sign test
    wrong = len(images) - int(right.sum())
    return _Trial(cause, len(images), 100 * wrong / len(images), 100 * (wrong - fixed + broken) / len(images), p_value)


def _cause(model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, good: float) -> str:
    """Description of the first cause that, when undone, brings the error below ``good`` %; else of the usual causes."""
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return (
            f"The images lie in [{low:.3g}, {high:.3g}]; expected [0, 1]: they are normalised already, or were not divided "
            "by 255. Normalisation belongs inside the model."
        )
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        return f"The model has {classes} classes, the labels go up to {int(labels.max())}: it was trained on others."
    trial = _best_trial(model, images, labels, logits)
    if trial is not None and trial.after < good:
        return trial.cause
    table = torch.zeros(classes, classes, dtype=torch.long, device=labels.device)
    table.index_put_((logits.argmax(1), labels), torch.ones_like(labels), accumulate=True)
    if len(images) >= 5 * classes and 100 - 100 * int(table.amax(1).sum()) / len(images) < good:
        return (
            "What it predicts is consistent, but under other numbers: the classes are in another order than the labels. "
            "Compare the order in which the model was trained with that of the data (folders are sorted by name)."
        )
    size = getattr(model, "preprocessing", {}).get("input_size")
    if size and list(images.shape[2:]) != list(size):
        return (
            f"The images have {images.shape[2]} x {images.shape[3]} pixels, the weights expect {size[0]} x {size[1]}: "
            "resize them."
        )
    return (
        "Usual causes: normalised twice, never, or for other weights (compare mean and std in `preprocessing`); classes in "
        "another order; another input size or resizing; images that were compressed again; the wrong checkpoint."
    )
