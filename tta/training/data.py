"""Batches of a source stage: their order is a function of the seed and the number of the step, so that any step can be resumed."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from tta.training.settings import TrainSettings


class Steps(Sampler[list[int]]):
    """Positions of the images of each batch of an epoch, from the step on that comes next.

    Args:
        images: number of images.
        batch_size: a last batch that is smaller is left out, unless it is the only one.
        seed: of the order, which is another one in each epoch.

    Attributes:
        done: gives the number of the steps made so far; asked when an epoch begins.
    """

    def __init__(self, images: int, batch_size: int, seed: int) -> None:
        self.images, self.batch_size, self.seed = images, min(batch_size, images), seed
        self.done: Callable[[], int] = lambda: 0

    def __len__(self) -> int:
        return self.images // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.done(), len(self))
        order = torch.randperm(self.images, generator=drawn_from(self.seed, epoch)).tolist()
        for batch in range(first, len(self)):
            yield order[batch * self.batch_size : (batch + 1) * self.batch_size]


def drawn_from(seed: int, number: int) -> torch.Generator:
    """A generator for an epoch or a step: the same whenever it is asked for."""
    return torch.Generator().manual_seed((seed * 1_000_003 + number) % 2**62)


def require_labels(data: Dataset[Any]) -> None:
    """Raise a ValueError unless there are pairs of an image and the number of its class."""
    if not len(data) or not isinstance(data[0], (tuple, list)) or len(data[0]) < 2:  # type: ignore[arg-type]
        raise ValueError(
            "A source stage needs images with labels: a stream with source images, or a folder CLASS/IMAGE."
        )
    label = torch.as_tensor(data[0][1])
    if label.numel() != 1 or label.is_floating_point():
        kind = str(label.dtype).removeprefix("torch.")
        raise ValueError(
            f"The label of the first image is {kind} of shape {tuple(label.shape)}; a source stage trains classifiers, and "
            "expected the number of its class."
        )


def divided(data: Dataset[Any], settings: TrainSettings) -> tuple[Dataset[Any], Dataset[Any] | None]:
    """Training images, and those that are held out, a random share of them.

    Raises:
        ValueError: too few images.
    """
    count = len(data)  # type: ignore[arg-type]
    held = max(1, round(settings.validation * count)) if settings.validation else 0
    if count - held < 2:
        raise ValueError(f"{count} images are too few for training and validation={settings.validation}.")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(settings.seed)).tolist()
    if not held:
        return Subset(data, sorted(order)), None
    return Subset(data, sorted(order[held:])), Subset(data, sorted(order[:held]))


def collated(samples: list[Any], classes: int) -> tuple[Tensor, Tensor]:
    """Images (batch, 3, height, width) in [0, 1] and labels (batch,).

    Raises:
        ValueError: images of different sizes, or a label that is no class of the model.
    """
    images = [torch.as_tensor(sample[0]) for sample in samples]
    if len({image.shape for image in images}) > 1:
        raise ValueError(
            "The training images differ in size; expected images of one size, or a model whose input size is known."
        )
    labels = torch.tensor([int(sample[1]) for sample in samples])
    if strange := [label for label in labels.tolist() if not 0 <= label < classes]:
        raise ValueError(
            f"A label is {strange[0]}; the model has {classes} classes, from 0 on. num_classes= makes it another number."
        )
    x = torch.stack(images)
    return x.float() / 255 if x.dtype == torch.uint8 else x, labels


def loaders(
    data: Dataset[Any], settings: TrainSettings, classes: int
) -> tuple[DataLoader[Any], DataLoader[Any] | None]:
    """Batches to train on and batches held out, of images with labels below ``classes``."""
    train, held = divided(data, settings)
    steps = Steps(len(train), settings.batch_size, settings.seed)  # type: ignore[arg-type]
    # Generators of their own, so that reading does not advance the global random state.
    common: dict[str, Any] = {
        "num_workers": settings.num_workers,
        "collate_fn": partial(collated, classes=classes),
        "generator": torch.Generator(),
    }
    training: DataLoader[Any] = DataLoader(train, batch_sampler=steps, **common)
    return training, None if held is None else DataLoader(held, batch_size=settings.batch_size, **common)
