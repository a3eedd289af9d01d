"""The embedded digits: training and held-out images share none."""

import pytest
import torch

from tta.datasets import digits


def test_held_out_images_are_disjoint_from_training():
    train, test = digits.split("train"), digits.split("test")
    assert len(train[0]) == 997
    assert len(test[0]) == 800
    assert not set(train[2].tolist()) & set(test[2].tolist())
    assert not {image.numpy().tobytes() for image in train[0]} & {image.numpy().tobytes() for image in test[0]}


def test_every_class_is_in_both_splits():
    for name in ("train", "test"):
        images, labels, _ = digits.split(name)
        assert labels.bincount(minlength=10).min() > 60
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 32, 32)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="split is 'train' or 'test'; got 'val'"):
        digits.split("val")
