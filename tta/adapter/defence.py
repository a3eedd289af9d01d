"""Defence of an adapter: batches are checked, lost states are given up, and one that never learns says so."""

import threading
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from tta import norms
from tta.adapter import export, inputs, outputs
from tta.adapter.locks import ModuleLock
from tta.adapter.snapshots import Snapshot
from tta.adapter.state import SavedState
from tta.distributed import ALONE
from tta.functional import rows, usable
from tta.hyperparameters import Config, OptimizerConfig

KEEP_EVERY = 100  # batches between two snapshots that a model with logits that are not finite goes back to
ONE_CLASS = 24  # batches in a row with a single predicted class, after which a warning says so
GLANCE = 8  # of a map, every so manyth pixel of every so manyth row is looked at for that
SILENT = 50  # batches without a single update, after which a warning says so
SKIPPED, BAD = range(2)  # places in the counters that are saved; BAD counts only until it is reported
MADE, FILTERED, LOST, BATCHES, RECOVERIES, CLASS, ROW = range(7)  # places in those that are not; likewise LOST


class Output(NamedTuple):
    """Results of one batch.

    Attributes:
        logits: (batch, classes); (batch, classes, height, width) of a model for segmentation, numbers (batch, values) for
            regression; of a detector its own list of dictionaries.
        outlier_score: (batch,), higher = more likely an unknown class.
        ids: (batch,), int64, for :meth:`Adapter.feedback`: those given, else a running count, -1 for an image that is not
            kept for an answer. None for a method that cannot use feedback and has no guard, unless they were given.
    """

    logits: Tensor
    outlier_score: Tensor | None = None
    ids: Tensor | None = None


class Progress(NamedTuple):
    """Counts since the adapter was made, reset or loaded.

    Attributes:
        batches: that were learned from; those predicted while paused do not count.
        updates: optimizer steps made, with a gradient other than 0.
        filtered: steps that taught nothing: a filter let no sample of the batch through, the batch was too small, or no gradient
            was left, as where all probabilities are 0 or 1.
        skipped: steps left out because the loss or a gradient was not finite.
        recoveries: times that logits were not finite and the adapter went back to its last good state.
    """

    batches: int
    updates: int
    filtered: int
    skipped: int
    recoveries: int


class Defence(SavedState):
    """The part of an adapter that keeps it alive in any loop, see :class:`tta.adapter.Adapter`."""

    config: Config
    model: nn.Module
    on_bad: Literal["raise", "skip"]
    small_batches: norms.SmallBatches | None
    # Whether several workers may share a stream, see tta.adapter.Adapter.join. A subclass may do more, so that it says so itself.
    distributed: ClassVar[bool] = False
    tasks: ClassVar[tuple[str, ...]] = ("classification",)  # those it serves, see :mod:`tta.tasks`
    needs: ClassVar[str] = "class probabilities"  # which outputs of another task do not give; for its refusal
    # Whether it is for vision-language models; a batch may then bring views of its images.
    two_towers: ClassVar[bool] = False
    returns_logits: ClassVar[bool] = True  # whether a softmax of what it returns means something
    multi_label: ClassVar[bool] = False  # whether its rule holds for several labels an image, each a row of two classes
    _CHECKED_AT_ONCE: ClassVar[tuple[str, ...]] = ("cpu",)  # devices where a bad batch is refused before the forward
    _counters: Tensor  # on the adapter's device, as _progress
    _seen: Tensor  # both as last read
    _input_is_finite: Tensor | None
    _channels_last: bool
    _dtype: torch.dtype | None
    _last: Tensor | None  # the last batch, for export
    _paused_in: Counter[int]  # threads, and how many contexts each is in
    _refused: ValueError | None  # why the ids of the present batch are refused
    _accepted: set[tuple[Any, ...]]  # shapes and precisions of batches that went through
    _warned: set[str]

    def _start_defence(self, device: torch.device | None) -> None:
        """Set up the counters and what is remembered of batches and good states."""
        self.register_buffer("_counters", torch.zeros(2, dtype=torch.int64, device=device))
        self.register_buffer("_progress", torch.zeros(ROW + 1, dtype=torch.int64, device=device), persistent=False)
        # Both together; those of a GPU are copied without waiting for it.
        self._seen = torch.zeros(2 + ROW + 1, dtype=torch.int64)
        self._input_is_finite = None
        self._lock = ModuleLock()
        self.workers = ALONE
        self._warned = set()
        self._accepted = set()
        self._kept, self._good_batches, self._strict, self._last, self._refused = None, 0, True, None, None
        self._dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def adapt(self, x: Tensor) -> "Tensor | Output":
        """Learn from the batch and return the logits to be scored."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the present model."""
        raise NotImplementedError

    def step(self, x: Tensor, ids: Any = None) -> "Output":
        """Predict the batch and learn from it."""
        raise NotImplementedError

    def paused(self) -> "AbstractContextManager[Any]":
        """Within this context the adapter predicts and learns nothing."""
        raise NotImplementedError

    def reset(self) -> None:
        """Go back to the source model."""
        raise NotImplementedError

    @property
    def input_finite(self) -> Tensor:
        """Whether the present batch is :func:`~tta.functional.usable`: nothing of it may be learned or remembered otherwise.

        A boolean scalar on its device; a condition on it waits for a GPU. On the CPU a batch that is not finite is refused
        before :meth:`adapt`, so that it is false for huge values only.
        """
        flag = self._input_is_finite
        return torch.ones((), dtype=torch.bool, device=self.device) if flag is None else flag

    def progress(self) -> Progress:
        """Counts of batches, updates made and left out, and recoveries since it was made, reset or loaded; waits for a GPU."""
        made, filtered, _, batches, recoveries, *_ = self._progress.tolist()
        return Progress(batches, made, filtered, self.skipped_updates, recoveries)

    @property
    def skipped_updates(self) -> int:
        """Optimizer steps skipped so far because the loss or a gradient was not finite."""
        return int(self._counters[SKIPPED])

    def _checked(self, x: Tensor) -> Tensor:
        """The batch in the memory format of the model, apart from the user's graph; a ValueError unless it is fit."""
        if self.workers.size > 1:
            return self._checked_together(x)
        inputs.check(x, self.device, self._dtype, views=self.two_towers)
        x = x.clone() if x.is_inference() else x.detach()
        fit = usable(x)
        if x.device.type in self._CHECKED_AT_ONCE:
            # Huge values are not fit either, but they are predicted: count those that are not finite.
            bad = 0 if fit else int((~x.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(f"{bad} of the {len(x)} images hold NaN or infinite values. Nothing was learned.")
        else:
            if self._seen[2 + LOST] > 0:  # read about a batch late
                self._progress[LOST] = 0
                self._seen[2 + LOST] = 0
                self._go_back()
            if self._seen[BAD] > 0:
                self._counters[BAD] = 0
                self._seen.zero_()
                raise ValueError("An earlier batch held NaN or infinite values. Nothing was learned from it.")
            self._counters[BAD] += ~x.isfinite().all()
        self._input_is_finite = fit
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last and x.dim() == 4 else x

    def _good(self, x: Tensor) -> Tensor:
        """A mask of the finite images, (batch,); what is no batch of images is refused here, or by all workers together."""
        if self.workers.size == 1:
            return inputs.good(x, self.device, self._dtype, views=self.two_towers)
        try:
            return inputs.good(x, self.device, self._dtype, empty=True)
        except ValueError:
            return torch.ones(1, dtype=torch.bool)

    def _checked_together(self, x: Tensor) -> Tensor:
        """As :meth:`_checked`, decided by all workers and known at once on every device: nobody goes on alone."""
        refusal = self._refused
        if refusal is None:
            try:
                inputs.check(x, self.device, self._dtype, empty=True)
                x = x.clone() if x.is_inference() else x.detach()
            except ValueError as error:
                refusal = error
        fine = refusal is None and x.numel() > 0
        fit = not fine or bool(usable(x))
        bad = 0 if fit else int((~x.isfinite()).flatten(1).any(1).sum())
        paused = self._paused_in[threading.get_ident()] > 0
        x, met = self.workers.meet(x, self.device, refusal=refusal, bad=bad, usable=fit, paused=paused)
        if met.bad:
            raise ValueError(f"{met.bad} of the {met.images} images hold NaN or infinite values. Nothing was learned.")
        if not met.images and self.on_bad == "raise":
            raise ValueError(f"None of the {self.workers.size} workers has an image in this batch.")
        self._input_is_finite = torch.tensor(met.usable, device=self.device)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _step_of_good(self, x: Tensor, good: Tensor, ids: Tensor | None) -> Output:
        """Predict and learn from the good images alone; the logits of the others are NaN."""
        if good.any() or self.workers.size > 1:
            found = self.step(x[good], None if ids is None else ids[good.cpu()])
        else:  # an image of zeros, from which nothing is learned, tells the number of classes
            last = self._last
            with self.paused():
                found = self.step(torch.zeros_like(x[:1]))
            self._last = last  # export is not to calibrate on it
        logits = self.outputs.task.spread(found.logits, good)
        score = None if found.outlier_score is None else found.outlier_score.new_full((len(x),), torch.nan)
        if good.any() and score is not None and found.outlier_score is not None:
            score[good] = found.outlier_score
        if ids is None and found.ids is not None:
            ids = torch.full((len(x),), -1)
            ids[good.cpu()] = found.ids[: int(good.sum())]
        return Output(logits, score, ids)

    def _check_outputs_served(self) -> None:
        """Refuse sigmoid outputs for a method that computes logits from the features itself, and views that a map cannot have."""
        self._check_views()
        if self.outputs.kind == "sigmoid" and hasattr(self, "_head"):
            raise ValueError(
                f"{type(self).__name__} computes with the features and the weights of the classifier, which have no meaning "
                "for it with outputs='sigmoid'. Use a method that needs the outputs alone, such as norm or tent."
            )

    def _check_views(self) -> None:
        """Refuse the paper's views for maps: they move pixels, so that predictions of them would lie elsewhere."""
        if self.outputs.task.name == "segmentation" and getattr(self.config, "augment", None) == "paper":
            raise ValueError(
                f"{type(self).__name__}: augment='paper' moves pixels, so that maps of its views lie elsewhere than the picture's. "
                "Pass augment='scales', 'none', or a callable that moves no pixel or returns (view, undo)."
            )

    def _check_shared(self, workers: int) -> None:
        """Refuse a stream of boxes for several workers; at the first batch too, since the task may be recognised there only."""
        if workers > 1 and not self.outputs.task.tensors:
            raise ValueError(
                f"A stream of task='{self.outputs.task.name}' is not shared by several workers. Use one process."
            )

    def _check_first(self, output: Output, x: Tensor) -> None:
        """Look at the first outputs of a shape: are they logits, and is the batch large enough for its statistics?"""
        self._check_views()
        self._check_shared(self.workers.size)
        if self.outputs.task.of_classes:
            self._check_first_classes(output.logits.detach())
        images = self.workers.total(x)
        # A picture that is mapped, or searched for objects, has thousands of values a channel.
        one_row = isinstance(output.logits, Tensor) and output.logits.dim() == 2
        if (
            images < norms.SMALL_BATCH
            and one_row
            and self.small_batches in (None, "raise")
            and export.by_batch_alone(self.model)
        ):
            if self.small_batches == "raise":
                raise ValueError(
                    f"A batch of {images} images: statistics of fewer than {norms.SMALL_BATCH} are not used with small_batches='raise'. Pass "
                    "larger batches, or small_batches='blend' or 'source'."
                )
            self._warn(
                "small",
                f"a batch of {images} gives BatchNorm layers statistics that are unreliable: of 40 CIFAR images one by one 32 "
                "were wrong, 1 with the source's statistics. Pass small_batches='blend' or 'source', or larger batches.",
            )

    def _check_first_classes(self, logits: Tensor) -> None:
        """Look at the first outputs of classes: are they logits?"""
        kind = self.outputs.kind
        if kind == "sigmoid" and self.outputs.labels > 1 and not self.multi_label:
            raise ValueError(
                f"{type(self).__name__} chooses among images, and here an image has {self.outputs.labels} labels of its own. "
                "Methods for several labels an image are source, norm and tent."
            )
        if logits.shape[1] == 1:
            raise ValueError(
                "The model has a single output, whose softmax is always 1. Pass outputs='sigmoid' if it is the logit of a "
                "class against its absence, and task='regression' if it is a number."
            )
        if len(logits) and self.returns_logits and (text := outputs.problem(logits, kind)):
            self._warn("outputs", text)

    def _learned(self, x: Tensor) -> Output:
        """Output of :meth:`adapt`. If the first batch of its shape fails, the state is as before it."""
        kind = (self.workers.total(x), x.shape[1:], x.dtype)
        before = None if kind in self._accepted else Snapshot.of(self, self.optimizer, self.generator)
        try:
            result = self._explained(self.adapt, x)
            output = result if isinstance(result, Output) else Output(result)
            if before is not None:
                self._check_first(output, x)
        except Exception:
            if before is not None:
                self._put_back(before)
            raise
        self._accepted.add(kind)
        self._progress[BATCHES] += 1
        if self.outputs.task.of_classes:
            self._note_classes(output.logits.detach())
        return output

    def _note_classes(self, logits: Tensor) -> None:
        """Count the batches in a row in which a single class was predicted; of small batches, the same in all."""
        seen = rows(logits[..., ::GLANCE, ::GLANCE] if logits.dim() == 4 else logits)
        predicted, _ = self.workers.gathered(seen.argmax(1))
        first = predicted[0]
        if len(predicted) < norms.SMALL_BATCH:
            first = torch.where(self._progress[ROW] > 0, self._progress[CLASS], first)
        same = (predicted == first).all()
        self._progress[CLASS] = predicted[0]
        self._progress[ROW] = torch.where(same, self._progress[ROW] + 1, 0)

    def _explained(self, run: Callable[[Tensor], Any], x: Tensor) -> Any:
        try:
            return run(x)
        except Exception as error:
            if "does not require grad" in str(error):
                raise ValueError(self._no_gradient()) from error
            explained = inputs.explained(error, x, type(self).__name__)
            if explained is error:
                raise
            raise explained from error

    def _finite(self, output: Output, x: Tensor) -> Output:
        """The output; if its logits are not finite, that of the last good state, which the adapter has gone back to."""
        finite = self.workers.all(self.outputs.task.finite(output.logits))
        if x.device.type not in self._CHECKED_AT_ONCE and self.workers.size == 1:
            self._progress[LOST] += ~finite & self.input_finite
        elif not finite and self.input_finite:  # huge values give such logits by themselves, and teach nothing
            self._go_back()
            with torch.no_grad():
                return Output(self.predict(x), output.outlier_score)
        self._good_batches += 1
        # From the first good batch on, so that the memory in use stays the same afterwards.
        if self._good_batches % KEEP_EVERY == 1 and self.optimizer is not None:
            self._kept = Snapshot.of(self, self.optimizer, self.generator)
        return output

    def _go_back(self) -> None:
        """Return to the last good state; the next time to the source, unless another hundred batches were good."""
        kept, counters, progress = self._kept, self._counters.clone(), self._progress.clone()
        with self._waiting_kept():
            if kept is None:
                with self._unguarded():
                    self.reset()
            else:
                self._put_back(kept)
        self._counters.copy_(counters)
        self._progress.copy_(progress)
        self._progress[RECOVERIES] += 1
        self._good_batches, self._kept = 1, None
        self._warn(
            "lost",
            "logits were not finite; the adapter went back to "
            + ("the source model" if kept is None else f"its state of at most {KEEP_EVERY} batches before")
            + ". adapter.progress() counts this. A lower learning rate or larger batches usually help.",
        )

    def _read_counters(self) -> None:
        """Warn once of updates left out; the counters of a GPU arrive about a batch late, as nothing waits for them."""
        if self._counters.is_cuda and not self._seen.is_pinned():
            self._seen = self._seen.pin_memory()
        self._seen[:2].copy_(self._counters, non_blocking=True)
        self._seen[2:].copy_(self._progress, non_blocking=True)
        if self._seen[SKIPPED] > 0:
            self._warn(
                "skipped",
                "an update with a non-finite loss or gradient, or on images with huge values, was skipped; the weights are as "
                "before it. adapter.skipped_updates counts them. A lower learning rate usually helps.",
            )
        seen = self._seen[2:]
        if seen[FILTERED] > 0 and seen[BATCHES] >= SILENT and seen[MADE] == 0:
            self._warn(
                "silent",
                f"no update in {int(seen[BATCHES])} batches: the filter let no sample through, the batches are too small, or no gradient "
                "was left (probabilities that are all 0 or 1), so nothing was learned. adapter.progress() counts them. Check the "
                "thresholds, and that the model gives logits.",
            )

        if seen[ROW] >= ONE_CLASS and self.guard is None:
            self._warn(
                "one class",
                f"every image of a batch was predicted as the same class, {ONE_CLASS} batches in a row. Either the stream shows nothing else, "
                "such as a covered camera, or the adapter has collapsed. Pass guard=True, and it goes back by itself.",
            )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
            if self.workers.rank:  # the first worker says it
                return
            warnings.warn(f"{type(self).__name__}: {text}", RuntimeWarning, stacklevel=4)

    def _warn_of_short_weights(self) -> None:
        """Say that 16-bit weights do not learn: between 1 and 2 bfloat16 has steps of 0.0078, float16 of 0.00098."""
        short = {p.dtype for p in self.optimized_parameters() if p.is_floating_point() and p.element_size() < 4}
        if short and isinstance(self.config, OptimizerConfig):
            kinds = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in short))
            coarsest = max(torch.finfo(kind).eps for kind in short)
            self._warn(
                "short",
                f"the weights that adapt are {kinds}, whose steps near 1 are {coarsest:.1g}: updates of lr="
                f"{self.config.lr:g} round away. Pass model.float(), with precision bf16-mixed for speed.",
            )

    def _no_parameters(self) -> str:
        layers = norms.named_layers(self.model)
        bare = bool(layers) and not any(True for _, layer in layers for _ in layer.parameters())
        why = (
            f"none of its {len(layers)} normalisation layers has a scale and shift (affine=False)"
            if bare
            else "all that the method's rule and settings choose is without parameters"
        )
        return (
            f"{type(self).__name__} found no parameters to adapt in {type(self.model).__name__}: {why}. Use a method that "
            "adapts all weights (cotta, rmt, shot), or one without a gradient (norm, lame, t3a)."
        )

    def _no_gradient(self) -> str:
        return (
            f"{type(self).__name__} would never learn: no gradient goes from its loss to the "
            f"{len(self.optimized_parameters())} parameters that it adapts. The forward of {type(self.model).__name__} may "
            "run under torch.no_grad(), detach features, leave torch, or be quantised. Pass a model that lets gradients "
            "through, or use a method without them (norm, lame, t3a)."
        )
