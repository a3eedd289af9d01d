"""Detection: boxes with classes and scores."""

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.allocator import uncollected
from tta.labels import UNKNOWN
from tta.tasks.task import Scored, Tally, Task

if TYPE_CHECKING:
    from torch import Tensor

PARTS = ("boxes", "labels", "scores")  # of each image, as torchvision's detectors return them
NUMBERS = ("map", "map_50", "map_75")
BACKEND = "faster_coco_eval"  # the module
OVERLAPS, RECALLS = (0.5, 0.95, 10), (0.0, 1.0, 101)  # first, last, how many
OF_HALF, OF_THREE_QUARTERS = 0, 5  # places among the overlaps
MISSING = "mAP is computed by faster-coco-eval, which is not installed: pip install 'tta-toolkit[detection]'."


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

    Precision is read at 101 recalls, of at most 100 boxes an image, by faster-coco-eval, as
    :class:`torchmetrics.detection.MeanAveragePrecision` does.

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
    classes = np.unique(np.concatenate([part[_is_box(part), 4] for part in (found, truth)])).astype(int).tolist()
    if not _is_box(truth).any():
        return {**dict.fromkeys(NUMBERS, math.nan), "classes": {}}
    # A dictionary for each of thousands of boxes would have Python look through all objects of the process, again and again: that
    # takes as long as the evaluation, and finds nothing.
    with uncollected():
        table = _precisions(_annotated(found, "score", classes), _annotated(truth, "iscrowd", classes))
    overlaps = dict(zip(NUMBERS, (table, table[OF_HALF], table[OF_THREE_QUARTERS]), strict=True))
    known = {number: part for number, part in zip(classes, np.moveaxis(table, -1, 0), strict=True) if (part >= 0).all()}
    return {
        **{name: _percent(part[part >= 0]) for name, part in overlaps.items()},
        "classes": {number: _percent(part) for number, part in known.items()},
    }


def _is_box(rows: NDArray[Any]) -> NDArray[np.bool_]:
    """Mask of the rows that hold a box: (images, most, 6) -> (images, most)."""
    there: NDArray[np.bool_] = ~np.isnan(rows[..., 4])
    return there


def _percent(values: NDArray[Any]) -> float:
    return 100 * float(values.mean()) if values.size else math.nan


def _annotated(rows: NDArray[Any], last: str, classes: Sequence[int]) -> Any:
    """Boxes (images, most, 6) as COCO's annotations of images, whose last column has a name."""
    from faster_coco_eval import COCO

    image, _ = np.nonzero(_is_box(rows))
    flat = rows[_is_box(rows)].astype(np.float32)
    flat[:, 2:4] -= flat[:, :2]  # right and bottom become width and height
    annotations = [
        {"id": number, "image_id": place, "category_id": int(label), "bbox": box, "area": box[2] * box[3], last: value}
        for number, (place, (*box, label, value)) in enumerate(zip(image.tolist(), flat.tolist(), strict=True), 1)
    ]
    images, categories = [{"id": place} for place in range(len(rows))], [{"id": label} for label in classes]
    annotated = COCO()
    annotated.dataset = {"images": images, "annotations": annotations, "categories": categories}
    annotated.createIndex()
    return annotated


def _precisions(found: Any, truth: Any) -> NDArray[np.float64]:
    """Precision by overlap, recall and class, (10, 101, classes); -1 where no box is true but crowds, which COCO leaves out."""
    import torch
    from faster_coco_eval import COCOeval_faster

    evaluation = COCOeval_faster(truth, found, "bbox", print_function=_silent)
    settings = evaluation.params
    # Rounded to float32 as those of torchmetrics: at some recalls another box counts.
    settings.iouThrs, settings.recThrs = (torch.linspace(*of).double().numpy() for of in (OVERLAPS, RECALLS))
    # By default COCO matches anew for small, medium and large objects, and reads of 1 and 10 boxes too.
    settings.areaRng, settings.areaRngLbl, settings.maxDets = settings.areaRng[:1], settings.areaRngLbl[:1], [100]
    evaluation.evaluate()
    evaluation.accumulate()
    table: NDArray[np.float64] = evaluation.eval["precision"][:, :, :, 0, 0]
    return table


def _silent(text: str) -> None:
    """Print nothing."""


def _is_one(found: Any) -> bool:
    return isinstance(found, Mapping) and all(name in found for name in PARTS)


def _described(output: Any) -> str:
    if isinstance(output, (list, tuple)):
        return f"a {type(output).__name__} of {len(output)} {type(output[0]).__name__ if output else 'entries'}"
    return f"a {type(output).__name__}"


def _detached(value: Any) -> Any:
    return value.detach() if hasattr(value, "detach") else value
