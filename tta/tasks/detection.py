"""Detection: boxes with classes and scores."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.labels import UNKNOWN
from tta.tasks.task import Scored, Tally, Task

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("boxes", "labels", "scores")  # of each image, as torchvision's detectors return them
NUMBERS = ("map", "map_50", "map_75")
BACKEND = "faster_coco_eval"  # the module
MISSING = "mAP is computed by torchmetrics with faster-coco-eval, which is not installed: pip install 'tta-toolkit[detection]'."


class Detection(Task):
    """Boxes with classes and scores, the detector's own, scored by the mean average precision at an overlap of half (mAP@50)."""

    name = "detection"
    outputs = "a list with a dictionary of boxes, labels and scores for each image"
    lacking = "this model returns boxes. Methods for detection: actmad, norm, source."
    score_name = "mAP@50"
    direction = "up"
    tensors = False
    adds_up = False

    def is_detection(self, output: Any) -> bool:
        """Whether an output can be nothing else than detections: a list of dictionaries with boxes, labels and scores."""
        return isinstance(output, (list, tuple)) and len(output) > 0 and all(map(_is_one, output))

    def read(self, output: Any, images: "Tensor") -> Any:
        """The detector's own list of dictionaries.

        ``boxes`` (n, 4) are left, top, right, bottom in pixels; ``labels`` and ``scores`` (n,). Further entries stay.
        """
        if not isinstance(output, (list, tuple)) or len(output) != len(images) or not all(map(_is_one, output)):
            raise TypeError(
                f"The model returned {_described(output)} for {len(images)} images; task='detection' expects {self.outputs}, as "
                "torchvision's detectors return in eval mode. Pass outputs= with a function that makes it."
            )
        return list(output)

    def detached(self, output: Any) -> Any:
        return [{name: _detached(value) for name, value in found.items()} for found in output]

    def finite(self, output: Any) -> "Tensor":
        import torch

        whole = [found[name].isfinite().all() for found in output for name in ("boxes", "scores")]
        return torch.stack(whole) if whole else torch.ones((), dtype=torch.bool)

    def spread(self, output: Any, good: "Tensor") -> Any:
        """Those of the good images in their places; the others have no boxes."""
        found = iter(output[: int(good.sum())])
        none = {name: value[:0] if hasattr(value, "dim") else value for name, value in output[0].items()}
        return [next(found) if one else dict(none) for one in good.tolist()]

    # ------------------------------------------------------------------ scores

    def columns(self, output: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """Boxes found and true boxes of each image, as many rows as the image with the most has, NaN in the rest.

        Args:
            output: of an adapter, for a batch.
            labels: (batch, most, 6): left, top, right, bottom, class, and whether it is a crowd; NaN where there are fewer.

        Returns:
            ``found`` (batch, most, 6), float32: left, top, right, bottom, class, score; ``truth``, the labels;
            ``label`` and ``prediction`` (batch,), -1: an image has many.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        # float32 before they are put together: 16 bits would make class 1002 of class 1001.
        parts = [(one["boxes"], one["labels"][:, None], one["scores"][:, None]) for one in output]
        each = [torch.cat([part.float() for part in one], 1) for one in parts]
        none = torch.full((len(output),), UNKNOWN, device=labels.device)
        found = pad_sequence(each, batch_first=True, padding_value=torch.nan)
        return {"label": none, "prediction": none, "found": found, "truth": labels.float()}

    def check_labels(self, labels: "Tensor", output: Any) -> None:
        """Raise a ValueError unless the labels are boxes, and mAP can be computed."""
        if labels.dim() != 3 or labels.shape[2] != 6:
            raise ValueError(
                f"The labels of a batch have shape {tuple(labels.shape)}; task='detection' is scored by boxes: make the stream "
                "with task='detection', of datasets of (image, {'boxes': ..., 'labels': ...})."
            )
        if find_spec(BACKEND) is None:
            raise ValueError(MISSING)

    def tally(self, predictions: Any) -> Tally:
        """Images, and the numbers of :func:`precision` of them: no sums, see :meth:`merged`; None for NaN, as JSON has it."""
        found = precision(predictions.column("found"), predictions.column("truth"))
        classes = {str(number): value for number, value in found.pop("classes").items()}
        sums = {name: None if math.isnan(value) else value for name, value in found.items()}
        return Tally(len(predictions), 0, {**sums, "classes": classes})

    def merged(self, tallies: Sequence[Scored]) -> Tally:
        """The number of images alone: the mAP of several lots is not made of the mAP of each."""
        return Tally(sum(tally.samples for tally in tallies), 0)

    def agrees(self, row: Scored, predictions: Any) -> bool:
        return row.samples == len(predictions)  # without computing mAP again, for which the extra may be missing

    def value(self, row: Scored) -> float:
        """mAP at an overlap of half, in percent."""
        value = row.sums.get("map_50")
        return math.nan if value is None else float(value)


def precision(found: NDArray[Any], truth: NDArray[Any]) -> dict[str, Any]:
    """Mean average precision of some images as COCO defines it, in percent.

    Precision is read at 101 recalls, of at most 100 boxes an image, by :class:`torchmetrics.detection.MeanAveragePrecision`.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014.

    Args:
        found: (images, most, 6), as :meth:`Detection.columns` returns it.
        truth: (images, most, 6), likewise.

    Returns:
        ``map``, the mean over overlaps of 50 to 95 % and over classes; ``map_50``, ``map_75``; ``classes``: class -> its part of
        ``map``. NaN, and no classes, where no box is true, or crowds alone.

    Raises:
        ValueError: the extra ``detection`` is not installed.
    """
    if find_spec(BACKEND) is None:
        raise ValueError(MISSING)
    import torch
    from torchmetrics.detection import MeanAveragePrecision

    kept = [[torch.from_numpy(rows[~np.isnan(rows[:, 4])]) for rows in images] for images in (found, truth)]
    if not sum(map(len, kept[1])):
        return {**dict.fromkeys(NUMBERS, math.nan), "classes": {}}
    # The classes are read from the whole table of precisions: class_metrics=True would match all boxes again for each.
    measured = MeanAveragePrecision(extended_summary=True, backend="faster_coco_eval")
    measured.update(
        [{"boxes": rows[:, :4], "labels": rows[:, 4].long(), "scores": rows[:, 5]} for rows in kept[0]],
        [{"boxes": rows[:, :4], "labels": rows[:, 4].long(), "iscrowd": rows[:, 5].long()} for rows in kept[1]],
    )
    values = measured.compute()  # -1 where no box is true but crowds, which COCO leaves out
    table = values["precision"][:, :, :, 0, -1].flatten(
        0, 1
    )  # overlaps x recalls, classes; objects of all sizes, 100 boxes
    classes = zip(values["classes"].view(-1).tolist(), table.T, strict=True)
    return {
        **{name: 100 * float(values[name]) if values[name] >= 0 else math.nan for name in NUMBERS},
        "classes": {int(number): 100 * float(part.mean()) for number, part in classes if (part >= 0).all()},
    }


def _is_one(found: Any) -> bool:
    return isinstance(found, Mapping) and all(name in found for name in PARTS)


def _described(output: Any) -> str:
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)} {type(output[0]).__name__ if output else 'entries'}"
    return f"a {type(output).__name__}"


def _detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value
