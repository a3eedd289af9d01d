"""``kitti-weather``, ``coco-c``: pictures with the boxes of the objects in them."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from tta.datasets.boxes import WIDTH
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.files import CorruptedFiles, FileImages, FileList, check_exist, find_folder
from tta.datasets.masks import Size, Sized
from tta.labels import UNKNOWN

TASK = "detection"
# Of ActMAD's KITTI: visibility of 30 m, 200 mm of rain an hour, snow of severity 5.
WEATHER = {"fog": "fog/fog_30", "rain": "rain/200mm", "snow": "snow/5", "clear": "initial/images"}
KITTI_SIZE = (375, 1242)


class BoxFiles(FileImages):
    """Image files and the boxes in them as a domain.

    Args:
        name: of the domain.
        folder: the names of the images are relative to it.
        boxes: for each image (n, 6): left, top, right, bottom as shares of the picture, class, crowd; in order of arrival.
        geometry: of the images; boxes are resized with them.

    Raises:
        FileNotFoundError: there are no images, or one of them is missing.
    """

    def __init__(self, name: str, folder: Path, boxes: Mapping[str, Tensor], geometry: Sized) -> None:
        count = len(boxes)
        names = np.array([image.encode() for image in boxes])
        files = FileList(names, torch.full((count,), UNKNOWN), torch.arange(count))
        if not count:
            raise FileNotFoundError(f"Domain '{name}': '{folder}' holds no images.")
        check_exist(folder, files)
        self.boxes, self.sized = dict(boxes), geometry
        super().__init__(name, folder, files, geometry)

    task = TASK

    def targets(self, positions: Tensor) -> Tensor:
        """Boxes at these positions, float32 (n, most, 6), in pixels of the images; NaN behind an image's last."""
        each = [self._of(position) for position in positions.tolist()]
        return pad_sequence(each, batch_first=True, padding_value=torch.nan)

    def first(self, samples: int | None) -> "BoxFiles":
        """The same domain with its first images only; all if None."""
        kept = [name.decode() for name in self.files.first(samples).names]
        return BoxFiles(self.name, self.folder, {name: self.boxes[name] for name in kept}, self.sized)

    def describe(self) -> dict[str, Any]:
        """The manifest entry of images, with a hash over all boxes."""
        digest = hashlib.sha256()
        for name, boxes in self.boxes.items():
            digest.update(name.encode() + boxes.numpy().tobytes())
        return {**super().describe(), "boxes": digest.hexdigest()}

    def _of(self, position: int) -> Tensor:
        with Image.open(self.path(position)) as opened:  # reads the header alone
            width, height = _resized(opened.size, self.sized.size)
        return self.boxes[self.files.names[position].decode()] * torch.tensor([width, height, width, height, 1, 1])


class CorruptedBoxes(CorruptedFiles):
    """A domain made by corrupting the images of files with boxes, which stay where they are, as in the published COCO-C.

    ``elastic_transform`` moves pixels by a few, and no box: the domain's origin says so.

    Args:
        name: of the domain; also the corruption's name.
        source: gives clean images and boxes.
        severity, seed, recipe: as of :class:`tta.datasets.files.CorruptedFiles`.
    """

    task = TASK

    def __init__(self, name: str, source: BoxFiles, *, severity: int, seed: int, recipe: str = "imagenet") -> None:
        super().__init__(name, source, severity=severity, seed=seed, recipe=recipe)
        self._boxed = source
        if name == "elastic_transform":
            self.origin += ", boxes as in the clean pictures"

    def targets(self, positions: Tensor) -> Tensor:
        """Boxes at these positions, see :meth:`BoxFiles.targets`."""
        return self._boxed.targets(positions)

    def at(self, severity: int) -> "CorruptedBoxes":
        """The same images under the same corruption at another severity."""
        return CorruptedBoxes(self.name, self._boxed, **{**self._settings, "severity": severity})


def kitti_weather(
    *,
    root: str | Path | None = None,
    split: str = "test",
    domains: Sequence[str] = ("fog", "rain", "snow"),
    first_label: int = 1,
    size: Size = KITTI_SIZE,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[BoxFiles]:
    """KITTI's pictures of roads in rendered fog, rain and snow, 8 classes.

    Geiger et al., "Are we ready for Autonomous Driving? The KITTI Vision Benchmark Suite", CVPR 2012; fog and rain of Halder et al.,
    ICCV 2019; in the layout of ActMAD (Mirza et al., CVPR 2023): ``root`` holds ``initial/images``, ``fog/fog_30``, ``rain/200mm``,
    ``snow/5``, the boxes in ``labels_yolo_format/NAME.txt`` and the lists ``train.txt`` and ``test.txt`` (also in ``splits/``). Pictures
    arrive in the order of the list; the paper resets before each domain (``protocol=per-domain``). Theirs were letterboxed to
    672 x 224 or 896 x 288, in the order of their aspect ratio; here they are resized.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        split: ``test`` or ``train``.
        domains: ``fog``, ``rain``, ``snow``, ``clear``, or folders below ``root``, as ``fog/fog_50``, in order of arrival.
        first_label: of the detector's classes, the one of the files' 0; torchvision's have 0 for the background.
        size: rows and columns of images, to which boxes are resized too, or the shorter side; null: as stored.
        samples: number of pictures of each domain, the first ones; default: all.
        seed: not used: nothing is drawn.

    Raises:
        FileNotFoundError: the data is missing, or a picture of the list.
        ValueError: a line of a file of boxes that cannot be read.
    """
    home = find_folder(
        root,
        ("KITTI", "kitti"),
        lambda place: (place / "labels_yolo_format").is_dir() and _list(place, split) is not None,
        f"Looked for labels_yolo_format/NAME.txt, {split}.txt and fog/fog_30/NAME.png and the like, as ActMAD's README lays KITTI out.",
    )
    listed = _list(home, split)
    assert listed is not None
    names = [Path(line).stem for line in listed.read_text().split()]
    boxes = {name: _yolo(home / f"labels_yolo_format/{name}.txt", first_label) for name in names[:samples]}
    return [
        BoxFiles(
            domain.replace("/", "-"),
            home / WEATHER.get(domain, domain),
            {f"{name}.png": of for name, of in boxes.items()},
            Sized(size),
        ).first(samples)
        for domain in domains
    ]


def coco_c(
    *,
    root: str | Path | None = None,
    corruptions: Sequence[str] = CORRUPTIONS,
    severity: int = 5,
    original: bool = True,
    size: Size = None,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[BoxFiles | CorruptedBoxes]:
    """COCO-C: the 5 000 validation pictures of COCO under fifteen corruptions, then as they are; 80 classes numbered to 90.

    Lin et al., "Microsoft COCO: Common Objects in Context", ECCV 2014, and Michaelis et al., arXiv 1907.07484, 2019; the order of Yoo
    et al., "What, How, and When Should Object Detectors Update in Continually Changing Test Domains?", CVPR 2024. Pictures are
    corrupted as they are needed, by the recipe of ImageNet-C. ``root`` is, or holds as ``coco/``, the folder ``val2017/`` and
    ``annotations/instances_val2017.json``. They differ in size: ``batch_size=1``, or ``size``.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        corruptions: names in order of arrival.
        severity: 1 to 5.
        original: whether the clean pictures come last, as a domain ``original``.
        size: rows and columns of images, to which boxes are resized too, or the shorter side; null: as stored.
        samples: number of pictures of each domain, the first ones; default: all.
        seed: of the corruptions' draws.

    Raises:
        FileNotFoundError: the data is missing, or a picture.
        ValueError: an unknown corruption, or a setting out of range.
    """
    annotations = "annotations/instances_val2017.json"
    home = find_folder(
        root,
        ("coco", "COCO"),
        lambda place: (place / annotations).is_file() and (place / "val2017").is_dir(),
        f"Looked for val2017/ and {annotations}, from https://cocodataset.org.",
    )
    boxes = _coco(json.loads((home / annotations).read_text(encoding="utf-8")))
    clean = BoxFiles("original", home / "val2017", boxes, Sized(size)).first(samples)
    damaged = [CorruptedBoxes(name, clean, severity=severity, seed=seed) for name in corruptions]
    return [*damaged, *([clean] if original else [])]


def _list(home: Path, split: str) -> Path | None:
    return next((file for file in (home / f"{split}.txt", home / f"splits/{split}.txt") if file.is_file()), None)


def _yolo(file: Path, first_label: int) -> Tensor:
    """Boxes of a file whose lines are a class, then centre, width and height as shares of the picture; none without a file."""
    rows = []
    for place, line in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
        try:
            label, x, y, width, height = (float(part) for part in line.split())
        except ValueError:
            raise ValueError(f"'{file}', line {place}: expected a class and four numbers; got {line!r}.") from None
        rows.append([x - width / 2, y - height / 2, x + width / 2, y + height / 2, label + first_label, 0.0])
    return _solid(torch.tensor(rows).reshape(-1, WIDTH))


def _coco(annotations: Mapping[str, Any]) -> dict[str, Tensor]:
    """Boxes of each picture of COCO, in the order of the pictures' numbers; classes keep COCO's numbers."""
    pictures = {picture["id"]: picture for picture in annotations["images"]}
    rows: dict[int, list[list[float]]] = {number: [] for number in sorted(pictures)}
    for one in annotations["annotations"]:
        width, height = pictures[one["image_id"]]["width"], pictures[one["image_id"]]["height"]
        left, top, wide, high = one["bbox"]
        shares = [left / width, top / height, (left + wide) / width, (top + high) / height]
        rows[one["image_id"]].append([*shares, one["category_id"], one.get("iscrowd", 0)])
    return {
        pictures[number]["file_name"]: _solid(torch.tensor(found).reshape(-1, WIDTH)) for number, found in rows.items()
    }


def _solid(boxes: Tensor) -> Tensor:
    """Those with a width and a height."""
    return boxes[(boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])]


def _resized(stored: tuple[int, int], size: Size) -> tuple[int, int]:
    """Width and height of a picture that was resized as :class:`tta.datasets.masks.Sized` does."""
    if size is None:
        return stored
    if not isinstance(size, int):
        return size[1], size[0]
    short, long = min(stored), max(stored)
    other = int(size * long / short)
    return (size, other) if stored[0] <= stored[1] else (other, size)
