"""MEMO: marginal entropy minimisation with one test point."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tta import augment, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy_of_mean
from tta.methods._augmix import augmix_views


@dataclass
class MEMOConfig(OptimizerConfig):
    """The defaults are the paper's for CIFAR-10: SGD 5e-3 without momentum.

    Attributes:
        views: augmented views of each image.
        augment: ``"paper"`` (AugMix at severity 1, images in [0, 1]), ``"none"``, or from Python a callable that maps
            a batch of one image to a view of it.
        prior: BatchNorm layers normalise by ``prior`` parts of the source statistics and one of their input's; None for
            the source statistics alone.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 5e-3
    momentum: float = 0.0
    views: int = 32
    augment: Any = "paper"
    prior: float | None = 16.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.views >= 1, f"views={self.views}", "1 or more")
        augment.check(self.augment)
        require(self.prior is None or self.prior >= 0, f"prior={self.prior}", "0 or more parts, or None")


class MEMO(Adapter):
    """For each image, minimise the entropy of its mean prediction over views; predict it; go back to the source.

    Zhang et al., "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS 2022.

    All parameters of any model adapt. Each image starts from the source weights and a new optimizer (the released code
    keeps AdamW's moments), so that nothing is remembered between images. Scored is the plain image after the step. An
    image costs a forward and backward pass of ``views`` images: 30 to 100 times a prediction.
    """

    needs = "one distribution of classes an image, averaged over views"
    config: MEMOConfig
    scored_forward = "after"

    def configure_model(self) -> None:
        self.model.requires_grad_(True)
        if self.config.prior is not None:
            norms.blend_statistics(self.model, 1 / (self.config.prior + 1))

    def adapt(self, x: Tensor) -> Tensor:
        return torch.cat([self._adapt_to(image) for image in torch.split(x, 1)])

    def _adapt_to(self, image: Tensor) -> Tensor:
        views = self._views(image)
        for _ in range(self.config.steps):
            self.update(entropy_of_mean(self.predict(views)))
        with torch.no_grad():
            logits = self.predict(image)
        self._restore()
        return logits

    def _views(self, image: Tensor) -> Tensor:
        if self.config.augment == "paper":
            return augmix_views(image[0], self.config.views, self.generator)
        if self.config.augment == "none":
            return image.expand(self.config.views, -1, -1, -1)
        return torch.cat([self.config.augment(image) for _ in range(self.config.views)])

    @torch.no_grad()
    def _restore(self) -> None:
        source = self.source_tensors()
        for name, parameter in self.model.named_parameters():
            parameter.copy_(source[name])
        self.restart_optimizer()
