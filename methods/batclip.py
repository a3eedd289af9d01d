"""BATCLIP: both towers of CLIP adapt together."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import norms, taps
from tta.adapter import OptimizerConfig
from tta.functional import entropy, matmul, plain_images
from tta.methods._views import TwoTowersAdapter


@dataclass
class BATCLIPConfig(OptimizerConfig):
    """The defaults are the paper's for CIFAR-10-C, with batches of 200 images."""

    optimizer: Literal["adam", "sgd", "adamw"] = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.01


class BATCLIP(TwoTowersAdapter):
    """Make predictions sure, the mean feature of each predicted class like its name, and those of different classes unlike.

    Maharana et al., "BATCLIP: Bimodal Online Test-Time Adaptation for CLIP", ICCV 2025.

    For a vision-language model, see :class:`tta.TwoTowers`. Scale and shift of the LayerNorm layers of both towers adapt: the text
    features are computed anew, with a gradient, for each batch. The published protocol resets at every corruption. A batch
    in which one class is predicted has no classes to keep apart.
    """

    config: BATCLIPConfig

    def configure_model(self) -> None:
        super().configure_model()
        self.towers.unfreeze_text()
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            layer.requires_grad_(True)

    def predicting_model(self) -> nn.Module:
        """The model itself: a prediction is its forward of the images."""
        return self.model

    def adapt(self, x: Tensor) -> Tensor:
        x = plain_images(x)
        for _ in range(self.config.steps):
            classes = self.towers.refresh()
            features = self._image_features(x)
            logits = self.towers.logits(F.normalize(features, dim=1), classes)
            self.update(self._loss(features, classes, logits))
        with torch.no_grad():
            self.towers.refresh()
        return logits.detach()

    def _image_features(self, x: Tensor) -> Tensor:
        """Features (batch, width), not of unit length."""
        name = f"{self._towers}.image".lstrip(".")
        with taps.activations(self.model, [name]) as seen:
            self.model(x)
        features: Tensor = seen[name].float()
        return features

    def _loss(self, features: Tensor, classes: Tensor, logits: Tensor) -> Tensor:
        """Entropy, minus likeness of prototypes and names, minus distance of the prototypes from one another.

        Args:
            features: (batch, width), of the images.
            classes: (classes, width), unit text features.
            logits: (batch, classes).
        """
        predicted = F.one_hot(logits.argmax(1), len(classes)).to(features.dtype)  # (batch, classes)
        counts = predicted.sum(0)
        there = (counts > 0).to(features.dtype)  # classes that some image is predicted as
        prototypes = matmul(predicted.T, features) / counts.clamp(min=1)[:, None]  # (classes, width)
        like_names = ((prototypes * classes).sum(1) * there).sum() / there.sum()
        units = F.normalize(prototypes, dim=1)
        pairs = torch.outer(there, there).fill_diagonal_(0)
        apart = ((1 - matmul(units, units.T)) * pairs).sum()
        return entropy(logits).mean() - like_names - apart
