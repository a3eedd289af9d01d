"""``cifar10.1``: new test images of CIFAR-10's classes, in the published files."""

from pathlib import Path

import numpy as np
import torch

from tta.datasets.cifar_c import read_array
from tta.datasets.domains import Classes, CleanImages, Renamed
from tta.datasets.files import find_folder

# images per class
COUNTS = {"v4": (208, 212, 202, 212, 204, 218, 192, 210, 161, 202), "v6": (200,) * 10}


def domains(
    *, root: str | Path | None = None, version: str = "v6", samples: int | None = None, seed: int = 0
) -> list[Renamed]:
    """CIFAR-10.1 in stored order, one domain.

    Recht et al., "Do CIFAR-10 Classifiers Generalize to CIFAR-10?", 2018. ``root`` is, or holds as ``CIFAR-10.1/``, the
    folder of ``cifar10.1_v6_data.npy``, uint8 (2000, 32, 32, 3), and ``cifar10.1_v6_labels.npy``; v4 has 2021 images.

    Args:
        root: the folder; default: the environment variable ``TTA_DATA``, else ``data``, else the cache of ``tta download``.
        version: ``"v6"``, balanced and recommended by its authors, or ``"v4"``, which some papers use.
        samples: number of images, the first ones; default: all.
        seed: not used; nothing is drawn.

    Raises:
        FileNotFoundError: no such files; the message says how to get them.
        ValueError: a file with another shape or other class counts than published, or a setting out of range.
    """
    if version not in COUNTS:
        raise ValueError(f"version is 'v4' or 'v6'; got {version!r}.")
    counts = COUNTS[version]
    if samples is not None and not 1 <= samples <= sum(counts):
        raise ValueError(f"samples is between 1 and {sum(counts)}; got {samples}.")
    names = [f"cifar10.1_{version}_{part}.npy" for part in ("data", "labels")]
    folder = find_folder(
        root,
        ("CIFAR-10.1", "CIFAR-10.1/datasets"),
        lambda place: all((place / name).is_file() for name in names),
        f"Looked for {' and '.join(names)}, of https://github.com/modestyachts/CIFAR-10.1 (`tta download cifar10.1`).",
    )
    images = read_array(folder / names[0], (sum(counts), 32, 32, 3))
    labels = read_array(folder / names[1], (sum(counts),)).astype(np.int64)
    found = np.bincount(labels, minlength=10).tolist()
    if found != list(counts):
        raise ValueError(
            f"'{folder / names[1]}' counts {', '.join(map(str, found))} images of each class; expected "
            f"{', '.join(map(str, counts))}."
        )
    pixels = torch.from_numpy(np.array(images[:samples])).permute(0, 3, 1, 2).contiguous()
    known = torch.from_numpy(labels[:samples])
    origin = f"CIFAR-10.1 {version} in {folder}"
    domain = CleanImages(pixels, known, torch.arange(len(known)), origin=origin, classes=Classes(10))
    return [Renamed(domain, f"cifar10.1-{version}")]
