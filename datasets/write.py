"""Corrupted copies on disk, laid out like the published data sets: ``tta corrupt``."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import functional as F

from tta import fingerprint
from tta.datasets.cifar_c import CIFAR_10, CIFAR_100, CLASSES, clean_images, read_array
from tta.datasets.corruptions import CORRUPTIONS, constants, corrupt
from tta.datasets.files import MANIFEST, FileImages, check_on_error, list_images, subfolders
from tta.datasets.geometry import Geometry

SEVERITIES = (1, 2, 3, 4, 5)
QUALITY = 85  # of the JPEG files of ImageNet-C
AT_ONCE = 32  # images per task, so at most this many are lost when a run is stopped


def write_corrupted(
    source: str | Path,
    target: str | Path,
    *,
    corruptions: Sequence[str] = CORRUPTIONS,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    recipe: str | None = None,
    resize: int | None = 256,
    crop: int | None = 224,
    quality: int | None = QUALITY,
    on_error: str = "raise",
    exif: bool = True,
    workers: int = 0,
    progress: Callable[[Iterable[int], int], Iterable[int]] = lambda steps, total: steps,
) -> int:
    """Write a corrupted copy of a folder of images or of CIFAR; existing files are kept, so that a run can be resumed.

    A folder ``CLASS/IMAGE`` becomes ``CORRUPTION/SEVERITY/CLASS/IMAGE``, the layout of ImageNet-C (Hendrycks &
    Dietterich, ICLR 2019), made in the same way: resized, cropped, corrupted, and saved as JPEG of quality 85, which
    compresses once more. Clean CIFAR (``cifar-10-batches-py/``, ``cifar-100-python/``, ``test/CLASS/IMAGE``, or an .npy file,
    uint8 (n, height, width, 3), with its labels beside it) becomes ``CORRUPTION.npy`` and ``labels.npy``, lossless, the
    layout of CIFAR-10-C. The draws are those of the streams: an image number gets the same damage in both.

    Args:
        source: the clean images.
        target: a folder, created if missing. ``tta-corrupt.json`` in it records how the copy was made.
        corruptions: names.
        severities: of 1 to 5; .npy files hold all five.
        seed: of the draws.
        recipe: ``"cifar"`` or ``"imagenet"``; default: ``"imagenet"`` for a folder, else ``"cifar"``.
        resize: pixels of the shorter side; for a folder of images.
        crop: side of the square in the middle; for a folder of images.
        quality: of the JPEG files, 1 to 95; None for PNG files, lossless.
        on_error: a file of a folder that cannot be used raises an error on access (``"raise"``), or is left out
            (``"skip"``): then all files are decoded once in advance.
        exif: turn pictures of a folder as their EXIF orientation says.
        workers: processes; 0 works in this one.
        progress: gets the steps and their number, and returns the steps.

    Returns:
        Number of images written in this run.

    Raises:
        FileNotFoundError: no images in the source.
        ValueError: a setting out of range, an image that cannot be decoded, or a target made with other settings.
    """
    source, target = Path(source), Path(target)
    if quality is not None and not 1 <= quality <= 95:
        raise ValueError(f"quality is 1 to 95, or null for lossless PNG; got {quality}.")
    arrays = _arrays(source)
    recipe = recipe or ("imagenet" if arrays is None else "cifar")
    for name in corruptions:
        for severity in severities:
            constants(name, severity, recipe)
    settings = {"recipe": recipe, "seed": seed}
    tasks: _Tasks
    if arrays is None:
        clean = _clean_files(source, Geometry(resize, crop), on_error, exif)
        tasks = _FileTasks(clean, target, corruptions, severities, settings, quality)
    elif tuple(severities) == SEVERITIES:
        tasks = _ArrayTasks(*arrays, target, corruptions, settings)
    else:
        raise ValueError(f"Files of arrays hold all severities, 1 to 5; got severities={list(severities)}.")
    target.mkdir(parents=True, exist_ok=True)
    manifest = _claim(target, source, tasks.how, corruptions, severities)
    # Workers of a DataLoader behave alike on every system: one thread each, and their errors are raised here.
    steps = progress(DataLoader(tasks, batch_size=None, num_workers=workers), len(tasks))
    written = sum(int(done) for done in steps)
    tasks.finish()
    _save_manifest(target, {**manifest, "complete": True})
    return written


class _Tasks(Dataset[int]):
    """Independent tasks; ``tasks[n]`` does one and returns the number of images written.

    Args:
        corruptions: names.
        severities: of each corruption.
        settings: recipe and seed.
        how: further entries of the manifest that identify the copy.
    """

    def __init__(
        self, corruptions: Sequence[str], severities: Sequence[int], settings: dict[str, Any], how: dict[str, Any]
    ) -> None:
        self.settings = settings
        self.how = {**settings, **how}
        self.parts = [(name, severity) for name in corruptions for severity in severities]

    def __len__(self) -> int:
        return len(self.parts)

    def finish(self) -> None:
        """Called after the last task."""


class _FileTasks(_Tasks):
    """Tasks of some image files at one severity of one corruption."""

    def __init__(
        self,
        clean: FileImages,
        target: Path,
        corruptions: Sequence[str],
        severities: Sequence[int],
        settings: dict[str, Any],
        quality: int | None,
    ) -> None:
        how = {
            "format": "PNG" if quality is None else f"JPEG quality {quality}",
            "geometry": str(clean.geometry),
            "exif": clean.exif,
            "content": clean.describe()["content"],
            **({"skipped": clean.skipped} if clean.skipped else {}),
        }
        super().__init__(corruptions, severities, settings, how)
        self.clean, self.target, self.quality = clean, target, quality
        self.chunks = -(-len(clean.files) // AT_ONCE)
        names = [self._name(n) for n in range(len(clean.files))]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"Two images of '{clean.folder}' would both become '{twice}': rename one.")

    def __len__(self) -> int:
        return len(self.parts) * self.chunks

    def __getitem__(self, task: int) -> int:
        corruption, severity = self.parts[task // self.chunks]
        home = self.target / corruption / str(severity)
        first = task % self.chunks * AT_ONCE
        every = range(first, min(first + AT_ONCE, len(self.clean.files)))
        missing = [n for n in every if not (home / self._name(n)).exists()]
        if not missing:
            return 0
        positions = torch.tensor(missing)
        index = self.clean.index[positions]
        damaged = corrupt(self.clean.images(positions), corruption, severity=severity, index=index, **self.settings)
        for position, image in zip(missing, damaged, strict=True):
            self._save(image, home / self._name(position))
        return len(missing)

    def _name(self, position: int) -> str:
        name = os.fsdecode(self.clean.files.names[position])
        stem, suffix = os.path.splitext(name)
        if self.quality is None:
            return f"{stem}.png"
        return name if suffix.lower() in (".jpg", ".jpeg") else f"{stem}.JPEG"

    def _save(self, image: Tensor, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        begun = file.with_name(f".{file.name}.{os.getpid()}")
        how = (
            {"format": "PNG"} if self.quality is None else {"format": "JPEG", "quality": self.quality, "optimize": True}
        )
        F.to_pil_image(image).save(begun, **how)
        begun.replace(file)  # the file appears complete or not at all


class _ArrayTasks(_Tasks):
    """Tasks of all images at one severity of one corruption; the severities of a corruption are joined at the end."""

    def __init__(
        self, images: Tensor, labels: Tensor, target: Path, corruptions: Sequence[str], settings: dict[str, Any]
    ) -> None:
        how = {"format": "npy", "content": fingerprint.of_tensors([("images", images), ("labels", labels)])}
        super().__init__(corruptions, SEVERITIES, settings, how)
        self.images, self.labels, self.target = images, labels, target

    def __getitem__(self, task: int) -> int:
        corruption, severity = self.parts[task]
        if self._part(corruption, severity).exists() or (self.target / f"{corruption}.npy").exists():
            return 0
        damaged = corrupt(self.images, corruption, severity=severity, **self.settings)
        _save_array(self._part(corruption, severity), damaged.permute(0, 2, 3, 1).numpy())
        return len(damaged)

    def finish(self) -> None:
        """Join the severities of each corruption in one file, and write the labels, repeated for each severity."""
        _save_array(self.target / "labels.npy", np.tile(self.labels.numpy().astype(np.uint8), len(SEVERITIES)))
        for corruption in dict(self.parts):
            if not (self.target / f"{corruption}.npy").exists():
                parts = [self._part(corruption, severity) for severity in SEVERITIES]
                _save_array(
                    self.target / f"{corruption}.npy", np.concatenate([np.load(part, mmap_mode="r") for part in parts])
                )
                for part in parts:
                    part.unlink()

    def _part(self, corruption: str, severity: int) -> Path:
        return self.target / f".{corruption}.{severity}.npy"


def _clean_files(source: Path, geometry: Geometry, on_error: str, exif: bool) -> FileImages:
    """The images of ``source/CLASS/IMAGE``."""
    names = subfolders(source)
    if not names:
        raise FileNotFoundError(f"'{source}' holds no class folders and no CIFAR: expected CLASS/IMAGE.")
    check_on_error(on_error)
    clean = FileImages("clean", source, list_images(source, names), geometry, exif=exif)
    clean = clean.without_unreadable() if on_error == "skip" else clean
    clean.warn_of_enlarging()
    return clean


def _arrays(source: Path) -> tuple[Tensor, Tensor] | None:
    """Images uint8 (n, 3, height, width) and labels of CIFAR or an .npy file; None if the source is a folder of images."""
    if source.suffix == ".npy":
        images = np.load(source, mmap_mode="r", allow_pickle=False)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
            raise ValueError(f"'{source}' holds {images.dtype} {images.shape}; expected uint8 (n, height, width, 3).")
        beside = source.with_name(source.name.replace("data", "labels")) if "data" in source.name else None
        labels = read_array(beside or source.with_name("labels.npy"), images.shape[:1])
        return torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(np.array(labels))
    if not source.is_dir():
        raise FileNotFoundError(f"There is no folder '{source}' and no .npy file.")
    for kind in (CIFAR_10, CIFAR_100):
        inner = kind.reader.base_folder
        if source.name == inner or (source / inner).is_dir():
            return clean_images(source, kind)[:2]
    return clean_images(source, CIFAR_10)[:2] if (source / "test" / CLASSES[0]).is_dir() else None


def _claim(
    target: Path, source: Path, how: dict[str, Any], corruptions: Sequence[str], severities: Sequence[int]
) -> dict[str, Any]:
    """Write the manifest of a new or resumed copy; a ValueError if the target was made with other settings."""
    file = target / MANIFEST
    before: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    made = {"exif": False, **before.get("how", {})}  # earlier versions turned nothing, and did not say so
    differing = [f"{key} {made.get(key)!r}, now {how[key]!r}" for key in how if before and made.get(key) != how[key]]
    if differing:
        raise ValueError(
            f"'{target}' was made with {'; '.join(differing)}. Choose another folder, or the same settings."
        )
    manifest = {
        "made_by": f"tta corrupt, tta-toolkit {metadata.version('tta-toolkit')}",
        "source": str(source),
        "how": how,
        "corruptions": sorted({*before.get("corruptions", ()), *corruptions}),
        "severities": sorted({*before.get("severities", ()), *severities}),
        "versions": {name: metadata.version(name) for name in ("torch", "torchvision", "pillow", "numpy")},
        "complete": False,
    }
    _save_manifest(target, manifest)
    return manifest


def _save_manifest(target: Path, manifest: dict[str, Any]) -> None:
    begun = target / f".{MANIFEST}"
    begun.write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    begun.replace(target / MANIFEST)


def _save_array(file: Path, array: NDArray[np.uint8]) -> None:
    begun = file.with_name(f".{file.name}.{os.getpid()}")
    with begun.open("wb") as out:
        np.save(out, array)
    begun.replace(file)
