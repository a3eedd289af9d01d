"""TRIBE: three networks of one source model, whose BatchNorm layers weigh all classes alike."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from tta import augment, ema, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy, logits_of, masked_mean, matmul, reliable


@dataclass
class TRIBEConfig(OptimizerConfig):
    """The defaults are the released code's for CIFAR-10: Adam 1e-3.

    Attributes:
        eta: weight of a sample in the statistics of its class, where it is not 1 / (samples of the class in the batch),
            which is smaller; None for 0.0005 classes, at least 0.01, as published for 10, 100 and 1000 classes.
        gamma: share of a class's update that all classes get; 0 for each class on its own.
        h0: share of ln(classes) above which the teacher's entropy leaves a sample out.
        lambda_: weight of the squared distance between the teacher's and the anchor's logits.
        augment: the student's view: ``"paper"`` (RGB images in [0, 1]), ``"none"``, or from Python a callable that maps a
            batch to a view of it.
    """

    eta: float | None = None
    gamma: float = 0.0
    h0: float = 0.05
    lambda_: float = 0.5
    augment: Any = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.eta is None or 0 < self.eta <= 1, f"eta={self.eta}", "a weight in (0, 1], or None")
        require(0 <= self.gamma <= 1, f"gamma={self.gamma}", "a share in [0, 1]")
        require(self.h0 > 0, f"h0={self.h0}", "a share above 0")
        require(self.lambda_ >= 0, f"lambda_={self.lambda_}", "a weight of 0 or more")
        augment.check(self.augment)


class TRIBE(Adapter):
    """A student learns the labels of a teacher, which is kept near an anchor; BatchNorm statistics are kept class by class.

    Su et al., "Towards Real-World Test-Time Adaptation: Tri-Net Self-Training with Balanced Normalization", AAAI 2024.

    Student and teacher share the affine parameters of the BatchNorm layers, which adapt; the anchor has the source's. Each of
    the three has statistics of its own: the student of views, the others of the images. Scored are the teacher's
    logits, normalised by the statistics stored before: a batch of one works as well as any. A batch without a sure sample
    makes a step by the optimizer's moments alone, as in the released code. Statistics take 2 x classes numbers a channel in
    each network: 0.6 GB for a ResNet-50 with 1000 classes.
    """

    needs = "one class an image, whose statistics it keeps apart"
    config: TRIBEConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model, norms.BATCH_NORMS):
            layer.requires_grad_(True)
        norms.blend_statistics(
            self.model, 0.0, lambda layer, _: BalancedBatchNorm(layer, self.config.eta, self.config.gamma)
        )
        self.teacher, self.anchor = ema.sharing_copy(self.model), ema.frozen_copy(self.model)

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits."""
        return logits_of(self.teacher(x))

    def predicting_model(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    def adapt(self, x: Tensor) -> Tensor:
        view = augment.augmentation(self.config.augment, self.generator)
        for _ in range(self.config.steps):
            with torch.no_grad():
                logits = self.predict(x)
            require(logits.shape[1] > 1, "a model with a single logit", "one logit for each of two classes or more")
            self._learn(x, view(x), logits)
        return logits

    def _learn(self, x: Tensor, viewed: Tensor, logits: Tensor) -> None:
        """One step of the weights that student and teacher share, on the samples of which the teacher is sure."""
        with balanced(self, logits.argmax(1), logits.shape[1], when=self.input_finite):
            taught, learned = self.predict(x), logits_of(self.model(viewed))
            with torch.no_grad():
                anchored = logits_of(self.anchor(x))
        sure = reliable(entropy(taught), self.config.h0 * math.log(taught.shape[1]))
        losses = F.cross_entropy(learned, taught.argmax(1), reduction="none")
        losses = losses + self.config.lambda_ * (taught - anchored).square().mean(1)
        self.update(masked_mean(losses, sure))


class BalancedBatchNorm(norms.BlendedBatchNorm):
    """A BatchNorm layer that normalises by its stored statistics: those of a mixture in which all classes weigh the same.

    While :func:`balanced`, every class's statistics take in the samples that were predicted as it, and gradients flow through
    the new statistics. A sample's weight is ``eta``, and not more than 1 / (samples of its class in the batch).

    Args:
        layer: with the source's statistics, from which every class starts.
        eta: weight of a sample, see :class:`TRIBEConfig`.
        gamma: share of a class's update that all classes get.
    """

    labels: Tensor | None = None  # (batch,), the predicted class of each sample, while balanced
    classes: int = 0
    class_mean: Tensor | None  # (classes, channels); shaped by the first batch
    class_var: Tensor | None

    def __init__(self, layer: _BatchNorm, eta: float | None, gamma: float) -> None:
        super().__init__(layer, 0.0)
        self.eta, self.gamma = eta, gamma
        self.register_buffer("class_mean", None)
        self.register_buffer("class_var", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.labels is None:
            out: Tensor = self.layer(x)
            return out
        rows, images = len(x), len(self.labels)
        require(
            rows == images, f"a BatchNorm layer that sees {rows} rows for {images} images", "one row for each image"
        )
        values = x.float()
        mean, var = self._taken_in(values.flatten(2) if x.dim() > 2 else values[..., None], self.labels)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return self._scaled((values - mean.view(shape)) / (var.view(shape) + self.layer.eps).sqrt(), x.dtype)

    def _taken_in(self, values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance, (channels,), after the classes took in values (batch, channels, locations).

        A class's values stand in the rows of its samples, so that nothing but the statistics is as large as all classes.
        """
        stored_mean, stored_var = self._class_statistics()
        own_var, own_mean = torch.var_mean(values, dim=2, correction=0)
        alike = (labels[:, None] == labels).float()
        count = alike.sum(1, keepdim=True)
        weight = (1 / count).clamp(max=max(0.0005 * self.classes, 0.01) if self.eta is None else self.eta)
        difference = own_mean - stored_mean[labels]
        shift = weight * matmul(alike, difference)
        scatter = weight * matmul(alike, own_var + difference.square()) - shift.square()
        spread = scatter - weight * count * stored_var[labels]

        rows = (F.one_hot(labels, self.classes) / count).T  # a class's samples stand for it together
        every = self.gamma / (1 / count).sum()  # what one of the classes met gives to all
        class_mean = stored_mean + matmul(rows, (1 - self.gamma) * shift) + every * (shift / count).sum(0)
        class_var = stored_var + matmul(rows, (1 - self.gamma) * spread)
        class_var = (1 - every * weight.sum()) * class_var + every * (scatter / count).sum(0)
        mean, var = class_mean.mean(0), class_var.mean(0) + class_mean.var(0)
        self._store_classes(class_mean, class_var, mean.isfinite() & var.isfinite())
        self._store(mean, var)
        return mean, var

    def _class_statistics(self) -> tuple[Tensor, Tensor]:
        if self.class_mean is None or self.class_var is None:
            self.class_mean, self.class_var = (value.expand(self.classes, -1).clone() for value in self._stored())
        return self.class_mean, self.class_var

    @torch.no_grad()
    def _store_classes(self, mean: Tensor, var: Tensor, finite: Tensor) -> None:
        """Store the classes' statistics in the channels where those of the mixture are finite."""
        assert self.class_mean is not None
        assert self.class_var is not None
        finite = finite if self.remember_when is None else finite & self.remember_when
        self.class_mean.copy_(torch.where(finite, mean, self.class_mean))
        self.class_var.copy_(torch.where(finite, var, self.class_var))


@contextmanager
def balanced(module: nn.Module, labels: Tensor, classes: int, when: Tensor) -> Iterator[None]:
    """Within this context every :class:`BalancedBatchNorm` takes in what it normalises, if ``when`` is true.

    Args:
        module: of which all layers are looked through.
        labels: (batch,), the class that each sample counts to.
        classes: number of classes.
        when: boolean scalar; if false the statistics are used and not stored.
    """
    layers = [layer for layer in module.modules() if isinstance(layer, BalancedBatchNorm)]
    for layer in layers:
        layer.labels, layer.classes = labels, classes
    try:
        with norms.remembering(module, when=when):
            yield
    finally:
        for layer in layers:
            layer.labels = None
