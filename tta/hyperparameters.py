"""Hyper-parameters: the dataclasses that every method's own extend."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from tta.messages import require


@dataclass
class Config:
    """Hyper-parameters of a method; this one has none."""


@dataclass
class OptimizerConfig(Config):
    """Hyper-parameters of a method with a gradient step.

    Attributes:
        optimizer: ``"adam"``, ``"sgd"`` or ``"adamw"``.
        lr: learning rate, above 0.
        momentum: SGD only.
        betas: Adam and AdamW only.
        weight_decay: as the optimizer defines it (decoupled in AdamW).
        nesterov: SGD only; programs differ in this, and a first step differs by a factor of 1.9.
        steps: optimizer steps per batch.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    lr: float = 1e-3
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    nesterov: bool = False
    steps: int = 1

    def __post_init__(self) -> None:
        require(self.optimizer in ("adam", "sgd", "adamw"), f"optimizer={self.optimizer!r}", "'adam', 'sgd' or 'adamw'")
        require(0 < self.lr < math.inf, f"lr={self.lr}", "a learning rate above 0, and finite")
        require(0 <= self.momentum < 1, f"momentum={self.momentum}", "a value in [0, 1)")
        require(len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), f"betas={self.betas}", "two in [0, 1)")
        require(0 <= self.weight_decay < math.inf, f"weight_decay={self.weight_decay}", "a finite value of 0 or more")
        require(self.steps >= 1, f"steps={self.steps}", "1 or more steps a batch")


def as_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain JSON values; objects without a plain form appear as their ``repr``."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config)}


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (bool, int, float, str, type(None))) else repr(value)
