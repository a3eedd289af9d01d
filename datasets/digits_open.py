"""``digits-open``: ``digits-c`` for a model that knows the digits 0 to 7 only; 8 and 9 arrive as unknown classes."""

from collections.abc import Sequence

import torch
from torch.utils.data import TensorDataset

from tta.datasets import digits, digits_c
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Classes, CorruptedImages
from tta.labels import UNKNOWN

KNOWN = 8  # classes of digits-cnn-8
CLASSES_OF = {"digits-open": Classes(KNOWN)}


def source_images() -> TensorDataset:
    """The clean digits 0 to 7 on which ``digits-cnn-8`` was trained, with labels: n of (3, 32, 32), uint8."""
    images, labels, _ = digits.split("train")
    return TensorDataset(images[labels < KNOWN], labels[labels < KNOWN])


def domains(
    *, severity: float = 5, corruptions: Sequence[str] = CORRUPTIONS, samples: int | None = None, seed: int = 0
) -> list[CorruptedImages]:
    """The held-out digits, once for each corruption; about a fifth of them are an 8 or a 9, with the label -1.

    STAMP (ECCV 2024) and OWTTT (ICCV 2023) mix in other data sets; here the unknown classes are of the same data set, so
    that unknown images look like known ones and are corrupted in the same way.

    Args:
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        corruptions: names in order of arrival; validation corruptions are allowed.
        samples: number of images of each domain, the first ones; default: all 800.
        seed: of the corruptions' draws.

    Raises:
        ValueError: an unknown corruption or severity, or more samples than there are.
    """
    found = digits_c.domains(severity=severity, corruptions=corruptions, samples=samples, seed=seed)
    for domain in found:
        domain.labels = torch.where(domain.labels < KNOWN, domain.labels, UNKNOWN)
        domain.classes = Classes(KNOWN)
    return found
