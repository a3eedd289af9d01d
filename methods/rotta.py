"""RoTTA: robust test-time adaptation to correlated streams, by a balanced memory and a slow teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import augment, ema, memory, norms
from tta.adapter import Adapter, require
from tta.functional import logits_of, soft_cross_entropy
from tta.methods._memory import MemoryConfig, offered


@dataclass
class RoTTAConfig(MemoryConfig):
    """The defaults are the paper's: Adam 1e-3.

    Attributes:
        nu: share of the student that the teacher takes over at each update.
        alpha: share of a memory's statistics in the stored statistics of a BatchNorm layer at each update.
    """

    nu: float = 0.001
    alpha: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.nu <= 1, f"nu={self.nu}", "a share in [0, 1]")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "a share in [0, 1]")


class RoTTA(Adapter):
    """A student learns the teacher's predictions on a class-balanced memory; BatchNorm statistics follow the memory slowly.

    Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023.

    The affine parameters of the BatchNorm layers adapt; other models are refused. Scored are the teacher's logits,
    normalised by stored statistics: a batch of one works as well as any. A batch larger than ``update_frequency`` is
    predicted whole before its updates.
    """

    needs = "one class an image, which its memory is sorted by"
    config: RoTTAConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model, norms.BATCH_NORMS):
            layer.requires_grad_(True)
        norms.blend_statistics(self.model, self.config.alpha, norms.RobustBatchNorm)
        self.teacher = ema.frozen_copy(self.model)
        self.memory = memory.BalancedMemory(self.config.memory_size, self.config.lambda_t, self.config.lambda_u)

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits."""
        return logits_of(self.teacher(x))

    def predicting_model(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    def adapt(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = self.predict(x)
        for _, due in offered(self.memory, x, logits, self.config.update_frequency, self.input_finite):
            if due:
                self._learn()
        return logits

    def _learn(self) -> None:
        """Update the student on the memory, where young samples weigh more than old ones, then the teacher."""
        samples, ages = self.memory.contents()
        weights = torch.sigmoid(-ages / self.config.memory_size)
        view = augment.augmentation(self.config.augment, self.generator)
        for _ in range(self.config.steps):
            with torch.no_grad(), norms.remembering(self.teacher):
                targets = self.predict(samples)
            with norms.remembering(self.model):
                logits = logits_of(self.model(view(samples)))
            made = self.update((weights * soft_cross_entropy(logits, targets)).mean())
            ema.follow(self.teacher, self.model, self.config.nu, when=made)
