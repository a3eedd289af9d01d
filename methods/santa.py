"""SANTA: source anchoring network and target alignment."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import augment, norms, taps
from tta.adapter import Adapter
from tta.functional import soft_cross_entropy
from tta.methods._contrast import ContrastConfig, PrototypeContrast, prototypes_need
from tta.source import Need


@dataclass
class SANTAConfig(ContrastConfig):
    """The defaults are what a later benchmark uses on CIFAR: Adam 1e-3."""


class SANTA(Adapter):
    """Learn the answers of the source weights on target batches, while features are kept at source prototypes.

    Chakrabarty et al., "SANTA: Source Anchoring Network and Target Alignment for Continual Test Time Adaptation",
    TMLR 2023.

    The anchor is the source model normalised by the target batch. The student's probabilities, of the images and of views,
    are the weights of a cross-entropy whose logarithm is the anchor's: it wants the anchor's most probable class. The
    affine parameters of the normalisation layers adapt. Scored are the student's logits before the step. ``source=``
    gives source images for the prototypes.
    """

    needs = "one class and one feature vector an image"
    config: SANTAConfig

    @classmethod
    def source_needs(cls, model: nn.Module, config: SANTAConfig) -> list[Need]:
        return prototypes_need(model, config)

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        self.head = taps.head(self.model)
        contrast = PrototypeContrast(self.known[0], self.config, self.generator) if self.known else None
        self.contrast: PrototypeContrast | None = contrast

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        view = augment.augmentation(config.augment, self.generator)
        for _ in range(config.steps):
            with torch.no_grad():
                anchor = self.predict_as_source(x)
            with taps.inputs(self.model, self.head) as features:
                logits, viewed = self.predict(x), self.predict(view(x))
            anchored = soft_cross_entropy(anchor, logits) + soft_cross_entropy(anchor, viewed)
            loss = config.lambda_ce_trg * anchored.mean() / 2
            if self.contrast is not None:
                loss = loss + config.lambda_cont * self.contrast(*features)
            self.update(loss)
        return logits
