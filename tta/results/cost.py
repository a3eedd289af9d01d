"""Cost of a run: images in forward passes through an adapter's models, images in backward passes, peak memory."""

import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# torch has no public way to see the batch that vmap hides from a model.
from torch._C._functorch import get_unwrapped, is_batchedtensor
from torch.autograd.graph import register_multi_grad_hook

from tta.adapter import Adapter
from tta.auxiliary import Behind, Branch


class Passes:
    """Counts forward and backward passes in images while it is attached to an adapter.

    An image counts once for each pass through the adapter's model or one of its copies (a teacher); views and images
    from a memory count too. A pass through only a part of the model does not count.

    An image counts in a backward pass if a non-zero gradient arrives at its logits, so images that a method's filter
    leaves out do not count. If the loss depends on features or activations instead of logits, all images of the last
    forward pass before it count.
    """

    def __init__(self) -> None:
        self.forwards = 0
        # One tensor a device, which stays there, so that counting does not synchronise it. A tensor for each pass would be a small
        # allocation between large ones: a batch of maps would no longer fit where the last one was, and memory would grow.
        self._by_device: dict[torch.device, Tensor] = {}
        self._backwards = 0  # of passes that did not go through logits
        self._last = 0  # images in the last forward pass with a gradient
        self._by_logits = False  # whether the current backward pass went through logits
        self._handles: list[Any] = []

    @property
    def backwards(self) -> int:
        """Images in backward passes so far; synchronises the device."""
        return self._backwards + sum(int(count) for count in self._by_device.values())

    def attach(self, adapter: Adapter) -> None:
        """Start counting; the adapter's outputs stay the same bit for bit."""
        for model in dict.fromkeys(_models(adapter, type(adapter.model))):
            self._handles.append(model.register_forward_hook(self._forward))
        learned = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        if learned:
            self._handles.append(register_multi_grad_hook(learned, self._arrived, mode="any"))

    def detach(self) -> None:
        """Stop counting."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        return Passes()  # a deep copy of an adapter copies its hooks too: they count in an object of their own

    def _forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits: Any = getattr(output, "logits", output)
        if not isinstance(logits, Tensor):  # a detector's boxes: a gradient comes from elsewhere
            self.forwards += len(args[0])
            self._last = len(args[0]) if torch.is_grad_enabled() else self._last
            return
        images = _images(logits)
        self.forwards += images
        if logits.requires_grad:
            self._last = images
            logits.register_hook(self._through_logits)  # type: ignore[no-untyped-call]

    def _through_logits(self, gradient: Tensor) -> None:
        self._by_logits = True
        count = (gradient.flatten(1).abs().amax(1) != 0).sum()  # of maps in a third of the time of any()
        self._by_device.setdefault(count.device, torch.zeros_like(count)).add_(count)

    def _arrived(self, gradient: Tensor) -> None:
        """Called once per backward pass, when a gradient arrives at the parameters, after it passed the logits."""
        if not self._by_logits:
            self._backwards += self._last
        self._by_logits = False


def forget_peak_memory(device: torch.device) -> None:
    """Restart :func:`peak_memory_mb`. For a CPU this needs Linux; elsewhere the peak is that of the whole process life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float | None:
    """Peak memory in MB (10^6 bytes): tensors on a GPU, the whole process on a CPU; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    with suppress(ImportError):  # Windows has none
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6
    return None


def _models(module: nn.Module, kind: type[nn.Module]) -> Iterator[nn.Module]:
    """The outermost modules of a class: the adapted model and its copies, without the modules nested in them.

    A second head behind layers of the model counts as a copy.
    """
    for child in module.children():
        if type(child) is kind or isinstance(child, (Behind, Branch)):
            yield child
        else:
            yield from _models(child, kind)


def _images(logits: Tensor) -> int:
    """Number of images behind logits (batch, classes); under ``torch.vmap`` over all views, of which a model sees one."""
    whole = logits
    while is_batchedtensor(whole):
        whole = get_unwrapped(whole)
    return whole.numel() // math.prod(logits.shape[1:])
