"""Export: a plain copy of the user's own module from an adapted one, with BatchNorm statistics stored again."""

import copy
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta import compiling, norms

Statistics = tuple[Tensor, Tensor]  # mean and variance, (channels,) each


def stored_statistics(model: nn.Module) -> dict[str, dict[str, Tensor | None]]:
    """Running statistics of the BatchNorm layers that have some, frozen ones too, by name; copies."""
    frozen: dict[str, dict[str, Tensor | None]] = {
        name: {
            **{key: value.clone() for key, value in layer.named_buffers() if key.startswith("running_")},
            "num_batches_tracked": torch.tensor(0, device=next(layer.buffers()).device),
        }
        for name, layer in norms.frozen(model)
    }
    return frozen | {
        name: {
            key: None if value is None else value.detach().clone() for key, value in layer.named_buffers(recurse=False)
        }
        for name, layer in norms.named_layers(model, norms.BATCH_NORMS)
        if layer.running_mean is not None
    }


def by_batch_alone(model: nn.Module) -> list[str]:
    """Names of the BatchNorm layers that have no statistics but the present batch's."""
    named = norms.named_layers(model, norms.BATCH_NORMS)
    return [name for name, layer in named if layer.running_mean is None]


def needs_images(model: nn.Module) -> list[str]:
    """Names of the layers that normalise by the present batch, and so have no statistics to store without one."""
    return [
        name
        for name, layer in model.named_modules()
        if (isinstance(layer, _BatchNorm) and layer.running_mean is None)
        or type(layer) in (norms.BlendedBatchNorm, norms.SmallBatchNorm)
    ]


@torch.no_grad()
def batch_statistics(model: nn.Module, images: Tensor) -> dict[str, Statistics]:
    """Statistics that each layer of :func:`needs_images` normalises by when the model predicts these images."""
    found: dict[str, Statistics] = {}

    def record(name: str) -> Any:
        def hook(layer: nn.Module, args: tuple[Any, ...]) -> None:
            found[name] = _statistics(layer, args[0].float())

        return hook

    wanted = set(needs_images(model))
    with ExitStack() as stack:
        for name, layer in model.named_modules():
            if name in wanted:
                stack.callback(layer.register_forward_pre_hook(record(name)).remove)
        model(images)
    return found


def _statistics(layer: nn.Module, x: Tensor) -> Statistics:
    if isinstance(layer, norms.BlendedBatchNorm):
        return layer.blended(x)
    var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
    return mean, var


def plain(
    model: nn.Module,
    source: Mapping[str, Mapping[str, Tensor | None]],
    statistics: Mapping[str, Statistics],
) -> nn.Module:
    """A frozen copy of an adapted model in the classes and under the keys of the source model.

    Args:
        model: the adapted model; it is not changed.
        source: :func:`stored_statistics` of the source model.
        statistics: :func:`batch_statistics` of ``model``.
    """
    duplicate = copy.deepcopy(model).requires_grad_(False)
    compiling.undo(duplicate)
    for name, layer in list(duplicate.named_modules()):
        if isinstance(layer, norms.BlendedBatchNorm):
            _unwrap(duplicate, name, layer, statistics.get(name))
        elif isinstance(layer, _BatchNorm) and layer.running_mean is None and name in source:
            norms.store_statistics(layer, source[name])
            _store(layer, statistics[name])
    return duplicate.to(memory_format=torch.contiguous_format).eval()


def _unwrap(model: nn.Module, name: str, wrapper: "norms.BlendedBatchNorm", statistics: Statistics | None) -> None:
    """Put the wrapped layer back in its place."""
    owner, _, key = name.rpartition(".")
    setattr(model.get_submodule(owner), key, wrapper.layer)
    if statistics is not None:
        _store(wrapper.layer, statistics)


@torch.no_grad()
def _store(layer: _BatchNorm, statistics: Statistics) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    device = next(iter(layer.parameters()), statistics[0]).device
    layer.running_mean.data = statistics[0].to(device, layer.running_mean.dtype)
    layer.running_var.data = statistics[1].to(device, layer.running_var.dtype)
