"""CoTTA: continual test-time adaptation by a weight- and augmentation-averaged teacher."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, ema, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import confidence, logits_of, soft_cross_entropy, symmetric_cross_entropy


@dataclass
class CoTTAConfig(OptimizerConfig):
    """The defaults are the paper's for CIFAR-10: Adam 1e-3.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each step.
        rst_m: probability that a weight returns to the source after a step.
        ap: mean confidence of the source model on a batch below which the teacher's predictions are averaged over
            views. Published: the 5 % quantile on source images, minus 0.05.
        views: number of augmented views; ``"scales"`` has seven.
        views_at_once: views that share a forward of the teacher, each with batch statistics of its own: the logits are
            the same. Meant for a GPU that one view leaves idle; it takes more memory, and on a CPU more time.
        augment: ``"paper"`` (RGB images in [0, 1]), ``"none"``, or from Python a callable that maps a batch to a view
            of it. A map needs views that move no pixel, or a callable that returns a pair: the view, and a function that moves
            its maps back; ``"scales"`` are such views, see :func:`tta.augment.scaled`.
        symmetric: add the cross-entropy the other way round, half and half, as the ImageNet program does.
        gate: what ``ap`` is compared with: the mean confidence of the ``"batch"``, or that of each ``"pixel"`` (or image),
            which alone decides whether it is averaged over views. The second is published for segmentation, with ``ap=0.69``.
        statistics: those that BatchNorm layers of student, teacher and anchor normalise by: the ``"batch"``'s, or the
            ``"source"``'s, as published for segmentation.
        target: the teacher's distribution (``"soft"``) or its class (``"hard"``), of probabilities averaged over views, as
            published for Cityscapes to ACDC.
        score: the teacher's logits from ``"before"`` the step, which are the target, or of a forward without views ``"after"`` it.
    """

    mt_alpha: float = 0.999
    rst_m: float = 0.01
    ap: float = 0.92
    views: int = 32
    views_at_once: int = 1
    augment: Any = "paper"
    symmetric: bool = False
    gate: Literal["batch", "pixel"] = "batch"
    statistics: Literal["batch", "source"] = "batch"
    target: Literal["soft", "hard"] = "soft"
    score: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")
        require(0 <= self.rst_m <= 1, f"rst_m={self.rst_m}", "a probability in [0, 1]")
        require(self.views >= 1, f"views={self.views}", "1 or more")
        require(self.views_at_once >= 1, f"views_at_once={self.views_at_once}", "1 or more")
        augment.check(self.augment, scales=True)
        require(self.gate in ("batch", "pixel"), f"gate={self.gate!r}", "'batch' or 'pixel'")
        require(self.statistics in ("batch", "source"), f"statistics={self.statistics!r}", "'batch' or 'source'")
        require(self.target in ("soft", "hard"), f"target={self.target!r}", "'soft' or 'hard'")
        require(
            not (self.symmetric and self.target == "hard"), "symmetric with target='hard'", "one of the two, not both"
        )
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")


class CoTTA(Adapter):
    """A student learns from a teacher that is its moving average and that averages over views of uncertain batches.

    Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022.

    All parameters called ``weight`` or ``bias`` adapt, in any architecture. Scored are the teacher's logits, which
    are the student's target, from before the step. The confidence that decides about views is that of the source
    weights, the anchor, under the batch's statistics. It is one decision per batch, so results depend on how batches are
    composed; small ones give poor results (BatchNorm layers normalise by the batch). ``gate``, ``statistics``, ``target`` and
    ``score`` are what released programs for segmentation do otherwise.
    """

    tasks = ("classification", "segmentation")
    config: CoTTAConfig

    def configure_model(self) -> None:
        self.scored_forward = self.config.score
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            if self.config.statistics == "batch":
                norms.use_batch_statistics(layer)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("weight", "bias"))
        if not any(parameter.requires_grad for parameter in self.model.parameters()):
            have = sorted({name.rpartition(".")[2] for name, _ in self.model.named_parameters()})
            raise ValueError(
                f"{type(self.model).__name__} has no parameter called weight or bias, which CoTTA adapts; it has "
                + (f"{', '.join(have)}." if have else "no parameters at all.")
            )
        self.teacher = ema.frozen_copy(self.model)

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits on the batch itself, without views."""
        return logits_of(self.teacher(x))

    def predicting_model(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        for _ in range(config.steps):
            logits = logits_of(self.model(x))
            with torch.no_grad():
                target = self._target(x)
            made = self.update(self._loss(logits, target).mean())
            ema.follow(self.teacher, self.model, 1 - config.mt_alpha, when=made)
            self._restore(when=made)
        if config.score == "before":
            return target
        with torch.no_grad():
            return self.predict(x)

    def _target(self, x: Tensor) -> Tensor:
        """The teacher's logits, averaged over views where the anchor is uncertain."""
        if self.config.augment == "none":  # the average of equal views is the prediction without them
            return self.predict(x)
        if self.config.gate == "pixel":
            sure = confidence(self.predict_as_source(x)) > self.config.ap
            return torch.where(sure[:, None], self.predict(x), self._averaged(x))
        return self._averaged(x) if self._is_uncertain(x) else self.predict(x)

    def _is_uncertain(self, x: Tensor) -> bool:
        """Whether the anchor's mean confidence is below ``ap``; the only wait for a GPU in a batch."""
        return bool(confidence(self.predict_as_source(x)).mean() < self.config.ap)

    def _averaged(self, x: Tensor) -> Tensor:
        """Mean over the views of the teacher's logits; of a hard target the logarithm of the mean probabilities."""
        config, view = self.config, augment.augmentation(self.config.augment, self.generator)
        views = augment.number(config.augment, config.views)
        if config.target == "hard":
            return augment.averaged(self._probabilities, x, view, views, config.views_at_once).log()
        return augment.averaged(self.predict, x, view, views, config.views_at_once)

    def _probabilities(self, x: Tensor) -> Tensor:
        return self.predict(x).softmax(1)

    def _loss(self, logits: Tensor, target: Tensor) -> Tensor:
        if self.config.target == "hard":
            return F.cross_entropy(logits, target.argmax(1), reduction="none")
        return (symmetric_cross_entropy if self.config.symmetric else soft_cross_entropy)(logits, target)

    @torch.no_grad()
    def _restore(self, when: Tensor) -> None:
        """Set random single weights back to the source; drawn on the device."""
        if self.config.rst_m == 0:
            return
        generator = augment.generator_on(when.device, self.generator)
        source = self.source_tensors()
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                drawn = torch.empty_like(parameter, dtype=torch.bool).bernoulli_(self.config.rst_m, generator=generator)
                parameter.copy_(torch.where(drawn & when, source[name], parameter))
