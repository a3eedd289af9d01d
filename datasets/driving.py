"""``camvid``, ``cityscapes``, ``acdc``, ``carla-tta``, ``shift``: pictures from cars, with a class for every pixel."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from tta.datasets.domains import Domain, Renamed
from tta.datasets.files import find_folder, some, subfolders
from tta.datasets.masks import CorruptedMasks, MaskFiles, Reading, Size, Sized, corrupted, names, paired

TASK = "segmentation"
CITYSCAPES = 19  # classes, by their train ids
# Of Cityscapes' files *_labelIds.png, where there are none of train ids.
LABEL_IDS = dict(
    zip((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33), range(CITYSCAPES), strict=True)
)
CAMVID_VOID = 11
# CARLA's numbers in the order of the 14 classes of Marsden et al., CarlaTTA: road, sidewalk, building, wall, fence, pole,
# traffic light, traffic sign, vegetation, terrain, sky, person, vehicle, road line.
CARLA = dict(zip((7, 8, 1, 11, 2, 5, 18, 12, 9, 22, 13, 4, 10, 6), range(14), strict=True))
# In the order of the 14 classes of SHIFT: building, fence, pedestrian, pole, road line, road, sidewalk, vegetation, vehicle,
# wall, traffic sign, sky, traffic light, terrain.
SHIFT = dict(zip((1, 2, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 18, 22), range(14), strict=True))
OF_CITYSCAPES = names(
    "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, rider, car, "
    "truck, bus, train, motorcycle, bicycle"
)
CLASS_NAMES = {
    "camvid": names("sky, building, pole, road, pavement, tree, sign, fence, car, pedestrian, bicyclist"),
    "cityscapes": OF_CITYSCAPES,
    "acdc": OF_CITYSCAPES,
    "carla-tta": names(
        "road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky, person, vehicle, "
        "road line"
    ),
    "shift": names(
        "building, fence, pedestrian, pole, road line, road, sidewalk, vegetation, vehicle, wall, traffic sign, sky, traffic "
        "light, terrain"
    ),
}
ACDC = ("fog", "night", "rain", "snow")
CARLA_TTA = (
    "day_night_1200",
    "clear_fog_1200",
    "clear_rain_1200",
    "dynamic_1200",
    "dynamic_4800",
    "town04_dynamic_1200",
)


def camvid(
    *,
    root: str | Path | None = None,
    split: str = "test",
    corruptions: Sequence[str] | None = None,
    severity: int = 3,
    period: int | None = None,
    sequences: bool = False,
    size: Size = None,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[Domain]:
    """CamVid: frames of drives through Cambridge, 11 classes; void is 11 in the files.

    Brostow et al., "Semantic Object Classes in Video: A High-Definition Ground Truth Database", Pattern Recognition Letters
    2009, in the layout of SegNet's authors: ``root`` is, or holds as ``CamVid/`` or ``camvid/``, the folders ``test/`` and
    ``testannot/`` with files of the same names. Frames arrive in file order: batches hold neighbours. Research use only.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        split: ``train``, ``val`` or ``test``.
        corruptions: names in order of arrival, made as the images are needed; null: the clean frames.
        severity: 1 to 5.
        period: frames in which a corruption comes and goes again, up to the severity and back to clean frames; null: it stays.
        sequences: each drive is a domain (``0001TP``, with corruptions ``0001TP fog``), so that ``protocol=per-domain`` resets
            at the cuts between them.
        size: rows and columns of images and masks, or the shorter side; null: as stored.
        samples: number of images, the first ones, with ``sequences`` of each; default: all.
        seed: of the corruptions' draws.

    Raises:
        FileNotFoundError: the data is missing, or a mask.
        ValueError: an unknown corruption, or a setting out of range.
    """
    home = find_folder(
        root,
        ("CamVid", "camvid"),
        lambda place: (place / split).is_dir() and (place / f"{split}annot").is_dir(),
        f"Looked for {split}/NAME.png and {split}annot/NAME.png, as SegNet's authors give CamVid.",
    )
    images = [file for file in (home / split).iterdir() if file.suffix.lower() in (".png", ".jpg", ".jpeg")]
    pairs = paired(home, images, lambda name: f"{split}annot/{Path(name).stem}.png")
    reading = Reading(11, void=(CAMVID_VOID, 255), resized=True)
    how: dict[str, Any] = {"severity": severity, "seed": seed, "period": period}
    if not sequences:
        return corrupted(MaskFiles("clean", home, pairs, Sized(size), reading).first(samples), corruptions, **how)
    made: list[Domain] = []
    for drive, frames in groupby(pairs, lambda pair: Path(pair[0]).stem.rpartition("_")[0]):
        domains = corrupted(
            MaskFiles(drive, home, list(frames), Sized(size), reading).first(samples), corruptions, **how
        )
        made += domains if corruptions is None else [Renamed(domain, f"{drive} {domain.name}") for domain in domains]
    return made


def cityscapes(
    *,
    root: str | Path | None = None,
    split: str = "val",
    corruptions: Sequence[str] | None = None,
    severity: int = 3,
    size: Size = None,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles | CorruptedMasks]:
    """Cityscapes, 19 classes, and with ``corruptions`` Cityscapes-C.

    Cordts et al., "The Cityscapes Dataset for Semantic Urban Scene Understanding", CVPR 2016; Kamann and Rother, "Benchmarking
    the Robustness of Semantic Segmentation Models", CVPR 2020. ``root`` is, or holds as ``cityscapes/``, the folders
    ``leftImg8bit/val/CITY/*_leftImg8bit.png`` and ``gtFine/val/CITY/*_gtFine_labelTrainIds.png``, or ``..._labelIds.png``,
    whose numbers are then mapped. Masks are not resized: predictions are.

    Settings and errors as for :func:`camvid`.
    """
    home = find_folder(
        root,
        ("cityscapes", "Cityscapes"),
        lambda place: (place / "leftImg8bit" / split).is_dir() and (place / "gtFine" / split).is_dir(),
        f"Looked for leftImg8bit/{split}/CITY and gtFine/{split}/CITY, from https://www.cityscapes-dataset.com.",
    )
    images = list((home / "leftImg8bit" / split).glob("*/*_leftImg8bit.png"))
    masks = (home / "gtFine" / split).glob("*/*_gtFine_labelTrainIds.png")
    kind = "labelTrainIds" if any(True for _ in masks) else "labelIds"

    def mask_of(name: str) -> str:
        return name.replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit.png", f"_gtFine_{kind}.png")

    reading = Reading(CITYSCAPES, LABEL_IDS if kind == "labelIds" else None)
    clean = MaskFiles("clean", home, paired(home, images, mask_of), Sized(size), reading).first(samples)
    return corrupted(clean, corruptions, severity=severity, seed=seed)


def acdc(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] = ACDC,
    split: str = "train",
    size: Size = (540, 960),
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles]:
    """ACDC: fog, night, rain and snow, 400 pictures each in ``train``, the 19 classes of Cityscapes.

    Sakaridis et al., "ACDC: The Adverse Conditions Dataset with Correspondences for Semantic Driving Scene Understanding",
    ICCV 2021. The published stream (Wang et al., CVPR 2022, CoTTA) is ``protocol=recurring``, ten rounds, ``batch_size=1``.
    ``root`` is, or holds as ``ACDC/``, the folders ``rgb_anon/fog/train/SEQUENCE/*_rgb_anon.png`` and
    ``gt/fog/train/SEQUENCE/*_gt_labelTrainIds.png``.

    Args:
        root: as of ``camvid``.
        domains: conditions in order of arrival.
        split: ``train``, as published, or ``val``.
        size: rows and columns of the images, half of the stored ones as published. Predictions return to the masks' 1080 x 1920.
        samples: number of images of each condition, the first ones; default: all.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: the data or a part of it is missing.
        ValueError: an unknown condition, or a setting out of range.
    """
    _check(domains, ACDC)
    home = find_folder(
        root,
        ("ACDC", "acdc"),
        lambda place: (place / "rgb_anon").is_dir() and (place / "gt").is_dir(),
        "Looked for rgb_anon/CONDITION and gt/CONDITION, from https://acdc.vision.ee.ethz.ch.",
    )

    def mask_of(name: str) -> str:
        return name.replace("rgb_anon/", "gt/", 1).replace("_rgb_anon.png", "_gt_labelTrainIds.png")

    made = []
    for name in domains:
        images = (home / "rgb_anon" / name / split).glob("*/*_rgb_anon.png")
        made.append(
            MaskFiles(name, home, paired(home, images, mask_of), Sized(size), Reading(CITYSCAPES)).first(samples)
        )
    return made


def carla_tta(
    *,
    root: str | Path | None = None,
    domains: Sequence[str] = CARLA_TTA[:1],
    lists: str | Path | None = None,
    size: Size = 1024,
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles]:
    """CarlaTTA: simulated drives through changing weather and daytime, 14 classes, frame by frame.

    Marsden et al., "Introducing Intermediate Domains for Effective Self-Training during Test-Time", IJCNN 2024. ``root`` is, or holds
    as ``CarlaTTA/``, the folders ``dynamic_1200/.../camera/*.png`` with masks beside them in ``segmentation/``; the red channel
    holds CARLA's numbers. The published number is ``miou_stream`` of one sequence, in batches of one.

    Args:
        root: as of ``camvid``.
        domains: sequences in order of arrival; each is a domain.
        lists: folder of the published lists ``dynamic_1200.txt`` ...; default: all frames of a sequence's folder, sorted.
        size: pixels of the shorter side of images and masks, as published.
        samples: number of frames of each sequence, the first ones; default: all.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: the data or a part of it is missing.
        ValueError: an unknown sequence, or a setting out of range.
    """
    _check(domains, CARLA_TTA)
    home = find_folder(
        root,
        ("CarlaTTA", "carla-tta"),
        lambda place: any((place / name).is_dir() for name in domains),
        f"Looked for {domains[0]}/.../camera/*.png, from https://github.com/mariodoebler/test-time-adaptation.",
    )
    made = []
    for name in domains:
        if lists is None:
            images = list((home / name).rglob("camera/*.png"))
        else:
            images = [home / line for line in (Path(lists) / f"{name}.txt").read_text().split()]
        names = sorted(paired(home, images, lambda path: path.replace("camera/", "segmentation/")))
        made.append(MaskFiles(name, home, names, Sized(size), Reading(14, CARLA, resized=True)).first(samples))
    return made


def shift(
    *,
    root: str | Path | None = None,
    split: str = "val",
    domains: Sequence[str] | None = None,
    size: Size = (500, 800),
    samples: int | None = None,
    seed: int = 0,
) -> Sequence[MaskFiles]:
    """SHIFT: simulated sequences whose weather and daytime change, 14 classes; each sequence is a domain.

    Sun et al., "SHIFT: A Synthetic Driving Dataset for Continuous Multi-Task Domain Adaptation", CVPR 2022. The ICCV 2023
    challenge resets before each sequence: ``protocol=per-domain``; it reports ``miou_class``. ``root`` is, or holds as ``shift/``, the
    folders ``continuous/videos/1x/val/front/img/SEQUENCE/*_img_front.jpg`` and ``.../semseg/SEQUENCE/*_semseg_front.png``.

    Args:
        root: as of ``camvid``.
        split: ``val``, ``test`` or ``train``.
        domains: names of sequences in order of arrival; default: all, sorted.
        size: rows and columns of the images, as in the challenge. Predictions return to the masks' 800 x 1280.
        samples: number of frames of each sequence, the first ones; default: all.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: the data or a part of it is missing.
        ValueError: an unknown sequence, or a setting out of range.
    """
    inside = f"continuous/videos/1x/{split}/front"
    home = find_folder(
        root,
        ("shift", "SHIFT"),
        lambda place: (place / inside / "img").is_dir() and (place / inside / "semseg").is_dir(),
        f"Looked for {inside}/img and {inside}/semseg, unpacked, from https://www.vis.xyz/shift.",
    )
    known = subfolders(home / inside / "img")
    if domains is not None:
        _check(domains, known)

    def mask_of(name: str) -> str:
        return name.replace("/img/", "/semseg/", 1).replace("_img_front.jpg", "_semseg_front.png")

    made = []
    for name in known if domains is None else domains:
        images = (home / inside / "img" / name).glob("*_img_front.jpg")
        made.append(
            MaskFiles(name, home, paired(home, images, mask_of), Sized(size), Reading(14, SHIFT)).first(samples)
        )
    return made


def _check(domains: Sequence[str], known: Sequence[str]) -> None:
    if isinstance(domains, str) or not domains or not set(domains) <= set(known):
        raise ValueError(f"domains is a list of one or more of {some(list(known))}; got {domains!r}.")
