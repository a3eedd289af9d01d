"""Sharpness-aware steps: the gradient is taken where the loss around the weights is highest, then applied to the weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm


@contextmanager
def perturbed(parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None], rho: float) -> Iterator[None]:
    """Within this context the parameters are moved by ``rho`` along their common gradient; after it they are back, bit for bit.

    To first order that is the point of the highest loss in a ball of this radius. A gradient that is zero moves
    nothing; one that is not finite makes the parameters, and with them every loss inside the context, NaN, so that
    :meth:`tta.Adapter.update` skips and counts the step.

    Foret et al., "Sharpness-Aware Minimization for Efficiently Improving Generalization", ICLR 2021.

    Args:
        parameters: to be moved.
        gradients: of the loss, one for each parameter; None for a parameter that the loss does not reach.
        rho: radius, L2 over all parameters together.
    """
    reached = [(p, gradient) for p, gradient in zip(parameters, gradients, strict=True) if gradient is not None]
    kept = [parameter.detach().clone() for parameter, _ in reached]
    with torch.no_grad():
        scale = rho / (get_total_norm([gradient for _, gradient in reached]) + 1e-12)
        for parameter, gradient in reached:
            parameter.add_(gradient * scale)
    torch.clear_autocast_cache()  # autocast keeps casts of the unmoved weights
    try:
        yield
    finally:
        with torch.no_grad():
            for (parameter, _), before in zip(reached, kept, strict=True):
                parameter.copy_(before)
        torch.clear_autocast_cache()
