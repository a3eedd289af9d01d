"""``imagefolder`` and ``imagefolder-c``: a folder of your own, unchanged or corrupted on the fly."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Classes
from tta.datasets.files import (
    CorruptedFiles,
    FileImages,
    FileList,
    check_on_error,
    class_numbers,
    data_folder,
    list_flat,
    list_images,
    some,
    subfolders,
)
from tta.datasets.geometry import Geometry
from tta.datasets.imagenet_classes import WNIDS
from tta.labels import UNKNOWN

ClassMap = str | Path | Mapping[str, int | None] | None


def domains(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] | None = None,
    labels: bool = True,
    class_map: ClassMap = None,
    mask: bool = True,
    resize: int | None = 256,
    crop: int | None = 224,
    squash: bool = False,
    interpolation: str = "bilinear",
    by_class: bool = False,
    samples: int | None = None,
    on_error: str = "raise",
    exif: bool = True,
    class_order: str | None = None,
    seed: int = 0,
) -> list[FileImages]:
    """The images of ``root/CLASS/*.jpg``, or of ``root/DOMAIN/CLASS/*.jpg`` for each of the domains named.

    Pictures of any size and every format that torchvision's ``ImageFolder`` reads. They are shuffled, always in the same
    way: files are listed class by class, which would ruin batch statistics. Warns if the pictures look cropped already
    and would be enlarged.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        domains: folders inside it, in order of arrival, each with the same class folders; default: one domain.
        labels: false: the classes of the images are unknown and their folders are ignored; nothing is scored.
        class_map: the output of the model for each class folder. Default: the first folder is output 0, and so on (see
            ``class_order``), and the model has as many outputs. ``"imagenet"``: folders are named by WordNet ids (n01440764), outputs are
            those of ImageNet-1k. A mapping, or a JSON file with one, from folder names to outputs; null for a class that
            the model does not know: its images arrive, but do not count in the errors.
        mask: with ``class_map``, use only the model's outputs for the folder's classes, as published for ImageNet-R.
            False: the model may predict any of its outputs, as in deployment.
        resize: pixels of the shorter side, null to keep the size.
        crop: side of the square in the middle, null for the whole picture.
        squash: resize both sides to ``resize``.
        interpolation: of the resizing, ``"bilinear"`` as ImageNet-C was made, ``"bicubic"`` ... as the weights expect.
        by_class: class by class instead of shuffled.
        samples: number of images of each domain, the first ones; default: all.
        on_error: a file that cannot be used raises an error on access that names it (``"raise"``), or is left out
            (``"skip"``): then all files are decoded once in advance, and the manifest lists the skipped ones. Such are broken
            pictures, those of too many pixels or more than 100 times as long as wide, links that lead nowhere, and pipes.
        exif: turn pictures upright as their EXIF orientation says, as viewers do and torchvision's ``ImageFolder`` does not.
        class_order: of class folders that are all numbers: ``"text"`` (1, 10, 2; as torchvision's ``ImageFolder``) or
            ``"number"`` (1, 2, 10). Default: as text, with a :class:`tta.datasets.files.ClassOrderWarning` if the two differ,
            which ``tta run`` takes for an error. Not asked with ``class_map``.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: no such folder, or no images in it.
        ValueError: domains of different classes, a class that ``class_map`` does not name, or a setting out of range.
    """
    folder = data_folder(root)
    geometry = Geometry(resize, crop, squash, interpolation)
    check_on_error(on_error)
    parts = [(folder.resolve().name, folder)] if domains is None else [(name, folder / name) for name in domains]
    names = subfolders(parts[0][1]) if labels else []
    if labels and not names:
        raise FileNotFoundError(
            f"'{parts[0][1]}' holds no class folders: expected CLASS/IMAGE. For a folder of images without "
            "classes, to be predicted but not scored, set labels=false."
        )
    numbers, classes = numbered(names, class_map, mask, class_order)
    made = []
    for name, place in parts:
        if not place.is_dir():
            raise FileNotFoundError(f"There is no folder '{place}'. '{folder}' holds {some(subfolders(folder))}.")
        files = list_images(place, names, numbers) if labels else list_flat(place)
        if labels and domains is None:
            _check_depth(place, files, names)
        files = (files if by_class else files.shuffled()).first(samples)
        one = FileImages(name, place, files, geometry, classes=classes, exif=exif)
        one = one.without_unreadable() if on_error == "skip" else one
        if labels and class_map is None:
            one.class_names = tuple(name for _, name in sorted(zip(numbers, names, strict=True)))
        made.append(one)
    made[0].warn_of_enlarging()
    return made


def _check_depth(place: Path, files: FileList, names: Sequence[str]) -> None:
    """Raise a ValueError if all images lie two folders deep: then the outer folders may be domains."""
    if all(file.count(b"/") > 1 for file in files.names.tolist()):
        raise ValueError(
            f"The images of '{place}' lie two folders deep. If the outer ones ({some(names)}) are domains, name those "
            f"you want: domains=[{', '.join(names[:2])}]."
        )


def corrupted(
    *,
    root: str | Path | None = None,
    severity: int = 5,
    corruptions: Sequence[str] = CORRUPTIONS,
    recipe: str = "imagenet",
    class_map: ClassMap = None,
    mask: bool = True,
    resize: int | None = 256,
    crop: int | None = 224,
    squash: bool = False,
    interpolation: str = "bilinear",
    by_class: bool = False,
    samples: int | None = None,
    on_error: str = "raise",
    exif: bool = True,
    class_order: str | None = None,
    seed: int = 0,
) -> list[CorruptedFiles]:
    """The images of ``root/CLASS/*.jpg``, once for each corruption, resized and cropped before they are corrupted.

    Like ImageNet-C (Hendrycks & Dietterich, ICLR 2019), with two differences: the draws are ours, and the published images
    were compressed once more, as JPEG of quality 85. ``tta corrupt`` writes such a copy to disk.

    Args:
        severity: 1 to 5.
        corruptions: names in order of arrival; validation corruptions are allowed.
        recipe: ``"imagenet"``, for images of about 224 pixels, or ``"cifar"``, for about 32.
        seed: of the draws.
        root, class_map, mask, resize, crop, squash, interpolation, by_class, samples, on_error, exif, class_order: as for
            ``imagefolder``.

    Raises:
        ValueError: as ``imagefolder``; an unknown corruption, severity or recipe.
    """
    (clean,) = domains(
        root=root,
        class_map=class_map,
        mask=mask,
        resize=resize,
        crop=crop,
        squash=squash,
        interpolation=interpolation,
        by_class=by_class,
        samples=samples,
        on_error=on_error,
        exif=exif,
        class_order=class_order,
    )
    clean.name = "clean"
    return [CorruptedFiles(name, clean, severity=severity, seed=seed, recipe=recipe) for name in corruptions]


def numbered(
    folders: Sequence[str], class_map: ClassMap, mask: bool, class_order: str | None = None
) -> tuple[list[int], Classes | None]:
    """The label of each class folder, and the classes of these labels; see :func:`domains`.

    Raises:
        ValueError: a folder that the map does not name, an invalid map, or a map and an order of the classes.
    """
    if class_map is None:
        return class_numbers(folders, class_order), Classes(len(folders)) if folders else None
    if class_order is not None:
        raise ValueError(
            f"class_map names the output of each folder: leave out class_order={class_order!r}, or class_map."
        )
    known = _read_map(class_map)
    if absent := [name for name in folders if name not in known]:
        raise ValueError(
            f"class_map does not name {len(absent)} of the {len(folders)} class folders: {some(absent)}. Give each the number "
            "of an output of the model, or null for a class it does not know."
        )
    outputs = [known[name] for name in folders]
    of = len(WNIDS) if class_map == "imagenet" else None
    used = sorted({output for output in outputs if output is not None})
    if not mask or used == list(range(of or 0)):
        return [UNKNOWN if output is None else output for output in outputs], Classes(of) if of else None
    place = {output: number for number, output in enumerate(used)}
    labels = [UNKNOWN if output is None else place[output] for output in outputs]
    return labels, Classes(len(used), tuple(used), of)


def _read_map(class_map: str | Path | Mapping[str, int | None]) -> Mapping[str, int | None]:
    if class_map == "imagenet":
        return {wnid: number for number, wnid in enumerate(WNIDS)}
    try:
        read = class_map if isinstance(class_map, Mapping) else json.loads(Path(class_map).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"There is no class_map '{class_map}'. It is 'imagenet', a mapping or a JSON file."
        ) from None
    except ValueError as error:
        raise ValueError(f"class_map '{class_map}' is no JSON file: {error}.") from None
    if not isinstance(read, Mapping) or not all(v is None or (isinstance(v, int) and v >= 0) for v in read.values()):
        raise ValueError(
            f"class_map is 'imagenet', or maps folder names to outputs of the model (0, 1, ...) or null; got {class_map!r}."
        )
    return {str(name): output for name, output in read.items()}
