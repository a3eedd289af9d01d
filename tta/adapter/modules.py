"""Modules: the plain one inside a compiled one, a copy, and where parameters and buffers are."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tta import caches


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
    inner: nn.Module = getattr(model, "_orig_mod", model)  # the attribute that torch.compile(model) keeps it under
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
        duplicate = caches.copied(model)
    except Exception as error:
        raise TypeError(
            f"{type(model).__name__} cannot be deep-copied ({error}). Pass copy=False to adapt it in place."
        ) from error
    for parameter in duplicate.parameters():
        parameter.grad = None
    return duplicate


def remove_hooks(module: nn.Module, kind: tuple[type, ...]) -> None:
    """Take forward hooks of some classes, and those before a forward, off a module and all within it."""
    for part in module.modules():
        for hooks in (part._forward_hooks, part._forward_pre_hooks):  # noqa: SLF001  # the copy of a hook has no handle
            for key in [key for key, hook in hooks.items() if isinstance(hook, kind)]:
                del hooks[key]


class Slot(NamedTuple):
    """A place for a parameter or buffer: its full name, the module that has it, its name there, and its value now."""

    name: str
    owner: nn.Module
    key: str
    value: Tensor | None

    def fill(self, value: Tensor | None) -> None:
        """Put a tensor, or None, in the place of a buffer."""
        setattr(self.owner, self.key, value)


def slots(module: nn.Module) -> Iterator[Slot]:
    """All parameters and buffers, empty and non-persistent buffers too; each tensor once, under its first name."""
    seen: set[int] = set()
    for path, owner in module.named_modules():
        for key, value in _held_by(owner):
            if value is None or id(value) not in seen:
                seen.add(id(value))
                yield Slot(f"{path}.{key}" if path else key, owner, key, value)


def values(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of all parameters and buffers, by name; to be read only, as equal ones of copies of a model are one tensor.

    Copies of a model are children of ``module``: a teacher starts from the values of its student.
    """
    kept: dict[str, Tensor | None] = {}
    first: dict[str, Tensor] = {}  # by the name within the child
    for slot in slots(module):
        value = None if slot.value is None else slot.value.detach()
        if value is not None:
            twin = first.get(slot.name.partition(".")[2])
            same = (
                twin is not None and (twin.shape, twin.dtype) == (value.shape, value.dtype) and torch.equal(twin, value)
            )
            value = twin if same else value.clone()
            assert value is not None
            first.setdefault(slot.name.partition(".")[2], value)
        kept[slot.name] = value
    return kept


def aliases(module: nn.Module) -> dict[str, str]:
    """Further names of tied parameters and buffers -> their first name."""
    first: dict[int, str] = {}
    further: dict[str, str] = {}
    for path, owner in module.named_modules(remove_duplicate=False):
        for key, value in _held_by(owner):
            name = f"{path}.{key}" if path else key
            if value is not None and first.setdefault(id(value), name) != name:
                further[name] = first[id(value)]
    return further


def by_place(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by name, for each place in a module that holds a parameter or buffer: a tied one for all its places, and a
    layer that is used twice once, since ``functional_call`` would leave the tensors in it if it were given them twice.
    """
    first = aliases(module)
    found = {}
    for path, owner in module.named_modules():
        for key, _ in _held_by(owner):
            name = f"{path}.{key}" if path else key
            if (value := tensors.get(first.get(name, name))) is not None:
                found[name] = value
    return found


def _held_by(owner: nn.Module) -> list[tuple[str, Tensor | None]]:
    """Names and values of a module's own parameters and buffers, not those of its children."""
    # There is no public way: named_buffers leaves out the buffers that are registered as None.
    return [*owner._parameters.items(), *owner._buffers.items()]  # noqa: SLF001
