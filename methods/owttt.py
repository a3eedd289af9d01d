"""OWTTT: open-world test-time training with dynamic prototype expansion."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import memory, norms, taps
from tta.adapter import Adapter, OptimizerConfig, Output, require
from tta.functional import gradients_of, masked_mean, matmul, otsu_threshold, symmetric_kl
from tta.methods._steps import fit_steps, lr_batch
from tta.source import Need

PUBLISHED = (0.01, 256)  # learning rate for CIFAR-10-C, and images per batch
ALIGNMENT = 0.05  # of the released code, for every data set


@dataclass
class OWTTTConfig(OptimizerConfig):
    """The defaults are the released script's for CIFAR-10-C: SGD 0.01, momentum 0.9.

    Attributes:
        delta: temperature of the cosine similarities.
        ce_scale: weight of the classification of samples, with the prototypes of unknown classes as a class of its own.
        da_scale: weight of the alignment of the features of known samples with the source's, times 0.05.
        global_length: number of the last features that weigh most in their running Gaussian.
        queue_size: number of last outlier scores that a threshold is computed from.
        max_prototypes: number of prototypes of unknown classes kept, the newest.
        lr_batch: images per batch that ``lr`` is for. The steps of a smaller batch, whose moments are noise, are smaller by
            the square of its share; 1 for equal steps at any size. None for the published 256 with the default ``lr``, else 1.
        gradients: ``"exact"``, or as in the ``"released"`` code: those of the classification are taken after the
            alignment has moved the BatchNorm statistics that they depend on.
        source_batch_size: source images per batch; it does not change the statistics.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 0.01
    delta: float = 0.1
    ce_scale: float = 0.2
    da_scale: float = 1.0
    global_length: int = 1280
    queue_size: int = 512
    max_prototypes: int = 100
    lr_batch: int | None = None
    gradients: Literal["exact", "released"] = "exact"
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lr_batch = lr_batch(self.lr_batch, self.lr, PUBLISHED)
        require(self.delta > 0, f"delta={self.delta}", "a temperature above 0")
        require(self.ce_scale >= 0, f"ce_scale={self.ce_scale}", "a weight of 0 or more")
        require(self.da_scale >= 0, f"da_scale={self.da_scale}", "a weight of 0 or more")
        require(self.gradients in ("exact", "released"), f"gradients={self.gradients!r}", "'exact' or 'released'")
        for name in ("global_length", "queue_size", "max_prototypes", "lr_batch", "source_batch_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class OWTTT(Adapter):
    """Cluster samples around the source's class means, or around prototypes of unknown classes found on the way.

    Li et al., "On the Robustness of Open-World Test-Time Training: Self-Training with Dynamic Prototype Expansion",
    ICCV 2023.

    All parameters but the head's adapt, and the head is not used: scored are the cosine similarities to the source's class
    means over ``delta``, after the update. The outlier score is one minus the largest similarity; the sample is
    to be rejected where it is above :attr:`threshold`, which always splits the last scores in two groups, and so rejects
    known samples of a stream without unknown ones. BatchNorm layers predict by their statistics, which the alignment
    moves. ``source=`` gives unlabelled source images.
    """

    needs = "one class and one feature vector an image"
    config: OWTTTConfig
    scored_forward = "after"
    threshold: Tensor  # the last batch's, float64
    source_mean: Tensor  # (1, width)
    source_covariance: Tensor  # (1, width, width), with the ridge
    ridge: Tensor
    known_prototypes: Tensor  # (classes, width), of length 1
    unknown_prototypes: Tensor  # (max_prototypes, width), of length 1, the newest last; zeros in front of them
    number_unknown: Tensor
    training_scores: Tensor  # (queue_size,), the newest last; infinite in front of them
    inference_scores: Tensor

    @classmethod
    def source_needs(cls, model: nn.Module, config: OWTTTConfig) -> list[Need]:
        return [Need("class_gaussians", (taps.head(model),), settings={"covariance": "none"})]

    def configure_model(self) -> None:
        config, (known,) = self.config, self.known
        self._head = taps.head(self.model)
        taps.unfreeze(self.model, "features")
        mean, covariance = known["mean"][None], known["covariance"][None]
        ridge = covariance.max() / 30 * torch.eye(mean.shape[1], device=self.device)  # as in TTAC's released code
        self.gaussian = memory.RunningGaussian(
            torch.zeros_like(mean), torch.zeros_like(covariance), config.global_length
        )
        empty = torch.full((config.queue_size,), torch.inf, device=self.device)
        buffers = {
            "source_mean": mean,
            "source_covariance": covariance + ridge,
            "ridge": ridge,
            "known_prototypes": F.normalize(known["class_mean"]),
            "unknown_prototypes": torch.zeros(config.max_prototypes, mean.shape[1], device=self.device),
            "number_unknown": torch.zeros((), dtype=torch.int64, device=self.device),
            "training_scores": empty,
            "inference_scores": empty.clone(),
            "threshold": torch.zeros((), dtype=torch.float64, device=self.device),
        }
        for name, value in buffers.items():
            self.register_buffer(name, value)

    def predict(self, x: Tensor) -> Tensor:
        """Cosine similarities to the source's class means, over ``delta``."""
        features, _ = taps.look(self.model, self._head, x)
        return matmul(F.normalize(features), self.known_prototypes.T) / self.config.delta

    def adapt(self, x: Tensor) -> Output:
        for _ in range(self.config.steps if self.input_finite else 0):
            self._learn(x)
        with torch.no_grad():
            logits = self.predict(x)
            scores = 1 - self.config.delta * logits.amax(1)
            if self.input_finite:
                self._push(self.inference_scores, scores)
            self.threshold.copy_(self._split(self.inference_scores))
        return Output(logits, scores)

    def _learn(self, x: Tensor) -> None:
        features, _ = taps.look(self.model, self._head, x)
        unit = F.normalize(features)
        similarities = matmul(unit, self.known_prototypes.T)
        to_unknown = (
            matmul(unit, self.unknown_prototypes.clone().T).masked_fill(~self._in_use, -1).amax(1, keepdim=True)
        )
        had_prototypes = self.number_unknown > 0
        with torch.no_grad():
            scores = 1 - similarities.amax(1)
            self._push(self.training_scores, scores)
            threshold = self._split(self.training_scores)
            unknown = scores.double() >= threshold
            # The number of images to align and the choice of new prototypes need the CPU: the wait for a GPU in each batch.
            seen = (~unknown).nonzero()[:, 0]
            self._expand(unit, scores, to_unknown[:, 0], unknown, threshold)
        parameters, aligned, exact = self.parameters_to_adapt(), len(seen) > 1, self.config.gradients == "exact"
        loss = self.config.ce_scale * had_prototypes * self._classification(similarities, to_unknown, scores, unknown)
        gradients = gradients_of(loss, parameters, materialize=True) if exact else None
        if aligned:
            misaligned = self.config.da_scale * ALIGNMENT * self._misalignment(x[seen])
            if gradients is not None:
                more = gradients_of(misaligned, parameters, materialize=True)
                gradients = tuple(map(torch.add, gradients, more))
            loss = loss + misaligned
        fit_steps(self.optimizer, self.config.lr, len(x), self.config.lr_batch)
        self.update(loss, gradients=gradients, when=had_prototypes | aligned)

    def _classification(self, similarities: Tensor, to_unknown: Tensor, scores: Tensor, unknown: Tensor) -> Tensor:
        """Cross-entropy of the surer half of the known samples and of the unknown ones."""
        logits = torch.cat([similarities, to_unknown], dim=1) / self.config.delta
        known, classes = ~unknown, similarities.shape[1]
        both = known.any() & unknown.any()
        # Each group's median, counted as published: at most half of a group remains, and of one or two samples none.
        number = known.sum() // 2
        at = torch.where(number > 0, known.sum() - number, 0)
        upper = scores.masked_fill(unknown, -torch.inf).sort(descending=True).values[at]
        lower = scores.masked_fill(known, -torch.inf).sort(descending=True).values[unknown.sum() // 2]
        known_kept = known & (~both | (scores < upper))
        unknown_kept = unknown & (~both | (scores > lower))
        of_known = F.cross_entropy(logits[:, :classes], similarities.argmax(1), reduction="none")
        of_unknown = F.cross_entropy(logits, torch.full_like(unknown, classes, dtype=torch.int64), reduction="none")
        return (masked_mean(of_known, known_kept) + masked_mean(of_unknown, unknown_kept)) / 2

    def _misalignment(self, images: Tensor) -> Tensor:
        with norms.training_statistics(self.model, when=self.input_finite):
            features, _ = taps.look(self.model, self._head, images)
        everyone = torch.ones_like(features[:, :1], dtype=torch.bool)
        mean, covariance = self.gaussian.add(features, everyone, when=self.input_finite)
        return symmetric_kl(mean, covariance + self.ridge, self.source_mean, self.source_covariance).sum()

    def _expand(self, unit: Tensor, scores: Tensor, to_unknown: Tensor, unknown: Tensor, threshold: Tensor) -> None:
        """Make prototypes of unknown samples, the least known first, that are far from every prototype so far."""
        distances = 1 - torch.maximum(1 - scores, to_unknown)
        far = self._split(distances.masked_fill(~unknown, torch.inf))
        used = self.unknown_prototypes[self._in_use]
        to_used, to_others = matmul(unit, used.T).tolist(), matmul(unit, unit.T).tolist()
        known, limit, far_limit = scores.double().tolist(), float(threshold), float(far)
        taken: list[int] = []
        pool = [[row[column] for row in to_used] for column in range(len(used))]  # similarities to each prototype
        for row in sorted(range(len(known)), key=lambda row: -known[row]):
            if known[row] <= limit:
                break
            if 1 - max([1 - known[row], *(column[row] for column in pool)]) > far_limit:
                taken.append(row)
                pool = [*pool, to_others[row]][-self.config.max_prototypes :]
        self._push(self.unknown_prototypes, unit[taken])
        self.number_unknown.add_(len(taken)).clamp_(max=self.config.max_prototypes)

    def _split(self, scores: Tensor) -> Tensor:
        """Threshold that splits the finite scores in two groups, in steps of 0.01 as in the released code."""
        hundredths = 0.01 * torch.arange(100, dtype=torch.float64, device=scores.device)
        return otsu_threshold(scores, scores.isfinite(), hundredths)

    @property
    def _in_use(self) -> Tensor:
        count = len(self.unknown_prototypes)
        return torch.arange(count, device=self.device) >= count - self.number_unknown

    def _push(self, queue: Tensor, values: Tensor) -> None:
        queue.copy_(torch.cat([queue, values])[-len(queue) :])
