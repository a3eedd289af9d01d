"""One run: a request becomes a stream, a source model and adapters. Shared by ``tta run``, ``source`` and ``bench``.

Heavy imports are inside the functions, so that a usage error or ``--help`` need not wait for torch.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tta import config
from tta.benchmark.settings import CHECKED, OF_ENGINE, OF_MODEL, RunSettings, as_arguments
from tta.messages import plain, require
from tta.report.tables import BASELINE

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset

    from tta.adapter import Adapter
    from tta.datasets.domains import Classes
    from tta.datasets.stream import Stream
    from tta.models import ImageClassifier
    from tta.results import Result
    from tta.source import Need, SourceStatistics

    Images = Tensor | Dataset[Any]

IMAGENET = 1000  # classes
LARGEST_SEED = 2**32 - 1  # of NumPy's generator
CALIBRATIONS = "runs/calibrations"  # where protocol ccc keeps its measurements


@dataclasses.dataclass
class Request:
    """A run as the command line asked for it."""

    stream: str
    methods: list[str]
    run: RunSettings
    stream_settings: dict[str, Any]
    hparams: dict[str, dict[str, Any]]


def make_stream(request: Request) -> "Stream":
    """The stream asked for; what the request leaves open comes from ``configs/stream``."""
    import tta
    from tta.datasets.files import ClassOrderWarning
    from tta.engine import check_frames, check_settings

    defaults = config.load("stream", request.stream)
    for of_run in ("models", "preset", "protocol"):
        defaults.pop(of_run, None)
    run = request.run
    check_settings(**as_arguments(run, CHECKED))
    require(0 <= run.seed <= LARGEST_SEED, f"seed={run.seed}", f"a number from 0 to {LARGEST_SEED}")
    of_stream = defaults.pop("batch_size", 64)
    batch_size = of_stream if run.batch_size is None else run.batch_size
    if run.protocol == "ccc":
        defaults.pop("severity", None)  # its severities change
    settings = {**defaults, **request.stream_settings}
    if run.protocol == "ccc" and "matrix" not in settings:
        settings = {"cache": CALIBRATIONS, **_calibration(request), **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("error", ClassOrderWarning)  # nobody reads a warning above a table of wrong labels
        stream = tta.stream(request.stream, batch_size=batch_size, seed=run.seed, protocol=run.protocol, **settings)
    check_frames(run.frames, stream.samples)
    return stream


def _calibration(request: Request) -> dict[str, Any]:
    """Settings of protocol ``ccc`` without a matrix: a source model, which is then loaded before the stream."""
    from rich.console import Console
    from rich.progress import track

    spec, console = model_specs(request)[0], Console(stderr=True)
    model = source_model(spec, request, None)
    to_device(model, request.run)
    said = f"No accuracy matrix given: calibrating on {plain(spec)}; the protocol is called ccc-style."
    console.print(said, highlight=False, markup=False)

    def progress(pairs: Sequence[Any]) -> Iterable[Any]:
        return track(pairs, "calibrating", console=console, transient=True, disable=not console.is_terminal)

    return {"model": model, "progress": progress}


def make_adapters(models: Mapping[str, "ImageClassifier"], request: Request) -> list[tuple[str, "Adapter"]]:
    """One adapter per method, on the first of the models that it supports; ``source`` on each model in use.

    Beside the methods on a vision-language model ``source`` always stands: it is the zero-shot error of the same prompt.
    """
    from tta.towers import prompts_of

    made: dict[str, list[tuple[str, Adapter]]] = {spec: [] for spec in models}
    for method in request.methods:
        if method != BASELINE:
            spec, adapter = _adapter_on_supported_model(models, method, request)
            made[spec].append((method, adapter))
    asked = BASELINE in request.methods
    for spec in [spec for spec in models if made[spec]] or list(models)[:1]:
        if asked or prompts_of(models[spec]):
            request.hparams.setdefault(BASELINE, {})
            made[spec].insert(0, (BASELINE, make_adapter(models[spec], BASELINE, request)))
    return [pair for pairs in made.values() for pair in pairs]


def source_models(request: Request, stream: "Stream") -> dict[str, "ImageClassifier"]:
    """The source model asked for, or those of the stream, by spec."""
    return {spec: source_model(spec, request, stream.classes, stream.class_names) for spec in model_specs(request)}


def source_model(
    spec: str, request: Request, classes: "Classes | None", names: Sequence[str] | None = None
) -> "ImageClassifier":
    """Load the model of a spec; where the stream has some of its classes, it gives the logits of those alone.

    A model that classifies by names takes those of the stream, and those of ImageNet for a stream of its classes.
    """
    import tta
    from tta.models import imagenet_names, reads_names

    settings = as_arguments(request.run, OF_MODEL)
    settings["classes"] = settings.pop("class_names")
    if settings["classes"] is None and reads_names(spec):
        of_imagenet = classes is not None and IMAGENET in (classes.of, classes.count)
        settings["classes"] = imagenet_names() if names is None and of_imagenet else names
    model = tta.load_model(spec, **settings)
    return model if classes is None or classes.logits is None else model.select_logits(classes.logits, classes.of)


def _adapter_on_supported_model(
    models: Mapping[str, "ImageClassifier"], method: str, request: Request
) -> tuple[str, "Adapter"]:
    """The spec of the first model that the method supports, those prepared for it before all others, and the adapter on it.

    Raises the first model's refusal.
    """
    from tta import methods

    refusals = []
    kind = methods.find(method)
    for spec, model in sorted(models.items(), key=lambda item: not methods.is_prepared(kind, item[1])):
        try:
            return spec, make_adapter(model, method, request)
        except config.ConfigError:  # a wrong setting is wrong on every model
            raise
        except ValueError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def model_specs(request: Request) -> list[str]:
    """The model asked for, else those of the stream in order of preference."""
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
    """The preset asked for; else the stream's preset or the one with its name, where the method has it."""
    if request.run.preset:
        return request.run.preset
    name: str = config.load("stream", request.stream).get("preset", request.stream)
    return name if name in config.load("method", method.rpartition(":")[2]) else None


def make_adapter(model: "ImageClassifier", method: str, request: Request) -> "Adapter":
    """The adapter of one method around a model, with its preset and its source knowledge."""
    import tta
    from tta.datasets import catalog

    source: SourceStatistics | str | None = None
    if needs := source_needs(model, method, request):
        given = source_images(model, request)
        source = given if isinstance(given, str) else record(model, needs, given, request.run)
    adapts = method != BASELINE
    guard, compiled = request.run.guard and adapts, request.run.compile and adapts
    preset = _preset(method, request)
    task = catalog.task_of(request.stream)
    return tta.adapt(
        model, method, source=source, preset=preset, task=task, guard=guard, compile=compiled, **request.hparams[method]
    )


def source_needs(model: "nn.Module", method: str, request: Request) -> list["Need"]:
    """Needs of the method with respect to the source domain of this model."""
    from tta import methods

    return methods.source_needs(model, method, preset=_preset(method, request), **request.hparams[method])


def source_images(model: "ImageClassifier", request: Request) -> "Images | str":
    """The images of the folder that ``source=`` names, or its file as it stands; else the stream's own source images."""
    from tta.datasets import catalog

    given = request.run.source
    if given is not None and not Path(given).is_dir():
        return given
    of_files = ("on_error", "exif", "class_order")
    same = {key: value for key, value in request.stream_settings.items() if key in of_files}
    return catalog.source_images(given or request.stream, model.preprocessing, **same)


def record(
    model: "nn.Module", needs: Sequence["Need"], images: "Images", run: RunSettings, **options: Any
) -> "SourceStatistics":
    """Record source statistics on the device of the run; ``options`` as in :meth:`tta.SourceStatistics.record`."""
    import tta

    to_device(model, run)
    try:
        return tta.SourceStatistics.record(model, needs, images, num_workers=run.num_workers, **options)
    finally:
        model.cpu()


def to_device(model: "nn.Module", run: RunSettings) -> None:
    """Move a model to the GPU that the run will use; without one it stays."""
    import torch

    if run.accelerator != "cpu" and torch.cuda.is_available():
        model.cuda()


def run_adapter(adapter: "Adapter", stream: "Stream", run: RunSettings, **options: Any) -> "Result":
    """Run an adapter on a stream with the settings of the run; ``options`` as in :func:`tta.evaluate`."""
    import tta

    return tta.evaluate(adapter, stream, **as_arguments(run, OF_ENGINE), **options)


def error_message(error: Exception) -> str:
    """The message of an error; without the traceback that it carries when it comes from a worker process."""
    said = str(error).strip() or type(error).__name__
    if re.match(r"Caught \w+ in DataLoader worker process", said):
        return said.splitlines()[-1].partition(": ")[2]
    return said
