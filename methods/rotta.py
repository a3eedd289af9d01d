"""RoTTA: robust test-time adaptation to correlated streams, by a balanced memory and a slow teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tta import augment, ema, memory, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import logits_of, soft_cross_entropy


@dataclass
class RoTTAConfig(OptimizerConfig):
    """The defaults are the paper's: Adam 1e-3.

    Attributes:
        memory_size: number of samples kept.
        update_frequency: samples between two updates, for any batch size.
        lambda_t: weight of age in the choice of the sample that the memory replaces.
        lambda_u: weight of uncertainty in the same choice.
        nu: share of the student that the teacher takes over at each update.
        alpha: share of a memory's statistics in the stored statistics of a BatchNorm layer at each update.
        augment: the student's view of the memory: ``"paper"`` (RGB images in [0, 1]), ``"none"``, or from Python a
            callable that maps a batch to a view of it.
        steps: optimizer steps per update.
    """

    memory_size: int = 64
    update_frequency: int = 64
    lambda_t: float = 1.0
    lambda_u: float = 1.0
    nu: float = 0.001
    alpha: float = 0.05
    augment: Any = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_size >= 1, f"memory_size={self.memory_size}", "1 or more samples")
        require(self.update_frequency >= 1, f"update_frequency={self.update_frequency}", "1 or more samples")
        require(0 <= self.nu <= 1, f"nu={self.nu}", "a share in [0, 1]")
        require(0 <= self.alpha <= 1, f"alpha={self.alpha}", "a share in [0, 1]")
        augment.check(self.augment)


class RoTTA(Adapter):
    """A student learns the teacher's predictions on a class-balanced memory; BatchNorm statistics follow the memory slowly.

    Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023.

    The affine parameters of the BatchNorm layers adapt; other models are refused. Scored are the teacher's logits,
    normalised by stored statistics: a batch of one works as well as any. A batch larger than ``update_frequency`` is
    predicted whole before its updates.
    """

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
            require(logits.shape[1] > 1, "a model with a single logit", "one logit for each of two classes or more")
            probabilities = logits.softmax(dim=1)
            uncertainties = -(probabilities * (probabilities + 1e-6).log()).sum(dim=1)
            # Whether a sample is kept depends on those before it: decided on the CPU, after one wait per batch.
            labels, uncertainties = torch.stack((logits.argmax(dim=1).float(), uncertainties)).cpu()
        if not (uncertainties.isfinite().all() and self.input_finite):
            return logits  # nothing of a bad batch may enter the memory
        start, every = 0, self.config.update_frequency
        while start < len(x):
            part = slice(start, start + every - int(self.memory.offered) % every)
            self.memory.add(x[part], labels[part].long(), uncertainties[part], classes=logits.shape[1])
            if self.memory.offered % every == 0:
                self._learn()
            start = part.stop
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
