"""``digits-boxes``: the canvases of ``digits-mosaic``, with a box around every digit. Embedded: nothing is downloaded."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from tta import fingerprint
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.digits_mosaic import ORIGIN, SOURCE_CANVASES, Mosaics, held_out, mosaics
from tta.datasets.domains import CleanImages, CorruptedImages
from tta.labels import UNKNOWN

TASK = "detection"
FIRST = 1  # the label of digit 0: torchvision's detectors keep 0 for the background
CLASS_NAMES = {"digits-boxes": ("background", *"0123456789")}


class CleanBoxes(CleanImages):
    """The canvases as they are, with the boxes of each."""

    task = TASK

    def __init__(self, canvases: Mosaics) -> None:
        unknown, index = torch.full((len(canvases.images),), UNKNOWN), torch.arange(len(canvases.images))
        super().__init__(canvases.images, unknown, index, origin=ORIGIN)
        self._targets = _targets(canvases)

    def targets(self, positions: Tensor) -> Tensor:
        """Boxes at these positions, float32 (n, 6, 6): left, top, right, bottom, class, crowd; NaN behind an image's last."""
        return self._targets[positions]

    def describe(self) -> dict[str, Any]:
        """The manifest entry: a hash over images, and one over boxes."""
        return {**super().describe(), "boxes": fingerprint.of_tensors([("boxes", self._targets)])}


class CorruptedBoxes(CorruptedImages):
    """The canvases under a corruption. Boxes stay, as in the published COCO-C: elastic_transform moves a pixel by a few.

    Args:
        name: of the domain and of the corruption.
        canvases: that are corrupted.
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        seed: of the corruption's draws.
    """

    task = TASK

    def __init__(self, name: str, canvases: Mosaics, *, severity: float, seed: int) -> None:
        unknown, index = torch.full((len(canvases.images),), UNKNOWN), torch.arange(len(canvases.images))
        super().__init__(name, canvases.images, unknown, index, severity=severity, seed=seed, origin=ORIGIN)
        self._canvases, self._seed, self._targets = canvases, seed, _targets(canvases)

    def targets(self, positions: Tensor) -> Tensor:
        """Boxes at these positions, float32 (n, 6, 6): left, top, right, bottom, class, crowd; NaN behind an image's last."""
        return self._targets[positions]

    def at(self, severity: float) -> "CorruptedBoxes":
        """The same canvases under the same corruption at another severity."""
        return CorruptedBoxes(self.name, self._canvases, severity=severity, seed=self._seed)

    def clean(self) -> CleanBoxes:
        """The same canvases without the corruption."""
        return CleanBoxes(self._canvases)

    def describe(self) -> dict[str, Any]:
        """The manifest entry of images, and a hash over the boxes."""
        return {**super().describe(), "boxes": fingerprint.of_tensors([("boxes", self._targets)])}


def _targets(canvases: Mosaics) -> Tensor:
    """Boxes with classes and a column for crowds, of which there are none: (n, 6, 6)."""
    shifted = canvases.boxes + torch.tensor([0.0, 0, 0, 0, FIRST])
    return F.pad(shifted, (0, 1)).where(~shifted.isnan().all(2, keepdim=True), torch.nan)


class SourceBoxes(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """Canvases of the source split as torchvision's detectors are trained on: ``(image, {"boxes": ..., "labels": ...})``."""

    def __init__(self, canvases: Mosaics) -> None:
        self.canvases = canvases

    def __len__(self) -> int:
        return len(self.canvases.images)

    def __getitem__(self, position: int) -> tuple[Tensor, dict[str, Tensor]]:
        boxes = self.canvases.boxes[position]
        boxes = boxes[~boxes[:, 0].isnan()]
        return self.canvases.images[position], {"boxes": boxes[:, :4], "labels": boxes[:, 4].long() + FIRST}


def source_images() -> SourceBoxes:
    """The clean canvases on which the embedded source model was trained, with boxes: 2 000 of (3, 64, 64), uint8."""
    return SourceBoxes(mosaics("train", SOURCE_CANVASES))


def domains(
    *, severity: float = 5, corruptions: Sequence[str] = CORRUPTIONS, samples: int | None = None, seed: int = 0
) -> list[CorruptedBoxes]:
    """Canvases of held-out digits, once for each corruption, in the canonical order.

    Args:
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        corruptions: names in order of arrival; validation corruptions are allowed.
        samples: number of canvases of each domain, the first ones; default: all 160.
        seed: of the corruptions' draws; the canvases are always the same.

    Raises:
        ValueError: an unknown corruption or severity, or more samples than there are.
    """
    clean = mosaics("test", held_out(samples))
    return [CorruptedBoxes(name, clean, severity=severity, seed=seed) for name in corruptions]
