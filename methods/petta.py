"""PeTTA: persistent test-time adaptation, which senses how far it has gone from the source and holds back."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, ema, memory, norms, taps
from tta.adapter import Adapter, require
from tta.functional import logits_of, matmul, soft_cross_entropy, symmetric_cross_entropy
from tta.methods._memory import MemoryConfig, offered
from tta.source import Need


@dataclass
class PeTTAConfig(MemoryConfig):
    """The defaults are the released code's for CIFAR: Adam 1e-3.

    Attributes:
        alpha_0: share of the student that the teacher takes over at each update, before any divergence.
        lambda_0: weight of the regulariser at full divergence.
        anchor_weight: weight of the cross-entropy with the source weights' predictions.
        nu: share of the new features in the moving average of a class's mean feature (RoTTA's ``nu`` is ``alpha_0`` here).
        bn_momentum: share of a memory's statistics in the stored statistics of a BatchNorm layer at each pass.
        regularizer: what holds weights near the source's: their ``"cosine"`` similarity, their squared distance ``"l2"``, or
            ``"none"``.
        loss_func: ``"sce"``, the symmetric cross-entropy with the teacher of the memory and of a view of it, or ``"ce"``,
            the cross-entropy of the view alone (ImageNet).
        adaptive_lambda: multiply ``lambda_0`` by the divergence.
        adaptive_alpha: multiply ``alpha_0`` by 1 - divergence.
        source_batch_size: source images per batch; it does not change the statistics.
    """

    alpha_0: float = 0.001
    lambda_0: float = 10.0
    anchor_weight: float = 1.0
    nu: float = 0.05
    bn_momentum: float = 0.05
    regularizer: Literal["cosine", "l2", "none"] = "cosine"
    loss_func: Literal["sce", "ce"] = "sce"
    adaptive_lambda: bool = True
    adaptive_alpha: bool = True
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha_0", "nu", "bn_momentum"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)}", "a share in [0, 1]")
        for name in ("lambda_0", "anchor_weight"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "a weight of 0 or more")
        kinds = ("cosine", "l2", "none")
        require(self.regularizer in kinds, f"regularizer={self.regularizer!r}", f"one of {kinds}")
        require(self.loss_func in ("sce", "ce"), f"loss_func={self.loss_func!r}", "'sce' or 'ce'")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 image or more")


class PeTTA(Adapter):
    """RoTTA's student and teacher, held nearer to the source and slower the further the classes' mean features have drifted.

    Hoang et al., "Persistent Test-time Adaptation in Recurring Testing Scenarios", NeurIPS 2024.

    The affine parameters of the normalisation layers adapt; BatchNorm statistics follow the memory, in the anchor (the source
    weights) too. Scored are the teacher's logits, normalised by stored statistics: a batch of one works as well as any.
    The divergence is that of the released code, 1 - exp(-d), with d the mean over classes and features of the squared shift
    in units of the source's variance; the paper sums over the features, and averages over classes last. That code updates
    after every batch, where this one does after every ``update_frequency`` samples: the same for the published batches of 64.
    ``source=`` gives unlabelled source images for the classes' means and variances; classes are those predicted.
    """

    needs = "one class an image, which its memory is sorted by"
    config: PeTTAConfig
    means: Tensor  # (classes, width), moving average of the features of each predicted class
    sums: Tensor  # (classes, width), of the features since the last update
    counts: Tensor  # (classes, 1), their number
    source_means: Tensor
    source_variances: Tensor
    source_known: Tensor  # (classes, 1), whether the source has two images or more of it

    @classmethod
    def source_needs(cls, model: nn.Module, config: PeTTAConfig) -> list[Need]:
        return [Need("class_gaussians", (taps.head(model),), settings={"covariance": "diagonal"})]

    def configure_model(self) -> None:
        config, (known,) = self.config, self.known
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            layer.requires_grad_(True)
        norms.blend_statistics(self.model, config.bn_momentum, norms.RobustBatchNorm)
        self.teacher, self.anchor = ema.frozen_copy(self.model), ema.frozen_copy(self.model)
        self.memory = memory.BalancedMemory(config.memory_size, config.lambda_t, config.lambda_u)
        self._head = taps.head(self.teacher)
        count = known["class_count"][:, None]
        self.register_buffer("source_means", known["class_mean"])
        self.register_buffer("source_variances", known["class_covariance"] * count / (count - 1).clamp(min=1))
        self.register_buffer("source_known", count > 1)
        self.register_buffer("means", known["class_mean"].clone())
        self.register_buffer("sums", torch.zeros_like(self.means))
        self.register_buffer("counts", torch.zeros_like(count))

    def predict(self, x: Tensor) -> Tensor:
        """The teacher's logits."""
        return logits_of(self.teacher(x))

    def predicting_model(self) -> nn.Module:
        """The teacher."""
        return self.teacher

    def adapt(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features, logits = taps.look(self.teacher, self._head, x)
        member = F.one_hot(logits.argmax(1), logits.shape[1]).float()
        for part, due in offered(self.memory, x, logits, self.config.update_frequency, self.input_finite):
            self.sums += matmul(member[part].T, features[part])
            self.counts += member[part].sum(0)[:, None]
            if due:
                self._learn(self._divergence())
        return logits

    @torch.no_grad()
    def _divergence(self) -> Tensor:
        """Drift of the classes met since the last update, in [0, 1]; their averages then take in the features."""
        met = (self.counts > 0) & self.source_known
        shift = (self.means - self.source_means).square() / (self.source_variances + 1e-6)
        divergence = 1 - (-torch.where(met, shift, 0).sum() / (met.sum() * shift.shape[1]).clamp(min=1)).exp()
        new = torch.lerp(self.means, self.sums / self.counts.clamp(min=1), self.config.nu)
        self.means.copy_(torch.where(met, new, self.means))
        self.sums.zero_()
        self.counts.zero_()
        return divergence

    def _learn(self, divergence: Tensor) -> None:
        """Update the student on the memory, then the teacher; both less free the further the features have drifted."""
        config = self.config
        samples, _ = self.memory.contents()
        view = augment.augmentation(config.augment, self.generator)
        held = config.lambda_0 * (divergence if config.adaptive_lambda else 1.0)
        share = config.alpha_0 * (1 - divergence if config.adaptive_alpha else torch.ones_like(divergence))
        for _ in range(config.steps):
            with torch.no_grad(), norms.remembering(self.teacher), norms.remembering(self.anchor):
                targets, anchored = self.predict(samples), logits_of(self.anchor(samples))
            with norms.remembering(self.model):  # both passes move the statistics, whichever the loss takes
                logits, viewed = logits_of(self.model(samples)), logits_of(self.model(view(samples)))
            loss = soft_cross_entropy(viewed, targets)
            if config.loss_func == "sce":
                loss = (symmetric_cross_entropy(logits, targets) + symmetric_cross_entropy(viewed, targets)) / 2
            loss = loss + config.anchor_weight * soft_cross_entropy(viewed, anchored)
            made = self.update(loss.mean() + held * self._distance())
            ema.follow(self.teacher, self.model, share, when=made)

    def _distance(self) -> Tensor:
        """Mean over the adapted tensors of their distance from the source."""
        pairs = zip(*self.adapted_and_source(), strict=True)
        if self.config.regularizer == "cosine":
            distances = [-F.cosine_similarity(p.flatten(), source.flatten(), dim=0) for p, source in pairs]
        else:
            distances = [(p - source).square().sum() for p, source in pairs]
        return torch.stack(distances).mean() * (self.config.regularizer != "none")
