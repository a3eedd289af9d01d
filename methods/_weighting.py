"""Self-training on certain and diverse predictions, and prior correction: shared by ROID and its successors.

Marsden et al., "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior Correction",
WACV 2024.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment
from tta.adapter import OptimizerConfig, require
from tta.functional import entropy, symmetric_cross_entropy

PriorCorrection = Literal["probabilities", "logits", "none"]


@dataclass
class WeightingConfig(OptimizerConfig):
    """Hyper-parameters of the self-training.

    Attributes:
        use_weighting: weigh samples by how certain and how diverse their predictions are; else all count the same.
        use_consistency: learn from views too, by the symmetric cross-entropy with the prediction of the original.
        prior_correction: multiply the predicted ``"probabilities"`` by the smoothed prior of the batch, or the
            ``"logits"``, as the released code does and the published errors come from; or ``"none"``.
        momentum_probs: share of itself that the average prediction keeps at each batch.
        temperature: of the weights.
        augment: the views: ``"paper"`` (RGB images in [0, 1]), ``"none"`` (the images themselves once more), or from
            Python a callable that maps a batch to a view of it.
        batch_size: divisor of the sum of the losses; None for the number of images in the batch. The released
            code takes the stream's batch size, so that a smaller last batch makes a smaller step.
    """

    use_weighting: bool = True
    use_consistency: bool = True
    prior_correction: PriorCorrection = "probabilities"
    momentum_probs: float = 0.9
    temperature: float = 1 / 3
    augment: Any = "paper"
    batch_size: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        forms = ("probabilities", "logits", "none")
        require(self.prior_correction in forms, f"prior_correction={self.prior_correction!r}", f"one of {forms}")
        require(0 <= self.momentum_probs <= 1, f"momentum_probs={self.momentum_probs}", "a share in [0, 1]")
        require(self.temperature > 0, f"temperature={self.temperature}", "a temperature above 0")
        augment.check(self.augment)
        require(self.batch_size is None or self.batch_size >= 1, f"batch_size={self.batch_size}", "1 or more")


class SelfTraining(nn.Module):
    """Loss of a batch: soft likelihood ratios, weighted by certainty and by diversity from the average prediction so far.

    Args:
        config: see :class:`WeightingConfig`.
    """

    average: Tensor | None  # (classes,), moving average of the predictions; None while there are none

    def __init__(self, config: WeightingConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("average", None)

    def forward(
        self, model: Callable[[Tensor], Tensor], x: Tensor, view: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Logits of the batch, (batch, classes), and the loss, a scalar.

        Args:
            model: maps images to logits.
            x: images.
            view: maps a batch to a view of it.
        """
        config, logits = self.config, model(x)
        if self.average is None:
            self.average = torch.full_like(logits[0].detach(), 1 / logits.shape[1])
        if config.use_weighting:
            weights = certainty_diversity(logits.detach(), self.average, config.temperature)
        else:
            weights = torch.ones_like(logits[:, 0])
        loss = (weights * soft_likelihood_ratio(logits)).sum()
        if config.use_consistency:
            # The view's BatchNorm statistics are of samples that teach only: their number has to be waited for on a GPU.
            taught = weights.nonzero()[:, 0]
            difference = symmetric_cross_entropy(model(view(x[taught])), logits[taught])
            loss = loss + (weights[taught] * difference).sum()
        return logits, loss / (config.batch_size or len(x))

    @torch.no_grad()
    def remember(self, logits: Tensor, when: Tensor) -> None:
        """Update the average with the predictions of a batch, if ``when`` (a boolean scalar) is true."""
        assert self.average is not None
        average = torch.lerp(logits.softmax(1).mean(0), self.average, self.config.momentum_probs)
        self.average = torch.where(when, average, self.average)


def certainty_diversity(logits: Tensor, average: Tensor, temperature: float) -> Tensor:
    """Weight of each sample: more for a certain prediction, and for one that is unlike the average prediction.

    A sample less diverse than the batch is on average weighs nothing.

    Args:
        logits: (batch, classes).
        average: (classes,), of the predictions so far.
        temperature: above 0; the largest weight is ``exp(1 / temperature)``.

    Returns:
        (batch,), 0 or at least 1.
    """
    diversity = _rescaled(1 - F.cosine_similarity(average[None], logits.softmax(1), dim=1))
    certainty = _rescaled(-entropy(logits))
    weights = (diversity * certainty / temperature).exp()
    return weights.masked_fill(diversity < diversity.mean(), 0)


def soft_likelihood_ratio(logits: Tensor, clip: float = 0.99, eps: float = 1e-5) -> Tensor:
    """Negative mean log-odds of each predicted distribution: (batch, classes) -> (batch,), float32.

    Probabilities above ``clip`` count as that and have no gradient; ``eps`` keeps the logarithm finite.

    Mummadi et al., "Test-Time Adaptation to Distribution Shift by Confidence Maximization and Input Transformation",
    arXiv 2106.14999, 2021; constants of ROID's released code.
    """
    probabilities = logits.float().softmax(1).clamp(max=clip)
    return -(probabilities * (probabilities / (1 - probabilities) + eps).log()).sum(1)


def prior_corrected(logits: Tensor, form: PriorCorrection) -> Tensor:
    """Predictions weighted by the prior of the batch, which is the mean of its predictions, smoothed towards uniform.

    Args:
        logits: (batch, classes).
        form: the factor that the prior multiplies; see :class:`WeightingConfig`.

    Returns:
        Logits, (batch, classes).
    """
    if form == "none":
        return logits
    images, classes = logits.shape
    prior = logits.softmax(1).mean(0)
    smooth = max(1 / images, 1 / classes) / prior.max()
    prior = (prior + smooth) / (1 + smooth * classes)
    return logits * prior if form == "logits" else logits + prior.log()


def _rescaled(values: Tensor) -> Tensor:
    """Values scaled to [0, 1]; all zeros if they are equal, as in a batch of one."""
    low, high = values.min(), values.max()
    return (values - low) / torch.where(high == low, 1, high - low)
