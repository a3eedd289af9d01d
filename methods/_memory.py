"""Memories that a stream fills and a method learns from now and then: shared by RoTTA, PeTTA, NOTE and SoTTA.

Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta import augment
from tta.adapter import OptimizerConfig, require
from tta.memory import BalancedMemory, Bank


@dataclass
class MemoryConfig(OptimizerConfig):
    """Hyper-parameters of the memory and of what is learned from it.

    Attributes:
        memory_size: number of samples kept.
        update_frequency: samples between two updates, for any batch size.
        lambda_t: weight of age in the choice of the sample that the memory replaces.
        lambda_u: weight of uncertainty in the same choice.
        augment: the student's view of the memory: ``"paper"`` (RGB images in [0, 1]), ``"none"``, or from Python a
            callable that maps a batch to a view of it.
        steps: optimizer steps per update.
    """

    memory_size: int = 64
    update_frequency: int = 64
    lambda_t: float = 1.0
    lambda_u: float = 1.0
    augment: Any = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_size >= 1, f"memory_size={self.memory_size}", "1 or more samples")
        require(self.update_frequency >= 1, f"update_frequency={self.update_frequency}", "1 or more samples")
        augment.check(self.augment)


def parts(memory: Bank, count: int, every: int) -> Iterator[slice]:
    """Parts of a batch of ``count`` samples, each up to the next update; the memory must be offered one before the next is taken.

    An update is due each time that the memory was offered a multiple of ``every`` samples.
    """
    start = 0
    while start < count:
        part = slice(start, min(count, start + every - int(memory.offered) % every))
        yield part
        start = part.stop


def predicted_by_parts(
    memory: Bank,
    x: Tensor,
    every: int,
    predict: Callable[[Tensor], Tensor],
    remember: Callable[[Tensor, Tensor], None],
    learn: Callable[[], None],
) -> Tensor:
    """Logits of a batch, (batch, classes): each part of it is predicted before the update that it triggers.

    Args:
        memory: counts the samples that it is offered.
        x: (batch, ...), images that may be remembered.
        every: number of samples between two updates.
        predict: images -> logits.
        remember: offers the images of a part to the memory, with their logits.
        learn: makes an update.
    """
    found = []
    for place in parts(memory, len(x), every):
        part = x[place]
        with torch.no_grad():
            logits = predict(part)
        remember(part, logits)
        if memory.offered % every == 0:
            learn()
        found.append(logits)
    return torch.cat(found)


def offered(
    memory: BalancedMemory, x: Tensor, logits: Tensor, every: int, finite: Tensor
) -> Iterator[tuple[slice, bool]]:
    """Offer a batch to the memory, part by part; between two parts the caller learns.

    Args:
        memory: takes the images in, by their predicted classes and entropies.
        x: (batch, ...), images.
        logits: (batch, classes), detached; the teacher's.
        every: number of samples between two updates.
        finite: whether the batch may be remembered, a boolean scalar.

    Yields:
        The part that was offered, and whether an update is due. Nothing for a batch that may not be remembered.

    Raises:
        ValueError: a single logit: there are no classes to balance.
    """
    require(logits.shape[1] > 1, "a model with a single logit", "one logit for each of two classes or more")
    probabilities = logits.softmax(dim=1)
    uncertainties = -(probabilities * (probabilities + 1e-6).log()).sum(dim=1)
    # Whether a sample is kept depends on those before it: decided on the CPU, after one wait per batch.
    labels, uncertainties = torch.stack((logits.argmax(dim=1).float(), uncertainties)).cpu()
    if not (uncertainties.isfinite().all() and finite):
        return  # nothing of a bad batch may enter the memory
    for part in parts(memory, len(x), every):
        memory.add(x[part], labels[part].long(), uncertainties[part], classes=logits.shape[1])
        yield part, int(memory.offered) % every == 0
