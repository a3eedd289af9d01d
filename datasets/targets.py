"""Labels of a user's own dataset: those that its samples would give, read without decoding an image where it can be."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torchvision.datasets import VisionDataset
from torchvision.datasets.vision import StandardTransform

from tta.labels import UNKNOWN


def known(dataset: Any) -> Any:
    """The labels that a dataset knows of itself, a label for each sample; None if only its samples can tell.

    Read from an attribute ``targets`` or ``labels`` or from a ``TensorDataset``, through ``Subset`` and ``ConcatDataset``,
    and sent through the dataset's ``target_transform``, as torchvision's datasets do with each sample.
    """
    labels = _stored(dataset)
    if labels is None or not hasattr(labels, "__len__") or len(labels) != len(dataset) or _joint(dataset):
        return None
    transform = getattr(dataset, "target_transform", None)
    return [transform(label) for label in _plain(labels)] if callable(transform) else labels


def _stored(dataset: Any) -> Any:
    """Labels before the dataset's own ``target_transform``."""
    if isinstance(dataset, Subset):
        whole = known(dataset.dataset)
        return None if whole is None else _chosen(whole, dataset.indices)
    if isinstance(dataset, ConcatDataset):
        parts = [known(part) for part in dataset.datasets]
        return (
            None if any(part is None for part in parts) else [label for part in parts for label in _plain(_flat(part))]
        )
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1] if len(dataset.tensors) > 1 else None
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _joint(dataset: Any) -> bool:
    """Whether torchvision's dataset transforms image and label together, so that only a sample tells its label."""
    transforms = getattr(dataset, "transforms", None) if isinstance(dataset, VisionDataset) else None
    return transforms is not None and not isinstance(transforms, StandardTransform)


def _chosen(labels: Any, indices: Sequence[int]) -> Any:
    if isinstance(labels, (Tensor, np.ndarray)):
        return labels[torch.as_tensor(indices, dtype=torch.int64)]
    every = _plain(labels)
    return [every[int(index)] for index in indices]


def _flat(labels: Any) -> Any:
    """Labels of shape (n, 1) as (n,), so that those of several datasets go together."""
    is_array = isinstance(labels, (Tensor, np.ndarray))
    return labels.reshape(-1) if is_array and math.prod(labels.shape[1:]) == 1 else labels


def _plain(labels: Any) -> Sequence[Any]:
    """Labels as Python's own numbers, as a ``target_transform`` expects them."""
    plain: Sequence[Any] = labels.tolist() if hasattr(labels, "tolist") else list(labels)
    return plain


def class_numbers(labels: Any, domain: str) -> Tensor:
    """Labels as class numbers, int64 (n,); those of shape (n, 1) are squeezed, whole floating-point numbers are taken.

    Args:
        labels: a tensor, an array or a sequence of n labels.
        domain: its name, for the error.

    Raises:
        ValueError: labels of another shape or type than one whole number each, or below -1 (an unknown class); the message
            names the domain, shape and dtype, and the way out.
    """
    numbers, kind = _array(labels)
    if (
        numbers is not None
        and numbers.dtype.kind == "f"
        and bool((np.isfinite(numbers) & (numbers == np.round(numbers))).all())
    ):
        numbers = numbers.astype(np.int64)  # 3.0 can only be class 3; 0.7 is none
    if numbers is None or numbers.dtype.kind not in "iub" or numbers.size != len(numbers):
        found = "different shapes" if numbers is None else f"shape {tuple(numbers.shape)}, dtype {kind}"
        raise ValueError(
            f"Domain '{domain}': a label is the number of one class, 0, 1, ..., for each image; got labels of {found}. "
            f"{_way_out(numbers)}"
        )
    classes = torch.from_numpy(numbers.reshape(-1).astype(np.int64))
    if len(classes) and int(classes.min()) < UNKNOWN:
        raise ValueError(
            f"Domain '{domain}': a label is the number of a class, 0, 1, ..., or {UNKNOWN} for an unknown one; the lowest "
            f"label is {int(classes.min())}."
        )
    return classes


def _array(labels: Any) -> tuple[Any, str]:
    """Labels as an array, None if they are of no common shape or no numbers at all, and their type in words."""
    if isinstance(labels, Tensor):
        return _numpy(labels), str(labels.dtype).removeprefix("torch.")
    try:
        every = [_numpy(label) if isinstance(label, Tensor) else label for label in labels]
        array = labels if isinstance(labels, np.ndarray) else np.asarray(every)
    except (ValueError, TypeError):  # of different lengths
        return None, ""
    if not array.size:
        array = array.astype(np.int64)
    kind = array.dtype.name
    if array.dtype.kind == "O":
        kind = type(next(iter(array.flat))).__name__
    return array, "str" if array.dtype.kind in "US" else kind


def _numpy(labels: Tensor) -> Any:
    labels = labels.detach().cpu()
    return (labels.float() if labels.dtype == torch.bfloat16 else labels).numpy()


def _way_out(numbers: Any) -> str:
    if numbers is None or numbers.dtype.kind in "OUSV":
        return "Give each class a number, in the order of the model's outputs."
    if numbers.ndim == 2 and numbers.shape[1] > 1 and bool(((numbers != 0).sum(1) == 1).all()):
        return "They look one-hot: labels.argmax(1) gives the numbers."
    if numbers.ndim > 1:
        return "Of several labels an image choose one; images of several classes at once cannot be scored."
    return "Numbers between the classes name none: is this a score, or an output to regress?"


def one(label: Any) -> int | None:
    """The class number in the label of a sample, None if it is none."""
    try:
        return int(class_numbers([label], "")[0])
    except ValueError:
        return None


Reader = Callable[[int], Any]  # the label of the sample at a position


def of(dataset: Any, sample_label: Reader, domain: str) -> tuple[Tensor, bool]:
    """The class numbers of a dataset, int64 (n,), and whether they were read without its samples.

    Raises:
        ValueError: as :func:`class_numbers`.
    """
    stored = known(dataset)
    if stored is not None:
        try:
            return class_numbers(stored, domain), True
        except ValueError:
            # An attribute may hold more than a sample gives: QMNIST has eight numbers an image and gives the first.
            if isinstance(dataset, TensorDataset) or not len(dataset) or one(sample_label(0)) is None:
                raise
    return class_numbers([sample_label(position) for position in range(len(dataset))], domain), False
