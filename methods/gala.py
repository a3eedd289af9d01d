"""GALA: gradient-aligned layer adaptation, around any method with an optimizer step: ``gala:tent``."""

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import norms
from tta.adapter import Adapter, Config, OptimizerConfig, config_class, require


@dataclass
class SelectionConfig(Config):
    """Settings that GALA adds to those of the method it wraps; the defaults are the paper's.

    Attributes:
        window: steps after which displacements are measured from a new anchor.
        threshold: cosine between a layer's step and its displacement after it, above which the layer may step.
        select: only the ``"best"`` layer steps, as published, or ``"all"`` above the threshold.
    """

    window: int = 20
    threshold: float = 0.75
    select: Literal["best", "all"] = "best"

    def __post_init__(self) -> None:
        super().__post_init__()  # type: ignore[misc]  # that of the wrapped method's settings
        require(self.window >= 1, f"window={self.window}", "1 or more steps")
        require(-1 <= self.threshold <= 1, f"threshold={self.threshold}", "a cosine in [-1, 1]")
        require(self.select in ("best", "all"), f"select={self.select!r}", "'best' or 'all'")


@dataclass
class GALAConfig(SelectionConfig, OptimizerConfig):
    """Settings of GALA alone. The paper chooses the learning rate by its own test errors; this one is ours."""

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0


class GALA(Adapter):
    """Let only the layer step whose step agrees best with where it has gone, around the steps of any method.

    Sahoo et al., "A Layer Selection Approach to Test Time Adaptation", AAAI 2025.

    ``gala:tent`` is Tent with GALA. Alone, it is the paper's pseudo-labelling with GALA: cross-entropy with the model's
    own predictions over all parameters, scored after the step; BatchNorm layers normalise by the batch. A layer is a
    module with parameters of its own. Its agreement is the cosine between its step and its displacement since the
    anchor, the weights at the beginning of a window of steps; all layers take a window's first step. If a layer does not
    step, its moments stay as they were too. The paper also shrinks the first steps of a window; they are not shrunk here,
    as the factor is in an appendix that could not be read.
    """

    tasks = ("classification", "segmentation")
    config: GALAConfig
    scored_forward = "after"
    wrapped: ClassVar[type[Adapter] | None] = None
    layers: Tensor  # number of the layer of each parameter
    window_steps: Tensor

    def configure_model(self) -> None:
        super().configure_model()  # that of the wrapped method
        if self.wrapped is None:
            self.model.requires_grad_(True)
            for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
                norms.use_batch_statistics(layer)
        parameters = self.parameters_to_adapt()
        names = {id(parameter): name.rpartition(".")[0] for name, parameter in self.named_parameters()}
        order = list(dict.fromkeys(names[id(parameter)] for parameter in parameters))
        layers = [order.index(names[id(parameter)]) for parameter in parameters]
        self._layer_count = len(order)
        self.register_buffer("layers", torch.tensor(layers, device=self.device))
        self.register_buffer("window_steps", torch.zeros((), dtype=torch.int64, device=self.device))
        for number, parameter in enumerate(parameters):
            self.register_buffer(f"anchor{number}", parameter.detach().clone())

    def adapt(self, x: Tensor) -> Tensor | Any:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            self.update(F.cross_entropy(logits, logits.argmax(1)))
        with torch.no_grad():
            return self.predict(x)

    def update(self, loss: Tensor, **given: Any) -> Tensor:
        """One step of the layers that agree; returns whether any was made."""
        parameters = self.optimized_parameters()
        before = [parameter.detach().clone() for parameter in parameters]
        moments = [{key: value.clone() for key, value in self._moments(parameter).items()} for parameter in parameters]
        made = super().update(loss, **given)
        with torch.no_grad():
            agreeing = self._agreeing(before) & made
            for number, parameter in enumerate(parameters):
                keep = agreeing[self.layers[number]]
                parameter.copy_(torch.where(keep, parameter, before[number]))
                for key, value in self._moments(parameter).items():
                    earlier = moments[number].get(key, torch.zeros_like(value))  # an optimizer starts from zeros
                    value.copy_(torch.where(keep.to(value.device), value, earlier))
            self.window_steps += made
            over = self.window_steps >= self.config.window
            self.window_steps.masked_fill_(over, 0)
            for number, parameter in enumerate(parameters):
                anchor = self.get_buffer(f"anchor{number}")
                anchor.copy_(torch.where(over, parameter, anchor))
        return made & agreeing.any()

    def _agreeing(self, before: list[Tensor]) -> Tensor:
        """Mask of the layers that keep the step just taken, (layers,)."""
        sums = torch.zeros(3, self._layer_count, device=self.device)
        for number, (parameter, weight) in enumerate(zip(self.optimized_parameters(), before, strict=True)):
            step, displacement = parameter - weight, parameter - self.get_buffer(f"anchor{number}")
            terms = torch.stack([(step * displacement).sum(), step.square().sum(), displacement.square().sum()])
            sums[:, self.layers[number]] += terms
        cosines = sums[0] / (sums[1] * sums[2]).sqrt()
        cosines = torch.where(cosines.isfinite(), cosines, -math.inf)  # a layer without a step never agrees
        chosen = cosines > self.config.threshold
        if self.config.select == "best":
            chosen = chosen & (torch.arange(len(cosines), device=cosines.device) == cosines.argmax())
        return chosen | (self.window_steps == 0)

    def _moments(self, parameter: torch.nn.Parameter) -> dict[str, Tensor]:
        assert self.optimizer is not None
        return {
            key: value for key, value in self.optimizer.state.get(parameter, {}).items() if isinstance(value, Tensor)
        }


@cache
def wrap(method: type[Adapter]) -> type[Adapter]:
    """The method, its steps taken by the layers that GALA chooses.

    Raises:
        ValueError: the method makes no optimizer step.
    """
    settings = config_class(method)
    if not issubclass(settings, OptimizerConfig) or method is GALA:
        raise ValueError(
            f"GALA chooses among the layers of an optimizer step; {method.__name__} makes none to choose from."
        )
    name = f"GALA{method.__name__}"
    config: Any = dataclass(type(f"{name}Config", (SelectionConfig, settings), {"__doc__": settings.__doc__}))
    inside = {
        "__doc__": f"{method.__name__}, its steps taken by the layers that GALA chooses.",
        "__module__": GALA.__module__,
        "__annotations__": {"config": config},
        "adapt": method.adapt,
        "scored_forward": method.scored_forward,
        "tasks": method.tasks,
        "wrapped": method,
    }
    return type(name, (GALA, method), inside)
