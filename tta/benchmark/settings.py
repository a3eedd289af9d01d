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
        guard: put a guard around every method but the source model, see :class:`tta.Guard`.
        compile: compile the forward and backward pass of every method but the source model, see :func:`tta.adapt`.
    """

    checkpoint: str | None = None
    source: str | None = None
    batch_size: int | None = None
    reset: str | None = None
    precision: str = "32-true"
    clean: bool = False
    accelerator: str = "auto"
    num_workers: int = 0
    guard: bool = False
    compile: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunSettings(SharedSettings):
    """Settings of one run that belong to no single method and no single stream.

    Attributes:
        model: spec of the source model; None for the stream's own.
        num_classes: as in :func:`tta.load_model`.
        mean: as in :func:`tta.load_model`.
        std: as in :func:`tta.load_model`.
        class_names: ``classes`` of :func:`tta.load_model`; None for the stream's own names.
        templates: as in :func:`tta.load_model`.
        preset: published settings to start from; None for the preset with the stream's name.
        protocol: its name.
        seed: seed of the stream.
        leftover: as in :func:`tta.evaluate`.
        frames: as in :func:`tta.evaluate`.
    """

    model: str | None = None
    num_classes: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    class_names: list[str] | None = None
    templates: list[str] | None = None
    preset: str | None = None
    protocol: str = "continual"
    seed: int = 0
    leftover: str = "join"
    frames: list[int] | None = None


SHARED = tuple(setting.name for setting in dataclasses.fields(SharedSettings))
OF_MODEL = (
    "checkpoint",
    "num_classes",
    "mean",
    "std",
    "class_names",
    "templates",
)  # arguments of tta.load_model, where class_names are classes
# Without the stream, before anything is loaded.
CHECKED = ("reset", "precision", "accelerator", "num_workers", "leftover")
OF_ENGINE = (*CHECKED, "frames")  # arguments of tta.evaluate
OF_MACHINE = ("accelerator", "num_workers")  # they change no number


def as_arguments(settings: SharedSettings, names: Iterable[str]) -> dict[str, Any]:
    """The settings of these names, as keyword arguments."""
    return {name: getattr(settings, name) for name in names}
