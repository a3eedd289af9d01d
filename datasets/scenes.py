"""``voc``, ``ade20k-c``, ``maskfolder``: pictures of all kinds, with a class for every pixel."""

from collections.abc import Sequence
from pathlib import Path

from torchvision.datasets.folder import IMG_EXTENSIONS

from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.files import data_folder, find_folder
from tta.datasets.masks import VOID, CorruptedMasks, MaskFiles, Reading, Size, Sized, corrupted, names, paired

TASK = "segmentation"
ADE = 150  # classes
CLASS_NAMES = {
    "voc": names(
        "background, aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, dining table, dog, horse, motorbike, "
        "person, potted plant, sheep, sofa, train, tv monitor"
    )
}


def voc(
    *,
    root: str | Path | None = None,
    split: str = "val",
    corruptions: Sequence[str] | None = None,
    severity: int = 3,
    size: Size = None,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles | CorruptedMasks]:
    """Pascal VOC 2012, 20 classes and background; contours are void.

    Everingham et al., "The Pascal Visual Object Classes (VOC) Challenge", IJCV 2010. ``root`` is, or holds as
    ``VOCdevkit/VOC2012/`` or ``VOC2012/``, the folders ``JPEGImages/``, ``SegmentationClass/`` and the list
    ``ImageSets/Segmentation/val.txt``. Pictures differ in size: ``batch_size=1``, or ``size`` for images and masks.

    Settings and errors as for ``camvid``.
    """
    home = find_folder(
        root,
        ("VOCdevkit/VOC2012", "VOC2012"),
        lambda place: (place / f"ImageSets/Segmentation/{split}.txt").is_file(),
        f"Looked for JPEGImages/, SegmentationClass/ and ImageSets/Segmentation/{split}.txt, from torchvision.datasets.VOCSegmentation.",
    )
    names = (home / f"ImageSets/Segmentation/{split}.txt").read_text().split()
    pairs = [(f"JPEGImages/{name}.jpg", f"SegmentationClass/{name}.png") for name in names]
    clean = MaskFiles("clean", home, pairs, Sized(size), Reading(21, resized=True)).first(samples)
    return corrupted(clean, corruptions, severity=severity, seed=seed)


def ade20k_c(
    *,
    root: str | Path | None = None,
    corruptions: Sequence[str] | None = CORRUPTIONS,
    severity: int = 5,
    size: Size = 512,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles | CorruptedMasks]:
    """ADE20K-C: the 2 000 validation pictures of ADE20K under fifteen corruptions, 150 classes.

    Zhou et al., "Scene Parsing through ADE20K Dataset", CVPR 2017; the stream of Li et al., NeurIPS 2024 (DUSA): reset before each
    corruption, shuffled (``protocol=per-domain shuffle=true``), ``batch_size=1``, predictions resized to the masks. Their pictures were
    corrupted as stored and then resized; here they are resized first. ``root`` is, or holds as ``ADEChallengeData2016/``, the folders
    ``images/validation/`` and ``annotations/validation/``. Number 0 of the files is void, the others are the classes from 0 on.

    Settings and errors as for ``camvid``. ``elastic_transform`` moves masks, which then need ``size=null``.
    """
    home = find_folder(
        root,
        ("ADEChallengeData2016",),
        lambda place: (place / "images/validation").is_dir() and (place / "annotations/validation").is_dir(),
        "Looked for images/validation/ and annotations/validation/, from https://groups.csail.mit.edu/vision/datasets/ADE20K.",
    )
    images = (home / "images/validation").glob("*.jpg")
    pairs = paired(home, images, lambda name: name.replace("images/", "annotations/", 1).replace(".jpg", ".png"))
    reading = Reading(ADE, {number + 1: number for number in range(ADE)})
    clean = MaskFiles("clean", home, pairs, Sized(size), reading).first(samples)
    return corrupted(clean, corruptions, severity=severity, seed=seed)


def maskfolder(
    *,
    classes: int,
    root: str | Path | None = None,
    domains: Sequence[str] | None = None,
    images: str = "images",
    masks: str = "masks",
    ignore_index: int = VOID,
    corruptions: Sequence[str] | None = None,
    severity: int = 3,
    size: Size = None,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles | CorruptedMasks]:
    """Your own pairs of pictures ``root/images/NAME.jpg`` and masks ``root/masks/NAME.png``, or of a folder for each domain.

    A mask has the name of its picture and holds the class of every pixel, from 0 on. Pictures arrive in the order of their
    names.

    Args:
        classes: number of classes of the model.
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        domains: folders inside it, in order of arrival, each with ``images`` and ``masks``; default: one domain.
        images: name of the folder of pictures.
        masks: name of the folder of masks.
        ignore_index: value of void pixels, which are not scored.
        corruptions: of a single domain, as of ``camvid``.
        severity: 1 to 5.
        size: rows and columns of images and masks, or the shorter side; null: as stored.
        samples: number of pictures of each domain, the first ones; default: all.
        seed: of the corruptions' draws.

    Raises:
        FileNotFoundError: a folder or a mask is missing; the message names it.
        ValueError: corruptions of several domains, or a setting out of range.
    """
    home = data_folder(root)
    if domains is not None and corruptions is not None:
        raise ValueError("corruptions are of one folder; got several domains too. Name one of the two.")
    made: list[MaskFiles] = []
    for name in domains or ["clean" if corruptions is not None else home.name]:
        folder = home if domains is None else home / name
        for part in (images, masks):
            if not (folder / part).is_dir():
                raise FileNotFoundError(
                    f"There is no folder '{folder / part}'. Expected {images}/NAME and {masks}/NAME.png."
                )
        found = [file for file in (folder / images).iterdir() if file.suffix.lower() in IMG_EXTENSIONS]
        pairs = paired(folder, found, lambda path: f"{masks}/{Path(path).stem}.png")
        reading = Reading(classes, void=(ignore_index,), resized=True)
        made.append(MaskFiles(name, folder, pairs, Sized(size), reading).first(samples))
    if corruptions is None:
        return made
    return corrupted(made[0], corruptions, severity=severity, seed=seed)
