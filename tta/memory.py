"""What a method remembers: averaged copies of the model, banks of samples. All of it is part of the saved state."""

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of the model, in its present state, whose parameters get no gradient: a teacher to begin with."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def follow(teacher: nn.Module, student: nn.Module, share: float, when: Tensor) -> None:
    """Move the teacher towards the student: ``teacher = (1 - share) * teacher + share * student``.

    Only parameters that the student learns move, never buffers: the others are the same in both.

    Args:
        teacher: a :func:`frozen_copy` of the student.
        student: what it was copied from.
        share: of the student, in [0, 1].
        when: boolean scalar, may lie on a GPU; the teacher stays where it is if false.
    """
    pairs = zip(teacher.parameters(), student.parameters(), strict=True)
    learned = [(average, parameter) for average, parameter in pairs if parameter.requires_grad]
    blend([average for average, _ in learned], [parameter for _, parameter in learned], share, when)


@torch.no_grad()
def blend(tensors: Iterable[Tensor], others: Iterable[Tensor], share: float | Tensor, when: Tensor) -> None:
    """Move each tensor towards another: ``tensor = (1 - share) * tensor + share * other``.

    Args:
        tensors, others: as many, of the same shapes.
        share: of the others, in [0, 1]; a scalar.
        when: boolean scalar, may lie on a GPU; the tensors stay as they are if false.
    """
    weight = share * when.float()
    for tensor, other in zip(tensors, others, strict=True):
        tensor.lerp_(other, weight.to(tensor.dtype))


class Bank(nn.Module):
    """A fixed number of slots for samples, each filed under its predicted class.

    Samples lie on the adapter's device, the books on the CPU, wherever the adapter goes: a decision depends on the one
    before, and a GPU would be waited for at each.
    """

    labels: Tensor  # predicted class of each slot, -1 in an empty one
    offered: Tensor  # number of samples so far
    samples: Tensor | None  # (capacity, ...); the first batch, or a loaded state, decides the shape

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.register_buffer("labels", torch.full((capacity,), -1))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bank":
        """Move the samples, never the books."""
        if self.samples is not None:
            self.samples = fn(self.samples)
        return self

    def __len__(self) -> int:
        return int((self.labels >= 0).sum())

    def _put(self, samples: Tensor, newcomers: dict[int, int]) -> None:
        """Copy rows of a batch into slots; ``newcomers`` maps slot to row."""
        if self.samples is None:
            self.samples = samples.new_zeros(len(self.labels), *samples.shape[1:])
        rows = torch.tensor([list(newcomers.keys()), list(newcomers.values())], dtype=torch.int64).to(samples.device)
        self.samples[rows[0]] = samples[rows[1]]


class BalancedMemory(Bank):
    """A bank of samples, balanced over predicted classes, that prefers young and certain ones.

    A class may fill its equal share of the bank; what a full bank gives up belongs to the largest classes, what a full
    class gives up is its own. It is the sample with the highest score ``lambda_t / (1 + exp(-age / capacity)) +
    lambda_u * uncertainty / ln(classes)``, and only if that is above the newcomer's; among equals the last in the
    order of class, then arrival. Ages count the samples offered since, taken or not.

    Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023.

    Args:
        capacity: number of samples.
        lambda_t: weight of age in the score.
        lambda_u: weight of uncertainty in the score.
    """

    uncertainties: Tensor
    ages: Tensor

    def __init__(self, capacity: int, lambda_t: float, lambda_u: float) -> None:
        super().__init__(capacity)
        self.lambda_t, self.lambda_u = lambda_t, lambda_u
        self.register_buffer("uncertainties", torch.zeros(capacity))
        self.register_buffer("ages", torch.zeros(capacity, dtype=torch.int64))

    def add(self, samples: Tensor, labels: Tensor, uncertainties: Tensor, classes: int) -> None:
        """Offer samples in order, each by the rule above.

        Args:
            samples: (batch, ...).
            labels: (batch,) predicted classes, on the CPU.
            uncertainties: (batch,) entropies, nats, on the CPU.
            classes: number of classes, 2 or more.
        """
        capacity, now = len(self.labels), 0
        books = zip(self.labels.tolist(), self.uncertainties.tolist(), self.ages.tolist(), strict=True)
        slots = {slot: (label, doubt, -age) for slot, (label, doubt, age) in enumerate(books) if label >= 0}
        free = [slot for slot in reversed(range(capacity)) if slot not in slots]
        count = Counter(label for label, _, _ in slots.values())
        newcomers: dict[int, int] = {}  # slot -> row of the batch

        def score(age: int, doubt: float) -> float:
            return self.lambda_t / (1 + math.exp(-age / capacity)) + self.lambda_u * doubt / math.log(classes)

        def rank(slot: int) -> tuple[float, int, int]:
            label, doubt, arrived = slots[slot]
            return score(now - arrived, doubt), label, arrived

        for now, (label, doubt) in enumerate(zip(labels.tolist(), uncertainties.tolist(), strict=True)):
            if count[label] >= capacity / classes:
                rivals = [slot for slot, (other, _, _) in slots.items() if other == label]
            elif free:
                rivals = []
            else:
                largest = max(count.values())
                rivals = [slot for slot, (other, _, _) in slots.items() if count[other] == largest]
            if rivals:
                worst = max(rivals, key=rank)
                if rank(worst)[0] <= score(0, doubt):
                    continue
                free.append(worst)
                count[slots.pop(worst)[0]] -= 1
            slot = free.pop()
            slots[slot] = (label, doubt, now)
            count[label] += 1
            newcomers[slot] = now

        self._put(samples, newcomers)
        self.offered += len(labels)
        self.labels.fill_(-1)
        taken = torch.tensor(list(slots), dtype=torch.int64)
        self.labels[taken] = torch.tensor([label for label, _, _ in slots.values()])
        self.uncertainties[taken] = torch.tensor([doubt for _, doubt, _ in slots.values()])
        self.ages[taken] = torch.tensor([len(labels) - arrived for _, _, arrived in slots.values()])

    def contents(self) -> tuple[Tensor, Tensor]:
        """The samples, in order of class and then arrival, and their ages, at least 1 and float32; both on the device."""
        assert self.samples is not None, "contents() of a memory that was never offered a sample"
        books = zip(self.labels.tolist(), self.ages.tolist(), strict=True)
        order = sorted((label, -age, slot) for slot, (label, age) in enumerate(books) if label >= 0)
        slots = torch.tensor([slot for _, _, slot in order])
        device = self.samples.device
        return self.samples[slots.to(device)], self.ages[slots].float().to(device)


class PredictionBalancedReservoir(Bank):
    """A bank that samples the stream at random within each predicted class, and keeps the classes balanced.

    While there is room every sample is taken. In a full bank a sample of one of the largest classes takes the place of a
    random one of its own, with the probability (samples of the class held) / (samples of the class offered so far);
    a sample of another class takes the place of a random one of a random largest class.

    Gong et al., "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation", NeurIPS 2022.

    Args:
        capacity: number of samples.
    """

    arrivals: Tensor  # number of the sample in each slot, in the order offered
    of_class: Tensor | None  # (classes,) samples offered so far of each class

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.register_buffer("arrivals", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("of_class", None)

    def add(self, samples: Tensor, labels: Tensor, classes: int, draw: Callable[[int], int]) -> None:
        """Offer samples in order, each by the rule above.

        Args:
            samples: (batch, ...).
            labels: (batch,) predicted classes, on the CPU.
            classes: number of classes.
            draw: a random integer from 0 to below its argument.
        """
        books = zip(self.labels.tolist(), self.arrivals.tolist(), strict=True)
        slots = {slot: book for slot, book in enumerate(books) if book[0] >= 0}
        free = [slot for slot in reversed(range(len(self.labels))) if slot not in slots]
        offered_of = [0] * classes if self.of_class is None else self.of_class.tolist()
        count = Counter(label for label, _ in slots.values())
        newcomers: dict[int, int] = {}  # slot -> row of the batch

        for row, label in enumerate(labels.tolist()):
            offered_of[label] += 1
            if not free:
                most = max(count.values())
                largest = sorted(other for other, held in count.items() if held == most)
                if label not in largest:
                    loser = largest[draw(len(largest))]
                elif draw(offered_of[label]) < most:
                    loser = label
                else:
                    continue
                members = sorted((slot for slot in slots if slots[slot][0] == loser), key=lambda slot: slots[slot][1])
                free.append(members[draw(len(members))])
                del slots[free[-1]]
                count[loser] -= 1
            slot = free.pop()
            slots[slot] = (label, int(self.offered) + row)
            count[label] += 1
            newcomers[slot] = row

        self._put(samples, newcomers)
        self.offered += len(labels)
        self.of_class = torch.tensor(offered_of)
        taken = torch.tensor(list(slots), dtype=torch.int64)
        self.labels[taken] = torch.tensor([label for label, _ in slots.values()])
        self.arrivals[taken] = torch.tensor([arrived for _, arrived in slots.values()])

    def contents(self) -> Tensor:
        """The samples, (number held, ...)."""
        assert self.samples is not None, "contents() of a memory that was never offered a sample"
        return self.samples[(self.labels >= 0).nonzero()[:, 0].to(self.samples.device)]
