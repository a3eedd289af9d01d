"""Banks of samples and running statistics, part of the saved state."""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tta.distributed import ALONE, Workers
from tta.functional import matmul


def check_size(held: Tensor | None, offered: Tensor) -> None:
    """Raise a ValueError unless samples have the size that a memory holds.

    Args:
        held: the memory's samples, (capacity, ...); None if it was never offered one.
        offered: (batch, ...).
    """
    if held is not None and held.shape[1:] != offered.shape[1:]:
        raise ValueError(
            f"The memory holds images of shape {tuple(held.shape[1:])}; got images of shape {tuple(offered.shape[1:])}. "
            "Nothing was learned from them. Give all batches one size, or call reset() first, which empties the memory."
        )


class Bank(nn.Module):
    """A fixed number of slots for samples, each with its predicted class.

    Samples are on the adapter's device. The books (labels, ages, counts) stay on the CPU: each decision depends on the
    one before, and on a GPU each would have to be waited for.
    """

    labels: Tensor  # predicted class of each slot, -1 in an empty one
    offered: Tensor  # number of samples so far
    samples: Tensor | None  # (capacity, ...); the first batch, or a loaded state, decides the shape

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.workers: Workers = ALONE
        self.register_buffer("labels", torch.full((capacity,), -1))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))
        self.register_buffer("samples", None)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Bank":
        """Move the samples; the books stay on the CPU."""
        if self.samples is not None:
            self.samples = fn(self.samples)
        return self

    def __len__(self) -> int:
        return int((self.labels >= 0).sum())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, unless the samples cannot be those of this bank."""
        samples, labels = state_dict.get(f"{prefix}samples"), state_dict.get(f"{prefix}labels")
        if samples is None:
            fits = labels is None or not (labels >= 0).any()
        else:
            fits = samples.dim() > 1 and len(samples) == len(self.labels) and samples.is_floating_point()
        if not fits:
            given = "none" if samples is None else f"{samples.dtype} of shape {tuple(samples.shape)}"
            raise ValueError(
                f"The memory '{prefix}samples' holds {len(self.labels)} floating-point samples; the state has {given}."
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def check(self, samples: Tensor) -> None:
        """Raise a ValueError unless the samples have the size of those held; to be called before anything is learned."""
        check_size(self.samples, samples)

    def _put(self, samples: Tensor, newcomers: dict[int, int]) -> None:
        """Copy rows of a batch, of all workers, into slots; ``newcomers`` maps slot to row."""
        samples = samples.detach()
        if self.samples is None:
            self.samples = samples.new_zeros(len(self.labels), *samples.shape[1:])
        samples = samples.to(self.samples.dtype)
        rows = torch.tensor([list(newcomers.keys()), list(newcomers.values())], dtype=torch.int64).to(samples.device)
        self.samples[rows[0]] = self.workers.picked(samples, rows[1])


class BalancedMemory(Bank):
    """A bank of samples, balanced over predicted classes, that prefers young and certain ones.

    A class may fill its equal share of the bank. If the class of a newcomer has filled it, a sample of that class is
    replaced; else, if the bank is full, a sample of the largest classes. It is the one with the highest score ``lambda_t /
    (1 + exp(-age / capacity)) + lambda_u * uncertainty / ln(classes)``, and only if that is above the newcomer's; among
    equals the last in order of class, then arrival. An age is the number of samples offered since, kept or not.

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
            samples: (batch, ...); of several workers each offers its own.
            labels: (batch,) predicted classes, of all workers, on the CPU.
            uncertainties: (batch,) entropies, nats, of all workers, on the CPU.
            classes: number of classes, 2 or more.

        Raises:
            ValueError: samples of another size than those held; nothing is changed.
        """
        self.check(samples)
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

        Raises:
            ValueError: samples of another size than those held; nothing is changed.
        """
        self.check(samples)
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
                elif self._enters(most, offered_of[label], draw):
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
        taken, held, arrived = torch.tensor([(s, *book) for s, book in slots.items()], dtype=torch.int64).view(-1, 3).T
        self.labels[taken], self.arrivals[taken] = held, arrived

    def contents(self) -> Tensor:
        """The samples, (number held, ...)."""
        assert self.samples is not None, "contents() of a memory that was never offered a sample"
        return self.samples[(self.labels >= 0).nonzero()[:, 0].to(self.samples.device)]

    def _enters(self, held: int, offered: int, draw: Callable[[int], int]) -> bool:
        """Whether a sample of a largest class takes the place of one of its own."""
        return draw(offered) < held


class UniformMemory(PredictionBalancedReservoir):
    """A bank that takes in every sample offered, and keeps the classes balanced.

    In a full bank a sample of one of the largest classes takes the place of a random one of its own, a sample of another
    class that of a random one of a random largest class. Only what is confident should be offered: see :meth:`add_sure`.

    Gong et al., "SoTTA: Robust Test-Time Adaptation on Noisy Data Streams", NeurIPS 2023.

    Args:
        capacity: number of samples.
    """

    def add_sure(self, samples: Tensor, labels: Tensor, sure: Tensor, classes: int, draw: Callable[[int], int]) -> None:
        """Offer those samples that are sure, in order; the others count as offered too.

        Args:
            samples: (batch, ...).
            labels: (batch,) predicted classes, on the CPU.
            sure: (batch,), boolean, on the CPU.
            classes: number of classes.
            draw: a random integer from 0 to below its argument.

        Raises:
            ValueError: samples of another size than those held; nothing is changed.
        """
        rows = sure.nonzero()[:, 0]
        self.add(samples[rows.to(samples.device)], labels[rows], classes, draw)
        self.offered += len(labels) - len(rows)

    def _enters(self, held: int, offered: int, draw: Callable[[int], int]) -> bool:
        return True


class ReplayMemory(Bank):
    """A bank that, when full, replaces the oldest sample of the class that was most frequent in recent readings.

    The frequency is a moving average of the number of samples that the class had at each reading, the newest with a share
    of 0.1. Among classes of equal frequency, as all are before the first reading, one is drawn.

    Yu et al., "STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024.

    Args:
        capacity: number of samples.
    """

    arrivals: Tensor  # number of the sample in each slot, in the order offered
    readings: Tensor
    seen: Tensor | None  # (classes,), the moving average

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.register_buffer("arrivals", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("readings", torch.zeros((), dtype=torch.int64))
        self.register_buffer("seen", None)

    def add(self, samples: Tensor, labels: Tensor, classes: int, pick: Callable[[list[int]], int]) -> None:
        """Offer samples in order; every one is kept.

        Args:
            samples: (batch, ...).
            labels: (batch,) predicted classes, on the CPU.
            classes: number of classes.
            pick: draws one of several classes.

        Raises:
            ValueError: samples of another size than those held; nothing is changed.
        """
        self.check(samples)
        members: list[list[int]] = [[] for _ in range(classes)]  # slots, the oldest first
        for label, _, slot in self._order():
            members[label].append(slot)
        free = (self.labels < 0).nonzero()[:, 0].tolist()
        seen = [0.0] * classes if self.seen is None else self.seen.tolist()
        newcomers: dict[int, int] = {}  # slot -> row of the batch
        for row, label in enumerate(labels.tolist()):
            if free:
                slot = free.pop(0)
            else:
                most = max(seen[other] for other in range(classes) if members[other])
                loser = pick([other for other in range(classes) if members[other] and seen[other] == most])
                slot = members[loser].pop(0)
            members[label].append(slot)
            newcomers[slot] = row
            self.labels[slot], self.arrivals[slot] = label, self.offered + row
        self._put(samples, newcomers)
        self.offered += len(labels)
        self.seen = torch.tensor(seen)

    def read(self) -> Tensor:
        """All samples, in order of class and then arrival, (number held, ...); updates the frequencies."""
        assert self.samples is not None, "read() of a memory that was never offered a sample"
        assert self.seen is not None
        order = self._order()
        counts = Counter(label for label, _, _ in order)
        self.seen = 0.9 * self.seen.cpu() + torch.tensor([0.1 * counts[label] for label in range(len(self.seen))])
        self.readings += 1
        return self.samples[torch.tensor([slot for _, _, slot in order]).to(self.samples.device)]

    def _order(self) -> list[tuple[int, int, int]]:
        """Class, arrival and slot of each sample, sorted."""
        books = zip(self.labels.tolist(), self.arrivals.tolist(), strict=True)
        return sorted((label, arrived, slot) for slot, (label, arrived) in enumerate(books) if label >= 0)


class LabelledQueue(Bank):
    """A bank of the newest samples, each with a label that it was given and a weight.

    Args:
        capacity: number of samples.
    """

    weights: Tensor  # (capacity,), float32, on the CPU

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self.register_buffer("weights", torch.zeros(capacity))

    def add(self, samples: Tensor, labels: Tensor, weights: Tensor | None = None) -> None:
        """Take in samples, in place of the oldest.

        Args:
            samples: (n, ...).
            labels: (n,), int64, on the CPU.
            weights: (n,), on the CPU; 1 where left out.

        Raises:
            ValueError: samples of another size than those held; nothing is changed.
        """
        self.check(samples)
        capacity = len(self.labels)
        rows = torch.arange(len(samples))[-capacity:]
        slots = (self.offered + rows) % capacity
        self._put(samples, dict(zip(slots.tolist(), rows.tolist(), strict=True)))
        self.labels[slots] = labels[rows]
        self.weights[slots] = torch.ones(len(rows)) if weights is None else weights[rows]
        self.offered += len(samples)

    def contents(self) -> tuple[Tensor, Tensor]:
        """Samples (number held, ...) and labels (number held,), the oldest first, on the samples' device."""
        assert self.samples is not None, "contents() of a memory that was never offered a sample"
        slots = self.slots()
        device = self.samples.device
        return self.samples[slots.to(device)], self.labels[slots].to(device)

    def slots(self) -> Tensor:
        """The slots that hold samples, the oldest first."""
        capacity = len(self.labels)
        return torch.arange(max(0, int(self.offered) - capacity), int(self.offered)) % capacity


class RunningGaussian(nn.Module):
    """Running mean and covariance of features, of one group of samples or of several.

    A new sample weighs 1 / (samples of its group so far), and at least ``1 / length``, so that older ones fade. In a
    batch with more than ``length`` samples of a group each weighs 1 / (their number).

    Su et al., "Revisiting Realistic Test-Time Training: Sequential Inference and Adaptation by Anchored Clustering",
    NeurIPS 2022.

    Args:
        mean: initial mean, (groups, width).
        covariance: initial covariance, (groups, width, width), or (groups, width) for variances only; divided by the
            number of samples.
        length: 1 or more; infinite for plain moments.
        count: number of samples that the initial moments count as.
    """

    mean: Tensor
    covariance: Tensor
    count: Tensor  # (groups,)

    def __init__(self, mean: Tensor, covariance: Tensor, length: float = math.inf, count: int = 0) -> None:
        super().__init__()
        self.length = length
        self.register_buffer("mean", mean.clone())
        self.register_buffer("covariance", covariance.clone())
        self.register_buffer("count", torch.full_like(mean[:, 0], count))

    def add(self, features: Tensor, member: Tensor, when: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Update the moments with a batch of features, unless the result is not finite.

        Args:
            features: (batch, width).
            member: (batch, groups), boolean.
            when: a boolean scalar; if it is false the moments are computed and not kept.

        Returns:
            Mean and covariance after the update; gradients flow to these features, not to earlier ones.
        """
        member = member.to(features.dtype)
        arrived = member.sum(0)
        count = self.count + arrived
        rate = 1 / count.clamp(max=self.length).maximum(arrived).clamp(min=1)
        difference = (features - self.mean[:, None]) * member.T[..., None]  # (groups, batch, width)
        shift = rate[:, None] * difference.sum(1)
        if self.covariance.dim() == 2:
            scatter, square = difference.square().sum(1), shift.square()
        else:
            scatter, square = matmul(difference.mT, difference), shift[:, :, None] * shift[:, None, :]
        rate, arrived = (value.view(-1, *[1] * (self.covariance.dim() - 1)) for value in (rate, arrived))
        mean, covariance = self.mean + shift, self.covariance + rate * (scatter - arrived * self.covariance) - square
        with torch.no_grad():
            good = mean.isfinite().all() & covariance.isfinite().all()
            good = good if when is None else good & when
            for buffer, value in ((self.mean, mean), (self.covariance, covariance), (self.count, count)):
                buffer.copy_(torch.where(good, value, buffer))
        return mean, covariance


class ReviewQueue(nn.Module):
    """The last images, each with a moving average of its predictions, and whether it can be trusted.

    A new prediction has a share of 0.9 in the moving average. An image whose top probability falls more than
    ``tolerance`` below the average for that class is distrusted for the next five passes over the queue.

    Su et al., "Revisiting Realistic Test-Time Training: Sequential Inference and Adaptation by Anchored Clustering",
    NeurIPS 2022.

    Args:
        capacity: number of images.
        tolerance: a difference of probabilities.
    """

    images: Tensor | None  # (capacity, ...)
    predictions: Tensor | None  # (capacity, classes), zeros for an image not reviewed yet
    distrust: Tensor  # (capacity,), passes until each can be trusted
    offered: Tensor  # number of images so far

    def __init__(self, capacity: int, tolerance: float) -> None:
        super().__init__()
        self.tolerance = tolerance
        self.register_buffer("images", None)
        self.register_buffer("predictions", None)
        self.register_buffer("distrust", torch.zeros(capacity, dtype=torch.int64))
        self.register_buffer("offered", torch.zeros((), dtype=torch.int64))

    def __len__(self) -> int:
        return min(int(self.offered), len(self.distrust))

    def add(self, images: Tensor, classes: int) -> None:
        """Take in images, in place of the oldest ones.

        Args:
            images: (batch, ...).
            classes: number of classes.

        Raises:
            ValueError: images of another size than those held; nothing is changed.
        """
        check_size(self.images, images)
        images, capacity = images.detach(), len(self.distrust)
        if self.images is None:
            self.images = images.new_zeros(capacity, *images.shape[1:])
            self.predictions = torch.zeros(capacity, classes, device=images.device)
        assert self.predictions is not None
        slots = (self.offered + torch.arange(len(images), device=self.offered.device))[-capacity:] % capacity
        self.images[slots] = images[-capacity:].to(self.images.dtype)
        self.predictions[slots] = 0
        self.distrust[slots] = 0
        self.offered += len(images)

    def begin_pass(self) -> None:
        """Begin a pass over the queue: one pass less until each distrusted image is trusted again."""
        self.distrust.sub_(1).clamp_(min=0)

    def review(self, slots: Tensor, probabilities: Tensor) -> Tensor:
        """Update the moving averages with new predictions of some of the images.

        Args:
            slots: (n,), places of the images in the queue.
            probabilities: (n, classes).

        Returns:
            (n, classes), the moving averages of those that can be trusted, zeros for the others.
        """
        assert self.predictions is not None
        before = self.predictions[slots]
        top, label = probabilities.max(1)
        fell = top <= before.gather(1, label[:, None])[:, 0] - self.tolerance
        self.distrust[slots] = torch.where(fell, 5, self.distrust[slots])
        # As published, each entry decides for itself whether it is new: a probability that underflowed to 0 counts as new.
        average = torch.where(before == 0, probabilities, 0.1 * before + 0.9 * probabilities)
        self.predictions[slots] = average
        return torch.where((self.distrust[slots] == 0)[:, None], average, 0)
