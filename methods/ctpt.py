"""C-TPT: calibrated test-time prompt tuning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tta.adapter import require
from tta.methods._tuning import PromptTuner, PromptTunerConfig


@dataclass
class CTPTConfig(PromptTunerConfig):
    """The defaults are the paper's for the fine-grained sets; ImageNet and its variants take 20.

    Attributes:
        dispersion: weight of the mean distance of the classes' text features from their mean, which is made large.
    """

    dispersion: float = 50.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.dispersion >= 0, f"dispersion={self.dispersion}", "a weight of 0 or more")


class CTPT(PromptTuner):
    """Tune the words before the class names as TPT does, and keep the text features of the classes apart.

    Yoon et al., "C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models via Text Feature Dispersion", ICLR 2024.

    For a vision-language model, see :class:`tta.TwoTowers`. Prompts whose text features lie further apart give probabilities
    that are nearer to the share of right answers: it is judged by calibration (``ece``), and its error is about TPT's.
    """

    config: CTPTConfig

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """TPT's entropy, minus the dispersion of the unit text features (classes, width)."""
        distances: Tensor = torch.linalg.vector_norm(classes - classes.mean(0), dim=1)
        return super().loss(logits, classes) - self.config.dispersion * distances.mean()
