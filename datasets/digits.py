"""scikit-learn's handwritten digits as small RGB images, split once and for all."""

from functools import cache

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn import functional as F

TRAINING_IMAGES = 997  # of 1797; the other 800 are held out


@cache
def split(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """The digits for training the source models, or the held-out ones that streams are made of.

    Alpaydin & Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998.

    Args:
        name: ``"train"`` (997 images) or ``"test"`` (800 images); the two share none.

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
