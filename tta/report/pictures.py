"""Pictures of a run side by side: the image, the truth, and what each method saw in it. They need the extra ``plot``."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tta import tasks
from tta.datasets import catalog
from tta.report import tables
from tta.report.schedule import new_figure
from tta.results import Frame, Result

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VOID = -1
VOID_COLOUR = "#ffffff"
BACKGROUND = "background"  # a class of this name is drawn in a quiet colour
BACKGROUND_COLOUR = "#e3e3e3"
# tab20 of matplotlib without its greys, strong colours first. Further classes take hues a golden angle apart.
COLOURS = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf", "#aec7e8",
           "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d", "#9edae5")  # fmt: skip
GOLDEN = 0.618034
CELL = 2.1  # inches of a picture's width
LARGEST_LEGEND = 40  # classes
SCORE = 0.5  # of a box that is drawn


class Boxes(NamedTuple):
    """Boxes in one picture: (n, 4) left, top, right, bottom in its pixels; classes (n,)."""

    places: NDArray[np.float64]
    classes: NDArray[np.int64]


def draw(results: Mapping[str, Result], frames: Sequence[int] | None = None, *, score: float = SCORE) -> "Figure":
    """Rows of the image, the truth, and the prediction of each method; colours stand for classes.

    Args:
        results: of one task, by the names of their columns, ``source`` first where it is among them.
        frames: places in the stream of the pictures; left out, all that every result kept.
        score: of detection, boxes below it are left out.

    Raises:
        ValueError: results without pictures, with others than asked for, or of different streams.
        ModuleNotFoundError: matplotlib is not installed.
    """
    columns = dict(sorted(results.items(), key=lambda pair: pair[1].method != tables.BASELINE))
    first = next(iter(columns.values()))
    places = _chosen(list(columns.values()), frames)
    of = {label: {frame.position: frame for frame in result.frames} for label, result in columns.items()}
    shown = [next(iter(of.values()))[place] for place in places]
    aspect = max(frame.image.shape[0] / frame.image.shape[1] for frame in shown)
    below = 0.28 if first.task == tasks.SEGMENTATION.name else 0.1  # inches; the score of a map is written there
    figure = new_figure((0.5 + CELL * (2 + len(columns)), 0.6 + (CELL * aspect + below) * len(places)))
    axes = figure.subplots(len(places), 2 + len(columns), squeeze=False)
    classes: set[int] = set()
    for row, frame in zip(axes, shown, strict=True):
        if any(not np.array_equal(kept[frame.position].image, frame.image) for kept in of.values()):
            raise ValueError("The runs saw different pictures: name results of one stream, severity and seed.")
        _image(row[0], frame)
        row[0].set_ylabel(f"{tables.drawn(first.rows[frame.domain].domain)}\nframe {frame.position}", fontsize=8)
        classes |= _draw(row[1], first, frame, None, score)
        for cell, (label, result) in zip(row[2:], columns.items(), strict=True):
            classes |= _draw(cell, result, of[label][frame.position], _value(result, frame.position), score)
    for cell, title in zip(axes[0], ["image", "truth", *columns], strict=True):
        cell.set_title(tables.drawn(title), fontsize=9)
    _legend(figure, sorted(classes), first)
    return figure


def _chosen(results: Sequence[Result], frames: Sequence[int] | None) -> list[int]:
    """The places of the pictures that are shown: those asked for, which all results kept."""
    common = set.intersection(*({frame.position for frame in result.frames} for result in results))
    if not common:
        raise ValueError(
            "These results have no pictures in common: maps and boxes alone are kept, by runs with --out of this version. Run "
            "again, with frames=[0,50] for places in the stream of your choice."
        )
    if frames is None:
        return sorted(common)
    if not isinstance(frames, (list, tuple)) or not frames or any(type(place) is not int for place in frames):
        raise ValueError(f"frames is a list of places in the stream, such as [0,50]; got {frames!r}.")
    absent = [place for place in frames if place not in common]
    if absent:
        raise ValueError(
            f"Frame {absent[0]} was not kept by every result; there are {', '.join(map(str, sorted(common)))}. To keep others, run "
            f"again with frames={list(frames)}."
        )
    return list(frames)


def _image(axes: "Axes", frame: Frame) -> None:
    axes.imshow(frame.image if frame.image.shape[2] == 3 else frame.image[..., 0], cmap="gray", vmin=0, vmax=255)
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set_visible(False)


def _draw(axes: "Axes", result: Result, frame: Frame, value: float | None, score: float) -> set[int]:
    """Draw the truth of a picture, or with a value the prediction, and return the classes in it."""
    if result.task == tasks.DETECTION.name:
        _image(axes, frame)
        boxes = _boxes(result, frame, found=value is not None, score=score)
        _outline(axes, boxes, frame.scale, _names(result))
        return set(boxes.classes.tolist())
    classes = frame.truth if value is None else frame.predicted
    axes.imshow(_coloured(classes, _names(result)), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    if value is not None:
        axes.set_xlabel(f"mIoU {value:.1f}", fontsize=7, labelpad=2)
    return set(np.unique(classes).tolist())


def _value(result: Result, position: int) -> float:
    """mIoU of one picture in percent, NaN where the predictions are missing or are boxes."""
    if result.predictions is None or result.predictions.confusion is None:
        return math.nan
    return tasks.mean_iou(result.predictions.confusion[position])


def _boxes(result: Result, frame: Frame, *, found: bool, score: float) -> Boxes:
    """The true boxes of a picture, or those found with at least this score."""
    if result.predictions is None:
        raise ValueError("Boxes are drawn from the predictions, which this result lacks: keep predictions.npz.")
    rows = result.predictions.column("found" if found else "truth")[frame.position]
    rows = rows[~np.isnan(rows[:, 4])].astype(np.float64)
    rows = rows[rows[:, 5] >= score] if found else rows
    return Boxes(rows[:, :4], rows[:, 4].astype(np.int64))


def _outline(axes: "Axes", boxes: Boxes, scale: float, names: Sequence[str]) -> None:
    from matplotlib.patches import Rectangle

    for number, (left, top, right, bottom) in enumerate(boxes.places * scale):
        colour = _colour(int(boxes.classes[number]), names)
        size = right - left, bottom - top
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, edgecolor=colour, linewidth=1.2))


def _coloured(classes: NDArray[np.int16], names: Sequence[str]) -> NDArray[np.float64]:
    """The picture (rows, columns, 3) of a map of classes."""
    from matplotlib.colors import to_rgb

    present, place = np.unique(classes, return_inverse=True)
    colours = np.array([to_rgb(_colour(int(number), names)) for number in present])
    painted: NDArray[np.float64] = colours[place.reshape(classes.shape)]
    return painted


def _colour(number: int, names: Sequence[str]) -> Any:
    from matplotlib.colors import hsv_to_rgb

    if number == VOID:
        return VOID_COLOUR
    if number < len(names) and names[number] == BACKGROUND:
        return BACKGROUND_COLOUR
    if number < len(COLOURS):
        return COLOURS[number]
    return tuple(hsv_to_rgb((GOLDEN * number % 1, (0.5, 0.75, 1.0)[number % 3], (0.9, 0.65)[number % 2])))


def _names(result: Result) -> Sequence[str]:
    """Names of the classes where the stream is known to have some, else none."""
    return catalog.class_names(result.stream)


def _legend(figure: "Figure", classes: Sequence[int], result: Result) -> None:
    from matplotlib.patches import Patch

    names = _names(result)
    entries = list(_entries(classes, names))
    handles = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=label) for colour, label in entries]
    widths = [0.45 + 0.055 * len(label) for _, label in entries]  # inches
    rows = math.ceil(sum(widths) / figure.get_figwidth())
    across = math.ceil(len(handles) / max(1, rows))
    figure.legend(
        handles=handles, loc="outside lower center", ncols=across, fontsize=7, frameon=False, handlelength=1.2
    )


def _entries(classes: Sequence[int], names: Sequence[str]) -> Iterator[tuple[Any, str]]:
    """Colour and name of the classes of a legend, void last; of very many the first."""
    known = [number for number in classes if number != VOID]
    for number in known[:LARGEST_LEGEND]:
        yield _colour(number, names), tables.drawn(names[number] if number < len(names) else f"class {number}")
    if len(known) > LARGEST_LEGEND:
        yield "none", f"and {len(known) - LARGEST_LEGEND} more"
    if VOID in classes:
        yield VOID_COLOUR, "void"
