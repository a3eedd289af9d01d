"""PSMT: parameter-selective mean teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tta import augment, ema, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import (
    below_quantile,
    confidence,
    gradients_of,
    logits_of,
    symmetric_cross_entropy,
    weighted_distance,
)
from tta.source import Need


@dataclass
class PSMTConfig(OptimizerConfig):
    """The defaults are the released code's: Adam 1e-3.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each of its two steps per batch.
        fisher_alpha: weight of the pull towards the source weights, each by its Fisher information on source images;
            0 needs no source. The right value depends on their batch size, as the Fisher information does.
        quantile: share of all weights, those of the least squared gradient, that return to the source after a step, in
            the student and in the teacher.
        augment: ``"none"``, as the released code runs (it makes views and does not use them), ``"paper"`` (RGB images in
            [0, 1]), ``"scales"`` of maps, or from Python a callable that maps a batch to a view of it; as of ``cotta``.
        ap, views: with an augmentation, the mean confidence of the source model on a batch below which the teacher's
            predictions are averaged over views, and their number.
        source_batch_size: source images per batch.
    """

    mt_alpha: float = 0.999
    fisher_alpha: float = 500.0
    quantile: float = 0.03
    augment: Any = "none"
    ap: float = 0.92
    views: int = 32
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")
        require(self.fisher_alpha >= 0, f"fisher_alpha={self.fisher_alpha}", "a weight of 0 or more")
        require(0 <= self.quantile <= 1, f"quantile={self.quantile}", "a share in [0, 1]")
        augment.check(self.augment, scales=True)
        require(self.views >= 1, f"views={self.views}", "1 or more")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 image or more")


class PSMT(Adapter):
    """A student held near the source by the Fisher information, and a teacher that follows it weight by weight.

    Tian and Lyu, "Parameter-Selective Continual Test-Time Adaptation", ACCV 2024.

    Weights with a small gradient return to the source, in both; the teacher's others are a slow moving average of the
    student's. All parameters adapt. Scored is the sum of both models' logits, from before the step. BatchNorm layers
    normalise by the batch. ``source=`` gives unlabelled source images for the Fisher information.
    """

    tasks = ("classification", "segmentation")
    config: PSMTConfig

    @classmethod
    def source_needs(cls, model: torch.nn.Module, config: PSMTConfig) -> list[Need]:
        if not config.fisher_alpha:
            return []
        layers = tuple(dict.fromkeys(name.rpartition(".")[0] for name, _ in model.named_parameters()))
        batch = norms.named_layers(model, norms.BATCH_NORMS)  # without such layers a single source image counts too
        return [Need("fisher", layers, "batch" if batch else "source", batch_size=config.source_batch_size)]

    def configure_model(self) -> None:
        self.model.requires_grad_(True)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        self.teacher = ema.frozen_copy(self.model)
        for known in self.known:
            for number, (name, _) in enumerate(self.model.named_parameters()):
                self.register_buffer(f"fisher{number}", known[name])

    def predict(self, x: Tensor) -> Tensor:
        """The sum of both models' logits."""
        return logits_of(self.teacher(x)) + logits_of(self.model(x))

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        parameters, source = self.adapted_and_source()
        for _ in range(config.steps):
            logits = logits_of(self.model(x))
            with torch.no_grad():
                target = self._target(x)
            loss = symmetric_cross_entropy(logits, target).mean()
            if config.fisher_alpha:
                fisher = [self.get_buffer(f"fisher{number}") for number in range(len(parameters))]
                loss = loss + config.fisher_alpha * weighted_distance(parameters, source, fisher)
            gradients = gradients_of(loss, parameters, materialize=True)
            made = self.update(loss, gradients=gradients)
            ema.follow(self.teacher, self.model, 1 - config.mt_alpha, when=made)
            unimportant = below_quantile([gradient.square() for gradient in gradients], config.quantile)
            unimportant = [mask & made for mask in unimportant]
            ema.overwrite(parameters, source, unimportant)
            ema.follow(self.teacher, self.model, 1 - config.mt_alpha, when=made)
            ema.overwrite(self.teacher.parameters(), parameters, unimportant)
        return target + logits

    def _target(self, x: Tensor) -> Tensor:
        """The teacher's logits, averaged over views if there is an augmentation and the source model is unsure."""

        def predict(images: Tensor) -> Tensor:
            return logits_of(self.teacher(images))

        if self.config.augment == "none" or confidence(self.predict_as_source(x)).mean() >= self.config.ap:
            return predict(x)
        view = augment.augmentation(self.config.augment, self.generator)
        return augment.averaged(predict, x, view, augment.number(self.config.augment, self.config.views))
