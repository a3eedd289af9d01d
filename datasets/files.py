"""Image files as domains: listed as arrays, decoded when they are asked for, uint8 until they are on the device."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, pil_loader
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from tta import fingerprint
from tta.datasets.corruptions import constants, corrupt
from tta.datasets.domains import UNKNOWN, Classes
from tta.paths import data_root

HASHED = (
    200  # files of a domain whose every byte the manifest's hash covers, evenly spread; of the others name and size
)

MANIFEST = "tta-corrupt.json"  # in a folder that `tta corrupt` wrote


@dataclass(frozen=True)
class Geometry:
    """How a picture of any size becomes an image of the model's: resized as the published recipes do, then cropped.

    Hendrycks & Dietterich, ICLR 2019, made ImageNet-C with ``Geometry(256, 224)``.

    Args:
        resize: pixels of the shorter side; None leaves the picture as it is.
        crop: side of the square taken from the middle; None takes all.
        squash: both sides become ``resize`` pixels, whatever the picture's proportions.

    Raises:
        ValueError: sizes that are no positive whole numbers, or a crop larger than what is left after resizing.
    """

    resize: int | None = None
    crop: int | None = None
    squash: bool = False

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a number of pixels, or null to leave it out; got {value!r}.")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop={self.crop} does not fit into images resized to {self.resize}: raise resize.")
        if self.squash and self.resize is None:
            raise ValueError("squash=true needs resize, the pixels of both sides.")

    def __call__(self, picture: Any) -> Tensor:
        """A PIL picture as (3, height, width), uint8."""
        if self.resize is not None:
            size = [self.resize] * (2 if self.squash else 1)
            picture = F.resize(picture, size, interpolation=InterpolationMode.BILINEAR)
        if self.crop is not None:
            if min(picture.size) < self.crop:
                raise ValueError(f"it has {picture.size[0]} x {picture.size[1]} pixels, crop={self.crop} needs more")
            picture = F.center_crop(picture, [self.crop])
        return F.pil_to_tensor(picture)

    def __str__(self) -> str:
        resized = "" if self.resize is None else f"{'both sides' if self.squash else 'shorter side'} to {self.resize}"
        cropped = "" if self.crop is None else f"middle {self.crop} x {self.crop}"
        return ", ".join(part for part in (resized, cropped) if part) or "as stored"


@dataclass(frozen=True, eq=False)
class FileList:
    """Files below some folder with their labels: arrays, so that a million of them is a few MB that workers share.

    Args:
        names: (n,), bytes: paths below the folder, parts joined by ``/``.
        labels: (n,), int64.
        index: (n,), int64, image numbers: places in the sorted list of all files.
    """

    names: NDArray[np.bytes_]
    labels: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, chosen: slice | Tensor) -> "FileList":
        names = self.names[chosen if isinstance(chosen, slice) else chosen.numpy()]
        return FileList(names, self.labels[chosen], self.index[chosen])

    def shuffled(self) -> "FileList":
        """Always in the same other order: one that goes class by class would ruin batch statistics."""
        return self[torch.from_numpy(np.random.RandomState(0).permutation(len(self)))]

    def first(self, samples: int | None) -> "FileList":
        """Only the first so many.

        Raises:
            ValueError: fewer than one, or more than there are.
        """
        if samples is not None and not 1 <= samples <= len(self):
            raise ValueError(f"samples is between 1 and {len(self)}, the images there are; got {samples}.")
        return self[:samples]


def data_folder(root: str | Path | None) -> Path:
    """``root``; left out, the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``."""
    return Path(root) if root is not None else data_root()


def find_folder(root: str | Path | None, names: Sequence[str], fits: Callable[[Path], bool], how: str) -> Path:
    """The first of ``root/NAME`` and ``root`` itself that fits.

    Args:
        root: left out, the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        names: of the published folder.
        fits: tells the folder from another one.
        how: what was looked for in it and how to get it, for the error.

    Raises:
        FileNotFoundError: none fits.
    """
    folder = data_folder(root)
    for place in (*(folder / name for name in names), folder):
        if place.is_dir() and fits(place):
            return place
    found = f"it holds {some(subfolders(folder))}" if folder.is_dir() else "there is no such folder"
    raise FileNotFoundError(
        f"No {' or '.join(f'{name}/' for name in names)} in '{folder}' ({found}). {how} Name the folder with "
        "stream.root=PATH or the environment variable TTA_DATA."
    )


def read_from(folder: Path) -> str:
    """Where images come from, in words: published files, or a copy made by ``tta corrupt``, as its manifest tells."""
    if not (folder / MANIFEST).is_file():
        return f"read from {folder}"
    note = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    how = note["how"]
    incomplete = "" if note["complete"] else ", not complete"
    return (
        f"read from {folder}, generated by the {how['recipe']} recipe, seed {how['seed']}, saved as {how['format']} "
        f"({note['made_by']}{incomplete})"
    )


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in a folder, sorted; hidden ones are none.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}'. Name another with stream.root=PATH or TTA_DATA.")
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def list_images(folder: Path, classes: Sequence[str], labels: Sequence[int] | None = None) -> FileList:
    """All image files in the class folders of a folder, class by class, sorted; deeper folders are looked into.

    Args:
        folder: holds a folder a class.
        classes: their names, in order.
        labels: of the classes; left out, 0, 1, ...

    Raises:
        FileNotFoundError: a class folder is missing or without images.
        ValueError: a folder of no class.
    """
    check_classes(folder, subfolders(folder), classes)
    names: list[bytes] = []
    counts = []
    for name in classes:
        found = [os.fsencode(f"{name}/{file}") for file in _files(folder / name)]
        if not found:
            raise FileNotFoundError(f"'{folder / name}' holds no image ({', '.join(IMG_EXTENSIONS)}).")
        names += found
        counts.append(len(found))
    numbers = torch.arange(len(classes)) if labels is None else torch.tensor(labels, dtype=torch.int64)
    return FileList(np.array(names), numbers.repeat_interleave(torch.tensor(counts)), torch.arange(len(names)))


def list_flat(folder: Path) -> FileList:
    """All image files below a folder, sorted, of unknown class.

    Raises:
        FileNotFoundError: there is none.
    """
    names = np.array([os.fsencode(name) for name in _files(folder)])
    if not len(names):
        raise FileNotFoundError(f"'{folder}' holds no image ({', '.join(IMG_EXTENSIONS)}).")
    return FileList(names, torch.full((len(names),), UNKNOWN), torch.arange(len(names)))


def read_list(file: Path, number: Callable[[str], int]) -> FileList:
    """The images that a text file names, a path and maybe more in each line, in its order.

    Args:
        file: the list. Its line ends do not matter.
        number: the label of a line's words.

    Raises:
        FileNotFoundError: there is no such list.
        ValueError: the list is empty, names an image twice, or ``number`` raises a KeyError or ValueError.
    """
    if not file.is_file():
        raise FileNotFoundError(f"There is no list of images '{file}'.")
    names, labels = [], []
    for place, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            labels.append(number(line))
        except (KeyError, ValueError, IndexError) as error:
            raise ValueError(f"'{file}', line {place}: {line.strip()!r} is of no known class ({error}).") from None
        names.append(os.fsencode(line.split()[0]))
    if len(set(names)) < max(len(names), 1):
        raise ValueError(f"'{file}' names {len(names)} images, {len(set(names))} different ones; expected each once.")
    return FileList(np.array(names), torch.tensor(labels, dtype=torch.int64), torch.arange(len(names)))


def check_classes(folder: Path, found: Sequence[str], expected: Sequence[str]) -> None:
    """Raise a ValueError unless the folder has these classes; what is missing and what is too much gets named."""
    if list(found) == sorted(expected):
        return
    missing = sorted(set(expected) - set(found))
    unknown = sorted(set(found) - set(expected))
    raise ValueError(
        f"'{folder}' has {len(found)} class folders; expected {len(expected)}."
        + (f" Missing: {some(missing)}." if missing else "")
        + (f" Unknown: {some(unknown)}." if unknown else "")
    )


def check_exist(folder: Path, files: FileList) -> None:
    """Raise a FileNotFoundError unless all files are there."""
    missing = [name for name in files.names.tolist() if not os.path.exists(os.path.join(os.fsencode(folder), name))]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(files)} images are not in '{folder}': {some([os.fsdecode(n) for n in missing])}."
        )


def _files(folder: Path) -> Iterable[str]:
    """Image files below a folder as paths below it, in the order of torchvision's ``ImageFolder``."""
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        inside = os.path.relpath(place, folder).replace(os.sep, "/")
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                yield name if inside == "." else f"{inside}/{name}"


def some(names: Sequence[str]) -> str:
    """The first few names, and how many more."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "") if names else "nothing"


class FileImages:
    """Image files as a domain.

    Decoded by Pillow, as the published pipelines do: torchvision's own decoders are deprecated since 0.29, and resizing of
    tensors differs from resizing of pictures by a grey level here and there.

    Args:
        name: of the domain.
        folder: the paths of ``files`` are below it.
        files: which, their labels and numbers.
        geometry: how a picture becomes an image.
        classes: what the labels count.
        origin: where the images come from, in words.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        files: FileList,
        geometry: Geometry,
        *,
        classes: Classes | None = None,
        origin: str | None = None,
    ) -> None:
        self.name = name
        self.folder = folder
        self.files = files
        self.geometry = geometry
        self.classes = classes
        self.origin = origin or f"read from {folder}"
        self.skipped: list[str] = []  # files that cannot be used

    @property
    def labels(self) -> Tensor:
        return self.files.labels

    @property
    def index(self) -> Tensor:
        return self.files.index

    def path(self, position: int) -> Path:
        """Of the image at a position."""
        return self.folder / os.fsdecode(self.files.names[position])

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8 (n, 3, height, width).

        Raises:
            ValueError: a file that cannot be decoded, or images of different sizes; they are named.
            FileNotFoundError: a file is gone.
        """
        images = [self._image(position) for position in positions.tolist()]
        for position, image in zip(positions.tolist(), images, strict=True):
            if image.shape != images[0].shape:
                first, other = (f"{i.shape[2]} x {i.shape[1]}" for i in (images[0], image))
                raise ValueError(
                    f"'{self.path(position)}' has {other} pixels, '{self.path(int(positions[0]))}' has {first}. A batch "
                    "holds images of one size: say resize= and crop=, as resize=256 crop=224."
                )
        return torch.stack(images)

    def without_unreadable(self) -> "FileImages":
        """The same domain without the files that cannot be decoded; decodes each once to know them, and warns."""
        with ThreadPoolExecutor() as pool:
            good = torch.tensor(list(pool.map(self._readable, range(len(self.files)))))
        if bool(good.all()):
            return self
        kept = FileImages(self.name, self.folder, self.files[good], self.geometry, classes=self.classes)
        kept.skipped = [os.fsdecode(name) for name in self.files.names[~good.numpy()]]
        kept.origin = f"{self.origin}, without {len(kept.skipped)} files that cannot be used"
        warnings.warn(
            f"{len(kept.skipped)} of {len(good)} files in '{self.folder}' cannot be used and are skipped: "
            f"{some(kept.skipped)}.",
            stacklevel=2,
        )
        if not len(kept.files):
            raise ValueError(f"None of the {len(good)} files in '{self.folder}' can be used.")
        return kept

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images: where they lie, a hash and what it covers, what was done to them."""
        return {
            "origin": self.origin,
            "content": self._content,
            "hashed": f"labels, names and sizes of {len(self.files)} files, bytes of {len(self._spread)}",
            "geometry": str(self.geometry),
            "skipped": self.skipped,
        }

    @property
    def _spread(self) -> list[int]:
        return np.unique(np.linspace(0, len(self.files) - 1, min(HASHED, len(self.files))).astype(int)).tolist()

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(fingerprint.of_tensors([("labels", self.labels)]).encode())
        for position, name in enumerate(self.files.names.tolist()):
            digest.update(b"%s %d\n" % (name, self.path(position).stat().st_size))
        for position in self._spread:
            digest.update(self.path(position).read_bytes())
        return digest.hexdigest()

    def _image(self, position: int) -> Tensor:
        file = self.path(position)
        try:
            return self.geometry(pil_loader(file))
        except FileNotFoundError:
            raise FileNotFoundError(f"There is no '{file}' (any more).") from None
        except (OSError, SyntaxError, ValueError) as error:  # Pillow: a broken PNG is a SyntaxError
            raise ValueError(
                f"'{file}' cannot be used as an image: {error}. It has {file.stat().st_size} bytes. Get it again, or "
                "leave such files out with on_error=skip where the stream has it."
            ) from None

    def _readable(self, position: int) -> bool:
        try:
            self._image(position)
        except ValueError:
            return False
        return True


class CorruptedFiles:
    """A domain made by corrupting image files when they are asked for. Nothing is kept: `tta corrupt` writes it to disk.

    Args:
        name: of the domain; also the corruption's name.
        source: gives the images before; shared by the domains of a stream.
        severity: 1 to 5.
        seed: of the draws, which are those of the image numbers.
        recipe: whose constants, see :func:`tta.datasets.corrupt`.

    Raises:
        ValueError: an unknown corruption, severity or recipe.
    """

    def __init__(self, name: str, source: FileImages, *, severity: int, seed: int, recipe: str = "imagenet") -> None:
        constants(name, severity, recipe)
        self.name = name
        self.severity = severity
        self.classes = source.classes
        self.origin = f"generated by the {recipe} recipe, severity {severity}, seed {seed}, from files {source.origin}"
        self._source = source
        self.recipe = recipe
        self._settings: dict[str, Any] = {"severity": severity, "seed": seed, "recipe": recipe}

    @property
    def labels(self) -> Tensor:
        return self._source.labels

    @property
    def index(self) -> Tensor:
        return self._source.index

    def images(self, positions: Tensor) -> Tensor:
        """Corrupted images at these positions, uint8."""
        return self.finish(self.stored(positions), self.index[positions])

    def stored(self, positions: Tensor) -> Tensor:
        """Images at these positions resized and cropped, uint8: what :meth:`finish` starts from."""
        return self._source.images(positions)

    def finish(self, stored: Tensor, index: Tensor) -> Tensor:
        """Corrupt stored images of these numbers, on whichever device they are."""
        return corrupt(stored, self.name, index=index, **self._settings)

    def at(self, severity: int) -> "CorruptedFiles":
        """The same images under the same corruption at another severity."""
        return CorruptedFiles(self.name, self._source, **{**self._settings, "severity": severity})

    def clean(self) -> FileImages:
        """The same images without the corruption."""
        return self._source

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images: how they were made, from which files."""
        return {**self._source.describe(), "origin": self.origin, "generated": dict(self._settings)}
