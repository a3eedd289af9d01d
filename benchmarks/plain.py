"""The core methods in the plainest form, as a researcher would write them from the papers, as a baseline of `speed.py`.

They use none of the toolkit's optimisations: channels first, hooks that keep whole activations, gradients through
``.grad``, a standard optimizer. ``STEPS[method](model, source)`` gives a function that adapts a copy of the model to one
batch and returns its logits. The results are not checked here; the golden logits check the methods themselves.
"""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Step = Callable[[Tensor], Tensor]


def _entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


def _batch_norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]


def _by_batch_statistics(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    model = copy.deepcopy(model).train().requires_grad_(False)
    for layer in _batch_norms(model):
        layer.requires_grad_(True)
        layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return model, [parameter for parameter in model.parameters() if parameter.requires_grad]


def norm(model: nn.Module, source: Tensor) -> Step:
    model, _ = _by_batch_statistics(model)
    return torch.no_grad()(model)


def tent(model: nn.Module, source: Tensor) -> Step:
    model, parameters = _by_batch_statistics(model)
    optimizer = torch.optim.Adam(parameters, 1e-3)

    def step(x: Tensor) -> Tensor:
        logits = model(x)
        _entropy(logits).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach()

    return step


def sar(model: nn.Module, source: Tensor) -> Step:
    model, parameters = _by_batch_statistics(model)
    optimizer = torch.optim.SGD(parameters, 1e-3, momentum=0.9)

    def loss_of(entropies: Tensor, chosen: Tensor) -> Tensor:
        return (entropies * chosen).sum() / chosen.sum().clamp(min=1)

    def step(x: Tensor) -> Tensor:
        logits = model(x)
        margin = 0.4 * math.log(logits.shape[1])
        entropies = _entropy(logits)
        chosen = entropies < margin
        loss_of(entropies, chosen).backward()
        scale = 0.05 / (torch.stack([p.grad.norm() for p in parameters]).norm() + 1e-12)
        moves = [p.grad * scale for p in parameters]
        with torch.no_grad():
            for p, move in zip(parameters, moves, strict=True):
                p.add_(move)
        optimizer.zero_grad()
        entropies = _entropy(model(x))
        loss_of(entropies, chosen & (entropies < margin)).backward()
        with torch.no_grad():
            for p, move in zip(parameters, moves, strict=True):
                p.sub_(move)
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach()

    return step


def actmad(model: nn.Module, source: Tensor) -> Step:
    model = copy.deepcopy(model).eval().requires_grad_(True)
    seen: list[Tensor] = []
    for layer in _batch_norms(model):
        layer.register_forward_hook(lambda _, inputs, output: seen.append(output))

    def moments(x: Tensor) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        seen.clear()
        logits = model(x)
        return logits, [(output.mean(0), output.var(0)) for output in seen]

    with torch.no_grad():
        _, known = moments(source)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4, nesterov=True)

    def step(x: Tensor) -> Tensor:
        logits, now = moments(x)
        loss = sum(
            F.l1_loss(a, b) for one, other in zip(now, known, strict=True) for a, b in zip(one, other, strict=True)
        )
        (0.5 * loss).backward()
        optimizer.step()
        optimizer.zero_grad()
        return logits.detach()

    return step


STEPS: dict[str, Callable[[nn.Module, Tensor], Step]] = {"norm": norm, "tent": tent, "sar": sar, "actmad": actmad}
