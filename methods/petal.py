"""PETAL: probabilistic lifelong test-time adaptation with self-training."""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta import augment, ema, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import below_quantile, confidence, gradients_of, logits_of, soft_cross_entropy, weighted_distance

DAMPING = 1e-6  # of the released code, added to every variance


@dataclass
class PETALConfig(OptimizerConfig):
    """The defaults are the released code's for CIFAR-10 (Adam 1e-3), but for the variances of the prior.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each step.
        ap: mean confidence of the source model on a batch below which the teacher's predictions are averaged over
            views.
        views: number of augmented views.
        augment: ``"paper"`` (RGB images in [0, 1]), ``"none"``, ``"scales"`` of maps, or from Python a callable that maps a
            batch to a view of it; as of ``cotta``.
        prior_weight: of the prior over the weights, a normal distribution around the source's.
        prior_variance: its variances: the path of a safetensors file with a tensor for each parameter, under its name,
            as diagonal SWAG gives (negative ones count as 0), or one number for all. With the number the prior is no
            more than a pull towards the source, which at the published ``prior_weight`` is next to none.
        quantile: share of all weights, those of the least squared gradient, that return to the source after a step.
    """

    mt_alpha: float = 0.999
    ap: float = 0.92
    views: int = 32
    augment: Any = "paper"
    prior_weight: float = 1e-9
    prior_variance: Any = 1.0
    quantile: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")
        require(self.views >= 1, f"views={self.views}", "1 or more")
        augment.check(self.augment, scales=True)
        require(self.prior_weight >= 0, f"prior_weight={self.prior_weight}", "a weight of 0 or more")
        variance = self.prior_variance
        known = isinstance(variance, str) or (isinstance(variance, (int, float)) and variance >= 0)
        require(known, f"prior_variance={variance!r}", "a number of 0 or more, or the path of a safetensors file")
        require(0 <= self.quantile <= 1, f"quantile={self.quantile}", "a share in [0, 1]")


class PETAL(Adapter):
    """A student learns from a moving-average teacher under a prior over its weights; the unimportant ones are restored.

    Brahma and Rai, "A Probabilistic Framework for Lifelong Test-Time Adaptation", CVPR 2023; its variant PETAL (FIM).

    All parameters adapt. The model is the mean of the prior and what weights return to: the paper takes the SWAG mean
    of a short second training on the source, whose variances go into ``prior_variance``. Scored are the teacher's logits,
    which are the student's target, from before the step. BatchNorm layers normalise by the batch; small batches give
    poor results.
    """

    tasks = ("classification", "segmentation")
    config: PETALConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(True)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        self.teacher = ema.frozen_copy(self.model)
        if isinstance(self.config.prior_variance, str):
            self._keep_precisions(load_file(self.config.prior_variance))

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits on the batch itself, without views."""
        return logits_of(self.teacher(x))

    def predicting_model(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    def adapt(self, x: Tensor) -> Tensor:
        parameters, source = self.adapted_and_source()
        for _ in range(self.config.steps):
            logits = logits_of(self.model(x))
            with torch.no_grad():
                target = self._averaged(x) if self._is_uncertain(x) else self.predict(x)
            # the negative logarithm of the prior's density, up to a constant
            prior = weighted_distance(parameters, source, self._precisions()) / 2
            loss = soft_cross_entropy(logits, target).mean() + self.config.prior_weight * prior
            gradients = gradients_of(loss, parameters, materialize=True)
            made = self.update(loss, gradients=gradients)
            ema.follow(self.teacher, self.model, 1 - self.config.mt_alpha, when=made)
            unimportant = below_quantile([gradient.square() for gradient in gradients], self.config.quantile)
            ema.overwrite(parameters, source, [mask & made for mask in unimportant])
        return target

    def _is_uncertain(self, x: Tensor) -> bool:
        """Whether the source's mean confidence is below ``ap``; the only wait for a GPU in a batch."""
        if self.config.augment == "none":  # the average of equal views is the prediction without them
            return False
        return bool(confidence(self.predict_as_source(x)).mean() < self.config.ap)

    def _averaged(self, x: Tensor) -> Tensor:
        view = augment.augmentation(self.config.augment, self.generator)
        return augment.averaged(self.predict, x, view, augment.number(self.config.augment, self.config.views))

    def _precisions(self) -> list[Tensor | float]:
        count = len(list(self.model.parameters()))
        if isinstance(self.config.prior_variance, str):
            return [self.get_buffer(f"precision{number}") for number in range(count)]
        return [1 / (self.config.prior_variance + DAMPING)] * count

    def _keep_precisions(self, variances: dict[str, Tensor]) -> None:
        for number, (name, parameter) in enumerate(self.model.named_parameters()):
            if name not in variances or variances[name].shape != parameter.shape:
                given = f"one of shape {tuple(variances[name].shape)}" if name in variances else "none"
                raise ValueError(
                    f"'{self.config.prior_variance}' must hold a variance for each parameter of the model, under its "
                    f"name; for '{name}' {tuple(parameter.shape)} it holds {given}. It holds "
                    f"{', '.join(list(variances)[:5])} and so on."
                )
            # E[w^2] - E[w]^2 over a few snapshots may fall below 0
            variance = variances[name].float().clamp(min=0).to(self.device)
            self.register_buffer(f"precision{number}", 1 / (variance + DAMPING))
