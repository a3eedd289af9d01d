"""Defence of an adapter: batches are checked, lost states are given up, and one that never learns says so."""

import math
import warnings
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
from tta.functional import usable
from tta.hyperparameters import Config, OptimizerConfig

KEEP_EVERY = 100  # batches between two snapshots that a model with logits that are not finite goes back to
SILENT = 50  # batches without a single update, after which a warning says so
SKIPPED, BAD = range(2)  # places in the counters that are saved; BAD counts only until it is reported
MADE, FILTERED, LOST, BATCHES, RECOVERIES = range(5)  # places in those that are not; likewise LOST


class Output(NamedTuple):
    """Results of one batch: logits (batch, classes), and a score per sample, higher = more likely an unknown class."""

    logits: Tensor
    outlier_score: Tensor | None = None


class Progress(NamedTuple):
    """Counts since the adapter was made, reset or loaded.

    Attributes:
        batches: that were learned from; those predicted while paused do not count.
        updates: optimizer steps made.
        filtered: steps left out because a filter let no sample of the batch through.
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
    multi_label: ClassVar[bool] = False  # whether its rule holds for several labels an image, each a row of two classes
    _CHECKED_AT_ONCE: ClassVar[tuple[str, ...]] = ("cpu",)  # devices where a bad batch is refused before the forward
    _counters: Tensor  # on the adapter's device, as _progress
    _seen: Tensor  # both as last read
    _input_is_finite: Tensor | None
    _channels_last: bool
    _dtype: torch.dtype | None
    _last: Tensor | None  # the last batch, for export
    _accepted: set[tuple[Any, ...]]  # shapes and precisions of batches that went through
    _warned: set[str]

    def _start_defence(self, device: torch.device | None) -> None:
        """Set up the counters and what is remembered of batches and good states."""
        self.register_buffer("_counters", torch.zeros(2, dtype=torch.int64, device=device))
        self.register_buffer("_progress", torch.zeros(5, dtype=torch.int64, device=device), persistent=False)
        self._seen = torch.zeros(7, dtype=torch.int64)  # both; those of a GPU are copied without waiting for it
        self._input_is_finite = None
        self._lock = ModuleLock()
        self._warned = set()
        self._accepted = set()
        self._kept, self._good_batches, self._strict, self._last = None, 0, True, None
        self._dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)

    def adapt(self, x: Tensor) -> "Tensor | Output":
        """Learn from the batch and return the logits to be scored."""
        raise NotImplementedError

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the present model."""
        raise NotImplementedError

    def step(self, x: Tensor) -> "Output":
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
        made, filtered, _, batches, recoveries = self._progress.tolist()
        return Progress(batches, made, filtered, self.skipped_updates, recoveries)

    @property
    def skipped_updates(self) -> int:
        """Optimizer steps skipped so far because the loss or a gradient was not finite."""
        return int(self._counters[SKIPPED])

    def _checked(self, x: Tensor) -> Tensor:
        """The batch in the memory format of the model, apart from the user's graph; a ValueError unless it is fit."""
        inputs.check(x, self.device, self._dtype)
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
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _step_of_good(self, x: Tensor, good: Tensor) -> Output:
        """Predict and learn from the good images alone; the logits of the others are NaN."""
        if good.any():
            found = self.step(x[good])
        else:  # an image of zeros, from which nothing is learned, tells the number of classes
            last = self._last
            with self.paused():
                found = self.step(torch.zeros_like(x[:1]))
            self._last = last  # export is not to calibrate on it
        logits = found.logits.new_full((len(x), found.logits.shape[1]), torch.nan)
        score = None if found.outlier_score is None else logits.new_full((len(x),), torch.nan)
        if good.any():
            logits[good] = found.logits
            if score is not None and found.outlier_score is not None:
                score[good] = found.outlier_score
        return Output(logits, score)

    def _check_outputs_served(self) -> None:
        """Refuse sigmoid outputs for a method that computes logits from the features itself."""
        if self.outputs.kind == "sigmoid" and hasattr(self, "_head"):
            raise ValueError(
                f"{type(self).__name__} computes with the features and the weights of the classifier, which have no meaning "
                "for it with outputs='sigmoid'. Use a method that needs the outputs alone, such as norm or tent."
            )

    def _check_first(self, output: Output, x: Tensor) -> None:
        """Look at the first outputs of a shape: are they logits, and is the batch large enough for its statistics?"""
        logits, kind = output.logits.detach(), self.outputs.kind
        if kind == "sigmoid" and self.outputs.labels > 1 and not self.multi_label:
            raise ValueError(
                f"{type(self).__name__} chooses among images, and here an image has {self.outputs.labels} labels of its own. "
                "Methods for several labels an image are source, norm and tent."
            )
        if logits.shape[1] == 1:
            raise ValueError(
                "The model has a single output, whose softmax is always 1. Pass outputs='sigmoid' if it is the logit of a "
                "class against its absence."
            )
        if text := outputs.problem(logits, kind):
            self._warn("outputs", text)
        if len(x) < norms.SMALL_BATCH and self.small_batches in (None, "raise") and export.by_batch_alone(self.model):
            if self.small_batches == "raise":
                raise ValueError(
                    f"A batch of {len(x)} images: statistics of fewer than {norms.SMALL_BATCH} are not used with small_batches='raise'. Pass "
                    "larger batches, or small_batches='blend' or 'source'."
                )
            self._warn(
                "small",
                f"a batch of {len(x)} gives BatchNorm layers statistics that are unreliable: of 40 CIFAR images one by one 32 "
                "were wrong, 1 with the source's statistics. Pass small_batches='blend' or 'source', or larger batches.",
            )

    def _learned(self, x: Tensor) -> Output:
        """Output of :meth:`adapt`. If the first batch of its shape fails, the state is as before it."""
        kind = (x.shape, x.dtype)
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
        return output

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
        """The output; if its logits are not finite, that of the last good state, which the adapter has gone back to.

        Minus infinity is finite here: it is the logarithm of a probability of 0.
        """
        finite = (output.logits < math.inf).all()
        if x.device.type not in self._CHECKED_AT_ONCE:
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
        if kept is None:
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
        if self.optimizer is None and self.device.type in self._CHECKED_AT_ONCE:
            return  # nothing can have been counted
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
                f"no update in {int(seen[BATCHES])} batches: the filter let no sample through, so nothing was learned. "
                "adapter.progress() counts them. Check the thresholds, and that the model gives logits.",
            )

    def _warn(self, about: str, text: str) -> None:
        if about not in self._warned:
            self._warned.add(about)
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

    def _no_gradient(self) -> str:
        return (
            f"{type(self).__name__} would never learn: no gradient goes from its loss to the "
            f"{len(self.optimized_parameters())} parameters that it adapts. The forward of {type(self.model).__name__} may "
            "run under torch.no_grad(), detach features, leave torch, or be quantised. Pass a model that lets gradients "
            "through, or use a method without them (norm, lame, t3a)."
        )
