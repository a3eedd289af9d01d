"""The base class of every method: a classifier that predicts on each batch and learns from it."""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tta import channels_last, fingerprint, modules, optimizers
from tta.functional import logits_of, usable
from tta.hyperparameters import Config, OptimizerConfig
from tta.messages import require
from tta.source import BATCH_SIZE, EXPECTED, Known, Need, SourceLike, known_from

__all__ = ["Adapter", "Config", "OptimizerConfig", "Output", "config_class", "require"]


class Output(NamedTuple):
    """Results of one batch: logits (batch, classes), and a score per sample, higher = more likely an unknown class."""

    logits: Tensor
    outlier_score: Tensor | None = None


class Adapter(nn.Module):
    """A source classifier that adapts to the stream it predicts: ``logits = adapter(x)`` predicts *and* learns.

    A method overrides :meth:`configure_model` and :meth:`adapt`, at times :meth:`parameters_to_adapt` and
    :meth:`predict`, and names its hyper-parameters with the annotation ``config: MyConfig``. The adapter defends
    itself, so that any loop may drive it: under ``no_grad`` or ``inference_mode``, after ``train()`` or ``eval()``, under
    autocast, with a batch that makes the loss infinite.

    Args:
        model: any module that maps images (batch, channels, height, width) to logits (batch, classes), or to an object
            with ``.logits``. It is copied and put into ``eval()`` mode; the caller's object is never changed.
        config: hyper-parameters; the method's defaults if left out.
        source: source images or statistics of them, see :func:`tta.adapt`; ignored by a method that needs none.
        copy: ``False`` adapts the caller's own module in place and saves the memory of the copy.

    Raises:
        TypeError: ``model`` is not a module that can be adapted; the message says what to pass.
        ValueError: the model lacks the layers that the method adapts, or ``source`` is missing or does not fit.
    """

    config: Config
    optimizer: torch.optim.Optimizer | None  # None for a method without a gradient
    preset: str | None = None  # name of the published settings that it was built with, for the manifest
    scored_forward: str = "before"  # whether the returned logits are from before the batch's update or "after" it
    _FUSED_ON: ClassVar[tuple[str, ...]] = ("cuda",)
    _CHECKED_AT_ONCE: ClassVar[tuple[str, ...]] = ("cpu",)  # devices where a bad batch is refused before the forward
    _STATE: ClassVar[str] = "adapter_state"  # the JSON part of the state, as bytes: safetensors holds only tensors
    _counters: Tensor  # updates skipped, non-finite batches not yet reported

    def __init__(
        self, model: nn.Module, config: Config | None = None, *, source: SourceLike | None = None, copy: bool = True
    ) -> None:
        super().__init__()
        self.config = config if config is not None else config_class(type(self))()
        if isinstance(model, Adapter):
            raise TypeError(f"The model is an adapter already ({type(model).__name__}). Pass its source model.")
        with torch.inference_mode(False), torch.enable_grad():
            self.model = modules.own(modules.unwrap(model), copy)
            self.source_fingerprint = fingerprint.of_model(self.model)
            self.model.eval()
            self._channels_last = copy and channels_last.pays(self.model)
            if self._channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.generator = torch.Generator()
            device = next((parameter.device for parameter in self.model.parameters()), None)
            self.register_buffer("_counters", torch.zeros(2, dtype=torch.int64, device=device))
            self._counters_seen = torch.zeros(2, dtype=torch.int64)  # a GPU's counters, copied without waiting for it
            self._input_is_finite: Tensor | None = None
            self._input_is_usable: Tensor | None = None
            self._paused = False
            self._warned = False
            self.source_statistics: list[dict[str, Any]] = []  # description of the statistics used, for the manifest
            self.known = self._look_up(source)  # one entry per need; configure_model copies them into buffers
            self.configure_model()
            # Memories are created on the CPU, even if the model is on a GPU.
            super()._apply(lambda tensor: tensor.to(self.device))  # type: ignore[no-untyped-call]
            self.known = []
            self.restart_optimizer()
            self._source = {
                slot.name: None if slot.value is None else slot.value.detach().clone() for slot in modules.slots(self)
            }
            self.generator.manual_seed(0)

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
            return made  # on a CPU the flag is known without waiting, and the backward pass is saved
        elif loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):  # see functional.gradients_of
                loss.backward()  # type: ignore[no-untyped-call]
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        if present:
            finite = loss.detach().isfinite().all() & get_total_norm(present).isfinite()
            finite = finite & self.input_finite
            made = finite if when is None else finite & when
            optimizers.step(optimizer, when=made)
            self._counters[0] += ~finite
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
        flags = [flag for flag in (self._input_is_finite, self._input_is_usable) if flag is not None]
        return torch.stack(flags).all() if flags else torch.ones((), dtype=torch.bool, device=self.device)

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
        with torch.inference_mode(False), torch.enable_grad():
            x = self._checked(x)
            # torch 2.6 would reuse, without a gradient, the casts of weights that a prediction under no_grad has cached.
            torch.clear_autocast_cache()
            try:
                if self._paused:
                    with torch.no_grad():
                        result: Tensor | Output = self.predict(x)
                else:
                    result = self.adapt(x)
            except ValueError as error:
                if "more than 1 value per channel" in str(error):
                    raise ValueError(
                        f"A batch of {len(x)} gives a BatchNorm layer a single value per channel, which has no "
                        f"variance, so '{type(self).__name__}' cannot normalise by it. Use larger batches, or a method "
                        "that keeps source statistics (norm with alpha below 1)."
                    ) from error
                raise
        output = result if isinstance(result, Output) else Output(result)
        score = output.outlier_score
        self._read_counters()
        return Output(output.logits.detach().float(), None if score is None else score.detach().float())

    @contextmanager
    def paused(self) -> Iterator["Adapter"]:
        """Within this context the adapter predicts and learns nothing."""
        before, self._paused = self._paused, True
        try:
            yield self
        finally:
            self._paused = before

    def reset(self) -> None:
        """Go back to the source model, bit for bit: weights, buffers, optimizer, memories, counters, random state."""
        with torch.inference_mode(False), torch.no_grad():
            for slot in modules.slots(self):
                source = self._source[slot.name]
                if source is None or slot.value is None or slot.value.shape != source.shape:
                    slot.fill(None if source is None else source.clone())
                else:
                    slot.value.copy_(source)
        self.restart_optimizer()
        self.generator.manual_seed(0)
        self._input_is_finite = self._input_is_usable = None
        self._counters_seen.zero_()
        torch.clear_autocast_cache()

    @property
    def device(self) -> torch.device:
        """The device of the adapter's tensors."""
        return self._counters.device

    @property
    def skipped_updates(self) -> int:
        """Optimizer steps skipped so far because the loss or a gradient was not finite."""
        return int(self._counters[0])

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
        text = json.dumps({"method": type(self).__name__, "format": 1, "optimizer": numbers})
        state[prefix + self._STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the adapter's own entries out of ``state_dict``, then load the rest as any module does."""
        header = self._header(state_dict, prefix)
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
            ValueError: the state is not one of an adapter, of this method, and of these parameters.
        """
        if prefix + self._STATE not in state_dict:
            raise ValueError(
                f"This is not the state of an adapter: it has no entry '{prefix + self._STATE}'. To load weights of "
                "the source model, load them into the model before adapting it."
            )
        header: dict[str, Any] = json.loads(bytes(state_dict.pop(prefix + self._STATE).cpu().tolist()))
        if header["method"] != type(self).__name__:
            raise ValueError(f"The state is of a '{header['method']}' adapter; this one is a '{type(self).__name__}'.")
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
        self.source_statistics = statistics.describe()
        return [{name: v.to(self.device) for name, v in entry.known.items()} for entry in statistics.entries]

    def _checked(self, x: Tensor) -> Tensor:
        """The batch in the memory format of the model; a ValueError unless it is a finite batch of images."""
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or len(x) == 0:
            given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"Expected a floating-point batch of images (batch, channels, height, width) with values in [0, 1]; "
                f"got {given}. For uint8 images pass x.float() / 255."
            )
        if x.device.type in self._CHECKED_AT_ONCE:
            # If an image is not finite, neither is the sum, at a tenth of the cost. Huge values overflow it too: count.
            bad = 0 if math.isfinite(x.sum()) else int((~x.isfinite()).flatten(1).any(1).sum())
            if bad:
                raise ValueError(f"{bad} of the {len(x)} images hold NaN or infinite values. Nothing was learned.")
        else:
            if self._counters_seen[1] > 0:
                self._counters[1] = 0
                self._counters_seen.zero_()
                raise ValueError("An earlier batch held NaN or infinite values. Nothing was learned from it.")
            self._input_is_finite = x.isfinite().all()
            self._counters[1] += ~self._input_is_finite
        self._input_is_usable = usable(x)
        x = x.clone() if x.is_inference() else x
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _read_counters(self) -> None:
        """Warn once of skipped updates; the counters of a GPU arrive about a batch late, as nothing waits for them."""
        if self.optimizer is None and self.device.type in self._CHECKED_AT_ONCE:
            return  # nothing can have been counted
        if self._counters.is_cuda and not self._counters_seen.is_pinned():
            self._counters_seen = self._counters_seen.pin_memory()
        self._counters_seen.copy_(self._counters, non_blocking=True)
        if self._counters_seen[0] > 0 and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: an update with a non-finite loss or gradient was skipped; the weights are as "
                "before it. adapter.skipped_updates counts them. A lower learning rate usually helps.",
                RuntimeWarning,
                stacklevel=3,
            )


def config_class(method: type[Adapter]) -> type[Config]:
    """The dataclass that a method names with its annotation ``config: MyConfig``."""
    kind: type[Config] = get_type_hints(method)["config"]
    return kind
