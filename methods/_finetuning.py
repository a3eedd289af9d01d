"""Fine-tuning on the model's own predictions of each batch, in the recipes that papers disagree about: shared by PL and SHOT."""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require


@dataclass
class FineTuningConfig(OptimizerConfig):
    """Settings in which published recipes of one method differ.

    Attributes:
        parameters: those that learn, see :func:`tta.taps.unfreeze`.
        statistics: those that BatchNorm layers normalise by: the ``"batch"``'s, the ``"source"``'s, or, ``"mixed"``, the batch's
            in a step and the source's in every other prediction.
        score: logits that are scored: those of the forward ``"before"`` the step or of a second one ``"after"`` it.
    """

    parameters: taps.Part = "norm"
    statistics: Literal["batch", "source", "mixed"] = "batch"
    score: Literal["before", "after"] = "before"

    def __post_init__(self) -> None:
        super().__post_init__()
        known = self.statistics in ("batch", "source", "mixed")
        require(known, f"statistics={self.statistics!r}", "'batch', 'source' or 'mixed'")
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")


class FineTuner(Adapter):
    """An adapter that learns from its own logits of the batch; a method says in :meth:`learn_from` what."""

    config: FineTuningConfig

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
            self.learn_from(logits)
        if self.config.score == "before":
            return logits
        with torch.no_grad():
            return self.predict(x)

    def learn_from(self, logits: Tensor) -> None:
        """Make one step by the logits of the batch, or none."""
        raise NotImplementedError
