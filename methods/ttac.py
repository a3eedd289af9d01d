"""TTAC: test-time anchored clustering."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tta import memory, norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import symmetric_kl
from tta.methods._steps import fit_steps, lr_batch
from tta.source import Need

STEADY = (
    0.01,
    64,
)  # the published learning rate, and the images per step from where on it keeps clean digits (0.9 % wrong)


@dataclass
class TTACConfig(OptimizerConfig):
    """The defaults are the released code's for CIFAR-10-C without a queue: SGD 0.01, momentum 0.9.

    Attributes:
        confidence: probability above which a prediction counts as the sample's class.
        loss_scale: weight of the whole loss.
        class_weight: weight of a class's divergence against that of all samples; None for 1 / classes.
        class_length: number of a class's last samples that weigh most in its running Gaussian.
        class_count: number of samples that a class's initial Gaussian, the source's, counts as.
        min_class_count: number of samples that a class's running Gaussian must hold before the class is aligned.
        lr_batch: images per step that ``lr`` is for. The steps of a smaller batch, whose moments are noise, are smaller by
            the square of its share; 1 for equal steps at any size. None for 64 with the default ``lr`` (from there on it
            keeps clean digits; published are 256), else 1.
        class_covariance: ``"full"``, or ``"diagonal"`` for many classes: a full one takes width^2 numbers per class.
        global_length: as ``class_length``, of the Gaussian of all samples.
        queue_size: 0 for one step on each batch as it comes. Else the number of last images that are kept; after every
            batch all of them are learned from, several times: as in the paper's tables, at many times the cost.
        queue_passes: passes over the queue after each batch. Classes are aligned only in the second half of these.
        queue_batch_size: images of the queue per step.
        queue_tolerance: how far the top probability of an image may fall before its class is distrusted.
        source_batch_size: source images per batch; it does not change the statistics.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 0.01
    confidence: float = 0.9
    loss_scale: float = 0.05
    class_weight: float | None = None
    class_length: int = 128
    class_count: int = 0
    min_class_count: int = 16
    lr_batch: int | None = None
    class_covariance: Literal["full", "diagonal"] = "full"
    global_length: int = 1280
    queue_size: int = 0
    queue_passes: int = 4
    queue_batch_size: int = 256
    queue_tolerance: float = 0.001
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lr_batch = lr_batch(self.lr_batch, self.lr, STEADY)
        require(0 <= self.confidence <= 1, f"confidence={self.confidence}", "a probability")
        require(self.loss_scale > 0, f"loss_scale={self.loss_scale}", "a weight above 0")
        require(self.class_weight is None or self.class_weight >= 0, f"class_weight={self.class_weight}", "0 or more")
        require(self.class_covariance in ("full", "diagonal"), f"{self.class_covariance=}", "'full' or 'diagonal'")
        for name in ("class_count", "min_class_count", "queue_size"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "0 or more")
        for name in (
            "class_length",
            "global_length",
            "queue_passes",
            "queue_batch_size",
            "lr_batch",
            "source_batch_size",
        ):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class TTAC(Adapter):
    """Bring the Gaussians of the features, of each class and of all samples, back to those of the source.

    Su et al., "Revisiting Realistic Test-Time Training: Sequential Inference and Adaptation by Anchored Clustering",
    NeurIPS 2022. Without source training of its own (protocol N), with a queue or without.

    All parameters but the head's adapt. BatchNorm layers normalise a step by its batch, which also moves their
    statistics, and predict by these. Scored are the logits after the update. ``source=`` gives unlabelled source images;
    a class that the source model never predicts on them is not aligned.
    """

    needs = "one class and one feature vector an image"
    config: TTACConfig
    scored_forward = "after"
    source_class_mean: Tensor
    source_class_covariance: Tensor
    source_class_count: Tensor
    source_mean: Tensor
    source_covariance: Tensor

    @classmethod
    def source_needs(cls, model: nn.Module, config: TTACConfig) -> list[Need]:
        return [Need("class_gaussians", (taps.head(model),), settings={"covariance": config.class_covariance})]

    def configure_model(self) -> None:
        config, (known,) = self.config, self.known
        self._head = taps.head(self.model)
        taps.unfreeze(self.model, "features")
        self.ridge = float(known["covariance"].max()) / 30  # of the released code; covariances may be singular
        mean, covariance = known["mean"], known["covariance"]
        self.classes = memory.RunningGaussian(
            known["class_mean"], known["class_covariance"], config.class_length, config.class_count
        )
        self.total = memory.RunningGaussian(
            torch.zeros_like(mean)[None], torch.zeros_like(covariance)[None], config.global_length
        )
        for name, value in known.items():
            self.register_buffer(f"source_{name}", value)
        self.queue = memory.ReviewQueue(config.queue_size, config.queue_tolerance)

    def adapt(self, x: Tensor) -> Tensor:
        if self.config.queue_size and self.input_finite:
            self._review(x)
        else:
            for _ in range(self.config.steps):
                self._align(x)
        with torch.no_grad():
            return self.predict(x)

    def _align(self, images: Tensor, slots: Tensor | None = None, by_class: bool = True) -> None:
        """One step; ``slots`` are the places of the images in the queue, if they come from there."""
        with norms.training_statistics(self.model, when=self.input_finite):
            features, logits = taps.look(self.model, self._head, images)
        with torch.no_grad():
            probabilities = logits.softmax(1)
            if slots is not None:
                probabilities = self.queue.review(slots, self.predict(images).softmax(1))
            confidence, labels = probabilities.max(1)
            sure = confidence > self.config.confidence
            member = sure[:, None] & (labels[:, None] == torch.arange(logits.shape[1], device=labels.device))
        everyone = torch.ones_like(member[:, :1])
        total = self.total.add(features, everyone, when=self.input_finite)
        loss = self._divergence(total, (self.source_mean, self.source_covariance)).sum()
        moments = self.classes.add(features, member, when=self.input_finite)
        if by_class:
            aligned = (
                member.any(0) & (self.classes.count >= self.config.min_class_count) & (self.source_class_count > 0)
            )
            divergences = self._divergence(moments, (self.source_class_mean, self.source_class_covariance))
            weight = 1 / len(aligned) if self.config.class_weight is None else self.config.class_weight
            loss = loss + weight * torch.where(aligned, divergences, 0).sum()
        fit_steps(self.optimizer, self.config.lr, len(images), self.config.lr_batch)
        self.update(self.config.loss_scale * loss)

    def _divergence(self, moments: tuple[Tensor, Tensor], source: tuple[Tensor, Tensor]) -> Tensor:
        (mean, covariance), (source_mean, source_covariance) = moments, source
        ridge = self.ridge * torch.ones_like(mean)
        ridge = ridge if covariance.dim() == mean.dim() else ridge.diag_embed()
        return symmetric_kl(mean, covariance + ridge, source_mean, source_covariance + ridge)

    def _review(self, x: Tensor) -> None:
        """Passes over the queue, in random order; there are more of them as it fills."""
        config = self.config
        self.queue.add(x, classes=len(self.source_class_count))
        count = len(self.queue)
        for number in range(1, min(config.queue_passes, count // config.queue_batch_size + 1) + 1):
            self.queue.begin_pass()
            order = torch.randperm(count, generator=self.generator).to(x.device)
            for slots in torch.split(order, config.queue_batch_size):
                if len(slots) == min(count, config.queue_batch_size):  # a smaller rest waits for the next pass
                    assert self.queue.images is not None
                    self._align(self.queue.images[slots], slots, by_class=number > config.queue_passes // 2)
