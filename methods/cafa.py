"""CAFA: class-aware feature alignment, reconstructed."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import matmul
from tta.source import Need


@dataclass
class CAFAConfig(OptimizerConfig):
    """The paper's constants could not be read: the optimizer is Tent's for CIFAR, Adam 1e-3.

    Attributes:
        shrinkage: share of the mean variance in the covariance of the features within a class.
        labelled: the source images come with labels, as in the paper; else classes are those that the model predicts.
        source_batch_size: source images per batch; it does not change the statistics.
    """

    shrinkage: float = 0.1
    labelled: bool = False
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.shrinkage <= 1, f"shrinkage={self.shrinkage}", "a share above 0, up to 1")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 or more")


class CAFA(Adapter):
    """Bring each feature nearer to the source's Gaussian of its predicted class than to those of the other classes.

    Jung et al., "CAFA: Class-Aware Feature Alignment for Test-Time Adaptation", ICCV 2023.

    A reconstruction from the abstract and what others wrote about it: neither code nor constants could be read, so expect
    other numbers. The loss is the mean logarithm of two Mahalanobis distances, to the predicted class and to
    the others together; one covariance, that within the classes, is used for all of them. The affine parameters
    of the normalisation layers adapt; BatchNorm layers normalise by the batch. Scored are the logits before the step.
    """

    needs = "one class and one feature vector an image"
    config: CAFAConfig
    class_mean: Tensor  # (classes, width), whitened
    whitening: Tensor  # (width, width)
    present: Tensor  # (classes,), boolean: the source has images of the class

    @classmethod
    def source_needs(cls, model: nn.Module, config: CAFAConfig) -> list[Need]:
        settings = {"covariance": "none"}
        return [Need("class_gaussians", (taps.head(model),), labels=config.labelled, settings=settings)]

    def configure_model(self) -> None:
        self._head = taps.head(self.model)
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        (known,) = self.known
        share = known["class_count"] / known["class_count"].sum()
        centred = known["class_mean"] - known["mean"]
        between = matmul(centred.T * share, centred)  # covariance of the class means
        within = known["covariance"] - between
        mean_variance = within.diagonal().mean()
        within = (1 - self.config.shrinkage) * within + self.config.shrinkage * mean_variance * torch.eye(
            len(within), device=self.device
        )
        whitening = torch.linalg.inv(torch.linalg.cholesky(within)).T
        self.register_buffer("whitening", whitening)
        self.register_buffer("class_mean", matmul(known["class_mean"], whitening))
        self.register_buffer("present", known["class_count"] > 0)

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            features, logits = taps.look(self.model, self._head, x)
            whitened = matmul(features, self.whitening)
            distances = (whitened[:, None] - self.class_mean).square().sum(2) + 1e-6  # Mahalanobis, (batch, classes)
            own = distances.gather(1, logits.argmax(1, keepdim=True))[:, 0]
            others = (distances * self.present).sum(1) - own * self.present[logits.argmax(1)]
            sound = self.present[logits.argmax(1)] & (others > 0)
            losses = own.log() - others.clamp(min=1e-6).log()
            self.update((losses * sound).sum() / sound.sum().clamp(min=1), when=sound.any())
        return logits
