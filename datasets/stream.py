"""The target stream: an ordered list of batches over named domains, known before an image is read."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tta import fingerprint
from tta.datasets.boxes import alike
from tta.datasets.domains import (
    Classes,
    Corrupted,
    Domain,
    Generated,
    classes_in,
    gather,
    original,
    targets_in,
    to_float,
)


class Batch(NamedTuple):
    """One batch of a stream; an adapter gets ``images`` and nothing else.

    Attributes:
        images: (batch, 3, height, width), float32 in [0, 1] (from a loader: uint8).
        labels: (batch,), int64; -1 for an unknown class. Of segmentation masks (batch, rows, columns), -1 for void pixels.
        domain: (batch,), int64, each sample's position in ``Stream.domains``.
        index: (batch,), int64, each image's number in its source; the same image has the same number in all domains.
    """

    images: Tensor
    labels: Tensor
    domain: Tensor
    index: Tensor  # type: ignore[assignment]  # tuple.index is of no use here


class _Unfinished(Dataset[Batch]):
    """A stream that gives generated images before they are made, see :meth:`Stream.finish`."""

    def __init__(self, stream: "Stream") -> None:
        self.domains = stream.domains
        self._stream = stream

    def __len__(self) -> int:
        return len(self._stream)

    def __getitem__(self, batch: int) -> Batch:
        return self._stream.read(batch, unfinished=True)


@dataclass(frozen=True)
class Schedule:
    """The order in which the samples of some domains arrive, as a protocol decides it.

    Attributes:
        order: (samples, 2), int64: number of the domain, position in the domain.
        lengths: samples in each batch; batches are consecutive runs of ``order`` and may hold several domains.
        batch_size: the requested length.
        paused: for each batch whether it is predicted without learning; empty if none is.
        cost: time that learning from a batch takes, in batches of the stream: a slow method misses
            some (:func:`tta.evaluate`). ``"measured"``: found in a warm-up.
        protocol: name of the protocol in results, if it differs from the requested one.
        asked: the answers that the stream gives; None: none.
    """

    order: Tensor
    lengths: tuple[int, ...]
    batch_size: int
    paused: tuple[bool, ...] = ()
    cost: float | str = 1.0
    protocol: str | None = None
    asked: "Asked | None" = None


@dataclass(frozen=True)
class Asked:
    """Answers that a stream gives about predictions: how many, how late, and how many of them wrong.

    Attributes:
        delay: batches between a question and its answer; 0: before the next batch.
        noise: share of the answers that are wrong, in [0, 1].
        budget: questions a batch at most.
    """

    delay: int
    noise: float
    budget: int


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
    """Parts (domain, positions) one after another; no batch holds two parts, the last one of a part may be smaller."""
    parts = list(parts)
    lengths = [len(run) for _, positions in parts for run in torch.split(positions, batch_size) if len(run)]
    order = torch.cat([torch.stack([torch.full_like(where, domain), where], 1) for domain, where in parts])
    return Schedule(order, tuple(lengths), batch_size)


@dataclass(frozen=True)
class Plan:
    """One batch in a stream's schedule: its number, domains and samples, and whether it is only predicted."""

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
        batch_size: samples per batch.
        seed: of everything that is drawn.
        protocol: name of the protocol, as results show it.
        reset: the reset that belongs to the protocol, see :func:`tta.evaluate`.
        settings: further settings of the stream, for the manifest.
        schedule: the order of the samples; default: the domains one after another, no batch holds two of them.

    Attributes:
        order: (samples, 2), int64: number of the domain, position in it; batches are consecutive runs of this list.
        paused: for each batch whether it is predicted without learning.
        cost: see :class:`Schedule`.
        asked: see :class:`Schedule`.
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
        self.asked = schedule.asked
        self._batches = [torch.split(column, list(schedule.lengths)) for column in self.order.unbind(1)]
        self._only = _only(self.order[:, 0], schedule.lengths)
        originals = [original(domain) for domain in self.domains]
        self._generated = [domain if isinstance(domain, Generated) else None for domain in originals]

    def __len__(self) -> int:
        return len(self._only)

    def __getitem__(self, batch: int) -> Batch:
        """The batch with images in the dtype of their source."""
        return self.read(batch)

    def read(self, batch: int, *, unfinished: bool = False) -> Batch:
        """A batch by its number, images in the dtype of their source.

        Args:
            batch: its number.
            unfinished: leave images that are generated to :meth:`finish`.
        """
        domain, positions = (column[batch] for column in self._batches)
        if self._only[batch] >= 0:
            number = self._only[batch]
            only = self.domains[number]
            images = self._reader(number, unfinished)(positions)
            return Batch(images, self._labels(number)(positions), domain, only.index[positions])
        index = torch.empty_like(positions)
        parts, numbers = [], _present(domain)
        for number in numbers:
            where = domain == number
            mine = positions[where]
            index[where] = self.domains[number].index[mine]
            parts.append((where, self._reader(number, unfinished), mine))
        images = gather(len(domain), parts)  # first, since reading them may give masks too
        labels = alike([self._labels(number)(mine) for number, (_, _, mine) in zip(numbers, parts, strict=True)])
        kept = [
            (where, label.__getitem__, torch.arange(len(label)))
            for (where, _, _), label in zip(parts, labels, strict=True)
        ]
        return Batch(images, gather(len(domain), kept), domain, index)

    def _labels(self, number: int) -> Callable[[Tensor], Tensor]:
        return targets_in(self.domains[number])[1]

    @property
    def task(self) -> str:
        """Name of the task that the labels are of: ``"classification"`` unless the domains have masks or other targets."""
        found = {targets_in(domain)[0]: domain.name for domain in self.domains}
        if len(found) > 1:
            kinds = ", ".join(f"{name} of {task}" for task, name in found.items())
            raise ValueError(f"The domains of a stream have labels of one kind; here are {kinds}.")
        return next(iter(found))

    def _reader(self, number: int, unfinished: bool) -> Callable[[Tensor], Tensor]:
        generated = self._generated[number]
        return self.domains[number].images if generated is None or not unfinished else generated.stored

    def finish(self, batch: Batch) -> Batch:
        """A batch of an unfinished loader with its images made, on the device that holds it."""
        images, present = batch.images, _present(batch.domain)
        for number in present:
            generated = self._generated[number]
            if generated is None:
                continue
            if len(present) == 1:
                return batch._replace(images=generated.finish(images, batch.index))
            where = torch.nonzero(batch.domain == number)[:, 0]
            here = where.to(images.device)
            images = images.index_copy(0, here, generated.finish(images[here], batch.index[where]))
        return batch._replace(images=images)

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            stored = self[batch]
            yield stored._replace(images=to_float(stored.images))

    def clean(self) -> "Stream":
        """The source domain in batches of the same size: the images of the first domain without their corruption.

        Raises:
            ValueError: the domain has no clean images.
        """
        first = original(self.domains[0])
        if not isinstance(first, Corrupted):
            raise ValueError(f"Domain '{self.domains[0].name}' of stream '{self.name}' has no clean images.")
        return Stream(self.name, [first.clean()], batch_size=self.batch_size, seed=self.seed, protocol="clean")

    @property
    def origins(self) -> list[str]:
        """Descriptions of where the images come from, each once."""
        return list(dict.fromkeys(domain.origin for domain in self.domains))

    @property
    def classes(self) -> Classes | None:
        """The classes of the domains, None if no domain knows them.

        Raises:
            ValueError: the domains have different classes.
        """
        known = {classes_in(domain): domain.name for domain in self.domains}
        known.pop(None, None)
        if len(known) > 1:
            counts = ", ".join(f"{name} {classes.count}" for classes, name in known.items() if classes)
            raise ValueError(f"The domains of a stream share their classes; here they differ: {counts}.")
        return next(iter(known), None)

    @property
    def class_names(self) -> tuple[str, ...] | None:
        """Names of the classes in the order of the labels, which a vision-language model reads; None where they are unknown."""
        return getattr(self.domains[0], "class_names", None)

    def check_logits(self, count: int) -> None:
        """Raise a ValueError unless a model with this many logits fits the classes of the stream."""
        classes = self.classes
        if classes is None:
            highest = max((int(domain.labels.max()) for domain in self.domains if len(domain.labels)), default=-1)
            if highest >= count:
                raise ValueError(
                    f"Stream '{self.name}' has the label {highest}; the model gives {count} logits, from 0 on."
                )
        elif classes.count != count:
            select = (
                f" They are {classes.count} of the outputs of a larger model: before tta.adapt call "
                "model.select_logits(stream.classes.logits) on a model of tta.load_model; let your own model return "
                "logits[:, stream.classes.logits]."
                if classes.logits is not None
                else " Use a model with these classes; for a folder of your own, class_map= names the outputs of its classes."
            )
            raise ValueError(
                f"Stream '{self.name}' has {classes.count} classes; the model gives {count} logits.{select}"
            )

    @property
    def samples(self) -> int:
        """Samples in the whole stream."""
        return len(self.order)

    def clean_images(self, count: int) -> tuple[Tensor, Tensor] | None:
        """The first ``count`` images and labels without corruption; None if they cannot be found, or have masks."""
        if self.task != "classification":
            return None
        corrupted = next((domain for domain in map(original, self.domains) if isinstance(domain, Corrupted)), None)
        if corrupted is None:
            return None
        try:
            clean = corrupted.clean()
        except (FileNotFoundError, ValueError):  # published corruptions without the clean images beside them
            return None
        first = torch.arange(min(count, len(clean.index)))
        return clean.images(first), clean.labels[first]

    def schedule(self) -> list[Plan]:
        """The order of arrival, batch by batch; reads no image."""
        return [
            Plan(n, tuple(self.domains[d].name for d in _present(domain)), len(domain), self.paused[n])
            for n, domain in enumerate(self._batches[0])
        ]

    def loader(self, num_workers: int = 0, *, unfinished: bool = False, pin_memory: bool = False) -> DataLoader[Batch]:
        """A DataLoader over the stream; worker processes read ahead and keep the order.

        Args:
            num_workers: processes.
            unfinished: leave images that are generated to :meth:`finish`, for a device that is faster than the workers.
            pin_memory: put batches into pinned memory, which a CUDA device copies while it computes.
        """
        dataset: Dataset[Batch] = _Unfinished(self) if unfinished else self
        return DataLoader(
            dataset,
            batch_size=None,
            shuffle=False,
            num_workers=num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # its own, so that reading does not advance the global random state
        )

    def describe(self) -> dict[str, Any]:
        """The stream's part of a manifest: settings, order, image numbers and contents, hashed."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            **({"task": self.task} if self.task != "classification" else {}),
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
            first, last, held = (int(mine[0]), int(mine[-1]), len(torch.unique(mine))) if len(mine) else (0, -1, 0)
            span = f"batches {first}-{last}" if held == last - first + 1 else f"{held} of batches {first}-{last}"
            lines.append(f"  {domain.name:<20} {span if held else 'no batches':<18} {len(mine):>6} samples")
        return "\n".join([head, *lines])


def _only(domain: Tensor, lengths: Sequence[int]) -> list[int]:
    """For each batch the domain of all its samples, -1 if there are several."""
    changes = torch.cat([torch.zeros(1, dtype=torch.int64), (domain[1:] != domain[:-1]).cumsum(0)])
    counts = torch.tensor(lengths, dtype=torch.int64)
    ends = counts.cumsum(0)
    starts = ends - counts
    return torch.where(changes[starts] == changes[ends - 1], domain[starts], -1).tolist()


def _present(domain: Tensor) -> list[int]:
    """The domains of a batch, in order of their first sample."""
    first = int(domain[0])
    return [first] if bool((domain == first).all()) else list(dict.fromkeys(domain.tolist()))
