"""``domainnet-126``, ``pacs``, ``officehome``: data sets of domain generalisation, ``DOMAIN/CLASS/IMAGE``."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import ConcatDataset, Dataset

from tta.datasets.domains import Classes
from tta.datasets.files import (
    FileImages,
    FileList,
    FilesDataset,
    check_exist,
    class_numbers,
    find_folder,
    list_images,
    read_list,
    some,
    subfolders,
)
from tta.datasets.geometry import Geometry


class _Published(NamedTuple):
    """One of the three: names of its folder, its source, its domains with their possible folders, number of classes."""

    folders: tuple[str, ...]
    how: str
    domains: Mapping[str, tuple[str, ...]]
    classes: int


DOMAINNET_126 = _Published(
    ("DomainNet-126", "domainnet-126", "domainnet126", "DomainNet"),
    "https://ai.bu.edu/M3SDA (the cleaned version)",
    {name: (name,) for name in ("clipart", "painting", "real", "sketch")},
    126,
)
PACS = _Published(
    ("PACS", "PACS/kfold", "pacs", "kfold"),
    "https://dali-dl.github.io/project_iccv2017.html",
    {name: (name,) for name in ("art_painting", "cartoon", "photo", "sketch")},
    7,
)
OFFICEHOME = _Published(
    ("OfficeHome", "OfficeHomeDataset_10072016", "office_home", "office-home"),
    "https://www.hemanthdv.org/officeHomeDataset.html",
    {
        "art": ("Art", "art"),
        "clipart": ("Clipart", "clipart"),
        "product": ("Product", "product"),
        "real_world": ("Real World", "Real_World", "RealWorld", "real_world"),
    },
    65,
)


def domainnet_126(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] = tuple(DOMAINNET_126.domains),
    lists: str | Path | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    squash: bool = True,
    class_order: str | None = None,
    seed: int = 0,
) -> list[FileImages]:
    """DomainNet-126: the four cleanest domains and 126 classes of DomainNet.

    Peng et al., "Moment Matching for Multi-Source Domain Adaptation", ICCV 2019; the subset of Saito et al., ICCV 2019,
    used for test-time adaptation since Chen et al., CVPR 2022 (AdaContrast). ``root`` is, or holds as ``DomainNet-126/``,
    the folders ``clipart/aircraft_carrier/*.jpg``.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        domains: names in order of arrival; leave out the one on which the model was trained.
        lists: folder of the published lists ``clipart_list.txt`` ..., lines ``clipart/aircraft_carrier/NAME.jpg 0``; they
            select 126 of all 345 classes and number them. Default: lists beside the images, else all images of the
            folder, which must then have the 126 class folders.
        samples: number of images of each domain, the first ones; default: all.
        by_class: class by class as listed, instead of shuffled, always in the same way.
        resize: pixels of both sides, as published; of the shorter side with ``squash=False``.
        crop: side of the square in the middle.
        squash: see ``resize``.
        class_order: ``"text"`` or ``"number"``, for class folders that you named by numbers, as for ``imagefolder``.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: the data or a part of it is missing; the message says which, and how to get it.
        ValueError: an unknown domain, another number of classes than published, a bad list, or a setting out of range.
    """
    geometry = Geometry(resize, crop, squash)
    return _domains(DOMAINNET_126, root, domains, lists, samples, by_class, geometry, class_order)


def pacs(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] = tuple(PACS.domains),
    held_out: str | None = None,
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 224,
    crop: int | None = None,
    squash: bool = True,
    class_order: str | None = None,
    seed: int = 0,
) -> list[FileImages]:
    """PACS: photos, art paintings, cartoons and sketches of seven classes.

    Li et al., "Deeper, Broader and Artier Domain Generalization", ICCV 2017. ``root`` is, or holds as ``PACS/`` (or
    ``PACS/kfold/``), the folders ``art_painting/dog/*.jpg``. Classes are numbered in alphabetical order. Settings and errors
    as for ``domainnet-126``: see :func:`domainnet_126`. ``held_out="sketch"`` leaves one domain out: the stream is that domain
    alone, and the others are what ``tta train`` with the same setting trains on.
    """
    if held_out is not None:
        domains = [held_out]
    return _domains(PACS, root, domains, None, samples, by_class, Geometry(resize, crop, squash), class_order)


def training_images(name: str, *, held_out: str | None = None, **settings: Any) -> Dataset[Any]:
    """Images and labels of the domains of ``pacs`` that are not held out.

    Args:
        name: of the stream.
        held_out: the domain that the stream is then run on.
        settings: of the stream.

    Raises:
        ValueError: another stream, or no domain is held out.
    """
    if name != "pacs" or held_out not in PACS.domains:
        raise ValueError(
            f"Name the domain of pacs that is left out of the training, stream.held_out= one of {', '.join(PACS.domains)}; got "
            f"{held_out!r} of '{name}'."
        )
    others = [domain for domain in PACS.domains if domain != held_out]
    return ConcatDataset([FilesDataset(domain) for domain in pacs(domains=others, **settings)])


def officehome(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] = tuple(OFFICEHOME.domains),
    samples: int | None = None,
    by_class: bool = False,
    resize: int | None = 256,
    crop: int | None = 224,
    squash: bool = True,
    class_order: str | None = None,
    seed: int = 0,
) -> list[FileImages]:
    """Office-Home: objects of 65 classes in art, clip art, product pictures and photographs.

    Venkateswara et al., "Deep Hashing Network for Unsupervised Domain Adaptation", CVPR 2017. ``root`` is, or holds as
    ``OfficeHome/`` (or ``OfficeHomeDataset_10072016/``), the folders ``Art/Alarm_Clock/*.jpg`` and ``Real World/...``.
    Classes are numbered in the order of their folders' names. Settings and errors as for ``domainnet-126``: see
    :func:`domainnet_126`.
    """
    return _domains(OFFICEHOME, root, domains, None, samples, by_class, Geometry(resize, crop, squash), class_order)


def _domains(
    kind: _Published,
    root: str | Path | None,
    domains: Sequence[str],
    lists: str | Path | None,
    samples: int | None,
    by_class: bool,
    geometry: Geometry,
    class_order: str | None,
) -> list[FileImages]:
    known = list(kind.domains)
    if isinstance(domains, str) or not domains or not set(domains) <= set(known):
        raise ValueError(f"domains is a list of one or more of {', '.join(known)}; got {domains!r}.")
    folder = find_folder(
        root,
        kind.folders,
        lambda place: any(_folder(place, kind, name) for name in known),
        f"Looked for {next(iter(kind.domains.values()))[0]}/CLASS/IMAGE, from {kind.how}.",
    )
    beside = folder if lists is None else Path(lists)
    made = []
    names: list[str] = []
    numbers: list[int] = []
    for name in domains:
        home = _folder(folder, kind, name)
        if home is None:
            raise FileNotFoundError(
                f"'{folder}' has no domain '{name}': it holds {some(subfolders(folder))}. Get it from {kind.how}."
            )
        if kind is DOMAINNET_126 and (lists is not None or (beside / f"{name}_list.txt").is_file()):
            home, files = folder, _listed(beside / f"{name}_list.txt", folder, kind)
        else:
            if not names:
                names = _class_names(home, kind)
                numbers = class_numbers(names, class_order)
            files = list_images(home, names, numbers)
        files = (files if by_class else files.shuffled()).first(samples)
        made.append(FileImages(name, home, files, geometry, classes=Classes(kind.classes)))
    return made


def _folder(root: Path, kind: _Published, name: str) -> Path | None:
    return next((root / folder for folder in kind.domains[name] if (root / folder).is_dir()), None)


def _class_names(folder: Path, kind: _Published) -> list[str]:
    names = subfolders(folder)
    if len(names) != kind.classes:
        lists = "; of the full DomainNet name the published lists with lists=PATH" if kind is DOMAINNET_126 else ""
        raise ValueError(f"'{folder}' has {len(names)} class folders; expected {kind.classes}{lists}.")
    return names


def _listed(file: Path, folder: Path, kind: _Published) -> FileList:
    files = read_list(file, lambda line: _number(line, kind.classes))
    check_exist(folder, files)
    return files


def _number(line: str, classes: int) -> int:
    _, number = line.split()
    if not 0 <= int(number) < classes:
        raise ValueError(f"expected a path and a number from 0 to {classes - 1}")
    return int(number)
