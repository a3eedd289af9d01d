"""ROID: robust online adaptation by weight ensembling, diversity weighting and prior correction."""

from dataclasses import dataclass

from torch import Tensor

from tta import augment, ema, norms
from tta.adapter import Adapter, require
from tta.functional import logits_of
from tta.methods._weighting import SelfTraining, WeightingConfig, prior_corrected


@dataclass
class ROIDConfig(WeightingConfig):
    """The defaults are the released code's for CIFAR (Adam 1e-3), but for the prior correction.

    Attributes:
        momentum_src: share of themselves that the weights keep after each step; the rest comes from the source's.
    """

    momentum_src: float = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.momentum_src <= 1, f"momentum_src={self.momentum_src}", "a share in [0, 1]")


class ROID(Adapter):
    """Self-training on certain and diverse samples, whose steps stay near the source weights, and a prior for each batch.

    Marsden et al., "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction",
    WACV 2024.

    The affine parameters of the normalisation layers adapt; BatchNorm layers normalise by the batch. Scored are the
    logits before the step, corrected by the prior of their batch, which makes them depend on how batches are composed.
    No source data. A single image counts in full (the released code divides by zero).
    """

    needs = "one class an image, whose frequencies it weighs by"
    config: ROIDConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        self.self_training = SelfTraining(self.config)

    def predict(self, x: Tensor) -> Tensor:
        """Logits corrected by the prior of the batch."""
        return prior_corrected(self._logits(x), self.config.prior_correction)

    def adapt(self, x: Tensor) -> Tensor:
        view = augment.augmentation(self.config.augment, self.generator, sharp=True)
        for _ in range(self.config.steps):
            logits, loss = self.self_training(self._logits, x, view)
            made = self.update(loss)
            self.self_training.remember(logits, when=made)
            ema.blend(*self.adapted_and_source(), share=1 - self.config.momentum_src, when=made)
        return prior_corrected(logits, self.config.prior_correction)

    def _logits(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))
