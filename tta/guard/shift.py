"""Input shift: how far images are from the source's, by their statistics at the first BatchNorm layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta.distributed import ALONE, Workers


class InputShift:
    """A hook on a frozen source model that measures the images of a forward pass while :attr:`wanted`.

    Attributes:
        wanted: whether the next forward is measured.
        value: mean over channels of half the absolute log ratio of their variance to the source's, a scalar; 0.03 to 0.08 for
            images like the source's, also of a single class, 0.6 and more under fog or contrast. None for a model whose first
            BatchNorm layer keeps no statistics, or that has none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.wanted = False
        self.workers: Workers = ALONE  # whose images are measured together
        self.value: Tensor | None = None
        layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        if layers and layers[0].running_var is not None:
            layers[0].register_forward_pre_hook(self)

    def __call__(self, layer: nn.Module, args: tuple[Any, ...]) -> None:
        if self.wanted:
            assert isinstance(layer, _BatchNorm)
            assert layer.running_var is not None
            x = args[0].detach().float()
            if self.workers.size > 1:
                _, variance, _ = self.workers.moments(x)
            else:
                variance = x.transpose(0, 1).flatten(1).var(1, correction=0)
            ratio = (variance + layer.eps) / (layer.running_var + layer.eps)
            self.value = ratio.log().abs().mean() / 2


def measured(shift: InputShift, run: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
    """The result of ``run(x)``, a forward of the model, and the shift of the images; 0 where it cannot be known."""
    shift.wanted, shift.value = True, None
    try:
        result = run(x)
    finally:
        shift.wanted = False
    return result, 0.0 if shift.value is None else float(shift.value)
