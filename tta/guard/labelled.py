"""Errors of the adapter and of the source model on the same images, from answers to the guard."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tta.adapter import Answers, StateDict
from tta.guard.bounds import Bet

RECENT = 8192  # predictions that an answer may be about
QUESTIONS = 4096  # of the guard's own, kept apart, so that busy traffic does not push them out
# Columns of a prediction. PICKED is the number of the first prediction of its batch, where it was chosen at random to be asked
# about; RIGHT and LABEL are what was answered, -1 before; ADAPTED and SOURCE are classes, -1 where they are not known.
ID, ARRIVAL, BY_SOURCE, PICKED, RIGHT, LABEL, ADAPTED, SOURCE = range(8)


class Labelled:
    """Predictions of the adapter and of the source model, by id, and two tests on those that were answered.

    The difference of an answered prediction is the error of the adapter, 0 or 1, minus that of the source model on the same image.

    * :attr:`harm`: its mean is above ``tolerance``. If the adapter's risk, given the past, never is above the source model's by
      more than ``tolerance``, the probability of a single such finding, however long the stream, is at most ``level``.
    * :attr:`better`: its mean is below 0, and is so lately; likewise, for an adapter that never is better.

    That is proved (see :class:`tta.guard.bounds.Bet`) for answers about images that were chosen without regard to whether they
    are wrong, as the guard's own questions are, and that arrive in an order that has nothing to do with it. An answer that is wrong
    with probability p, for whatever class, multiplies the mean by 1 - p K / (K - 1) for labels of K classes and 1 - 2 p for right
    or wrong: it takes more answers, and the levels hold.

    Kept are numbers of the latest 8192 predictions and of 4096 questions, and no image.

    Args:
        level: see above.
        tolerance: see above.
        asked_only: count answers to the guard's own questions alone.
    """

    def __init__(self, level: float, tolerance: float, asked_only: bool) -> None:
        self.harmful, self.helpful = Bet(level, tolerance), Bet(level, 0.0)
        self.asked_only = asked_only
        self.classes = 0  # of the model, 0 before the first batch
        self.offered = 0  # predictions so far
        self.since = 0  # first prediction of the present adapter
        self.own_ids = False  # whether the user ever gave ids
        self.counts = [0] * len(Answers._fields)
        self.pairs = 0  # answers that both tests could use
        self.rows: Tensor | None = None  # (RECENT, 6), int64, a ring, on the CPU
        # (2, RECENT), classes of the adapter and of the source, on the device; -1 unknown
        self.predicted: Tensor | None = None
        self.questions = torch.zeros(0, 8, dtype=torch.int64)

    # ------------------------------------------------------------------ predictions

    def remember(
        self, ids: Tensor | None, predicted: Tensor, picked: Tensor, *, classes: int, by_source: bool
    ) -> Tensor:
        """Keep the predictions of a batch.

        Args:
            ids: (batch,), -1 for one that is not kept; None for the numbers of the predictions.
            predicted: (2, batch), classes of the adapter and of the source model, -1 where unknown.
            picked: rows that were chosen at random to be asked about.
            classes: of the model.
            by_source: whether the source model's were shown.

        Returns:
            The ids.
        """
        count, device = predicted.shape[1], predicted.device
        self.classes = classes
        arrivals = self.offered + torch.arange(count)
        self.own_ids |= ids is not None
        ids = arrivals if ids is None else ids
        rows = torch.full((count, ADAPTED), -1)
        rows[:, ID], rows[:, ARRIVAL], rows[:, BY_SOURCE] = ids, arrivals, int(by_source)
        rows[picked, PICKED] = self.offered
        if self.rows is None or self.predicted is None:
            self.rows = torch.full((RECENT, ADAPTED), -1)
            self.predicted = torch.full((2, RECENT), -1, dtype=torch.int32, device=device)
        self.predicted = self.predicted.to(device)  # a loaded state may lie elsewhere
        first = max(0, count - RECENT)
        while first < count:
            place = (self.offered + first) % RECENT
            length = min(count - first, RECENT - place)
            self.rows[place : place + length] = rows[first : first + length]
            self.predicted[:, place : place + length] = predicted[:, first : first + length]
            first += length
        self.offered += count
        return ids

    def restart(self) -> None:
        """Count answers about predictions from here on only: those before are of another adapter."""
        self.since = self.offered
        self.harmful.restart()
        self.helpful.restart()

    # ------------------------------------------------------------------ questions

    def ask(self, count: int, seed: int) -> list[int]:
        """Ids of predictions that an answer would tell something about: those picked of the latest batch, then others."""
        if self.rows is None or self.predicted is None:
            return []
        rows = torch.cat([self.rows, self.predicted.T.cpu().long()], 1)
        known = (rows[:, ID] >= 0) & (rows[:, ARRIVAL] >= self.since) & (rows[:, [ADAPTED, SOURCE]] >= 0).all(1)
        places = (known & (rows[:, RIGHT] < 0)).nonzero()[:, 0]
        places = places[torch.randperm(len(places), generator=torch.Generator().manual_seed(seed))]
        places = places[rows[places, PICKED].argsort(descending=True, stable=True)]
        chosen = rows[places[:count]]
        self.rows[places[:count], ID] = -1
        self.questions = torch.cat([self.questions, chosen])[-QUESTIONS:]
        ids: list[int] = chosen[:, ID].tolist()
        return ids

    def leave_out(self, ids: Tensor) -> None:
        """Let answers about some predictions tell nothing: the method chose them by how unsure it is."""
        if self.rows is not None and self.predicted is not None:
            places = torch.isin(self.rows[:, ID], ids).nonzero()[:, 0]
            self.predicted[:, places.to(self.predicted.device)] = -1

    # ------------------------------------------------------------------ answers

    def tell(self, ids: Tensor, right: Tensor | None, labels: Tensor | None) -> Answers:
        """Take answers: whether the predictions shown were right, or their classes, each (n,). The first to each counts."""
        counted, found = dict.fromkeys(Answers._fields, 0), self._found(ids)
        taken: list[tuple[Tensor, bool]] = []
        for number, name in enumerate(ids.tolist()):
            if name not in found:
                counted["expired" if 0 <= name < self.offered and not self.own_ids else "unknown"] += 1
                continue
            row, place, asked = found[name]
            label = -1 if labels is None else int(labels[number])
            shown = int(row[SOURCE if row[BY_SOURCE] else ADAPTED])
            is_right = int(label == shown if right is None else right[number])
            if row[RIGHT] < 0:
                row[RIGHT], row[LABEL] = is_right, label
                self._note(place, asked, row)
                taken.append((row, asked))
                counted["taken"] += 1
            else:
                otherwise = int(row[RIGHT]) != is_right or (row[LABEL] >= 0 and label >= 0 and row[LABEL] != label)
                counted["contradicting" if otherwise else "repeated"] += 1
        for row, asked in sorted(taken, key=lambda one: int(one[0][ARRIVAL])):
            self._count(row, asked)
        self.counts = [before + new for before, new in zip(self.counts, counted.values(), strict=True)]
        return Answers(**counted)

    def _found(self, ids: Tensor) -> dict[int, tuple[Tensor, int, bool]]:
        """Predictions with some ids: columns, place, and whether it is a question; of one id given twice the newer one."""
        if self.rows is None or self.predicted is None:
            return {}
        found = [
            (self.questions[place], place, True)
            for place in torch.isin(self.questions[:, ID], ids).nonzero()[:, 0].tolist()
        ]
        places = (torch.isin(self.rows[:, ID], ids) & (self.rows[:, ID] >= 0)).nonzero()[:, 0]
        predicted = self.predicted[:, places.to(self.predicted.device)].cpu().long()
        rows = torch.cat([self.rows[places], predicted.T], 1)
        found += [(row, place, False) for row, place in zip(rows, places.tolist(), strict=True)]
        found.sort(key=lambda one: int(one[0][ARRIVAL]))
        return {int(row[ID]): (row, place, asked) for row, place, asked in found}

    def _note(self, place: int, asked: bool, row: Tensor) -> None:
        if asked:
            self.questions[place] = row
        elif self.rows is not None:
            self.rows[place] = row[:ADAPTED]

    def _count(self, row: Tensor, asked: bool) -> None:
        """Let an answer count in both tests, if it is about the present adapter and both models' predictions are known."""
        if row[ARRIVAL] < self.since or min(row[ADAPTED], row[SOURCE]) < 0 or (self.asked_only and not asked):
            return
        smallest, largest = difference(row, self.classes)
        self.harmful.add(smallest)
        self.helpful.add(-largest)
        self.pairs += 1

    # ------------------------------------------------------------------ findings

    @property
    def harm(self) -> str:
        """The reason of an alarm, empty without one."""
        if not self.harmful.found:
            return ""
        return f"labels: {100 * self.harmful.mean:+.0f} points of error against the source model, {self.harmful.count} answers"

    @property
    def better(self) -> str:
        """The finding that the adapter is better than the source model, empty without it."""
        if not self.helpful.found or self.helpful.mean <= 0:
            return ""
        return f"labels: {-100 * self.helpful.mean:+.0f} points of error against the source model, {self.helpful.count} answers"

    # ------------------------------------------------------------------ state

    def state(self) -> tuple[dict[str, Any], StateDict]:
        """Everything remembered: numbers that JSON can hold, and tensors."""
        plain = {name: getattr(self, name) for name in ("classes", "offered", "since", "own_ids", "counts", "pairs")}
        plain |= {"harmful": asdict(self.harmful), "helpful": asdict(self.helpful)}
        if self.rows is None or self.predicted is None:
            return plain, {}
        filled = min(self.offered, RECENT)
        return plain, {
            "answers.rows": self.rows[:filled],
            "answers.predicted": self.predicted[:, :filled],
            "answers.questions": self.questions,
        }

    def load(self, plain: Mapping[str, Any], tensors: StateDict) -> None:
        """Take over a state of :meth:`state`, into a new one."""
        for name in ("classes", "offered", "since", "own_ids", "pairs"):
            setattr(self, name, plain[name])
        self.counts = list(plain["counts"])
        self.harmful, self.helpful = Bet(**plain["harmful"]), Bet(**plain["helpful"])
        if "answers.rows" in tensors:
            rows, predicted = tensors["answers.rows"], tensors["answers.predicted"]
            self.rows = torch.full((RECENT, ADAPTED), -1)
            self.rows[: len(rows)] = rows.cpu()
            self.predicted = torch.full((2, RECENT), -1, dtype=torch.int32, device=predicted.device)
            self.predicted[:, : len(rows)] = predicted
            self.questions = tensors["answers.questions"].cpu().clone()

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the predicted classes along with the adapter; all else stays on the CPU."""
        self.predicted = None if self.predicted is None else fn(self.predicted)


def difference(row: Tensor, classes: int) -> tuple[int, int]:
    """Error of the adapter minus that of the source model, the smallest and the largest value that an answer allows.

    They differ where a prediction was called wrong and the models disagree: with more than two classes the other one may be
    right, or wrong too.
    """
    adapted, source, label = int(row[ADAPTED]), int(row[SOURCE]), int(row[LABEL])
    if label >= 0:
        value = int(adapted != label) - int(source != label)
        return value, value
    if adapted == source:
        return 0, 0
    sign = -1 if row[BY_SOURCE] else 1  # of the error of the one that was shown
    if row[RIGHT]:
        return -sign, -sign
    return (sign, sign) if classes == 2 else (min(0, sign), max(0, sign))
