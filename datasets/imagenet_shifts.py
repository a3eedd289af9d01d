"""``imagenet-a``, ``imagenet-r``, ``imagenet-v2``, ``imagenet-sketch``: other images of ImageNet's classes."""

from collections.abc import Sequence
from pathlib import Path

from tta.datasets.domains import Classes
from tta.datasets.files import FileImages, check_classes, find_folder, list_images, subfolders
from tta.datasets.geometry import Geometry
from tta.datasets.imagenet_classes import IMAGENET_A, IMAGENET_R, WNIDS

# published numbers of images
A_IMAGES, R_IMAGES, V2_IMAGES, SKETCH_IMAGES = 7_500, 30_000, 10_000, 50_889
EVERY = Classes(len(WNIDS), None, len(WNIDS))
# For `tta source`, which needs the classes of a stream without its images.
CLASSES_OF = {
    "imagenet-a": Classes(len(IMAGENET_A), IMAGENET_A, len(WNIDS)),
    "imagenet-r": Classes(len(IMAGENET_R), IMAGENET_R, len(WNIDS)),
    "imagenet-v2": EVERY,
    "imagenet-sketch": EVERY,
}


def imagenet_a(
    *,
    root: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    seed: int = 0,
) -> list[FileImages]:
    """ImageNet-A: natural images of 200 classes that a ResNet-50 misclassifies.

    Hendrycks et al., "Natural Adversarial Examples", CVPR 2021, https://github.com/hendrycks/natural-adv-examples. ``root``
    is, or holds as ``imagenet-a/``, the 200 folders ``n01498041/*.jpg``. The model predicts one of the 200 classes: its
    other 800 logits are removed before it adapts.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        samples: number of images, the first ones; default: all.
        by_class: class by class as listed, instead of shuffled, always in the same way.
        resize: pixels of the shorter side.
        crop: side of the square in the middle.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: no such folder; the message says how to get it.
        ValueError: other classes or another number of images than published, or a setting out of range.
    """
    how = "https://github.com/hendrycks/natural-adv-examples (`tta download imagenet-a`)"
    return _by_wnid("imagenet-a", ("imagenet-a",), A_IMAGES, how, root, samples, by_class, resize, crop)


def imagenet_r(
    *,
    root: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    seed: int = 0,
) -> list[FileImages]:
    """ImageNet-R: art, cartoons, toys and other renditions of 200 classes.

    Hendrycks et al., "The Many Faces of Robustness", ICCV 2021, https://github.com/hendrycks/imagenet-r. ``root`` is, or
    holds as ``imagenet-r/``, the 200 folders ``n01443537/*.jpg``. Logits, settings and errors as for ``imagenet-a``: see
    :func:`imagenet_a`; the two share 86 classes.
    """
    how = "https://github.com/hendrycks/imagenet-r (`tta download imagenet-r`)"
    return _by_wnid("imagenet-r", ("imagenet-r",), R_IMAGES, how, root, samples, by_class, resize, crop)


def imagenet_sketch(
    *,
    root: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    seed: int = 0,
) -> list[FileImages]:
    """ImageNet-Sketch: black and white drawings of all 1000 classes.

    Wang et al., "Learning Robust Global Representations by Penalizing Local Predictive Power", NeurIPS 2019,
    https://github.com/HaohanWang/ImageNet-Sketch. ``root`` is, or holds as ``ImageNet-Sketch/sketch/`` or ``sketch/``, the
    folders ``n01440764/*.JPEG``. Settings and errors as for ``imagenet-a``: see :func:`imagenet_a`.
    """
    how = "https://github.com/HaohanWang/ImageNet-Sketch (`tta download imagenet-sketch`)"
    folders = ("ImageNet-Sketch/sketch", "ImageNet-Sketch", "imagenet-sketch", "sketch")
    return _by_wnid("imagenet-sketch", folders, SKETCH_IMAGES, how, root, samples, by_class, resize, crop)


def imagenet_v2(
    *,
    root: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    seed: int = 0,
) -> list[FileImages]:
    """ImageNet-V2, matched frequency: a new validation set, collected like the original one.

    Recht et al., "Do ImageNet Classifiers Generalize to ImageNet?", ICML 2019, https://github.com/modestyachts/ImageNetV2.
    ``root`` is, or holds as ``imagenetv2-matched-frequency-format-val/``, the folders ``0`` to ``999``, each named by the
    output of the model for its class. (``ImageFolder`` sorts them as text, 0, 1, 10, 100, 101 ...: with its labels the
    logits must be permuted.) Settings and errors as for ``imagenet-a``: see :func:`imagenet_a`.
    """
    names = [str(number) for number in range(len(WNIDS))]
    folder = find_folder(
        root,
        (
            "imagenetv2-matched-frequency-format-val",
            "imagenet-v2/imagenetv2-matched-frequency-format-val",
            "imagenet-v2",
        ),
        lambda place: (place / names[0]).is_dir(),
        "Looked for 0/*.jpeg, from https://github.com/modestyachts/ImageNetV2 (`tta download imagenet-v2`).",
    )
    return _one("imagenet-v2", folder, names, V2_IMAGES, samples, by_class, Geometry(resize, crop))


def _by_wnid(
    name: str,
    folders: tuple[str, ...],
    images: int,
    how: str,
    root: str | Path | None,
    samples: int | None,
    by_class: bool,
    resize: int | None,
    crop: int | None,
) -> list[FileImages]:
    """One domain whose folders are named by the WordNet ids of its classes."""
    outputs = CLASSES_OF[name].logits
    wnids = WNIDS if outputs is None else [WNIDS[output] for output in outputs]
    folder = find_folder(
        root,
        folders,
        lambda place: any((place / wnid).is_dir() for wnid in wnids),
        f"Looked for {wnids[0]}/, from {how}.",
    )
    return _one(name, folder, wnids, images, samples, by_class, Geometry(resize, crop))


def _one(
    name: str,
    folder: Path,
    folders: Sequence[str],
    images: int,
    samples: int | None,
    by_class: bool,
    geometry: Geometry,
) -> list[FileImages]:
    check_classes(folder, subfolders(folder), folders)
    files = list_images(folder, folders)
    if len(files) != images:
        raise ValueError(f"'{folder}' holds {len(files)} images; expected {images}. Unpack the archive again.")
    files = files if by_class else files.shuffled()
    return [FileImages(name, folder, files.first(samples), geometry, classes=CLASSES_OF[name])]
