"""Summary of an adapter: what adapts, which normalisation layers were found, and by which statistics they normalise."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta import norms
from tta.adapter.guarding import Guarding
from tta.distributed import ALONE, Workers
from tta.memory import Bank
from tta.towers import TwoTowers

SHOWN = 6  # names, before the rest is a number


@dataclass(frozen=True)
class Summary:
    """Facts about an adapter; printed, a line each.

    Attributes:
        method: its name.
        model: class of the model.
        adapted: names of the model's parameters that adapt.
        parameters: number of values in them.
        share: of all the model's values, in percent.
        layers: normalisation layers of known kinds, by kind.
        left_out: known normalisation layers none of whose parameters adapt, though others' do.
        unknown: layers that look like normalisation and are of no known kind, by class; no method adapts them.
        statistics: how many BatchNorm layers normalise by the batch, by stored statistics, or by a blend of both.
        memory: number of images that memory banks can hold.
        guard: settings of the guard; None without one.
        workers: number of workers that share the stream.
        towers: of a vision-language model its classes, its prompt, and whether the text tower adapts; else empty.
    """

    method: str
    model: str
    adapted: tuple[str, ...]
    parameters: int
    share: float
    layers: dict[str, int]
    left_out: tuple[str, ...]
    unknown: dict[str, int]
    statistics: dict[str, int]
    memory: int
    guard: dict[str, Any] | None = None
    workers: int = 1
    towers: str = ""

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.method} on {self.model}"
        yield (
            f"  adapts {self.parameters} values ({self.share:.2g} %) of {len(self.adapted)} parameters: {_some(self.adapted)}"
            if self.adapted
            else "  adapts no parameter of the model"
        )
        yield f"  normalisation layers: {_counts(self.layers) or 'none of a known kind'}"
        if self.left_out:
            yield f"  of these left out by the method's rule: {_some(self.left_out)}"
        if self.unknown:
            yield f"  layers of unknown kinds, never adapted: {_counts(self.unknown)}"
        if self.statistics:
            yield f"  BatchNorm statistics: {_counts(self.statistics)}"
        if self.towers:
            yield f"  two towers: {self.towers}"
        if self.memory:
            yield f"  memory: up to {self.memory} images"
        if self.guard is not None:
            yield f"  guard: {', '.join(f'{name}={value}' for name, value in self.guard.items())}"
        if self.workers > 1:
            yield f"  one stream over {self.workers} workers"


def summarise(
    model: nn.Module, adapter: nn.Module, method: str, guard: Guarding | None, workers: Workers = ALONE
) -> Summary:
    """The summary of an adapter around a model."""
    named = dict(model.named_parameters())
    adapted = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    layers = norms.named_layers(model)
    learning = any(_learns(layer) for _, layer in layers)
    return Summary(
        method=method,
        model=getattr(model, "spec", type(model).__name__),
        adapted=tuple(adapted),
        parameters=sum(parameter.numel() for parameter in adapted.values()),
        share=100 * sum(p.numel() for p in adapted.values()) / max(1, sum(p.numel() for p in named.values())),
        layers=Counter(_kind(layer) for _, layer in layers),
        left_out=tuple(name for name, layer in layers if learning and not _learns(layer)),
        unknown=Counter(type(layer).__name__ for _, layer in norms.unknown_layers(model)),
        statistics=Counter(_statistics(model)),
        memory=sum(len(bank.labels) for bank in adapter.modules() if isinstance(bank, Bank)),
        guard=None if guard is None else guard.described(),
        workers=workers.size,
        towers=next((module.described() for module in model.modules() if isinstance(module, TwoTowers)), ""),
    )


def _learns(layer: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in layer.parameters())


def _kind(layer: nn.Module) -> str:
    """The class of a layer as the user knows it."""
    return "BatchNorm2d" if type(layer).__name__ == "ChannelsLastBatchNorm2d" else type(layer).__name__


def _statistics(model: nn.Module) -> Iterator[str]:
    wrapped = {module.layer for module in model.modules() if isinstance(module, norms.BlendedBatchNorm)}
    for module in model.modules():
        if isinstance(module, norms.BlendedBatchNorm):
            yield "a blend of both" if type(module) is norms.BlendedBatchNorm else type(module).__name__
        elif isinstance(module, _BatchNorm) and module not in wrapped:
            yield "the batch's" if module.running_mean is None else "stored"


def _counts(found: dict[str, int]) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in found.items())


def _some(names: tuple[str, ...]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
