"""Batches of others: what a loader gives becomes images and labels."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tta.labels import UNKNOWN

# Names under which data sets of Hugging Face and models that are called by keyword have their images and labels.
IMAGES = ("pixel_values", "images", "image", "img", "inputs", "input", "x")
LABELS = ("labels", "label")
EXPECTED = f"images alone, a pair (images, labels), or a mapping with {IMAGES[0]} and {LABELS[0]}"


def images_and_labels(batch: Any) -> tuple[Tensor, Tensor]:
    """The images and labels of a batch; an unknown label for each image where it has none.

    Args:
        batch: images (batch, channels, height, width), a sequence that begins with images and labels, or a mapping of
            Hugging Face: ``pixel_values``, ``images``, ``image`` or ``img``, and ``labels`` or ``label``.

    Returns:
        The images as they are, and labels (batch,), int64. Labels (batch, 1) are squeezed. Masks (batch, height, width) stay.

    Raises:
        TypeError: none of these.
        ValueError: labels of another shape or dtype; the message names them.
    """
    name, images, labels = "labels", batch, None
    if isinstance(batch, Mapping):
        key = next((key for key in IMAGES if key in batch), None)
        if key is None:
            raise TypeError(
                f"A batch is a {type(batch).__name__} with {', '.join(map(repr, batch)) or 'nothing'}; expected images "
                f"under one of {', '.join(map(repr, IMAGES))}. Rename the key of the images in the data set."
            )
        name = next((key for key in LABELS if key in batch), name)
        images, labels = batch[key], batch.get(name)
    elif isinstance(batch, Sequence) and len(batch):
        images, labels = batch[0], batch[1] if len(batch) > 1 else None
    if not isinstance(images, Tensor):
        raise TypeError(
            f"A batch is a {type(batch).__name__}, its images a {type(images).__name__}; expected {EXPECTED}."
        )
    return images, torch.full((len(images),), UNKNOWN) if labels is None else _classes(labels, name, len(images))


def _classes(labels: Any, name: str, count: int) -> Tensor:
    """Labels as int64 of shape (count,)."""
    try:
        values = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"'{name}' are a {type(labels).__name__}; expected integers of shape ({count},).") from None
    if values.dim() == 2 and values.shape[1] == 1:
        values = values[:, 0]
    masks = values.dim() == 3 and len(values) == count  # of segmentation
    if (values.shape != (count,) and not masks) or values.is_floating_point() or values.is_complex():
        raise ValueError(
            f"'{name}' have shape {tuple(values.shape)} and dtype {values.dtype}; expected one class for each of "
            f"{count} images, integers of shape ({count},)."
        )
    return values.long()
