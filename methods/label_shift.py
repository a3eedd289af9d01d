"""Label shift: correct the predictions by the classes that the stream shows, without training."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tta import norms, taps
from tta.adapter import Adapter, Config, require
from tta.source import Need


@dataclass
class LabelShiftConfig(Config):
    """The constants are ours.

    Attributes:
        rate: share of a batch's mean prediction in the moving average that stands for the stream's classes.
        strength: of the correction, in [0, 1]; 0 is none.
        batch_statistics: BatchNorm layers normalise by the batch, else by the source's statistics.
    """

    rate: float = 0.1
    strength: float = 1.0
    batch_statistics: bool = True

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, f"rate={self.rate}", "a share above 0, up to 1")
        require(0 <= self.strength <= 1, f"strength={self.strength}", "0 to 1")


class LabelShift(Adapter):
    """Add to the logits how much more frequent a class is in the stream than it was in the source.

    The correction of Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities", Neural
    Computation 2002, with a moving average of the predictions for the stream's frequencies. It is the baseline of the
    label shift adapter (Park et al., "Label Shift Adapter for Test-Time Adaptation under Covariate and Label Shifts",
    ICCV 2023), whose trained network is not here. On a stream in the order of its classes the average follows the
    present class, which looks like a large gain.

    ``source=`` gives source images, whose predicted classes stand for the source's frequencies.
    """

    config: LabelShiftConfig
    source_prior: Tensor
    stream_prior: Tensor

    @classmethod
    def source_needs(cls, model: nn.Module, config: LabelShiftConfig) -> list[Need]:
        return [Need("class_moments", (taps.head(model),))]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS) if self.config.batch_statistics else ():
            norms.use_batch_statistics(layer)
        prior = self._bounded(self.known[0]["prior"])
        self.register_buffer("source_prior", prior)
        self.register_buffer("stream_prior", torch.full_like(prior, 1 / len(prior)))

    def predict(self, x: Tensor) -> Tensor:
        return self._corrected(super().predict(x))

    def adapt(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits = super().predict(x)  # uncorrected: corrected ones would confirm themselves
            moved = torch.lerp(self.stream_prior, logits.softmax(1).mean(0), self.config.rate)
            self.stream_prior.copy_(torch.where(moved.isfinite().all(), moved, self.stream_prior))
            return self._corrected(logits)

    def _corrected(self, logits: Tensor) -> Tensor:
        ratio = self._bounded(self.stream_prior).log() - self.source_prior.log()
        return logits + self.config.strength * ratio

    def _bounded(self, prior: Tensor) -> Tensor:
        """No class is rarer than a tenth of its equal share."""
        prior = prior.clamp(min=0.1 / len(prior))
        return prior / prior.sum()
