"""The target stream: an ordered list of batches over named domains, known before an image is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tta import fingerprint
from tta.datasets.domains import Classes, Domain, gather, to_float


class Batch(NamedTuple):
    """One batch of a stream; an adapter is handed ``images`` and nothing else.

    Attributes:
        images: (batch, 3, height, width), float32 in [0, 1] (uint8 as a loader hands them over).
        labels: (batch,), int64; -1 for an unknown class.
        domain: (batch,), int64, each sample's position in ``Stream.domains``.
        index: (batch,), int64, each image's number in its source; the same image has the same number in all domains.
    """

    images: Tensor
    labels: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is of no use here


class _Unfinished(Dataset[Batch]):
    """A stream whose generated images are handed over before they are made."""

    def __init__(self, stream: "Stream") -> None:
        self.domains = stream.domains
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, batch: int) -> Batch:
        return self._stream._read(batch, lambda domain: getattr(domain, "stored", domain.images))


@dataclass(frozen=True)
class Schedule:
    """Which samples of some domains arrive when: what a protocol decides.

    Attributes:
        order: (samples, 2), int64: which domain, which position in it.
        lengths: samples of each batch, in turn; batches are runs of ``order`` and may hold several domains.
        batch_size: the length that was asked for.
        paused: for each batch whether it is predicted without learning; empty where none is.
        cost: time that learning from a batch takes, in batches of the stream: a slow method misses
            some (:func:`tta.evaluate`). ``"measured"``: found in a warm-up.
        protocol: the protocol's name in results where it is not the one it was asked for by.
    """

    order: Tensor
    lengths: tuple[int, ...]
    batch_size: int
    paused: tuple[bool, ...] = ()
    cost: float | str = 1.0
    protocol: str | None = None


def check(domains: Sequence[Domain], batch_size: int) -> None:
    """Raise a ValueError unless there are domains of different names and a batch size of 1 or more."""
    if not domains:
        raise ValueError("A stream needs at least one domain; got none.")
    if batch_size < 1:
        raise ValueError(f"batch_size is 1 or more; got {batch_size}.")
    names = [domain.name for domain in domains]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"Domains have different names; repeated: {', '.join(repeated)}.")


def in_turn(parts: Iterable[tuple[int, Tensor]], batch_size: int) -> Schedule:
    """Parts one after another, (domain, positions) each; batches do not cross them, the last of each may be smaller."""
    parts = list(parts)
    lengths = [len(run) for _, positions in parts for run in positions.split(batch_size) if len(run)]
    order = torch.cat([torch.stack([torch.full_like(where, domain), where], 1) for domain, where in parts])
    return Schedule(order, tuple(lengths), batch_size)


@dataclass(frozen=True)
class Plan:
    """One line of a stream's schedule: a batch number, its domains, how many samples, whether it teaches nothing."""

    batch: int
    domains: tuple[str, ...]
    samples: int
    paused: bool = False


class Stream(Dataset[Batch]):
    """An ordered list of batches over named domains: a pure function of its description and seed.

    Iterating gives :class:`Batch` objects; ``len`` is the number of batches; ``print(stream)`` shows the schedule
    without reading an image.

    Args:
        name: of the stream, as results show it.
        domains: each has a row of its own in the results.
        batch_size: samples a batch.
        seed: of whatever is drawn.
        protocol: name of the protocol, as results show it.
        reset: the reset that belongs to the protocol, see :func:`tta.evaluate`.
        settings: what else described the stream, for the manifest.
        schedule: which samples arrive when; left out: the domains one after another, batches do not cross them.

    Attributes:
        order: (samples, 2), int64: which domain, which position in it; batches are runs of this list.
        paused: for each batch whether it is predicted without learning.
        cost: see :class:`Schedule`.
    """

    def __init__(
        self,
        name: str,
        domains: Sequence[Domain],
        *,
        batch_size: int,
        seed: int = 0,
        protocol: str = "continual",
        reset: str | int = "never",
        settings: Mapping[str, Any] | None = None,
        schedule: Schedule | None = None,
    ) -> None:
        check(domains, batch_size)
        self.name = name
        self.domains = tuple(domains)
        self.batch_size = batch_size
        self.seed = seed
        self.protocol = protocol
        self.reset = reset
        self.settings = dict(settings or {})
        if schedule is None:
            schedule = in_turn(((n, torch.arange(len(d.index))) for n, d in enumerate(domains)), batch_size)
        self.order = schedule.order
        self.paused = schedule.paused or (False,) * len(schedule.lengths)
        self.cost = schedule.cost
        self._batches = [column.split(schedule.lengths) for column in self.order.unbind(1)]
        self._only = _only(self.order[:, 0], schedule.lengths)

    def __len__(self) -> int:
        return len(self._only)

    def __getitem__(self, batch: int) -> Batch:
        """The batch with images as they are stored (uint8 where the source has them so)."""
        return self._read(batch, lambda domain: domain.images)

    def _read(self, batch: int, reader: Callable[[Domain], Callable[[Tensor], Tensor]]) -> Batch:
        domain, positions = (column[batch] for column in self._batches)
        if self._only[batch] >= 0:
            only = self.domains[self._only[batch]]
            return Batch(reader(only)(positions), only.labels[positions], domain, only.index[positions])
        parts = [(domain == n, self.domains[n], positions[domain == n]) for n in _present(domain)]
        labels, index = torch.empty_like(positions), torch.empty_like(positions)
        for where, owner, what in parts:
            labels[where], index[where] = owner.labels[what], owner.index[what]
        images = gather(len(domain), [(where, reader(owner), what) for where, owner, what in parts])
        return Batch(images, labels, domain, index)

    def finish(self, batch: Batch) -> Batch:
        """The batch of an unfinished loader with its images made, on whichever device they are."""
        images, present = batch.images, _present(batch.domain)
        for number in present:
            finish = getattr(self.domains[number], "finish", None)
            if finish is None:
                continue
            if len(present) == 1:
                return batch._replace(images=finish(images, batch.index))
            where = torch.nonzero(batch.domain == number)[:, 0]
            here = where.to(images.device)
            images = images.index_copy(0, here, finish(images[here], batch.index[where]))
        return batch._replace(images=images)

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            stored = self[batch]
            yield stored._replace(images=to_float(stored.images))

    def clean(self) -> "Stream":
        """The source domain, in batches of the same size: the images of the first domain without what was done to them.

        Raises:
            ValueError: the images came damaged, there are no others.
        """
        undamaged = getattr(self.domains[0], "clean", None)
        if undamaged is None:
            raise ValueError(f"Domain '{self.domains[0].name}' of stream '{self.name}' has no clean images.")
        return Stream(self.name, [undamaged()], batch_size=self.batch_size, seed=self.seed, protocol="clean")

    @property
    def origins(self) -> list[str]:
        """Where the images come from, in words, each origin once."""
        return list(dict.fromkeys(domain.origin for domain in self.domains))

    @property
    def classes(self) -> Classes | None:
        """What the labels count, where the domains know it.

        Raises:
            ValueError: the domains count different classes.
        """
        known = {getattr(domain, "classes", None): domain.name for domain in self.domains}
        known.pop(None, None)
        if len(known) > 1:
            counts = ", ".join(f"{name} {classes.count}" for classes, name in known.items() if classes)
            raise ValueError(f"The domains of a stream share their classes; here they differ: {counts}.")
        return next(iter(known), None)

    def check_logits(self, count: int) -> None:
        """Raise a ValueError unless a model with so many logits is one for the classes of this stream."""
        classes = self.classes
        if classes is None:
            highest = max((int(domain.labels.max()) for domain in self.domains if len(domain.labels)), default=-1)
            if highest >= count:
                raise ValueError(
                    f"Stream '{self.name}' has the label {highest}; the model gives {count} logits, from 0 on."
                )
        elif classes.count != count:
            select = (
                f" They are {classes.count} of the outputs of a larger model: model.select_logits(stream.classes.logits) "
                "makes one of tta.load_model give those, before tta.adapt; let a model of yours return "
                "logits[:, stream.classes.logits]."
                if classes.logits is not None
                else " Take a model of these classes; of a folder of your own, class_map= says which outputs they are."
            )
            raise ValueError(
                f"Stream '{self.name}' has {classes.count} classes; the model gives {count} logits.{select}"
            )

    @property
    def samples(self) -> int:
        """Samples in the whole stream."""
        return len(self.order)

    def clean_images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """The first ``count`` images and labels as they were before any corruption; None where they are not at hand."""
        make = next((domain.clean for domain in self.domains if hasattr(domain, "clean")), None)
        if make is None:
            return None
        try:
            clean = make()
        except (FileNotFoundError, ValueError):  # published corruptions without the clean images beside them
            return None
        first = torch.arange(min(count, len(clean.index)))
        return clean.images(first), clean.labels[first]

    def schedule(self) -> list[Plan]:
        """What arrives when, batch by batch; reads no image."""
        return [
            Plan(n, tuple(self.domains[d].name for d in _present(domain)), len(domain), self.paused[n])
            for n, domain in enumerate(self._batches[0])
        ]

    def loader(self, num_workers: int = 0, *, unfinished: bool = False, pin_memory: bool = False) -> DataLoader[Batch]:
        """The one DataLoader over the stream; worker processes read ahead and keep the order.

        Args:
            num_workers: processes.
            unfinished: leave images that are generated to :meth:`finish`, for a device faster at it than the workers.
            pin_memory: put batches where a CUDA device copies them from while it computes.
        """
        dataset: Dataset[Batch] = _Unfinished(self) if unfinished else self
        return DataLoader(
            dataset,
            batch_size=None,
            shuffle=False,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # of its own: to read draws nothing that a method would have drawn
        )

    def describe(self) -> dict[str, Any]:
        """The stream's part of a manifest: settings, order, image numbers and contents, hashed."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": self.samples,
            "classes": self.classes._asdict() if self.classes else None,
            "settings": self.settings,
            "order": fingerprint.of_tensors([("order", self.order)]),
            "image_ids": fingerprint.of_tensors((domain.name, domain.index) for domain in self.domains),
            "domains": {domain.name: domain.describe() for domain in self.domains},
        }

    def __str__(self) -> str:
        head = (
            f"{self.name}: {len(self)} batches of up to {self.batch_size}, {self.samples} samples, "
            f"protocol {self.protocol} (reset {self.reset}), seed {self.seed}"
        )
        lines = [f"  images {origin}" for origin in self.origins]
        batch = torch.repeat_interleave(torch.arange(len(self)), torch.tensor([len(part) for part in self._batches[0]]))
        for number, domain in enumerate(self.domains):
            mine = batch[self.order[:, 0] == number]
            first, last, held = (int(mine[0]), int(mine[-1]), len(mine.unique())) if len(mine) else (0, -1, 0)
            span = f"batches {first}-{last}" if held == last - first + 1 else f"{held} of batches {first}-{last}"
            lines.append(f"  {domain.name:<20} {span if held else 'no batches':<18} {len(mine):>6} samples")
        return "\n".join([head, *lines])


def _only(domain: Tensor, lengths: Sequence[int]) -> list[int]:
    """For each batch the domain of all its samples, -1 where there are several."""
    changes = torch.cat([torch.zeros(1, dtype=torch.int64), (domain[1:] != domain[:-1]).cumsum(0)])
    counts = torch.tensor(lengths, dtype=torch.int64)
    ends = counts.cumsum(0)
    starts = ends - counts
    return torch.where(changes[starts] == changes[ends - 1], domain[starts], -1).tolist()


def _present(domain: Tensor) -> list[int]:
    """The domains of a batch, in order of their first sample."""
    first = int(domain[0])
    return [first] if bool((domain == first).all()) else list(dict.fromkeys(domain.tolist()))
