"""Conjugate pseudo-labels: adapt by the loss that the source model was trained with."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require


@dataclass
class ConjugatePLConfig(OptimizerConfig):
    """The released program's loss; it tunes the learning rate for each kind of source model.

    Attributes:
        epsilon: weight of the first polynomial term of PolyLoss. It belongs to the loss that the source model was
            trained with: 6 is the paper's, with 0, the cross-entropy, the method is Tent.
        temperature: divides the logits in the loss.
        score: logits that are scored: those of the forward ``"before"`` the step or of a second one ``"after"`` it, as
            the released program does.
    """

    epsilon: float = 6.0
    temperature: float = 1.0
    score: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.epsilon >= 0, f"epsilon={self.epsilon}", "a weight of 0 or more")
        require(self.temperature > 0, f"temperature={self.temperature}", "a temperature above 0")
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")


class ConjugatePL(Adapter):
    """Minimise the training loss, here PolyLoss, against the pseudo-labels conjugate to it.

    Goyal et al., "Test-Time Adaptation via Conjugate Pseudo-labels", NeurIPS 2022.

    The affine parameters of the normalisation layers adapt; BatchNorm layers normalise by the batch. For a loss
    ``f(h) - y . g(h)`` of the logits h, the conjugate pseudo-label is the y at which its gradient with respect to h is zero.
    """

    tasks = ("classification", "segmentation")
    config: ConjugatePLConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        self.scored_forward = self.config.score

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            self.update(conjugate_poly_loss(logits / self.config.temperature, self.config.epsilon).mean())
        if self.config.score == "before":
            return logits
        with torch.no_grad():
            return self.predict(x)


def conjugate_poly_loss(logits: Tensor, epsilon: float) -> Tensor:
    """PolyLoss of each sample against its conjugate pseudo-label, (batch,), nats.

    With p the softmax, the pseudo-label solves ``(I + epsilon (diag(p) - p p')) y = p``. The matrix is a diagonal one minus
    one of rank one, so that y is p / (1 + epsilon p), scaled to sum 1. The gradient flows through y too: without that part
    it would be zero.
    """
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    y = p / (1 + epsilon * p)
    y = y / y.sum(1, keepdim=True)
    return (y * (epsilon * (1 - p) - log_p)).sum(1)
