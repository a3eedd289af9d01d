"""Segmentation: one class a pixel."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.labels import UNKNOWN
from tta.tasks.task import Scored, Tally, Task

if TYPE_CHECKING:
    from torch import Tensor

# A test holds it to the code.
SERVED = "source, norm, tent, pl, rpl, conjugate_pl, gala, eata, rdumb, sar, actmad, cotta, petal, psmt, ttt_mae"
# Confidence and entropy are of every fourth pixel of every fourth row: of all they would cost 16 times as much.
STRIDE = 4


class Segmentation(Task):
    """A map of logits an image, scored by the mean intersection over union (mIoU) of the classes."""

    name = "segmentation"
    outputs = "maps of logits (batch, classes, height, width)"
    lacking = f"this model predicts a map, a class of every pixel. Methods for maps: {SERVED}."
    score_name = "mIoU"
    direction = "up"
    of_classes = True

    def is_map(self, output: Any) -> bool:
        """Whether an output can be nothing else than a map: a tensor of four dimensions, as it is or in a dictionary.

        That of one pixel is left out: a classifier that forgot to flatten gives it.
        """
        found = _within(output)
        return getattr(found, "ndim", 0) == 4 and found.shape[2:] != (1, 1)

    def read(self, output: Any, images: "Tensor") -> "Tensor":
        """Maps of the size of the images: a smaller one is enlarged, bilinearly, corners not aligned.

        Taken are a tensor, the ``"out"`` of a dictionary (torchvision) and ``.logits`` (transformers).
        """
        from tta.functional import logits_of

        found = _within(output)
        if isinstance(found, Mapping):
            raise TypeError(
                f"The model returned a dictionary with {', '.join(map(str, found)) or 'nothing'}; expected maps of logits "
                "under 'out' or 'logits'. Pass outputs=lambda output: output[KEY]."
            )
        logits = logits_of(found)
        if logits.dim() != 4:
            raise ValueError(
                f"The model returned a tensor of shape {tuple(logits.shape)}; task='segmentation' expects {self.outputs}. "
                "Leave task= out for a model that gives one row of logits per image."
            )
        # Channels last, where the model is faster, a softmax over few classes takes twice as long on a CPU; this copy, a quarter of one.
        return resized(logits, images).contiguous()

    def columns(self, output: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """The confusion matrix of each image, and means of confidence and entropy over some of its pixels.

        Args:
            output: logits (batch, classes, height, width).
            labels: (batch, rows, columns), int64, -1 (void) is left out. If they have another size, the logits are resized to
                it, bilinearly, before the class is chosen, as in the released evaluations.

        Returns:
            ``confusion`` (batch, classes, classes), int32: pixels by true, then predicted class; ``label`` and ``prediction``,
            (batch,), -1: a map has many; ``confidence`` and ``entropy`` (nats), (batch,), of every :data:`STRIDE`-th pixel
            in both directions.
        """
        import torch

        logits: Tensor = output
        some = logits[:, :, ::STRIDE, ::STRIDE]
        log_probabilities = some.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        logits = resized(logits, labels)
        none = torch.full((len(logits),), UNKNOWN, device=logits.device)
        return {
            "label": none,
            "prediction": none,
            "confidence": probabilities.amax(1).mean((1, 2)),
            "entropy": -(probabilities * log_probabilities).sum(1).mean((1, 2)),
            # not argmax, which takes 30 times as long on a CPU
            "confusion": confusion(logits.max(1).indices, labels, logits.shape[1]),
        }

    def check_labels(self, labels: "Tensor", output: Any) -> None:
        """Raise a ValueError unless the labels are masks of the output's classes, void below 0."""
        if labels.dim() != 3:
            raise ValueError(
                f"The labels of a batch have shape {tuple(labels.shape)}; task='segmentation' is scored by masks (batch, height, "
                "width), a class of every pixel: make the stream with task='segmentation' of datasets of (image, mask)."
            )
        if len(labels) and (highest := int(labels.max())) >= output.shape[1]:  # one of several workers may have none
            raise ValueError(
                f"A mask holds the class {highest}; the model gives {output.shape[1]} classes, from 0 on. If it stands for void "
                f"pixels, pass ignore_index={highest} to the stream."
            )

    def tally(self, predictions: Any) -> Tally:
        matrix = predictions.column("confusion").sum(0, dtype=np.int64)
        pixels = int(matrix.sum())
        return Tally(pixels, pixels - int(np.trace(matrix)), {"confusion": matrix.tolist()})

    def value(self, row: Scored) -> float:
        """mIoU in percent of the row's summed matrix: intersections and unions are summed over the images first."""
        return mean_iou(np.array(row.sums["confusion"])) if row.samples else math.nan


def resized(logits: "Tensor", like: "Tensor") -> "Tensor":
    """Maps of logits of the size of images or masks: resized bilinearly, corners not aligned, where they have another.

    Args:
        logits: (batch, classes, height, width).
        like: (..., rows, columns).

    Returns:
        (batch, classes, rows, columns).
    """
    from torch.nn import functional as F

    if logits.shape[-2:] == like.shape[-2:]:
        return logits
    return F.interpolate(logits, size=like.shape[-2:], mode="bilinear", align_corners=False)


def confusion(predicted: "Tensor", labels: "Tensor", classes: int) -> "Tensor":
    """Counts of pixels by true and by predicted class, for each image.

    Args:
        predicted: (images, height, width), int64.
        labels: (images, height, width), int64, on the same device; below 0 left out.
        classes: number of them.

    Returns:
        (images, classes, classes), int32: true class, predicted class.
    """
    import torch

    images = len(labels)
    image = torch.arange(images, device=labels.device)[:, None, None]
    place = (image * classes + labels) * classes + predicted
    place = torch.where(labels < 0, images * classes**2, place)  # void: a place of its own, cut off below
    counts = torch.zeros(images * classes**2 + 1, dtype=torch.int32, device=labels.device)
    # not bincount, which waits for a GPU
    counts.scatter_add_(0, place.flatten(), torch.ones_like(place, dtype=torch.int32).flatten())
    return counts[:-1].view(images, classes, classes)


def class_iou(matrix: NDArray[Any]) -> NDArray[np.float64]:
    """Intersection over union of each class in percent; NaN for a class that is neither true nor predicted anywhere.

    Args:
        matrix: (..., classes, classes), counts by true, then predicted class.

    Returns:
        (..., classes).
    """
    intersection = np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.float64)
    union = matrix.sum(-1) + matrix.sum(-2) - intersection
    with np.errstate(invalid="ignore"):
        iou: NDArray[np.float64] = 100.0 * intersection / np.where(union > 0, union, np.nan)
    return iou


def mean_iou(matrix: NDArray[Any]) -> float:
    """Mean over the classes of :func:`class_iou` in percent; a class without a union does not count, NaN if none has one.

    So it is in the tables of CoTTA (CVPR 2022) and CarlaTTA (IJCNN 2024), and in torchmetrics' ``MulticlassJaccardIndex``.
    """
    known = class_iou(matrix)
    known = known[~np.isnan(known)]
    return float(known.mean()) if len(known) else math.nan


def _within(output: Any) -> Any:
    """The value of an output that should be a map: ``.logits``, the ``"out"`` or ``"logits"`` of a dictionary, or itself."""
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        return output.get("out", output.get("logits", output))
    return output
