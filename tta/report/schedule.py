"""Figures of a stream's schedule. They need matplotlib, which the extra ``plot`` installs."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tta.datasets.ccc import Walk
from tta.datasets.corruptions import HIGHEST
from tta.datasets.domains import Corrupted, original
from tta.datasets.stream import Stream
from tta.report.tables import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Integers = NDArray[np.int64]
Colour = tuple[float, float, float, float]

UNKNOWN_COLOUR: Colour = (0.1, 0.1, 0.1, 1.0)  # of classes that the source model does not know
COLUMNS = 400  # in a figure; of longer streams several batches share a column


def schedule(stream: Stream) -> "Figure":
    """Share of each domain in each batch, and below it the share of each class. No image is read.

    A line along the top marks batches that are predicted without learning. For corruptions that change continuously the
    severities are shown instead of the domains.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    figure = new_figure((9, 4.5))
    above, below = figure.subplots(2, 1, sharex=True)
    draw_schedule(stream, above, below, legend=True)
    above.set_title(drawn(str(stream).splitlines()[0]), fontsize=9)
    below.set_xlabel("batch")
    return figure


def draw_schedule(stream: Stream, above: "Axes", below: "Axes", *, legend: bool = False) -> None:
    """Draw the shares of domains and of classes in each batch into two axes.

    A domain that returns keeps its colour; of several severities, lower ones are paler.
    """
    lengths = np.array([plan.samples for plan in stream.schedule()])
    batch = np.repeat(np.arange(len(lengths)), lengths)
    row, position = stream.order.numpy().T
    label = np.empty(len(row), dtype=np.int64)
    for number, domain in enumerate(stream.domains):
        label[row == number] = domain.labels.numpy()[position[row == number]]

    if isinstance(stream.domains[0], Walk):
        colours = _severities(above, stream.domains[0], stream.batch_size)
        above.set_ylabel("severities", fontsize=8)
    else:
        originals = [original(domain) for domain in stream.domains]
        origins = [domain.name for domain in originals]
        severities = [domain.severity if isinstance(domain, Corrupted) else 1 for domain in originals]
        colours = _colours(list(dict.fromkeys(origins)))
        highest = max(severities) or 1
        shades = [(colours[o], 1 - 0.8 * (1 - s / highest)) for o, s in zip(origins, severities, strict=True)]
        _stack(above, batch, row, shades, len(lengths))
        above.set_ylabel("domains", fontsize=8)

    classes, kind = np.unique(label, return_inverse=True)
    of_class = _colours([str(one) for one in classes if one >= 0])
    _stack(below, batch, kind, [(of_class.get(str(one), UNKNOWN_COLOUR), 1.0) for one in classes], len(lengths))
    below.set_ylabel("classes", fontsize=8)

    for held in np.flatnonzero(stream.paused):
        above.plot([held, held + 1], [1, 1], color="black", linewidth=3, solid_capstyle="butt", clip_on=False)
    if legend:
        _legend(above, colours)
        _legend(below, of_class | ({"unknown": UNKNOWN_COLOUR} if (label < 0).any() else {}))


def save(figure: "Figure", file: Path) -> None:
    """Write a figure in the format of the file's suffix (``.png``, ``.svg``, ``.pdf``)."""
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)


def new_figure(size: tuple[float, float]) -> "Figure":
    """An empty figure of this width and height in inches.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("Figures need matplotlib: pip install 'tta-toolkit[plot]'.") from None
    return Figure(figsize=size, layout="constrained")


def _colours(names: list[str]) -> dict[str, Colour]:
    from matplotlib import colormaps

    if len(names) > 20:
        return {name: colormaps["turbo"](n / len(names)) for n, name in enumerate(names)}
    strong_first = [*range(0, 20, 2), *range(1, 20, 2)]  # pale colours, at odd places, would look like low severities
    return {name: colormaps["tab20"](strong_first[n]) for n, name in enumerate(names)}


def _severities(axes: "Axes", walk: Walk, batch_size: int) -> dict[str, Colour]:
    """Draw the severity of each corruption over the batches, one area per corruption."""
    names = list(dict.fromkeys(name for step in walk.steps for name in (step.first, step.second)))
    colours = _colours(names)
    arrivals = np.arange(len(walk.steps) + 1) * walk.speed
    edges = np.minimum(arrivals, len(walk.index)) / batch_size
    for name in names:
        severity = [s.severity_1 if s.first == name else s.severity_2 if s.second == name else 0 for s in walk.steps]
        axes.stairs(severity, edges, fill=True, color=colours[name], alpha=0.6)
    axes.set(ylim=(0, HIGHEST), yticks=[0, HIGHEST])
    axes.tick_params(labelsize=7)
    return colours


def _stack(axes: "Axes", batch: Integers, kind: Integers, shades: list[tuple[Colour, float]], batches: int) -> None:
    """Draw the stacked shares of kinds in each batch; each kind has a colour and an opacity."""
    columns = min(batches, COLUMNS)
    count = np.zeros((len(shades), columns))
    np.add.at(count, (kind, batch * columns // batches), 1)
    edges = np.arange(columns + 1) * batches / columns
    top = np.cumsum(np.vstack([np.zeros(columns), count / count.sum(0)]), 0)
    for number, (colour, opacity) in enumerate(shades):
        axes.stairs(top[number + 1], edges, baseline=top[number], fill=True, color=colour, alpha=opacity)
    axes.set(xlim=(0, batches), ylim=(0, 1), yticks=[0, 1])
    axes.tick_params(labelsize=7)


def _legend(axes: "Axes", colours: dict[str, Colour]) -> None:
    from matplotlib.patches import Patch

    if len(colours) <= 20:
        entries = [Patch(color=colour, label=drawn(name)) for name, colour in colours.items()]
        axes.legend(handles=entries, fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
