"""SHOT: source hypothesis transfer, its information maximisation made online."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy


@dataclass
class SHOTConfig(OptimizerConfig):
    """The paper is offline; the defaults are those of a later online benchmark, without Nesterov's momentum.

    Attributes:
        parameters: those that learn: ``"features"`` (all but the head, as in the paper) or ``"norm"`` (the affine parameters of
            the normalisation layers).
        statistics: those that BatchNorm layers normalise by: the ``"batch"``'s, the ``"source"``'s, or, ``"mixed"``, the batch's
            in a step and the source's in every other prediction.
        score: logits that are scored: those of the forward ``"before"`` the step or of a second one ``"after"`` it.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    parameters: Literal["features", "norm"] = "features"
    statistics: Literal["batch", "source", "mixed"] = "batch"
    score: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.parameters in ("features", "norm"), f"parameters={self.parameters!r}", "'features' or 'norm'")
        known = self.statistics in ("batch", "source", "mixed")
        require(known, f"statistics={self.statistics!r}", "'batch', 'source' or 'mixed'")
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")


class SHOT(Adapter):
    """Make each prediction sure and the predictions of a batch diverse, before a head that stays as it is.

    Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
    Adaptation", ICML 2020: only the information maximisation, one step per batch (SHOT-IM).

    Three published online recipes differ in all three settings: the default is TTAB's, that of T3A's authors is
    ``statistics="source"``, that of LAME's ``parameters="norm", statistics="mixed", score="after"``. The diversity is
    the batch's: it hurts where batches are small or hold few classes. A single image teaches nothing.
    """

    needs = "one class and one feature vector an image"
    config: SHOTConfig

    def configure_model(self) -> None:
        taps.unfreeze(self.model, self.config.parameters)
        if self.config.statistics == "batch":
            for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS):
                norms.use_batch_statistics(layer)
        self.scored_forward = self.config.score

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            with norms.by_batch(self.model) if self.config.statistics == "mixed" else nullcontext():
                logits = self.predict(x)
            if len(x) > 1:
                self.update(entropy(logits).mean() - _diversity(logits))
            else:
                self.nothing_to_learn()
        if self.config.score == "before":
            return logits
        with torch.no_grad():
            return self.predict(x)


def _diversity(logits: Tensor) -> Tensor:
    """Entropy of the batch's mean prediction, a scalar in nats."""
    mean = logits.softmax(1).mean(0)
    return -(mean * (mean + 1e-5).log()).sum()
