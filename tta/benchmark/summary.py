"""The table of a benchmark: mean and standard deviation over seeds, grouped by protocol and by way of selection."""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from tta import tasks
from tta.benchmark.cells import Cell, Failure, Outcome
from tta.benchmark.selection import WAYS, Candidate, TableRow, select
from tta.messages import plain
from tta.report import tables
from tta.report.tables import BASELINE, MEAN, ResultTable
from tta.results import Result
from tta.results import published as published_tables
from tta.tasks import Direction

if TYPE_CHECKING:
    import pandas

ORACLE = "oracle"
Style = Callable[[str], str]


@dataclass(frozen=True)
class Score:
    """A mean over seeds with its sample standard deviation; NaN for a single seed."""

    mean: float
    std: float
    seeds: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Score | None":
        """The score of one value per seed; None without any."""
        known = [value for value in values if not math.isnan(value)]
        if not known:
            return None
        std = statistics.stdev(known) if len(known) > 1 else math.nan
        return cls(statistics.fmean(known), std, len(known))

    def shown(self, write: Callable[[float], str] = tables.number, sign: str = " ± ") -> str:
        """The score as text: ``12.3 ± 0.4``."""
        return write(self.mean) + ("" if math.isnan(self.std) else f"{sign}{tables.number(self.std)}")


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line in a section of the table: a method, or one point of its grid.

    Attributes:
        method: its name.
        settings: hyper-parameters from the grid: those of this line, or those that were selected.
        is_oracle: whether test labels selected its hyper-parameters or steps.
        values: column -> seed -> error in percent (of maps, mIoU); the mean over columns is a column too.
        difference: mean minus the baseline's mean, over the seeds that both have; percentage points.
        published: published mean error, in percent.
        measured: further metrics by name, over seeds.
        problems: (cell, reason) for each cell without a result.
    """

    method: str
    settings: Mapping[str, Any]
    is_oracle: bool
    values: Mapping[str, Mapping[int, float]]
    difference: Score | None = None
    published: float | None = None
    measured: Mapping[str, Score] = field(default_factory=dict)
    problems: tuple[tuple[str, str], ...] = ()

    def score(self, column: str) -> Score | None:
        """The error in a column, over seeds."""
        return Score.of(self.values.get(column, {}).values())

    @property
    def words(self) -> str:
        """The settings in the command line's form: ``lr=0.001 steps=2``."""
        return " ".join(f"{key}={_plain(value)}" for key, value in self.settings.items())

    @property
    def versus_published(self) -> str:
        """The published mean and the difference to it: ``18.6 (+0.3)``."""
        if self.published is None:
            return "-"
        off = self.off_published
        return tables.number(self.published) + ("" if off is None else f" ({tables.signed(off)})")

    @property
    def off_published(self) -> float | None:
        """The mean minus the published mean, in percentage points; None if either is missing."""
        own = self.score(MEAN)
        return own.mean - self.published if own and self.published is not None else None


@dataclass(frozen=True, kw_only=True)
class Section:
    """Comparable lines: one protocol, one way of selection, one model, and one stream unless streams are the columns.

    Attributes:
        place: stream, protocol, model and preset, as far as all lines share them.
        way: name of the way of selection; None where nothing was selected.
        columns: domains or streams, without the mean.
        lines: one per method, or per point of its grid.
        metrics: names of the metrics shown behind the errors.
        measure: name of the score that the columns hold.
        direction: of it: ``"up"`` where more is better.
    """

    place: Mapping[str, str]
    way: str | None
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    metrics: tuple[str, ...] = ()
    measure: str = "error"
    direction: Direction = "down"

    @property
    def title(self) -> str:
        """The place and the way of selection, in words."""
        words = [value if name in ("stream", "protocol") else f"{name} {value}" for name, value in self.place.items()]
        if self.way:
            mark = f"{ORACLE}: " if WAYS[self.way].is_oracle else ""
            words.append(f"{self.way} ({mark}{WAYS[self.way].line})")
        return " · ".join(words)

    def ranks(self, column: str) -> tuple[str | None, str | None]:
        """The best and second best mean of a column, as shown: the lowest errors; None where there is none.

        Without a second line nothing is ranked; when the two best are shown equal, there is no second.
        """
        scores = sorted(
            (score.mean for line in self.lines if (score := line.score(column))), reverse=self.direction == "up"
        )
        if len(scores) < 2:
            return None, None
        first, second = map(tables.number, scores[:2])
        return first, None if first == second else second


@dataclass(frozen=True, kw_only=True)
class Summary(ResultTable):
    """A benchmark's table. Print it, or write it in one of the formats of :meth:`format`.

    Attributes:
        sections: lines grouped by stream, model, protocol, preset and way of selection.
        notes: remarks shown below the table.
    """

    sections: tuple[Section, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def lines(self) -> tuple[Line, ...]:
        """All lines, section by section."""
        return tuple(line for section in self.sections for line in section.lines)

    @property
    def problems(self) -> tuple[str, ...]:
        """Failed and missing cells, one sentence per reason."""
        cells: dict[str, dict[str, None]] = {}
        for line in self.lines:
            for cell, reason in line.problems:
                cells.setdefault(reason, {})[cell] = None
        return tuple(f"{reason}: {'; '.join(names)}." for reason, names in cells.items())

    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with unrounded numbers, one row per line: mean and standard deviation of each column."""
        import pandas

        records = []
        for section in self.sections:
            for line in section.lines:
                record: dict[str, Any] = {**section.place, "selection": section.way}
                record["labels"] = ORACLE if line.is_oracle else "" if section.way is None else WAYS[section.way].labels
                record |= {"method": line.method, "settings": line.words}
                for column in (*section.columns, MEAN):
                    score = line.score(column)
                    record[column] = score.mean if score else None
                    record[f"{column} std"] = score.std if score else None
                mean = line.score(MEAN)
                record["seeds"] = mean.seeds if mean else 0
                record[f"vs {BASELINE}"] = line.difference.mean if line.difference else None
                record["published"] = line.published
                record["vs published"] = line.off_published
                for name in section.metrics:
                    record[name] = line.measured[name].mean if name in line.measured else None
                record["problems"] = "; ".join(dict.fromkeys(reason for _, reason in line.problems))
                records.append(record)
        return pandas.DataFrame(records)

    def to_markdown(self) -> str:
        """One Markdown table per section, rows are methods; a column's best is bold, the second underlined."""
        blocks = []
        for section in self.sections:
            head = self._header(section)
            align = [":--" if name in ("method", "selected") else "--:" for name in head]
            rows = self._rows(section, "**{}**".format, "<u>{}</u>".format, tables.markdown, " ± ")
            lines = [tables.markdown_row(row) for row in [list(map(tables.markdown, head)), align, *rows]]
            blocks.append("\n".join([f"**{tables.markdown(section.title)}**", "", *lines]))
        return "\n\n".join([*blocks, *map(tables.markdown, self._remarks())]) + "\n"

    def to_latex(self) -> str:
        """One LaTeX table (booktabs) per section; a column's best is bold, the second underlined."""
        blocks = []
        for section in self.sections:
            head = self._header(section)
            columns = "".join("l" if name in ("method", "selected") else "r" for name in head)
            rows = self._rows(section, "\\textbf{{{}}}".format, "\\underline{{{}}}".format, tables.latex, " $\\pm$ ")
            title = f"\\multicolumn{{{len(head)}}}{{l}}{{{tables.latex(section.title)}}} \\\\"
            names = tables.latex_row([tables.latex(name) for name in head])
            body = ["\\toprule", title, "\\midrule", names, "\\midrule", *map(tables.latex_row, rows), "\\bottomrule"]
            blocks.append("\n".join([f"\\begin{{tabular}}{{{columns}}}", *body, "\\end{tabular}"]))
        return "\n\n".join(["\n".join(map(tables.latex_comment, self._remarks())), *blocks]) + "\n"

    def to_html(self) -> str:
        """One HTML table per section, then notes and problems; :mod:`tta.report.page` makes a page of it."""
        parts = []
        for section in self.sections:
            head = "".join(f"<th>{tables.html(name)}</th>" for name in self._header(section))
            rows = self._rows(section, "<b>{}</b>".format, "<u>{}</u>".format, tables.html, " ±&nbsp;")
            body = "\n".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
            title = tables.html(section.title)
            parts.append(f'<h3>{title}</h3>\n<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>')
        return "\n".join([*parts, *(f"<p>{tables.html(remark)}</p>" for remark in self._remarks())]) + "\n"

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for section in self.sections:
            yield tables.terminal(f"Online {section.measure} in %: {section.title}", style="bold")
            yield from (
                self._methods_across(section, options.max_width) if section.columns else [self._methods_down(section)]
            )
        for remark in self._remarks():
            yield tables.terminal(remark, style="dim")

    def _methods_down(self, section: Section) -> Table:
        """One line per method, for a section with the mean as its only column."""
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
        for number, name in enumerate(self._header(section)):
            heading = tables.terminal(name.replace("_", " "))
            table.add_column(heading, justify="right" if number else "left", no_wrap=number == 0)
        for line in self._marked(section):
            table.add_row(*map(_styled, line))
        return table

    def _methods_across(self, section: Section, width: int) -> Iterator[Table]:
        """One column per method, domains down; methods that do not fit side by side go into further tables."""
        names = map(plain, self._header(section, short=False))
        head, *rows = zip(names, *self._marked(section), strict=True)
        first = max(len(row[0]) for row in rows)
        words = max(len(word) for cells in [head, *rows] for cell in cells[1:] for word in _bare(cell).split())
        size = max(13, min(words, 16))
        across = max(1, (width - first - 2) // (size + 2))
        for start in range(1, len(head), across):
            table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 2, 0, 0), show_edge=False)
            table.add_column("domain" if len(section.columns) > 1 else "", no_wrap=True, width=first)
            for name in head[start : start + across]:
                table.add_column(_styled(name, justify="right"), justify="right", width=size, overflow="fold")
            for row in rows:
                table.add_row(Text(row[0]), *map(_styled, row[start : start + across]))
            yield table

    def _marked(self, section: Section) -> Iterator[list[str]]:
        return self._rows(section, "[bold]{}[/]".format, "[underline]{}[/]".format, _quoted, " ± ")

    def _header(self, section: Section, short: bool = True) -> list[str]:
        columns = tables.shortened(section.columns) if short else section.columns
        selected = ["selected"] if section.way else []
        return ["method", *selected, *columns, MEAN, *self._versus(section), *section.metrics]

    def _rows(self, section: Section, best: Style, second: Style, quote: Style, sign: str) -> Iterator[list[str]]:
        columns = (*section.columns, MEAN)
        ranks = {column: section.ranks(column) for column in columns}
        for line in section.lines:
            name = " ".join(filter(None, [line.method, "" if section.way else line.words]))
            cells = [quote(name + (f" ({ORACLE})" if line.is_oracle else ""))]
            if section.way:
                cells.append(quote(line.words or "-"))
            for column in columns:
                score = line.score(column)
                missing = "failed" if line.problems and column == MEAN else "-"
                text = missing if score is None else score.shown(sign=sign)
                rank = None if score is None else tables.number(score.mean)
                styles = dict(zip(reversed(ranks[column]), (second, best), strict=True))
                cells.append(styles.get(rank, str)(text) if rank else text)
            if BASELINE in self._methods(section):
                cells.append(line.difference.shown(tables.signed, sign) if line.difference else "-")
            if any(other.published is not None for other in section.lines):
                cells.append(line.versus_published)
            shown = [line.measured.get(name) for name in section.metrics]
            yield cells + ["-" if score is None else tables.measured(score.mean) for score in shown]

    def _versus(self, section: Section) -> list[str]:
        published = any(line.published is not None for line in section.lines)
        return [f"vs {BASELINE}"] * (BASELINE in self._methods(section)) + ["published"] * published

    def _methods(self, section: Section) -> set[str]:
        return {line.method for line in section.lines}

    def _remarks(self) -> list[str]:
        return [*self.notes, *self.problems]


def summarise(
    rows: Sequence[TableRow],
    outcomes: Mapping[str, Outcome],
    *,
    columns: str | None = None,
    metrics: Sequence[str] = (),
    by_error: bool = False,
    published: str | None = None,
) -> Summary:
    """The table of a benchmark's rows.

    Args:
        rows: see :func:`tta.benchmark.entries`.
        outcomes: by the names of the cells; a missing one has not been run.
        columns: ``"domain"``, ``"stream"`` with the mean error of each, or ``"mean"``; left out, streams if there are
            several, else domains.
        metrics: shown behind the errors: names in :attr:`tta.Result.metrics`, or ``"samples"``.
        by_error: sort the lines of a section by their mean error (of maps, mIoU), the best first, those without one last.
        published: name of a published table to compare the means with.

    Raises:
        ConfigError: no such published table.
    """
    by_stream = columns == "stream" or (columns is None and len({row.place["stream"] for row in rows}) > 1)
    known = published_tables.find(published) if published else None
    groups: dict[tuple[Any, ...], list[TableRow]] = {}
    for row in rows:
        shared = [(k, v) for k, v in row.place.items() if v is not None and not (by_stream and k == "stream")]
        groups.setdefault((row.way, *shared), []).append(row)
    sections = []
    for (way, *place), members in groups.items():
        lines: dict[str, list[tuple[TableRow, Candidate]]] = {}
        for row in members:
            chosen = select(row, outcomes)
            # A method has one line over several streams, though each stream may select other settings.
            words = "" if way else repr(chosen.settings)
            lines.setdefault(f"{row.method} {words}", []).append((row, chosen))
        found = [_line(parts, outcomes, by_stream, metrics) for parts in lines.values()]
        results = [r for row in members for cell in row.cells if isinstance(r := outcomes.get(cell.name), Result)]
        measure = results[0].score if results else tasks.Score("error", math.nan, "down")
        if by_error:
            sign = -1 if measure.direction == "up" else 1
            found.sort(key=lambda line: sign * score.mean if (score := line.score(MEAN)) else math.inf)
        names = [row.place["stream"] for row in members] if by_stream else [c for line in found for c in line.values]
        section = Section(
            place=dict(place),
            way=way,
            columns=() if columns == MEAN else tuple(dict.fromkeys(name for name in names if name != MEAN)),
            lines=tuple(found),
            metrics=tuple(metrics),
            measure=measure.name,
            direction=measure.direction,
        )
        sections.append(_compared(section, known))
    return Summary(sections=tuple(sections), notes=tuple(_notes(sections, known)))


def _line(
    parts: Sequence[tuple[TableRow, Candidate]],
    outcomes: Mapping[str, Outcome],
    by_stream: bool,
    metrics: Sequence[str],
) -> Line:
    values: dict[str, dict[int, float]] = {}
    measured: dict[str, list[float]] = {name: [] for name in metrics}
    problems = []
    for row, chosen in parts:
        for cell in chosen.cells:
            outcome = outcomes.get(cell.name)
            if not isinstance(outcome, Result):
                problems.append(_problem(row, cell, outcome))
                continue
            errors = (
                {row.place["stream"]: outcome.score.value}
                if by_stream
                else {**outcome.scores, MEAN: outcome.score.value}
            )
            for column, error in errors.items():
                values.setdefault(column, {})[cell.seed] = error
            for name in metrics:
                value = outcome.metric(name)
                measured[name] += [] if value is None else [value]
        rivals = [cell for candidate in row.candidates for cell in candidate.tuning]
        problems += [
            _problem(row, cell, outcomes.get(cell.name))
            for cell in rivals
            if cell not in chosen.cells and not isinstance(outcomes.get(cell.name), Result)
        ]
    if by_stream:
        seeds = [set(of_stream) for of_stream in values.values()]
        whole = set.intersection(*seeds) if len(values) == len(parts) else set()
        values[MEAN] = {
            seed: statistics.fmean(of_stream[seed] for of_stream in values.values()) for seed in sorted(whole)
        }
    row, chosen = parts[0]
    selected = [dict(candidate.settings) for _, candidate in parts]
    return Line(
        method=row.method,
        settings=selected[0] if all(one == selected[0] for one in selected) else {"selected": "per stream"},
        is_oracle=row.way is not None and WAYS[row.way].is_oracle and _is_selected(row),
        values=values,
        measured={name: score for name, found in measured.items() if (score := Score.of(found))},
        problems=tuple(problems),
    )


def _is_selected(row: TableRow) -> bool:
    return len(row.candidates) > 1 or any(cell.oracle_steps for cell in row.cells)


def _problem(row: TableRow, cell: Cell, outcome: Outcome | None) -> tuple[str, str]:
    words = " ".join([row.method, *(f"{key}={_plain(value)}" for key, value in cell.hparams.items())])
    reason = f"Failed ({outcome.reason.rstrip('.')})" if isinstance(outcome, Failure) else "Not run yet"
    return f"{words} on {cell.stream}, {cell.protocol}, seed {cell.seed}", reason


def _compared(section: Section, known: "published_tables.Published | None") -> Section:
    """The section with each line's difference to the baseline and its published error."""
    base = next((line.values.get(MEAN, {}) for line in section.lines if line.method == BASELINE), {})
    fits = known is not None and known.fits(section.place)
    lines = []
    for line in section.lines:
        own = line.values.get(MEAN, {})
        both = [own[seed] - base[seed] for seed in own if seed in base]
        difference = Score.of(both) if line.method != BASELINE else None
        published = known.mean(line.method) if known is not None and fits else None
        lines.append(dataclasses.replace(line, difference=difference, published=published))
    return dataclasses.replace(section, lines=tuple(lines))


def _notes(sections: Sequence[Section], known: "published_tables.Published | None") -> Iterator[str]:
    seeds = {score.seeds for section in sections for line in section.lines if (score := line.score(MEAN))}
    if seeds and max(seeds) > 1:
        count = str(max(seeds)) if len(seeds) == 1 else f"{min(seeds)} to {max(seeds)}"
        yield f"Mean ± sample standard deviation over {count} seeds."
    if any(line.is_oracle for section in sections for line in section.lines):
        yield f"({ORACLE}): labels of the test images selected its hyper-parameters or steps; no deployment has them."
    if any(section.way and WAYS[section.way].labels == "validation" for section in sections):
        yield "validation: its labels are of the same images under four corruptions that the table does not show."
    if known is not None and any(known.fits(section.place) for section in sections):
        yield f"published: {known.about}. {known.source}. Its model: {known.manifest.get('model', 'not said')}."
    elif known is not None:
        said = " and ".join(f"{key} '{known.manifest[key]}'" for key in ("stream", "protocol") if key in known.manifest)
        yield f"published: nothing to compare with; that table is of {said} ({known.about})."


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _quoted(text: str) -> str:
    return escape(plain(text))


def _styled(markup: str, **options: Any) -> Text:
    return Text.from_markup(markup, emoji=False, **options)


def _bare(markup: str) -> str:
    return _styled(markup).plain
