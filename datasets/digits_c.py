"""``digits-c``: scikit-learn's digits under the CIFAR corruptions. Embedded: nothing is downloaded."""

from collections.abc import Sequence

from torch.utils.data import TensorDataset

from tta.datasets import digits
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import CorruptedImages


def source_images() -> TensorDataset:
    """The clean digits on which the embedded source models were trained, with labels: 997 of (3, 32, 32), uint8."""
    return TensorDataset(*digits.split("train")[:2])


def domains(
    *, severity: float = 5, corruptions: Sequence[str] = CORRUPTIONS, samples: int | None = None, seed: int = 0
) -> list[CorruptedImages]:
    """The held-out digits, once for each corruption, in the canonical order.

    Args:
        severity: 0 to 5, see :func:`tta.datasets.corrupt`.
        corruptions: names in order of arrival; validation corruptions are allowed.
        samples: number of images of each domain, the first ones; default: all 800.
        seed: of the corruptions' draws.

    Raises:
        ValueError: an unknown corruption or severity, or more samples than there are.
    """
    images, labels, index = digits.split("test")
    if samples is not None and not 1 <= samples <= len(images):
        raise ValueError(f"samples is between 1 and {len(images)}; got {samples}.")
    first = slice(samples)
    clean = images[first], labels[first], index[first]
    return [
        CorruptedImages(n, *clean, severity=severity, seed=seed, origin="scikit-learn's digits") for n in corruptions
    ]
