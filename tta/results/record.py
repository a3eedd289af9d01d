"""Predictions of a run, recorded batch by batch and reduced to columns a chunk at a time."""

import time
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from tta.results.predictions import Predictions
from tta.tasks import CLASSIFICATION, Score, Tally, Task

# Logits are reduced once there are this many (32 MB): many small reductions would cost more than the forward pass of a
# small model, and all logits of ImageNet-C together are 3 GB.
WAITING = 2**23
BLOCK = 1024  # samples for which there is room at first


class _Batch(NamedTuple):
    """One batch that is not reduced yet."""

    logits: Tensor
    label: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is of no use here
    outlier_score: Tensor | None
    action: int | None
    time: float


class _Columns:
    """Columns of all samples so far, in blocks that double when they are full.

    What is kept of each batch must not be a small allocation of its own: it would come to lie in the room that the logits of the
    batch leave when they are freed, and the next batch would not fit there. 2 000 frames of 240 x 180 took 3.5 GB so.
    """

    def __init__(self) -> None:
        self._blocks: dict[str, Tensor] = {}
        self.length = 0

    def add(self, columns: dict[str, Tensor]) -> None:
        """Append samples; the columns are the same every time."""
        count = len(next(iter(columns.values())))
        for name, values in columns.items():
            block = self._blocks.get(name)
            if block is None or len(block) < self.length + count or block.shape[1:] != values.shape[1:]:
                block = self._blocks[name] = self._larger(block, values, self.length + count)
            rows = block[self.length : self.length + count]
            (rows if rows.shape == values.shape else rows[:, : values.shape[1]]).copy_(values)
        self.length += count

    def since(self, start: int) -> dict[str, Tensor]:
        """The columns from a sample on, on the CPU; copies."""
        return {name: block[start : self.length].cpu().clone() for name, block in self._blocks.items()}

    def drop(self, name: str) -> None:
        """Forget a column."""
        self._blocks.pop(name, None)

    def _larger(self, block: Tensor | None, values: Tensor, length: int) -> Tensor:
        """A block with room for more samples; of boxes, whose number differs, for the most, and NaN where there is none."""
        shape = list(values.shape[1:])
        if block is not None:
            shape = [max(sides) for sides in zip(shape, block.shape[1:], strict=True)]
        room = max(BLOCK, 2 * length) if block is None or len(block) < length else len(block)
        made = values.new_full((room, *shape), torch.nan if values.is_floating_point() else 0)
        if block is not None:
            held = (slice(self.length), *(slice(side) for side in block.shape[1:]))
            made[held] = block[: self.length]
        return made


class Record:
    """Every prediction of a run.

    Adding a batch is an append, which computes nothing and does not synchronise the device, until many logits wait; boxes, which
    are few, are put into columns at once.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.classes = 0
        self.task: Task = CLASSIFICATION
        self._started = time.perf_counter()
        self._waiting: list[_Batch] = []
        self._kept = _Columns()
        self._lengths: list[int] = []  # of the batches
        self._seconds: list[float] = []
        self._actions: list[int | None] = []
        self._scored = True  # whether every batch so far has outlier scores
        self._counted = 0
        self._tally = Tally(0, 0)

    def add(
        self,
        logits: Tensor,
        label: Tensor,
        domain: Tensor,
        index: Tensor,
        outlier_score: Tensor | None = None,
        action: int | None = None,
        task: Task = CLASSIFICATION,
    ) -> None:
        """Record one batch.

        Args:
            logits: (batch, classes), or what an adapter gives for another task; not changed afterwards.
            label: (batch,), -1 for an unknown class; of maps (batch, height, width).
            domain: (batch,), the number of each sample's domain.
            index: (batch,), the number of each sample in its domain.
            outlier_score: (batch,), from a method that gives one.
            action: of the guard, a place in :data:`tta.results.predictions.ACTIONS`; None without a guard.
            task: the same for all batches.

        Raises:
            ValueError: labels that the task cannot compare with the logits.
        """
        self.task = task
        task.check_labels(label, logits)
        self._waiting.append(_Batch(logits, label, domain, index, outlier_score, action, time.perf_counter()))
        self.samples += len(label)
        self.classes = logits.shape[1] if task.of_classes else 0
        if not task.tensors or len(self._waiting) * logits.numel() > WAITING:
            self._reduce()

    def leave_out(self, seconds: float) -> None:
        """Exclude some seconds from the time of the run."""
        self._started += seconds

    def wrong_and_known(self) -> tuple[int, int]:
        """Errors and scored samples (of maps, pixels) so far; synchronises the device."""
        tally = self._so_far()
        return tally.errors, tally.samples

    def score(self) -> Score:
        """The task's score of all predictions so far; synchronises the device."""
        return Score(self.task.score_name, self.task.value(self._so_far()), self.task.direction)

    def _so_far(self) -> Tally:
        if not self.task.adds_up:
            return Tally(self.samples, 0)
        self._reduce()
        if self._counted < self._kept.length:
            columns = {name: value.numpy() for name, value in self._kept.since(self._counted).items()}
            self._tally = self.task.merged([self._tally, self.task.tally(Predictions(**columns))])
            self._counted = self._kept.length
        return self._tally

    def predictions(self) -> Predictions:
        """All predictions in stream order; synchronises the device."""
        self._reduce()
        if not self._kept.length:
            empty = torch.empty(0, dtype=torch.int64).numpy()
            return Predictions(domain=empty, index=empty, label=empty, prediction=empty)
        lengths, seconds = torch.tensor(self._lengths), torch.tensor(self._seconds, dtype=torch.float64)
        columns = {name: value.numpy() for name, value in self._kept.since(0).items()}
        columns["batch"] = torch.arange(len(lengths)).repeat_interleave(lengths).numpy()
        columns["seconds"] = seconds.repeat_interleave(lengths).numpy()
        if None not in self._actions:
            columns["guard"] = torch.tensor(self._actions).repeat_interleave(lengths).numpy()
        return Predictions(**columns)

    def _reduce(self) -> None:
        if not self._waiting:
            return
        batches, self._waiting = self._waiting, []
        columns = {
            "domain": torch.cat([batch.domain for batch in batches]),
            "index": torch.cat([batch.index for batch in batches]),
            **self._columns(batches),
        }
        scores = [batch.outlier_score for batch in batches if batch.outlier_score is not None]
        # If some batches (paused ones) have no scores, drop all: the scores of only a part cannot be compared.
        self._scored = self._scored and len(scores) == len(batches)
        if self._scored:
            columns["outlier_score"] = torch.cat(scores)
        else:
            self._kept.drop("outlier_score")
        self._kept.add(columns)
        self._lengths += [len(batch.label) for batch in batches]
        self._seconds += [batch.time - self._started for batch in batches]
        self._actions += [batch.action for batch in batches]

    def _columns(self, batches: list[_Batch]) -> dict[str, Tensor]:
        """Labels and what the task keeps of the predictions, of all batches at once where they are rows of logits."""
        if self.task is CLASSIFICATION:
            logits, label = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("logits", "label"))
            return {"label": label, **self.task.columns(logits, label.to(logits.device, non_blocking=True))}
        if not self.task.tensors:
            parts = [self.task.columns(batch.logits, batch.label) for batch in batches]
        else:
            parts = [self.task.columns(b.logits, b.label.to(b.logits.device, non_blocking=True)) for b in batches]
        return {name: _together([part[name] for part in parts]) for name in parts[0]}


def _together(parts: list[Tensor]) -> Tensor:
    """One tensor of those of several batches; of boxes, whose number differs, the smaller are filled up with NaN."""
    if parts[0].dim() == 3 and parts[0].is_floating_point():
        most = max(part.shape[1] for part in parts)
        parts = [functional.pad(part, (0, 0, 0, most - part.shape[1]), value=torch.nan) for part in parts]
    return torch.cat(parts)
