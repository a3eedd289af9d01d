"""Compiled forwards: the forward and backward pass of a model by ``torch.compile``, for the shapes that come again."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

KINDS = 4  # of calls of one model that are compiled, each a minute or so: with and without gradients, batch and memory
AGAIN = 2  # the call of a kind that is compiled: filters leave batches of any size, few of which ever come again
VARIANTS = 64  # of one forward function in a process, where torch has 8: a grid has many adapters of one class of model
COMPILERS = ("g++", "clang++", "c++", "cl")

_eager: ContextVar[bool] = ContextVar("eager", default=False)


@contextmanager
def eagerly() -> Iterator[None]:
    """Within this context, of this thread, nothing runs compiled: for :func:`torch.vmap`, whose tensors a compiled forward cannot take."""
    token = _eager.set(True)
    try:
        yield
    finally:
        _eager.reset(token)


def check() -> None:
    """Raise a ValueError where there is no compiler that Inductor could use on a CPU."""
    if not os.environ.get("CXX") and not any(shutil.which(name) for name in COMPILERS):
        raise ValueError(
            f"compile=True needs a C++ compiler, and none of {', '.join(COMPILERS)} is on the PATH. Install one (apt install "
            "g++), name it in the environment variable CXX, or leave compile out: the results are the same."
        )


def compile_forwards(owner: nn.Module, model: nn.Module) -> None:
    """Compile the forward of a module's model, and of the copies of it beside (teachers), in place.

    Args:
        owner: an adapter.
        model: its model; children of ``owner`` of the same class are its copies.

    Raises:
        ValueError: the model has a forward of its own beside that of its class, which would no longer run.
    """
    if "forward" in vars(model) and not is_compiled(model):
        raise ValueError(
            f"compile=True compiles the forward of the class {type(model).__name__}, and this model has had another one put in its "
            "place (model.forward = ...). Pass a module whose class has that forward, or leave compile out."
        )
    for child in owner.children():
        if type(child) is type(model) and not is_compiled(child):
            child.forward = CompiledForward(child)


def undo(module: nn.Module) -> None:
    """Give a module and all within it their own forwards again, in place."""
    for part in module.modules():
        if is_compiled(part):
            del part.forward


def is_compiled(model: nn.Module) -> bool:
    """Whether :func:`compile_forwards` was applied to a model."""
    return isinstance(vars(model).get("forward"), CompiledForward)


class CompiledForward:
    """The forward of a module: compiled for the kinds of calls that come again, eager for all others.

    A kind is the shape, precision and layout of the images, and whether gradients and autocast are on; the second call of a
    kind compiles it. Parameters are given to the compiled code at each call, so that it sees every step, reset and loaded state. A
    leftover batch, a forward while hooks collect activations, and one under :func:`eagerly` are not compiled.

    Args:
        module: whose class's ``forward`` this stands before.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.eager = type(module).forward.__get__(module)
        self.calls: Counter[tuple[Any, ...]] = Counter()
        self.compiled: set[tuple[Any, ...]] = set()
        self._run: Any = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1 or not isinstance(args[0], Tensor) or not self._serves(args[0]):
            return self.eager(*args, **kwargs)
        if self._run is None:
            self._run = torch.compile(self.eager, dynamic=False)
        # Under the name that torch 2.6 has; later versions call it recompile_limit and know this one too.
        with torch._dynamo.config.patch(cache_size_limit=VARIANTS):  # noqa: SLF001  # torch documents it under this name
            return self._run(args[0])

    def _serves(self, x: Tensor) -> bool:
        """Count a call; whether it is one of a compiled kind."""
        if _eager.get() or torch.compiler.is_compiling() or torch.jit.is_tracing() or self._is_watched():  # type: ignore[attr-defined,no-untyped-call]
            return False
        modes = (x.requires_grad, torch.is_grad_enabled(), torch.is_autocast_enabled(x.device.type))
        kind = (x.shape, x.stride(), x.dtype, x.device, *modes)
        self.calls[kind] += 1
        if self.calls[kind] >= AGAIN and len(self.compiled) < KINDS:
            self.compiled.add(kind)
        return kind in self.compiled

    def _is_watched(self) -> bool:
        """Whether a module within has a hook: torch looks for hooks when it compiles, and no more later."""
        inner = (part for part in self.module.modules() if part is not self.module)
        return any(part._forward_hooks or part._forward_pre_hooks for part in inner)  # noqa: SLF001  # there is no public way

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy, or what a pickle gives back, stands before the copy of the module and compiles anew."""
        return CompiledForward, (self.module,)
