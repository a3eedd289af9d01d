"""The sub-commands of ``tta``. Exit codes: 0 done, 1 failed run, 2 usage error."""

import argparse
import contextlib
import dataclasses
import gc
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
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

from tta import config, places
from tta.allocator import keep_freed_memory, uncollected
from tta.benchmark import RunSettings, runs
from tta.cli import listings
from tta.cli.arguments import DEMO, MAIN, STREAM, UsageError, check_new, key_values, parse_request, usage_errors
from tta.cli.parser import make_parser
from tta.messages import plain

if TYPE_CHECKING:
    from tta.benchmark import Benchmark, Cell, Outcome
    from tta.datasets.download import Archive
    from tta.datasets.stream import Stream
    from tta.distributed import Workers
    from tta.models import ImageClassifier
    from tta.report.tables import ResultTable
    from tta.results import Result
    from tta.source import Need

CLEAN_IMAGES = 256  # predicted by each source model before the run


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = make_parser()
    try:
        arguments, rest = parser.parse_known_args(argv)
        if rest and (not hasattr(arguments, "words") or any(word.startswith("-") for word in rest)):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
    except SystemExit as stop:  # argparse has printed what was wrong
        return int(stop.code or 0)
    if rest:  # argparse accepts positional words in one block only; here they may also follow an option
        arguments.words += rest
    if arguments.command is None:
        parser.print_help()
        return 2
    arguments.own_process = argv is None  # a program that calls main keeps its allocator and its collector as they are
    if arguments.own_process:
        keep_freed_memory()
    try:
        with _plain_warnings():
            return ACTIONS[arguments.command](arguments)
    except (KeyboardInterrupt, SystemExit):  # within a run, Lightning turns Ctrl+C and SIGTERM into SystemExit
        print("tta: stopped before the end. Results that had finished are kept.", file=sys.stderr)
        return 1
    except Exception as error:
        if arguments.debug:
            raise
        print(f"tta: {plain(runs.error_message(error), lines=True)}", file=sys.stderr)
        if isinstance(error, (UsageError, config.ConfigError)):
            return 2
        print("tta: the run failed; --debug shows where.", file=sys.stderr)
        return 1


@contextlib.contextmanager
def _plain_warnings() -> Iterator[None]:
    """Show warnings as plain sentences, without the line of code that raised them."""

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        print(f"tta: {plain(str(message), lines=True)}", file=sys.stderr)

    before, warnings.showwarning = warnings.showwarning, show
    try:
        yield
    finally:
        warnings.showwarning = before


def _say(console: Console, text: str, style: str = "") -> None:
    """Print one line as it stands, in which names may be anything: no markup, no terminal escapes, no path cut in two."""
    console.print(Text(plain(text), style=style), soft_wrap=True)


# ---------------------------------------------------------------------- run


def _run(arguments: argparse.Namespace) -> int:
    import tta

    with uncollected():  # the collector would take a fifth of the time of the imports
        with usage_errors():
            request = parse_request(arguments.words or DEMO)
        import_module("tta.engine")
    if arguments.own_process:
        gc.freeze()  # nor does it look through them later
    from tta.distributed import Workers, launched

    out = arguments.out or Path("runs") / datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    # Processes of torchrun are workers on one stream; the first one speaks and writes.
    with launched() as group:
        workers = Workers(group)
        console = Console(stderr=True, quiet=workers.rank > 0)
        if workers.rank:
            _run_methods(request, None, console, workers)
            return 0
        with places.tried(out):
            results = _run_methods(request, out, console, workers)
    Console().print(tta.compare(results))
    if not arguments.words:
        _say(console, f"A quarter of the images. The full table: tta run {STREAM} {' '.join(MAIN)}")
    _say(console, f"Results: {out}")
    return 0


def _run_methods(request: runs.Request, out: Path | None, console: Console, workers: "Workers") -> "list[Result]":
    """Run each method of the request, and write each result as soon as there is one; nothing without a folder."""
    with usage_errors():
        stream = runs.make_stream(request)
        clean = stream.clean() if request.run.clean else None
        models = runs.source_models(request, stream)
        adapters = runs.make_adapters(models, request)
        for _, adapter in adapters if workers.size > 1 else ():
            adapter.join(workers.group)
    for line in (str(stream).partition("\n")[0], *(f"images {origin}" for origin in stream.origins)):
        _say(console, line)
    in_use = {adapter.model.spec for _, adapter in adapters}
    used = [model for model in models.values() if model.spec in in_use]
    _preflight(stream, used, console, request.run)
    results = []
    for name, adapter in adapters:
        settings = ", ".join(f"{key}={value}" for key, value in config.as_dict(adapter.config).items())
        preset = f" (preset {adapter.preset})" if adapter.preset else ""
        _say(console, f"{name} on {adapter.model.spec}{preset}: {settings}")
        # Claimed before the run: of several at once each has a folder of its own, and nothing is overwritten.
        home = Path(f"{stream.name}_{stream.protocol}_seed{stream.seed}") / name
        with contextlib.nullcontext() if out is None else places.claimed(out / home) as folder:
            result = runs.run_adapter(adapter, stream, request.run, clean=clean, progress=console.is_terminal)
            if folder is not None:
                result.save(folder)
        results.append(result)
    return results


def _preflight(stream: "Stream", models: "Sequence[ImageClassifier]", console: Console, run: RunSettings) -> None:
    """Print the error of each source model on the stream's clean images, if it has any; in colour if it is too high."""
    import tta

    clean = stream.clean_images(CLEAN_IMAGES)
    if clean is None:
        return
    for model in models:
        runs.to_device(model, run)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it is printed instead
            found = tta.preflight(model, *clean)
        _say(console, f"{model.spec}: {found}", style="yellow" if found.problem else "")


# ---------------------------------------------------------------------- bench, tune


def _bench(arguments: argparse.Namespace) -> int:
    from tta import benchmark

    with usage_errors():
        described = benchmark.load(arguments.name, key_values(arguments.words))
    return _run_benchmark(described, arguments)


def _tune(arguments: argparse.Namespace) -> int:
    from tta import benchmark
    from tta.benchmark import WAYS

    names = [word for word in arguments.words if "=" not in word]
    settings = key_values([word for word in arguments.words if "=" in word])
    with usage_errors():
        if len(names) == 1 and (names[0] in benchmark.available() or names[0].endswith((".yaml", ".yml"))):
            described = benchmark.load(names[0], settings)
        else:
            request = parse_request(names)
            named = {"name": f"tune-{request.stream}", "methods": request.methods, "streams": [request.stream]}
            described = benchmark.load(named, settings)
    return _run_benchmark(dataclasses.replace(described, select=described.select or list(WAYS)), arguments)


def _run_benchmark(described: "Benchmark", arguments: argparse.Namespace) -> int:
    from tta import benchmark
    from tta.benchmark import Failure

    console = Console(stderr=True)
    out = arguments.out or Path("runs") / described.name
    with usage_errors():
        rows = benchmark.entries(described)

    def report(cell: "Cell", outcome: "Outcome", done: int, total: int) -> None:
        found = (
            f"failed: {outcome.reason}"
            if isinstance(outcome, Failure)
            else f"{outcome.score.name} {outcome.score.value:.1f} %"
        )
        _say(console, f"[{done}/{total}] {cell.name}: {found}")

    _say(console, f"{described.name}: {len(benchmark.in_order(rows))} cells in {out}")
    summary = benchmark.run(
        described,
        rows,
        out,
        jobs=arguments.jobs,
        ray=arguments.ray,
        report=report,
        say=lambda text: _say(console, text),
    )
    _print_table(summary, arguments.format)
    _say(console, f"Results: {out}")
    return 1 if summary.problems else 0


def _print_table(table: "ResultTable", kind: str) -> None:
    if kind == "terminal":
        Console().print(table)
    else:
        print(table.format(kind), end="")


# ---------------------------------------------------------------------- source


def _source(arguments: argparse.Namespace) -> int:
    from tta.datasets import catalog

    with usage_errors():
        of_stream = [arguments.data] if arguments.data in catalog.STREAMS else []
        request = parse_request([*of_stream, *arguments.words])
        if request.stream_settings:
            raise UsageError(
                f"'{next(iter(request.stream_settings))}' is a setting of a stream, and this command runs none."
            )
        check_new(arguments.out, arguments.force)
        model = runs.source_model(arguments.model, request, catalog.classes_of(request.stream))
        needs: list[Need] = []
        for name in request.methods:
            needs += [need for need in runs.source_needs(model, name, request) if need not in needs]
        if not needs:
            raise UsageError(f"Nothing to record: {', '.join(request.methods)} need not know the source domain.")
        images = catalog.source_images(arguments.data, model.preprocessing)
    console = Console(stderr=True)

    def progress(batches: Any) -> Any:
        return track(batches, "source images", console=console, transient=True, disable=not console.is_terminal)

    with places.tried(arguments.out, is_file=True):
        statistics = runs.record(model, needs, images, request.run, progress=progress)
        statistics.save(arguments.out)
    for entry in statistics.entries:
        at = f"{len(entry.need.layers)} layers, {entry.need.statistics} statistics"
        _say(console, f"{entry.need.kind} of {entry.images} images ({at})")
    _say(console, f"Statistics: {arguments.out}")
    return 0


# ---------------------------------------------------------------------- train


def _train(arguments: argparse.Namespace) -> int:
    from tta import training
    from tta.cli import training as stage

    console = Console(stderr=True)
    with usage_errors():
        request = stage.parse(arguments.method, arguments.words)
        stage.check(arguments.data)
        check_new(arguments.out, arguments.force)
        model = stage.make_model(arguments.model, request)
        data = stage.images(arguments.data, model, request)
    done = training.train(
        request.method,
        model,
        data,
        arguments.out,
        settings=request.settings,
        progress=console.is_terminal,
        **request.hparams,
    )
    error = "" if done.error is None else f", error {done.error:.2f} % on the images held out"
    _say(console, f"{done.path}: {request.method} on {arguments.model} after {done.steps} steps{error}")
    return 0


# ---------------------------------------------------------------------- corrupt


def _corrupt(arguments: argparse.Namespace) -> int:
    from tta.datasets.write import write_corrupted

    known = ("corruptions", "severities", "seed", "recipe", "resize", "crop", "quality", "on_error", "exif")
    settings = key_values(arguments.words)
    if strange := next((key for key in settings if key not in known), None):
        raise UsageError(f"No setting '{strange}'.{config.nearest(strange, known)} There are: {', '.join(known)}.")
    console = Console(stderr=True)

    def progress(steps: Any, total: int) -> Any:
        return track(steps, "corrupting", total=total, console=console, disable=not console.is_terminal)

    with places.tried(arguments.target), usage_errors():
        written = write_corrupted(
            arguments.source, arguments.target, **settings, workers=arguments.workers, progress=progress
        )
    _say(console, f"{written} images written to {arguments.target}")
    return 0


# ---------------------------------------------------------------------- serve


def _serve(arguments: argparse.Namespace) -> int:
    from tta.cli import serving

    with usage_errors():
        serving.check_extra()
        from tta import serve
        from tta.serve import logs

        request = serving.parse(arguments.words)
        settings = config.build(serve.ServeSettings, request.server)
        adapter = serving.make_adapter(arguments.model, request)
        logs.configure()
        app = serve.create_app(adapter, settings)
    serve.run(app, settings)
    return 0


# ---------------------------------------------------------------------- demo


def _demo(arguments: argparse.Namespace) -> int:
    from tta.cli import demo as words

    with usage_errors():
        words.check_extra()
        from tta import demo

        app, settings = words.make_app(words.parse(arguments.words))
    demo.run(app, settings)
    return 0


# ---------------------------------------------------------------------- export


def _export(arguments: argparse.Namespace) -> int:
    from tta import artefact
    from tta.cli import exporting

    out = arguments.out
    with usage_errors():
        request = exporting.parse(arguments.words)
        exporting.check_places(arguments.state, out)
        check_new(out, arguments.force)
        model = exporting.make_model(arguments.model, request)
        adapter = exporting.make_adapter(arguments.state, model, request)
    with places.tried(out, is_file=True):
        with usage_errors():
            plain, images, expected = exporting.make_plain(adapter, model, request)
        about = exporting.facts(adapter, model, images, request)
        found = artefact.write(out, plain, images, expected, about, source=model)
    _say(
        Console(),
        f"{out}: {decimal(out.stat().st_size)}, {adapter.method} on {model.spec}. Run on {found.images} images, {found.equal} "
        f"predictions are the adapter's; logits differ by up to {found.difference:.1e} ({found.allowed:.1e} is allowed).",
    )
    return 0


# ---------------------------------------------------------------------- table, diff, plot, list, download


def _table(arguments: argparse.Namespace) -> int:
    import tta
    from tta import benchmark
    from tta.results import BrokenResultWarning, find_results

    with usage_errors(), warnings.catch_warnings(record=True) as left_out:
        warnings.simplefilter("always", BrokenResultWarning)
        is_benchmark = len(arguments.folders) == 1 and (arguments.folders[0] / benchmark.DESCRIPTION).is_file()
        if is_benchmark:
            table: ResultTable = benchmark.table(arguments.folders[0])
            cells = sorted(arguments.folders[0].glob("*/[!.]*/result.json"))  # there may be none yet
            results = find_results(cells, on_error="skip")
        else:
            results = find_results(arguments.folders, on_error="skip")
            table = tta.compare(results, metrics=arguments.metrics)
        if arguments.format == "html":
            from tta.report.page import html_page

            print(html_page(table, results, title=arguments.folders[0].resolve().name), end="")
        else:
            _print_table(table, arguments.format)
    for warning in left_out:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    return 1 if any(issubclass(warning.category, BrokenResultWarning) for warning in left_out) else 0


def _diff(arguments: argparse.Namespace) -> int:
    from tta.results import Result, differences, published

    one, other = map(str, arguments.results)
    prefix, _, name = other.partition(":")
    with usage_errors():
        if prefix == "published":
            found = published.differences(Result.load(one), name)
        else:
            found = differences(Result.load(one), Result.load(other))
    if not found:
        print("The two results agree in every field.")
        return 0
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in ("field", *map(str, arguments.results)):
        table.add_column(Text(plain(heading)), overflow="fold")
    for name, values in found.items():
        shown = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]
        table.add_row(*(Text(plain(text)) for text in (name, *shown)))
    Console().print(table)
    return 0


def _plot(arguments: argparse.Namespace) -> int:
    from tta.report import figures
    from tta.report import schedule as plots
    from tta.results import find_results

    known = ["schedule", *figures.FIGURES]
    out = arguments.out or Path(f"{arguments.what}.png")
    with usage_errors():
        if arguments.what not in known:
            near = config.nearest(arguments.what, known)
            raise config.ConfigError(f"No figure '{arguments.what}'.{near} There are: {', '.join(known)}.")
    with places.tried(out, is_file=True), usage_errors():
        if arguments.what == "schedule":
            figure = plots.schedule(runs.make_stream(parse_request(arguments.words)))
        else:
            draw = figures.FIGURES[arguments.what]
            folders, settings = _plot_words(arguments.words, draw)
            figure = draw(find_results(folders), **settings)
        plots.save(figure, out)
    print(plain(str(out)))
    return 0


def _plot_words(words: Sequence[str], draw: Callable[..., Any]) -> tuple[list[str], dict[str, Any]]:
    """Folders and settings of a figure among the words; names of folders may hold an equals sign, too."""
    settings = [word for word in words if "=" in word and not Path(word).exists()]
    found = key_values(settings)
    known = [name for name, one in inspect.signature(draw).parameters.items() if one.kind is one.KEYWORD_ONLY]
    for key in found:
        if key not in known:
            there = f"There are: {', '.join(known)}." if known else "It has none."
            raise UsageError(f"Figure '{draw.__name__}' has no setting '{key}'.{config.nearest(key, known)} {there}")
    return [word for word in words if word not in settings], found


def _list(arguments: argparse.Namespace) -> int:
    _print_lines(listings.LISTINGS[arguments.what]())
    if note := listings.NOTES.get(arguments.what):
        _say(Console(), note)
    return 0


def _print_lines(lines: Iterable[tuple[str, ...]]) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for line in lines:
        table.add_row(*(Text(plain(text, lines=True)) for text in line))
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
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars, usage_errors():
        tasks: dict[str, TaskID] = {}

        def progress(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(escape(plain(what)))
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
        print(plain(f"{path} {checksum}"))
    return 0


def _extent(archive: "Archive") -> str:
    """Size and parts of a published data set."""
    size = sum(file.size or 0 for file in archive.files)
    parts = f" ({' '.join(archive.parts)})" if archive.parts else ""
    return f"{decimal(size)}{parts}" if size else "?"


ACTIONS: dict[str, Callable[[argparse.Namespace], int]] = {
    "run": _run,
    "bench": _bench,
    "tune": _tune,
    "source": _source,
    "train": _train,
    "corrupt": _corrupt,
    "table": _table,
    "diff": _diff,
    "plot": _plot,
    "serve": _serve,
    "demo": _demo,
    "export": _export,
    "download": _download,
    "list": _list,
}
