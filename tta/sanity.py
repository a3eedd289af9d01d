"""A check before a benchmark: does the source model do on clean images what its weights promise?

Most wrong numbers of this field come from images that are normalised twice, never, or for other weights. They all
show before anything is adapted.
"""

import math
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD

MARGIN = 2.0  # % of error on top of chance: other decoders and resizing cost about as much
BATCH = 64
TRIED = 256  # images that a possible cause is tried on
KNOWN = {  # what images are normalised by in this field
    "ImageNet's": (IMAGENET_MEAN, IMAGENET_STD),
    "0.5 and 0.5": (HALF, HALF),
    "CIFAR-10's": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
}


class PreflightWarning(UserWarning):
    """The source model does worse on clean images than its weights promise."""


@dataclass(frozen=True)
class Preflight:
    """What the check found.

    Attributes:
        error: of the source model on the clean images, %.
        expected: what it should be, %; None where nobody says.
        images: how many were predicted.
        problem: what is wrong and what the cause may be, in words; None where nothing is.
    """

    error: float
    expected: float | None
    images: int
    problem: str | None = None

    def __str__(self) -> str:
        promise = "" if self.expected is None else f", {self.expected:.1f} % published"
        return self.problem or f"clean error {self.error:.1f} % of {self.images} images{promise}"


@torch.no_grad()
def preflight(model: nn.Module, images: Tensor, labels: Tensor, expected: float | None = None) -> Preflight:
    """Compare the source model's error on clean images with the published one, and warn where it is far above.

    Far is more than two points and three standard errors (or three images) of so many images. Where nobody says what to expect, a model
    that does no better than guessing is warned of. The causes are tried out: the one that explains the error is named.

    Args:
        model: a source model as :func:`tta.adapt` takes it, unadapted; it predicts in ``eval()`` mode and is left as it was.
        images: (n, 3, height, width), uint8 or in [0, 1], of the domain that the model was trained on.
        labels: (n,), int64.
        expected: error in %; left out: ``clean_error`` of a model by :func:`tta.load_model`.

    Raises:
        ValueError: no images, or not as many labels.

    Example:
        >>> import tta
        >>> from tta.datasets import digits
        >>> images, labels, _ = digits.split("test")
        >>> tta.preflight(tta.load_model("digits-cnn"), images, labels).problem is None
        True
    """
    if not len(images) or len(images) != len(labels):
        raise ValueError(f"Expected images and as many labels; got {len(images)} and {len(labels)}.")
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
    if error <= limit:
        return Preflight(error, expected, len(images))
    against = f"no better than guessing among {classes} classes" if expected is None else f"expected {expected:.1f} %"
    good = error / 2 if expected is None else (error + expected) / 2
    cause = _cause(model, images, labels, logits, good)
    problem = f"The source model errs on {error:.1f} % of {len(images)} clean images; {against}. {cause}"
    warnings.warn(problem, PreflightWarning, stacklevel=3)
    return Preflight(error, expected, len(images), problem)


def _predict(model: nn.Module, images: Tensor) -> Tensor:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return torch.cat([model(batch).float() for batch in images.split(BATCH)])
    finally:
        for module, training in modes.items():
            module.training = training


def _error(logits: Tensor, labels: Tensor) -> float:
    return 100 * float((logits.argmax(1) != labels).float().mean())


def _cause(model: nn.Module, images: Tensor, labels: Tensor, logits: Tensor, good: float) -> str:
    """The first cause that explains the error: undone, it would bring it below ``good`` %; else the usual ones."""
    low, high = float(images.min()), float(images.max())
    if low < 0 or high > 1:
        return (
            f"The images lie in [{low:.3g}, {high:.3g}]; expected [0, 1]: they are normalised already, or were not divided "
            "by 255. Normalisation belongs inside the model."
        )
    classes = logits.shape[1]
    if int(labels.max()) >= classes:
        return f"The model has {classes} classes, the labels go up to {int(labels.max())}: it was trained on others."
    own: Any = getattr(model, "preprocessing", {})
    tried: list[tuple[float, str]] = []
    some, known = images[:TRIED], labels[:TRIED]
    for name, pair in {**({"the model's own": (own["mean"], own["std"])} if "mean" in own else {}), **KNOWN}.items():
        mean, std = (torch.tensor(values, device=images.device).view(1, 3, 1, 1) for values in pair)
        again = _error(_predict(model, some * std + mean), known)
        tried.append((again, f"It is normalised twice, by {name} mean and std: take one of the two away."))
        again = _error(_predict(model, (some - mean) / std), known)
        tried.append(
            (again, f"It is never normalised: the weights expect {name} mean and std. Give them as mean=, std=.")
        )
    best, cause = min(tried, key=lambda trial: trial[0])  # of equals the first: the model's own
    if best < good:
        return cause
    table = torch.zeros(classes, classes, dtype=torch.long, device=labels.device)
    table.index_put_((logits.argmax(1), labels), torch.ones_like(labels), accumulate=True)
    if len(images) >= 5 * classes and 100 - 100 * int(table.amax(1).sum()) / len(images) < good:
        return (
            "What it predicts is consistent, but under other numbers: the classes are in another order than the labels. "
            "Compare the order in which the model was trained with that of the data (folders are sorted by name)."
        )
    size = own.get("input_size")
    if size and list(images.shape[2:]) != list(size):
        return (
            f"The images have {images.shape[2]} x {images.shape[3]} pixels, the weights expect {size[0]} x {size[1]}: "
            "resize them."
        )
    return (
        "Usual causes: normalised twice, never, or for other weights (compare mean and std in `preprocessing`); classes in "
        "another order; another input size or resizing; images that were compressed again; the wrong checkpoint."
    )
