"""Streams and protocols by name. ``tta.stream`` lives here."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from tta.datasets.stream import DatasetImages, Domain, Stream

# name -> the module of this folder whose `domains(...)` makes the stream's domains, and what it is in a line
STREAMS = {
    "cifar10-c": ("cifar_c", "CIFAR-10-C as published, or generated from clean CIFAR-10"),
    "digits-c": ("digits_c", "scikit-learn's digits, 800 held-out images, corrupted as they are needed"),
}

# name -> (reset, what it is in a line)
PROTOCOLS: dict[str, tuple[str | int, str]] = {
    "continual": ("never", "domains one after another, the adapter is never reset"),
    "per-domain": ("domain", "domains one after another, reset before each"),
    "episodic": ("batch", "reset before every batch"),
}


def stream(
    name: str | Mapping[str, Dataset[Any]],
    *,
    batch_size: int = 64,
    seed: int = 0,
    protocol: str = "continual",
    **settings: Any,
) -> Stream:
    """A target stream by name, or over your own datasets.

    Args:
        name: one of ``tta list streams``, or a mapping from domain names to datasets of ``(image, label)``.
        batch_size: samples a batch.
        seed: of whatever is drawn (corruptions, orders).
        protocol: one of ``tta list protocols``.
        settings: what the stream of that name accepts, such as ``severity=5`` or ``corruptions=["fog"]``.

    Raises:
        ValueError: an unknown stream, protocol or setting; the nearest name is offered.

    Example:
        >>> import tta
        >>> len(tta.stream("digits-c", severity=5, batch_size=200))
        60
    """
    if protocol not in PROTOCOLS:
        raise ValueError(_unknown("protocol", protocol, PROTOCOLS))
    if isinstance(name, str):
        if name not in STREAMS:
            raise ValueError(_unknown("stream", name, STREAMS))
        for key in settings:
            if key not in stream_settings(name):
                raise ValueError(_unknown(f"setting of stream '{name}':", key, stream_settings(name)))
        domains: list[Domain] = import_module(f"tta.datasets.{STREAMS[name][0]}").domains(seed=seed, **settings)
    else:
        if settings:
            raise ValueError(f"A stream over your own datasets has no setting '{next(iter(settings))}'.")
        domains = [DatasetImages(domain, dataset) for domain, dataset in name.items()]
    return Stream(
        name if isinstance(name, str) else "custom",
        domains,
        batch_size=batch_size,
        seed=seed,
        protocol=protocol,
        reset=PROTOCOLS[protocol][0],
        settings=settings,
    )


def source_images(name: str, size: Sequence[int] | None = None) -> Tensor | Dataset[Any]:
    """Clean images of the source domain, for :meth:`tta.SourceStatistics.record` and ``source=``.

    Args:
        name: a stream (the images its source models were trained on), or a folder ``CLASS/IMAGE`` as
            ``torchvision.datasets.ImageFolder`` reads it; its order is shuffled once and for all, so that the first so
            many images are of all classes.
        size: height and width of the model's input. A folder's images of another size are resized to 8/7 of it along
            their shorter side and cropped. Left out: they stay as they are.

    Raises:
        ValueError: the stream offers no source images, or there is neither such a stream nor such a folder.
    """
    if name in STREAMS:
        make = getattr(import_module(f"tta.datasets.{STREAMS[name][0]}"), "source_images", None)
        if make is None:
            raise ValueError(
                f"Stream '{name}' offers no source images. Name a folder of images, or statistics saved by `tta source`."
            )
        return make()
    if not Path(name).is_dir():
        raise ValueError(_unknown("folder of images or stream", name, STREAMS))
    folder = ImageFolder(name, lambda image: _fitted(image, size))
    return Subset(folder, torch.randperm(len(folder), generator=torch.Generator().manual_seed(0)).tolist())


def _fitted(image: Any, size: Sequence[int] | None) -> Tensor:
    pixels = transforms.functional.pil_to_tensor(image)
    if size is None or pixels.shape[1:] == tuple(size):
        return pixels
    return transforms.functional.center_crop(transforms.functional.resize(pixels, [max(size) * 8 // 7]), list(size))


def stream_settings(name: str) -> list[str]:
    """Names of the settings that a stream accepts beside batch size, seed and protocol."""
    make = import_module(f"tta.datasets.{STREAMS[name][0]}").domains
    return [key for key in inspect.signature(make).parameters if key != "seed"]


def _unknown(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"No {what} '{given}'.{hint} There are: {', '.join(known)}."
