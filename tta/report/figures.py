"""Figures of results: error over the stream, by domain, against cost; calibration; hyper-parameters. Extra ``plot``."""

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from tta.report import pictures, tables
from tta.report.comparison import Run, compare
from tta.report.schedule import new_figure
from tta.results import Result
from tta.tasks import Score, Task, find, mean_of_known

if TYPE_CHECKING:
    import pandas
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]
# Okabe and Ito's palette for colour-blind readers, without its yellow, which is hard to see on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
BINS = 15  # of the confidence, as in the expected calibration error
AVERAGED = ("seed", "weights")  # runs that differ in these alone are averaged
NAMED_FIRST = ("stream", "protocol", "model")  # others are named only if these do not distinguish the runs of a method


def curve(results: Iterable[Result], *, window: int | None = None) -> "Figure":
    """Online error over the stream, one line per method; vertical lines separate domains if all runs have the same ones.

    Triangles mark the alarms of a guard.

    Args:
        results: runs with their predictions; those that differ in the seed alone are averaged.
        window: each point is the error over the last ``window`` batches of its domain; left out, a fortieth of the stream.

    Raises:
        ValueError: no results, or results without predictions.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = grouped(results)
    if any(not find(result.task).of_classes for members in runs.values() for result in members):
        raise ValueError("A curve is of online errors, wrong or right; draw a heatmap or pareto of these results.")
    figure = new_figure((10, _height(runs)))
    axes = figure.subplots()
    alarms = {label: _alarms(members) for label, members in runs.items()}
    curves_of = {label: [result.curves for result in members] for label, members in runs.items()}
    bounds = _bounds([one for curves in curves_of.values() for one in curves])
    for (label, curves), style in zip(curves_of.items(), _styles(), strict=False):
        ends = [end for end, _ in bounds]
        lines = [_running(one, ends, window or math.ceil(len(one) / 40)) for one in curves]
        shortest = min(map(len, lines))
        arrived = np.cumsum(curves[0]["samples"].to_numpy())[:shortest]
        error = np.nanmean([line[:shortest] for line in lines], 0)
        (line,) = axes.plot(arrived, error, label=tables.drawn(label), linewidth=1.3, **style)
        marked = [batch for batch in alarms[label] if batch < shortest]
        axes.plot(arrived[marked], error[marked], "v", color=line.get_color(), markersize=6)
    _draw_bounds(axes, bounds)
    what = "online error" if _measure(runs).name == "error" else "online error of the pixels"
    axes.set(xlabel="images", ylabel=f"{what}, %", ylim=(0, None))
    axes.margins(x=0)
    _tidy(axes)
    _legend(axes, len(runs))
    return figure


def heatmap(results: Iterable[Result]) -> "Figure":
    """Score (error) of each method in each domain, the method with the best mean first.

    Raises:
        ValueError: no results.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = grouped(results)
    means = {label: _mean(members) for label, members in runs.items()}
    score = _measure(runs)
    sign = -1 if score.direction == "up" else 1
    names = sorted(runs, key=lambda label: (math.isnan(means[label]), sign * means[label]))
    domains = list(dict.fromkeys(row.domain for members in runs.values() for result in members for row in result.rows))
    table = np.array([[_mean(runs[name], domain) for domain in domains] + [means[name]] for name in names])
    figure = new_figure((2.2 + 0.52 * table.shape[1], 1.4 + 0.3 * len(names)))
    axes = figure.subplots()
    _cells(axes, table, names, [*tables.shortened(domains), "mean"], _task(runs).shown)
    axes.axvline(len(domains) - 0.5, color="white", linewidth=4)
    axes.set_title(f"online {score.name}{_in_percent(runs)}", fontsize=9, loc="left")
    return figure


def pareto(results: Iterable[Result], *, cost: str = "passes") -> "Figure":
    """Mean score (error) against cost, one numbered point per method; the line joins the methods that no other beats in both.

    Args:
        results: those that differ in the seed alone are averaged.
        cost: ``"passes"``, forward and backward passes per image; ``"seconds"`` per image, of the machine that ran them;
            or a metric of :attr:`tta.Result.metrics`, such as ``"peak_memory_mb"``.

    Raises:
        ValueError: no results, or none with that cost.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = grouped(results)
    found = {
        label: (mean_of_known(_cost(result, cost) for result in members), _mean(members))
        for label, members in runs.items()
    }
    points = {label: point for label, point in found.items() if not math.isnan(sum(point))}
    if not points:
        raise ValueError(f"No result has the cost '{cost}': 'passes', 'seconds', or a metric such as 'peak_memory_mb'.")
    score = _measure(runs)
    sign = -1 if score.direction == "up" else 1
    names = sorted(points, key=lambda label: sign * points[label][1])
    figure = new_figure((9, _height(names)))
    axes = figure.subplots()
    for number, (label, style) in enumerate(zip(names, _styles(), strict=False), start=1):
        x, y = points[label]
        axes.plot(x, y, "o", markersize=13, color=style["color"], markeredgecolor="white")
        axes.annotate(str(number), (x, y), ha="center", va="center", fontsize=7, color="white")
        axes.plot([], [], "o", color=style["color"], label=f"{number}  {tables.drawn(label)}  {_task(runs).shown(y)}")
    front = np.array(_front([(x, sign * y) for x, y in points.values()]))
    axes.step(front[:, 0], sign * front[:, 1], where="post", color="0.6", linewidth=1, zorder=0)
    words = {"passes": "forward and backward passes an image", "seconds": "seconds an image"}
    axes.set(
        xscale="log",
        xlabel=words.get(cost, tables.drawn(cost.replace("_", " "))),
        ylabel=f"mean online {score.name}{_in_percent(runs)}",
    )
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
    _tidy(axes)
    _legend(axes, len(names))
    return figure


def calibration(results: Iterable[Result]) -> "Figure":
    """Accuracy against confidence in 15 bins of equal width, with the diagonal on which the two are equal.

    Guo et al., "On Calibration of Modern Neural Networks", ICML 2017. Bins of fewer than 10 predictions are left out.

    Raises:
        ValueError: no results, or results without predictions.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = grouped(results)
    figure = new_figure((7.5, _height(runs) + 1.5))
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
    above.plot([0, 100], [0, 100], color="0.7", linewidth=1, zorder=0)
    for (label, members), style in zip(runs.items(), _styles(), strict=False):
        confidence, accuracy, count = reliability(members)
        sound = count >= 10
        ece = float((count * np.abs(np.nan_to_num(accuracy - confidence))).sum() / max(1, count.sum()))
        above.plot(
            confidence[sound],
            accuracy[sound],
            label=f"{tables.drawn(label)}  (ECE {ece:.1f} %)",
            linewidth=1.3,
            **style,
        )
        below.stairs(100 * count / max(1, count.sum()), np.linspace(0, 100, BINS + 1), **style)
    above.set(ylabel="accuracy, %", xlim=(0, 100), ylim=(0, 100))
    below.set(xlabel="confidence, %", ylabel="share, %")
    _tidy(above)
    _tidy(below)
    _legend(above, len(runs))
    return figure


def grid(results: Iterable[Result]) -> "Figure":
    """Mean error by learning rate and steps, one panel per method that ran with several of either.

    Each stream, protocol and set of domains has a panel of its own: the validation corruptions of ``tta tune`` are not
    averaged with those of the test.

    Raises:
        ValueError: no method ran with several learning rates or steps.
        ModuleNotFoundError: matplotlib is not installed.
    """
    panels: dict[tuple[str, ...], dict[tuple[float, int], list[Result]]] = {}
    for result in results:
        if "lr" in result.config and not result.manifest.get("oracle_steps"):
            place = (float(result.config["lr"]), int(result.config.get("steps", 1)))
            panels.setdefault(_panel_of(result), {}).setdefault(place, []).append(result)
    panels = {panel: found for panel, found in panels.items() if len(found) > 1}
    if not panels:
        raise ValueError(
            "No method here ran with several learning rates or steps: give a benchmark a grid (`tta tune`)."
        )
    differing = [n for n in range(1, 4) if len({panel[n] for panel in panels}) > 1]
    rates, numbers = (sorted({place[n] for found in panels.values() for place in found}) for n in (0, 1))
    across = min(4, len(panels))
    down = math.ceil(len(panels) / across)
    figure = new_figure((across * (1 + 0.65 * len(rates)), down * (1.1 + 0.2 * len(differing) + 0.4 * len(numbers))))
    places = figure.subplots(down, across, squeeze=False).flatten()
    for axes, (panel, found) in zip(places, panels.items(), strict=False):
        table = np.array([[_mean(found.get((lr, int(steps)), [])) for lr in rates] for steps in numbers])
        _cells(axes, table, [str(steps) for steps in numbers], [f"{lr:g}" for lr in rates], tables.number)
        title = [panel[0], *(_first_of(panel[n]) for n in differing)]
        axes.set_title("\n".join(map(tables.drawn, title)), fontsize=9, loc="left")
        axes.set_xlabel("lr", fontsize=8)
        axes.set_ylabel("steps", fontsize=8)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    return figure


def maps(results: Iterable[Result], *, frames: Sequence[int] | None = None, score: float = pictures.SCORE) -> "Figure":
    """The pictures that runs of segmentation or detection kept: image, truth, and the prediction of each method.

    Of runs that differ in the seed alone the first is shown.

    Args:
        results: of one stream.
        frames: places in the stream of the pictures; left out, all that every result kept (the last one of up to eight domains).
        score: of detection, boxes found with a lower one are left out.

    Raises:
        ValueError: no results, results without pictures or with others than asked for, or of several tasks or streams.
        ModuleNotFoundError: matplotlib is not installed.
    """
    runs = grouped(results)
    _measure(runs)  # refuses several tasks
    return pictures.draw({label: members[0] for label, members in runs.items()}, frames, score=score)


FIGURES: dict[str, Callable[..., "Figure"]] = {
    "curve": curve,
    "heatmap": heatmap,
    "pareto": pareto,
    "calibration": calibration,
    "grid": grid,
    "maps": maps,
}


def _panel_of(result: Result) -> tuple[str, ...]:
    """Method, stream, protocol and domains: results in which these are equal share a panel."""
    domains = ", ".join(row.domain for row in result.rows)
    data = result.manifest.get("data")
    return result.method, result.stream, str(data.get("protocol") if isinstance(data, Mapping) else None), domains


def _first_of(names: str) -> str:
    """The first of several names and the number of the others: ``fog +14``."""
    first, *others = names.split(", ")
    return f"{first} +{len(others)}" if others else first


def grouped(results: Iterable[Result]) -> dict[str, list[Result]]:
    """Results by label: the method and the settings that distinguish it. Runs that differ in the seed alone share a label.

    Raises:
        ValueError: no results.
    """
    of_label: dict[str, list[Run]] = {}
    for run in compare(results).runs:
        of_label.setdefault(run.label, []).append(run)
    found: dict[str, list[Result]] = {}
    for label, runs in of_label.items():
        named: list[str] = []
        for name in sorted(runs[0].settings, key=lambda name: name not in NAMED_FIRST):
            if name not in AVERAGED and len(_places(runs, [*named, name])) > len(_places(runs, named)):
                named.append(name)
        for run in runs:
            words = [run.settings[name] if name in NAMED_FIRST else f"{name} {run.settings[name]}" for name in named]
            found.setdefault(" · ".join([label, *words]), []).append(run.result)
    return found


def _places(runs: Iterable[Run], names: Sequence[str]) -> set[tuple[str, ...]]:
    return {tuple(run.settings[name] for name in names) for run in runs}


def reliability(results: Sequence[Result]) -> tuple[Floats, Floats, Floats]:
    """Mean confidence and accuracy, both in percent, and number of predictions, each per bin of the confidence.

    Raises:
        ValueError: results without predictions, or written by an earlier version.
    """
    if any(result.task != "classification" for result in results):
        raise ValueError("A calibration is of one class an image, with its probability; these results have none.")
    if any(result.predictions is None for result in results):
        raise ValueError("A calibration needs predictions, which these results lack: run with --out.")
    kept = [result.predictions.select(result.predictions.known) for result in results if result.predictions]
    confidence = np.concatenate([one.column("confidence") for one in kept]).astype(np.float64)
    correct = np.concatenate([one.correct for one in kept])
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    count = np.bincount(bins, minlength=BINS).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean, accuracy = (100 * np.bincount(bins, values, BINS) / count for values in (confidence, correct))
    return mean, accuracy, count


def _mean(results: Iterable[Result], domain: str | None = None) -> float:
    return mean_of_known(
        result.score.value if domain is None else result.scores.get(domain, math.nan) for result in results
    )


def _measure(runs: Mapping[str, Sequence[Result]]) -> Score:
    """The score of the first run, whose name and direction are those of all.

    Raises:
        ValueError: results of several tasks, which no axis shows together.
    """
    results = [result for members in runs.values() for result in members]
    if len(found := dict.fromkeys(result.task for result in results)) > 1:
        raise ValueError(f"A figure is of results of one task; got {', '.join(found)}.")
    return results[0].score


def _task(runs: Mapping[str, Sequence[Result]]) -> Task:
    """The task of the first run, which is that of all, see :func:`_measure`."""
    return find(next(iter(runs.values()))[0].task)


def _in_percent(runs: Mapping[str, Sequence[Result]]) -> str:
    return ", %" if _task(runs).unit == "%" else ""


def _cost(result: Result, cost: str) -> float:
    if cost == "passes":
        parts = [result.metric("forwards_per_image"), result.metric("backwards_per_image")]
        return math.nan if None in parts else math.fsum(part for part in parts if part is not None)
    if cost == "seconds":
        speed = result.metric("images_per_second")
        return 1 / speed if speed else math.nan
    value = result.metric(cost)
    return math.nan if value is None else value


def _front(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, error) points that no other point beats in both, the cheapest first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front


def _bounds(curves: list["pandas.DataFrame"]) -> list[tuple[int, str]]:
    """(images until its end, name) of each domain; empty if the runs' domains differ or are more than 40."""
    orders = []
    for one in curves:
        arrived = zip(np.cumsum(one["samples"]).tolist(), one["domain"], strict=True)
        orders.append([[*group][-1] for _, group in itertools.groupby(arrived, key=lambda pair: pair[1])])
    same = all(order == orders[0] for order in orders)
    return orders[0] if same and len(orders[0]) <= 40 else []


def _alarms(results: Iterable[Result]) -> list[int]:
    """Batches in which a guard raised an alarm, of all runs."""
    guarded = [result.metrics.get("guard") for result in results]
    events = [event for one in guarded if isinstance(one, dict) for event in one.get("events", [])]
    return sorted({event["batch"] for event in events if event["kind"] in ("alarm", "labelled")})


def _running(curves: "pandas.DataFrame", ends: list[int], window: int) -> Floats:
    """Error over the last ``window`` batches at each batch; batches of an earlier domain do not count."""
    error = curves["error"].to_numpy(dtype=np.float64)
    samples = np.where(np.isnan(error), 0, curves["samples"].to_numpy(dtype=np.float64))
    arrived = np.cumsum(curves["samples"].to_numpy())
    domain = np.searchsorted(ends, arrived)
    first = np.maximum(np.arange(len(error)) - window + 1, np.searchsorted(domain, domain))
    sums = [np.concatenate([[0], np.cumsum(values)]) for values in (np.nan_to_num(error) * samples, samples)]
    with np.errstate(invalid="ignore"):
        wrong, count = (total[1:] - total[first] for total in sums)
        running: Floats = wrong / count
    return running


def _draw_bounds(axes: "Axes", bounds: list[tuple[int, str]]) -> None:
    """Draw lines between domains and write their names above."""
    short = tables.shortened([name for _, name in bounds])
    start = 0
    for (end, _), name in zip(bounds, short, strict=True):
        axes.axvline(end, color="0.85", linewidth=0.8, zorder=0)
        axes.annotate(tables.drawn(name), ((start + end) / 2, 1.01), xycoords=("data", "axes fraction"), ha="center", va="bottom",
                      fontsize=7, rotation=0 if len(short) <= 16 else 90)  # fmt: skip
        start = end


def _cells(axes: "Axes", table: Floats, rows: list[str], columns: list[str], write: Callable[[float], str]) -> None:
    """Draw a table as coloured cells with their numbers; dark is low, and an empty cell has no run."""
    low, high = np.nanmin(table), np.nanmax(table)
    axes.imshow(table, cmap="cividis", vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
    for row, column in np.argwhere(~np.isnan(table)):
        dark = (table[row, column] - low) / max(high - low, 1e-9) < 0.5
        axes.text(column, row, write(table[row, column]), ha="center", va="center", fontsize=7,
                  color="white" if dark else "black")  # fmt: skip
    axes.set_xticks(range(len(columns)), list(map(tables.drawn, columns)), fontsize=7)
    axes.set_yticks(range(len(rows)), list(map(tables.drawn, rows)), fontsize=8)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


def _height(entries: Collection[Any]) -> float:
    """Height in inches that leaves room for a legend of these entries."""
    return max(4.5, 0.18 * len(entries) + 0.6)


def _styles() -> Iterable[dict[str, Any]]:
    """An endless sequence of line styles: each colour solid, then each in every dash."""
    return itertools.cycle({"color": colour, "linestyle": dash} for dash in DASHES for colour in PALETTE)


def _tidy(axes: "Axes") -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.93", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set_fontsize(9)


def _legend(axes: "Axes", entries: int) -> None:
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False, ncols=1 + entries // 50,
                handlelength=2.6)  # fmt: skip
