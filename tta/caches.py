"""Caches of models: tensors that a module computes from its weights in one forward and keeps for the next.

The LeViT family (LeViT, EfficientFormer, TinyViT; in timm and transformers) keeps its attention biases in ``eval()`` mode. Once weights
adapt, what is kept is out of date, or holds the graph of a backward pass that is over.
"""

import copy
from typing import Any

from torch import Tensor, nn


class Forget:
    """A forward hook that empties the caches of its module, so that the next forward computes them anew."""

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        for cache in caches(module):
            cache.clear()


def caches(module: nn.Module) -> list[dict[Any, Any]]:
    """The caches of a module itself: attributes with "cache" in their names that are dictionaries of tensors, or empty."""
    return [
        value
        for name, value in vars(module).items()
        if "cache" in name and isinstance(value, dict) and all(isinstance(kept, Tensor) for kept in value.values())
    ]


def forget(model: nn.Module) -> None:
    """Empty all caches of a model, now and after each forward."""
    for module in model.modules():
        if found := caches(module):
            module.register_forward_hook(Forget())
            for cache in found:
                cache.clear()


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of a model, with empty caches: torch copies no tensor that is part of a graph."""
    empty: dict[int, Any] = {id(cache): {} for module in model.modules() for cache in caches(module)}
    return copy.deepcopy(model, empty)
