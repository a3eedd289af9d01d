"""Ways to select hyper-parameters from a grid, and the labels that each of them uses.

Test-time adaptation has no labels, yet most published tables were tuned on the labels of the test images. Each way below
says which labels it uses, and every table repeats it.
"""

import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tta.benchmark.cells import Cell, Outcome
from tta.results import Result


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way of selection.

    Attributes:
        line: its description in one line.
        labels: the labels it uses: ``"test"`` (an oracle), ``"validation"`` or ``"none"``.
        score: maps the result of a run to a number; the lowest is selected.
        grid: the default grid.
        tuned_on: ``"test"``, or ``"validation"`` where the runs to select from are on the four validation corruptions.
    """

    line: str
    labels: str
    score: Callable[[Result], float]
    grid: Mapping[str, list[Any]]
    tuned_on: str = "test"

    @property
    def is_oracle(self) -> bool:
        """Whether it uses the labels of the test images."""
        return self.labels == "test"


def test_error(result: Result) -> float:
    """Mean error in percent; of maps minus the mean mIoU, so that the lowest is the best."""
    return -result.score.value if result.score.direction == "up" else result.score.value


def mean_entropy(result: Result) -> float:
    """Mean entropy of the scored predictions, in nats.

    Raises:
        ValueError: the result lacks its predictions.
    """
    if result.predictions is None or result.predictions.entropy is None:
        raise ValueError(f"{result!r} has no entropies: it lacks its predictions.npz, or an earlier version wrote it.")
    return float(result.predictions.entropy.mean())


def inconsistency(result: Result) -> float:
    """Percentage of images whose prediction changes when the image is shifted (:class:`tta.engine.Consistency`).

    Raises:
        ValueError: the run did not measure it.
    """
    if "consistency" not in result.metrics:
        raise ValueError(f"{result!r} was run without measuring the consistency of its predictions.")
    return 100.0 - float(result.metrics["consistency"])


# The grids and the first two ways are from Zhao et al., "On Pitfalls of Test-Time Adaptation", ICML 2023 (TTAB).
EPISODIC: dict[str, list[Any]] = {"lr": [1e-3, 5e-4, 1e-4]}
ONLINE: dict[str, list[Any]] = {"lr": [5e-3, 1e-3, 5e-4], "steps": [1, 2, 3]}

WAYS = {
    "episodic-oracle": Way(
        line="reset before each batch, test labels choose among the steps of each batch and from the grid",
        labels="test",
        score=test_error,
        grid=EPISODIC,
    ),
    "online-last": Way(
        line="the last step counts, test labels choose from the grid",
        labels="test",
        score=test_error,
        grid=ONLINE,
    ),
    "validation": Way(
        line="labels of the four validation corruptions choose from the grid, none of the test corruptions are seen",
        labels="validation",
        score=test_error,
        grid=ONLINE,
        tuned_on="validation",
    ),
    # Both are among the surrogates that were compared by Cygert et al., "Realistic Evaluation of Test-Time Adaptation Algorithms: Unsupervised
    # Hyperparameter Selection", 2024 (arXiv:2407.14231).
    "entropy": Way(
        line="no labels: the lowest mean entropy of the predictions chooses from the grid",
        labels="none",
        score=mean_entropy,
        grid=ONLINE,
    ),
    "consistency": Way(
        line="no labels: predictions that change least under weak augmentation choose from the grid",
        labels="none",
        score=inconsistency,
        grid=ONLINE,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One point of the grid.

    Attributes:
        settings: its hyper-parameters.
        cells: runs on the test stream, one per seed.
        tuning: runs that it is judged by, one per seed; the same cells unless the way tunes on other images.
    """

    settings: Mapping[str, Any]
    cells: tuple[Cell, ...]
    tuning: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class TableRow:
    """A row of a benchmark's table: one method under one protocol over all seeds, and the grid that it is selected from.

    Attributes:
        method: its name.
        place: stream, model, protocol and preset; None for those that the description leaves open.
        way: name of the way of selection; None where each candidate has a row of its own.
        candidates: one or more.
    """

    method: str
    place: Mapping[str, Any]
    way: str | None
    candidates: tuple[Candidate, ...]

    @property
    def cells(self) -> list[Cell]:
        """All cells that the row needs."""
        return [cell for candidate in self.candidates for cell in (*candidate.cells, *candidate.tuning)]


def select(row: TableRow, outcomes: Mapping[str, Outcome]) -> Candidate:
    """The candidate with the lowest score, averaged over seeds; of equal ones the first.

    A candidate with a missing or failed run, or with a score that is not finite, is not selected; if that is true of
    all, the first is.
    """
    if len(row.candidates) == 1 or row.way is None:
        return row.candidates[0]
    score = WAYS[row.way].score

    def mean_score(candidate: Candidate) -> float:
        results = [outcomes.get(cell.name) for cell in candidate.tuning]
        scores = [score(result) if isinstance(result, Result) else math.inf for result in results]
        mean = statistics.fmean(scores)
        return mean if math.isfinite(mean) else math.inf

    return min(row.candidates, key=mean_score)
