"""RDumb: ETA that starts over from the source at fixed intervals."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy, followed, masked_mean, reliable, rows, unlike


@dataclass
class RDumbConfig(OptimizerConfig):
    """Adam 1e-3 and the margins are what a later benchmark uses on CIFAR; the paper has ImageNet only.

    Attributes:
        reset_every: batches between two returns to the source model.
        e_margin: entropy in nats above which a sample is unreliable; None for 0.4 ln(classes).
        d_margin: cosine similarity with the average prediction above which a sample is redundant, in (0, 1].
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    reset_every: int = 1000
    e_margin: float | None = None
    d_margin: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.reset_every >= 1, f"reset_every={self.reset_every}", "1 batch or more")
        require(self.e_margin is None or self.e_margin > 0, f"e_margin={self.e_margin}", "an entropy above 0")
        require(0 < self.d_margin <= 1, f"d_margin={self.d_margin}", "a cosine similarity in (0, 1]")


class RDumb(Adapter):
    """Entropy minimisation on reliable and non-redundant samples, and a return to the source at fixed intervals.

    Press et al., "RDumb: A simple approach that questions our progress in continual test-time adaptation", NeurIPS 2023.

    It learns as ETA does (see ``eata``). The return also empties the optimizer and the average prediction: it limits how
    far any stream can lead the model away. Scored are the logits before the step.
    """

    tasks = ("classification", "segmentation")
    config: RDumbConfig
    batches: Tensor
    average: Tensor | None

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64, device=self.device))
        self.register_buffer("average", None)  # (classes,), of the predictions that taught; zeros while there are none

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            samples = rows(logits)  # the pixels of a map are samples too
            entropies = entropy(samples)
            e_margin = self.config.e_margin or 0.4 * math.log(samples.shape[1])
            with torch.no_grad():
                probabilities = samples.softmax(1)
                if self.average is None:
                    self.average = torch.zeros_like(probabilities[0])
                chosen = reliable(entropies, e_margin) & unlike(probabilities, self.average, self.config.d_margin)
                weights = (e_margin - entropies).exp()
            self.update(masked_mean(weights * entropies, chosen), when=chosen.any())
            self.average = followed(self.average, probabilities, chosen & self.input_finite)
        self.batches += self.input_finite
        due = self.batches % self.config.reset_every == 0
        self.restore(due)
        assert self.average is not None
        self.average = self.average.masked_fill(due, 0)
        return logits
