"""Samples that wait for an answer: whether their prediction was right, or their class; it comes late, or never."""

from typing import NamedTuple

import torch
from torch import Tensor

from tta.memory import Bank
from tta.messages import require

WAITING, EXPIRY = 512, 1000  # images and batches, where the configuration says nothing else


class Answers(NamedTuple):
    """Counts of answers, by what was done with them; printed, a sentence.

    Attributes:
        taken: learned from, or noted by the guard.
        repeated: said again what was known; ignored.
        contradicting: said otherwise than the first answer to the same sample, which counts; ignored.
        expired: about a sample or prediction that is no longer kept.
        unknown: about an id that no sample kept has, or ever had.
    """

    taken: int = 0
    repeated: int = 0
    contradicting: int = 0
    expired: int = 0
    unknown: int = 0

    def __str__(self) -> str:
        parts = [f"{count} {name}" for name, count in self._asdict().items() if count and name != "taken"]
        return f"{sum(self)} answers: {self.taken} taken{''.join(f', {part}' for part in parts)}."


TAKEN, REPEATED, CONTRADICTING, EXPIRED, UNKNOWN = range(len(Answers._fields))


class Told(NamedTuple):
    """Samples that were answered.

    Attributes:
        images: (n, channels, height, width).
        predicted: (n,), the class that the answer speaks of: the one shown, unless the method noted another.
        correct: (n,), boolean, whether it was right.
        labels: (n,), the class; None where only right or wrong was told.
        notes: (n,), the number that the method noted when it asked; 1 if it did not ask.
    """

    images: Tensor
    predicted: Tensor
    correct: Tensor
    labels: Tensor | None
    notes: Tensor


class Waiting(Bank):
    """A bank of the newest samples, by their ids, each with what was predicted, asked and answered.

    A full bank gives up the oldest sample that was not asked about, or that was answered; only then the oldest that an answer
    is awaited for. All that waited longer than ``expiry`` batches is given up too.

    Args:
        capacity: number of samples.
        expiry: batches that a sample is kept.
    """

    ids: Tensor  # (capacity,), int64, as all but `asked` and `notes`
    arrivals: Tensor  # number of the sample, in the order offered
    batch: Tensor  # number of its batch
    asked: Tensor  # (capacity,), boolean
    right: Tensor  # 1 or 0 once answered, -1 before
    classes_told: Tensor  # the label once it was told, -1 before
    notes: Tensor  # (capacity,), a number that the method notes when it asks
    batches: Tensor  # number of batches so far
    counts: Tensor  # of answers so far, in the order of `Answers`
    own_ids: Tensor  # whether the user ever gave ids
    classes: Tensor  # of the model, 0 before the first batch

    def __init__(self, capacity: int = WAITING, expiry: int = EXPIRY) -> None:
        super().__init__(capacity)
        self.expiry = expiry
        for name in ("ids", "arrivals", "batch", "right", "classes_told"):
            self.register_buffer(name, torch.full((capacity,), -1))
        self.register_buffer("asked", torch.zeros(capacity, dtype=torch.bool))
        self.register_buffer("notes", torch.ones(capacity))
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self.register_buffer("counts", torch.zeros(len(Answers._fields), dtype=torch.int64))
        self.register_buffer("own_ids", torch.zeros((), dtype=torch.bool))
        self.register_buffer("classes", torch.zeros((), dtype=torch.int64))

    def add(self, images: Tensor, logits: Tensor, ids: Tensor | None = None) -> Tensor:
        """Take in a batch.

        Args:
            images: (batch, channels, height, width).
            logits: (batch, classes), as they were shown.
            ids: (batch,), int64, on the CPU; left out, the samples' numbers in the order offered. An id that is held already
                is now the newer sample's.

        Returns:
            The ids.

        Raises:
            ValueError: images of another size than those held; nothing is changed.
        """
        self.check(images)
        labels = logits.argmax(1).cpu()
        self.classes.fill_(logits.shape[1])
        arrivals = int(self.offered) + torch.arange(len(images))
        if ids is None:
            ids = arrivals
        else:
            self.own_ids.fill_(True)
        self.offered += len(images)
        self._free((self.batches - self.batch > self.expiry) | torch.isin(self.ids, ids))
        kept = min(len(images), len(self.labels))
        held = self.labels >= 0
        rank = held.long() + (held & self.asked & (self.right < 0))
        # Empty slots first, then by age: among equals of a rank the oldest; lexicographic by two stable sorts.
        by_age = self.arrivals.argsort(stable=True)
        slots = by_age[rank[by_age].argsort(stable=True)][:kept]
        self._free(torch.isin(torch.arange(len(self.labels)), slots))
        self._put(images, {slot: len(images) - kept + row for row, slot in enumerate(slots.tolist())})
        self.labels[slots], self.ids[slots], self.arrivals[slots] = labels[-kept:], ids[-kept:], arrivals[-kept:]
        self.batch[slots] = self.batches
        self.batches += 1
        return ids

    def _free(self, which: Tensor) -> None:
        """Empty some slots."""
        for books in (self.labels, self.ids, self.arrivals, self.batch, self.right, self.classes_told):
            books[which] = -1
        self.asked[which] = False
        self.notes[which] = 1.0

    def open(self, limit: int) -> Tensor:
        """Slots of those of the newest samples that were neither asked about nor answered, the oldest first.

        The newest are ``limit`` samples, or the last batch where that is larger.
        """
        last = int((self.batch == self.batches - 1).sum())
        newest = (self.labels >= 0) & (self.arrivals >= self.offered - max(limit, last))
        slots = (newest & ~self.asked & (self.right < 0)).nonzero()[:, 0]
        return slots[self.arrivals[slots].argsort()]

    def pending(self) -> Tensor:
        """Slots of the samples that an answer is awaited for, the oldest first."""
        slots = (self.asked & (self.right < 0)).nonzero()[:, 0]
        return slots[self.arrivals[slots].argsort()]

    def images(self, slots: Tensor) -> Tensor:
        """The images in some slots."""
        assert self.samples is not None, "images() of a bank that was never offered one"
        return self.samples[slots.to(self.samples.device)]

    def slots(self, ids: Tensor) -> Tensor:
        """The slot of each id, -1 where no sample has it."""
        found = (ids[:, None] == self.ids) & (self.labels >= 0)
        return torch.where(found.any(1), found.int().argmax(1), -1)

    def answer(self, ids: Tensor, right: Tensor | None, labels: Tensor | None) -> tuple[Answers, Tensor]:
        """Note answers, of which the first to each sample counts.

        Args:
            ids: (n,), int64.
            right: (n,), boolean, whether the prediction was right; None where ``labels`` are given.
            labels: (n,), int64, the classes.

        Returns:
            Counts of them, and the slots of those taken.
        """
        counts, taken = [0] * len(Answers._fields), []
        for row, (number, slot) in enumerate(zip(ids.tolist(), self.slots(ids).tolist(), strict=True)):
            if slot < 0:
                known = 0 <= number < int(self.offered) and not self.own_ids
                counts[EXPIRED if known else UNKNOWN] += 1
                continue
            label = -1 if labels is None else int(labels[row])
            is_right = label == int(self.labels[slot]) if right is None else bool(right[row])
            before, told = int(self.right[slot]), int(self.classes_told[slot])
            if before < 0:
                self.right[slot], self.classes_told[slot] = int(is_right), label
                counts[TAKEN] += 1
                taken.append(slot)
            else:
                otherwise = before != is_right or (told >= 0 and label >= 0 and told != label)
                counts[CONTRADICTING if otherwise else REPEATED] += 1
        self.counts += torch.tensor(counts)
        return Answers(*counts), torch.tensor(taken, dtype=torch.int64)

    def told(self, slots: Tensor) -> Told:
        """Answers about the samples in some slots."""
        labels = self.classes_told[slots]
        return Told(
            self.images(slots),
            self.labels[slots],
            self.right[slots] == 1,
            labels if (labels >= 0).all() else None,
            self.notes[slots],
        )


def as_ids(ids: object) -> Tensor:
    """Ids as int64 on the CPU, (n,).

    Raises:
        ValueError: no whole numbers, or not in a row.
    """
    found = torch.as_tensor(ids)
    if found.numel() == 0:
        found = found.long()
    whole = not (found.is_floating_point() or found.is_complex() or found.dtype == torch.bool)
    require(
        found.dim() == 1 and whole, f"ids of {found.dtype} and shape {tuple(found.shape)}", "whole numbers in a row"
    )
    return found.long().cpu()
