"""``imagenet-c``, ``imagenet-3dcc``, ``tiny-imagenet-c``: corrupted image files, ``CORRUPTION/SEVERITY/WNID/*.JPEG``."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Classes
from tta.datasets.files import (
    FileImages,
    FileList,
    check_exist,
    find_folder,
    list_images,
    read_from,
    read_list,
    some,
    subfolders,
)
from tta.datasets.geometry import Geometry
from tta.datasets.imagenet_classes import WNIDS

# Kar et al., "3D Common Corruptions and Data Augmentation", CVPR 2022; in the order of RobustBench
CORRUPTIONS_3D: tuple[str, ...] = (
    "near_focus",
    "far_focus",
    "bit_error",
    "color_quant",
    "flash",
    "fog_3d",
    "h265_abr",
    "h265_crf",
    "iso_noise",
    "low_light",
    "xy_motion_blur",
    "z_motion_blur",
)


class _Published(NamedTuple):
    """One of the three data sets: names of its folder, its source, and the content of each severity of a corruption."""

    folders: tuple[str, ...]
    how: str
    images: int
    classes: int
    wnids: tuple[str, ...] | None  # names of the class folders; None: any names
    clean: Geometry  # applied to the clean images before they were corrupted


IMAGENET_C = _Published(
    ("ImageNet-C", "imagenet-c"),
    "https://zenodo.org/records/2235448 (`tta download imagenet-c`)",
    50_000,
    1000,
    WNIDS,
    Geometry(256, 224),
)
IMAGENET_3DCC = _Published(
    ("ImageNet-3DCC", "imagenet-3dcc"),
    "https://github.com/EPFL-VILAB/3DCommonCorruptions",
    50_000,
    1000,
    WNIDS,
    Geometry(256, 224),
)
TINY_IMAGENET_C = _Published(
    ("Tiny-ImageNet-C", "tiny-imagenet-c"),
    "https://zenodo.org/records/2536630 (`tta download tiny-imagenet-c`)",
    10_000,
    200,
    None,
    Geometry(),
)


def domains(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS,
    image_list: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = None,
    crop: int | None = None,
    clean_root: str | Path | None = None,
    seed: int = 0,
) -> list["CorruptedFolder"]:
    """ImageNet-C: ImageNet's validation images, once for each corruption, in the canonical order.

    Hendrycks & Dietterich, ICLR 2019, https://zenodo.org/records/2235448. ``root`` is, or holds as ``ImageNet-C/``, the
    folder of ``gaussian_noise/5/n01440764/ILSVRC2012_val_00000293.JPEG``; the folders of the archives (blur, digital, noise,
    weather, extra) may lie between. The images have 224 x 224 pixels and are used unchanged.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        severity: 1 to 5.
        corruptions: names in order of arrival.
        image_list: a text file with the images to use, one ``WNID/NAME.JPEG`` per line, in order of arrival, such as the
            list of 5 000 that RobustBench, CoTTA and later work use. Default: all 50 000, shuffled, always in the same
            way.
        samples: number of images of each domain, the first ones; default: all.
        by_class: class by class as listed, instead of shuffled; without ``image_list``.
        resize: pixels of the shorter side; CoTTA uses 256, with ``crop=224``.
        crop: side of the square in the middle.
        clean_root: ImageNet's validation images, ``WNID/NAME.JPEG``, for protocols that need clean ones.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: the data or a part of it is missing; the message says which, and how to get it.
        ValueError: other classes or another number of images than published, or a setting out of range.
    """
    return _domains(
        IMAGENET_C, root, severity, corruptions, image_list, samples, by_class, Geometry(resize, crop), clean_root
    )


def three_d(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS_3D,
    image_list: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = None,
    crop: int | None = None,
    clean_root: str | Path | None = None,
    seed: int = 0,
) -> list["CorruptedFolder"]:
    """ImageNet-3DCC: ImageNet's validation images under twelve corruptions that follow the scene's geometry.

    Kar et al., "3D Common Corruptions and Data Augmentation", CVPR 2022,
    https://github.com/EPFL-VILAB/3DCommonCorruptions. ``root`` is, or holds as ``ImageNet-3DCC/``, the folder of
    ``near_focus/5/n01440764/ILSVRC2012_val_00000293.JPEG``. Settings and errors as for ``imagenet-c``: see :func:`domains`.
    """
    return _domains(
        IMAGENET_3DCC, root, severity, corruptions, image_list, samples, by_class, Geometry(resize, crop), clean_root
    )


def tiny(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS,
    image_list: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    clean_root: str | Path | None = None,
    seed: int = 0,
) -> list["CorruptedFolder"]:
    """Tiny-ImageNet-C: 10 000 images of 64 x 64 pixels and 200 classes, once for each corruption.

    Hendrycks & Dietterich, ICLR 2019, https://zenodo.org/records/2536630. ``root`` is, or holds as ``Tiny-ImageNet-C/``,
    the folder of ``gaussian_noise/5/n01443537/*.JPEG``. Classes are numbered in the order of their WordNet ids. Settings and
    errors as for ``imagenet-c``: see :func:`domains`.
    """
    return _domains(TINY_IMAGENET_C, root, severity, corruptions, image_list, samples, by_class, Geometry(), clean_root)


class CorruptedFolder(FileImages):
    """One corruption at one severity of a published data set. The domains of a stream share the list of files.

    Args:
        name: of the corruption.
        home: folder of its severities.
        files: paths below ``SEVERITY/``.
        severity: 1 to 5.
        clean: the same images without corruption, if available.
        settings: as of :class:`~tta.datasets.files.FileImages`.
    """

    recipe = "imagenet"

    def __init__(
        self, name: str, home: Path, files: FileList, severity: int, clean: FileImages | None = None, **settings: Any
    ) -> None:
        super().__init__(name, home / str(severity), files, **settings)
        self.severity = severity
        self.origin = f"{read_from(home.parent)}, severity {severity}"
        self._home, self._clean, self._settings = home, clean, settings

    def at(self, severity: int) -> "CorruptedFolder":
        """The same images under the same corruption at another severity.

        Raises:
            FileNotFoundError: they are missing.
        """
        check_exist(self._home / str(severity), self.files)
        return CorruptedFolder(self.name, self._home, self.files, severity, self._clean, **self._settings)

    def clean(self) -> FileImages:
        """The same images without the corruption.

        Raises:
            FileNotFoundError: they are missing.
        """
        if self._clean is None:
            raise FileNotFoundError(
                "The clean images are needed: name their folder, which holds WNID/NAME.JPEG, with stream.clean_root=PATH."
            )
        check_exist(self._clean.folder, self.files)
        return self._clean

    def describe(self) -> dict[str, Any]:
        """The manifest entry, with a separate hash of the order of arrival, by which lists are recognised."""
        order = hashlib.sha256(b"\n".join(self.files.names.tolist())).hexdigest()
        return {**super().describe(), "list": order}


def _domains(
    kind: _Published,
    root: str | Path | None,
    severity: int,
    corruptions: Sequence[str],
    image_list: str | Path | None,
    samples: int | None,
    by_class: bool,
    geometry: Geometry,
    clean_root: str | Path | None,
) -> list[CorruptedFolder]:
    if severity not in range(1, 6):
        raise ValueError(f"severity is 1, 2, 3, 4 or 5; got {severity}.")
    if isinstance(corruptions, str) or not corruptions:
        raise ValueError(f"corruptions is a list of one or more, such as [fog]; got {corruptions!r}.")
    folder = find_folder(
        root,
        kind.folders,
        lambda place: any(_home(place, name) for name in corruptions),
        f"Looked for {corruptions[0]}/{severity}/WNID/*.JPEG, from {kind.how}.",
    )
    homes = {name: _present(folder, name, severity, kind) for name in corruptions}
    parts = [home / str(severity) for home in homes.values()]
    wnids = list(kind.wnids or subfolders(parts[0]))
    if len(wnids) != kind.classes:
        raise ValueError(f"'{parts[0]}' has {len(wnids)} class folders; expected {kind.classes}.")
    if image_list is None:
        files = _whole(parts, wnids, kind)
        files = files if by_class else files.shuffled()
    elif by_class:
        raise ValueError("by_class is for all images; a list has an order of its own.")
    else:
        number = {wnid: place for place, wnid in enumerate(wnids)}
        files = read_list(Path(image_list), lambda line: number[line.split("/")[0]])
    files = files.first(samples)
    if image_list is not None:
        for part in parts:
            check_exist(part, files)
    settings: dict[str, Any] = {"geometry": geometry, "classes": Classes(kind.classes)}
    clean = None
    if clean_root is not None:
        origin = f"not corrupted: files in {clean_root}"
        clean = FileImages("clean", Path(clean_root), files, kind.clean, classes=settings["classes"], origin=origin)
    return [CorruptedFolder(name, home, files, severity, clean, **settings) for name, home in homes.items()]


def _present(folder: Path, corruption: str, severity: int, kind: _Published) -> Path:
    home = _home(folder, corruption)
    if home is None:
        raise FileNotFoundError(
            f"'{folder}' has no '{corruption}': it holds {some(subfolders(folder))}. Get it from {kind.how}."
        )
    if not (home / str(severity)).is_dir():
        raise FileNotFoundError(f"'{home}' has no severity {severity}: it holds {some(subfolders(home))}.")
    return home


def _home(root: Path, corruption: str) -> Path | None:
    """The folder of a corruption's severities: in the root, or in a folder of the root named like the archive."""
    if (root / corruption).is_dir():
        return root / corruption
    return next((root / group / corruption for group in subfolders(root) if (root / group / corruption).is_dir()), None)


def _whole(parts: Sequence[Path], wnids: Sequence[str], kind: _Published) -> FileList:
    """All files, listed once; raises unless every corruption has the same files."""
    files = list_images(parts[0], wnids)
    if len(files) != kind.images:
        raise ValueError(
            f"'{parts[0]}' holds {len(files)} images; expected {kind.images}. Unpack the archive again, or name those that "
            "are there in a file: image_list=FILE."
        )
    for part in parts[1:]:
        _check_same(files, list_images(part, wnids), part)
    return files


def _check_same(expected: FileList, found: FileList, folder: Path) -> None:
    if np.array_equal(expected.names, found.names):
        return
    missing = sorted(set(expected.names.tolist()) - set(found.names.tolist()))
    raise FileNotFoundError(
        f"'{folder}' holds {len(found)} images; the first corruption has {len(expected)}. Missing here: "
        f"{some([os.fsdecode(name) for name in missing])}."
    )
