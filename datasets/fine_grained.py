"""Ten sets of fine-grained classes in the split files of CoOp, on which vision-language models are compared.

Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022, https://github.com/KaiyangZhou/CoOp (DATASETS.md). A split
file ``split_zhou_NAME.json`` lists ``[path, label, name of the class]`` of its ``test`` images; Aircraft has the text files it
was published with.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from tta.datasets.domains import Classes
from tta.datasets.files import FileImages, FileList, find_folder
from tta.datasets.geometry import Geometry

AIRCRAFT = "images_variant_test.txt"


class Layout(NamedTuple):
    """Layout of a set on disk: its folders and files, and the numbers of images and classes to expect.

    Attributes:
        title: name of the set.
        folder: of the set, below the root.
        images: folder of the images in it.
        split: file of the splits in it.
        test: number of test images.
        classes: number of classes.
    """

    title: str
    folder: str
    images: str
    split: str
    test: int
    classes: int


SETS = {
    "caltech101": Layout("Caltech101", "caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", 2465, 100),
    "pets": Layout("Oxford Pets", "oxford_pets", "images", "split_zhou_OxfordPets.json", 3669, 37),
    "cars": Layout("Stanford Cars", "stanford_cars", ".", "split_zhou_StanfordCars.json", 8041, 196),
    "flowers102": Layout("Oxford Flowers", "oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", 2463, 102),
    "food101": Layout("Food-101", "food-101", "images", "split_zhou_Food101.json", 30300, 101),
    "aircraft": Layout("FGVC Aircraft", "fgvc_aircraft", "images", AIRCRAFT, 3333, 100),
    "sun397": Layout("SUN397", "sun397", "SUN397", "split_zhou_SUN397.json", 19850, 397),
    "dtd": Layout("Describable Textures", "dtd", "images", "split_zhou_DescribableTextures.json", 1692, 47),
    "eurosat": Layout("EuroSAT", "eurosat", "2750", "split_zhou_EuroSAT.json", 8100, 10),
    "ucf101": Layout("UCF101, the middle frames", "ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", 3783, 101),
}
# CoOp spells these out; the split file names their folders.
EUROSAT_NAMES = {
    "AnnualCrop": "Annual Crop Land",
    "HerbaceousVegetation": "Herbaceous Vegetation Land",
    "Highway": "Highway or Road",
    "Industrial": "Industrial Buildings",
    "Pasture": "Pasture Land",
    "PermanentCrop": "Permanent Crop Land",
    "Residential": "Residential Buildings",
    "SeaLake": "Sea or Lake",
}


def _of(name: str) -> Callable[..., list[FileImages]]:
    """The function that makes the stream of a set."""

    def domains(
        *,
        root: str | Path | None = None,
        samples: int | None = None,
        by_class: bool = False,
        resize: int | None = 224,
        crop: int | None = 224,
        interpolation: str = "bicubic",
        seed: int = 0,
    ) -> list[FileImages]:
        """The test images of a set, as one domain, with the names of its classes.

        Args:
            root: the folder above the set's; default: the environment variable ``TTA_DATA``, else ``data``, else the cache.
            samples: number of images, the first ones; default: all.
            by_class: as listed, instead of shuffled, always in the same way.
            resize: pixels of the shorter side.
            crop: side of the square in the middle.
            interpolation: of the resizing; CLIP's is bicubic.
            seed: not used; nothing is drawn.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: another number of images or classes than published, or a setting out of range.
        """
        layout = SETS[name]
        folder = find_folder(
            root,
            (layout.folder,),
            lambda place: (place / layout.split).is_file(),
            f"Looked for {layout.split} and {layout.images}/, laid out as https://github.com/KaiyangZhou/CoOp says.",
        )
        paths, labels, names = (_of_aircraft if layout.split == AIRCRAFT else _of_split)(folder / layout.split)
        if (len(paths), len(names)) != (layout.test, layout.classes):
            raise ValueError(
                f"'{folder / layout.split}' lists {len(paths)} test images of {len(names)} classes; expected {layout.test} of "
                f"{layout.classes}."
            )
        listed = FileList(np.array(paths, dtype=np.bytes_), torch.tensor(labels), torch.arange(len(paths)))
        files = (listed if by_class else listed.shuffled()).first(samples)
        geometry = Geometry(resize, crop, False, interpolation)
        made = FileImages(name, folder / layout.images, files, geometry, classes=Classes(layout.classes))
        made.class_names = tuple(names)
        return [made]

    return domains


def _of_split(file: Path) -> tuple[Sequence[str], Sequence[int], Sequence[str]]:
    """Paths, labels and names of the classes in a split file of CoOp."""
    splits: dict[str, list[Any]] = json.loads(file.read_text(encoding="utf-8"))
    named = {label: name for rows in splits.values() for _, label, name in rows}
    names = [EUROSAT_NAMES.get(named[label], named[label]) for label in sorted(named)]
    rows = splits["test"]
    return [path for path, _, _ in rows], [label for _, label, _ in rows], names


def _of_aircraft(file: Path) -> tuple[Sequence[str], Sequence[int], Sequence[str]]:
    """Paths, labels and names of the variants, of Aircraft's own lists."""
    names = (file.parent / "variants.txt").read_text(encoding="utf-8").splitlines()
    rows = [line.split(" ", 1) for line in file.read_text(encoding="utf-8").splitlines()]
    return [f"{image}.jpg" for image, _ in rows], [names.index(variant) for _, variant in rows], names


caltech101, pets, cars, flowers102, food101, aircraft, sun397, dtd, eurosat, ucf101 = map(_of, SETS)
