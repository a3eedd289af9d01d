"""Comparisons: results side by side, with the score per domain (the error), the mean, and the difference to a baseline."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from rich.text import Text

from tta import tasks
from tta.messages import plain
from tta.report import tables
from tta.report.tables import BASELINE, MEAN, ResultTable
from tta.results import Interval, Result, compare_errors
from tta.tasks import Score

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run in a comparison.

    Attributes:
        label: the method, and the hyper-parameters in which it differs from other runs of the method.
        settings: those that differ between the compared runs (stream, seed, reset ...).
        result: the result of the run.
        difference: its mean score minus the baseline's, in the score's unit; None for the baseline itself or without one.
        interval: of that difference; None without predictions.
    """

    label: str
    settings: Mapping[str, str]
    result: Result
    difference: float | None
    interval: Interval | None

    def versus(self) -> str:
        """The difference with its interval: ``-12.3 [-13.1, -11.5]``."""
        if self.difference is None:
            return "-"
        shown = [self._signed(self.difference)]
        if self.interval is not None:
            shown.append(f"[{self._signed(self.interval.low)}, {self._signed(self.interval.high)}]")
        return " ".join(shown)

    def _signed(self, value: float) -> str:
        return tables.signed(value, tasks.find(self.result.task).shown)


@dataclass(frozen=True, kw_only=True)
class Group:
    """Runs on the same stream with the same seed and source model, whose errors may therefore be compared.

    Attributes:
        settings: those that all runs of the group share.
        domains: in stream order.
        runs: the baseline first.
    """

    settings: Mapping[str, str]
    domains: tuple[str, ...]
    runs: tuple[Run, ...]

    def best(self, column: str) -> str | None:
        """The best score in a column (the lowest error), as the tables show it; None with fewer than two runs."""
        values = [value for run in self.runs if (value := _score(run, column)) is not None]
        choose = max if self.score.direction == "up" else min
        shown = tasks.find(self.runs[0].result.task).shown
        return shown(choose(values)) if len(values) > 1 else None

    @property
    def score(self) -> Score:
        """The score of the first run: its name and direction are those of all."""
        return self.runs[0].result.score

    @property
    def unit(self) -> str:
        """Unit of the score, as it follows the name: `` in %``, or nothing."""
        unit = tasks.find(self.runs[0].result.task).unit
        return f" in {unit}" if unit else ""


@dataclass(frozen=True, kw_only=True)
class Comparison(ResultTable):
    """Runs side by side: score per domain, their mean, the difference to a baseline. Print it, or write it as a table.

    The score is the error of a classifier, the mIoU of maps, the MAE of regression (:attr:`tta.Result.score`).

    Runs on different streams, seeds or source models are kept apart: no number in it is an average over runs.

    Attributes:
        groups: runs that may be compared with one another.
        baseline: method or label that the others are compared with; None if it is not among the results.
        varying: names of the settings in which the runs differ.
        notes: remarks shown below the table.
        metrics: shown beside the errors, by their names in :attr:`tta.Result.metrics`.
    """

    groups: tuple[Group, ...]
    baseline: str | None
    varying: tuple[str, ...]
    notes: tuple[str, ...]
    metrics: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        """All runs, group by group."""
        return tuple(run for group in self.groups for run in group.runs)

    @property
    def domains(self) -> tuple[str, ...]:
        """All domains in stream order; those of later groups follow those of the first."""
        return tuple(dict.fromkeys(domain for group in self.groups for domain in group.domains))

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with unrounded numbers, one row per run: settings, method, domains, mean, difference, seconds."""
        import pandas  # takes half a second, and the terminal needs no pandas

        return pandas.DataFrame(self._records(), columns=self._header())

    def to_markdown(self) -> str:
        """A Markdown table, rows are methods; the best score of a column is bold."""
        align = (
            [":--"] * (len(self.varying) + 1)
            + ["--:"] * (len(self.domains) + 1)
            + [":--"] * (self.baseline is not None)
            + ["--:"] * len(self.metrics)
        )
        rows = [row for group in self.groups for row in self._rows(group, "**{}**".format, tables.markdown)]
        head = list(map(tables.markdown, self._short_header()))
        lines = [tables.markdown_row(row) for row in [head, align, *rows]]
        return "\n".join([*lines, "", *map(tables.markdown, self.notes)]).strip() + "\n"

    def to_html(self) -> str:
        """An HTML table, rows are methods; the best score of a column is bold.

        Varying settings that a group shares are in a row above it, the others below the method: as columns they would
        make the table wider than a page.
        """
        header = ["method", *tables.shortened(self.domains), MEAN, *self._versus_name(), *self.metrics]
        head = "".join(f"<th>{tables.html(name)}</th>" for name in header)
        parts = [f"<thead>\n<tr>{head}</tr>\n</thead>"]
        for group in self.groups:
            lines = []
            if shared := " · ".join(
                f"{name} {group.settings[name]}" for name in self.varying if name in group.settings
            ):
                lines.append(f'<tr class="group"><th colspan="{len(header)}">{tables.html(shared)}</th></tr>')
            for run, cells in zip(group.runs, self._cells(group, "<b>{}</b>".format), strict=True):
                method, *settings = map(tables.html, _heading(run, self.varying, group).splitlines())
                label = f"{method} <small>{' '.join(settings)}</small>" if settings else method
                whole = (
                    cell.replace(", ", ",&nbsp;") for cell in cells
                )  # a line may end before an interval, not in it
                lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (label, *whole)) + "</tr>")
            parts.append("\n".join(["<tbody>", *lines, "</tbody>"]))
        notes = "".join(f"<p>{tables.html(note)}</p>\n" for note in self.notes)
        table = "\n".join(['<table class="tta">', *parts, "</table>"])
        return f'<div class="wide">{table}</div>\n{notes}'

    def to_latex(self) -> str:
        """A LaTeX table for the package booktabs, rows are methods; the best score of a column is bold."""
        columns = "l" * (len(self.varying) + 1) + "r" * (len(self.domains) + 1) + "l" * (self.baseline is not None)
        columns += "r" * len(self.metrics)
        blocks = [
            "\n".join(tables.latex_row(row) for row in self._rows(group, "\\textbf{{{}}}".format, tables.latex))
            for group in self.groups
        ]
        return "\n".join(
            [
                *map(tables.latex_comment, self.notes),
                f"\\begin{{tabular}}{{{columns}}}",
                "\\toprule",
                tables.latex_row([tables.latex(name) for name in self._short_header()]),
                "\\midrule",
                "\n\\midrule\n".join(blocks),
                "\\bottomrule",
                "\\end{tabular}",
                "",
            ]
        )

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for group in self.groups:
            title = " · ".join(
                f"{name} {value}" if name != "stream" else value for name, value in group.settings.items()
            )
            yield tables.terminal(f"Online {group.score.name}{group.unit}: {title}", style="bold")
            yield from self._tables(group, options.max_width)
        for note in self.notes:
            yield tables.terminal(note, style="dim")

    def _tables(self, group: Group, width: int) -> Iterator[Table]:
        """One column per run, domains down; runs that do not fit side by side go into further tables."""
        names = [*group.domains, MEAN, *self._versus_name(), "seconds", *self.metrics]
        first = max(len(plain(name)) for name in names)
        room = width - first - 4
        heads = [_heading(run, self.varying, group) for run in group.runs]
        words = max(len(word) for head in heads for line in head.splitlines() for word in line.split())
        # The interval takes one, two or three lines: as few as let all runs stand side by side.
        sizes = sorted({max(size, min(words, 20)) for size in (8, 14, max(len(run.versus()) for run in group.runs))})
        fitting = [size for size in sizes if (size + 2) * len(group.runs) <= room]
        size = fitting[-1] if fitting else sizes[0]
        across = max(1, room // (size + 2))
        for start in range(0, len(group.runs), across):
            runs = group.runs[start : start + across]
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
            table.add_column("domain", no_wrap=True, width=first)
            for head in heads[start : start + across]:
                table.add_column(Text(head, justify="right"), justify="right", width=size, overflow="fold")
            for domain in group.domains:
                table.add_row(tables.terminal(domain), *(_cell(run, domain, group) for run in runs))
            table.add_section()
            table.add_row(Text(MEAN, style="bold"), *(_cell(run, MEAN, group) for run in runs))
            for name in self._versus_name():
                table.add_row(tables.terminal(name), *(Text(run.versus()) for run in runs))
            table.add_row("seconds", *(f"{run.result.seconds:.1f}" for run in runs))
            for name in self.metrics:
                table.add_row(tables.terminal(name), *(_metric(run.result, name) for run in runs))
            yield table

    def _versus_name(self) -> list[str]:
        return [f"vs {self.baseline}"] if self.baseline else []

    def _rows(self, group: Group, bold: Callable[[str], str], quote: Callable[[str], str]) -> Iterator[list[str]]:
        for run, cells in zip(group.runs, self._cells(group, bold), strict=True):
            yield [*map(quote, [*run.settings.values(), run.label]), *cells]

    def _cells(self, group: Group, bold: Callable[[str], str]) -> Iterator[list[str]]:
        """The cells of each run behind its settings and its label."""
        for run in group.runs:
            errors = [_shown(run, column, group, bold) for column in (*self.domains, MEAN)]
            metrics = [_metric(run.result, name) for name in self.metrics]
            yield [*errors, *([run.versus()] if self.baseline else []), *metrics]

    def _short_header(self) -> list[str]:
        return [*self.varying, "method", *tables.shortened(self.domains), MEAN, *self._versus_name(), *self.metrics]

    def _header(self) -> list[str]:
        interval = ["difference", "low", "high"] if self.baseline else []
        return [*self.varying, "method", *self.domains, MEAN, *interval, "seconds", *self.metrics]

    def _records(self) -> list[list[Any]]:
        records = []
        for run in self.runs:
            low, high = (run.interval.low, run.interval.high) if run.interval else (None, None)
            interval = [run.difference, low, high] if self.baseline else []
            errors = [_score(run, column) for column in (*self.domains, MEAN)]
            metrics = [run.result.metric(name) for name in self.metrics]
            records.append([*run.settings.values(), run.label, *errors, *interval, run.result.seconds, *metrics])
        return records


def compare(results: Iterable[Result], baseline: str | None = None, *, metrics: Sequence[str] = ()) -> Comparison:
    """Results side by side, each with its difference to a baseline and a paired bootstrap interval.

    A run is compared with the baseline's run on the same stream, seed and source model, over the images that both predicted
    (:func:`tta.results.intervals.compare_errors`); of several such runs, with the one whose other settings differ least.

    Args:
        results: made by :func:`tta.evaluate` or read by :func:`tta.results.find_results`.
        baseline: a method, or a run's label as the table shows it. Left out: ``source`` if it is among the results.
        metrics: shown beside the errors, by their names in :attr:`tta.Result.metrics`: ``"ece"``, ``"forwards_per_image"``,
            with dots ``"collapse.last.class_entropy"``.

    Raises:
        ValueError: no results, none of the baseline, or a metric that none of them has.
    """
    results = list(results)
    if not results:
        raise ValueError("Nothing to compare: got no results.")
    for name in metrics:
        if all(result.metric(name) is None for result in results):
            known = dict.fromkeys(key for result in results for key in _numbers(result))
            raise ValueError(f"No result has a metric '{name}'. There are: {', '.join(known) or 'none'}.")
    settings = [_settings(result) for result in results]
    names = dict.fromkeys(name for one in settings for name in one)
    varying = tuple(name for name in names if len({one.get(name) for one in settings}) > 1)
    labels = _labels(results, [tuple(one.get(name, "-") for name in varying) for one in settings])
    if baseline is None:
        baseline = BASELINE if any(result.method == BASELINE for result in results) else None
    elif not any(baseline in (result.method, label) for result, label in zip(results, labels, strict=True)):
        raise ValueError(f"No result of the baseline '{baseline}'. There are: {', '.join(dict.fromkeys(labels))}.")

    members: dict[str, list[_Member]] = {}
    for result, label, one in zip(results, labels, settings, strict=True):
        is_base = baseline in (result.method, label)
        members.setdefault(_comparable(result), []).append(_Member(result, label, one, is_base))
    groups, remarks = [], dict[str, None]()
    for of_group in members.values():
        group, said = _group(of_group, varying)
        groups.append(group)
        remarks |= dict.fromkeys(said)
    notes = [*_notes(baseline, [run for group in groups for run in group.runs], varying), *remarks]
    return Comparison(
        groups=tuple(groups), baseline=baseline, varying=varying, notes=tuple(notes), metrics=tuple(metrics)
    )


class _Member(NamedTuple):
    """A result on its way into a group."""

    result: Result
    label: str
    settings: Mapping[str, str]
    is_base: bool


def _group(members: Sequence[_Member], varying: Sequence[str]) -> tuple[Group, list[str]]:
    """Comparable results as a group, the baseline first, and the remarks that its table needs."""
    bases = [member for member in members if member.is_base]
    runs, remarks = [], []
    for member in sorted(members, key=lambda member: not member.is_base):
        difference, interval, remark = None, None, None
        if bases and not member.is_base:
            nearest = min(bases, key=lambda base: _distance(base.settings, member.settings))
            difference, interval, remark = _difference(nearest.result, member.result)
        if remark:
            remarks.append(remark)
        shown = {name: member.settings.get(name, "-") for name in varying}
        run = Run(label=member.label, settings=shown, result=member.result, difference=difference, interval=interval)
        runs.append(run)
    first = members[0].settings
    shared = {name: value for name, value in first.items() if all(m.settings.get(name) == value for m in members)}
    domains = tuple(dict.fromkeys(row.domain for run in runs for row in run.result.rows))
    if any(len(run.result.rows) < len(domains) for run in runs):
        remarks.append("The domains differ between runs: each mean is over the run's own.")
    return Group(settings=shared, domains=domains, runs=tuple(runs)), remarks


# ---------------------------------------------------------------------- settings, labels, differences


def _settings(result: Result) -> dict[str, str]:
    """Settings of a run that the table names beside its method, as far as they are in its manifest."""
    data, model = _part(result.manifest, "data"), _part(result.manifest, "model")
    found = {
        "stream": result.stream,
        **_stream_settings(result),
        "seed": result.seed,
        "reset": result.reset,
        "protocol": data.get("protocol"),
        "batch_size": data.get("batch_size"),
        "model": model.get("spec"),
        "weights": str(model["weights"])[:8] if model.get("weights") else None,
        "precision": result.manifest.get("precision"),
    }
    return {name: str(value) for name, value in found.items() if isinstance(value, (str, int, float))}


def _stream_settings(result: Result) -> dict[str, Any]:
    """Settings of the stream, without the folder of its files, which makes no difference."""
    settings = _part(_part(result.manifest, "data"), "settings")
    return {name: value for name, value in settings.items() if name != "root"}


def _part(manifest: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = manifest.get(name)
    return part if isinstance(part, Mapping) else {}


def _comparable(result: Result) -> str:
    """A key that is equal for results whose errors may be compared."""
    settings = _settings(result)
    images = {name: settings.get(name) for name in (*_stream_settings(result), "stream", "seed")}
    source = {name: settings.get(name) for name in ("model", "weights")}
    return json.dumps([images, source, *([] if result.task == "classification" else [result.task])], sort_keys=True)


def _distance(a: Mapping[str, str], b: Mapping[str, str]) -> int:
    return sum(a.get(name) != b.get(name) for name in {*a, *b})


def _labels(results: Sequence[Result], places: Sequence[tuple[str, ...]]) -> list[str]:
    """The method, the hyper-parameters in which its runs differ, and a number if runs still have the same label."""
    labels: list[str] = []
    seen: dict[tuple[Any, ...], int] = {}
    for result, place in zip(results, places, strict=True):
        configs = [other.config for other in results if other.method == result.method]
        keys = dict.fromkeys(key for config in configs for key in config)
        differing = [k for k in keys if len({json.dumps(c.get(k), sort_keys=True) for c in configs}) > 1]
        guarded = ["guarded"] * ("guard" in result.manifest)
        words = [result.method, *guarded, *(f"{key}={result.config[key]}" for key in differing if key in result.config)]
        key = (place, *words)
        number = seen[key] = seen.get(key, 0) + 1
        labels.append(" ".join(words + [f"({number})"] * (number > 1)))
    return labels


def _difference(base: Result, other: Result) -> tuple[float | None, Interval | None, str | None]:
    """Difference of the mean scores, its interval, and a remark on them."""
    if base.task == other.task == "detection" and base.errors.keys() == other.errors.keys():
        return other.score.value - base.score.value, None, "No interval of mAP, which is no mean over images."
    if base.predictions is None or other.predictions is None:
        if base.errors.keys() != other.errors.keys():
            return None, None, "No difference where a run has other domains and its predictions are not at hand."
        return other.score.value - base.score.value, None, "No interval where predictions are not at hand."
    try:
        interval = compare_errors(base, other)
    except ValueError as error:
        return None, None, f"No difference for {other.method}: {error}"
    partial = abs(interval.estimate - (other.score.value - base.score.value)) > 1e-6
    remark = f"{other.method}: the difference is over the images that both runs predicted." if partial else None
    return interval.estimate, interval, remark


def _notes(baseline: str | None, runs: Sequence[Run], varying: Sequence[str]) -> Iterator[str]:
    if any(run.interval for run in runs):
        names = " or ".join(dict.fromkeys(run.result.score.name for run in runs))
        points = " in percentage points" if all(tasks.find(run.result.task).unit == "%" for run in runs) else ""
        yield f"vs {baseline}: difference of the mean {names}{points} [95 % interval, paired bootstrap over images]."
    if any(run.result.task == "segmentation" for run in runs):
        yield "mIoU: higher is better; summed over the images of a domain, void pixels left out; the mean is over domains."
    if varying:
        values = {name: dict.fromkeys(run.settings[name] for run in runs) for name in varying}
        listed = "; ".join(f"{name} ({', '.join(found)})" for name, found in values.items())
        yield f"Settings differ between runs: {listed}. No number is an average over runs."
    for run in runs:
        if count := run.result.skipped_updates:
            yield f"{run.label}: {count} updates skipped, their loss or gradient was not finite."


# ---------------------------------------------------------------------- cells


def _score(run: Run, column: str) -> float | None:
    """The score in a column (a domain or the mean); None if there is none."""
    value = run.result.score.value if column == MEAN else run.result.scores.get(column)
    return value if value is not None and value == value else None


def _shown(run: Run, column: str, group: Group, bold: Callable[[str], str]) -> str:
    value = _score(run, column)
    text = "-" if value is None else tasks.find(run.result.task).shown(value)
    # Rounded numbers are compared: of two that look equal, one in bold would look like a mistake.
    return bold(text) if value is not None and text == group.best(column) else text


def _cell(run: Run, column: str, group: Group) -> Text:
    return Text.from_markup(_shown(run, column, group, "[bold]{}[/]".format))


def _numbers(result: Result) -> list[str]:
    return [name for name in result.metrics if result.metric(name) is not None]


def _metric(result: Result, name: str) -> str:
    value = result.metric(name)
    return "-" if value is None else tables.measured(value)


def _heading(run: Run, varying: Sequence[str], group: Group) -> str:
    """The label with one setting per line; settings that the whole group shares are in the title instead."""
    method, *config = plain(run.label).split(" ")
    own = [plain(f"{name}={run.settings[name]}") for name in varying if name not in group.settings]
    return "\n".join([method, *config, *own])
