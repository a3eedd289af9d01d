"""Auxiliary parts: what a method's source stage trains beside the classifier, sharing some of its modules."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from tta import taps


class Branch(nn.Module):
    """A second head on a network: it has the network's own modules up to ``split``, copies of those behind, a new last layer.

    Images (batch, 3, height, width) -> (batch, outputs). Training it trains the shared modules too.

    Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML 2020.

    Args:
        model: the classifier, whose modules are shared.
        split: name of the last module that is shared.
        outputs: of the new layer in the place of the classifier's last one.
        generator: that its first weights are drawn from.

    Raises:
        ValueError: the model's last layer is no ``nn.Linear``, or a forward does not reach ``split``.
    """

    def __init__(self, model: nn.Module, split: str, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.head = taps.head(model)
        last = model.get_submodule(self.head)
        new = linear(last.in_features, outputs, generator).to(last.weight)  # type: ignore[arg-type]
        kept = {id(thing): thing for thing in _up_to(model, split)}
        self.network: nn.Module = copy.deepcopy(model, {**kept, id(last): new})

    def forward(self, x: Tensor) -> Tensor:
        return taps.output_at(self.network, self.head, x)


class Behind(nn.Module):
    """A module of the user's own as a second head, behind ``split``: images (batch, 3, height, width) -> what the module returns.

    Args:
        model: the classifier, whose modules up to ``split`` are shared.
        split: name of the last of them.
        tail: the user's module, which is given the output of ``split``.
    """

    def __init__(self, model: nn.Module, split: str, tail: nn.Module) -> None:
        super().__init__()
        self.network, self.split, self.tail = model, split, tail

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.tail(taps.output_at(self.network, self.split, x))
        return found


def linear(width: int, outputs: int, generator: torch.Generator) -> nn.Linear:
    """A linear layer (..., width) -> (..., outputs), on the CPU; weights and bias are uniform between ±``width ** -0.5``, drawn from a generator."""
    layer = nn.Linear(width, outputs, device="meta").to_empty(device="cpu")  # draws nothing from the global generator
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_((2 * torch.rand(parameter.shape, generator=generator) - 1) * width**-0.5)
    return layer


@contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """Within this context torch's generator on the CPU has a seed drawn from another one; no device's generator is touched.

    For layers that draw their own first weights: make them on the CPU, and the same weights come out for every device.
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        yield


def _up_to(model: nn.Module, split: str) -> list[Any]:
    """The modules that have ended when ``split`` ends, and the parameters of those that are still at work around it."""
    begun, ended = taps.reached(model, [split])
    done = set(ended)
    around = [parameter for module in begun if module not in done for parameter in module.parameters(recurse=False)]
    return [*ended, *around]


def own_parameters(part: nn.Module, model: nn.Module) -> list[nn.Parameter]:
    """Parameters of an auxiliary part that are not the classifier's."""
    shared = {id(parameter) for parameter in model.parameters()}
    return [parameter for parameter in part.parameters() if id(parameter) not in shared]


def own_tensors(part: nn.Module, model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of an auxiliary part that are not the classifier's, by name."""
    seen = {id(tensor) for tensor in model.state_dict(keep_vars=True).values()}
    own: dict[str, Tensor] = {}
    for name, tensor in part.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # one that has several names in the part is kept under the first
            seen.add(id(tensor))
            own[name] = tensor
    return own


@contextmanager
def alone(model: nn.Module, part: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Within this context only the part's own parameters require gradients, and it gives them; afterwards no parameter does."""
    model.requires_grad_(False)
    own = own_parameters(part, model)
    for parameter in own:
        parameter.requires_grad_(True)
    try:
        yield own
    finally:
        part.requires_grad_(False)


def fit(
    model: nn.Module,
    part: nn.Module,
    images: Tensor,
    loss: Callable[[Tensor], Tensor],
    steps: int,
    generator: torch.Generator,
) -> None:
    """Train a part on its own, behind a classifier that stays as it is: where there was no joint training.

    AdamW with a learning rate of 2e-3 and weight decay 0.05, on batches of 64 images.

    Args:
        model: the classifier.
        part: whose own parameters are trained; its BatchNorm layers keep their statistics.
        images: of the source domain, (images, 3, height, width), uint8.
        loss: of a batch in [0, 1], of the classifier's device and precision.
        steps: of the optimizer.
        generator: that the batches are drawn from.
    """
    like = next(model.parameters())
    with alone(model, part) as own:
        optimizer = torch.optim.AdamW(own, lr=2e-3, weight_decay=0.05)
        order = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(order) < min(64, len(images)):
                order = torch.randperm(len(images), generator=generator)
            batch, order = order[:64], order[64:]
            optimizer.zero_grad()
            loss(images[batch].to(like) / 255).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        optimizer.zero_grad()
