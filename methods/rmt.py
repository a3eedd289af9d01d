"""RMT: robust mean teacher."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import augment, memory, norms, taps
from tta.adapter import Adapter, require
from tta.contrast import ContrastConfig, PrototypeContrast, prototypes_need
from tta.functional import logits_of, symmetric_cross_entropy
from tta.source import Need


@dataclass
class RMTConfig(ContrastConfig):
    """The defaults are the paper's for CIFAR: Adam 1e-3.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each step.
    """

    mt_alpha: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")


class RMT(Adapter):
    """Student and teacher learn to agree in both directions, on views too, while features are kept at source prototypes.

    Döbler et al., "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023.

    All parameters called ``weight`` or ``bias`` adapt; BatchNorm layers normalise by the batch. Scored are the summed
    logits of student and teacher, both from before the step. This is the paper's variant without source data at test
    time: neither replay nor warm-up. ``source=`` gives source images for the prototypes.
    """

    config: RMTConfig

    @classmethod
    def source_needs(cls, model: nn.Module, config: RMTConfig) -> list[Need]:
        return prototypes_need(model, config)

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("weight", "bias"))
        self.teacher = memory.frozen_copy(self.model)
        self.head = taps.head(self.model)
        contrast = PrototypeContrast(self.known[0], self.config, self.generator) if self.known else None
        self.contrast: PrototypeContrast | None = contrast

    def predict(self, x: Tensor) -> Tensor:
        """Sum of the student's and the teacher's logits."""
        return logits_of(self.model(x)) + logits_of(self.teacher(x))

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        view = augment.augmentation(config.augment, self.generator)
        for _ in range(config.steps):
            with torch.no_grad():
                target = logits_of(self.teacher(x))
            with taps.inputs(self.model, self.head) as features:
                logits, viewed = logits_of(self.model(x)), logits_of(self.model(view(x)))
            agreement = symmetric_cross_entropy(logits, target) + symmetric_cross_entropy(viewed, target)
            loss = config.lambda_ce_trg * agreement.mean() / 2
            if self.contrast is not None:
                loss = loss + config.lambda_cont * self.contrast(*features)
            made = self.update(loss)
            memory.follow(self.teacher, self.model, 1 - config.mt_alpha, when=made)
        return logits + target
