"""One run: what was asked for becomes a stream, a source model and adapters. Shared by ``tta run``, ``source`` and ``bench``.

Nothing heavy is imported before it is used: a usage error or ``--help`` need not wait for torch.
"""

import contextlib
import ctypes
import dataclasses
import re
from pathlib import Path
from typing import Any

from tta import config

BASELINE = "source"
CALIBRATIONS = "runs/calibrations"  # where protocol ccc keeps what it measured


@dataclasses.dataclass
class RunConfig:
    """Settings of a run that belong to no single method or stream."""

    model: str | None = None
    checkpoint: str | None = None
    num_classes: int | None = None
    mean: list[float] | None = None
    std: list[float] | None = None
    source: str | None = None
    preset: str | None = None
    protocol: str = "continual"
    reset: str | None = None
    seed: int = 0
    batch_size: int | None = None
    precision: str = "32-true"
    accelerator: str = "auto"
    num_workers: int = 0
    clean: bool = False


@dataclasses.dataclass
class Request:
    """A run as the command line asked for it."""

    stream: str
    methods: list[str]
    run: RunConfig
    stream_settings: dict[str, Any]
    hparams: dict[str, dict[str, Any]]


def make_stream(request: Request) -> Any:
    """The stream asked for, over the defaults of ``configs/stream``."""
    import tta
    from tta.engine import reset_period

    defaults = config.load("stream", request.stream)
    for of_run in ("models", "preset"):
        defaults.pop(of_run, None)
    run = request.run
    if run.reset is not None:
        reset_period(run.reset)
    of_stream = defaults.pop("batch_size", 64)
    batch_size = of_stream if run.batch_size is None else run.batch_size
    if run.protocol == "ccc":
        defaults.pop("severity", None)  # its severities change
    settings = {**defaults, **request.stream_settings}
    if run.protocol == "ccc" and "matrix" not in settings:
        settings = {"cache": CALIBRATIONS, **_calibration(request), **settings}
    return tta.stream(request.stream, batch_size=batch_size, seed=run.seed, protocol=run.protocol, **settings)


def _calibration(request: Request) -> dict[str, Any]:
    """What protocol ``ccc`` needs where it is given no matrix: a source model, which comes before the stream then."""
    from rich.console import Console
    from rich.progress import track

    spec, console = model_specs(request)[0], Console(stderr=True)
    model = load_model(spec, request, None)
    to_device(model, request.run)
    console.print(
        f"No accuracy matrix given: calibrating on {spec}; the protocol is called ccc-style.", highlight=False
    )

    def progress(cells: Any) -> Any:
        return track(cells, "calibrating", console=console, transient=True, disable=not console.is_terminal)

    return {"model": model, "progress": progress}


def make_adapters(models: dict[str, Any], request: Request) -> list[tuple[str, Any]]:
    """An adapter a method, on the first of the stream's models that it supports; ``source`` on each model in use."""
    made: dict[str, list[tuple[str, Any]]] = {spec: [] for spec in models}
    for method in request.methods:
        if method != BASELINE:
            spec, adapter = _on_first_supported(models, method, request)
            made[spec].append((method, adapter))
    if BASELINE in request.methods:
        for spec in [spec for spec in models if made[spec]] or list(models)[:1]:
            made[spec].insert(0, (BASELINE, make_adapter(models[spec], BASELINE, request)))
    return [pair for pairs in made.values() for pair in pairs]


def load_models(request: Request, stream: Any) -> dict[str, Any]:
    """The source models asked for, or those of the stream, by their specs."""
    return {spec: load_model(spec, request, stream.classes) for spec in model_specs(request)}


def load_model(spec: str, request: Request, classes: Any) -> Any:
    """The model of a spec; it gives the logits of the stream's classes alone where they are some of a larger model's."""
    import tta

    run = request.run
    model = tta.load_model(spec, checkpoint=run.checkpoint, num_classes=run.num_classes, mean=run.mean, std=run.std)
    return model if classes is None or classes.logits is None else model.select_logits(classes.logits, classes.of)


def _on_first_supported(models: dict[str, Any], method: str, request: Request) -> tuple[str, Any]:
    refusals = []
    for spec, model in models.items():
        try:
            return spec, make_adapter(model, method, request)
        except config.ConfigError:
            raise
        except ValueError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def model_specs(request: Request) -> list[str]:
    """The model asked for, else those of the stream, the first of which a method supports is its own."""
    if request.run.model:
        return [request.run.model]
    models = config.load("stream", request.stream).get("models")
    if not models:
        raise config.ConfigError(
            f"Stream '{request.stream}' has no model of its own: name one, such as model=timm:resnet50."
        )
    if request.run.checkpoint and len(models) > 1:
        raise config.ConfigError(
            f"checkpoint= is for one model, and stream '{request.stream}' has {', '.join(models)}: say which, model={models[0]}."
        )
    return list(models)


def _preset(method: str, request: Request) -> str | None:
    """The preset asked for, else the stream's, or the one of its name, where the method has it."""
    if request.run.preset:
        return request.run.preset
    name = config.load("stream", request.stream).get("preset", request.stream)
    return name if name in config.load("method", method.rpartition(":")[2]) else None


def make_adapter(model: Any, method: str, request: Request) -> Any:
    """The adapter of one method around a model, with the preset and the source knowledge that belong to it."""
    import tta

    needs = source_needs(model, method, request)
    source = source_images(model, request) if needs else None
    if needs and not isinstance(source, (str, Path)):
        source = record(model, needs, source, request.run)
    return tta.adapt(model, method, source=source, preset=_preset(method, request), **request.hparams[method])


def source_needs(model: Any, method: str, request: Request) -> list[Any]:
    """What the method must know of the source domain of this model."""
    from tta import methods

    return methods.source_needs(model, method, preset=_preset(method, request), **request.hparams[method])


def source_images(model: Any, request: Request) -> Any:
    """What ``source=`` names, a file or a folder, else the stream's own source images."""
    from tta.datasets import catalog

    given = request.run.source
    if given is not None and not Path(given).is_dir():
        return given
    on_error = request.stream_settings.get("on_error", "raise")
    return catalog.source_images(given or request.stream, model.preprocessing, on_error=on_error)


def record(model: Any, needs: list[Any], images: Any, run: RunConfig, **options: Any) -> Any:
    """Source statistics, recorded on the device of the run; ``options`` as in :meth:`tta.SourceStatistics.record`."""
    import tta

    to_device(model, run)
    try:
        return tta.SourceStatistics.record(model, needs, images, num_workers=run.num_workers, **options)
    finally:
        model.cpu()


def to_device(model: Any, run: RunConfig) -> None:
    """Move a model to the GPU that the run will use, where there is one."""
    import torch

    if run.accelerator != "cpu" and torch.cuda.is_available():
        model.cuda()


def in_words(error: Exception) -> str:
    """What an error says; of one in a worker process, where its traceback comes along, the last line alone."""
    said = str(error).strip() or type(error).__name__
    if re.match(r"Caught \w+ in DataLoader worker process", said):
        return said.splitlines()[-1].partition(": ")[2]
    return said


def evaluate(adapter: Any, stream: Any, run: RunConfig, **options: Any) -> Any:
    """The result of an adapter on a stream under the settings of the run; ``options`` as in :func:`tta.evaluate`."""
    import tta

    return tta.evaluate(
        adapter,
        stream,
        reset=run.reset,
        precision=run.precision,
        accelerator=run.accelerator,
        num_workers=run.num_workers,
        **options,
    )


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a batch for the next one (up to 1 GB) instead of handing it back to the system.

    Handed back, it is taken again page by page: 4 000 page faults a batch of 200 through the embedded CNN, which then
    takes 1.7 times as long. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest that glibc takes
