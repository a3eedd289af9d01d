"""UnMix-TNS: BatchNorm statistics that stay unmixed when the labels of a stream are correlated."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tta import norms
from tta.adapter import Adapter, Config, require
from tta.functional import matmul

SPREAD = 0.5  # share of the source variance that lies between the first components
TEMPERATURE = 0.07  # of the similarities


@dataclass
class UnMixTNSConfig(Config):
    """The defaults are the released program's for CIFAR-10-C and CIFAR-100-C.

    Attributes:
        components: number of components of each layer; 16 as published, 128 where domains are mixed.
        full_batch: images for which a component moves with the momentum m of its BatchNorm layer; n images move it with
            1 - (1 - m)^(n / full_batch).
    """

    components: int = 16
    full_batch: int = 64

    def __post_init__(self) -> None:
        require(self.components >= 1, f"components={self.components}", "1 or more")
        require(self.full_batch >= 1, f"full_batch={self.full_batch}", "1 image or more")


class UnMixTNS(Adapter):
    """Normalise each image by a mixture of statistics that were learned apart, as if the stream held all classes at once.

    Tomar et al., "Un-Mixing Test-Time Normalization Statistics: Combatting Label Temporal Correlation", ICLR 2024.

    For BatchNorm models; no gradient, one forward, and a batch of one is served like any other. Each layer holds a number
    of components (a mean and a variance of every channel), drawn around the source's statistics. An image moves those
    towards its own statistics whose means its own resemble, and is normalised by the mixture of all components, into each of
    which it enters by this resemblance.

    Made for long streams of correlated labels: a component moves by about momentum / components at each batch, with 16 by
    half in 110 batches, and the mean of 16 draws begins 0.18 of a channel's standard deviations away from the source's. On
    digits-c, 8 batches a domain, it has 19.7 % wrong (source 23.5, norm 4.1), and 19.3 with ``protocol=correlated`` (norm
    31.3); 39 % of the first domain, where the source model has 3. ``full_batch=4`` learns faster there: 10.4 %.

    Layers without pixels (after a linear layer) keep the source's statistics, as in the released code. That code holds a
    term for the variance between an image and a component, switched off, which is left out here; its momentum follows from
    a batch size that is set, here from that of the batch.
    """

    multi_label = True
    needs = "one class an image, whose runs in the stream its components follow"
    config: UnMixTNSConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        norms.layers(self.model, norms.BATCH_NORMS)  # raises where there are none
        norms.blend_statistics(self.model, 1 / self.config.full_batch, self._layer)

    def _layer(self, layer: _BatchNorm, weight: float) -> "UnMixedBatchNorm":
        return UnMixedBatchNorm(layer, weight, self._draws(self.config.components, layer.num_features))

    def _draws(self, components: int, channels: int) -> Tensor:
        return torch.randn(components, channels, generator=self.generator)

    def adapt(self, x: Tensor) -> Tensor:
        with norms.remembering(self.model, when=self.input_finite):
            return self.predict(x)


class UnMixedBatchNorm(norms.BlendedBatchNorm):
    """A BatchNorm layer that normalises each image by a mixture of components; they learn while :func:`tta.norms.remembering`.

    Args:
        layer: with the source's statistics.
        weight: of one image: n images move a component with 1 - (1 - momentum)^(n * weight).
        draws: standard normal, (components, channels): where around the source's mean each component begins.
    """

    means: Tensor  # (components, channels)
    variances: Tensor

    def __init__(self, layer: _BatchNorm, weight: float, draws: Tensor) -> None:
        super().__init__(layer, weight)
        mean, var = self._stored()
        number = len(draws)
        # Together the components have the source's variance: half of it within each, half between them.
        spread = SPREAD if number > 1 else 0.0
        scale = math.sqrt(spread * number / max(number - 1, 1)) * var.sqrt()
        self.register_buffer("means", mean + scale * draws.to(mean.device))
        self.register_buffer("variances", ((1 - spread) * var).repeat(number, 1))

    def forward(self, x: Tensor) -> Tensor:
        if x.dim() == 2:  # one value a channel: an image has no statistics of its own
            out: Tensor = self.layer(x)
            return out
        values = x.float()
        var, mean = torch.var_mean(values, dim=list(range(2, x.dim())), correction=0)  # (batch, channels)
        similar = matmul(F.normalize(mean, dim=1), F.normalize(self.means, dim=1).T)
        shares = (similar / TEMPERATURE).softmax(1)[..., None]  # (batch, components, 1)
        mixed_means = torch.lerp(self.means, mean[:, None], shares)
        mixed_variances = torch.lerp(self.variances, var[:, None], shares)
        own_mean = mixed_means.mean(1)
        own_var = mixed_variances.mean(1) + mixed_means.var(1, correction=0)
        if self.remember:
            self._learn(mixed_means, mixed_variances)
        shape = [*mean.shape, *[1] * (x.dim() - 2)]
        normalised = (values - own_mean.view(shape)) / (own_var.view(shape) + self.layer.eps).sqrt()
        return self._scaled(normalised, x.dtype)

    @torch.no_grad()
    def _learn(self, mixed_means: Tensor, mixed_variances: Tensor) -> None:
        """Move each component towards the mean over the images of its mixtures with them, all (batch, components, channels)."""
        momentum = 0.1 if self.layer.momentum is None else self.layer.momentum
        rate = 1 - (1 - momentum) ** (len(mixed_means) * self.weight)
        means = torch.lerp(self.means, mixed_means.mean(0), rate)
        variances = torch.lerp(self.variances, mixed_variances.mean(0), rate)
        good = means.isfinite().all() & variances.isfinite().all()
        good = good if self.remember_when is None else good & self.remember_when
        self.means.copy_(torch.where(good, means, self.means))
        self.variances.copy_(torch.where(good, variances, self.variances))
