"""Pseudo-label: learn what the model itself predicts."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import masked_mean, rows


@dataclass
class PLConfig(OptimizerConfig):
    """The defaults are the settings of Tent, as in the code released with NOTE: Adam 1e-3, every sample teaches.

    Attributes:
        threshold: only samples whose highest probability is above it teach, in [0, 1); 0.9 is usual.
        parameters: those that learn: ``"norm"`` (the affine parameters of the normalisation layers), ``"head"`` (the final
            linear layer) or ``"all"``.
        statistics: those that BatchNorm layers normalise by: the ``"batch"``'s, the ``"source"``'s, or, ``"mixed"``, the batch's
            in a step and the source's in every other prediction.
        score: logits that are scored: those of the forward ``"before"`` the step or of a second one ``"after"`` it.
    """

    threshold: float = 0.0
    parameters: Literal["norm", "head", "all"] = "norm"
    statistics: Literal["batch", "source", "mixed"] = "batch"
    score: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold < 1, f"threshold={self.threshold}", "a probability in [0, 1)")
        require(
            self.parameters in ("norm", "head", "all"), f"parameters={self.parameters!r}", "'norm', 'head' or 'all'"
        )
        known = self.statistics in ("batch", "source", "mixed")
        require(known, f"statistics={self.statistics!r}", "'batch', 'source' or 'mixed'")
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")


class PL(Adapter):
    """Minimise the cross-entropy to the predicted class, on the samples that the model is sure of.

    Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
    workshop 2013; at test time it is the baseline of many papers, in recipes that differ.

    The default is that of NOTE's authors. Of T3A's authors: ``threshold=0.9, statistics="source"`` with ``parameters``
    ``"all"`` or ``"head"``. Of LAME's: ``threshold=0.9, statistics="mixed", score="after"``. A batch without a sure
    sample makes no step (the code of T3A lets Adam drift on).
    """

    tasks = ("classification", "segmentation")
    config: PLConfig

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
            samples = rows(logits)  # the pixels of a map are samples too
            confidence, labels = samples.detach().softmax(1).max(1)
            chosen = confidence > self.config.threshold
            loss = masked_mean(F.cross_entropy(samples, labels, reduction="none"), chosen)
            self.update(loss, when=chosen.any())
        if self.config.score == "before":
            return logits
        with torch.no_grad():
            return self.predict(x)
