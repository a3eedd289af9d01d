"""EATA: efficient anti-forgetting test-time adaptation; ETA without the anti-forgetting."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import ENTROPIES, moved_towards, reliable, rows, unlike
from tta.methods._kept import WORTHWHILE, alone
from tta.source import Need


@dataclass
class EATAConfig(OptimizerConfig):
    """The margins are the published ones for CIFAR-10; the learning rate there is unverified.

    Attributes:
        e_margin: entropy in nats above which a sample is unreliable; None for 0.4 ln(classes).
        d_margin: cosine similarity with the average prediction above which a sample is redundant, in (0, 1]. With few
            classes two predictions are seldom less alike than 0.05, the value for ImageNet.
        fisher_alpha: weight of the anti-forgetting penalty; 0 is ETA, which needs no source. The right value depends on
            the batch size of the source images, as the Fisher information does.
        fisher_batch_size: source images per batch; None for ``source_batch_size``. It is EATA's own name for the size, and
            wins if both are given.
        source_batch_size: the same, by the name that all methods with a source share.
        keep_average: a reset leaves the average prediction as it is, as in the released code: one domain then influences
            the filter of the next.
        loss: ``"entropy"``, or ``"come"`` for that of opinions (Zhang et al., ICLR 2025:
            :func:`tta.functional.opinion_entropy`), in the filter and the weights of samples too, with the same margins.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 5e-3
    e_margin: float | None = None
    d_margin: float = 0.4
    fisher_alpha: float = 1.0
    fisher_batch_size: int | None = None
    source_batch_size: int = 64
    keep_average: bool = False
    loss: Literal["entropy", "come"] = "entropy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fisher_batch_size is None:
            self.fisher_batch_size = self.source_batch_size
        require(self.e_margin is None or self.e_margin > 0, f"e_margin={self.e_margin}", "an entropy above 0")
        require(0 < self.d_margin <= 1, f"d_margin={self.d_margin}", "a cosine similarity in (0, 1]")
        require(self.fisher_alpha >= 0, f"fisher_alpha={self.fisher_alpha}", "a weight of 0 or more")
        require(self.fisher_batch_size >= 1, f"fisher_batch_size={self.fisher_batch_size}", "1 image or more")
        require(self.loss in ENTROPIES, f"loss={self.loss!r}", "'entropy' or 'come'")


class EATA(Adapter):
    """Tent on reliable and non-redundant samples, held near the source weights that matter by their Fisher information.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    A sample teaches if its entropy is low and its prediction unlike the moving average of those that taught before;
    surer samples weigh more. A batch that teaches nothing makes no step and leaves the momentum alone. Scored are the
    logits of all samples before the step. ``source=`` gives unlabelled source images for the Fisher information.
    """

    distributed = True
    tasks = ("classification", "segmentation")
    config: EATAConfig

    @classmethod
    def source_needs(cls, model: nn.Module, config: EATAConfig) -> list[Need]:
        if not config.fisher_alpha:
            return []
        layers = tuple(name for name, _ in norms.present(model))
        batch = norms.named_layers(model, norms.BATCH_NORMS)  # without such layers a single source image counts too
        return [Need("fisher", layers, "batch" if batch else "source", batch_size=config.fisher_batch_size)]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        self.average: Tensor | None
        self.register_buffer("average", None)  # (classes,), of the predictions that taught; zeros while there are none
        self.fisher: Tensor | None
        self.anchor: Tensor
        self.register_buffer("fisher", None)
        if self.known:
            adapted = [name for name, parameter in self.model.named_parameters() if parameter.requires_grad]
            self.register_buffer("fisher", torch.cat([self.known[0][name].flatten() for name in adapted]))
            self.register_buffer("anchor", self._weights().detach().clone())

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            samples = rows(logits)  # the pixels of a map are samples too
            entropies = ENTROPIES[self.config.loss](samples)
            e_margin = self.config.e_margin or 0.4 * math.log(samples.shape[1])
            with torch.no_grad():
                probabilities = samples.softmax(1)
                if self.average is None:
                    self.average = probabilities.new_zeros(probabilities.shape[1])
                chosen = reliable(entropies, e_margin) & unlike(probabilities, self.average, self.config.d_margin)
                taught, taught_by = self.workers.any(chosen), self.workers.sum(self.workers.mean(probabilities, chosen))
            if (kept := alone(self.model, x, chosen, WORTHWHILE)) is not None:  # the backward pass is of these alone
                entropies, chosen = ENTROPIES[self.config.loss](self.predict(x[kept])), chosen[kept]
            weights = (e_margin - entropies.detach()).exp()
            loss = self.workers.mean(weights * entropies, chosen)
            if self.fisher is not None:
                distance = (self.fisher * (self._weights() - self.anchor).square()).sum()
                loss = loss + self.workers.part(self.config.fisher_alpha * distance)
            self.update(loss, when=taught)
            self.average = moved_towards(self.average, taught_by, when=taught & self.input_finite)
        return logits

    def reset(self) -> None:
        average = self.average
        super().reset()
        if self.config.keep_average:
            self.average = average

    def _weights(self) -> Tensor:
        return torch.cat([parameter.flatten() for parameter in self.parameters_to_adapt()])
