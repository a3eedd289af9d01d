"""Tasks: what the outputs of a model look like, how they are checked and scored, and who refuses them."""

from typing import TYPE_CHECKING, Any

from tta.messages import nearest
from tta.tasks.classification import Classification
from tta.tasks.detection import Detection, precision
from tta.tasks.regression import Regression, errors_of
from tta.tasks.segmentation import Segmentation, class_iou, confusion, mean_iou, resized
from tta.tasks.task import Direction, Score, Scored, Tally, Task, mean_of_known

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "CLASSIFICATION",
    "DETECTION",
    "NAMES",
    "REGRESSION",
    "SEGMENTATION",
    "Direction",
    "Score",
    "Scored",
    "Tally",
    "Task",
    "class_iou",
    "confusion",
    "errors_of",
    "find",
    "mean_iou",
    "mean_of_known",
    "precision",
    "read",
    "resized",
]

CLASSIFICATION, SEGMENTATION = Classification(), Segmentation()
DETECTION, REGRESSION = Detection(), Regression()
_ALL: dict[str, Task] = {task.name: task for task in (CLASSIFICATION, SEGMENTATION, DETECTION, REGRESSION)}
NAMES = tuple(_ALL)


def read(output: Any, images: "Tensor") -> "Tensor":
    """The logits of a model's output, whose task nobody said: maps where it can be nothing else, else one row an image."""
    from tta.functional import logits_of

    return SEGMENTATION.read(output, images) if SEGMENTATION.is_map(output) else logits_of(output)


def find(name: str) -> Task:
    """The task of a name.

    Raises:
        ValueError: there is no such task; the nearest one is offered.
    """
    if name not in _ALL:
        raise ValueError(f"task is one of {', '.join(NAMES)}; got {name!r}.{nearest(str(name), NAMES)}")
    return _ALL[name]
