"""Callbacks of the engine: adapt a model in a Trainer of your own; measure forgetting and consistency."""

import copy
import dataclasses
import inspect
import math
from collections.abc import Iterable, Mapping
from operator import attrgetter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from tta import fingerprint, methods
from tta.adapter import Adapter
from tta.batches import IMAGES, LABELS
from tta.datasets.domains import to_float
from tta.datasets.stream import Batch, Stream
from tta.results.record import Record


class AdaptCallback(Callback):
    """Adapt a model inside an existing LightningModule while ``Trainer.test`` or ``Trainer.predict`` runs.

    During the run an adapter around a copy replaces the sub-module named by ``attribute``; afterwards the original is
    back, unchanged. It is called as the original is (``model(x)`` or ``model(pixel_values=x)``) and answers as the
    original does: logits, or an object with ``.logits``, whose other fields are None but for the loss of ``labels=``.

    The adapter is built when the run starts, from the weights that the module then has, those of ``ckpt_path=`` too.
    ``callback.adapter`` keeps what it learned and continues from there in the next run, as long as the sub-module has
    the weights and the structure that it was built from; else it is built anew.

    Args:
        method: as in :func:`tta.adapt`.
        attribute: dotted name of the classifier inside the LightningModule.
        hparams: as in :func:`tta.adapt`.

    Raises:
        ValueError: the LightningModule has no such sub-module; the message lists its sub-modules. Or the Trainer has
            several processes.
    """

    def __init__(self, method: str | type[Adapter], *, attribute: str = "model", **hparams: Any) -> None:
        self.adapter: Adapter | None = None
        self._method, self._attribute, self._hparams = method, attribute, hparams
        self._original: nn.Module | None = None
        self._built_from: tuple[str, str] | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage in ("test", "predict"):
            refuse_processes(trainer, type(self).__name__)
            self._find(pl_module)  # said before a checkpoint is read

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin(pl_module)

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._end(pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._end(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._end(pl_module)

    def _find(self, pl_module: pl.LightningModule) -> nn.Module:
        try:
            found: nn.Module = attrgetter(self._attribute)(pl_module)
        except AttributeError:
            raise ValueError(
                f"{type(pl_module).__name__} has no sub-module '{self._attribute}'. Name the classifier with "
                f"attribute=; there are: {', '.join(name for name, _ in pl_module.named_children())}."
            ) from None
        return found

    def _begin(self, pl_module: pl.LightningModule) -> None:
        """Put the adapter in the place of the original, which has its device and the weights of a checkpoint by now."""
        original = self._find(pl_module)
        found = fingerprint.of_model(original), str(original)
        built_from = self._built_from
        if self.adapter is not None and built_from is None:  # the user's own
            built_from = self.adapter.source_fingerprint, found[1]
        with torch.inference_mode(False), torch.enable_grad():  # a Trainer tests without gradients
            if self.adapter is None or (found != built_from and self.adapter.model is not original):
                self.adapter = methods.adapt(original, self._method, **self._hparams)
            self.adapter.to(pl_module.device)
        self._built_from, self._original = found, original
        self._put(pl_module, _StandIn(self.adapter, original))

    def _end(self, pl_module: pl.LightningModule) -> None:
        if self._original is not None:
            self._put(pl_module, self._original)
            self._original = None

    def _put(self, pl_module: pl.LightningModule, model: nn.Module) -> None:
        owner, _, name = self._attribute.rpartition(".")
        setattr(attrgetter(owner)(pl_module) if owner else pl_module, name, model)


class _StandIn(nn.Module):
    """An adapter that is called, and answers, as the model in whose place it stands."""

    def __init__(self, adapter: Adapter, original: nn.Module) -> None:
        super().__init__()
        self.adapter = adapter
        self.__dict__["_original"] = original  # no sub-module: it neither moves nor learns with this one
        self._answer: Any = None  # the original's for one image

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        images, labels = self._given(args, dict(kwargs))
        logits = self.adapter(images)
        if self._answer is None:
            self._answer = self._answer_of_original(images[:1])
        if isinstance(self._answer, Tensor):
            return logits
        classes = isinstance(labels, Tensor) and labels.dim() == 1 and not labels.is_floating_point()
        return _answer_like(self._answer, logits, nn.functional.cross_entropy(logits, labels) if classes else None)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        found = getattr(self.__dict__["_original"], name, None)
        if callable(found):
            raise AttributeError(
                f"'{name}' of the model would answer with its source weights: while it is adapted, call the model itself."
            )
        return getattr(self.adapter, name) if found is None else found

    def _given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Any]:
        """The images and labels of a call; all else that would change the answer is refused."""
        original = self.__dict__["_original"]
        if args:
            images, *others = args
        else:
            first = list(inspect.signature(original.forward).parameters)[:1]
            name = next((name for name in (*IMAGES, *first) if name in kwargs), None)
            if name is None:
                raise TypeError(
                    f"{type(original).__name__} was called without images; got {', '.join(kwargs) or 'nothing'}."
                )
            images, others = kwargs.pop(name), []
        labels = next((kwargs.pop(name) for name in LABELS if name in kwargs), None)
        if kwargs.get("return_dict") is True:
            del kwargs["return_dict"]
        asked = [name for name, value in kwargs.items() if value is not None and value is not False]
        asked += ["a second positional argument"] * any(other is not None for other in others)
        asked += ["return_dict=False"] * (kwargs.get("return_dict") is False)
        if asked:
            raise TypeError(
                f"An adapter takes images and gives logits; {type(original).__name__} was also given {', '.join(asked)}. "
                "Leave that out while it is adapted."
            )
        return images, labels

    @torch.no_grad()
    def _answer_of_original(self, image: Tensor) -> Any:
        original = self.__dict__["_original"]
        modes = [(module, module.training) for module in original.modules()]
        try:
            return original.eval()(image)
        finally:
            for module, mode in modes:
                module.training = mode


def _answer_like(answer: Any, logits: Tensor, loss: Tensor | None) -> Any:
    """An object of the kind of ``answer`` with these logits; its other fields, which are of other weights, are None."""
    names: Iterable[str] = vars(answer) if hasattr(answer, "__dict__") else ()
    if hasattr(answer, "_fields"):
        names = answer._fields
    elif dataclasses.is_dataclass(answer):
        names = [item.name for item in dataclasses.fields(answer)]
    values = {**dict.fromkeys(names), "logits": logits, **({"loss": loss} if "loss" in names else {})}
    if isinstance(answer, Mapping) and "out" in answer and "logits" not in answer:  # of torchvision's segmentation
        return type(answer)({"out": logits})  # type: ignore[call-arg]  # as any dictionary
    if isinstance(answer, Mapping):  # of transformers
        return type(answer)(**{name: value for name, value in values.items() if value is not None})
    if hasattr(answer, "_replace"):
        return answer._replace(**values)
    if dataclasses.is_dataclass(answer) and not isinstance(answer, type):
        return dataclasses.replace(answer, **values)
    like = copy.copy(answer)
    for name, value in values.items():
        setattr(like, name, value)
    return like


def refuse_processes(trainer: pl.Trainer, what: str) -> None:
    """Raise a ValueError if a Trainer has more than one process."""
    if trainer.world_size > 1:
        raise ValueError(
            f"{what} adapts one model to one stream in one process; this Trainer has {trainer.world_size}, each of which "
            "would adapt a copy of its own to a part of the stream and report that part. Use Trainer(devices=1, "
            "num_nodes=1); for many runs start a process for each, as `tta bench --jobs N` does."
        )


class SourceError(Callback):
    """Error on the source domain before and after a run, in percent, predicted without learning; of maps that of the pixels.

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
                adapter = pl_module.adapter
                mine = Batch(*map(adapter.workers.part_of, batch))
                images = to_float(mine.images.to(pl_module.device, non_blocking=True))
                record.add(adapter.step(images).logits, mine.labels, mine.domain, mine.index, task=adapter.task)
        if not record.task.of_classes:
            raise ValueError(
                f"The error on clean images is of classes; it does not serve task='{record.task.name}'. Leave clean= out."
            )
        counts = pl_module.adapter.workers.objects(record.wrong_and_known())
        wrong, known = (sum(column) for column in zip(*counts, strict=True))
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
        if adapter.task.name != "classification":
            raise ValueError(
                f"The consistency of a shifted image is that of its class; it does not serve {adapter.task.name}."
            )
        by = max(1, images.shape[-1] // 16)
        shifted = nn.functional.pad(images, (by, 0, by, 0), mode="reflect")[..., : images.shape[-2], : images.shape[-1]]
        pl_module.passes.detach()
        with isolate_rng(), adapter.paused(), trainer.precision_plugin.forward_context():
            seen, moved = (adapter.step(view).logits.argmax(1) for view in (images, shifted))
        pl_module.passes.attach(adapter)
        self._alike.append(adapter.workers.gathered(seen == moved)[0])
