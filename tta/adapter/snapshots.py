"""Snapshots of a module with an optimizer and a random generator, kept in memory and put back bit for bit."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tta.adapter import modules, optimizers


class Snapshot(NamedTuple):
    """A state in memory: parameters and buffers by name, moments of the optimizer's parameters, state of the generator."""

    tensors: dict[str, Tensor | None]
    moments: list[optimizers.Moments]
    generator: Tensor

    @classmethod
    def of(cls, module: nn.Module, optimizer: torch.optim.Optimizer | None, generator: torch.Generator) -> "Snapshot":
        """Copy the present state."""
        tensors = {slot.name: _copied(slot.value) for slot in modules.slots(module)}
        moments = [
            {key: _copied(value) if isinstance(value, Tensor) else value for key, value in values.items()}
            for values in optimizers.moments(optimizer)
        ]
        return cls(tensors, moments, generator.get_state())


@torch.no_grad()
def put_back(module: nn.Module, tensors: dict[str, Tensor | None]) -> None:
    """Give every parameter and buffer the value of its name, in place where the shape is the same."""
    for slot in modules.slots(module):
        value = tensors[slot.name]
        if value is None or slot.value is None or slot.value.shape != value.shape:
            slot.fill(None if value is None else value.clone())
        else:
            slot.value.copy_(value)


def _copied(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.detach().clone()
