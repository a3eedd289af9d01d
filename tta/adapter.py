"""The base class of every method: a classifier that predicts on each batch and learns from it."""

import copy
import json
import math
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tta import channels_last, export, fingerprint, inputs, modules, norms, optimizers, outputs, saving
from tta.functional import logits_of, usable
from tta.hyperparameters import Config, OptimizerConfig, as_dict
from tta.locks import ModuleLock
from tta.messages import require
from tta.outputs import Outputs, ToLogits
from tta.snapshots import Snapshot, put_back
from tta.source import BATCH_SIZE, EXPECTED, Known, Need, SourceLike, SourceStatistics, known_from
from tta.summary import Summary, summarise

__all__ = ["Adapter", "Config", "OptimizerConfig", "Output", "Progress", "config_class", "require"]

KEEP_EVERY = 100  # batches between two snapshots that a model with logits that are not finite goes back to
SMALL = 8  # images; batch statistics of fewer are unreliable: 40 CIFAR images one by one, source 15 % wrong, norm 80 %
SILENT = 50  # batches without a single update, after which a warning says so
FORMAT = 2  # of saved states
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


class Adapter(nn.Module):
    """A source classifier that adapts to the stream it predicts: ``logits = adapter(x)`` predicts *and* learns.

    A method overrides :meth:`configure_model` and :meth:`adapt`, at times :meth:`parameters_to_adapt` and
    :meth:`predict`, and names its hyper-parameters with the annotation ``config: MyConfig``. The adapter defends
    itself, so that any loop may drive it: under ``no_grad`` or ``inference_mode``, after ``train()`` or ``eval()``, under
    autocast, from several threads, with a batch that makes the loss infinite. A batch that is refused leaves the state as it
    was. Logits that are not finite send the adapter back to its last good state, at most 100 batches old.

    Args:
        model: any module that maps images (batch, channels, height, width) to logits (batch, classes), or to an object
            with ``.logits``. It is copied and put into ``eval()`` mode; the caller's object is never changed.
        config: hyper-parameters; the method's defaults if left out.
        source: source images or statistics of them, see :func:`tta.adapt`; ignored by a method that needs none.
        copy: ``False`` adapts the caller's own module in place and saves the memory of the copy.
        outputs: what the model's outputs are, see :func:`tta.adapt`.
        on_bad: ``"raise"`` or ``"skip"``, see :func:`tta.adapt`.
        small_batches: ``None``, ``"blend"``, ``"source"`` or ``"raise"``, see :func:`tta.adapt`.

    Raises:
        TypeError: ``model`` is not a module that can be adapted; the message says what to pass.
        ValueError: the model lacks the layers that the method adapts, or ``source`` is missing or does not fit.
    """

    config: Config
    optimizer: torch.optim.Optimizer | None  # None for a method without a gradient
    method: str  # name of the method, as in tables; of a user's own the class name
    multi_label: ClassVar[bool] = False  # whether its rule holds for several labels an image, each a row of two classes
    preset: str | None = None  # name of the published settings that it was built with, for the manifest
    scored_forward: str = "before"  # whether the returned logits are from before the batch's update or "after" it
    _FUSED_ON: ClassVar[tuple[str, ...]] = ("cuda",)
    _CHECKED_AT_ONCE: ClassVar[tuple[str, ...]] = ("cpu",)  # devices where a bad batch is refused before the forward
    _STATE: ClassVar[str] = "adapter_state"  # the JSON part of the state, as bytes: safetensors holds only tensors
    _counters: Tensor  # on the adapter's device
    _progress: Tensor  # likewise

    def __init__(
        self,
        model: nn.Module,
        config: Config | None = None,
        *,
        source: SourceLike | None = None,
        copy: bool = True,
        outputs: Outputs = "logits",
        on_bad: Literal["raise", "skip"] = "raise",
        small_batches: norms.SmallBatches | None = None,
    ) -> None:
        super().__init__()
        require(on_bad in ("raise", "skip"), f"on_bad={on_bad!r}", "'raise' or 'skip'")
        self.on_bad, self.small_batches = on_bad, small_batches
        self.config = config if config is not None else config_class(type(self))()
        self.method = type(self).__name__
        self._built_with = as_dict(self.config)  # a later change of the configuration makes no other adapter
        if isinstance(model, Adapter):
            raise TypeError(f"The model is an adapter already ({type(model).__name__}). Pass its source model.")
        with torch.inference_mode(False), torch.enable_grad():
            self.model = modules.own(modules.unwrap(model), copy)
            self.source_fingerprint = fingerprint.of_model(self.model)
            self.model.eval()
            self.outputs = ToLogits(outputs)
            if self.outputs.kind != "logits":
                self.model.register_forward_hook(self.outputs)
            self._source_norms = export.stored_statistics(self.model)
            self._last: Tensor | None = None  # the last batch, for export
            self._channels_last = copy and channels_last.pays(self.model)
            if self._channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.generator = torch.Generator()
            device = next((parameter.device for parameter in self.model.parameters()), None)
            self.register_buffer("_counters", torch.zeros(2, dtype=torch.int64, device=device))
            self.register_buffer("_progress", torch.zeros(5, dtype=torch.int64, device=device), persistent=False)
            self._seen = torch.zeros(7, dtype=torch.int64)  # both; those of a GPU are copied without waiting for it
            self._input_is_finite: Tensor | None = None
            self._lock = ModuleLock()
            self._paused_in: Counter[int] = Counter()  # threads, and how many contexts each is in
            self._warned: set[str] = set()
            self._good_batches = 0
            self._accepted: set[tuple[Any, ...]] = set()  # shapes and precisions of batches that went through
            self._strict = True  # whether a state of other settings is refused; torch does not pass it on
            self._kept: Snapshot | None = None  # last good state; None for the source
            self._dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
            self.source_statistics: list[dict[str, Any]] = []  # description of the statistics used, for the manifest
            self.statistics: SourceStatistics | None = None
            self.known = self._look_up(source)  # one entry per need; configure_model copies them into buffers
            self.configure_model()
            self._check_outputs_served()
            if small_batches:
                norms.serve_small_batches(self, self._source_norms, small_batches)
            # Memories are created on the CPU, even if the model is on a GPU.
            super()._apply(lambda tensor: tensor.to(self.device))  # type: ignore[no-untyped-call]
            self.known = []
            self.restart_optimizer()
            self._source = {
                slot.name: None if slot.value is None else slot.value.detach().clone() for slot in modules.slots(self)
            }
            self.generator.manual_seed(0)
            self._warn_of_short_weights()

    # ------------------------------------------------------------------ what a method defines

    @classmethod
    def source_needs(cls, model: nn.Module, config: Any) -> list[Need]:
        """Source statistics that the method needs; ``configure_model`` finds them in ``self.known``, in this order."""
        return []

    def configure_model(self) -> None:
        """Set up the model, once: layers that use batch statistics, parameters that may change, copies, memory banks."""
        self.model.requires_grad_(False)

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        """Parameters the optimizer changes; by default all that still require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def adapt(self, x: Tensor) -> Tensor | Output:
        """Learn from the batch and return the logits to be scored, (batch, classes); gradients are on."""
        raise NotImplementedError(f"{type(self).__name__} must define adapt(self, x) and return logits.")

    # ------------------------------------------------------------------ what a method is given

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the present model, (batch, classes) float32; learns nothing and changes no state."""
        return logits_of(self.model(x))

    def update(
        self, loss: Tensor, *, gradients: Sequence[Tensor | None] | None = None, when: Tensor | None = None
    ) -> Tensor:
        """Make one optimizer step on ``loss``.

        A step whose loss or gradient is not finite is skipped and counted in :attr:`skipped_updates`: weights and
        optimizer moments stay as they were.

        Args:
            loss: scalar.
            gradients: of :meth:`optimized_parameters`, if they were computed already, as by a sharpness-aware step, which
                takes them at other weights than the present ones. Left out, they are computed here.
            when: a boolean scalar; if it is false there is nothing to learn from and no step is made. On a GPU
                nothing waits for it.

        Returns:
            Whether the step was made, a boolean scalar on the loss's device.

        Raises:
            ValueError: no gradient reaches a parameter, so that nothing would ever be learned.
        """
        optimizer = self.optimizer
        assert optimizer is not None, "update() needs parameters to adapt and a config that extends OptimizerConfig"
        optimizer.zero_grad(set_to_none=True)
        made = torch.zeros((), dtype=torch.bool, device=loss.device)
        parameters = self.optimized_parameters()
        if gradients is not None:
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        elif when is not None and when.device.type == "cpu" and not when:
            self._progress[FILTERED] += 1
            return made  # on a CPU the flag is known without waiting, and the backward pass is saved
        elif loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):  # see functional.gradients_of
                loss.backward()  # type: ignore[no-untyped-call]
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if not present:
            raise ValueError(self._no_gradient())
        finite = loss.detach().isfinite().all() & get_total_norm(present).isfinite()
        finite = finite & self.input_finite
        made = finite if when is None else finite & when
        optimizers.step(optimizer, when=made)
        self._counters[SKIPPED] += ~finite
        self._progress[MADE] += made
        if when is not None:
            self._progress[FILTERED] += finite & ~when
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a second forward under autocast would otherwise use the weights before the step
        return made

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer, in the order of ``gradients`` in :meth:`update`; none without an optimizer."""
        return optimizers.parameters_of(self.optimizer)

    def restart_optimizer(self) -> None:
        """Replace the optimizer by a new one of :meth:`parameters_to_adapt`: no moments, the learning rate of the config.

        Called at the end of construction and by :meth:`reset`. A method calls it to forget the moments in between, or
        to make steps in ``configure_model`` already.
        """
        if not isinstance(self.config, OptimizerConfig):
            self.optimizer = None
            return
        parameters = self.parameters_to_adapt()
        if not parameters:
            raise ValueError(f"{type(self).__name__} found no parameters to adapt in {type(self.model).__name__}.")
        # On a GPU the fused kernels can skip a step by a flag on the device; the plain ones would have to wait for it.
        fused = parameters[0].device.type in self._FUSED_ON
        self.optimizer = optimizers.build(self.config, parameters, fused=fused)

    @property
    def input_finite(self) -> Tensor:
        """Whether the present batch is :func:`~tta.functional.usable`: nothing of it may be learned or remembered otherwise.

        A boolean scalar on its device; a condition on it waits for a GPU. On the CPU a batch that is not finite is refused
        before :meth:`adapt`, so that it is false for huge values only.
        """
        flag = self._input_is_finite
        return torch.ones((), dtype=torch.bool, device=self.device) if flag is None else flag

    def source_tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers of the source model, under their names in ``self.model``; to be read only."""
        return {
            name.removeprefix("model."): value
            for name, value in self._source.items()
            if name.startswith("model.") and value is not None
        }

    def adapted_and_source(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The model's parameters that adapt, and their source values, which are to be read only."""
        source = self.source_tensors()
        adapted = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return list(adapted.values()), [source[name] for name in adapted]

    def predict_as_source(self, x: Tensor) -> Tensor:
        """Logits of the source weights, with the layers as the method configured them: batch statistics stay in use."""
        return logits_of(functional_call(self.model, self.source_tensors(), (x,)))

    @torch.no_grad()
    def restore(self, when: Tensor, *, moments: bool = True) -> None:
        """Set the adapted weights back to their source values, as a step of a method. All else stays as it is.

        Args:
            when: a boolean scalar; if it is false nothing happens. On a GPU nothing waits for it.
            moments: set the optimizer's moments to zero too.
        """
        for parameter, source in zip(*self.adapted_and_source(), strict=True):
            parameter.copy_(torch.where(when, source, parameter))
        assert self.optimizer is not None
        for slots in self.optimizer.state.values() if moments else ():
            for value in slots.values():
                if isinstance(value, Tensor):  # a new optimizer starts from zeros
                    value.masked_fill_(when.to(value.device), 0)

    # ------------------------------------------------------------------ for a user

    def forward(self, x: Tensor) -> Tensor:
        """Predict the batch and learn from it: detached float32 logits (batch, classes)."""
        return self.step(x).logits

    def step(self, x: Tensor) -> Output:
        """Predict the batch and learn from it (only predict, while :meth:`paused`).

        Raises:
            ValueError: ``x`` is not a finite floating-point batch (batch, channels, height, width). On a GPU the
                finiteness is read a batch later, so as not to wait for the device; the bad batch teaches nothing.
        """
        with self._lock, torch.inference_mode(False), torch.enable_grad():
            if self.on_bad == "skip" and not (good := inputs.good(x, self.device, self._dtype)).all():
                return self._step_of_good(x, good)
            x = self._last = self._checked(x)
            # torch 2.6 would reuse, without a gradient, the casts of weights that a prediction under no_grad has cached.
            torch.clear_autocast_cache()
            if self._paused_in[threading.get_ident()]:
                with torch.no_grad():
                    result: Tensor | Output = self._explained(self.predict, x)
            else:
                result = self._finite(self._learned(x), x)
            output = result if isinstance(result, Output) else Output(result)
            self._read_counters()
        score = output.outlier_score
        logits = self.outputs.back(output.logits.detach().float())
        return Output(logits, None if score is None else score.detach().float())

    @contextmanager
    def paused(self) -> Iterator["Adapter"]:
        """Within this context the adapter predicts and learns nothing; other threads are not concerned."""
        thread = threading.get_ident()
        self._paused_in[thread] += 1
        try:
            yield self
        finally:
            self._paused_in[thread] -= 1

    def reset(self) -> None:
        """Go back to the source model, bit for bit: weights, buffers, optimizer, memories, counters, random state."""
        with self._lock, torch.inference_mode(False):
            put_back(self, self._source)
            self.restart_optimizer()
            self.generator.manual_seed(0)
            self._input_is_finite = None
            self._seen.zero_()
            self._good_batches = 0
            self._kept = None
            torch.clear_autocast_cache()

    def summary(self) -> Summary:
        """Parameters that adapt, normalisation layers found, left out and unknown, and the statistics they use; print it."""
        return summarise(self.model, self, self.method)

    def __repr__(self) -> str:
        """The :meth:`summary` as text."""
        return str(self.summary())

    def progress(self) -> Progress:
        """Counts of batches, updates made and left out, and recoveries since it was made, reset or loaded; waits for a GPU."""
        made, filtered, _, batches, recoveries = self._progress.tolist()
        return Progress(batches, made, filtered, self.skipped_updates, recoveries)

    @property
    def device(self) -> torch.device:
        """The device of the adapter's tensors."""
        return self._counters.device

    @property
    def skipped_updates(self) -> int:
        """Optimizer steps skipped so far because the loss or a gradient was not finite."""
        return int(self._counters[SKIPPED])

    def predicting_model(self) -> nn.Module:
        """The module whose forward alone is :meth:`predict`; a method whose teacher predicts overrides it.

        Raises:
            ValueError: the prediction is more than the forward of one module.
        """
        if type(self).predict is not Adapter.predict:
            raise ValueError(
                f"{type(self).__name__} predicts by more than one forward of the model ({type(self).predict.__doc__}), so "
                "that no plain model predicts the same. Keep the adapter, with adapter.paused() where it must not learn."
            )
        return self.model

    def export(self, calibration: Tensor | None = None, *, exact: bool = False) -> nn.Module:
        """A plain copy of the source model with the adapted weights: its own class and ``state_dict`` keys, frozen.

        BatchNorm layers hold the statistics that the method would use. A method that normalises by the present batch has
        none to store: those of the calibration images are taken. On these images the copy predicts what the adapter
        predicts while :meth:`paused`, to rounding. It holds nothing of this toolkit, so that it can be traced and exported.

        Args:
            calibration: images (batch, channels, height, width) of the domain that the copy is for, more than a few and
                of all classes; left out, the last batch that the adapter saw.
            exact: refuse to approximate instead of warning.

        Raises:
            ValueError: the method predicts by more than a forward of one module, or normalises by the batch and there are
                no images; with ``exact``, also if the copy's predictions differ from the adapter's.
        """
        with self._lock, torch.inference_mode(False), torch.no_grad():
            model = self.predicting_model()
            images = self._last if calibration is None else self._checked(calibration)
            batch_norms = export.needs_images(model)
            if batch_norms and images is None:
                raise ValueError(
                    f"{type(self).__name__} normalises {len(batch_norms)} layers by the present batch, so that they have no "
                    "statistics to store. Pass calibration=images of the domain that the exported model is for."
                )
            statistics = export.batch_statistics(model, images) if batch_norms and images is not None else {}
            plain = export.plain(model, self._source_norms, statistics)
            modules.remove_hooks(plain, ToLogits)
            if images is not None:
                self._compare(plain, images, exact)
            return plain

    def _compare(self, plain: nn.Module, images: Tensor, exact: bool) -> None:
        """Warn, or raise, if the plain model does not predict as the adapter does."""
        found = plain(images)
        converted = self.outputs(plain, (), found)
        own, theirs = self.predict(images), logits_of(found if converted is None else converted)
        difference = float((own - theirs).abs().max())
        if difference > 1e-3 * max(1.0, float(own.abs().max())):  # rounding of other kernels is below 1e-5
            agreeing = 100 * float((own.argmax(1) == theirs.argmax(1)).float().mean())
            text = (
                f"The exported model only comes near to {type(self).__name__}, whose layers do more than a plain model's: on "
                f"{len(images)} images {agreeing:.0f} % of the predictions agree, logits differ by up to {difference:.2g}."
            )
            if exact:
                raise ValueError(text)
            warnings.warn(text, RuntimeWarning, stacklevel=3)

    def train(self, mode: bool = True) -> "Adapter":
        """Set the adapter's own flag only: the modes of the model's layers are chosen in :meth:`configure_model`."""
        self.training = mode
        return self

    # ------------------------------------------------------------------ state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All that the adapter remembers, as one flat dictionary of tensors that safetensors can write as it stands.

        Tied weights appear once. The values that are not tensors are one small JSON text, stored as bytes (uint8) under
        ``adapter_state``. Tensors are copies: adapting further does not change a saved state.
        """
        with self._lock:  # a state between two steps of another thread
            return self._state(*args, **kwargs)

    def _state(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        for alias in modules.aliases(self):
            state.pop(prefix + alias, None)
        numbers: list[dict[str, Any]] = []
        for number, moments in enumerate(optimizers.moments(self.optimizer)):
            tensors = {key: value for key, value in moments.items() if isinstance(value, Tensor)}
            state |= {f"{prefix}optimizer.{number}.{key}": value for key, value in tensors.items()}
            numbers.append({key: value for key, value in moments.items() if key not in tensors})
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key].detach().clone(memory_format=torch.contiguous_format)
        state[prefix + "generator"] = self.generator.get_state()
        header = {"class": type(self).__name__, **self.identity(), "optimizer": numbers}
        state[prefix + self._STATE] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
        return state

    def identity(self) -> dict[str, Any]:
        """Facts that a saved state must share with the adapter that loads it, and the versions that wrote it."""
        return {
            "format": FORMAT,
            "version": metadata.version("tta-toolkit"),
            "method": self.method,
            "config": self._built_with,
            "weights": self.source_fingerprint,
            "outputs": self.outputs.kind if isinstance(self.outputs.kind, str) else repr(self.outputs.kind),
            "small_batches": self.small_batches,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of :meth:`state_dict`, whole or not at all.

        Args:
            state_dict: of an adapter with the same method, settings and source weights.
            strict: ``False`` loads a state of other settings or source weights too, with a warning.
            assign: must be ``False``: values are copied into the adapter's own tensors.

        Raises:
            ValueError: not the state of an adapter, or of another one; the message says what differs.
            RuntimeError: tensors that are missing, unknown or of another shape, as of any module.
        """
        if assign:
            raise ValueError("assign=True would replace the tensors that the optimizer changes; leave it out.")
        with self._lock, torch.inference_mode(False):
            before, self._strict = Snapshot.of(self, self.optimizer, self.generator), strict
            try:
                return super().load_state_dict(state_dict, strict=strict)
            except Exception:
                self._put_back(before)
                raise
            finally:
                self._strict = True

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, whole or not at all; :func:`tta.load` makes an adapter of it.

        The file holds what :meth:`state_dict` gives, and the source statistics that the method was built with, so that
        loading needs no source images. It is written beside, flushed to disk, and renamed.

        Raises:
            OSError: the file cannot be written.
        """
        saving.write(path, self.state_dict(), self.statistics)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the adapter's own entries out of ``state_dict``, then load the rest as any module does."""
        header = self._header(state_dict, prefix)
        self._kept, self._good_batches = None, 0
        self.generator.set_state(state_dict.pop(prefix + "generator").cpu())
        self._load_moments(state_dict, prefix + "optimizer.", header["optimizer"])
        for alias, name in modules.aliases(self).items():
            if prefix + name in state_dict:
                state_dict[prefix + alias] = state_dict[prefix + name]
        for slot in list(modules.slots(self)):
            if self._source.get(slot.name, slot.name) is None:  # a bank that takes its shape from the first batch
                bank = state_dict.get(prefix + slot.name)
                slot.fill(None if bank is None else torch.empty_like(bank, device=self.device))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _header(self, state_dict: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Take the JSON part out of a state, and check it.

        Raises:
            ValueError: the state is not one of an adapter, of this method, and of these parameters; or, while loading
                strictly, of these settings and source weights.
        """
        if prefix + self._STATE not in state_dict:
            raise ValueError(
                f"This is not the state of an adapter: it has no entry '{prefix + self._STATE}'. To load weights of "
                "the source model, load them into the model before adapting it."
            )
        header: dict[str, Any] = json.loads(bytes(state_dict.pop(prefix + self._STATE).cpu().tolist()))
        kind = header.get("class", header["method"])
        if kind != type(self).__name__:
            raise ValueError(f"The state is of a '{kind}' adapter; this one is a '{type(self).__name__}'.")
        if differences := saving.differences(header, self.identity()):
            text = f"The state was saved by another adapter: {'; '.join(differences)}."
            if self._strict:
                raise ValueError(f"{text} Build the adapter alike, or load with strict=False.")
            warnings.warn(f"{text} It is loaded all the same.", RuntimeWarning, stacklevel=2)
        saved, own = len(header["optimizer"]), len(self.optimized_parameters())
        if saved != own:
            raise ValueError(
                f"The state holds moments of {saved} parameters; this adapter changes {own}. "
                "Build it with the model and settings that the state was saved with."
            )
        return header

    def _load_moments(self, state_dict: dict[str, Any], prefix: str, numbers: list[dict[str, Any]]) -> None:
        """Take the moments out of a state, tensors below ``prefix`` and numbers, and start a new optimizer with them."""
        moments = [dict(plain) for plain in numbers]
        for key in [key for key in state_dict if key.startswith(prefix)]:
            number, name = key.removeprefix(prefix).split(".", 1)
            moments[int(number)][name] = state_dict.pop(key)
        self.restart_optimizer()
        fused, parameters = optimizers.is_fused(self.optimizer), self.optimized_parameters()
        optimizers.set_moments(
            self.optimizer,
            [optimizers.placed(m, parameter, fused=fused) for m, parameter in zip(moments, parameters, strict=True)],
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Move the source copy and the optimizer's moments along with the parameters (``to``, ``cuda`` ...)."""
        moments = optimizers.moments(self.optimizer)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._source = {key: None if value is None else fn(value) for key, value in self._source.items()}
        self.restart_optimizer()
        fused = optimizers.is_fused(self.optimizer)
        optimizers.set_moments(self.optimizer, [optimizers.moved(values, fn, fused=fused) for values in moments])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        # Not every supported torch can deep-copy a generator. All else is copied with one memo, so that the copy's
        # optimizer has the copy's parameters.
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        memo[id(self.generator)] = generator
        duplicate.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return duplicate

    # ------------------------------------------------------------------ inner workings

    def _look_up(self, source: SourceLike | None) -> list[Known]:
        """The source statistics that the method needs, on the adapter's device."""
        needs = self.source_needs(self.model, self.config)
        if not needs:
            return []
        if source is None:
            raise ValueError(
                f"{type(self).__name__} needs to know the source domain ({', '.join(need.kind for need in needs)}). "
                f"Pass source=: {EXPECTED}."
            )
        batch_size = getattr(self.config, "source_batch_size", BATCH_SIZE)
        statistics = known_from(source, self.model, self.source_fingerprint, needs, batch_size)
        self.source_statistics, self.statistics = statistics.describe(), statistics
        return [{name: v.to(self.device) for name, v in entry.known.items()} for entry in statistics.entries]

    def _checked(self, x: Tensor) -> Tensor:
        """The batch in the memory format of the model, apart from the user's graph; a ValueError unless it is fit."""
        inputs.check(x, self.device, self._dtype)
        x = x.clone() if x.is_inference() else x.detach()
        if x.device.type in self._CHECKED_AT_ONCE:
            # If an image is not finite, neither is the sum, at a tenth of the cost. Huge values overflow it too: count.
            bad = 0 if math.isfinite(x.sum()) else int((~x.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(f"{bad} of the {len(x)} images hold NaN or infinite values. Nothing was learned.")
        else:
            if self._seen[2 + LOST] > 0:  # read about a batch late
                self._progress[LOST] = 0
                self._go_back()
            if self._seen[BAD] > 0:
                self._counters[BAD] = 0
                self._seen.zero_()
                raise ValueError("An earlier batch held NaN or infinite values. Nothing was learned from it.")
            self._counters[BAD] += ~x.isfinite().all()
        self._input_is_finite = usable(x)
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _step_of_good(self, x: Tensor, good: Tensor) -> Output:
        """Predict and learn from the good images alone; the logits of the others are NaN."""
        if good.any():
            found = self.step(x[good])
        else:  # an image of zeros, from which nothing is learned, tells the number of classes
            with self.paused():
                found = self.step(torch.zeros_like(x[:1]))
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
        if len(x) < SMALL and self.small_batches in (None, "raise") and export.by_batch_alone(self.model):
            if self.small_batches == "raise":
                raise ValueError(
                    f"A batch of {len(x)} images: statistics of fewer than {SMALL} are not used with small_batches='raise'. Pass "
                    "larger batches, or small_batches='blend' or 'source'."
                )
            self._warn(
                "small",
                f"a batch of {len(x)} gives BatchNorm layers statistics that are unreliable below about 16 images: 40 single "
                "CIFAR images were 80 % wrong, 15 % with the source's. Pass small_batches='blend' or 'source', or larger "
                "batches.",
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
        if self._good_batches % KEEP_EVERY == 0 and self.optimizer is not None:
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
        self._good_batches, self._kept = 0, None
        self._warn(
            "lost",
            "logits were not finite; the adapter went back to "
            + ("the source model" if kept is None else f"its state of at most {KEEP_EVERY} batches before")
            + ". adapter.progress() counts this. A lower learning rate or larger batches usually help.",
        )

    def _put_back(self, state: Snapshot) -> None:
        put_back(self, state.tensors)
        self.restart_optimizer()
        optimizers.set_moments(self.optimizer, [dict(values) for values in state.moments])
        self.generator.set_state(state.generator)
        torch.clear_autocast_cache()

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
                "before it. "
                "adapter.skipped_updates counts them. A lower learning rate usually helps.",
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


def config_class(method: type[Adapter]) -> type[Config]:
    """The dataclass that a method names with its annotation ``config: MyConfig``."""
    kind: type[Config] = get_type_hints(method)["config"]
    return kind
