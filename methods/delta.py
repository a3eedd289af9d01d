"""DELTA: batch renormalisation by moving averages, and losses weighted against the classes that dominate."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import confidence, entropy, masked_mean, reliable


@dataclass
class DELTAConfig(OptimizerConfig):
    """The defaults are Tent with DELTA, Adam 1e-3; the shares are those of the released configurations.

    Attributes:
        loss: that DELTA corrects: ``"entropy"`` of all samples (Tent), ``"weighted"`` entropy of those below 0.5 ln(classes)
            nats, the surer the heavier, or ``"pseudo"``, the cross-entropy of predictions with a probability above 0.4.
        old_prior: share of themselves that the moving statistics of a BatchNorm layer keep at each batch (the paper's alpha).
        dot: share of themselves that the moving class frequencies keep at each batch (the paper's lambda); None weighs all
            classes alike.
    """

    loss: Literal["entropy", "weighted", "pseudo"] = "entropy"
    old_prior: float = 0.95
    dot: float | None = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        kinds = ("entropy", "weighted", "pseudo")
        require(self.loss in kinds, f"loss={self.loss!r}", "'entropy', 'weighted' or 'pseudo'")
        require(0 <= self.old_prior <= 1, f"old_prior={self.old_prior}", "a share in [0, 1]")
        require(self.dot is None or 0 <= self.dot <= 1, f"dot={self.dot}", "a share in [0, 1], or None")


class DELTA(Adapter):
    """Learn from predictions whose rare classes weigh more, with features normalised by moving averages of the stream.

    Zhao et al., "DELTA: Degradation-Free Fully Test-Time Adaptation", ICLR 2023.

    The affine parameters of the BatchNorm layers adapt; other models are refused. Test-time batch renormalisation (TBR): the
    moving averages start at the statistics of the first batch, not at the source's, so that a first batch of one image, or
    of one class, stays in them for long. Dynamic online re-weighting (DOT): a sample weighs as much as its predicted class is
    rare in a moving average of the predictions, which takes in the batch after its step. Scored are the logits before the
    step. The corrections of the renormalisation are not bounded: the released code has its bounds switched off.

    Reset where domains are short, as published: on digits-c, 8 batches a domain for averages that reach back 20, it has
    9.8 % wrong (norm 4.1) without a reset and 3.9 with ``reset=domain``; with ``protocol=correlated`` 9.8 (norm 31.3) and 8.7.
    """

    needs = "one class an image, whose frequencies it weighs by"
    config: DELTAConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model, norms.BATCH_NORMS):
            layer.requires_grad_(True)
        norms.blend_statistics(self.model, 1 - self.config.old_prior, RenormalisedBatchNorm)
        self.frequencies: Tensor | None
        self.register_buffer("frequencies", None)  # (classes,); the number of classes is known after a first batch

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            with norms.remembering(self.model, when=self.input_finite):
                logits = self.predict(x)
            losses, chosen = self._losses(logits)
            self.update(masked_mean(losses * self._weights(logits), chosen), when=chosen.any())
            self._follow(logits.detach())
        return logits

    def _losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each sample, (batch,), and whether it counts."""
        if self.config.loss == "pseudo":
            return F.cross_entropy(logits, logits.argmax(1), reduction="none"), confidence(logits) > 0.4
        entropies = entropy(logits)
        if self.config.loss == "entropy":
            return entropies, torch.ones_like(entropies, dtype=torch.bool)
        margin = 0.5 * math.log(logits.shape[1])
        return entropies * (margin - entropies.detach()).exp(), reliable(entropies.detach(), margin)

    def _weights(self, logits: Tensor) -> Tensor:
        """Weights of the samples, (batch,), of mean 1: the inverse frequencies of their predicted classes."""
        if self.config.dot is None or self.frequencies is None:
            return torch.ones_like(logits[:, 0])  # before the first batch all classes are equally frequent
        # A class that was never predicted falls below this after 500 batches; weights of 1 / 0 would be NaN.
        weights = 1 / self.frequencies.clamp(min=1e-12)[logits.argmax(1)]
        return weights / weights.mean()

    def _follow(self, logits: Tensor) -> None:
        """Move the class frequencies towards the mean prediction of the batch."""
        if self.config.dot is None:
            return
        if self.frequencies is None:
            self.frequencies = torch.full_like(logits[0], 1 / logits.shape[1])
        moved = torch.lerp(logits.softmax(1).mean(0), self.frequencies, self.config.dot)
        good = moved.isfinite().all() & self.input_finite
        self.frequencies = torch.where(good, moved, self.frequencies)


class RenormalisedBatchNorm(norms.BlendedBatchNorm):
    """A BatchNorm layer that normalises by moving averages of test batches, through whose statistics gradients flow.

    The values are those of a layer with stored statistics, the gradients those of batch statistics. The averages are of mean
    and standard deviation. They begin with the first batch, which is normalised by its own, and take in each later batch
    after it was normalised, while :func:`tta.norms.remembering`.
    """

    begun: Tensor

    def __init__(self, layer: _BatchNorm, weight: float) -> None:
        super().__init__(layer, weight)
        assert layer.running_mean is not None
        self.register_buffer("begun", torch.zeros((), dtype=torch.bool, device=layer.running_mean.device))

    def forward(self, x: Tensor) -> Tensor:
        values, shape = x.float(), [1, -1, *[1] * (x.dim() - 2)]
        var, mean = torch.var_mean(values, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        std = (var + self.layer.eps).sqrt()
        with torch.no_grad():
            kept_mean, kept_var = self._stored()
            kept_mean = torch.where(self.begun, kept_mean, mean)
            kept_std = torch.where(self.begun, (kept_var + self.layer.eps).sqrt(), std)
            gain, shift = std / kept_std, (mean - kept_mean) / kept_std
            if self.remember:
                self._take_in(torch.lerp(kept_mean, mean, self.weight), torch.lerp(kept_std, std, self.weight))
        normalised = (values - mean.view(shape)) / std.view(shape) * gain.view(shape) + shift.view(shape)
        return self._scaled(normalised, x.dtype)

    def _take_in(self, mean: Tensor, std: Tensor) -> None:
        self._store(mean, (std.square() - self.layer.eps).clamp(min=0))
        finite = mean.isfinite().all() & std.isfinite().all()
        self.begun |= finite if self.remember_when is None else finite & self.remember_when
