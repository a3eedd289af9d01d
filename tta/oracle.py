"""An oracle: it answers what an adapter asks about a stream, late and at times wrongly, as people do."""

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from tta.adapter import Adapter, Output
from tta.datasets.stream import Asked
from tta.labels import UNKNOWN

KEPT = 8192  # labels, for a guard that asks


class _Answer(NamedTuple):
    due: int  # batch after which it is given
    ids: list[int]
    values: Tensor  # right or wrong, or classes


class Oracle:
    """Asks an adapter after each batch what it would like to know, and tells it some batches later.

    Labels reach the adapter in no other way. Of the answers exactly the share ``noise``, rounded down, is wrong after any
    batch; which ones is drawn. Samples of an unknown class are not answered.

    Args:
        asked: how many answers, how late, and how many of them wrong.
        seed: of the wrong answers.
    """

    def __init__(self, asked: Asked, seed: int) -> None:
        self.asked = asked
        self._draws = torch.Generator().manual_seed(seed)
        self._labels: dict[int, int] = {}  # of the samples that may still be asked about, by id
        self._open: deque[_Answer] = deque()
        self._batch = 0
        self._answered = 0
        self.counts = {"questions": 0, "labels": 0, "wrong": 0}

    @property
    def open(self) -> int:
        """Number of answers that were not given yet."""
        return sum(len(answer.ids) for answer in self._open)

    def forget(self) -> None:
        """Drop what is open: the adapter was reset, and its ids begin anew."""
        self._open.clear()
        self._labels.clear()

    def after(self, adapter: Adapter, output: Output, labels: Tensor) -> None:
        """Ask about a batch that was predicted, and give the answers that are due.

        Args:
            adapter: that predicted it; of a method that cannot use feedback its guard asks, and without one nobody does.
            output: its output.
            labels: (batch,), on the CPU.
        """
        if not adapter.listens_to or output.ids is None:
            return
        ids = output.ids.tolist()
        self._labels |= {number: label for number, label in zip(ids, labels.tolist(), strict=True) if number >= 0}
        kept = len(adapter.waiting.labels) if adapter.uses_feedback else KEPT
        for number in list(self._labels)[:-kept]:  # no longer kept by the adapter
            del self._labels[number]
        questions = adapter.queries(self.asked.budget) if ids and max(ids) >= 0 else []
        self.counts["questions"] += len(questions)
        known = [number for number in questions if self._labels.get(number, UNKNOWN) != UNKNOWN]
        if known:
            self._open.append(_Answer(self._batch + self.asked.delay, known, self._answers(adapter, known)))
        while self._open and self._open[0].due <= self._batch:
            answer = self._open.popleft()
            kind = adapter.listens_to[0]
            self.counts["labels"] += adapter.feedback(answer.ids, **{kind: answer.values}).taken
        self._batch += 1

    def _answers(self, adapter: Adapter, ids: list[int]) -> Tensor:
        """Answers about samples, some of them wrong."""
        labels = torch.tensor([self._labels[number] for number in ids])
        before = int(self.asked.noise * self._answered + 1e-9)
        self._answered += len(ids)
        wrong = torch.zeros(len(ids), dtype=torch.bool)
        wrong[
            torch.randperm(len(ids), generator=self._draws)[: int(self.asked.noise * self._answered + 1e-9) - before]
        ] = True
        self.counts["wrong"] += int(wrong.sum())
        if adapter.listens_to[0] == "correct":
            shown = adapter.waiting.labels[adapter.waiting.slots(torch.tensor(ids))]
            return (shown == labels) ^ wrong
        classes = adapter.answer_classes()
        other = torch.randint(1, max(classes, 2), (len(ids),), generator=self._draws)
        return torch.where(wrong, (labels + other) % classes, labels)
