"""Predictions of a run, recorded batch by batch and reduced to columns a chunk at a time."""

import time
from typing import NamedTuple

import torch
from torch import Tensor

from tta.labels import UNKNOWN
from tta.results.metrics import per_sample
from tta.results.predictions import Predictions

# Logits are reduced once there are this many (32 MB): many small reductions would cost more than the forward pass of a
# small model, and all logits of ImageNet-C together are 3 GB.
WAITING = 2**23


class _Chunk(NamedTuple):
    """Columns of some consecutive batches, and the length of each batch."""

    lengths: list[int]
    seconds: list[float]
    columns: dict[str, Tensor]
    outlier_score: Tensor | None


class _Batch(NamedTuple):
    """One batch that is not reduced yet."""

    logits: Tensor
    label: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is of no use here
    outlier_score: Tensor | None
    time: float


class Record:
    """Every prediction of a run. Adding a batch is an append: it computes nothing and does not synchronise the device."""

    def __init__(self) -> None:
        self.samples = 0
        self.classes = 0
        self._started = time.perf_counter()
        self._waiting: list[_Batch] = []
        self._chunks: list[_Chunk] = []
        self._counted = self._wrong = self._known = 0

    def add(
        self, logits: Tensor, label: Tensor, domain: Tensor, index: Tensor, outlier_score: Tensor | None = None
    ) -> None:
        """Record one batch.

        Args:
            logits: (batch, classes), not changed afterwards.
            label: (batch,), -1 for an unknown class.
            domain: (batch,), the number of each sample's domain.
            index: (batch,), the number of each sample in its domain.
            outlier_score: (batch,), from a method that gives one.
        """
        self._waiting.append(_Batch(logits, label, domain, index, outlier_score, time.perf_counter()))
        self.samples += len(label)
        self.classes = logits.shape[1]
        if len(self._waiting) * logits.numel() > WAITING:
            self._reduce()

    def leave_out(self, seconds: float) -> None:
        """Exclude some seconds from the time of the run."""
        self._started += seconds

    def wrong_and_known(self) -> tuple[int, int]:
        """Errors and samples with a known class so far; synchronises the device."""
        self._reduce()
        for chunk in self._chunks[self._counted :]:
            label = chunk.columns["label"]
            known = label != UNKNOWN
            self._known += int(known.sum())
            self._wrong += int(((chunk.columns["prediction"].cpu() != label) & known).sum())
        self._counted = len(self._chunks)
        return self._wrong, self._known

    def predictions(self) -> Predictions:
        """All predictions in stream order; synchronises the device."""
        self._reduce()
        if not self._chunks:
            empty = torch.empty(0, dtype=torch.int64).numpy()
            return Predictions(domain=empty, index=empty, label=empty, prediction=empty)
        lengths = torch.tensor([length for chunk in self._chunks for length in chunk.lengths])
        seconds = torch.tensor([time for chunk in self._chunks for time in chunk.seconds], dtype=torch.float64)
        columns = {
            name: torch.cat([chunk.columns[name].cpu() for chunk in self._chunks]).numpy()
            for name in self._chunks[0].columns
        }
        columns["batch"] = torch.arange(len(lengths)).repeat_interleave(lengths).numpy()
        columns["seconds"] = seconds.repeat_interleave(lengths).numpy()
        scores = [chunk.outlier_score.cpu() for chunk in self._chunks if chunk.outlier_score is not None]
        # If some batches (paused ones) have no scores, drop all: the scores of only a part cannot be compared.
        if len(scores) == len(self._chunks):
            columns["outlier_score"] = torch.cat(scores).numpy()
        return Predictions(**columns)

    def _reduce(self) -> None:
        if not self._waiting:
            return
        batches, self._waiting = self._waiting, []
        logits = torch.cat([batch.logits for batch in batches])
        label = torch.cat([batch.label for batch in batches])
        scores = [batch.outlier_score for batch in batches if batch.outlier_score is not None]
        columns = {
            "domain": torch.cat([batch.domain for batch in batches]),
            "index": torch.cat([batch.index for batch in batches]),
            "label": label,
            **per_sample(logits, label.to(logits.device, non_blocking=True)),
        }
        self._chunks.append(
            _Chunk(
                lengths=[len(batch.label) for batch in batches],
                seconds=[batch.time - self._started for batch in batches],
                columns=columns,
                outlier_score=torch.cat(scores) if len(scores) == len(batches) else None,
            )
        )
