"""Label shift: correct the predictions by the classes that the stream shows, by a rule or a network trained for it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tta import norms, taps
from tta.adapter import Adapter, Config, require
from tta.source import Need, ShiftNetwork, bounded


@dataclass
class LabelShiftConfig(Config):
    """The constants are ours.

    Attributes:
        rate: share of a batch's mean prediction in the moving average that estimates the stream's class frequencies.
        strength: of the correction, in [0, 1]; 0 is none.
        batch_statistics: BatchNorm layers normalise by the batch, else by the source's statistics.
        learned: a network trained on labelled source images corrects instead of the rule; ``strength`` is 1 then.
        hidden: width of that network.
        iterations: of its training.
        source_batch_size: source images per batch; BatchNorm layers normalise by it where the network is trained.
    """

    rate: float = 0.1
    strength: float = 1.0
    batch_statistics: bool = True
    learned: bool = False
    hidden: int = 64
    iterations: int = 2000
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        require(0 < self.rate <= 1, f"rate={self.rate}", "a share above 0, up to 1")
        require(0 <= self.strength <= 1, f"strength={self.strength}", "0 to 1")
        half = self.learned and self.strength != 1
        require(not half, f"strength={self.strength} with learned=true", "1, as the network corrects all at once")
        for name in ("hidden", "iterations", "source_batch_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class LabelShift(Adapter):
    """Add to the logits how much more frequent a class is in the stream than it was in the source.

    The correction of Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities: A Simple
    Procedure", Neural Computation 2002, with a moving average of the predictions for the stream's frequencies. It is
    the baseline of the label shift adapter (Park et al., "Label Shift Adapter for Test-Time Adaptation under Covariate
    and Label Shifts", ICCV 2023). ``learned=true`` is a reconstruction of that adapter from its abstract and what others
    wrote about it, with our own constants, for the source model: see :class:`tta.source.shift.ShiftNetwork`. It learns
    little from a model that is sure of all its source images: digits-c with ``protocol=label-shift`` has an error of 59.8 % by
    ``norm``, 58.8 by the rule and 59.6 learned. On a stream in the order of its classes the average follows the present
    class, which looks like a large gain.

    ``source=`` gives source images, whose predicted classes give the source's frequencies; with ``learned`` they
    come with their labels.
    """

    needs = "one class and one feature vector an image"
    config: LabelShiftConfig
    source_prior: Tensor
    stream_prior: Tensor

    @classmethod
    def source_needs(cls, model: nn.Module, config: LabelShiftConfig) -> list[Need]:
        head = taps.head(model)
        if not config.learned:
            return [Need("class_moments", (head,))]
        statistics: Literal["batch", "source"] = "batch" if config.batch_statistics else "source"
        settings = {"hidden": config.hidden, "iterations": config.iterations}
        size = config.source_batch_size if config.batch_statistics else None
        return [Need("shift_network", (head,), statistics, batch_size=size, labels=True, settings=settings)]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS) if self.config.batch_statistics else ():
            norms.use_batch_statistics(layer)
        self._head = taps.head(self.model)
        known = dict(self.known[0])
        prior = bounded(known.pop("prior"))
        self.network = ShiftNetwork.of(known).requires_grad_(False) if self.config.learned else None
        self.register_buffer("source_prior", prior)
        self.register_buffer("stream_prior", torch.full_like(prior, 1 / len(prior)))

    def predict(self, x: Tensor) -> Tensor:
        return self._corrected(*taps.look(self.model, self._head, x))

    def adapt(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            features, logits = taps.look(self.model, self._head, x)
            # of uncorrected logits: corrected ones would confirm themselves
            moved = torch.lerp(self.stream_prior, logits.softmax(1).mean(0), self.config.rate)
            self.stream_prior.copy_(torch.where(moved.isfinite().all() & self.input_finite, moved, self.stream_prior))
            return self._corrected(features, logits)

    def _corrected(self, features: Tensor, logits: Tensor) -> Tensor:
        prior = bounded(self.stream_prior)
        if self.network is not None:
            corrected: Tensor = self.network(features, prior, self.model.get_submodule(self._head))
            return corrected
        return logits + self.config.strength * (prior.log() - self.source_prior.log())
