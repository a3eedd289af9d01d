"""CMF: continual momentum filtering."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import augment, ema, norms
from tta.adapter import Adapter, require
from tta.functional import logits_of
from tta.methods._weighting import SelfTraining, WeightingConfig, prior_corrected

SIZE = 38400  # affine parameters of a ViT-B, for which the released code's q was chosen
LEAST, WHOLE = 0.89, 0.9999  # the released code's bounds of the share that a hidden weight keeps


@dataclass
class CMFConfig(WeightingConfig):
    """The defaults are the released code's, but for the prior correction; Adam 1e-3 is what a later benchmark uses on CIFAR.

    Attributes:
        alpha: share of itself that the hidden model keeps in the prediction step; the rest is the source's.
        gamma: share of themselves that the weights keep after each step; the rest comes from the hidden model's.
        q: variance of the process noise for 38 400 adapted parameters; it is scaled by their number. The variance of the
            observation noise is one minus that.
    """

    alpha: float = 0.99
    gamma: float = 0.99
    q: float = 0.005

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "gamma"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)}", "a share in [0, 1]")
        require(self.q > 0, f"q={self.q}", "a variance above 0")


class CMF(Adapter):
    """ROID's self-training, whose steps stay near a hidden model: the source as a Kalman filter corrects it by the steps.

    Lee and Chang, "Continual Momentum Filtering on Parameter Space for Online Test-time Adaptation", ICLR 2024.

    The affine parameters of the normalisation layers adapt; BatchNorm layers normalise by the batch. Scored are the
    logits before the step, corrected by the prior of their batch. No source data. Only the ensemble with the filtered
    weights is offered: the released code's other type (``op``) computes the same.
    """

    needs = "one class an image, whose frequencies it weighs by"
    config: CMFConfig
    variance: Tensor

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        adapted = self.parameters_to_adapt()
        size = max(1, sum(parameter.numel() for parameter in adapted))  # none is refused with a sentence, later
        self._q = self.config.q * size / SIZE
        limit = f"less than {SIZE / size:.3g}, so that the noise of {size} adapted parameters is below 1"
        require(self._q < 1, f"q={self.config.q}", limit)
        self.self_training = SelfTraining(self.config)
        self.hidden = nn.ParameterList(nn.Parameter(p.detach().clone(), requires_grad=False) for p in adapted)
        self.register_buffer("variance", torch.zeros((), device=self.device))

    def predict(self, x: Tensor) -> Tensor:
        """Logits corrected by the prior of the batch."""
        return prior_corrected(self._logits(x), self.config.prior_correction)

    def adapt(self, x: Tensor) -> Tensor:
        view = augment.augmentation(self.config.augment, self.generator, sharp=True)
        for _ in range(self.config.steps):
            logits, loss = self.self_training(self._logits, x, view)
            made = self.update(loss)
            self.self_training.remember(logits, when=made)
            self._filter(when=made)
        return prior_corrected(logits, self.config.prior_correction)

    def _filter(self, when: Tensor) -> None:
        """Predict the hidden weights, correct them by the stepped ones, and draw the stepped ones towards them."""
        config, (adapted, source) = self.config, self.adapted_and_source()
        variance = config.alpha**2 * self.variance + self._q
        beta = (1 - self._q) / (variance + 1 - self._q)
        beta = torch.where(beta < WHOLE, beta.clamp(min=LEAST), 1)
        ema.blend(self.hidden, source, 1 - config.alpha, when)
        ema.blend(self.hidden, adapted, 1 - beta, when)
        ema.blend(adapted, self.hidden, 1 - config.gamma, when)
        self.variance.copy_(torch.where(when, beta * variance, self.variance))

    def _logits(self, x: Tensor) -> Tensor:
        return logits_of(self.model(x))
