"""``cifar10-c``, ``cifar100-c``: the published files, or corruptions generated from clean CIFAR."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.transforms import functional as F

from tta import fingerprint
from tta.datasets import pictures
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Classes, CleanImages, CorruptedImages, Domain
from tta.datasets.files import read_from
from tta.paths import data_root

IMAGES = 10_000  # in the test set, and in each severity of a published file
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SUFFIXES = (".png", ".jpg", ".jpeg")


class Cifar(NamedTuple):
    """One of the two data sets: its name, its number of classes, and torchvision's reader of the clean images."""

    name: str
    classes: int
    reader: type[CIFAR10]

    @property
    def short(self) -> str:
        """Its name for ``tta download``: ``cifar10``."""
        return self.name.lower().replace("-", "")


CIFAR_10 = Cifar("CIFAR-10", 10, CIFAR10)
CIFAR_100 = Cifar("CIFAR-100", 100, CIFAR100)


def domains(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS,
    samples: int | None = None,
    seed: int = 0,
) -> list[Domain]:
    """The CIFAR-10 test images, once for each corruption, in the canonical order.

    ``root`` is, or holds, one of these; the first that exists is used:

    * ``CIFAR-10-C/``: the published files, ``gaussian_noise.npy`` ... and ``labels.npy``, uint8 (50000, 32, 32, 3) in
      five blocks of 10 000 images, one per severity. Hendrycks & Dietterich, ICLR 2019,
      https://zenodo.org/records/2535967. Read as memory maps.
    * ``cifar-10-batches-py/``: clean CIFAR-10 as torchvision downloads it; the corruptions are generated.
    * ``test/CLASS/*.png`` (or .jpg): clean CIFAR-10 as image files; the corruptions are generated. Files are listed
      class by class, which would ruin batch statistics: the images are shuffled, always in the same way.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        severity: 1 to 5.
        corruptions: names in order of arrival.
        samples: number of images of each domain, the first ones; default: all 10 000.
        seed: of the draws of generated corruptions.

    Raises:
        FileNotFoundError: none of them exists; the message says how to get one.
        ValueError: a truncated file or one of another shape, an unknown corruption, or a severity out of range.
    """
    return _domains(CIFAR_10, root, severity, corruptions, samples, seed)


def cifar100(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS,
    samples: int | None = None,
    seed: int = 0,
) -> list[Domain]:
    """The CIFAR-100 test images, once for each corruption, in the canonical order.

    ``root`` is, or holds, ``CIFAR-100-C/`` as published (https://zenodo.org/records/3555552, laid out as CIFAR-10-C), or
    ``cifar-100-python/``, clean CIFAR-100 as torchvision downloads it. Settings and errors as for ``cifar10-c``: see
    :func:`domains`.
    """
    return _domains(CIFAR_100, root, severity, corruptions, samples, seed)


def _domains(
    kind: Cifar,
    root: str | Path | None,
    severity: int,
    corruptions: Sequence[str],
    samples: int | None,
    seed: int,
) -> list[Domain]:
    if severity not in range(1, 6):
        raise ValueError(f"severity is 1, 2, 3, 4 or 5; got {severity}.")
    if samples is not None and not 1 <= samples <= IMAGES:
        raise ValueError(f"samples is between 1 and {IMAGES}; got {samples}.")
    folder = Path(root) if root is not None else data_root()
    places = (folder / f"{kind.name}-C", folder)
    published = next((place for place in places if (place / "labels.npy").exists()), None)
    if published is not None:
        labels = _read_labels(published, severity, kind)[:samples]
        return [PublishedImages(name, published / f"{name}.npy", labels, severity, kind) for name in corruptions]
    clean, known, origin = clean_images(folder, kind)
    part = slice(samples)
    index = torch.arange(IMAGES)
    return [
        CorruptedImages(
            name,
            clean[part],
            known[part],
            index[part],
            severity=severity,
            seed=seed,
            origin=origin,
            classes=Classes(kind.classes),
        )
        for name in corruptions
    ]


class PublishedImages:
    """One corruption at one severity of a published file; images are read on access.

    Args:
        name: of the corruption.
        file: uint8 (50000, 32, 32, 3) in five blocks of 10 000 images, one per severity.
        labels: (n,), int64, of the first n images of a block.
        severity: 1 to 5.
        kind: the data set.
    """

    recipe = "cifar"

    def __init__(self, name: str, file: Path, labels: Tensor, severity: int, kind: Cifar = CIFAR_10) -> None:
        self.name = name
        self.labels = labels
        self.index = torch.arange(len(labels))
        self.severity = severity
        self.origin = f"{read_from(file.parent)}, severity {severity}"
        self.classes = Classes(kind.classes)
        self._kind = kind
        self._file = file
        self._block = _read_block(file, (32, 32, 3), severity)

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8 (n, 3, 32, 32)."""
        return torch.from_numpy(self._block[positions.numpy()]).permute(0, 3, 1, 2).contiguous()

    def at(self, severity: int) -> "PublishedImages":
        """The same images under the same corruption at another severity."""
        labels = _read_labels(self._file.parent, severity, self._kind)[: len(self.labels)]
        return PublishedImages(self.name, self._file, labels, severity, self._kind)

    def clean(self) -> CleanImages:
        """The same images without the corruption, from clean CIFAR beside the published folder.

        Raises:
            FileNotFoundError: clean CIFAR is missing; the message says how to get it.
            ValueError: its images have another order than the published ones.
        """
        folder = self._file.parent.parent
        try:
            images, labels, origin = clean_images(folder, self._kind)
        except FileNotFoundError:
            raise FileNotFoundError(
                f"No clean {self._kind.name} in '{folder}', beside the corrupted images: "
                f"`tta download {self._kind.short} --root {folder}` puts it there."
            ) from None
        first = slice(len(self.labels))
        if not torch.equal(labels[first], self.labels):
            raise ValueError(
                f"The labels of {origin} are not those of {self._file.parent}: the images come in another order. Use "
                f"{self._kind.name} as torchvision downloads it."
            )
        return CleanImages(images[first], labels[first], self.index, origin=origin)

    def describe(self) -> dict[str, str]:
        """The manifest entry: where the images are and a hash over the used images and labels."""
        used = torch.from_numpy(np.array(self._block[: len(self.labels)]))
        content = fingerprint.of_tensors([("images", used), ("labels", self.labels)])
        return {"origin": self.origin, "content": content}


def _read_labels(folder: Path, severity: int, kind: Cifar) -> Tensor:
    """Labels of a severity, (10000,), int64."""
    labels = torch.from_numpy(_read_block(folder / "labels.npy", (), severity).astype(np.int64))
    if int(labels.min()) < 0 or int(labels.max()) >= kind.classes:
        raise ValueError(
            f"'{folder / 'labels.npy'}' holds labels from {labels.min()} to {labels.max()}; expected 0 to "
            f"{kind.classes - 1}: it is not that of {kind.name}-C."
        )
    return labels


def _read_block(file: Path, shape: tuple[int, ...], severity: int) -> NDArray[Any]:
    """The block of a published file for a severity, (10000, *shape) uint8, as a memory map."""
    return read_array(file, (5 * IMAGES, *shape))[(severity - 1) * IMAGES : severity * IMAGES]


def read_array(file: Path, expected: tuple[int, ...]) -> NDArray[Any]:
    """A file of images, uint8 (n, height, width, 3), or of labels, integers (n,), as a memory map.

    Raises:
        FileNotFoundError: no such file; the message lists those beside it.
        ValueError: it is truncated, not an .npy file, or of another shape or type.
    """
    if not file.exists():
        there = sorted(other.stem for other in file.parent.glob("*.npy") if other.stem != "labels")
        raise FileNotFoundError(f"There is no '{file}'. That folder holds: {', '.join(there) or 'no .npy file'}.")
    try:
        with file.open("rb") as start:
            np.lib.format.read_magic(start)
        array: NDArray[Any] = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(
            f"'{file}' cannot be read as uint8 {expected}: it has {file.stat().st_size} bytes, and a whole file has "
            f"{int(np.prod(expected))} after its header ({error}). It may be truncated: get it again."
        ) from None
    images = len(expected) > 1
    if array.shape != expected or (images and array.dtype != np.uint8) or array.dtype.kind not in "ui":
        kind = "uint8" if images else "integers"
        raise ValueError(f"'{file}' holds {array.dtype} {array.shape}; expected {kind} {expected}.")
    return array


def clean_images(folder: Path, kind: Cifar) -> tuple[Tensor, Tensor, str]:
    """The clean test images uint8 (10000, 3, 32, 32), their labels, and a description of their origin."""
    inner = kind.reader.base_folder
    home = folder.parent if folder.name == inner else folder  # torchvision names the folder above
    if (home / inner).is_dir():
        data = kind.reader(str(home), train=False)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
        return images, torch.tensor(data.targets), f"clean {kind.name} in {home / inner}"
    files = ""
    if kind is CIFAR_10:
        files = f", and test/{CLASSES[0]}/ (image files)"
        for place in (folder / "test", folder):
            if (place / CLASSES[0]).is_dir():
                return *_image_folder(place), f"clean image files in {place}"
    raise FileNotFoundError(
        f"No {kind.name}-C and no clean {kind.name} in '{folder}'. Looked for {kind.name}-C/labels.npy (the published files: "
        f"`tta download {kind.short}-c`), {inner}/ (`tta download {kind.short}`){files}. Name the folder with "
        "stream.root=PATH or the environment variable TTA_DATA."
    )


def _image_folder(folder: Path) -> tuple[Tensor, Tensor]:
    found = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if found != list(CLASSES):
        raise ValueError(f"'{folder}' has the folders {', '.join(found)}; expected one a class: {', '.join(CLASSES)}.")
    classes = [sorted(f for f in (folder / name).iterdir() if f.suffix.lower() in SUFFIXES) for name in CLASSES]
    files = [file for of_class in classes for file in of_class]
    if len(files) != IMAGES:
        raise ValueError(f"'{folder}' holds {len(files)} images (.png, .jpg, .jpeg); expected {IMAGES}.")
    labels = torch.arange(len(CLASSES)).repeat_interleave(torch.tensor([len(of_class) for of_class in classes]))
    order = torch.from_numpy(np.random.RandomState(0).permutation(IMAGES))
    return torch.stack([_decode(files[i]) for i in order.tolist()]), labels[order]


def _decode(file: Path) -> Tensor:
    try:
        image: Tensor = F.pil_to_tensor(pictures.read(file, exif=False))
    except ValueError as error:
        raise ValueError(f"'{file}' is not an image that can be decoded ({error}).") from None
    if image.shape != (3, 32, 32):
        raise ValueError(f"'{file}' is {image.shape[1]} x {image.shape[2]} pixels; expected 32 x 32.")
    return image
