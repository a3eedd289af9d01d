"""What a run costs: images that go forward through an adapter's models, those a gradient comes back for, peak memory."""

import math
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import register_multi_grad_hook

from tta.adapter import Adapter


class Passes:
    """Counts forward and backward passes in images while it is attached to an adapter.

    An image counts once for each pass through the adapter's model or one of its copies (a teacher), views and images out
    of a memory too; a part of the model that a method calls by itself does not count.

    It counts as gone backward where a gradient that is not zero arrives at its logits: what a method's filter
    leaves out does not. Where a loss is not one of logits but of features or activations, all images of the last forward
    before it count.
    """

    def __init__(self) -> None:
        self.forwards = 0
        self._backwards: list[int | Tensor] = []  # on the device: nothing waits for it
        self._last = 0  # images in the last forward that a gradient may come back through
        self._by_logits = False  # whether the present backward pass went through logits
        self._handles: list[Any] = []

    @property
    def backwards(self) -> int:
        """Images gone backward so far; waits for the device."""
        return sum(int(count) for count in self._backwards)

    def attach(self, adapter: Adapter) -> None:
        """Count from now on; the adapter computes what it did before, bit for bit."""
        for model in _models(adapter, type(adapter.model)):
            self._handles.append(model.register_forward_hook(self._forward))
        learned = [parameter for parameter in adapter.parameters() if parameter.requires_grad]
        if learned:
            self._handles.append(register_multi_grad_hook(learned, self._arrived, mode="any"))

    def detach(self) -> None:
        """Count no longer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __deepcopy__(self, memo: dict[int, Any]) -> "Passes":
        return (
            Passes()
        )  # hooks are copied with a model: a copy of the adapter, tried out on the side, counts for itself

    def _forward(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        logits: Tensor = getattr(output, "logits", output)
        images = _images(logits)
        self.forwards += images
        if logits.requires_grad:
            self._last = images
            logits.register_hook(self._through_logits)

    def _through_logits(self, gradient: Tensor) -> None:
        self._by_logits = True
        self._backwards.append((gradient != 0).flatten(1).any(1).sum())

    def _arrived(self, gradient: Tensor) -> None:
        """A gradient arrives at the parameters: once a backward pass, after it has left the logits."""
        if not self._by_logits:
            self._backwards.append(self._last)
        self._by_logits = False


def forget_peak_memory(device: torch.device) -> None:
    """Measure :func:`peak_memory_mb` from now on. On a CPU only Linux can; elsewhere the peak is the process's whole life."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory_mb(device: torch.device) -> float | None:
    """Most memory in use, in MB (10^6 bytes): tensors on a GPU, the whole process on a CPU; None where nobody tells."""
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
    """The outermost modules of a class: the adapted model and its copies, not what is nested in them."""
    for child in module.children():
        if type(child) is kind:
            yield child
        else:
            yield from _models(child, kind)


def _images(logits: Tensor) -> int:
    """Images that logits (batch, classes) are of: all views under ``torch.vmap``, which shows a model only one of them."""
    whole = logits
    while torch._C._functorch.is_batchedtensor(whole):
        whole = torch._C._functorch.get_unwrapped(whole)
    return whole.numel() // math.prod(logits.shape[1:])
