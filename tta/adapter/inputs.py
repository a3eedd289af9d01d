"""Checks of a batch of images, each with a sentence of its own."""

import re

import torch
from torch import Tensor

IMAGES = "a floating-point batch of images (batch, channels, height, width) with values in [0, 1]"
# Of a convolution, and of a normalisation of the input: (the model's, the batch's) and (the batch's, the model's) channels.
CHANNELS = re.compile(r"to have (\d+) channels, but got (\d+) channels")
OF_INPUT = re.compile(r"tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension 1")


def check(
    x: Tensor, device: torch.device, dtype: torch.dtype | None, *, empty: bool = False, views: bool = False
) -> None:
    """Refuse what is not a batch of images on the adapter's device and in the model's precision.

    Args:
        x: the batch as a user gave it.
        device: that of the adapter.
        dtype: of the model's parameters; None for a model without any.
        empty: whether there may be no image, as at one of several workers.
        views: whether a batch may bring views of its images, (batch, views, channels, height, width).

    Raises:
        ValueError: says what was given, what was expected and what to do.
    """
    if views and isinstance(x, Tensor) and x.dim() == 5 and x.shape[1]:
        check(x.flatten(0, 1), device, dtype, empty=empty)
    elif problem := _problem(x, device, dtype, empty):
        raise ValueError(f"Expected {IMAGES}; got {problem}")


def good(
    x: Tensor, device: torch.device, dtype: torch.dtype | None, *, empty: bool = False, views: bool = False
) -> Tensor:
    """A mask of the finite images, (batch,) boolean; raises as :func:`check` does."""
    check(x, device, dtype, empty=empty, views=views)
    return x.isfinite().flatten(1).all(1)


def _problem(x: Tensor, device: torch.device, dtype: torch.dtype | None, empty: bool) -> str:
    if not isinstance(x, Tensor):
        return f"{type(x).__name__}. Pass a torch.Tensor."
    given = f"{x.dtype} of shape {tuple(x.shape)}"
    if x.dim() == 3:
        return f"{given}. For a single image pass x[None]."
    if x.dim() != 4:
        return f"{given}."
    if len(x) == 0 and not empty:
        return f"{given}: an empty batch."
    if x.numel() == 0 and len(x):
        return f"{given}: images without pixels."
    if x.shape[1] > 4 and x.shape[3] in (1, 3, 4):
        return f"{given}, which looks like (batch, height, width, channels). Pass x.permute(0, 3, 1, 2)."
    if not x.is_floating_point():
        return f"{given}. For uint8 images pass x.float() / 255."
    if x.device != device:
        return f"{given} on {x.device}, where the adapter is on {device}. Pass x.to('{device}') or move the adapter."
    if dtype is not None and x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
        return f"{given}, where the model's parameters are {dtype}. Pass x.to({dtype})."
    return ""


def explained(error: Exception, x: Tensor, method: str) -> Exception:
    """The error of a forward as a sentence about the batch, if it comes from the batch; else the error itself."""
    text = str(error)
    if "more than 1 value per channel" in text:
        return ValueError(
            f"A batch of {len(x)} gives a BatchNorm layer a single value per channel, which has no variance, so "
            f"'{method}' cannot normalise by it. Use larger batches, or a method that keeps source statistics (norm "
            "with alpha below 1)."
        )
    expected = found[1] if (found := CHANNELS.search(text)) else None
    if (found := OF_INPUT.search(text)) and int(found[1]) == x.shape[1]:
        expected = found[2]
    if expected is not None:
        return ValueError(
            f"Expected {IMAGES}, of {expected} channels for this model; got {x.shape[1]} channels, {x.dtype} of shape "
            f"{tuple(x.shape)}."
        )
    return error
