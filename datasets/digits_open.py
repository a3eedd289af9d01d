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
    """The clean digits 0 to 7 that ``digits-cnn-8`` was trained on, with labels: n of (3, 32, 32), uint8."""
    images, labels, _ = digits.split("train")
    return TensorDataset(images[labels < KNOWN], labels[labels < KNOWN])


def domains(
    *, severity: float = 5, corruptions: Sequence[str] = CORRUPTIONS, samples: int | None = None, seed: int = 0
) -> list[CorruptedImages]:
    """The held-out digits, once for each corruption; about a fifth of them are an 8 or a 9, whose label is -1.

    What STAMP (ECCV 2024) and OWTTT (ICCV 2023) do with other data sets mixed in, with classes of the same one: unknown
    images look like known ones, and are corrupted alike.

    Args:
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        corruptions: which, and in which order; those to tune on too.
        samples: only the first so many images of each domain; all 800 if left out.
        seed: of the corruptions' draws.

    Raises:
        ValueError: an unknown corruption or severity, or more samples than there are.
    """
    found = digits_c.domains(severity=severity, corruptions=corruptions, samples=samples, seed=seed)
    for domain in found:
        domain.labels = torch.where(domain.labels < KNOWN, domain.labels, UNKNOWN)
        domain.classes = Classes(KNOWN)
    return found
