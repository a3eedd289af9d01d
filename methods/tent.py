"""Tent: test entropy minimisation."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import ENTROPIES


@dataclass
class TentConfig(OptimizerConfig):
    """The defaults are the paper's for CIFAR: Adam 1e-3, one step per batch.

    Attributes:
        loss: what is minimised: the ``"entropy"`` of the predictions, or, with ``"come"``, that of opinions, which leave a
            rest to none of the classes (Zhang et al., ICLR 2025: :func:`tta.functional.opinion_entropy`).
    """

    loss: Literal["entropy", "come"] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss in ENTROPIES, f"loss={self.loss!r}", "'entropy' or 'come'")


class Tent(Adapter):
    """Minimise the entropy of the predictions over the affine parameters of the normalisation layers.

    Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021.

    BatchNorm layers normalise by the batch; GroupNorm and LayerNorm layers adapt too. Scored are the logits of the last
    forward *before* its step, as in the released code. Dropout and stochastic depth are off (the released code leaves
    them on).
    """

    distributed = True
    multi_label = True
    tasks = ("classification", "segmentation")
    config: TentConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            entropies = ENTROPIES[self.config.loss](logits)
            self.update(self.workers.mean(entropies.flatten()))  # the pixels of a map are samples too
        return logits
