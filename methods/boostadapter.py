"""BoostAdapter: a cache of the stream's images and of the image's own views."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta.adapter import require
from tta.functional import entropy, matmul
from tta.methods._tda import CachesConfig, Evidence, TwoCaches
from tta.methods._views import Seen


@dataclass
class BoostAdapterConfig(CachesConfig):
    """The defaults are the released code's for ImageNet-A.

    Attributes:
        evidence: what stands for an image in the caches: ``"views"`` (the mean of its surest views, as for ImageNet's variants)
            or ``"image"`` (itself, as for the fine-grained sets).
        extra_shots: places that the views get beside those of the positive cache.
    """

    views: int = 64
    evidence: Literal["views", "image"] = "views"
    extra_shots: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.extra_shots >= 0, f"extra_shots={self.extra_shots}", "0 or more places")


class BoostAdapter(TwoCaches):
    """Correct the logits as TDA does, by a cache that the image's own surest views join while it is predicted.

    Zhang et al., "BoostAdapter: Improving Vision-Language Test-Time Adaptation via Regional Bootstrapping", NeurIPS 2024.

    For a vision-language model, see :class:`tta.TwoTowers`; no gradient. Each of the surest views joins its own class, where the
    entries of least entropy count; afterwards they are forgotten. The negative cache keeps the newest images, not the surest.
    """

    config: BoostAdapterConfig
    negative_fifo = True

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._next(image) for image in self.seen(x)])

    def _next(self, image: Seen) -> Tensor:
        self.admit(self._evidence(image))
        return self._boosted(image)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits corrected by the present caches and the views, which stay out of them."""
        return torch.stack([self._boosted(image) for image in self.seen(x, self.copied_generator())])

    def _evidence(self, image: Seen) -> Evidence:
        if self.config.evidence == "views":
            return Evidence.of(image, self.config.selection)
        return Evidence.of(Seen(image.features[:1], image.logits[:1]), 1.0)

    def _boosted(self, image: Seen) -> Tensor:
        evidence, beta = self._evidence(image), self.config.positive_beta
        kept = image.surest(self.config.selection)
        near = (-beta * (1 - matmul(image.features[kept], evidence.feature))).exp()  # (kept views,)
        classes = torch.arange(len(evidence.logits), device=near.device)
        theirs = image.logits[kept].argmax(1) == classes[:, None]  # (classes, kept views)
        uncertain = torch.where(theirs, entropy(image.logits[kept]), torch.inf)
        entropies = torch.cat([self.positive.entropies, uncertain], dim=1)
        affinity = torch.cat([self.positive.affinity(evidence.feature, beta), torch.where(theirs, near, 0)], dim=1)
        places = entropies.argsort(dim=1, stable=True)[:, : self.config.positive_shots + self.config.extra_shots]
        return self.corrected(evidence, affinity.gather(1, places).sum(1))
