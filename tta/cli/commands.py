"""The ``tta`` command: run, bench, tune, source, corrupt, table, diff, plot, list, download. Exit codes: 0 done, 2 usage error, 1 failed run."""

import argparse
import contextlib
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
from tta.allocator import keep_freed_memory
from tta.benchmark import runs
from tta.cli import arguments as words
from tta.cli import listings

CLEAN_IMAGES = 256  # that a source model predicts before the run
FORMATS = ("terminal", "markdown", "latex", "csv", "html")

RUN_HELP = """\
Run methods on a stream, print the table, write the results. `tta run` alone is the embedded demo.

words:      the stream (digits-c), methods (source norm tent ...), and settings key=value, in any order
settings:   lr=1e-3            every method named that has the key
            tent.lr=1e-3       one method
            stream.severity=3  the stream, and its protocol's parameters (protocol=correlated delta=0.1)
            model=digits-vit   the rest: model, checkpoint, num_classes, mean, std, source, preset, protocol, reset, seed,
                               batch_size, precision, accelerator, num_workers (processes that read ahead),
                               clean (true: predict clean images before and after)
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
            quality=85, of JPEG files as in ImageNet-C (null: PNG, lossless); on_error=skip leaves broken files out
example:    tta corrupt imagenet/val data/ImageNet-C severities=[5] --workers 8
"""

BENCH_HELP = """\
Run a benchmark: methods x models x streams x protocols x seeds, each a cell of its own. Stopped at any moment, the same command
goes on where it was; a cell that failed stands in the table with its reason and is tried again the next time.

NAME|FILE:  one of `tta list benchmarks`, or a .yaml file of your own
settings:   methods=[source,tent] seeds=[0,1]   replaces a list of the file
            stream.samples=100                  all streams; protocol.delta=0.1 all protocols
            tent.lr=1e-3 grid.lr=[1e-3,5e-4]    one method; every method that has the key, a row for each value
example:    tta bench ttab-mini --jobs 2
            tta table runs/ttab-mini --format latex
"""

TUNE_HELP = """\
Run a grid for each method and select hyper-parameters from it: with test labels (marked as oracle), with those of the validation
corruptions alone, and without labels. Resumable as `tta bench` is.

words:      one of `tta list benchmarks` or a .yaml file; or a stream and methods
settings:   as in `tta bench`; select=[validation,entropy] chooses the ways, grid.lr=[1e-2,1e-3] what is searched
ways:       episodic-oracle, online-last (both look at test labels), validation, entropy, consistency
example:    tta tune digits-c source tent sar seeds=[0,1,2] stream.samples=100 --jobs 2
"""


PLOT_HELP = """\
Draw results, or what a stream brings.

WHAT:       curve (error over the stream), heatmap (method x domain), pareto (error against cost), calibration, grid (learning
            rate x steps): of RESULTS, folders that `tta run --out` or `tta bench` wrote; or schedule: what arrives when
words:      of schedule those of `tta run`: STREAM and settings; no image is read
example:    tta plot curve runs/mine -o curve.svg
            tta plot schedule digits-c protocol=ptta -o ptta.png
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
        if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as stop:  # argparse has printed what was wrong
        return int(stop.code or 0)
    if rest:  # argparse takes words in one run; ours may also stand behind an option
        arguments.words += rest
    if not hasattr(arguments, "action"):
        parser.print_help()
        return 2
    if argv is None:  # a process of our own
        keep_freed_memory()
    try:
        with _plain_warnings():
            return arguments.action(arguments)
    except (KeyboardInterrupt, SystemExit):  # within a run, Lightning turns Ctrl+C and SIGTERM into SystemExit
        print("tta: stopped before the end. What had finished is kept.", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"tta: {runs.in_words(error)}", file=sys.stderr)
        if isinstance(error, (words.UsageError, config.ConfigError)):
            return 2
        print("tta: the run failed; --debug shows where.", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Warnings as sentences to a user, without the line of code that gave them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"tta: {message}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = before


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

    bench = commands.add_parser(
        "bench",
        parents=[common],
        help="run a benchmark, resumable, print its table",
        description=BENCH_HELP,
        formatter_class=raw,
    )
    bench.add_argument("name", metavar="NAME|FILE")
    bench.add_argument("words", nargs="*", metavar="KEY=VALUE")
    bench.set_defaults(action=_bench)

    tune = commands.add_parser(
        "tune",
        parents=[common],
        help="select hyper-parameters, with and without labels",
        description=TUNE_HELP,
        formatter_class=raw,
    )
    tune.add_argument("words", nargs="+", metavar="NAME|FILE|STREAM|METHOD|KEY=VALUE")
    tune.set_defaults(action=_tune)
    for command in (bench, tune):
        command.add_argument("--out", type=Path, metavar="DIR", help="where to write results (default: runs/NAME)")
        command.add_argument("--jobs", type=int, default=1, metavar="N", help="processes of this machine (default: 1)")
        command.add_argument("--ray", metavar="ADDRESS", help="a Ray cluster; auto, or local for one of this machine")
        command.add_argument("--format", default="terminal", choices=FORMATS, help="of the table")

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
    table.add_argument("--format", default="terminal", help=", ".join(FORMATS))
    table.add_argument(
        "--metrics",
        type=lambda names: names.split(","),
        default=[],
        metavar="NAME,...",
        help="such as ece,nll,forwards",
    )
    table.set_defaults(action=_table)

    diff = commands.add_parser("diff", parents=[common], help="name the fields in which two results differ")
    diff.add_argument(
        "results",
        nargs=2,
        type=Path,
        metavar="RESULT",
        help="a folder with a result.json, or the file; the second may be published:NAME",
    )
    diff.set_defaults(action=_diff)

    plot = commands.add_parser(
        "plot", parents=[common], help="draw results, or what arrives when", description=PLOT_HELP, formatter_class=raw
    )
    plot.add_argument("what", metavar="WHAT")
    plot.add_argument("words", nargs="*", metavar="RESULTS|STREAM|KEY=VALUE")
    plot.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: WHAT.png; .svg and .pdf work too")
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
    listing.add_argument("what", choices=list(listings.LISTINGS))
    listing.set_defaults(action=_list)
    return parser


# ---------------------------------------------------------------------- run


def _run(arguments: argparse.Namespace) -> int:
    import tta

    with words.usage():
        request = words.parse_request(arguments.words)
        stream = runs.make_stream(request)
        clean = stream.clean() if request.run.clean else None
        models = runs.load_models(request, stream)
        adapters = runs.make_adapters(models, request)

    runs.keep_freed_memory()
    out = arguments.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    console = Console(stderr=True)
    console.print(
        "\n".join([str(stream).splitlines()[0], *(f"images {origin}" for origin in stream.origins)]), highlight=False
    )
    in_use = {adapter.model.spec for _, adapter in adapters}
    used = [model for model in models.values() if model.spec in in_use]
    _preflight(stream, used, console, request.run)
    results = []
    for name, adapter in adapters:
        settings = ", ".join(f"{key}={value}" for key, value in config.as_dict(adapter.config).items())
        preset = f" (preset {adapter.preset})" if adapter.preset else ""
        console.print(f"{name} on {adapter.model.spec}{preset}: {settings}", highlight=False, markup=False)
        result = runs.evaluate(adapter, stream, request.run, clean=clean, progress=console.is_terminal)
        folder = _free(out / f"{stream.name}_{stream.protocol}_seed{stream.seed}" / name)
        result.save(folder)
        results.append(result)
    Console().print(tta.compare(results))
    console.print(f"Results: {out}", highlight=False)
    return 0


def _preflight(stream: Any, models: list[Any], console: Console, run: runs.RunConfig) -> None:
    """Say what the source models do on clean images where the stream has some; in colour where that is far off."""
    import tta

    clean = stream.clean_images(CLEAN_IMAGES)
    for model in models if clean else []:
        runs.to_device(model, run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is printed instead
            found = tta.preflight(model, *clean)
        console.print(
            f"{model.spec}: {found}", style="yellow" if found.problem else None, highlight=False, markup=False
        )


def _free(folder: Path) -> Path:
    """The folder, or its first numbered sibling that holds no result yet: nothing is overwritten."""
    number, free = 1, folder
    while (free / "result.json").exists():
        number += 1
        free = folder.with_name(f"{folder.name}-{number}")
    return free


# ---------------------------------------------------------------------- bench, tune


def _bench(arguments: argparse.Namespace) -> int:
    from tta import benchmark

    with words.usage():
        described = benchmark.load(arguments.name, words.key_values(arguments.words))
    return _run_benchmark(described, arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from tta import benchmark
    from tta.benchmark import WAYS

    names = [word for word in arguments.words if "=" not in word]
    settings = words.key_values([word for word in arguments.words if "=" in word])
    with words.usage():
        if len(names) == 1 and (names[0] in benchmark.available() or names[0].endswith((".yaml", ".yml"))):
            described = benchmark.load(names[0], settings)
        else:
            request = words.parse_request(names)
            named = {"name": f"tune-{request.stream}", "methods": request.methods, "streams": [request.stream]}
            described = benchmark.load(named, settings)
    described.select = described.select or list(WAYS)
    return _run_benchmark(described, arguments)


def _run_benchmark(described: Any, arguments: argparse.Namespace) -> int:
    from tta import benchmark
    from tta.benchmark import Failure

    console = Console(stderr=True)
    out = arguments.out or Path("runs") / described.name
    with words.usage():
        rows = benchmark.entries(described)

    def report(cell: Any, outcome: Any, done: int, total: int) -> None:
        found = f"failed: {outcome.reason}" if isinstance(outcome, Failure) else f"{outcome.mean_error:.1f} %"
        console.print(f"[{done}/{total}] {cell.name}: {found}", highlight=False, markup=False, soft_wrap=True)

    console.print(f"{described.name}: {len(benchmark.in_order(rows))} cells in {out}", highlight=False, markup=False)
    summary = benchmark.run(described, rows, out, jobs=arguments.jobs, ray=arguments.ray, report=report)
    _print_table(summary, arguments.format)
    console.print(f"Results: {out}", highlight=False)
    return 1 if summary.problems else 0


def _print_table(table: Any, kind: str) -> None:
    if kind == "terminal":
        Console().print(table)
    else:
        print(table.format(kind), end="")


# ---------------------------------------------------------------------- source


def _source(arguments: argparse.Namespace) -> int:
    from tta.datasets import catalog

    with words.usage():
        of_stream = [arguments.data] if arguments.data in catalog.STREAMS else []
        request = words.parse_request([*of_stream, *arguments.words])
        if request.stream_settings:
            raise words.UsageError(
                f"'{next(iter(request.stream_settings))}' is a setting of a stream; here there is none."
            )
        model = runs.load_model(arguments.model, request, catalog.classes_of(request.stream))
        needs: list[Any] = []
        for name in request.methods:
            needs += [need for need in runs.source_needs(model, name, request) if need not in needs]
        if not needs:
            raise words.UsageError(f"Nothing to record: {', '.join(request.methods)} need not know the source domain.")
        images = catalog.source_images(arguments.data, model.preprocessing)
    console = Console(stderr=True)

    def progress(batches: Any) -> Any:
        return track(batches, "source images", console=console, transient=True, disable=not console.is_terminal)

    statistics = runs.record(model, needs, images, request.run, progress=progress)
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

    known = ("corruptions", "severities", "seed", "recipe", "resize", "crop", "quality", "on_error")
    settings = words.key_values(arguments.words)
    if strange := next((key for key in settings if key not in known), None):
        raise words.UsageError(
            f"No setting '{strange}'.{config.nearest(strange, known)} There are: {', '.join(known)}."
        )
    console = Console(stderr=True)

    def progress(steps: Any, total: int) -> Any:
        return track(steps, "corrupting", total=total, console=console, disable=not console.is_terminal)

    with words.usage():
        written = write_corrupted(
            arguments.source, arguments.target, **settings, workers=arguments.workers, progress=progress
        )
    console.print(f"{written} images written to {arguments.target}", highlight=False)
    return 0


# ---------------------------------------------------------------------- table, diff, plot, list, download


def _table(arguments: argparse.Namespace) -> int:
    import tta
    from tta import benchmark
    from tta.results import find_results

    with words.usage():
        is_benchmark = len(arguments.folders) == 1 and (arguments.folders[0] / benchmark.DESCRIPTION).is_file()
        if is_benchmark:
            results = find_results(sorted(arguments.folders[0].rglob("result.json")))  # there may be none yet
            table: Any = benchmark.table(arguments.folders[0])
        else:
            results = find_results(arguments.folders)
            table = tta.compare(results, metrics=arguments.metrics)
        if arguments.format == "html":
            from tta.report.page import html_page

            print(html_page(table, results, title=arguments.folders[0].resolve().name), end="")
        else:
            _print_table(table, arguments.format)
    return 0


def _diff(arguments: argparse.Namespace) -> int:
    from tta.results import Result, differences, published

    one, other = map(str, arguments.results)
    prefix, _, name = other.partition(":")
    with words.usage():
        if prefix == "published":
            found = published.differences(Result.load(one), name)
        else:
            found = differences(Result.load(one), Result.load(other))
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
    from tta.report import figures
    from tta.report import schedule as plots
    from tta.results import find_results

    known = ["schedule", *figures.FIGURES]
    out = arguments.out or Path(f"{arguments.what}.png")
    with words.usage():
        if arguments.what not in known:
            near = config.nearest(arguments.what, known)
            raise config.ConfigError(f"No picture '{arguments.what}'.{near} There are: {', '.join(known)}.")
        if arguments.what == "schedule":
            figure = plots.schedule(runs.make_stream(words.parse_request(arguments.words)))
        else:
            figure = figures.FIGURES[arguments.what](find_results(arguments.words))
        plots.save(figure, out)
    print(out)
    return 0


def _list(arguments: argparse.Namespace) -> int:
    _print_lines(listings.LISTINGS[arguments.what]())
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
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, words.usage():
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
