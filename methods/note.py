"""NOTE: continual adaptation to temporally correlated streams."""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from tta import memory, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy
from tta.methods._memory import predicted_by_parts


@dataclass
class NOTEConfig(OptimizerConfig):
    """The defaults are the released program's: Adam 1e-4.

    Attributes:
        memory_size: number of samples kept.
        update_frequency: samples between two updates, for any batch size.
        iabn: make the BatchNorm layers instance-aware; ``False`` leaves them as they are.
        k: standard errors by which an image's statistics must differ to count.
        bn_momentum: share of a memory's statistics in the stored statistics of a BatchNorm layer at each update.
        steps: optimizer steps per update.
    """

    lr: float = 1e-4
    memory_size: int = 64
    update_frequency: int = 64
    iabn: bool = True
    k: float = 4.0
    bn_momentum: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_size >= 2, f"memory_size={self.memory_size}", "2 or more samples")
        require(self.update_frequency >= 1, f"update_frequency={self.update_frequency}", "1 or more samples")
        require(self.k >= 0, f"k={self.k}", "0 or more standard errors")
        require(0 <= self.bn_momentum <= 1, f"bn_momentum={self.bn_momentum}", "a share in [0, 1]")


class NOTE(Adapter):
    """Normalise by an image's own statistics where they stand out, and learn from a class-balanced sample of the stream.

    Gong et al., "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation", NeurIPS 2022.

    Made for a source model *trained* with instance-aware BatchNorm layers; in one trained with ordinary layers they make
    it another method, and ``iabn=False`` may serve better. Entropy is minimised over the affine parameters of these
    layers. Every sample is predicted alone, before an update that it triggers, so that results do not depend on how the
    stream is cut into batches.
    """

    needs = "one class an image, which its memory is sorted by"
    config: NOTEConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model, norms.BATCH_NORMS):
            layer.requires_grad_(True)
        aware = partial(norms.InstanceAwareBatchNorm, k=self.config.k)
        norms.blend_statistics(
            self.model, self.config.bn_momentum, aware if self.config.iabn else norms.MovingBatchNorm
        )
        self.memory = memory.PredictionBalancedReservoir(self.config.memory_size)

    def adapt(self, x: Tensor) -> Tensor:
        if not self.input_finite:  # nothing of a bad batch may enter the memory
            return self.predict(x)
        every = self.config.update_frequency
        return predicted_by_parts(self.memory, x, every, self.predict, self._remember, self._learn)

    def _remember(self, x: Tensor, logits: Tensor) -> None:
        self.memory.add(x, logits.argmax(1).cpu(), logits.shape[1], self._draw)

    def _learn(self) -> None:
        samples = self.memory.contents()
        if len(samples) < 2:
            return
        for _ in range(self.config.steps):
            with norms.remembering(self.model):
                logits = self.predict(samples)
            self.update(entropy(logits).mean())

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))
