"""SHOT: source hypothesis transfer, its information maximisation made online."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tta.adapter import require
from tta.functional import entropy
from tta.methods._finetuning import FineTuner, FineTuningConfig


@dataclass
class SHOTConfig(FineTuningConfig):
    """The paper is offline; the defaults are those of a later online benchmark, without Nesterov's momentum.

    Attributes:
        parameters: those that learn: ``"features"`` (all but the head, as in the paper) or ``"norm"`` (the affine parameters of
            the normalisation layers).
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    parameters: Literal["features", "norm"] = "features"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.parameters in ("features", "norm"), f"parameters={self.parameters!r}", "'features' or 'norm'")


class SHOT(FineTuner):
    """Make each prediction sure and the predictions of a batch diverse, before a head that stays as it is.

    Liang et al., "Do We Really Need to Access the Source Data? Source Hypothesis Transfer for Unsupervised Domain
    Adaptation", ICML 2020: only the information maximisation, one step per batch (SHOT-IM).

    Three published online recipes differ in all three settings: the default is TTAB's, that of T3A's authors is
    ``statistics="source"``, that of LAME's ``parameters="norm", statistics="mixed", score="after"``. The diversity is
    the batch's: it hurts where batches are small or hold few classes. A single image teaches nothing.
    """

    needs = "one class and one feature vector an image"
    config: SHOTConfig

    def learn_from(self, logits: Tensor) -> None:
        if len(logits) > 1:
            self.update(entropy(logits).mean() - _diversity(logits))
        else:
            self.nothing_to_learn()


def _diversity(logits: Tensor) -> Tensor:
    """Entropy of the batch's mean prediction, a scalar in nats."""
    mean = logits.softmax(1).mean(0)
    return -(mean * (mean + 1e-5).log()).sum()
