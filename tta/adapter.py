"""The base class of every method: a classifier that predicts on each batch and learns from it."""

import copy
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import get_total_norm

from tta import channels_last, fingerprint
from tta.functional import logits_of
from tta.source import BATCH_SIZE, EXPECTED, Known, Need, Source, known_from


@dataclass
class Config:
    """Hyper-parameters of a method; this one has none."""


@dataclass
class OptimizerConfig(Config):
    """Hyper-parameters of a method with a gradient step.

    Attributes:
        optimizer: ``"adam"``, ``"sgd"`` or ``"adamw"``.
        lr: learning rate, above 0.
        momentum: SGD only.
        betas: Adam and AdamW only.
        weight_decay: as the optimizer defines it (decoupled in AdamW).
        nesterov: SGD only; programs differ in this, and a first step differs by a factor of 1.9.
        steps: optimizer steps a batch.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    nesterov: bool = False
    steps: int = 1

    def __post_init__(self) -> None:
        require(self.optimizer in ("adam", "sgd", "adamw"), f"optimizer={self.optimizer!r}", "'adam', 'sgd' or 'adamw'")
        require(self.lr > 0, f"lr={self.lr}", "a learning rate above 0")
        require(0 <= self.momentum < 1, f"momentum={self.momentum}", "a value in [0, 1)")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"betas={self.betas}", "two in [0, 1)")
        require(self.weight_decay >= 0, f"weight_decay={self.weight_decay}", "a value of 0 or more")
        require(self.steps >= 1, f"steps={self.steps}", "1 or more steps a batch")


def require(condition: bool, given: str, expected: str) -> None:
    """Raise a ValueError that says what was given and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"Got {given}; expected {expected}.")


class Output(NamedTuple):
    """What one batch gave: logits (batch, classes), and a score per sample, higher = more likely an unknown class."""

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
        source: what the method may know of the source domain, see :func:`tta.adapt`; unused by a method that needs none.
        copy: ``False`` adapts the caller's own module in place and saves the memory of the copy.

    Raises:
        TypeError: ``model`` is not a module that can be adapted; the message says what to pass.
        ValueError: the model lacks the layers that the method adapts, or ``source`` is missing or does not fit.
    """

    config: Config
    preset: str | None = None  # name of the published settings it was built from, for the manifest
    scored_forward: str = "before"  # whether the logits returned precede the batch's update, or follow it
    _FUSED_ON: ClassVar[tuple[str, ...]] = ("cuda",)
    _CHECKED_AT_ONCE: ClassVar[tuple[str, ...]] = ("cpu",)  # where a batch is refused before it is looked at
    _STATE: ClassVar[str] = "adapter_state"  # the JSON part of the state, as bytes: safetensors holds only tensors

    def __init__(
        self, model: nn.Module, config: Config | None = None, *, source: Source | None = None, copy: bool = True
    ) -> None:
        super().__init__()
        self.config = config if config is not None else config_class(type(self))()
        with torch.inference_mode(False), torch.enable_grad():
            self.model = own(unwrap(model), copy)
            self.source_fingerprint = fingerprint.of_model(self.model)
            self.model.eval()
            self._channels_last = copy and channels_last.pays(self.model)
            if self._channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.generator = torch.Generator()
            self._counters: Tensor  # updates skipped, non-finite batches not yet reported
            device = next((parameter.device for parameter in self.model.parameters()), None)
            self.register_buffer("_counters", torch.zeros(2, dtype=torch.int64, device=device))
            self._counters_seen = torch.zeros(
                2, dtype=torch.int64
            )  # a GPU's counters as last heard of, never waited for
            self._input_is_finite: Tensor | None = None
            self._paused = False
            self._warned = False
            self.source_statistics: list[dict[str, Any]] = []  # for the manifest: what the method knows of the source
            self.known = self._look_up(source)  # one entry a need; a method keeps what it wants of them in buffers
            self.configure_model()
            super()._apply(lambda tensor: tensor.to(self.device))  # memories are made on the CPU, wherever the model is
            self.known = []
            self.optimizer = self._new_optimizer()
            self._source = {key: None if value is None else value.detach().clone() for key, value in self._tensors()}
            self.generator.manual_seed(0)

    # ------------------------------------------------------------------ what a method defines

    @classmethod
    def source_needs(cls, model: nn.Module, config: Any) -> list[Need]:
        """What the method must know of the source domain; ``configure_model`` finds it in ``self.known``, in this order."""
        return []

    def configure_model(self) -> None:
        """Choose, once, which modules use batch statistics, what may change, which copies and banks are kept."""
        self.model.requires_grad_(False)

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        """Parameters the optimizer changes; by default all that still require a gradient."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def adapt(self, x: Tensor) -> Tensor | Output:
        """Learn from the batch and return the logits to be scored, (batch, classes); gradients are on."""
        raise NotImplementedError(f"{type(self).__name__} must define adapt(self, x) and return logits.")

    # ------------------------------------------------------------------ what a method is given

    def predict(self, x: Tensor) -> Tensor:
        """Logits as the adapter would predict now, learning nothing and changing no state; (batch, classes) float32."""
        return logits_of(self.model(x))

    def update(
        self, loss: Tensor, *, gradients: Sequence[Tensor | None] | None = None, when: Tensor | None = None
    ) -> Tensor:
        """One optimizer step down ``loss``.

        A step whose loss or gradient is not finite is skipped and counted in :attr:`skipped_updates`: weights and
        optimizer moments stay as they were.

        Args:
            loss: scalar.
            gradients: those of the optimizer's parameters, where they were computed already (elsewhere than at the
                present weights, as a sharpness-aware step does); else they are computed here.
            when: a boolean scalar; where it is false there is nothing to learn from and no step is made. On a GPU
                nothing waits for it.

        Returns:
            Whether the step was made, a boolean scalar on the loss's device.
        """
        optimizer = self.optimizer
        assert optimizer is not None, "update() needs parameters to adapt and a config that extends OptimizerConfig"
        optimizer.zero_grad(set_to_none=True)
        made = torch.zeros((), dtype=torch.bool, device=loss.device)
        if gradients is not None:
            for parameter, gradient in zip(self._optimized(), gradients, strict=True):
                parameter.grad = gradient
        elif when is not None and when.device.type == "cpu" and not when:
            return made  # known without waiting, and the backward pass is spared
        elif loss.requires_grad:
            with torch.autocast(loss.device.type, enabled=False):  # see functional.gradients_of
                loss.backward()
        present = [p.grad for p in self._optimized() if p.grad is not None]
        if present:
            finite = loss.detach().isfinite().all() & get_total_norm(present).isfinite()
            finite = finite & self.input_finite
            made = finite if when is None else finite & when
            if made.device.type == "cpu" and not _is_fused(optimizer):
                if made:
                    optimizer.step()
            else:  # the fused kernels read the flag on the device: nothing waits for it
                for parameter in self._optimized():
                    if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
                        parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)  # they want one layout
                optimizer.found_inf = (~made).float()  # type: ignore[attr-defined]
                optimizer.step()
            self._counters[0] += ~finite
        optimizer.zero_grad(set_to_none=True)
        torch.clear_autocast_cache()  # a second forward under autocast would otherwise use the weights before the step
        return made

    def source_tensors(self) -> dict[str, Tensor]:
        """The source's parameters and buffers under their names in ``self.model``; to be read only."""
        return {
            name.removeprefix("model."): value
            for name, value in self._source.items()
            if name.startswith("model.") and value is not None
        }

    def adapted_and_source(self) -> tuple[list[nn.Parameter], list[Tensor]]:
        """The parameters of the model that adapt, and their source values; the latter to be read only."""
        source = self.source_tensors()
        adapted = {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}
        return list(adapted.values()), [source[name] for name in adapted]

    def predict_as_source(self, x: Tensor) -> Tensor:
        """Logits of the source weights, with the layers as the method configured them (batch statistics stay that)."""
        return logits_of(functional_call(self.model, self.source_tensors(), (x,)))

    @torch.no_grad()
    def restore(self, when: Tensor, *, moments: bool = True) -> None:
        """Give the adapted weights their source values back, as one of the steps of a method. The rest stays.

        Args:
            when: a boolean scalar; where it is false nothing happens. On a GPU nothing waits for it.
            moments: empty the optimizer's moments too.
        """
        for parameter, source in zip(*self.adapted_and_source(), strict=True):
            parameter.copy_(torch.where(when, source, parameter))
        assert self.optimizer is not None
        for slots in self.optimizer.state.values() if moments else ():
            for value in slots.values():
                if isinstance(value, Tensor):  # zeros are what a new optimizer starts from
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
            # Older releases of torch (2.6) would use again, without a gradient, what a prediction under no_grad has cast.
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
        """Back to the source model, bit for bit: weights, buffers, optimizer, memories, counters, random state."""
        with torch.inference_mode(False), torch.no_grad():
            for (name, owner, key), current in self._slots():
                source = self._source[name]
                if source is None or current is None or current.shape != source.shape:
                    owner._buffers[key] = None if source is None else source.clone()
                else:
                    current.copy_(source)
        self.optimizer = self._new_optimizer()
        self.generator.manual_seed(0)
        self._input_is_finite = None
        self._counters_seen.zero_()
        torch.clear_autocast_cache()

    @property
    def device(self) -> torch.device:
        """Where the adapter's tensors are."""
        return self._counters.device

    @property
    def input_finite(self) -> Tensor:
        """Whether the present batch is finite, a boolean scalar on its device; on the CPU a bad batch was refused before."""
        flag = self._input_is_finite
        return torch.ones((), dtype=torch.bool, device=self.device) if flag is None else flag

    @property
    def input_is_finite(self) -> bool:
        """The same as a bool, for which a GPU is waited for."""
        return self._input_is_finite is None or bool(self._input_is_finite)

    @property
    def skipped_updates(self) -> int:
        """Optimizer steps skipped so far because the loss or a gradient was not finite."""
        return int(self._counters[0])

    def train(self, mode: bool = True) -> "Adapter":
        """Set the adapter's own flag only: the modes of the model's layers belong to :meth:`configure_model`."""
        self.training = mode
        return self

    # ------------------------------------------------------------------ state

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Everything the adapter remembers, as one flat dictionary of tensors that safetensors can write as it stands.

        Tied weights appear once. What is not a tensor by nature is one small JSON text, stored as bytes (uint8) under
        ``adapter_state``. Tensors are copies: adapting further does not change a saved state.
        """
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for alias in self._aliases():
            state.pop(prefix + alias, None)
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key].detach().clone(memory_format=torch.contiguous_format)
        slots: list[dict[str, Any]] = []
        for number, parameter in enumerate(self._optimized()):
            moments = self.optimizer.state.get(parameter, {}) if self.optimizer else {}
            slots.append({key: value for key, value in moments.items() if not isinstance(value, Tensor)})
            for key, value in moments.items():
                if isinstance(value, Tensor):
                    state[f"{prefix}optimizer.{number}.{key}"] = value.detach().clone(
                        memory_format=torch.contiguous_format
                    )
        state[prefix + "generator"] = self.generator.get_state()
        text = json.dumps({"method": type(self).__name__, "format": 1, "optimizer": slots})
        state[prefix + self._STATE] = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the adapter's own entries out of ``state_dict``, then load the rest as any module does."""
        if prefix + self._STATE not in state_dict:
            raise ValueError(
                f"This is not the state of an adapter: it has no entry '{prefix + self._STATE}'. To load weights of "
                "the source model, load them into the model before adapting it."
            )
        extra = json.loads(bytes(state_dict.pop(prefix + self._STATE).cpu().tolist()))
        if extra["method"] != type(self).__name__:
            raise ValueError(f"The state is of a '{extra['method']}' adapter; this one is a '{type(self).__name__}'.")
        if len(extra["optimizer"]) != len(self._optimized()):
            raise ValueError(
                f"The state holds moments of {len(extra['optimizer'])} parameters; this adapter changes "
                f"{len(self._optimized())}. Build it with the model and settings that the state was saved with."
            )
        self.generator.set_state(state_dict.pop(prefix + "generator").cpu())
        self.optimizer = self._new_optimizer()
        moments: dict[int, dict[str, Any]] = {}
        for key in [key for key in state_dict if key.startswith(prefix + "optimizer.")]:
            _, number, name = key.removeprefix(prefix).split(".", 2)
            moments.setdefault(int(number), {})[name] = state_dict.pop(key)
        for slot, (parameter, plain) in enumerate(zip(self._optimized(), extra["optimizer"], strict=True)):
            saved = {**plain, **moments.get(slot, {})}
            if saved and self.optimizer:
                fused = _is_fused(self.optimizer)
                self.optimizer.state[parameter] = {
                    key: _beside(parameter, key, value, fused) if isinstance(value, Tensor) else value
                    for key, value in saved.items()
                }
        for alias, name in self._aliases().items():
            if prefix + name in state_dict:
                state_dict[prefix + alias] = state_dict[prefix + name]
        for (name, owner, key), _ in list(self._slots()):
            if self._source.get(name, name) is None:  # a bank whose shape the first batch decides: now, the saved one
                bank = state_dict.get(prefix + name)
                owner._buffers[key] = None if bank is None else torch.empty_like(bank, device=self.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Adapter":
        """Move the source copy and the optimizer's moments along with the parameters (``to``, ``cuda`` ...)."""
        moments = [dict(self.optimizer.state[p]) if self.optimizer else {} for p in self._optimized()]
        super()._apply(fn, recurse)
        self._source = {key: None if value is None else fn(value) for key, value in self._source.items()}
        self.optimizer = self._new_optimizer()
        for parameter, saved in zip(self._optimized(), moments, strict=True):
            if saved and self.optimizer:
                self.optimizer.state[parameter] = {
                    key: fn(value)
                    if isinstance(value, Tensor) and (key != "step" or _is_fused(self.optimizer))
                    else value
                    for key, value in saved.items()
                }
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "Adapter":
        # Generators cannot be deep-copied in every supported torch; everything else is copied with one memo, so that
        # the copy's optimizer holds the copy's parameters.
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        memo[id(self.generator)] = generator
        duplicate.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return duplicate

    # ------------------------------------------------------------------ inner workings

    def _look_up(self, source: Source | None) -> list[Known]:
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

    def _slots(self) -> Iterator[tuple[tuple[str, nn.Module, str], Tensor | None]]:
        """Every place of a parameter or buffer, empty and non-persistent buffers too, each tensor once."""
        seen: set[int] = set()
        for path, owner in self.named_modules():
            parameters = [(key, value) for key, value in owner._parameters.items() if value is not None]
            for key, value in [*parameters, *owner._buffers.items()]:
                if value is None or id(value) not in seen:
                    seen.add(id(value))
                    yield (f"{path}.{key}" if path else key, owner, key), value

    def _tensors(self) -> Iterator[tuple[str, Tensor | None]]:
        for (name, _, _), value in self._slots():
            yield name, value

    def _aliases(self) -> dict[str, str]:
        """Further names of tied parameters and buffers -> the name under which the state holds them."""
        first: dict[int, str] = {}
        aliases: dict[str, str] = {}
        for path, owner in self.named_modules(remove_duplicate=False):
            for key, value in [*owner._parameters.items(), *owner._buffers.items()]:
                name = f"{path}.{key}" if path else key
                if value is not None and first.setdefault(id(value), name) != name:
                    aliases[name] = first[id(value)]
        return aliases

    def _optimized(self) -> list[nn.Parameter]:
        return [p for group in self.optimizer.param_groups for p in group["params"]] if self.optimizer else []

    def _new_optimizer(self) -> torch.optim.Optimizer | None:
        config = self.config
        if not isinstance(config, OptimizerConfig):
            return None
        parameters = self.parameters_to_adapt()
        if not parameters:
            raise ValueError(f"{type(self).__name__} found no parameters to adapt in {type(self.model).__name__}.")
        # On a GPU the fused kernels can skip a step by a flag on the device; the plain ones would have to wait for it.
        fused = parameters[0].device.type in self._FUSED_ON or None
        decay = config.weight_decay
        if config.optimizer == "sgd":
            sgd = torch.optim.SGD(
                parameters, config.lr, config.momentum, weight_decay=decay, nesterov=config.nesterov, fused=fused
            )
            if fused and config.momentum:  # a first step that is skipped would leave these as uninitialised memory
                for parameter in parameters:
                    sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            return sgd
        kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, config.lr, config.betas, weight_decay=decay, fused=fused)

    def _checked(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor) or x.dim() != 4 or not x.is_floating_point() or len(x) == 0:
            given = f"{x.dtype} of shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(
                f"Expected a floating-point batch of images (batch, channels, height, width) with values in [0, 1]; "
                f"got {given}. For uint8 images pass x.float() / 255."
            )
        if x.device.type in self._CHECKED_AT_ONCE:
            # A sum is not finite where an image is not, at a tenth of the cost; where huge values overflow it, count.
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
        x = x.clone() if x.is_inference() else x
        return x.contiguous(memory_format=torch.channels_last) if self._channels_last else x

    def _read_counters(self) -> None:
        """Warn once of skipped updates; on a GPU the counters arrive without being waited for, a batch or so late."""
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
    return get_type_hints(method)["config"]


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside a ``torch.compile``d one.

    Raises:
        TypeError: not a module, or one of a kind that cannot be adapted, with what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a torch.nn.Module as the model; got {type(model).__name__}.")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("A TorchScript module cannot be adapted: its layers are fixed. Pass the original module.")
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise TypeError(
            f"Pass the module inside {type(model).__name__} (model.module): one stream adapts on one device."
        )
    if isinstance(model, Adapter):
        raise TypeError(f"The model is an adapter already ({type(model).__name__}). Pass its source model.")
    inner = getattr(model, "_orig_mod", model)  # what torch.compile(model) wraps
    if any(hasattr(module, "_orig_mod") for module in inner.modules()):
        raise TypeError(
            "A part of the model is wrapped by torch.compile: the compiled code would not see the layers change. "
            "Pass the model as it was before compiling."
        )
    return inner


def own(model: nn.Module, copied: bool) -> nn.Module:
    """A deep copy of the model (tied weights stay tied), or the model itself.

    Raises:
        TypeError: the model cannot be copied; the message says what to do.
    """
    if not copied:
        return model
    try:
        duplicate = copy.deepcopy(model)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({error}). Pass copy=False to adapt it in place."
        ) from error
    for parameter in duplicate.parameters():
        parameter.grad = None
    return duplicate


def _beside(parameter: Tensor, key: str, value: Tensor, fused: bool) -> Tensor:
    """A copy of a saved moment, placed and laid out as its parameter."""
    if key == "step":  # it lives where the optimizer makes it: on the CPU unless the kernel is fused
        return value.to(parameter.device if fused else "cpu", copy=True)
    return torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _is_fused(optimizer: torch.optim.Optimizer) -> bool:
    return bool(optimizer.defaults.get("fused"))
