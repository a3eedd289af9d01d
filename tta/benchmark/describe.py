"""Benchmarks: a description in YAML becomes a grid of cells, the cells are run wherever there is room, a table sums them up."""

import copy
import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tta import config
from tta.benchmark import cells, workers
from tta.benchmark.cells import OF_MODEL, Cell, Outcome
from tta.benchmark.selection import WAYS, Candidate, Entry
from tta.benchmark.summary import Summary, summarise
from tta.results import Result

FOLDER = "benchmark"  # of configs/
DESCRIPTION = "benchmark.yaml"
CELLS = "cells"
EPISODIC = "episodic-oracle"
COLUMNS = ("domain", "stream", "mean")
ORDERS = ("given", "error")
OF_STREAM = "stream."  # before a key of a method's settings that is one of its stream's
AXES = ("methods", "streams", "models", "protocols")
Report = Callable[[Cell, Outcome, int, int], None]


@dataclass
class Benchmark:
    """A grid of runs: methods x models x streams x protocols x presets x seeds, and hyper-parameters where a grid is given.

    The four axes that are dictionaries have names as keys and settings as values; in YAML a list of names will do.

    Attributes:
        name: of it, and of its folder; left out, that of the file.
        about: a line on what it is.
        methods: with the hyper-parameters of each, over its preset. ``stream.samples`` and the like are settings of the
            stream for this method alone, ``stream.batch_size`` too: what is dear is given fewer images.
        streams: with the settings of each.
        models: specs of source models, with ``checkpoint``, ``num_classes``, ``mean`` and ``std`` where one needs them; left
            out, the stream's own.
        protocols: with the parameters of each; left out, ``continual``.
        seeds: of the streams.
        presets: a method without the preset runs with its defaults; ``null`` is the one of the stream's name.
        grid: lists of values by hyper-parameter, for every method that has it; under a method's name for it alone.
        select: ways of selection (see :mod:`tta.benchmark.selection`); none: each point of the grid has a row of its own.
        oracle_steps: steps a batch that ``episodic-oracle`` selects from.
        columns: of the table: ``"domain"``, ``"stream"`` with the mean error of each, or ``"mean"`` alone; left out,
            domains of one stream, and of several the streams.
        metrics: columns behind the errors, by their names in :attr:`tta.Result.metrics`, and ``samples``.
        order: of the lines of the table: as ``"given"``, or by the mean ``"error"``.
        published: name of a published table to compare with.
        checkpoint: weights of the source models that name none.
        source: file or folder of source knowledge.
        batch_size: samples a batch; left out, the stream's own.
        reset: as in :func:`tta.evaluate`; left out, the protocol's.
        precision: as in :func:`tta.evaluate`.
        clean: measure the error on the source domain too, before and after each run.
        accelerator: as in :func:`tta.evaluate`.
        num_workers: processes that read ahead, for each cell.
    """

    name: str = ""
    about: str = ""
    methods: dict[str, Any] = field(default_factory=dict)
    streams: dict[str, Any] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    protocols: dict[str, Any] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    presets: list[Any] = field(default_factory=lambda: [None])
    grid: dict[str, Any] = field(default_factory=dict)
    select: list[str] = field(default_factory=list)
    oracle_steps: int = 10
    columns: str | None = None
    metrics: list[str] = field(default_factory=list)
    order: str = "given"
    published: str | None = None
    checkpoint: str | None = None
    source: str | None = None
    batch_size: int | None = None
    reset: str | None = None
    precision: str = "32-true"
    clean: bool = False
    accelerator: str = "auto"
    num_workers: int = 0


def available() -> dict[str, str]:
    """The benchmarks that come with the toolkit, each with what it is in a line."""
    return {name: str(config.load(FOLDER, name).get("about", "")) for name in config.names(FOLDER)}


def load(what: str | Path | Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Benchmark:
    """A benchmark by name, from a file or a dictionary, with some of its settings replaced; checked by name and type.

    Args:
        what: a name of :func:`available`, a YAML file, or what stands in one.
        settings: fields of :class:`Benchmark` by name. With a dot they reach further: ``stream.samples`` into all
            streams, ``protocol.delta`` into all protocols, ``tent.lr`` into one method, ``grid.lr`` into the grid.

    Raises:
        ConfigError: an unknown benchmark, method, stream, protocol, model, way or key; the nearest is offered.
    """
    found = {key: _named(value) if key in AXES else value for key, value in _described(what).items()}
    found["protocols"] = found.get("protocols") or {"continual": {}}
    for key, value in (settings or {}).items():
        _replace(found, key, value)
    benchmark = config.build(Benchmark, found)
    _check(benchmark)
    return benchmark


def _described(what: str | Path | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(what, Mapping):
        return {"name": "benchmark", **copy.deepcopy(dict(what))}
    file = Path(what)
    if file.suffix not in (".yaml", ".yml"):
        found = config.load(FOLDER, str(what))
        if not found:
            known = config.names(FOLDER)
            raise config.ConfigError(
                f"No benchmark '{what}'.{config.nearest(str(what), known)} There are: {', '.join(known)}; a file of your "
                "own ends in .yaml."
            )
        return {"name": str(what), **found}
    if not file.is_file():
        raise config.ConfigError(f"There is no file '{file}'.")
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise config.ConfigError(f"'{file}' describes no benchmark: expected keys such as methods and streams.")
    return {"name": file.stem, **found}


def _named(value: Any) -> dict[str, Any]:
    """An axis as names with their settings: ``[a, b]`` and ``{a: , b: {}}`` say the same."""
    if isinstance(value, Mapping):
        return {str(name): dict(settings or {}) for name, settings in value.items()}
    return {str(name): {} for name in ([value] if isinstance(value, str) else value)}


def _replace(described: dict[str, Any], key: str, value: Any) -> None:
    owner, dot, name = key.partition(".")
    known = [item.name for item in dataclasses.fields(Benchmark)]
    if not dot:
        if key not in known:
            raise config.ConfigError(
                f"A benchmark has no key '{key}'.{config.nearest(key, known)} There are: {', '.join(known)}."
            )
        described[key] = _named(value) if key in AXES else value
    elif owner in ("stream", "protocol"):
        for settings in described.get(f"{owner}s", {}).values():
            settings[name] = value
    elif owner == "grid":
        method, dot, inner = name.partition(".")
        grid = described.setdefault("grid", {})
        (grid.setdefault(method, {}) if dot else grid)[inner if dot else name] = value
    elif owner in described.get("methods", {}):
        described["methods"][owner][name] = value
    else:
        owners = ["stream", "protocol", "grid", *described.get("methods", {})]
        raise config.ConfigError(
            f"'{key}': '{owner}' is not in this benchmark.{config.nearest(owner, owners)} There are: {', '.join(owners)}."
        )


def _check(benchmark: Benchmark) -> None:
    """Refuse names that there are not, before anything runs; values are checked with the cells."""
    from tta import methods, models
    from tta.adapter import config_class
    from tta.datasets import catalog

    if not (benchmark.methods and benchmark.streams and benchmark.seeds):
        raise config.ConfigError("A benchmark needs methods, streams and seeds; one of them is empty.")
    own = [spec for spec in benchmark.models if ":" not in spec]
    _known("model", own, models.list_models())
    _known("stream", benchmark.streams, catalog.STREAMS)
    _known("protocol", benchmark.protocols, catalog.PROTOCOLS)
    _known("way of selection", benchmark.select, WAYS)
    _known("columns", [benchmark.columns] if benchmark.columns else [], COLUMNS)
    _known("order", [benchmark.order], ORDERS)
    for spec, settings in benchmark.models.items():
        _known(f"setting of model '{spec}'", settings, OF_MODEL)
    own_settings = {key for settings in benchmark.methods.values() for key in _apart(settings)[1]}
    for stream, protocol in itertools.product(benchmark.streams, benchmark.protocols):
        given = {**benchmark.streams[stream], **benchmark.protocols[protocol]}
        known = catalog.stream_settings(stream, protocol)
        _known(f"setting of stream '{stream}', protocol '{protocol}':", given, known)
        _known(f"setting of stream '{stream}' for one method:", own_settings, [*known, "batch_size"])
    keys = {
        name: [item.name for item in dataclasses.fields(config_class(methods.find(name)))] for name in benchmark.methods
    }  # type: ignore[arg-type]
    _known("method or hyper-parameter", benchmark.grid, [*keys, *(key for names in keys.values() for key in names)])
    for preset in benchmark.presets:
        if preset is not None and not any(preset in config.load("method", name) for name in benchmark.methods):
            raise config.ConfigError(f"None of {', '.join(benchmark.methods)} has a preset '{preset}'.")


def _apart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A method's settings: its hyper-parameters, and what its stream is to be."""
    hparams = {key: value for key, value in settings.items() if not key.startswith(OF_STREAM)}
    return hparams, {key.removeprefix(OF_STREAM): settings[key] for key in settings.keys() - hparams.keys()}


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in given:
        if name not in known:
            raise config.ConfigError(f"No {what} '{name}'.{config.nearest(name, known)} There are: {', '.join(known)}.")


# ---------------------------------------------------------------------- from the description to cells


def entries(benchmark: Benchmark) -> list[Entry]:
    """The rows of the benchmark's table, each with its cells.

    Raises:
        ConfigError: a hyper-parameter that does not fit its type, or a stream without validation corruptions.
    """
    rows: list[Entry] = []
    models: Sequence[str | None] = list(benchmark.models) or [None]
    ways: Sequence[str | None] = benchmark.select or [None]
    for stream, model, preset, way in itertools.product(benchmark.streams, models, benchmark.presets, ways):
        for protocol in ["episodic"] if way == EPISODIC else benchmark.protocols:
            place = {"stream": stream, "protocol": protocol, "model": model, "preset": preset}
            for method in benchmark.methods:
                points = list(_points(benchmark, method, way))
                found = [_candidate(benchmark, method, place, point, way, len(points) > 1) for point in points]
                groups = [found] if way else [[candidate] for candidate in found]
                rows += [Entry(method=method, place=place, way=way, candidates=tuple(group)) for group in groups]
    return rows


def _points(benchmark: Benchmark, method: str, way: str | None) -> Iterator[dict[str, Any]]:
    """The points of a method's grid; a single empty one where it has none."""
    from tta import methods
    from tta.adapter import config_class

    keys = [item.name for item in dataclasses.fields(config_class(methods.find(method)))]  # type: ignore[arg-type]
    grid: Mapping[str, Any] = benchmark.grid or (WAYS[way].grid if way else {})
    axes = {**{key: values for key, values in grid.items() if key in keys}, **grid.get(method, {})}
    if way == EPISODIC:
        axes.pop("steps", None)  # it chooses among the steps itself
    for key, values in axes.items():
        if not isinstance(values, (list, tuple)) or not values:
            raise config.ConfigError(f"grid: expected a list of values for '{key}'; got {values!r}.")
    for values in itertools.product(*axes.values()):
        yield dict(zip(axes, values, strict=True))


def _candidate(
    benchmark: Benchmark,
    method: str,
    place: Mapping[str, Any],
    point: Mapping[str, Any],
    way: str | None,
    has_rivals: bool,
) -> Candidate:
    from tta import methods
    from tta.adapter import config_class
    from tta.datasets import catalog
    from tta.datasets.corruptions import VALIDATION_CORRUPTIONS

    kind = config_class(methods.find(method))
    hparams, own = _apart(benchmark.methods[method])
    settings = {**hparams, **point}
    by_steps = way == EPISODIC and "steps" in {item.name for item in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if by_steps:
        settings["steps"] = 1
    told = config.as_dict(config.build(kind, settings))  # "1e-3", as YAML reads it, becomes a number
    stream, protocol, model = place["stream"], place["protocol"], place["model"]
    batch_size = own.pop("batch_size", benchmark.batch_size)
    cell = Cell(
        method=method,
        hparams={key: told[key] for key in settings},
        stream=stream,
        stream_settings={**benchmark.streams[stream], **benchmark.protocols.get(protocol, {}), **own},
        protocol=protocol,
        model=model,
        **{"checkpoint": benchmark.checkpoint, **benchmark.models.get(model, {})},
        preset=place["preset"] if place["preset"] in config.load("method", method.rpartition(":")[2]) else None,
        source=benchmark.source,
        batch_size=batch_size,
        reset=benchmark.reset,
        precision=benchmark.precision,
        clean=benchmark.clean,
        oracle_steps=benchmark.oracle_steps if by_steps else 0,
        consistency=has_rivals and way != EPISODIC and "consistency" in benchmark.select,
        accelerator=benchmark.accelerator,
        num_workers=benchmark.num_workers,
    )
    tuning = cell
    if has_rivals and way is not None and WAYS[way].tuned_on == "validation":
        if "corruptions" not in catalog.stream_settings(stream, protocol):
            raise config.ConfigError(
                f"Stream '{stream}' has no corruptions to choose: '{way}' cannot tune on the four spare ones."
            )
        spare = {**cell.stream_settings, "corruptions": list(VALIDATION_CORRUPTIONS)}
        tuning = dataclasses.replace(cell, stream_settings=spare, consistency=False)
    return Candidate(
        settings=point, cells=_over_seeds(cell, benchmark.seeds), tuning=_over_seeds(tuning, benchmark.seeds)
    )


def _over_seeds(cell: Cell, seeds: Iterable[int]) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(cell, seed=seed) for seed in seeds)


def in_order(rows: Iterable[Entry]) -> list[Cell]:
    """The cells of the entries, each once; those on one stream follow one another, so that its images are made once."""
    found = {cell.name: cell for row in rows for cell in row.cells}
    streams: dict[str, list[Cell]] = {}
    for cell in found.values():
        told = [cell.stream, cell.protocol, cell.seed, cell.batch_size, sorted(cell.stream_settings.items())]
        streams.setdefault(repr(told), []).append(cell)
    return [cell for group in streams.values() for cell in group]


# ---------------------------------------------------------------------- running


def bench(
    what: str | Path | Mapping[str, Any],
    *,
    out: str | Path | None = None,
    jobs: int = 1,
    ray: str | None = None,
    report: Report | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Summary:
    """Run a benchmark and sum it up. Stopped at any moment, it goes on where it was: what is finished is not run again.

    Args:
        what: a name of ``tta list benchmarks``, a YAML file, or a dictionary with the fields of :class:`Benchmark`.
        out: folder of the cells; left out, ``runs/NAME``. Several benchmarks may share one.
        jobs: processes of this machine. With more than one, a script of yours needs ``if __name__ == "__main__":``.
        ray: address of a Ray cluster, ``"auto"``, or ``"local"``; needs the extra ``ray``.
        report: called with each cell that is done, its outcome, how many are done and how many there are.
        settings: replaced in the description, see :func:`load`: ``{"seeds": [0], "stream.samples": 100}``.

    Returns:
        The table, in which a cell that failed stands with its reason; it is tried again the next time.

    Raises:
        ConfigError: a description with unknown names or values that do not fit, or ``jobs`` together with ``ray``.
        ImportError: Ray is asked for and not installed.

    Example:
        >>> import tta
        >>> tta.bench({"methods": ["source", "norm"], "streams": {"digits-c": {"samples": 20}}})  # doctest: +SKIP
    """
    benchmark = load(what, settings)
    return run(benchmark, entries(benchmark), out or Path("runs") / benchmark.name, jobs=jobs, ray=ray, report=report)


def run(
    benchmark: Benchmark,
    rows: Sequence[Entry],
    out: str | Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    report: Report | None = None,
) -> Summary:
    """Run what is left of a benchmark's entries and sum all of them up; arguments are those of :func:`bench`."""
    if jobs < 1 or (ray and jobs > 1):
        raise config.ConfigError(f"jobs is 1 or more, and on a cluster Ray decides; got jobs={jobs}, ray={ray!r}.")
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(dataclasses.asdict(benchmark), sort_keys=False)
    (folder / DESCRIPTION).write_text(text, encoding="utf-8")
    todo = in_order(rows)
    found = {cell.name: cells.read(folder / CELLS, cell) for cell in todo}
    outcomes: dict[str, Outcome] = {name: outcome for name, outcome in found.items() if isinstance(outcome, Result)}
    left = [cell for cell in todo if cell.name not in outcomes]
    if ray:
        done = workers.over_ray(cells.run_cell, left, ray)
    elif jobs > 1 and len(left) > 1:
        done = workers.in_processes(cells.run_cell, left, jobs)
    else:
        done = workers.here(cells.run_cell, left)
    for cell, outcome in done:
        cells.write(folder / CELLS, cell, outcome)
        outcomes[cell.name] = outcome
        if report:
            report(cell, outcome, len(outcomes), len(todo))
    return _summary(benchmark, rows, outcomes)


def tune(what: str | Path | Mapping[str, Any], *, settings: Mapping[str, Any] | None = None, **options: Any) -> Summary:
    """Run a grid for each method and select from it in each of the ways of :mod:`tta.benchmark.selection`, labelled or not.

    Args:
        what: as in :func:`bench`; where it names no ways of its own, all of them.
        settings: as in :func:`bench`.
        options: ``out``, ``jobs``, ``ray`` and ``report`` as in :func:`bench`.
    """
    benchmark = load(what, settings)
    return bench({**dataclasses.asdict(benchmark), "select": benchmark.select or list(WAYS)}, **options)


def table(folder: str | Path) -> Summary:
    """The table of a benchmark on disk, as far as it got.

    Raises:
        ConfigError: the folder holds no benchmark.
    """
    benchmark = load(Path(folder) / DESCRIPTION)
    rows = entries(benchmark)
    found = {cell.name: cells.read(Path(folder) / CELLS, cell) for cell in in_order(rows)}
    outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
    return _summary(benchmark, rows, outcomes)


def _summary(benchmark: Benchmark, rows: Sequence[Entry], outcomes: Mapping[str, Outcome]) -> Summary:
    return summarise(
        rows,
        outcomes,
        columns=benchmark.columns,
        metrics=benchmark.metrics,
        by_error=benchmark.order == "error",
        published=benchmark.published,
    )
