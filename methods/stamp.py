"""STAMP: stable memory replay, for streams with unknown classes in them."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tta import augment, memory, norms
from tta.adapter import Adapter, OptimizerConfig, Output, require
from tta.functional import entropy, gradients_of
from tta.methods._sharpness import perturbed


@dataclass
class STAMPConfig(OptimizerConfig):
    """The defaults are the released script's for CIFAR-10-C: SGD without momentum, 0.1.

    Attributes:
        alpha: a sample is remembered if the entropy of its prediction is below this share of ln(classes).
        capacity: samples remembered.
        views: augmented views that the prediction is averaged over, beside the image itself.
        augment: ``"paper"`` (RGB images in [0, 1]), ``"none"``, or from Python a callable that maps a batch to a view
            of it.
        consistent: remember only samples of which the source model, under the batch's statistics, predicts the same
            class.
        rho: radius of the sharpness-aware step.
        schedule: batches over which the learning rate falls to 0 along a cosine, to rise again over as many: ``150``
            in the released code; None for a constant one.
        weights: sum of the weights of the samples: their number, ``"samples"``, or ``"capacity"`` as in the released
            code, which takes larger steps while the memory fills.
        exclude: parts of the names of modules that are not adapted; None for the last quarter of the blocks and the
            final norm, as published for ResNets and ViT-B: see :func:`tta.norms.top`.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 0.1
    momentum: float = 0.0
    alpha: float = 0.25
    capacity: int = 64
    views: int = 15
    augment: Any = "paper"
    consistent: bool = True
    rho: float = 0.05
    schedule: int | None = 150
    weights: Literal["samples", "capacity"] = "samples"
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.alpha > 0, f"alpha={self.alpha}", "a share above 0")
        require(self.capacity >= 1, f"capacity={self.capacity}", "1 or more samples")
        require(self.views >= 0, f"views={self.views}", "0 or more")
        augment.check(self.augment)
        require(self.rho > 0, f"rho={self.rho}", "a radius above 0")
        require(self.schedule is None or self.schedule >= 1, f"schedule={self.schedule}", "1 or more batches, or None")
        require(self.weights in ("samples", "capacity"), f"weights={self.weights!r}", "'samples' or 'capacity'")


class STAMP(Adapter):
    """Minimise the entropy of a balanced memory of sure samples, towards a flat minimum; score outliers by entropy.

    Yu et al., "STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024.

    The affine parameters of the normalisation layers adapt, but for the top ones; BatchNorm layers normalise by the
    batch, or by the memory. Scored are the logarithms of the probabilities averaged over views, from before the step;
    the outlier score is the entropy of these probabilities, nats.
    """

    needs = "one class an image, which its memory is sorted by"
    config: STAMPConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
        for layer in norms.layers_outside(self.model, self.config.exclude):
            layer.requires_grad_(True)
        self.memory = memory.ReplayMemory(self.config.capacity)

    def adapt(self, x: Tensor) -> Output:
        self.memory.check(x)  # before views are drawn
        with torch.no_grad():
            logits = self.predict(x)
            averaged = self._averaged(logits.log_softmax(1), x)
            probabilities = averaged.exp()
            doubts = -(probabilities * (probabilities + 1e-5).log()).sum(1)
            chosen = doubts < self.config.alpha * math.log(logits.shape[1])
            labels = logits.argmax(1)
            if self.config.consistent:
                chosen = chosen & (labels == self.predict_as_source(x).argmax(1))
            # Which sample is replaced depends on those before it: decided on the CPU, after one wait per batch.
            chosen, labels = torch.stack((chosen.long(), labels)).cpu()
        output = Output(averaged, doubts)
        if not self.input_finite:
            return output
        rows = chosen.nonzero()[:, 0]
        self.memory.add(x[rows.to(x.device)], labels[rows], logits.shape[1], self._pick)
        if not len(self.memory):
            self.nothing_to_learn()
            return output
        for _ in range(self.config.steps):
            self._replay()
        return output

    def _averaged(self, own: Tensor, x: Tensor) -> Tensor:
        """Logarithms of the probabilities, averaged over the image and views of it; (batch, classes)."""
        if self.config.augment == "none":  # the average of equal views is the prediction without them
            return own
        view = augment.augmentation(self.config.augment, self.generator)
        views = [own, *(self.predict(view(x)).log_softmax(1) for _ in range(self.config.views))]
        return torch.stack(views).logsumexp(0) - math.log(len(views))

    def _replay(self) -> None:
        """One sharpness-aware step on the whole memory, where sure samples weigh more than unsure ones."""
        self._schedule()
        samples, parameters = self.memory.read(), self.parameters_to_adapt()
        gradients = gradients_of(self._loss(samples), parameters)
        with perturbed(parameters, gradients, self.config.rho):
            loss = self._loss(samples)
            gradients = gradients_of(loss, parameters)
        self.update(loss, gradients=gradients)

    def _loss(self, samples: Tensor) -> Tensor:
        entropies = entropy(self.predict(samples))
        total = len(samples) if self.config.weights == "samples" else self.config.capacity
        weights = total * (-entropies).softmax(0)  # gradients flow through them, as published
        return (weights * entropies).mean()

    def _schedule(self) -> None:
        if self.config.schedule is None:
            return
        assert self.optimizer is not None
        turn = math.cos(math.pi * int(self.memory.readings) / self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * (1 + turn) / 2

    def _pick(self, classes: list[int]) -> int:
        """One of the classes at random; the golden test puts the released code's draw in its place."""
        return classes[int(torch.randint(len(classes), (), generator=self.generator))]
