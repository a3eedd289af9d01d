"""SSA: significant-subspace alignment."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import matmul
from tta.source import Need

TINY = 1e-8  # added to a variance that is divided by, as published


@dataclass
class SSAConfig(OptimizerConfig):
    """The defaults are the released code's for images: Adam 1e-3, batches of 64.

    Attributes:
        components: principal directions of the source features that are aligned, those of the largest variance. Directions in
            which the features do not vary are never among them, so that there may be fewer.
        weight_bias: added to the weight of every direction, which is how much the head makes of it.
        parameters: ``"norm"``, the scales and shifts of the normalisation layers, or all of the ``"features"``, as published
            for tables of numbers.
        statistics: those that BatchNorm layers normalise by: the ``"batch"``'s, or the ``"source"``'s, as published for tables
            of numbers.
        source_batch_size: source images per batch; it does not change the statistics.
    """

    lr: float = 1e-3
    components: int = 100
    weight_bias: float = 1.0
    parameters: Literal["norm", "features"] = "norm"
    statistics: Literal["batch", "source"] = "batch"
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.components >= 1, f"components={self.components}", "1 direction or more")
        require(self.weight_bias >= 0, f"weight_bias={self.weight_bias}", "a weight, 0 or more")
        require(self.parameters in ("norm", "features"), f"parameters={self.parameters!r}", "'norm' or 'features'")
        require(self.statistics in ("batch", "source"), f"statistics={self.statistics!r}", "'batch' or 'source'")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 or more")


class SSA(Adapter):
    """Bring the mean and variance of the features back to the source's, in the directions that the output depends on.

    Adachi et al., "Test-time Adaptation for Regression by Subspace Alignment", ICLR 2025.

    For models of ``task="regression"`` whose numbers one linear layer makes of the features. A direction weighs as much as
    the numbers change along it (of several numbers, the length of that change). Scored is the forward before the step. A single
    image has no variance: it is predicted and not learned from. ``source=`` gives unlabelled source images.
    """

    tasks = ("regression",)
    needs = "numbers that a linear layer makes of one feature vector an image"
    config: SSAConfig
    mean: Tensor  # of the source features, (width,)
    basis: Tensor  # (width, directions)
    variance: Tensor  # of the source features along each direction
    weight: Tensor  # of each direction

    @classmethod
    def source_needs(cls, model: torch.nn.Module, config: SSAConfig) -> list[Need]:
        return [Need("feature_subspace", (taps.head(model),), settings={"components": config.components})]

    def configure_model(self) -> None:
        (known,) = self.known
        self._head = taps.head(self.model)
        taps.unfreeze(self.model, self.config.parameters)
        if self.config.statistics == "batch":
            for _, layer in norms.named_layers(self.model):
                norms.use_batch_statistics(layer)
        for name, value in known.items():
            self.register_buffer(name, value)
        head: Any = self.model.get_submodule(self._head)
        change = matmul(head.weight.detach().float(), self.basis)  # of the numbers along each direction
        self.register_buffer("weight", change.norm(dim=0) + self.config.weight_bias)

    def adapt(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            self.nothing_to_learn()
            return self.predict(x)
        for _ in range(self.config.steps):
            features, values = taps.look(self.model, self._head, x)
            self.update(self._divergence(features))
        return values

    def _divergence(self, features: Tensor) -> Tensor:
        """Weighted sum over the directions of the Kullback-Leibler divergences in both directions, nats."""
        variance, mean = torch.var_mean(matmul(features.float() - self.mean, self.basis), dim=0)  # unbiased
        zero = torch.zeros_like(mean)
        there, back = _kl(mean, variance, zero, self.variance), _kl(zero, self.variance, mean, variance)
        return ((there + back) * self.weight).sum()


def _kl(mean: Tensor, variance: Tensor, other_mean: Tensor, other_variance: Tensor) -> Tensor:
    """Kullback-Leibler divergence of the second normal distribution from the first, for each entry."""
    ratio = (variance + (other_mean - mean).square()) / (other_variance + TINY)
    return (other_variance.log() - variance.log() + ratio - 1) / 2
