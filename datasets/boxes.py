"""Boxes: pictures with the boxes of the objects in them, as datasets of a user's own."""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from tta import fingerprint
from tta.datasets.domains import DatasetImages
from tta.labels import UNKNOWN

WIDTH = 6  # of a box: left, top, right, bottom, class, crowd


class DatasetBoxes(DatasetImages):
    """A user's own dataset of ``(image, {"boxes": ..., "labels": ...})`` as a domain, as torchvision's detectors are trained on.

    Boxes (n, 4) are left, top, right and bottom in pixels, labels (n,) whole numbers; ``"iscrowd"`` (n,) may mark groups that COCO
    leaves out. A box without width or height is dropped, and a warning says so once: nothing can be found there. Images of a
    batch are of one size.

    Args:
        name: of the domain.
        dataset: has ``__len__`` and ``__getitem__``.
    """

    task = "detection"

    def __init__(self, name: str, dataset: Dataset[Any]) -> None:
        super().__init__(name, dataset)
        self._recent: dict[int, Tensor] = {}  # boxes of the images that were read last: a sample is decoded once

    @property
    def labels(self) -> Tensor:
        """Unknown, int64 (n,): an image has many classes."""
        return torch.full((len(self.dataset),), UNKNOWN)

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, stacked."""
        self._recent = {}
        images = [self._image(int(position)) for position in positions]
        if len(sizes := sorted({tuple(image.shape[1:]) for image in images})) > 1:
            raise ValueError(
                f"Domain '{self.name}': images of one batch have one size; got {sizes}. Use batch_size=1, or resize them and their "
                "boxes."
            )
        return torch.stack(images)

    def targets(self, positions: Tensor) -> Tensor:
        """Boxes at these positions, float32 (n, most, 6): left, top, right, bottom, class, crowd; NaN behind an image's last."""
        return pad_sequence([self._boxes(int(p)) for p in positions], batch_first=True, padding_value=torch.nan)

    def describe(self) -> dict[str, Any]:
        """The manifest entry: the dataset's class and a hash over all images and boxes."""

        def every() -> Iterable[tuple[str, Tensor]]:
            for position in range(len(self.dataset)):
                yield f"{position}", self._image(position)
                yield f"{position} boxes", self._boxes(position)
                self._recent = {}

        return {"origin": self.origin, "content": fingerprint.of_tensors(every())}

    def _boxes(self, position: int) -> Tensor:
        if position not in self._recent:
            self._check_label(position, self._sample(position)[1])
        return self._recent[position]

    def _check_label(self, position: int, label: Any) -> None:
        """Keep the boxes of a sample that is read."""
        if not isinstance(label, Mapping) or "boxes" not in label or "labels" not in label:
            found = (
                f"a dictionary of {', '.join(map(str, label))}" if isinstance(label, Mapping) else type(label).__name__
            )
            raise ValueError(
                f"Domain '{self.name}', sample {position}: expected a dictionary with 'boxes' (n, 4) and 'labels' (n,); got {found}."
            )
        boxes = torch.as_tensor(label["boxes"]).float().reshape(-1, 4)
        classes = torch.as_tensor(label["labels"]).float().reshape(-1, 1)
        crowd = torch.as_tensor(label.get("iscrowd", torch.zeros(len(boxes)))).float().reshape(-1, 1)
        if not len(boxes) == len(classes) == len(crowd):
            raise ValueError(
                f"Domain '{self.name}', sample {position}: {len(boxes)} boxes, {len(classes)} labels, {len(crowd)} marks of a crowd; "
                "expected one for each."
            )
        solid = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        if not solid.all() and "flat" not in self._told:
            self._told.add("flat")
            warnings.warn(
                f"Domain '{self.name}', sample {position}: {int((~solid).sum())} of the {len(boxes)} boxes have no width or no height "
                "(left, top, right, bottom is expected); they are left out, here and in other samples.",
                stacklevel=2,
            )
        self._recent[position] = torch.cat([boxes, classes, crowd], 1)[solid]


def alike(targets: list[Tensor]) -> list[Tensor]:
    """Targets of several domains with room for as many boxes an image; others are returned as they are."""
    if not targets or targets[0].dim() != 3 or not targets[0].is_floating_point():
        return targets
    most = max(target.shape[1] for target in targets)
    return [functional.pad(target, (0, 0, 0, most - target.shape[1]), value=torch.nan) for target in targets]
