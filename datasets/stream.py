"""The target stream: an ordered list of batches over named domains, known before an image is read."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tta import fingerprint
from tta.datasets.corruptions import corrupt

UNKNOWN = -1  # the label of a class that the source model does not know; left out of the errors


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


def to_float(images: Tensor) -> Tensor:
    """uint8 images as float32 in [0, 1]; floating-point images as they are."""
    return images.float().div_(255) if images.dtype == torch.uint8 else images


class Domain(Protocol):
    """One condition of the target stream. Its labels are known without decoding an image: orders need them."""

    name: str

    @property
    def labels(self) -> Tensor: ...

    @property
    def index(self) -> Tensor: ...

    def images(self, positions: Tensor) -> Tensor: ...

    def describe(self) -> dict[str, Any]: ...


class CorruptedImages:
    """A domain made by corrupting clean images the first time one of them is asked for, and kept in memory.

    Args:
        name: of the domain; also the corruption's name.
        clean: (n, 3, height, width), uint8.
        labels: (n,), int64.
        index: (n,), int64, image numbers; they seed the draws.
        severity: 1 to 5.
        seed: of the draws.
    """

    def __init__(self, name: str, clean: Tensor, labels: Tensor, index: Tensor, severity: int, seed: int) -> None:
        self.name = name
        self.labels = labels
        self.index = index
        self._clean = clean
        self._severity = severity
        self._seed = seed
        self._corrupted: Tensor | None = None

    def images(self, positions: Tensor) -> Tensor:
        """Corrupted images at these positions, uint8."""
        if self._corrupted is None:
            self._corrupted = corrupt(
                self._clean, self.name, severity=self._severity, seed=self._seed, index=self.index
            )
        return self._corrupted[positions]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images: how they were made, from which bytes."""
        return {
            "generated": {"recipe": "cifar", "severity": self._severity, "seed": self._seed},
            "content": fingerprint.of_tensors([("images", self._clean), ("labels", self.labels)]),
        }


class DatasetImages:
    """A user's own dataset as a domain: anything indexable that gives ``(image, label)``.

    Images may be PIL images or tensors (3, height, width), uint8 or floating point in [0, 1]. Labels are read from an
    attribute ``targets`` or ``labels`` where the dataset has one, else from the samples, once.

    Args:
        name: of the domain.
        dataset: has ``__len__`` and ``__getitem__``.
    """

    def __init__(self, name: str, dataset: Dataset[Any]) -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"Domain '{name}': expected a dataset with __len__ and __getitem__ that gives (image, label); "
                f"got {type(dataset).__name__}."
            )
        self.name = name
        self.dataset: Any = dataset
        self.index = torch.arange(len(self.dataset))
        self._labels: Tensor | None = None

    @property
    def labels(self) -> Tensor:
        if self._labels is None:
            known = getattr(self.dataset, "targets", getattr(self.dataset, "labels", None))
            if known is None or len(known) != len(self.dataset):
                known = [int(self._sample(i)[1]) for i in range(len(self.dataset))]
            self._labels = torch.as_tensor(known, dtype=torch.int64)
        return self._labels

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, stacked."""
        return torch.stack([self._image(int(i)) for i in positions])

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images: the dataset's class and a hash over all it gives."""
        every = ((str(i), self._image(i)) for i in range(len(self.dataset)))
        content = fingerprint.of_tensors((*every, ("labels", self.labels)))
        return {"dataset": type(self.dataset).__name__, "content": content}

    def _sample(self, position: int) -> Any:
        sample = self.dataset[position]
        if not isinstance(sample, (tuple, list)) or len(sample) < 2:
            raise TypeError(
                f"Domain '{self.name}', sample {position}: expected (image, label); got {type(sample).__name__}."
            )
        return sample

    def _image(self, position: int) -> Tensor:
        image = self._sample(position)[0]
        if not isinstance(image, Tensor):
            image = torch.from_numpy(np.array(image.convert("RGB") if hasattr(image, "convert") else image))
            image = image.permute(2, 0, 1) if image.dim() == 3 and image.shape[-1] == 3 else image
        if image.dim() != 3 or not (image.dtype == torch.uint8 or image.is_floating_point()):
            raise ValueError(
                f"Domain '{self.name}', sample {position}: expected an image (3, height, width), uint8 or floating "
                f"point in [0, 1]; got {image.dtype} of shape {tuple(image.shape)}."
            )
        return image


@dataclass(frozen=True)
class Plan:
    """One line of a stream's schedule: a batch number, its domains, how many samples."""

    batch: int
    domains: tuple[str, ...]
    samples: int


class Stream(Dataset[Batch]):
    """An ordered list of batches over named domains: a pure function of its description and seed.

    Iterating gives :class:`Batch` objects; ``len`` is the number of batches; ``print(stream)`` shows the schedule
    without reading an image. Batches do not cross domains, and a trailing batch may be smaller.

    Args:
        name: of the stream, as results show it.
        domains: in the order of their arrival.
        batch_size: samples a batch.
        seed: of whatever is drawn.
        protocol: name of the protocol, as results show it.
        reset: the reset that belongs to the protocol, see :func:`tta.evaluate`.
        settings: what else described the stream, for the manifest.
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
    ) -> None:
        if not domains:
            raise ValueError("A stream needs at least one domain; got none.")
        if batch_size < 1:
            raise ValueError(f"batch_size is 1 or more; got {batch_size}.")
        repeated = {d.name for d in domains if sum(d.name == e.name for e in domains) > 1}
        if repeated:
            raise ValueError(f"Domains have different names; repeated: {', '.join(sorted(repeated))}.")
        self.name = name
        self.domains = tuple(domains)
        self.batch_size = batch_size
        self.seed = seed
        self.protocol = protocol
        self.reset = reset
        self.settings = dict(settings or {})
        samples = [torch.arange(len(domain.index)) for domain in self.domains]
        # (samples, 2): which domain, which position in it; batches are runs of this list
        self.order = torch.cat([torch.stack([torch.full_like(s, d), s], 1) for d, s in enumerate(samples)])
        self._batches = [
            part for d in range(len(samples)) for part in self.order[self.order[:, 0] == d].split(batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, batch: int) -> Batch:
        """The batch with images as they are stored (uint8 where the source has them so)."""
        order = self._batches[batch]
        d, positions = int(order[0, 0]), order[:, 1]
        domain = self.domains[d]
        return Batch(domain.images(positions), domain.labels[positions], order[:, 0], domain.index[positions])

    def __iter__(self) -> Iterator[Batch]:
        for batch in range(len(self)):
            stored = self[batch]
            yield stored._replace(images=to_float(stored.images))

    @property
    def samples(self) -> int:
        """Samples in the whole stream."""
        return len(self.order)

    def schedule(self) -> list[Plan]:
        """What arrives when, batch by batch; reads no image."""
        return [Plan(n, (self.domains[int(order[0, 0])].name,), len(order)) for n, order in enumerate(self._batches)]

    def loader(self, num_workers: int = 0) -> DataLoader[Batch]:
        """The one DataLoader over the stream; worker processes read ahead and keep the order."""
        return DataLoader(self, batch_size=None, shuffle=False, num_workers=num_workers)

    def describe(self) -> dict[str, Any]:
        """The stream's part of a manifest: settings, order, image numbers and contents, hashed."""
        return {
            "name": self.name,
            "protocol": self.protocol,
            "seed": self.seed,
            "batch_size": self.batch_size,
            "samples": self.samples,
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
        lines = []
        for number, domain in enumerate(self.domains):
            batches = [n for n, order in enumerate(self._batches) if int(order[0, 0]) == number]
            span = f"batches {batches[0]}-{batches[-1]}" if batches else "no batches"
            lines.append(f"  {domain.name:<20} {span:<18} {len(domain.index):>6} samples")
        return "\n".join([head, *lines])
