"""SAR: sharpness-aware and reliable entropy minimisation."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import ENTROPIES, gradients_of, reliable
from tta.methods._kept import alone
from tta.methods._sharpness import perturbed


@dataclass
class SARConfig(OptimizerConfig):
    """SGD with momentum 0.9. The paper has no CIFAR; 1e-3 is what later benchmarks use there.

    Attributes:
        margin_e0: samples of a higher entropy (nats) teach nothing; None for the paper's 0.4 ln(classes).
        reset_constant: when the moving average of the loss falls below this entropy, the model has collapsed and
            recovers; None for the paper's 0.2 of 1000 classes, scaled by ln(classes) / ln(1000).
        rho: radius of the sharpness-aware step.
        exclude: parts of the names of modules that are not adapted (``["blocks.9", "norm"]``); None for the last quarter
            of the blocks and the final norm, which is what was published for a ResNet-50 and a ViT-B: see
            :func:`tta.norms.top`.
        recovery: ``"full"`` resets weights, momentum and moving average; ``"weights"`` only the weights, as the
            released code does, which may then recover on several batches in a row.
        loss: ``"entropy"``, or ``"come"`` for that of opinions (Zhang et al., ICLR 2025:
            :func:`tta.functional.opinion_entropy`), in the filter and the recovery too, with the same thresholds.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    margin_e0: float | None = None
    reset_constant: float | None = None
    rho: float = 0.05
    exclude: tuple[str, ...] | None = None
    recovery: Literal["full", "weights"] = "full"
    loss: Literal["entropy", "come"] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rho > 0, f"rho={self.rho}", "a radius above 0")
        require(self.recovery in ("full", "weights"), f"recovery={self.recovery!r}", "'full' or 'weights'")
        require(self.loss in ENTROPIES, f"loss={self.loss!r}", "'entropy' or 'come'")


class SAR(Adapter):
    """Minimise the entropy of reliable samples towards a flat minimum; recover when the model collapses.

    Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023.

    Made for GroupNorm and LayerNorm models, which it adapts at batch size 1 too (the paper then lowers the learning
    rate, to 2.5e-4 / 16 for a ResNet-50 and 1e-3 / 32 for a ViT-B). BatchNorm layers normalise by the batch. A batch
    without a reliable sample makes no step. Scored are the logits before the step.
    """

    distributed = True
    tasks = ("classification", "segmentation")
    config: SARConfig
    average_loss: Tensor

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
        for layer in norms.layers_outside(self.model, self.config.exclude):
            layer.requires_grad_(True)
        self.register_buffer("average_loss", torch.tensor(math.inf))  # no loss seen yet; below no threshold

    def adapt(self, x: Tensor) -> Tensor:
        parameters, entropy = self.parameters_to_adapt(), ENTROPIES[self.config.loss]
        for _ in range(self.config.steps):
            logits = self.predict(x)
            margin = _or(self.config.margin_e0, 0.4 * math.log(logits.shape[1]))
            entropies = entropy(logits).flatten()  # the pixels of a map are samples too
            chosen = reliable(entropies, margin)
            ascent = self.workers.summed(gradients_of(self.workers.mean(entropies, chosen), parameters))
            images, kept = x, alone(self.model, x, chosen)
            if kept is not None:  # the second forward is of the reliable samples only
                images, chosen = x[kept], chosen[kept]
            with perturbed(parameters, ascent, self.config.rho):
                entropies = entropy(self.predict(images)).flatten()
                chosen = chosen & reliable(entropies, margin)
                loss = self.workers.mean(entropies, chosen)
                gradients = gradients_of(loss, parameters)
            made = self.update(loss, gradients=gradients, when=self.workers.any(chosen))
            threshold = _or(self.config.reset_constant, 0.2 * math.log(logits.shape[1], 1000))
            self._recover(self.workers.sum(loss.detach()), made, threshold)
        return logits

    @torch.no_grad()
    def _recover(self, loss: Tensor, made: Tensor, threshold: float) -> None:
        """Return to the source if the average loss shows that the model collapsed; decided on the device."""
        average = torch.where(self.average_loss.isinf(), loss, 0.9 * self.average_loss + 0.1 * loss)
        self.average_loss.copy_(torch.where(made, average, self.average_loss))
        collapsed = self.average_loss < threshold
        self.restore(collapsed, moments=self.config.recovery == "full")
        if self.config.recovery == "full":
            self.average_loss.masked_fill_(collapsed, math.inf)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value
