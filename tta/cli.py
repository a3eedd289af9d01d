"""The ``tta`` command: run, source, corrupt, table, diff, plot, list, download. Exit codes: 0 done, 2 usage error, 1 failed run."""

import argparse
import contextlib
import ctypes
import dataclasses
import sys
import warnings
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
    track,
)
from rich.table import Table
from rich.text import Text

from tta import config

STREAM = "digits-c"
BASELINE = "source"
CALIBRATIONS = "runs/calibrations"  # where protocol ccc keeps what it measured
CLEAN_IMAGES = 256  # that a source model predicts before the run
METHODS = ("source", "norm", "tent", "eata", "sar", "cotta", "rotta", "actmad", "dpcore")

RUN_HELP = """\
Run methods on a stream, print the table, write the results. `tta run` alone is the embedded demo.

words:      the stream (digits-c), methods (source norm tent ...), and settings key=value, in any order
settings:   lr=1e-3            every method named that has the key
            tent.lr=1e-3       one method
            stream.severity=3  the stream, and its protocol's parameters (protocol=correlated delta=0.1)
            model=digits-vit   the rest: model, checkpoint, source, preset, protocol, reset, seed, batch_size,
                               precision, accelerator, num_workers, clean (true: predict clean images before and after)
source:     source=FILE        what methods such as eata may know of the source domain, saved by `tta source`, or a folder
                               of images; left out, the stream's own source images where it has them
ccc:        protocol=ccc matrix=FILE, or without one calibrated on the run's model: target=20 speed=1000 total=7500000
example:    tta run digits-c source tent severity=3 tent.lr=5e-3 seed=1 --out runs/mine
"""

SOURCE_HELP = """\
Record what methods must know of the source domain, so that they run without source images: one pass, one file.

DATA:       a stream with source images (digits-c), or a folder CLASS/IMAGE
METHOD:     any, and the stream they will run on, where the model answers with some of its classes there (imagenet-r)
settings:   as in `tta run`: those of the methods, checkpoint, preset, accelerator
example:    tta source digits-cnn digits-c eata actmad -o source.safetensors
            tta run digits-c eata actmad source=source.safetensors
"""

CORRUPT_HELP = """\
Write a corrupted copy of images, laid out and saved as the published sets are. Stopped, it goes on where it was.

SRC:        a folder CLASS/IMAGE; clean CIFAR as torchvision downloads it; or an .npy file, uint8 (n, height, width, 3)
DST:        gets CORRUPTION/SEVERITY/CLASS/IMAGE, or CORRUPTION.npy and labels.npy; tta-corrupt.json tells how it was made
settings:   corruptions=[fog,snow] severities=[3,5] seed=0 recipe=imagenet; of a folder's images resize=256 crop=224
            quality=85, of JPEG files as in ImageNet-C (null: PNG, lossless)
example:    tta corrupt imagenet/val data/ImageNet-C severities=[5] --workers 8
"""


class UsageError(ValueError):
    """The user asked for something that does not exist."""


@dataclasses.dataclass
class RunConfig:
    """Settings of a run that belong to no single method or stream."""

    model: str | None = None
    checkpoint: str | None = None
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:  # argparse has printed what was wrong
        return int(stop.code or 0)
    if not hasattr(arguments, "action"):
        parser.print_help()
        return 2
    try:
        return arguments.action(arguments)
    except KeyboardInterrupt:
        print("Stopped. Results of the methods that had finished are kept.", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"tta: {error or type(error).__name__}", file=sys.stderr)
        if isinstance(error, (UsageError, config.ConfigError)):
            return 2
        print("tta: the run failed; --debug shows where.", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser = argparse.ArgumentParser(prog="tta", description="Test-time adaptation of vision models.")
    commands = parser.add_subparsers(metavar="COMMAND")

    raw = argparse.RawDescriptionHelpFormatter
    run = commands.add_parser(
        "run",
        parents=[common],
        help="run methods on a stream, print the table",
        description=RUN_HELP,
        formatter_class=raw,
    )
    run.add_argument("words", nargs="*", metavar="STREAM|METHOD|KEY=VALUE")
    run.add_argument("--out", type=Path, metavar="DIR", help="where to write results (default: runs/<date and time>)")
    run.set_defaults(action=_run)

    source = commands.add_parser(
        "source",
        parents=[common],
        help="record what methods must know of the source domain",
        description=SOURCE_HELP,
        formatter_class=raw,
    )
    source.add_argument("model", metavar="MODEL")
    source.add_argument("data", metavar="DATA")
    source.add_argument("words", nargs="+", metavar="METHOD|KEY=VALUE")
    source.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="where to write the statistics")
    source.set_defaults(action=_source)

    corrupt = commands.add_parser(
        "corrupt",
        parents=[common],
        help="write a corrupted copy of a folder of images or of CIFAR",
        description=CORRUPT_HELP,
        formatter_class=raw,
    )
    corrupt.add_argument("source", type=Path, metavar="SRC")
    corrupt.add_argument("target", type=Path, metavar="DST")
    corrupt.add_argument("words", nargs="*", metavar="KEY=VALUE")
    corrupt.add_argument("--workers", type=int, default=0, metavar="N", help="processes (default: this one alone)")
    corrupt.set_defaults(action=_corrupt)

    table = commands.add_parser("table", parents=[common], help="compare results on disk")
    table.add_argument("folders", nargs="+", type=Path, metavar="DIR")
    table.add_argument("--format", default="terminal", help="terminal, markdown, latex, csv, html")
    table.add_argument(
        "--metrics",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help="such as ece,nll,forwards",
    )
    table.set_defaults(action=_table)

    diff = commands.add_parser("diff", parents=[common], help="name the fields in which two results differ")
    diff.add_argument("results", nargs=2, type=Path, metavar="RESULT", help="a folder with a result.json, or the file")
    diff.set_defaults(action=_diff)

    plot = commands.add_parser("plot", parents=[common], help="draw what arrives when")
    plot.add_argument("what", choices=["schedule"])
    plot.add_argument("words", nargs="*", metavar="STREAM|KEY=VALUE", help="as in `tta run`; no image is read")
    plot.add_argument(
        "-o", "--out", type=Path, default=Path("schedule.png"), metavar="FILE", help="default: schedule.png"
    )
    plot.set_defaults(action=_plot)

    download = commands.add_parser("download", parents=[common], help="get published data sets; alone: list them")
    download.add_argument("name", nargs="?", metavar="NAME")
    download.add_argument("parts", nargs="*", metavar="PART", help="of a data set that is published in several")
    download.add_argument(
        "--root", type=Path, metavar="DIR", help="where to (default: TTA_DATA, else ./data or a cache)"
    )
    download.add_argument("--trust", action="store_true", help="take a file that nobody published a checksum of")
    download.add_argument("--keep", action="store_true", help="keep the archives after unpacking")
    download.set_defaults(action=_download)

    listing = commands.add_parser("list", parents=[common], help="what there is")
    listing.add_argument("what", choices=list(LISTINGS))
    listing.set_defaults(action=_list)
    return parser


# ---------------------------------------------------------------------- run


def _run(arguments: argparse.Namespace) -> int:
    import tta

    with _usage():
        request = parse_request(arguments.words)
        stream = _make_stream(request)
        clean = stream.clean() if request.run.clean else None
        models = {spec: _load_model(spec, request, stream.classes) for spec in _model_specs(request)}
        adapters = _make_adapters(models, request)

    _keep_freed_memory()
    out = arguments.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    console = Console(stderr=True)
    console.print(
        "\n".join([str(stream).splitlines()[0], *(f"images {origin}" for origin in stream.origins)]), highlight=False
    )
    in_use = {adapter.model.spec for _, adapter in adapters}
    used = [model for model in models.values() if model.spec in in_use]
    _preflight(stream, used, console, run_on_gpu=request.run.accelerator != "cpu")
    results = []
    for name, adapter in adapters:
        settings = ", ".join(f"{key}={value}" for key, value in config.as_dict(adapter.config).items())
        preset = f" (preset {adapter.preset})" if adapter.preset else ""
        console.print(f"{name} on {adapter.model.spec}{preset}: {settings}", highlight=False, markup=False)
        run = request.run
        result = tta.evaluate(
            adapter,
            stream,
            reset=run.reset,
            precision=run.precision,
            accelerator=run.accelerator,
            num_workers=run.num_workers,
            clean=clean,
            progress=console.is_terminal,
        )
        folder = _free(out / f"{stream.name}_{stream.protocol}_seed{stream.seed}" / name)
        result.save(folder)
        results.append(result)
    Console().print(tta.compare(results))
    console.print(f"Results: {out}", highlight=False)
    return 0


def _keep_freed_memory() -> None:
    """Let glibc keep the memory of a batch for the next one (up to 1 GB) instead of handing it back to the system.

    Handed back, it is taken again page by page: 4 000 page faults a batch of 200 through the embedded CNN, which then
    takes 1.7 times as long. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(AttributeError, OSError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, 2**30)
        mallopt(mmap_threshold, 2**25)  # the largest that glibc takes


def parse_request(words: Sequence[str]) -> Request:
    """Sort the words of ``tta run`` into stream, methods and settings, each checked by name and type.

    Raises:
        UsageError: a word that is neither a stream nor a method, or a key that nothing has; the nearest is offered.
    """
    from tta import methods
    from tta.adapter import config_class
    from tta.datasets import catalog

    names = [word for word in words if "=" not in word]
    streams = [name for name in names if name in catalog.STREAMS]
    chosen = [name for name in names if name not in catalog.STREAMS]
    if len(streams) > 1:
        raise UsageError(f"One run is on one stream; got {', '.join(streams)}.")
    for name in chosen:
        if not methods.is_known(name):
            known = [*catalog.STREAMS, *methods.available()]
            raise UsageError(
                f"'{name}' is neither a stream nor a method.{config.nearest(name, known)} "
                f"Streams: {', '.join(catalog.STREAMS)}. Methods: {', '.join(methods.available())}."
            )
    if repeated := {name for name in chosen if chosen.count(name) > 1}:
        raise UsageError(f"Method named twice: {', '.join(sorted(repeated))}.")
    stream = streams[0] if streams else STREAM
    chosen = chosen or list(METHODS)

    keys = {name: [f.name for f in dataclasses.fields(config_class(methods.find(name)))] for name in chosen}  # type: ignore[arg-type]
    of_run = [field.name for field in dataclasses.fields(RunConfig)]
    protocols = [word.partition("=")[2] for word in words if word.partition("=")[0] in ("protocol", "stream.protocol")]
    of_stream = catalog.stream_settings(stream, *protocols[-1:])
    run: dict[str, Any] = {}
    stream_settings: dict[str, Any] = {}
    hparams: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for word in words:
        if "=" not in word:
            continue
        key, _, text = word.partition("=")
        value = config.parse(text)
        owner, dot, name = key.partition(".")
        having = [method for method in chosen if key in keys[method]]
        if dot and owner == "stream":
            known = [*of_stream, "seed", "protocol", "batch_size"]
            if name not in known:
                raise UsageError(f"Stream '{stream}' has no key '{name}'.{config.nearest(name, known)}")
            (stream_settings if name in of_stream else run)[name] = value
        elif dot and owner in keys:
            hparams[owner][name] = value  # a wrong name is answered by the method's own config
        elif dot:
            known = ["stream", *chosen]
            raise UsageError(
                f"'{key}': '{owner}' is not in this run.{config.nearest(owner, known)} There are: {', '.join(known)}."
            )
        elif key in of_run:
            run[key] = value
        elif having:
            for method in having:
                hparams[method][key] = value
        elif key in of_stream:
            stream_settings[key] = value
        else:
            known = sorted({*of_run, *of_stream, *(k for names in keys.values() for k in names)})
            raise UsageError(
                f"No method of this run ({', '.join(chosen)}) has a key '{key}', nor has the run or the stream."
                f"{config.nearest(key, known)}"
            )
    if run.get("reset") is not None:
        run["reset"] = str(run["reset"])
    return Request(stream, chosen, config.build(RunConfig, run), stream_settings, hparams)


def _make_stream(request: Request) -> Any:
    import tta
    from tta.engine import reset_period

    defaults = config.load("stream", request.stream)
    for of_run in ("models", "preset"):
        defaults.pop(of_run, None)
    run = request.run
    if run.reset is not None:
        reset_period(run.reset)
    batch_size = run.batch_size or defaults.pop("batch_size", 64)
    defaults.pop("batch_size", None)
    if run.protocol == "ccc":
        defaults.pop("severity", None)  # its severities change
    settings = {**defaults, **request.stream_settings}
    if run.protocol == "ccc" and "matrix" not in settings:
        settings = {"cache": CALIBRATIONS, **_calibration(request), **settings}
    return tta.stream(request.stream, batch_size=batch_size, seed=run.seed, protocol=run.protocol, **settings)


def _calibration(request: Request) -> dict[str, Any]:
    """What protocol ``ccc`` needs where it is given no matrix: a source model, which comes before the stream then."""
    import torch

    import tta

    spec, console = _model_specs(request)[0], Console(stderr=True)
    model = tta.load_model(spec, checkpoint=request.run.checkpoint)
    if request.run.accelerator != "cpu" and torch.cuda.is_available():
        model.cuda()
    console.print(
        f"No accuracy matrix given: calibrating on {spec}; the protocol is called ccc-style.", highlight=False
    )

    def progress(cells: Any) -> Any:
        return track(cells, "calibrating", console=console, transient=True, disable=not console.is_terminal)

    return {"model": model, "progress": progress}


def _preflight(stream: Any, models: list[Any], console: Console, run_on_gpu: bool) -> None:
    """Say what the source models do on clean images where the stream has some; in colour where that is far off."""
    import torch

    import tta

    clean = stream.clean_images(CLEAN_IMAGES)
    for model in models if clean else []:
        if run_on_gpu and torch.cuda.is_available():
            model.cuda()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is printed instead
            found = tta.preflight(model, *clean)
        console.print(
            f"{model.spec}: {found}", style="yellow" if found.problem else None, highlight=False, markup=False
        )


def _make_adapters(models: dict[str, Any], request: Request) -> list[tuple[str, Any]]:
    """An adapter a method, on the first of the stream's models that it supports; ``source`` on each model in use."""
    made: dict[str, list[tuple[str, Any]]] = {spec: [] for spec in models}
    for method in request.methods:
        if method != BASELINE:
            spec, adapter = _on_first_supported(models, method, request)
            made[spec].append((method, adapter))
    if BASELINE in request.methods:
        for spec in [spec for spec in models if made[spec]] or list(models)[:1]:
            made[spec].insert(0, (BASELINE, _make_adapter(models[spec], BASELINE, request)))
    return [pair for pairs in made.values() for pair in pairs]


def _load_model(spec: str, request: Request, classes: Any) -> Any:
    """The model of a spec; it gives the logits of the stream's classes alone where they are some of a larger model's."""
    import tta

    model = tta.load_model(spec, checkpoint=request.run.checkpoint)
    return model if classes is None or classes.logits is None else model.select_logits(classes.logits, classes.of)


def _on_first_supported(models: dict[str, Any], method: str, request: Request) -> tuple[str, Any]:
    refusals = []
    for spec, model in models.items():
        try:
            return spec, _make_adapter(model, method, request)
        except config.ConfigError:
            raise
        except ValueError as refusal:
            refusals.append(refusal)
    raise refusals[0]


def _model_specs(request: Request) -> list[str]:
    """The model asked for, else those of the stream, the first of which a method supports is its own."""
    if request.run.model:
        return [request.run.model]
    models = config.load("stream", request.stream).get("models")
    if not models:
        raise UsageError(f"Stream '{request.stream}' has no model of its own: name one, such as model=timm:resnet50.")
    return list(models)


def _preset(method: str, request: Request) -> str | None:
    """The preset asked for, else the stream's, or the one of its name, where the method has it."""
    if request.run.preset:
        return request.run.preset
    name = config.load("stream", request.stream).get("preset", request.stream)
    return name if name in config.load("method", method.rpartition(":")[2]) else None


def _make_adapter(model: Any, method: str, request: Request) -> Any:
    import tta

    source = _source_images(model, request) if _source_needs(model, method, request) else None
    return tta.adapt(model, method, source=source, preset=_preset(method, request), **request.hparams[method])


def _source_needs(model: Any, method: str, request: Request) -> list[Any]:
    from tta.methods import source_needs

    return source_needs(model, method, preset=_preset(method, request), **request.hparams[method])


def _source_images(model: Any, request: Request) -> Any:
    """What ``source=`` names, a file or a folder, else the stream's own source images."""
    from tta.datasets import catalog

    given = request.run.source
    if given is not None and not Path(given).is_dir():
        return given
    return catalog.source_images(given or request.stream, model.preprocessing["input_size"])


def _free(folder: Path) -> Path:
    """The folder, or its first numbered sibling that holds no result yet: nothing is overwritten."""
    number, free = 1, folder
    while (free / "result.json").exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


@contextlib.contextmanager
def _usage() -> Iterator[None]:
    """While a run is being set up, what does not fit is the user's mistake and not a failed run."""
    try:
        yield
    except (ValueError, TypeError, FileNotFoundError) as error:
        raise UsageError(str(error)) from error


# ---------------------------------------------------------------------- source


def _source(arguments: argparse.Namespace) -> int:
    import torch

    import tta
    from tta.datasets import catalog

    with _usage():
        of_stream = [arguments.data] if arguments.data in catalog.STREAMS else []
        request = parse_request([*of_stream, *arguments.words])
        if request.stream_settings:
            raise UsageError(f"'{next(iter(request.stream_settings))}' is a setting of a stream; here there is none.")
        model = _load_model(arguments.model, request, catalog.classes_of(request.stream))
        needs: list[Any] = []
        for name in request.methods:
            needs += [need for need in _source_needs(model, name, request) if need not in needs]
        if not needs:
            raise UsageError(f"Nothing to record: {', '.join(request.methods)} need not know the source domain.")
        size: Any = model.preprocessing["input_size"]
        images = catalog.source_images(arguments.data, size)
    console = Console(stderr=True)
    if request.run.accelerator != "cpu" and torch.cuda.is_available():
        model.cuda()

    def progress(batches: Any) -> Any:
        return track(batches, "source images", console=console, transient=True, disable=not console.is_terminal)

    statistics = tta.SourceStatistics.record(model, needs, images, progress=progress)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    statistics.save(arguments.out)
    for entry in statistics.entries:
        at = f"{len(entry.need.layers)} layers, {entry.need.statistics} statistics"
        console.print(f"{entry.need.kind} of {entry.images} images ({at})", highlight=False)
    console.print(f"Statistics: {arguments.out}", highlight=False)
    return 0


# ---------------------------------------------------------------------- corrupt


def _corrupt(arguments: argparse.Namespace) -> int:
    from tta.datasets.write import write_corrupted

    known = ("corruptions", "severities", "seed", "recipe", "resize", "crop", "quality")
    settings = {}
    for word in arguments.words:
        key, equals, text = word.partition("=")
        if not equals or key not in known:
            raise UsageError(f"'{word}' is no setting.{config.nearest(key, known)} There are: {', '.join(known)}.")
        settings[key] = config.parse(text)
    console = Console(stderr=True)

    def progress(steps: Any, total: int) -> Any:
        return track(steps, "corrupting", total=total, console=console, disable=not console.is_terminal)

    with _usage():
        written = write_corrupted(
            arguments.source, arguments.target, **settings, workers=arguments.workers, progress=progress
        )
    console.print(f"{written} images written to {arguments.target}", highlight=False)
    return 0


# ---------------------------------------------------------------------- table, diff, list


def _table(arguments: argparse.Namespace) -> int:
    import tta
    from tta.results import find_results

    with _usage():
        comparison = tta.compare(find_results(arguments.folders), metrics=arguments.metrics)
        if arguments.format == "terminal":
            Console().print(comparison)
        else:
            print(comparison.format(arguments.format))
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from tta.results import Result, differences

    with _usage():
        first, second = (Result.load(path) for path in arguments.results)
    found = differences(first, second)
    if not found:
        print("The two results agree in every field.")
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("field", *map(str, arguments.results)):
        table.add_column(Text(heading), overflow="fold")
    for name, values in found.items():
        table.add_row(
            Text(name), *(Text(f"{value:.4g}" if isinstance(value, float) else str(value)) for value in values)
        )
    Console().print(table)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from tta import plots

    with _usage():
        stream = _make_stream(parse_request(arguments.words))
        plots.save(plots.schedule(stream), arguments.out)
    print(arguments.out)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    _print_lines(LISTINGS[arguments.what]())
    return 0


def _print_lines(lines: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*map(Text, line))
    Console().print(table)


def _download(arguments: argparse.Namespace) -> int:
    from tta.datasets import download

    if not arguments.name:
        _print_lines((name, _extent(archive), archive.about) for name, archive in download.archives().items())
        return 0
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, _usage():
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        found = download.download(
            arguments.name,
            arguments.parts,
            root=arguments.root,
            trust=arguments.trust,
            keep=arguments.keep,
            progress=progress,
        )
    for path, checksum in dict.fromkeys(found):
        print(path, checksum)
    return 0


def _extent(archive: Any) -> str:
    """Bytes and parts of a published data set."""
    size = sum(file.size or 0 for file in archive.files)
    parts = f" ({' '.join(archive.parts)})" if archive.parts else ""
    return f"{decimal(size)}{parts}" if size else "?"


def _methods() -> list[tuple[str, str]]:
    from tta import methods

    return [(name, (methods.find(name).__doc__ or "").strip().splitlines()[0]) for name in methods.available()]


def _streams() -> list[tuple[str, str]]:
    from tta.datasets import catalog

    return [(name, line) for name, (_, line) in catalog.STREAMS.items()]


def _models() -> list[tuple[str, str]]:
    from tta import models

    return list(models.list_models().items())


def _corruptions() -> list[tuple[str, str]]:
    from tta.datasets.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS

    return [(name, "") for name in CORRUPTIONS] + [(name, "to tune on") for name in VALIDATION_CORRUPTIONS]


def _protocols() -> list[tuple[str, str]]:
    from tta.datasets import catalog

    return [(name, protocol.line) for name, protocol in catalog.PROTOCOLS.items()]


LISTINGS = {
    "methods": _methods,
    "streams": _streams,
    "models": _models,
    "corruptions": _corruptions,
    "protocols": _protocols,
}
