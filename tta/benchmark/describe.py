"""Descriptions of benchmarks: YAML becomes a grid of cells, which are run and summed up in a table."""

import copy
import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from tta import config, places
from tta.benchmark import cells, claims, workers
from tta.benchmark.cells import Cell, Outcome
from tta.benchmark.selection import WAYS, Candidate, TableRow
from tta.benchmark.settings import OF_MODEL, SHARED, SharedSettings, as_arguments
from tta.benchmark.summary import Summary, summarise
from tta.results import Result

if TYPE_CHECKING:
    from tta.adapter import Config

FOLDER = "benchmark"  # in configs/
DESCRIPTION = "benchmark.yaml"
CELLS = "cells"
EPISODIC = "episodic-oracle"
COLUMNS = ("domain", "stream", "mean")
ORDERS = ("given", "error")
STREAM_PREFIX = "stream."  # marks the settings of a method that are for its stream
AXES = ("methods", "streams", "models", "protocols")
Report = Callable[[Cell, Outcome, int, int], None]


@dataclass(frozen=True)
class Benchmark(SharedSettings):
    """A grid of runs: methods x models x streams x protocols x presets x seeds, and hyper-parameters where a grid is given.

    The four axes that are dictionaries have names as keys and settings as values; in YAML a list of names will do. The
    settings that all runs share are those of :class:`tta.benchmark.settings.SharedSettings`.

    Attributes:
        name: its name and that of its folder; left out, the name of the file.
        about: its description in one line.
        methods: with the hyper-parameters of each, over its preset. ``stream.samples``, ``stream.batch_size`` and the like
            are settings of the stream for this method alone, so that a slow method may be given fewer images.
        streams: with the settings of each.
        models: specs of source models, with ``checkpoint``, ``num_classes``, ``mean`` and ``std`` where one needs them; left
            out, the stream's own.
        protocols: with the parameters of each; left out, ``continual``.
        seeds: seeds of the streams.
        presets: a method without the preset runs with its defaults; ``null`` is the preset with the stream's name.
        grid: lists of values by hyper-parameter, for every method that has it; under a method's name for that method alone.
        select: ways of selection (see :mod:`tta.benchmark.selection`); without any, each point of the grid has a row of its own.
        oracle_steps: number of steps per batch that ``episodic-oracle`` selects from.
        columns: columns of the table: ``"domain"``, ``"stream"`` with the mean error of each, or ``"mean"`` alone; left out,
            the domains of a single stream, or the streams where there are several.
        metrics: columns behind the errors, by their names in :attr:`tta.Result.metrics`, and ``samples``.
        order: order of the table's rows: as ``"given"``, or by the mean ``"error"``.
        published: name of a published table to compare with.
        resources: what a run takes of a machine of a Ray cluster: ``{CPU: 4, GPU: 0.5}``, ``memory`` in bytes, or a name
            that machines were started with. It changes no number, and without Ray it says nothing. Left out: one CPU and,
            unless ``accelerator`` is ``cpu``, one GPU where the cluster has any.
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
    resources: dict[str, Any] = field(default_factory=dict)


# Keys of a description in the order in which they are written: its name first. Dataclasses put inherited fields first.
KEYS = (*(item.name for item in dataclasses.fields(Benchmark) if item.name not in SHARED), *SHARED)


def available() -> dict[str, str]:
    """Names of the benchmarks that come with the toolkit, each with its description in one line."""
    return {name: str(config.load(FOLDER, name).get("about", "")) for name in config.names(FOLDER)}


def load(what: str | Path | Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Benchmark:
    """A benchmark by name, from a file or a dictionary, with some of its settings replaced; checked by name and type.

    Args:
        what: a name of :func:`available`, a YAML file, or its content as a dictionary.
        settings: fields of :class:`Benchmark` by name. Names with a dot reach inside: ``stream.samples`` into all
            streams, ``protocol.delta`` into all protocols, ``tent.lr`` into one method, ``grid.lr`` into the grid.

    Raises:
        ConfigError: an unknown benchmark, method, stream, protocol, model, way or key; the nearest is offered.
    """
    try:
        found = {key: _named(key, value or {}) if key in AXES else value for key, value in _described(what).items()}
        found["protocols"] = found.get("protocols") or {"continual": {}}
        for key, value in (settings or {}).items():
            _replace(found, key, value)
        benchmark = config.build(Benchmark, found)
        _check(benchmark)
    except config.ConfigError as error:
        if isinstance(what, Mapping) or not Path(what).is_file() or str(what) in str(error):
            raise
        raise config.ConfigError(f"'{what}': {error}") from None
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
        raise config.ConfigError(f"No file '{file}'.")
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise config.ConfigError(f"'{file}' cannot be read as YAML: {' '.join(str(error).split())}.") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise config.ConfigError(f"'{file}' does not describe a benchmark: expected keys such as methods and streams.")
    return {"name": file.stem, **found}


def _named(axis: str, value: Any) -> dict[str, Any]:
    """An axis as names with their settings: ``[a, b]`` and ``{a: , b: {}}`` mean the same."""
    if isinstance(value, Mapping) and all(isinstance(settings or {}, Mapping) for settings in value.values()):
        return {str(name): dict(settings or {}) for name, settings in value.items()}
    if value is None or not isinstance(value, (str, list, tuple)):
        raise config.ConfigError(f"{axis}: expected names, or names with the settings of each; got {value!r}.")
    return {str(name): {} for name in ([value] if isinstance(value, str) else value)}


def _replace(described: dict[str, Any], key: str, value: Any) -> None:
    owner, dot, name = key.partition(".")
    if not dot:
        if key not in KEYS:
            raise config.ConfigError(
                f"A benchmark has no key '{key}'.{config.nearest(key, KEYS)} There are: {', '.join(KEYS)}."
            )
        described[key] = _named(key, value) if key in AXES else value
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
    """Refuse unknown names before anything runs; values are checked when the cells are made."""
    from tta import models
    from tta.datasets import catalog
    from tta.datasets.protocols import PROTOCOLS

    if not (benchmark.methods and benchmark.streams and benchmark.seeds):
        raise config.ConfigError("A benchmark needs methods, streams and seeds; one of them is empty.")
    _check_resources(benchmark.resources)
    own = [spec for spec in benchmark.models if ":" not in spec]
    _known("model", own, models.list_models())
    _known("stream", benchmark.streams, catalog.STREAMS)
    _known("protocol", benchmark.protocols, PROTOCOLS)
    _known("way of selection", benchmark.select, WAYS)
    _known("columns", [benchmark.columns] if benchmark.columns else [], COLUMNS)
    _known("order", [benchmark.order], ORDERS)
    for spec, settings in benchmark.models.items():
        _known(f"setting of model '{spec}'", settings, OF_MODEL)
    own_settings = {key for settings in benchmark.methods.values() for key in _split(settings)[1]}
    for stream, protocol in itertools.product(benchmark.streams, benchmark.protocols):
        given = {**benchmark.streams[stream], **benchmark.protocols[protocol]}
        known = catalog.stream_settings(stream, protocol)
        _known(f"setting of stream '{stream}', protocol '{protocol}':", given, known)
        _known(f"setting of stream '{stream}' for one method:", own_settings, [*known, "batch_size"])
    hparams = [key for name in benchmark.methods for key in _hparams_of(name)]
    _known("method or hyper-parameter", benchmark.grid, [*benchmark.methods, *hparams])
    for preset in benchmark.presets:
        if preset is not None and not any(preset in config.load("method", name) for name in benchmark.methods):
            raise config.ConfigError(f"None of {', '.join(benchmark.methods)} has a preset '{preset}'.")


def _check_resources(resources: Mapping[str, Any]) -> None:
    for name, amount in resources.items():
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not is_number or not math.isfinite(amount) or amount < 0 or (amount > 1 and amount != int(amount)):
            raise config.ConfigError(
                f"resources: expected for '{name}' a number from 0, and above 1 a whole one; got {amount!r}. A run that shares a "
                "GPU with another takes GPU: 0.5."
            )


def _split(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split a method's settings into its hyper-parameters and the settings of its stream."""
    hparams = {key: value for key, value in settings.items() if not key.startswith(STREAM_PREFIX)}
    return hparams, {key.removeprefix(STREAM_PREFIX): settings[key] for key in settings.keys() - hparams.keys()}


def _config_of(method: str) -> "type[Config]":
    from tta import methods
    from tta.adapter import config_class

    return config_class(methods.find(method))


def _hparams_of(method: str) -> list[str]:
    """Names of the hyper-parameters of a method."""
    return [item.name for item in dataclasses.fields(_config_of(method))]


def _known(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    known = list(dict.fromkeys(known))
    for name in given:
        if name not in known:
            raise config.ConfigError(f"No {what} '{name}'.{config.nearest(name, known)} There are: {', '.join(known)}.")


# ---------------------------------------------------------------------- from the description to cells


def entries(benchmark: Benchmark) -> list[TableRow]:
    """The rows of the benchmark's table, each with its cells.

    Raises:
        ConfigError: a hyper-parameter that does not fit its type, or a stream without validation corruptions.
    """
    rows: list[TableRow] = []
    models: Sequence[str | None] = list(benchmark.models) or [None]
    ways: Sequence[str | None] = benchmark.select or [None]
    for stream, model, preset, way in itertools.product(benchmark.streams, models, benchmark.presets, ways):
        for protocol in ["episodic"] if way == EPISODIC else benchmark.protocols:
            place = {"stream": stream, "protocol": protocol, "model": model, "preset": preset}
            for method in benchmark.methods:
                points = list(_points(benchmark, method, way))
                found = [_candidate(benchmark, method, place, point, way, len(points) > 1) for point in points]
                groups = [found] if way else [[candidate] for candidate in found]
                rows += [TableRow(method=method, place=place, way=way, candidates=tuple(group)) for group in groups]
    return rows


def _points(benchmark: Benchmark, method: str, way: str | None) -> Iterator[dict[str, Any]]:
    """The points of a method's grid; a single empty point if it has no grid."""
    keys = _hparams_of(method)
    grid: Mapping[str, Any] = benchmark.grid or (WAYS[way].grid if way else {})
    axes = {**{key: values for key, values in grid.items() if key in keys}, **grid.get(method, {})}
    if way == EPISODIC:
        axes.pop("steps", None)  # selected by the run itself, for each batch
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
    """One point of a method's grid, with its cells over all seeds."""
    stream, protocol, model, preset = place["stream"], place["protocol"], place["model"], place["preset"]
    hparams, own = _split(benchmark.methods[method])
    settings = {**hparams, **point}
    by_steps = way == EPISODIC and "steps" in _hparams_of(method)
    if by_steps:
        settings["steps"] = 1
    checked = config.as_dict(config.build(_config_of(method), settings))  # "1e-3", as YAML reads it, becomes a number
    shared = as_arguments(benchmark, SHARED)
    shared |= benchmark.models.get(model, {})
    shared["batch_size"] = own.pop("batch_size", benchmark.batch_size)
    cell = Cell(
        method=method,
        hparams={key: checked[key] for key in settings},
        stream=stream,
        stream_settings={**benchmark.streams[stream], **benchmark.protocols.get(protocol, {}), **own},
        protocol=protocol,
        model=model,
        preset=preset if preset in config.load("method", method.rpartition(":")[2]) else None,
        oracle_steps=benchmark.oracle_steps if by_steps else 0,
        consistency=has_rivals and way != EPISODIC and "consistency" in benchmark.select,
        **shared,
    )
    tuning = cell
    if has_rivals and way is not None and WAYS[way].tuned_on == "validation":
        tuning = _validation_cell(cell, way)
    return Candidate(
        settings=point, cells=_over_seeds(cell, benchmark.seeds), tuning=_over_seeds(tuning, benchmark.seeds)
    )


def _validation_cell(cell: Cell, way: str) -> Cell:
    """The cell on the four validation corruptions instead of those of the test."""
    from tta.datasets import catalog
    from tta.datasets.corruptions import VALIDATION_CORRUPTIONS

    if "corruptions" not in catalog.stream_settings(cell.stream, cell.protocol):
        raise config.ConfigError(
            f"Stream '{cell.stream}' has no corruptions to choose: '{way}' cannot tune on the four spare ones."
        )
    spare = {**cell.stream_settings, "corruptions": list(VALIDATION_CORRUPTIONS)}
    return dataclasses.replace(cell, stream_settings=spare, consistency=False)


def _over_seeds(cell: Cell, seeds: Iterable[int]) -> tuple[Cell, ...]:
    return tuple(dataclasses.replace(cell, seed=seed) for seed in seeds)


def in_order(rows: Iterable[TableRow]) -> list[Cell]:
    """The cells of the rows, each once; those on one stream follow one another, so that its images are made once."""
    found = {cell.name: cell for row in rows for cell in row.cells}
    streams: dict[str, list[Cell]] = {}
    for cell in found.values():
        described = [cell.stream, cell.protocol, cell.seed, cell.batch_size, sorted(cell.stream_settings.items())]
        streams.setdefault(repr(described), []).append(cell)
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
    """Run a benchmark and sum it up. After an interruption, the same call runs only the cells that are not finished.

    Several processes on one folder share the work: each cell is run by one, and all give the whole table.

    Args:
        what: a name of ``tta list benchmarks``, a YAML file, or a dictionary with the fields of :class:`Benchmark`.
        out: folder of the cells; left out, ``runs/NAME``. Several benchmarks may share one.
        jobs: processes of this machine. With more than one, your script needs ``if __name__ == "__main__":``.
        ray: address of a Ray cluster, ``"auto"``, or ``"local"``; needs the extra ``ray``.
        report: called after each cell with the cell, its outcome, the number of finished cells and the number of all.
        settings: replaced in the description, see :func:`load`: ``{"seeds": [0], "stream.samples": 100}``.

    Returns:
        The table; it shows each failed cell with its reason. Failed cells are run again the next time.

    Raises:
        ConfigError: a description with unknown names or values that do not fit, ``jobs`` together with ``ray``, or
            no machine of the cluster has what a run takes.
        ImportError: Ray is asked for and not installed.
        OSError: nothing can be written to ``out``.

    Example:
        >>> import tta
        >>> tta.bench({"methods": ["source", "norm"], "streams": {"digits-c": {"samples": 20}}})  # doctest: +SKIP
    """
    benchmark = load(what, settings)
    return run(benchmark, entries(benchmark), out or Path("runs") / benchmark.name, jobs=jobs, ray=ray, report=report)


def run(
    benchmark: Benchmark,
    rows: Sequence[TableRow],
    out: str | Path,
    *,
    jobs: int = 1,
    ray: str | None = None,
    report: Report | None = None,
    say: Callable[[str], None] | None = None,
) -> Summary:
    """Run the unfinished cells of a benchmark's rows and sum up all rows; arguments are those of :func:`bench`.

    ``say`` is told if cells are run by another process on the same folder, which are waited for, or wait for a machine.
    """
    if jobs < 1 or (ray and jobs > 1):
        raise config.ConfigError(
            f"jobs is 1 or more, and 1 on a cluster, where Ray decides; got jobs={jobs}, ray={ray!r}."
        )
    folder = Path(out)
    described = dataclasses.asdict(benchmark)
    text = yaml.safe_dump({key: described[key] for key in KEYS}, sort_keys=False)
    with places.tried(folder):
        places.write(folder / DESCRIPTION, lambda file: file.write(text.encode()))
    todo = in_order(rows)
    found = {cell.name: cells.read(folder / CELLS, cell) for cell in todo}
    outcomes: dict[str, Outcome] = {name: outcome for name, outcome in found.items() if isinstance(outcome, Result)}
    left = [cell for cell in todo if cell.name not in outcomes]
    tell = say or (lambda _: None)

    def work(mine: Iterable[Cell]) -> Iterator[tuple[Cell, Outcome]]:
        if ray:
            no_gpu = {"GPU": 0} if benchmark.accelerator == "cpu" else {}
            return workers.over_ray(cells.run_cell, mine, ray, {**no_gpu, **benchmark.resources}, tell)
        if jobs > 1 and len(left) > 1:
            return workers.in_processes(cells.run_cell, mine, jobs)
        return workers.here(cells.run_cell, mine)

    for cell, outcome in claims.shared(left, folder / CELLS, work, tell):
        outcomes[cell.name] = outcome
        if report:
            report(cell, outcome, len(outcomes), len(todo))
    return _summary(benchmark, rows, outcomes)


def tune(what: str | Path | Mapping[str, Any], *, settings: Mapping[str, Any] | None = None, **options: Any) -> Summary:
    """Run a grid for each method and select hyper-parameters from it in the ways of :mod:`tta.benchmark.selection`.

    Args:
        what: as in :func:`bench`; if it names no ways of selection, all are used.
        settings: as in :func:`bench`.
        options: ``out``, ``jobs``, ``ray`` and ``report`` as in :func:`bench`.
    """
    benchmark = load(what, settings)
    return bench({**dataclasses.asdict(benchmark), "select": benchmark.select or list(WAYS)}, **options)


def table(folder: str | Path) -> Summary:
    """The table of a benchmark on disk, finished or not.

    Raises:
        ConfigError: the folder holds no benchmark.
    """
    benchmark = load(Path(folder) / DESCRIPTION)
    rows = entries(benchmark)
    found = {cell.name: cells.read(Path(folder) / CELLS, cell) for cell in in_order(rows)}
    outcomes = {name: outcome for name, outcome in found.items() if outcome is not None}
    return _summary(benchmark, rows, outcomes)


def _summary(benchmark: Benchmark, rows: Sequence[TableRow], outcomes: Mapping[str, Outcome]) -> Summary:
    return summarise(
        rows,
        outcomes,
        columns=benchmark.columns,
        metrics=benchmark.metrics,
        by_error=benchmark.order == "error",
        published=benchmark.published,
    )
