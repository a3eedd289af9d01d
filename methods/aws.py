"""AWS: a self-supervised model and a target model that learn from one another, reconstructed."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy, entropy_of_mean, matmul, soft_cross_entropy
from tta.methods._contrast import contrastive
from tta.source import Need


@dataclass
class AWSConfig(OptimizerConfig):
    """The paper's constants could not be read: these are ours, but for the grid of learning rates that 1e-4 is from.

    Attributes:
        lambda_con: weight of the contrast between an image and a view of it.
        lambda_kd: weight of staying near the features that both models had at first.
        lambda_mutual: weight of learning from one another.
        temperature: of the prototypes' cosine similarities, and of the contrast.
        augment: the view: ``"paper"`` (RGB images in [0, 1]), ``"none"`` (the image once more), or from Python a callable
            that maps a batch to a view of it.
        source_labels: the source images come with their labels, as in the paper; else the source model's predictions
            are used.
        source_batch_size: source images per batch; BatchNorm layers normalise by it.
    """

    lr: float = 1e-4
    lambda_con: float = 1.0
    lambda_kd: float = 1.0
    lambda_mutual: float = 1.0
    temperature: float = 0.1
    augment: Any = "paper"
    source_labels: bool = False
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_con", "lambda_kd", "lambda_mutual"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "a weight of 0 or more")
        require(self.temperature > 0, f"temperature={self.temperature}", "a temperature above 0")
        augment.check(self.augment)
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 image or more")


class AWS(Adapter):
    """Two copies of a model, one behind source prototypes and one behind its own head, learn from one another.

    Han et al., "When Test-Time Adaptation Meets Self-Supervised Models", arXiv 2506.23529 2025.

    A reconstruction from what others wrote about it: neither paper nor code could be read; expect other numbers.
    Known are the prototype classifier (cosine similarity to class means, frozen) on a self-supervised backbone, the target
    model with a head that learns, and three losses: a contrast, a distillation from the backbone's first features, and an
    asymmetric mutual one. Read here as: the target model maximises the mutual information of its predictions, the
    prototype model learns the target model's. All weights adapt but the prototype model's unused head; BatchNorm layers
    normalise by the batch. Scored are the target model's logits before the step.
    """

    needs = "one class and one feature vector an image"
    config: AWSConfig
    prototypes: Tensor  # (classes, width), of length 1
    absent: Tensor  # (classes,), boolean: the source had no image of this class

    @classmethod
    def source_needs(cls, model: nn.Module, config: AWSConfig) -> list[Need]:
        size, labels = config.source_batch_size, config.source_labels
        return [Need("class_moments", (taps.head(model),), "batch", batch_size=size, labels=labels)]

    def configure_model(self) -> None:
        self._head = taps.head(self.model)
        self.model.requires_grad_(True)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
            norms.use_batch_statistics(layer)
        self.prototypical = copy.deepcopy(self.model)
        self.prototypical.get_submodule(self._head).requires_grad_(False)
        (known,) = self.known
        self.register_buffer("prototypes", F.normalize(known["mean"]))
        self.register_buffer("absent", known["prior"] == 0)

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        view = augment.augmentation(config.augment, self.generator)
        for _ in range(config.steps):
            features, logits = taps.look(self.model, self._head, x)
            view_features, _ = taps.look(self.model, self._head, view(x))
            own, _ = taps.look(self.prototypical, self._head, x)
            similarity = matmul(F.normalize(own), self.prototypes.T).masked_fill(self.absent, -1)
            by_prototypes = similarity / config.temperature
            with torch.no_grad():
                first = self._first_features(x)
            contrast = contrastive(torch.stack([features, view_features]), config.temperature)
            drift = 2 - F.cosine_similarity(features, first).mean() - F.cosine_similarity(own, first).mean()
            information = entropy_of_mean(logits) - entropy(logits).mean()
            mutual = soft_cross_entropy(by_prototypes, logits.detach()).mean() - information
            self.update(config.lambda_con * contrast + config.lambda_kd * drift + config.lambda_mutual * mutual)
        return logits

    def _first_features(self, x: Tensor) -> Tensor:
        """Features under the source weights."""
        with taps.inputs(self.model, self._head) as seen:
            self.predict_as_source(x)
        return seen[-1].float()
