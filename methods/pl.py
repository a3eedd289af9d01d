"""Pseudo-label: learn what the model itself predicts."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn import functional as F

from tta.adapter import require
from tta.functional import masked_mean, rows
from tta.methods._finetuning import FineTuner, FineTuningConfig


@dataclass
class PLConfig(FineTuningConfig):
    """The defaults are the settings of Tent, as in the code released with NOTE: Adam 1e-3, every sample teaches.

    Attributes:
        threshold: only samples whose highest probability is above it teach, in [0, 1); 0.9 is usual.
        parameters: those that learn: ``"norm"`` (the affine parameters of the normalisation layers), ``"head"`` (the final
            linear layer) or ``"all"``.
    """

    threshold: float = 0.0
    parameters: Literal["norm", "head", "all"] = "norm"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 <= self.threshold < 1, f"threshold={self.threshold}", "a probability in [0, 1)")
        require(
            self.parameters in ("norm", "head", "all"), f"parameters={self.parameters!r}", "'norm', 'head' or 'all'"
        )


class PL(FineTuner):
    """Minimise the cross-entropy to the predicted class, on the samples that the model is sure of.

    Lee, "Pseudo-Label: The Simple and Efficient Semi-Supervised Learning Method for Deep Neural Networks", ICML
    workshop 2013; at test time it is the baseline of many papers, in recipes that differ.

    The default is that of NOTE's authors. Of T3A's authors: ``threshold=0.9, statistics="source"`` with ``parameters``
    ``"all"`` or ``"head"``. Of LAME's: ``threshold=0.9, statistics="mixed", score="after"``. A batch without a sure
    sample makes no step (the code of T3A lets Adam drift on).
    """

    tasks = ("classification", "segmentation")
    config: PLConfig

    def learn_from(self, logits: Tensor) -> None:
        samples = rows(logits)  # the pixels of a map are samples too
        confidence, labels = samples.detach().softmax(1).max(1)
        chosen = confidence > self.config.threshold
        loss = masked_mean(F.cross_entropy(samples, labels, reduction="none"), chosen)
        self.update(loss, when=chosen.any())
