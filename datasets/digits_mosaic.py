"""``digits-mosaic``: canvases of several digits, with a class for every pixel. Embedded: nothing is downloaded."""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from tta import fingerprint
from tta.datasets import digits
from tta.datasets.corruptions import CORRUPTIONS, corrupt_masks
from tta.datasets.domains import Classes, CleanImages, CorruptedImages
from tta.labels import UNKNOWN

TASK = "segmentation"
BACKGROUND = 10  # the class of pixels without a digit; the others are the digits 0 to 9
CLASSES = 11
CLASS_NAMES = {"digits-mosaic": (*"0123456789", "background")}
CLASSES_OF = {"digits-mosaic": Classes(CLASSES)}
SIDE, DIGIT, CELLS = 64, 16, 3  # pixels of a canvas and of a digit; cells in a row: a digit has a cell of its own
FEWEST, MOST = 3, 6  # digits of a canvas
SOURCE_CANVASES, CANVASES = 2000, 160  # on which the source model was trained, and of a domain
ORIGIN = "mosaics of scikit-learn's digits"


class Mosaics(NamedTuple):
    """Canvases: images (n, 3, 64, 64), uint8; masks (n, 64, 64), int64: 0 to 9, 10 for background, -1 for void; and the box of each
    digit, float32 (n, 6, 5): left, top, right, bottom in pixels, digit; NaN behind the last one of a canvas.
    """

    images: Tensor
    masks: Tensor
    boxes: Tensor


@cache
def mosaics(split: str, count: int, seed: int = 0) -> Mosaics:
    """Canvases of 3 to 6 digits, enlarged twice, on a faint gradient; colours, places and digits are drawn.

    A pixel is of a digit where its ink is above a third of the digit's most, and void within a pixel of such a one, as at
    the borders of Pascal VOC's objects.

    Args:
        split: ``"train"`` or ``"test"``, see :func:`tta.datasets.digits.split`; they share no digit.
        count: number of canvases; the first ones are those of a smaller count.
        seed: of all draws.

    Raises:
        ValueError: another split.
    """
    _, labels, rows = digits.split(split)
    small = torch.from_numpy(load_digits().images)[rows].float() / 16
    ink = F.interpolate(small[:, None], size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)[:, 0]
    drawn = [_canvas(ink, labels, torch.Generator().manual_seed(seed * 2**20 + number)) for number in range(count)]
    return Mosaics(*(torch.stack(parts) for parts in zip(*drawn, strict=True)))


def _canvas(ink: Tensor, labels: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One canvas, its mask and its boxes."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    number = int(torch.randint(FEWEST, MOST + 1, (), generator=generator))
    chosen = torch.randint(len(ink), (number,), generator=generator)
    cells = torch.randperm(CELLS**2, generator=generator)[:number]
    free = SIDE // CELLS - DIGIT + 1  # pixels by which a digit moves in its cell
    jitter = torch.randint(free, (number, 2), generator=generator)
    places = torch.stack([cells // CELLS, cells % CELLS], 1) * (SIDE // CELLS) + jitter
    slope = torch.linspace(-0.5, 0.5, SIDE)
    canvas = (
        0.1
        + 0.1 * uniform(3, 1, 1)
        + 0.2 * (uniform(3, 1, 1) - 0.5) * slope
        + 0.2 * (uniform(3, 1, 1) - 0.5) * slope[:, None]
    )
    mask, boxes = torch.full((SIDE, SIDE), BACKGROUND), torch.full((MOST, 5), torch.nan)
    colours = 0.7 + 0.3 * uniform(number, 3, 1, 1)
    for place, (digit, (top, left), colour) in enumerate(zip(chosen, places.tolist(), colours, strict=True)):
        rows, columns = slice(top, top + DIGIT), slice(left, left + DIGIT)
        canvas[:, rows, columns] += ink[digit] * (colour - canvas[:, rows, columns])
        inked = ink[digit] > ink[digit].max() / 3
        mask[rows, columns][inked] = labels[digit]
        (first_row, first_column), (last_row, last_column) = inked.nonzero().aminmax(dim=0)
        box = left + first_column, top + first_row, left + last_column + 1, top + last_row + 1, labels[digit]
        boxes[place] = torch.stack(box).float()
    is_digit = mask != BACKGROUND
    near = F.max_pool2d(is_digit[None].float(), 3, stride=1, padding=1)[0] > 0
    return (canvas * 255).round().to(torch.uint8), mask.masked_fill(near & ~is_digit, UNKNOWN), boxes


class CleanMosaics(CleanImages):
    """The canvases as they are, with a mask for each."""

    def __init__(self, canvases: Mosaics) -> None:
        unknown, index = torch.full((len(canvases.images),), UNKNOWN), torch.arange(len(canvases.images))
        super().__init__(canvases.images, unknown, index, origin=ORIGIN, classes=Classes(CLASSES))
        self._masks = canvases.masks

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, 64, 64), -1 for void."""
        return self._masks[positions]

    def describe(self) -> dict[str, Any]:
        """The manifest entry: a hash over images, and one over masks."""
        return {**super().describe(), "masks": fingerprint.of_tensors([("masks", self._masks)])}


class CorruptedMosaics(CorruptedImages):
    """The canvases under a corruption; masks move where it moves pixels.

    Args:
        name: of the domain and of the corruption.
        canvases: that are corrupted.
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        seed: of the corruption's draws.
    """

    def __init__(self, name: str, canvases: Mosaics, *, severity: float, seed: int) -> None:
        unknown, index = torch.full((len(canvases.images),), UNKNOWN), torch.arange(len(canvases.images))
        about: dict[str, Any] = {"origin": ORIGIN, "classes": Classes(CLASSES)}
        super().__init__(name, canvases.images, unknown, index, severity=severity, seed=seed, **about)
        self._canvases, self._seed = canvases, seed

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, 64, 64), -1 for void."""
        return corrupt_masks(self._canvases.masks[positions], self.name, index=self.index[positions], **self._settings)

    def at(self, severity: float) -> "CorruptedMosaics":
        """The same canvases under the same corruption at another severity."""
        return CorruptedMosaics(self.name, self._canvases, severity=severity, seed=self._seed)

    def clean(self) -> CleanMosaics:
        """The same canvases without the corruption."""
        return CleanMosaics(self._canvases)

    def describe(self) -> dict[str, Any]:
        """The manifest entry of images, and a hash over the masks."""
        return {**super().describe(), "masks": fingerprint.of_tensors([("masks", self._canvases.masks)])}


def held_out(samples: int | None) -> int:
    """The number of canvases of a domain; raises a ValueError for more than there are, or none."""
    if samples is not None and not 1 <= samples <= CANVASES:
        raise ValueError(f"samples is between 1 and {CANVASES}; got {samples}.")
    return samples or CANVASES


def source_images() -> TensorDataset:
    """The clean canvases on which the embedded source model was trained, with masks: 2 000 of (3, 64, 64), uint8."""
    canvases = mosaics("train", SOURCE_CANVASES)
    return TensorDataset(canvases.images, canvases.masks)


def domains(
    *, severity: float = 5, corruptions: Sequence[str] = CORRUPTIONS, samples: int | None = None, seed: int = 0
) -> list[CorruptedMosaics]:
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
    return [CorruptedMosaics(name, clean, severity=severity, seed=seed) for name in corruptions]
