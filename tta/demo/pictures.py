"""Pictures of the demo: clean ones of the digits or of a folder, in an order that never ends, corrupted as they come."""

import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tta.datasets import CORRUPTIONS, VALIDATION_CORRUPTIONS, Domain, corrupt, digits_c, imagefolder
from tta.datasets.files import ClassOrderWarning, FileImages, class_numbers, subfolders
from tta.datasets.geometry import fitted
from tta.messages import nearest, require

CLEAN = "none"
OFFERED = (CLEAN, *CORRUPTIONS, *VALIDATION_CORRUPTIONS)
SEVERITIES = range(1, 6)
SMALL = 64  # pixels of a side up to which the CIFAR recipe fits


class Shown(NamedTuple):
    """Pictures of one batch: uint8 (batch, 3, height, width), and their labels (batch,), -1 where unknown."""

    images: Tensor
    labels: Tensor


class Pictures:
    """An endless stream of pictures: one pass over a domain after another, each in an order and with draws of its own.

    Args:
        domain: gives clean pictures with their labels.
        title: of the page, in words.
        batch_size: pictures a batch; all of them where there are fewer.
        seed: of the orders and of the corruptions' draws.
        names: of the classes, in the order of the labels; None where nobody knows them.
        classes: number of logits that the model must have for the labels to mean anything; None where this is unknown.
    """

    def __init__(
        self,
        domain: Domain,
        title: str,
        *,
        batch_size: int = 32,
        seed: int = 0,
        names: Sequence[str] | None = None,
        classes: int | None = None,
    ) -> None:
        require(batch_size >= 1, f"batch_size={batch_size}", "1 or more")
        require(seed >= 0, f"seed={seed}", "0 or more")
        self.title, self.names, self.classes = title, names, classes
        self.batch_size, self.seed = min(batch_size, len(domain.labels)), seed
        self.largest = int(domain.labels.max())  # label
        self._domain = domain

    def batch(self, number: int, corruption: str = CLEAN, severity: int = 5) -> Shown:
        """The pictures of a batch, counted from 0.

        Raises:
            ValueError: a corruption or severity that there is not, or a file that is no picture.
        """
        check(corruption, severity)
        passes, place = divmod(number, len(self._domain.labels) // self.batch_size)
        seed = self.seed + passes
        order = torch.randperm(len(self._domain.labels), generator=torch.Generator().manual_seed(seed))
        positions = order[place * self.batch_size :][: self.batch_size]
        images = self._domain.images(positions)
        if corruption != CLEAN:
            recipe = "cifar" if max(images.shape[2:]) <= SMALL else "imagenet"
            index = self._domain.index[positions]
            images = corrupt(images, corruption, severity=severity, seed=seed, recipe=recipe, index=index)
        return Shown(images, self._domain.labels[positions])


def check(corruption: str, severity: int) -> None:
    """Raise a ValueError with a sentence for a corruption or a severity that the page does not offer."""
    if corruption not in OFFERED:
        raise ValueError(
            f"No corruption '{corruption}'.{nearest(corruption, OFFERED)} There are: {', '.join(OFFERED)}."
        )
    require(severity in SEVERITIES, f"severity={severity}", "1 to 5")


def of_digits(**settings: Any) -> Pictures:
    """scikit-learn's 800 held-out digits: nothing is downloaded. Settings: ``batch_size`` and ``seed`` of :class:`Pictures`."""
    (domain,) = digits_c.domains(corruptions=CORRUPTIONS[:1])
    names = [str(digit) for digit in range(10)]
    return Pictures(domain.clean(), "handwritten digits", names=names, classes=len(names), **settings)


def of_folder(
    folder: str | Path,
    model: Any,
    *,
    labels: bool = True,
    class_map: Any = None,
    class_order: str | None = None,
    **settings: Any,
) -> Pictures:
    """The pictures of ``folder/CLASS/IMAGE``, resized and cropped as the weights of a model expect.

    Args:
        folder: with class folders, or with pictures alone for ``labels=False``.
        model: of :func:`tta.load_model`; its ``preprocessing`` and ``class_names`` are used where it has them.
        labels: false: nobody knows the classes, and nothing is called right or wrong.
        class_map, class_order: the model's output for each class folder, as in the stream ``imagefolder``.
        settings: ``batch_size`` and ``seed`` of :class:`Pictures`.

    Raises:
        FileNotFoundError: no such folder, or no pictures in it.
        ValueError: classes that do not fit.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClassOrderWarning)  # nobody reads a warning beside a page of wrong labels
        (found,) = imagefolder.domains(
            root=folder, labels=labels, class_map=class_map, class_order=class_order, mask=False, resize=None, crop=None
        )
        names = getattr(model, "class_names", None)
        if names is None and labels and class_map is None:
            folders = subfolders(Path(folder))
            names = [name for _, name in sorted(zip(class_numbers(folders, class_order), folders, strict=True))]
    geometry = partial(fitted, preprocessing=getattr(model, "preprocessing", {}))
    images = FileImages(found.name, found.folder, found.files, geometry, exif=True)
    classes = found.classes and found.classes.count
    return Pictures(images, f"pictures of '{Path(folder).resolve().name}'", names=names, classes=classes, **settings)
