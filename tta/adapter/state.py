"""State of an adapter: saved as one flat dictionary of tensors, loaded whole or not at all, moved, copied, put back."""

import copy
import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta import norms
from tta.adapter import modules, optimizers, saving
from tta.adapter.guarding import Guarding, StateDict
from tta.adapter.locks import ModuleLock
from tta.adapter.outputs import ToLogits
from tta.adapter.snapshots import Snapshot, put_back
from tta.distributed import Workers
from tta.source import SourceStatistics

FORMAT = 2  # of saved states
WAITING = "waiting."  # before the names of the samples that wait for answers
GUARD = "guard."  # before the names of a guard's tensors


class SavedState(nn.Module):
    """A module with an optimizer and a random generator, all of whose state can be saved and loaded."""

    optimizer: torch.optim.Optimizer | None  # None for a method without a gradient
    generator: torch.Generator
    method: str  # name of the method, as in tables; of a user's own the class name
    statistics: SourceStatistics | None  # that the method was built with
    source_fingerprint: str
    outputs: ToLogits
    small_batches: norms.SmallBatches | None
    guard: Guarding | None
    workers: Workers  # that share the stream
    _STATE: ClassVar[str] = "adapter_state"  # the JSON part of the state, as bytes: safetensors holds only tensors
    _built_with: dict[str, Any]
    _lock: ModuleLock
    _source: dict[str, Tensor | None]  # all parameters and buffers of the adapter as it was made, by name
    _kept: Snapshot | None  # last good state; None for the source
    _good_batches: int
    _progress: Tensor
    _strict: bool  # whether a state of other settings is refused; torch does not pass it on

    @property
    def device(self) -> torch.device:
        """The device of the adapter's tensors."""
        raise NotImplementedError

    def optimized_parameters(self) -> list[nn.Parameter]:
        """Parameters of the optimizer, in order."""
        raise NotImplementedError

    def restart_optimizer(self) -> None:
        """Replace the optimizer by a new one."""
        raise NotImplementedError

    def reset(self) -> None:
        """Go back to the source model."""
        raise NotImplementedError

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
        guarded, of_guard = (None, {}) if self.guard is None else self.guard.state()
        for alias in modules.aliases(self):
            state.pop(prefix + alias, None)
        numbers: list[dict[str, Any]] = []
        for number, moments in enumerate(optimizers.moments(self.optimizer)):
            tensors = {key: value for key, value in moments.items() if isinstance(value, Tensor)}
            state |= {f"{prefix}optimizer.{number}.{key}": value for key, value in tensors.items()}
            numbers.append({key: value for key, value in moments.items() if key not in tensors})
        state |= {f"{prefix}{GUARD}{key}": value for key, value in of_guard.items()}
        for key in [key for key in state if key.startswith(prefix)]:
            state[key] = state[key].detach().clone(memory_format=torch.contiguous_format)
        state[prefix + "generator"] = self.generator.get_state()
        header = {"class": type(self).__name__, **self.identity(), "optimizer": numbers, "guard_state": guarded}
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
            "task": self.outputs.given,
            "small_batches": self.small_batches,
            "guard": None if self.guard is None else self.guard.described(),
        }

    def changed_state(self) -> StateDict:
        """Snapshot: the entries of the state, without a guard's, that are not as in the source model; in memory."""
        with self._unguarded():
            state = self._state()
        return {
            key: value
            for key, value in state.items()
            if not _equal(value, self._source.get(key)) and not key.startswith(WAITING)
        }

    def return_to(self, snapshot: StateDict | None) -> None:
        """Go back to a state of :meth:`changed_state`, or to the source model. The counts of :meth:`progress` go on."""
        counted = self._progress.clone()
        with self._unguarded(), self._waiting_kept():
            if snapshot is None:
                self.reset()
            else:
                of_source = {key: value for key, value in self._source.items() if value is not None}
                self.load_state_dict({**of_source, **snapshot}, strict=False)
        self._progress.copy_(counted)

    @contextmanager
    def _unguarded(self) -> Iterator[None]:
        """Within this context there is no guard: what is saved, loaded or reset is the adapter alone."""
        guard, self.guard = self.guard, None
        try:
            yield
        finally:
            self.guard = guard

    @contextmanager
    def _waiting_kept(self) -> Iterator[None]:
        """Within this context what waits for answers stays: going back undoes what was learned, and not what was asked."""
        waiting = getattr(self, "waiting", None)  # only methods that use feedback have it
        if not isinstance(waiting, nn.Module):
            yield
            return
        kept = Snapshot.of(waiting, None, self.generator).tensors
        yield
        put_back(waiting, kept)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a state of :meth:`state_dict`, whole or not at all.

        Args:
            state_dict: of an adapter with the same method, settings and source weights.
            strict: ``False`` loads a state of other settings or source weights too, with a warning.
            assign: must be ``False``: values are copied into the adapter's own tensors.

        Raises:
            ValueError: not the state of an adapter, a damaged one, or that of another adapter; the message says what differs.
            RuntimeError: tensors that are missing, unknown or of another shape, as of any module.
        """
        if assign:
            raise ValueError("assign=True would replace the tensors that the optimizer changes; leave it out.")
        with self._lock, torch.inference_mode(False):
            before, self._strict = Snapshot.of(self, self.optimizer, self.generator), strict
            guarded = None if self.guard is None else self.guard.state()
            try:
                return super().load_state_dict(state_dict, strict=strict)
            except Exception:
                self._put_back(before)
                if self.guard is not None and guarded is not None:
                    self.guard.load(*guarded)
                raise
            finally:
                self._strict = True

    def save(self, path: str | Path) -> None:
        """Write the state to one safetensors file, whole or not at all; :func:`tta.load` makes an adapter of it.

        The file holds what :meth:`state_dict` gives, and the source statistics that the method was built with, so that
        loading needs no source images. It is written beside, flushed to disk, and renamed. Of several workers, whose states are
        equal, the first one writes; the others return at once.

        Raises:
            OSError: the file cannot be written.
        """
        if self.workers.rank:
            return
        saving.write(path, self.state_dict(), self.statistics)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take the adapter's own entries out of ``state_dict``, then load the rest as any module does."""
        header = self._header(state_dict, prefix)
        self._load_guard(state_dict, prefix + GUARD, header.get("guard_state"))
        self._kept, self._good_batches = None, 0
        self._progress.zero_()
        self._load_generator(state_dict.pop(prefix + "generator", None))
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
        try:
            header = saving.header_of(state_dict.pop(prefix + self._STATE), FORMAT)
        except ValueError as error:
            raise ValueError(f"This is not the state of an adapter that can be read: {error}.") from error
        kind = header.get("class", header["method"])
        if kind != type(self).__name__:
            raise ValueError(f"The state is of a '{kind}' adapter; this one is a '{type(self).__name__}'.")
        if differences := saving.differences(header, self.identity()):
            text = f"The state was saved by another adapter: {'; '.join(differences)}."
            if self._strict:
                raise ValueError(f"{text} Build the adapter alike, or load with strict=False.")
            warnings.warn(f"{text} It is loaded all the same.", RuntimeWarning, stacklevel=2)
        own_tensors = {prefix + slot.name: slot.value for slot in modules.slots(self) if slot.value is not None}
        if self._strict and (other := saving.kinds(state_dict, own_tensors)):
            raise ValueError(f"The state holds tensors of other kinds: {'; '.join(other[:5])}.")
        saved, own = len(header["optimizer"]), len(self.optimized_parameters())
        if saved != own:
            raise ValueError(
                f"The state holds moments of {saved} parameters; this adapter changes {own}. "
                "Build it with the model and settings that the state was saved with."
            )
        return header

    def _load_guard(self, state_dict: dict[str, Any], prefix: str, plain: dict[str, Any] | None) -> None:
        """Take the guard's part out of a state; without a guard here it is dropped, without one there ours starts anew."""
        keys = [key for key in state_dict if key.startswith(prefix)]
        tensors = {key.removeprefix(prefix): state_dict.pop(key) for key in keys}
        if self.guard is None:
            return
        if plain is None:
            self.guard.reset()
        else:
            self.guard.load(plain, tensors)

    def _load_generator(self, state: Tensor | None) -> None:
        own = self.generator.get_state()
        if state is None or (state.shape, state.dtype) != (own.shape, own.dtype):
            given = "none" if state is None else f"{state.dtype} of shape {tuple(state.shape)}"
            raise ValueError(
                f"The state of the random generator is {own.dtype} of shape {tuple(own.shape)}; the state holds {given}."
            )
        self.generator.set_state(state.cpu())

    def _load_moments(self, state_dict: dict[str, Any], prefix: str, numbers: list[dict[str, Any]]) -> None:
        """Take the moments out of a state, tensors below ``prefix`` and numbers, and start a new optimizer with them."""
        self.restart_optimizer()
        fused, parameters = optimizers.is_fused(self.optimizer), self.optimized_parameters()
        moments = [dict(plain) for plain in numbers]
        for number, values in enumerate(moments):
            names = [key for key in state_dict if key.startswith(f"{prefix}{number}.")]
            values |= {name.removeprefix(f"{prefix}{number}."): state_dict.pop(name) for name in names}
        optimizers.check_moments(self.optimizer, moments)
        optimizers.set_moments(
            self.optimizer,
            [optimizers.placed(m, parameter, fused=fused) for m, parameter in zip(moments, parameters, strict=True)],
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SavedState":
        """Move the source copy and the optimizer's moments along with the parameters (``to``, ``cuda`` ...)."""
        moments = optimizers.moments(self.optimizer)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = {
            id(value): fn(value) for value in self._source.values() if value is not None
        }  # a teacher's are its student's
        self._source = {key: None if value is None else moved[id(value)] for key, value in self._source.items()}
        self.restart_optimizer()
        if self.guard is not None:
            self.guard.move(fn)
        fused = optimizers.is_fused(self.optimizer)
        optimizers.set_moments(self.optimizer, [optimizers.moved(values, fn, fused=fused) for values in moments])
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SavedState":
        # Not every supported torch can deep-copy a generator. All else is copied with one memo, so that the copy's
        # optimizer has the copy's parameters.
        duplicate = type(self).__new__(type(self))
        memo[id(self)] = duplicate
        generator = torch.Generator()
        generator.set_state(self.generator.get_state())
        memo[id(self.generator)] = generator
        duplicate.__dict__.update({key: copy.deepcopy(value, memo) for key, value in self.__dict__.items()})
        return duplicate

    def _put_back(self, state: Snapshot) -> None:
        put_back(self, state.tensors)
        self.restart_optimizer()
        optimizers.set_moments(self.optimizer, [dict(values) for values in state.moments])
        self.generator.set_state(state.generator)
        torch.clear_autocast_cache()


def _equal(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.shape == other.shape and torch.equal(value, other)
