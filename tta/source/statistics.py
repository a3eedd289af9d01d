"""Source statistics: recorded in one pass over source images, saved, checked on use.

A method declares a :class:`~tta.source.kinds.Need` for each kind; all share the pass, so that images are decoded once.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate

from tta import caches, fingerprint, norms, places
from tta.source.kinds import KINDS, Known, Need, SourceBatch

BATCH_SIZE = 64
EXPECTED = (
    "a tensor of source images (images, 3, height, width), an iterable of such batches (pairs with labels will do), a "
    "dataset of (image, label), a tta.SourceStatistics, or the path of a saved one"
)


@dataclass(frozen=True, eq=False)
class Entry:
    """One recorded need: its settings, the number of images, and the statistics."""

    need: Need
    images: int
    known: Known


@dataclass(frozen=True, eq=False)
class SourceStatistics:
    """Statistics of the source domain, recorded with one model; with them, deployment needs no source image.

    Attributes:
        model: fingerprint of the weights they were recorded with; with other weights they are refused.
        entries: one for each need.

    Example:
        >>> import torch, tta
        >>> from tta.methods import source_needs
        >>> model, images = tta.load_model("digits-cnn"), torch.rand(128, 3, 32, 32)
        >>> statistics = tta.SourceStatistics.record(model, source_needs(model, "eata"), images)
        >>> adapter = tta.adapt(model, "eata", source=statistics)
    """

    model: str
    entries: tuple[Entry, ...]

    @classmethod
    def record(
        cls,
        model: nn.Module,
        needs: Sequence[Need],
        source: "Images",
        *,
        batch_size: int = BATCH_SIZE,
        num_workers: int = 0,
        progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    ) -> "SourceStatistics":
        """Record statistics in one pass of the source images through a copy of the model.

        Args:
            model: the source model.
            needs: the statistics to record; for a method ``tta.methods.source_needs(model, "eata")``.
            source: a tensor or dataset of images, uint8 or floating point in [0, 1], split in order into the batches
                that each need asks for; or an iterable of batches, which keep their own size. Labels are ignored
                unless a need asks for them.
            batch_size: for needs that set none.
            num_workers: processes that read a dataset ahead.
            progress: wraps the iterable of batches, such as ``rich.progress.track``.

        Raises:
            ValueError: no images, images without the labels that a need asks for, or an unknown kind.
            TypeError: ``source`` gives something that is not a batch of images.
        """
        models = {mode: _copy(model, mode) for mode in dict.fromkeys(need.statistics for need in needs)}
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        batches, regroup = _batches(source, batch_size, num_workers)
        feeds = [_Feed(models[n.statistics], n, (n.batch_size or batch_size) if regroup else None) for n in needs]
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
            for batch in progress(batches):
                images, labels = _checked(batch)
                for feed in feeds if len(images) else ():
                    feed.take(images, labels, device)
            return cls(fingerprint.of_model(model), tuple(feed.finish(device) for feed in feeds))

    def get(self, need: Need) -> Known:
        """The statistics that were recorded for a need.

        Raises:
            ValueError: it was not recorded, or under other settings; the message says which.
        """
        return self._entry(need).known

    def select(self, needs: Sequence[Need]) -> "SourceStatistics":
        """The entries that the needs ask for, in their order; raises as :meth:`get` does."""
        return SourceStatistics(self.model, tuple(self._entry(need) for need in needs))

    def check(self, model: str) -> None:
        """Raise a ValueError unless the statistics were recorded with the weights of this fingerprint."""
        if self.model != model:
            raise ValueError(
                f"The source statistics were recorded with other weights: fingerprint {self.model[:12]}... there, "
                f"{model[:12]}... in this model. Record them again with this model."
            )

    def describe(self) -> list[dict[str, Any]]:
        """For a manifest: the needs with their settings, the number of images, and a hash of the statistics."""
        return [
            {
                **asdict(entry.need),
                "images": entry.images,
                "content": fingerprint.of_tensors(sorted(entry.known.items())),
            }
            for entry in self.entries
        ]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all: the tensors, the model's fingerprint and the settings."""
        tensors, entries = self.tensors()
        content = save(tensors, {"source_statistics": "1", "model": self.model, "entries": entries})
        places.write(Path(path), lambda file: file.write(content))

    def tensors(self) -> tuple[dict[str, Tensor], str]:
        """All tensors under names of their own, and the rest as JSON; :meth:`of_tensors` puts them together again."""
        entries = [{"need": asdict(entry.need), "images": entry.images} for entry in self.entries]
        tensors = {
            f"{number}.{name}": value.cpu().contiguous()
            for number, entry in enumerate(self.entries)
            for name, value in entry.known.items()
        }
        return tensors, json.dumps(entries)

    @classmethod
    def of_tensors(cls, model: str, tensors: Mapping[str, Tensor], entries: str) -> "SourceStatistics":
        """Statistics from the tensors and the JSON that :meth:`tensors` gave, and the model's fingerprint."""
        found = []
        for number, entry in enumerate(json.loads(entries)):
            prefix = f"{number}."
            need = Need(**{**entry["need"], "layers": tuple(entry["need"]["layers"])})
            known = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            found.append(Entry(need, entry["images"], known))
        return cls(model, tuple(found))

    @classmethod
    def load(cls, path: str | Path) -> "SourceStatistics":
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds something else.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(
                f"No source statistics at '{path}': `tta source` or SourceStatistics.save writes them."
            )
        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"'{path}' does not hold source statistics ({error}).") from error
        if header.get("source_statistics") != "1":
            raise ValueError(f"'{path}' does not hold source statistics, or was written by another version.")
        try:
            return cls.of_tensors(header["model"], tensors, header["entries"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"'{path}' does not hold source statistics that can be read: {error!r}.") from error

    def _entry(self, need: Need) -> Entry:
        same_kind = [entry for entry in self.entries if entry.need.kind == need.kind]
        for entry in same_kind:
            if not need.differences(entry.need):
                return entry
        if same_kind:
            nearest: list[str] = min((need.differences(entry.need) for entry in same_kind), key=len)
            reason = "; ".join(nearest)
        else:
            reason = f"they hold {', '.join(sorted({entry.need.kind for entry in self.entries})) or 'nothing'}"
        raise ValueError(
            f"The source statistics do not hold the {need.kind} asked for: {reason}. Record them again for the method as "
            "it is set up here, or set it up as it was when they were recorded."
        )


Images: TypeAlias = Tensor | Dataset[Any] | Iterable[Any]
SourceLike: TypeAlias = Images | SourceStatistics | str | Path


def known_from(
    source: SourceLike, model: nn.Module, model_fingerprint: str, needs: Sequence[Need], batch_size: int
) -> SourceStatistics:
    """Statistics of these needs only, in their order: recorded from images, or looked up and checked.

    Raises:
        ValueError: recorded with another model or under other settings, or images that do not fit.
    """
    if isinstance(source, (str, Path)):
        source = SourceStatistics.load(source)
    if not isinstance(source, SourceStatistics):
        return SourceStatistics.record(model, needs, source, batch_size=batch_size)
    source.check(model_fingerprint)
    return source.select(needs)


class _Feed:
    """Feeds the recorder of one need with batches of a given size (None: as they come)."""

    def __init__(self, model: nn.Module, need: Need, batch_size: int | None) -> None:
        if need.kind not in KINDS:
            raise ValueError(f"No kind of source statistics '{need.kind}'. There are: {', '.join(KINDS)}.")
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"The batch size of the source images is 1 or more; got {batch_size}.")
        self._need, self._batch_size, self._images = need, batch_size, 0
        self._recorder = KINDS[need.kind](model, need)
        self._waiting: SourceBatch | None = None  # images too few for a batch yet
        next(self._recorder)

    def take(self, images: Tensor, labels: Tensor | None, device: torch.device) -> None:
        if not self._need.labels:
            labels = None
        elif labels is None:
            raise ValueError(f"{self._need.kind} needs labelled source images: pass batches (images, labels).")
        if not self._images and self._batch_size is None and self._need.batch_size is not None:
            self._need = replace(self._need, batch_size=len(images))
        self._images += len(images)
        if self._waiting is not None:
            before, labels_before = self._waiting
            images = torch.cat([before, images])
            labels = None if labels is None or labels_before is None else torch.cat([labels_before, labels])
        size = self._batch_size or len(images)
        whole = len(images) - len(images) % size
        for start in range(0, whole, size):
            self._send(_cut(images, labels, slice(start, start + size)), device)
        self._waiting = _cut(images, labels, slice(whole, None)) if whole < len(images) else None

    def finish(self, device: torch.device) -> Entry:
        if not self._images:
            raise ValueError(f"The source holds no images. Expected {EXPECTED}.")
        if self._waiting is not None:
            self._send(self._waiting, device)
        try:
            self._recorder.send(None)
        except StopIteration as stop:
            return Entry(self._need, self._images, stop.value)
        raise AssertionError(f"The recorder of {self._need.kind} goes on after its last batch.")

    def _send(self, batch: SourceBatch, device: torch.device) -> None:
        images, labels = batch[0].to(device), None if batch[1] is None else batch[1].to(device)
        images = images.float() / 255 if images.dtype == torch.uint8 else images
        self._recorder.send((images.clone() if images.is_inference() else images, labels))


def _cut(images: Tensor, labels: Tensor | None, part: slice) -> SourceBatch:
    return images[part], None if labels is None else labels[part]


def _batches(source: Images, batch_size: int, num_workers: int) -> tuple[Iterable[Any], bool]:
    """The source as batches, and whether these may be regrouped: those of a user's own loader may not."""
    if isinstance(source, Tensor):
        return torch.split(_checked(source)[0], batch_size), True
    if isinstance(source, Dataset) and not hasattr(source, "__iter__"):
        return DataLoader(source, batch_size=batch_size, num_workers=num_workers, collate_fn=_collated), True
    return source, False


def _collated(samples: list[Any]) -> Any:
    """A batch of samples. Boxes are left out: images have different numbers of them, and nothing that is recorded needs any."""
    with_boxes = isinstance(samples[0], (tuple, list)) and len(samples[0]) > 1 and isinstance(samples[0][1], Mapping)
    return default_collate([sample[0] for sample in samples] if with_boxes else samples)


def _checked(batch: Any) -> SourceBatch:
    pair = batch if isinstance(batch, (tuple, list)) else (batch, None)
    images, labels = pair[0], pair[1] if len(pair) > 1 else None
    if not isinstance(images, Tensor) or images.dim() != 4:
        given = f"a tensor of shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"Expected as the source {EXPECTED}; found {given} in place of a batch of images.")
    return images, labels


def _copy(model: nn.Module, statistics: str) -> nn.Module:
    duplicate = caches.copied(model).eval().requires_grad_(False)
    caches.forget(duplicate)
    if statistics == "batch":
        for _, layer in norms.named_layers(duplicate, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
    return duplicate
