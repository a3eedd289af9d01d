"""RMT: robust mean teacher."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, ema, norms, taps
from tta.adapter import Adapter, optimizers, require
from tta.functional import logits_of, symmetric_cross_entropy
from tta.methods._contrast import ContrastConfig, PrototypeContrast, prototypes_need
from tta.source import Need


@dataclass
class RMTConfig(ContrastConfig):
    """The defaults are the paper's for CIFAR: Adam 1e-3.

    Attributes:
        mt_alpha: share of itself that the teacher keeps at each step.
        lambda_ce_src: weight of the classification of labelled source images beside each batch; 1 in the paper, 0 for its
            variant without source data at test time.
        num_samples_warm_up: source images on which student and teacher train before the stream, without labels; 50 000 in
            the paper.
        source_samples: source images kept for both, a random sample; the paper has all.
    """

    mt_alpha: float = 0.999
    lambda_ce_src: float = 0.0
    num_samples_warm_up: int = 0
    source_samples: int = 50_000

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.mt_alpha <= 1, f"mt_alpha={self.mt_alpha}", "a share in [0, 1]")
        require(self.lambda_ce_src >= 0, f"lambda_ce_src={self.lambda_ce_src}", "a weight of 0 or more")
        warm = self.num_samples_warm_up
        require(warm >= 0, f"num_samples_warm_up={warm}", "a number of images, 0 for none")
        require(self.source_samples >= 1, f"source_samples={self.source_samples}", "1 image or more")


class RMT(Adapter):
    """Student and teacher learn to agree in both directions, on views too, while features are kept at source prototypes.

    Döbler et al., "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023.

    All parameters called ``weight`` or ``bias`` adapt; BatchNorm layers normalise by the batch. Scored are the summed
    logits of student and teacher, both from before the step. ``source=`` gives source images for the prototypes. The
    defaults are the paper's variant without source data at test time; ``lambda_ce_src=1 num_samples_warm_up=50000`` is the
    paper's own, with source images at hand throughout, and labels. The learning rate rises evenly during the warm-up. The
    stream begins with the optimizer's moments of its end, as in the released code, and a reset goes back to there.
    """

    needs = "one class and one feature vector an image"
    config: RMTConfig

    @classmethod
    def source_needs(cls, model: nn.Module, config: RMTConfig) -> list[Need]:
        needs = prototypes_need(model, config)
        if config.lambda_ce_src or config.num_samples_warm_up:
            settings = {"samples": config.source_samples}
            needs.append(Need("replay", labels=config.lambda_ce_src > 0, settings=settings))
        return needs

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name.rpartition(".")[2] in ("weight", "bias"))
        self.teacher = ema.frozen_copy(self.model)
        self.head = taps.head(self.model)
        known = {kind: entry for entry in self.known for kind in ("prior", "images") if kind in entry}
        contrast = PrototypeContrast(known["prior"], self.config, self.generator) if "prior" in known else None
        self.contrast: PrototypeContrast | None = contrast
        # Not in buffers: the saved state would hold the source images, and the snapshot for a reset a copy of them.
        self._replay = known.get("images")
        self._warm_moments: list[optimizers.Moments] = []
        self._warm_up()

    def restart_optimizer(self) -> None:
        """Start a new optimizer, with the moments that the warm-up ended with: the adapter makes one anew for the stream."""
        super().restart_optimizer()
        if self._warm_moments:
            fused, parameters = optimizers.is_fused(self.optimizer), self.optimized_parameters()
            moments = zip(self._warm_moments, parameters, strict=True)
            optimizers.set_moments(
                self.optimizer, [optimizers.placed(values, parameter, fused=fused) for values, parameter in moments]
            )

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
            if config.lambda_ce_src:
                images, labels = self._source_batch()
                loss = loss + config.lambda_ce_src * F.cross_entropy(logits_of(self.model(images)), labels)
            made = self.update(loss)
            ema.follow(self.teacher, self.model, 1 - config.mt_alpha, when=made)
        return logits + target

    def _warm_up(self) -> None:
        """Train student and teacher to agree on source images, while the learning rate rises."""
        batches = self.config.num_samples_warm_up // self.config.source_batch_size
        if not batches:
            return
        self.restart_optimizer()
        assert self.optimizer is not None
        for batch in range(batches):
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.lr * (batch + 1) / batches
            images, _ = self._source_batch()
            with torch.no_grad():
                target = logits_of(self.teacher(images))
            made = self.update(symmetric_cross_entropy(logits_of(self.model(images)), target).mean())
            ema.follow(self.teacher, self.model, 1 - self.config.mt_alpha, when=made)
        self._warm_moments = copy.deepcopy(optimizers.moments(self.optimizer))

    def _source_batch(self) -> tuple[Tensor, Tensor]:
        """A batch of source images, drawn at random without repetition, and their labels."""
        assert self._replay is not None
        images, labels = self._replay["images"], self._replay["labels"]
        drawn = torch.randperm(len(images), generator=self.generator)[: self.config.source_batch_size]
        drawn = drawn.to(images.device)
        return images[drawn].to(self.device).float() / 255, labels[drawn].to(self.device)
