"""Callbacks of the engine: adapt a model in a Trainer of your own; measure forgetting and consistency."""

import math
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from tta import methods
from tta.adapter import Adapter
from tta.datasets.domains import to_float
from tta.datasets.stream import Batch, Stream
from tta.results.record import Record


class AdaptCallback(Callback):
    """Adapt a model inside an existing LightningModule while ``Trainer.test`` or ``Trainer.predict`` runs.

    During the run an adapter around a copy replaces the sub-module named by ``attribute``; afterwards the original is
    back, unchanged. ``callback.adapter`` keeps what it learned and continues from there in the next run.

    Args:
        method: as in :func:`tta.adapt`.
        attribute: dotted name of the classifier inside the LightningModule.
        hparams: as in :func:`tta.adapt`.

    Raises:
        ValueError: the LightningModule has no such sub-module; the message lists its sub-modules.
    """

    def __init__(self, method: str | type[Adapter], *, attribute: str = "model", **hparams: Any) -> None:
        self.adapter: Adapter | None = None
        self._method, self._attribute, self._hparams = method, attribute, hparams
        self._original: nn.Module | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage not in ("test", "predict"):
            return
        try:
            original = attrgetter(self._attribute)(pl_module)
        except AttributeError:
            raise ValueError(
                f"{type(pl_module).__name__} has no sub-module '{self._attribute}'. Name the classifier with "
                f"attribute=; there are: {', '.join(name for name, _ in pl_module.named_children())}."
            ) from None
        if self.adapter is None:
            self.adapter = methods.adapt(original, self._method, **self._hparams)
        self._original = original
        self._put(pl_module, self.adapter)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if self._original is not None:
            self._put(pl_module, self._original)
            self._original = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "test")

    def _put(self, pl_module: pl.LightningModule, model: nn.Module) -> None:
        owner, _, name = self._attribute.rpartition(".")
        setattr(attrgetter(owner)(pl_module) if owner else pl_module, name, model)


class SourceError(Callback):
    """Error on the source domain before and after a run, in percent, predicted without learning.

    Args:
        stream: the source domain.
        num_workers: as in :func:`tta.evaluate`.
    """

    def __init__(self, stream: Stream, num_workers: int = 0) -> None:
        self.errors: dict[str, float] = {}
        self._stream, self._num_workers = stream, num_workers

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.errors["source_error_before"] = self._error(trainer, pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.errors["source_error_after"] = self._error(trainer, pl_module)

    def _error(self, trainer: pl.Trainer, pl_module: Any) -> float:
        record = Record()
        # Random numbers drawn here must not change those of the run.
        with isolate_rng(), pl_module.adapter.paused(), trainer.precision_plugin.forward_context():
            for batch in self._stream.loader(self._num_workers, pin_memory=pl_module.device.type == "cuda"):
                images = to_float(batch.images.to(pl_module.device, non_blocking=True))
                logits = pl_module.adapter.step(images).logits
                record.add(logits, batch.labels, batch.domain, batch.index)
        wrong, known = record.wrong_and_known()
        return 100.0 * wrong / known if known else math.nan


class Consistency(Callback):
    """Share of images in percent whose prediction stays the same when they are shifted, by the adapter after each batch.

    Uses no labels. The shift is a weak augmentation that preserves every class (a flip does not): by a sixteenth of the
    image to the right and down, edges reflected. The adapter learns nothing from it, and the run does not change.
    """

    def __init__(self) -> None:
        self._alike: list[Tensor] = []

    @property
    def percent(self) -> float:
        """The share over the run so far; NaN before the first batch. Synchronises the device."""
        return 100.0 * float(torch.cat(self._alike).float().mean()) if self._alike else math.nan

    def on_test_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Batch, *_: Any) -> None:
        adapter, images = pl_module.adapter, batch.images
        by = max(1, images.shape[-1] // 16)
        shifted = nn.functional.pad(images, (by, 0, by, 0), mode="reflect")[..., : images.shape[-2], : images.shape[-1]]
        pl_module.passes.detach()
        with isolate_rng(), adapter.paused(), trainer.precision_plugin.forward_context():
            seen, moved = (adapter.step(view).logits.argmax(1) for view in (images, shifted))
        pl_module.passes.attach(adapter)
        self._alike.append(seen == moved)
