"""scikit-learn's handwritten digits as small RGB images, in a fixed split."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

TRAINING_IMAGES = 997  # of 1797; the other 800 are held out


@cache
def split(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The digits on which the source models were trained, or the held-out ones of the streams.

    Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

    Args:
        name: ``"train"`` (997 images) or ``"test"`` (800 images), without common images.

    Returns:
        images uint8 (n, 3, 32, 32), labels int64 (n,), and index int64 (n,), each image's row in scikit-learn's data.

    Raises:
        ValueError: another name.
    """
    if name not in ("train", "test"):
        raise ValueError(f"split is 'train' or 'test'; got {name!r}.")
    data = load_digits()
    order = np.random.RandomState(0).permutation(len(data.images))
    rows = np.sort(order[:TRAINING_IMAGES] if name == "train" else order[TRAINING_IMAGES:])
    grey = torch.from_numpy(data.images[rows]).float() / 16
    large = F.interpolate(grey[:, None], size=(32, 32), mode="bilinear", align_corners=False)
    images = (large * 255).round().to(torch.uint8).expand(-1, 3, -1, -1).contiguous()
    return images, torch.from_numpy(data.target[rows]).long(), torch.from_numpy(rows).long()
