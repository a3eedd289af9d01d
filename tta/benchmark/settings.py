"""Settings of a run. Each is declared here once; requests, cells and benchmarks inherit it."""

import dataclasses
from collections.abc import Iterable
from typing import Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedSettings:
    """Settings that are the same for all runs of a benchmark.

    Attributes:
        checkpoint: weights of the source model; in a benchmark, of the models that name none.
        source: file or folder of source knowledge.
        batch_size: samples per batch; None for the stream's own.
        reset: as in :func:`tta.evaluate`; None for the protocol's.
        precision: as in :func:`tta.evaluate`.
        clean: measure the error on the source domain too, before and after the run.
        accelerator: as in :func:`tta.evaluate`.
        num_workers: processes that read ahead, for each run.
    """

    checkpoint: str | None = None
    source: str | None = None
    batch_size: int | None = None
    reset: str | None = None
    precision: str = "32-true"
    clean: bool = False
    accelerator: str = "auto"
    num_workers: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(SharedSettings):
    """Settings of one run that belong to no single method and no single stream.

    Attributes:
        model: spec of the source model; None for the stream's own.
        num_classes: as in :func:`tta.load_model`.
        mean: as in :func:`tta.load_model`.
        std: as in :func:`tta.load_model`.
        preset: published settings to start from; None for the preset with the stream's name.
        protocol: its name.
        seed: seed of the stream.
        leftover: as in :func:`tta.evaluate`.
    """

    model: str | None = None
    num_classes: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    preset: str | None = None
    protocol: str = "continual"
    seed: int = 0
    leftover: str = "join"


SHARED = tuple(setting.name for setting in dataclasses.fields(SharedSettings))
OF_MODEL = ("checkpoint", "num_classes", "mean", "std")  # arguments of tta.load_model
OF_ENGINE = ("reset", "precision", "accelerator", "num_workers", "leftover")  # arguments of tta.evaluate
OF_MACHINE = ("accelerator", "num_workers")  # they change no number


def as_arguments(settings: SharedSettings, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names, as keyword arguments."""
    return {name: getattr(settings, name) for name in names}
