"""Masks: images with a class for every pixel, as datasets of a user's own or as pairs of files."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from tta.datasets import pictures
from tta.datasets.corruptions import corrupt, corrupt_masks
from tta.datasets.domains import Classes, DatasetImages
from tta.datasets.files import CorruptedFiles, FileImages, FileList
from tta.labels import UNKNOWN

VOID = 255  # the usual value of pixels that are not scored
Size = int | tuple[int, int] | list[int] | None


class DatasetMasks(DatasetImages):
    """A user's own dataset of ``(image, mask)`` as a domain.

    Masks may be PIL pictures (of a palette: its numbers), arrays or tensors of whole numbers, (height, width) or
    (1, height, width). Pixels of ``ignore_index`` and below 0 are void.

    Args:
        name: of the domain.
        dataset: has ``__len__`` and ``__getitem__``.
        ignore_index: value of void pixels; None: there is none.
    """

    def __init__(self, name: str, dataset: Dataset[Any], ignore_index: int | None = VOID) -> None:
        super().__init__(name, dataset)
        self.ignore_index = ignore_index
        self._recent: dict[int, Tensor] = {}  # masks of the images that were read last: a sample is decoded once

    @property
    def labels(self) -> Tensor:
        """Unknown, int64 (n,): an image has many classes."""
        return torch.full((len(self.dataset),), UNKNOWN)

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, stacked."""
        self._recent = {}
        return super().images(positions)

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, height, width), -1 for void.

        Raises:
            ValueError: not whole numbers of one size; the message names the domain and sample.
        """
        return stacked([self._mask(int(position)) for position in positions], f"Domain '{self.name}'")

    def describe(self) -> dict[str, Any]:
        """The manifest entry: the dataset's class, a hash over all images and masks, and the value of void."""
        from tta import fingerprint

        def every() -> Iterable[tuple[str, Tensor]]:
            for position in range(len(self.dataset)):
                yield f"{position}", self._image(position)
                yield f"{position} mask", self._mask(position)
                self._recent = {}

        return {"origin": self.origin, "content": fingerprint.of_tensors(every()), "ignore_index": self.ignore_index}

    def _mask(self, position: int) -> Tensor:
        if position not in self._recent:
            self._check_label(position, self._sample(position)[1])
        return self._recent[position]

    def _check_label(self, position: int, label: Any) -> None:
        """Keep the mask of a sample that is read."""
        mask = label if isinstance(label, Tensor) else torch.from_numpy(np.array(label))
        mask = mask[0] if mask.dim() == 3 and len(mask) == 1 else mask
        if mask.dim() != 2 or mask.is_floating_point():
            raise ValueError(
                f"Domain '{self.name}', sample {position}: expected a mask (height, width) of whole numbers, a class of every "
                f"pixel; got {mask.dtype} of shape {tuple(mask.shape)}."
            )
        self._recent[position] = voided(mask.long(), self.ignore_index)


def names(text: str) -> tuple[str, ...]:
    """Names of classes in their order, from one text with commas."""
    return tuple(text.split(", "))


def voided(masks: Tensor, ignore_index: int | None) -> Tensor:
    """Masks with -1 for void: values of ``ignore_index``, and all below 0."""
    void = masks < 0 if ignore_index is None else (masks < 0) | (masks == ignore_index)
    return masks.masked_fill(void, UNKNOWN)


def stacked(masks: Sequence[Tensor], what: str) -> Tensor:
    """Masks of one batch, which are of one size; a ValueError says so."""
    sizes = {tuple(mask.shape) for mask in masks}
    if len(sizes) > 1:
        raise ValueError(
            f"{what}: masks of one batch have one size; got {sorted(sizes)}. Use batch_size=1, or resize them."
        )
    return torch.stack(list(masks))


@dataclass(frozen=True)
class Sized:
    """Turns a picture or a mask into one of another size.

    Args:
        size: rows and columns; pixels of the shorter side; or None, as stored.

    Raises:
        ValueError: sizes that are not positive whole numbers.
    """

    size: Size = None

    def __post_init__(self) -> None:
        sides = self.size if isinstance(self.size, (tuple, list)) else [self.size]
        right = all(side is None or (isinstance(side, int) and side > 0) for side in sides) and len(sides) in (1, 2)
        if not right or (None in sides and self.size is not None):
            raise ValueError(f"size is rows and columns, the pixels of the shorter side, or null; got {self.size!r}.")

    def __call__(self, picture: Any) -> Tensor:
        """A PIL picture as (3, height, width), uint8, resized bilinearly."""
        image: Tensor = F.pil_to_tensor(self._resized(picture, InterpolationMode.BILINEAR))
        return image

    def of_mask(self, mask: Image.Image) -> Image.Image:
        """A mask, each pixel that of the nearest."""
        resized: Image.Image = self._resized(mask, InterpolationMode.NEAREST)
        return resized

    def _resized(self, picture: Any, how: InterpolationMode) -> Any:
        if self.size is None:
            return picture
        size = [self.size] if isinstance(self.size, int) else list(self.size)
        return F.resize(picture, size, interpolation=how)

    def __str__(self) -> str:
        if isinstance(self.size, int):
            return f"shorter side to {self.size}"
        return "as stored" if self.size is None else f"{self.size[0]} x {self.size[1]} (rows x columns)"


@dataclass(frozen=True)
class Reading:
    """Rules by which the numbers of a mask's file become classes.

    Attributes:
        classes: number of classes.
        numbers: class of each number in the files; others are void. None: the numbers are the classes.
        void: numbers that are void, without ``numbers``.
        resized: whether masks are resized as the pictures are. If not, predictions are resized to the masks.
    """

    classes: int
    numbers: Mapping[int, int] | None = None
    void: tuple[int, ...] = (VOID,)
    resized: bool = False

    @property
    def table(self) -> NDArray[np.int64]:
        """Class of each number from 0 to 65535."""
        if self.numbers is None:
            table = np.arange(2**16)
            table[list(self.void)] = UNKNOWN
            return table
        table = np.full(2**16, UNKNOWN)
        table[list(self.numbers)] = list(self.numbers.values())
        return table


class MaskFiles(FileImages):
    """Pairs of image and mask files as a domain.

    Args:
        name: of the domain.
        folder: the paths of images and masks are relative to it.
        pairs: paths of each image and its mask, in order of arrival.
        geometry: of the images.
        reading: of the masks. Of a mask in colours the red channel counts, as CARLA's.

    Raises:
        FileNotFoundError: there are no pairs, or a mask is missing; the message names it.
    """

    def __init__(
        self, name: str, folder: Path, pairs: Sequence[tuple[str, str]], geometry: Sized, reading: Reading
    ) -> None:
        if not pairs:
            raise FileNotFoundError(f"Domain '{name}': '{folder}' holds no images.")
        absent = [mask for _, mask in pairs if not (folder / mask).is_file()]
        if absent:
            raise FileNotFoundError(
                f"Domain '{name}': {len(absent)} of {len(pairs)} images have no mask in '{folder}', as '{absent[0]}'."
            )
        count = len(pairs)
        files = FileList(
            np.array([image.encode() for image, _ in pairs]), torch.full((count,), UNKNOWN), torch.arange(count)
        )
        self.mask_names, self.sized, self.reading = [mask for _, mask in pairs], geometry, reading
        self._table = torch.from_numpy(reading.table)
        super().__init__(name, folder, files, geometry, classes=Classes(reading.classes))

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, height, width), -1 for void.

        Raises:
            ValueError: a file that is no mask, or masks of several sizes.
        """
        return stacked([self._mask(position) for position in positions.tolist()], f"Domain '{self.name}'")

    def first(self, samples: int | None) -> "MaskFiles":
        """The same domain with its first images only; all if None.

        Raises:
            ValueError: ``samples`` is below one, or above the number of images.
        """
        kept = self.files.first(samples)
        pairs = [(name.decode(), mask) for name, mask in zip(kept.names, self.mask_names[: len(kept)], strict=True)]
        return MaskFiles(self.name, self.folder, pairs, self.sized, self.reading)

    def describe(self) -> dict[str, Any]:
        """The manifest entry of images, with a hash over names and sizes of the masks, and over the bytes of some."""
        digest = hashlib.sha256()
        for name in self.mask_names:
            digest.update(f"{name} {(self.folder / name).stat().st_size}\n".encode())
        for position in self._spread:
            digest.update((self.folder / self.mask_names[position]).read_bytes())
        resized = "as the images" if self.reading.resized else "as stored"
        return {**super().describe(), "masks": digest.hexdigest(), "mask_size": resized}

    def _mask(self, position: int) -> Tensor:
        file = self.folder / self.mask_names[position]
        try:
            pictures.check_plain(file)
            with Image.open(file) as opened:
                mask = self.sized.of_mask(opened) if self.reading.resized else opened
                numbers = np.array(mask)
        except Exception as error:  # Pillow raises classes of its own
            raise ValueError(f"'{file}' cannot be used as a mask: {str(error).rstrip('.')}.") from None
        numbers = numbers[..., 0] if numbers.ndim == 3 else numbers
        if numbers.dtype.kind not in "biu" or numbers.min() < 0 or numbers.max() >= len(self._table):
            raise ValueError(
                f"'{file}' cannot be used as a mask: it holds {numbers.min()} to {numbers.max()} ({numbers.dtype}); expected the "
                "numbers of classes, whole and from 0 to 65535."
            )
        return self._table[torch.from_numpy(numbers.astype(np.int64))]


class CorruptedMasks(CorruptedFiles):
    """A domain made by corrupting the images of pairs of files; masks move where the corruption moves pixels.

    Args:
        name: of the domain; also the corruption's name.
        source: gives clean images and masks.
        severity, seed, recipe: as of :class:`tta.datasets.files.CorruptedFiles`.

    Raises:
        ValueError: as there.
    """

    def __init__(self, name: str, source: MaskFiles, *, severity: int, seed: int, recipe: str = "imagenet") -> None:
        super().__init__(name, source, severity=severity, seed=seed, recipe=recipe)
        self._pairs = source

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, height, width), -1 for void.

        Raises:
            ValueError: the corruption moves pixels, and the masks have another size than the images.
        """
        masks = self._checked(positions)
        return corrupt_masks(masks, self.name, index=self.index[positions], **self._settings)

    def at(self, severity: int) -> "CorruptedMasks":
        """The same images under the same corruption at another severity."""
        return CorruptedMasks(self.name, self._pairs, **{**self._settings, "severity": severity})

    def _checked(self, positions: Tensor) -> Tensor:
        masks = self._pairs.masks(positions)
        if self.name == "elastic_transform" and masks.shape[1:] != (images := self.stored(positions)).shape[2:]:
            raise ValueError(
                f"'{self.name}' moves pixels, and masks with them: they need the size of the images, {tuple(images.shape[2:])}; "
                f"got {tuple(masks.shape[1:])}. Leave out size=, or this corruption."
            )
        return masks


class PassingWeather(CorruptedMasks):
    """Frames of a video under a corruption that comes and goes: clean, up to the severity, clean again, and so on.

    Frame t has the severity ``severity * (1 - cos(2 pi t / period)) / 2``, to a quarter.

    Args:
        name, source, severity, seed, recipe: as of :class:`CorruptedMasks`.
        period: frames from one clean frame to the next.

    Raises:
        ValueError: as there, or a period below 2.
    """

    def __init__(
        self, name: str, source: MaskFiles, *, severity: int, seed: int, period: int, recipe: str = "imagenet"
    ) -> None:
        if period < 2:
            raise ValueError(f"period is the number of frames from clean to clean, 2 or more; got {period}.")
        super().__init__(name, source, severity=severity, seed=seed, recipe=recipe)
        self.origin = f"{self.origin}, coming and going every {period} frames"
        self._settings["period"] = period

    def severities(self, index: Tensor) -> Tensor:
        """The severity of each of these frames, float64."""
        phase = 2 * math.pi * index.double() / self._settings["period"]
        severities: Tensor = (4 * self.severity * (1 - phase.cos()) / 2).round() / 4
        return severities

    def finish(self, stored: Tensor, index: Tensor) -> Tensor:
        """Corrupt stored images of these frames on the device that holds them."""
        return self._by_severity(corrupt, stored, index)

    def masks(self, positions: Tensor) -> Tensor:
        """Masks at these positions, int64 (n, height, width), -1 for void; errors as of :class:`CorruptedMasks`."""
        return self._by_severity(corrupt_masks, self._checked(positions), self.index[positions])

    def at(self, severity: int) -> "PassingWeather":
        """The same frames, at another severity where the corruption is worst."""
        return PassingWeather(self.name, self._pairs, **{**self._settings, "severity": severity})

    def _by_severity(self, change: Callable[..., Tensor], values: Tensor, index: Tensor) -> Tensor:
        severities, made = self.severities(index), torch.empty_like(values)
        for severity in torch.unique(severities).tolist():
            here = (severities == severity).nonzero()[:, 0]
            there = here.to(values.device)
            how = {"severity": severity, "seed": self._settings["seed"], "recipe": self.recipe}
            made[there] = change(values[there], self.name, index=index[here], **how)
        return made


def corrupted(
    clean: MaskFiles,
    corruptions: Sequence[str] | None,
    *,
    severity: int,
    seed: int,
    recipe: str = "imagenet",
    period: int | None = None,
) -> Sequence[MaskFiles | CorruptedMasks]:
    """A domain for each corruption, which with a period comes and goes; the clean one alone without any."""
    if corruptions is None:
        return [clean]
    how: dict[str, Any] = {"severity": severity, "seed": seed, "recipe": recipe}
    if period is not None:
        return [PassingWeather(name, clean, period=period, **how) for name in corruptions]
    return [CorruptedMasks(name, clean, **how) for name in corruptions]


def paired(folder: Path, images: Iterable[Path], mask_of: Callable[[str], str]) -> list[tuple[str, str]]:
    """Paths of images, sorted, and of their masks, relative to a folder.

    Args:
        folder: holds both.
        images: paths below it.
        mask_of: gives the path of an image's mask, both relative to the folder.
    """
    names = sorted(image.relative_to(folder).as_posix() for image in images)
    return [(name, mask_of(name)) for name in names]
