"""Optimizers of adapters: built from hyper-parameters, stepped by a flag on the device, their moments saved and moved."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from tta.hyperparameters import OptimizerConfig

Moments: TypeAlias = dict[str, Any]  # of one parameter, by name: tensors, and in some releases of torch numbers


def build(config: OptimizerConfig, parameters: Sequence[nn.Parameter], *, fused: bool) -> Optimizer:
    """A new optimizer of the parameters; with ``fused`` kernels :func:`step` can skip a step on the device."""
    decay, kernels = config.weight_decay, fused or None
    if config.optimizer == "sgd":
        sgd = torch.optim.SGD(
            parameters, config.lr, config.momentum, weight_decay=decay, nesterov=config.nesterov, fused=kernels
        )
        if fused and config.momentum:  # if the first step is skipped, the kernels leave these uninitialised
            for parameter in parameters:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
        return sgd
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, config.lr, config.betas, weight_decay=decay, fused=kernels)


def parameters_of(optimizer: Optimizer | None) -> list[nn.Parameter]:
    """The optimizer's parameters, in order."""
    return [] if optimizer is None else [p for group in optimizer.param_groups for p in group["params"]]


def is_fused(optimizer: Optimizer | None) -> bool:
    """Whether the optimizer uses fused kernels."""
    return optimizer is not None and bool(optimizer.defaults.get("fused"))


def step(optimizer: Optimizer, when: Tensor) -> None:
    """Make one step if ``when``, a boolean scalar, is true. On a GPU nothing waits for it: the fused kernels read it."""
    if when.device.type == "cpu" and not is_fused(optimizer):
        if when:
            optimizer.step()
        return
    for parameter in parameters_of(optimizer):  # the kernels need gradients with the strides of their parameters
        if parameter.grad is not None and parameter.grad.stride() != parameter.stride():
            parameter.grad = torch.empty_like(parameter).copy_(parameter.grad)
    optimizer.found_inf = (~when).float()  # type: ignore[attr-defined]
    optimizer.step()


def moments(optimizer: Optimizer | None) -> list[Moments]:
    """The moments of each parameter, in order; empty for a parameter that made no step yet."""
    return [] if optimizer is None else [dict(optimizer.state.get(p, {})) for p in parameters_of(optimizer)]


OF_ADAM = {"step", "exp_avg", "exp_avg_sq"}
MOMENTS: dict[type[Optimizer], set[str]] = {
    torch.optim.SGD: {"momentum_buffer"},
    torch.optim.Adam: OF_ADAM,
    torch.optim.AdamW: OF_ADAM,  # an Adam from torch 2.7 on only
}


def check_moments(optimizer: Optimizer | None, saved: Sequence[Moments]) -> None:
    """Raise a ValueError unless saved moments are those of an optimizer of this kind and of parameters of these shapes."""
    known = next((names for kind, names in MOMENTS.items() if isinstance(optimizer, kind)), set())
    for number, (parameter, values) in enumerate(zip(parameters_of(optimizer), saved, strict=True)):
        if values and set(values) != known:
            raise ValueError(
                f"The moments of parameter {number} are {', '.join(values)}; {type(optimizer).__name__} has "
                f"{', '.join(sorted(known))}."
            )
        for name, value in values.items():
            shape = torch.Size() if name == "step" else parameter.shape
            if isinstance(value, Tensor) and (value.shape != shape or not value.is_floating_point()):
                raise ValueError(
                    f"Moment {name} of parameter {number} is {value.dtype} of shape {tuple(value.shape)}; expected a "
                    f"floating-point tensor of shape {tuple(shape)}."
                )


def set_moments(optimizer: Optimizer | None, saved: Sequence[Moments]) -> None:
    """Put saved moments in the place of the optimizer's own, as they are; empty ones change nothing."""
    if optimizer is not None:
        for parameter, values in zip(parameters_of(optimizer), saved, strict=True):
            if values:
                optimizer.state[parameter] = values


def moved(values: Moments, fn: Callable[[Tensor], Tensor], *, fused: bool) -> Moments:
    """Moments after ``fn``, which moves tensors. ``step`` stays on the CPU unless the kernels are fused."""
    return {
        key: fn(value) if isinstance(value, Tensor) and (key != "step" or fused) else value
        for key, value in values.items()
    }


def placed(values: Moments, parameter: Tensor, *, fused: bool) -> Moments:
    """Copies of loaded moments, on the device of their parameter and with its strides."""

    def beside(key: str, value: Tensor) -> Tensor:
        if key == "step":  # it is where the optimizer creates it: on the CPU unless the kernels are fused
            return value.to(parameter.device if fused else "cpu", copy=True)
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    return {key: beside(key, value) if isinstance(value, Tensor) else value for key, value in values.items()}
