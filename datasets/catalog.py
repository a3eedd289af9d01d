"""Streams and protocols by name. ``tta.stream`` lives here."""

import difflib
import inspect
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from torch.utils.data import Dataset

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


def stream_settings(name: str) -> list[str]:
    """Names of the settings that a stream accepts beside batch size, seed and protocol."""
    make = import_module(f"tta.datasets.{STREAMS[name][0]}").domains
    return [key for key in inspect.signature(make).parameters if key != "seed"]


def _unknown(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"No {what} '{given}'.{hint} There are: {', '.join(known)}."
