"""Tent: test entropy minimisation."""

from dataclasses import dataclass

from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig
from tta.functional import entropy


@dataclass
class TentConfig(OptimizerConfig):
    """The defaults are the paper's for CIFAR: Adam 1e-3, one step per batch."""


class Tent(Adapter):
    """Minimise the entropy of the predictions over the affine parameters of the normalisation layers.

    Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021.

    BatchNorm layers normalise by the batch; GroupNorm and LayerNorm layers adapt too. Scored are the logits of the last
    forward *before* its step, as in the released code. Dropout and stochastic depth are off (the released code leaves
    them on).
    """

    multi_label = True
    config: TentConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            self.update(entropy(logits).mean())
        return logits
