"""TPT: test-time prompt tuning."""

from dataclasses import dataclass

from tta.methods._tuning import PromptTuner, PromptTunerConfig


@dataclass
class TPTConfig(PromptTunerConfig):
    """The defaults are the paper's, the same for all its benchmarks; views are AugMix's for the fine-grained sets alone."""


class TPT(PromptTuner):
    """For each image, tune the words before the class names until its surest views agree; predict it; forget.

    Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models", NeurIPS 2022.

    For a vision-language model, see :class:`tta.TwoTowers`. Learned are the token vectors of "a photo of a", which all classes
    share; the loss is the entropy of the mean probability of the surest views, chosen before the first step. Scored is the image
    itself after the step. The text tower runs forward and backward once a step for all classes.
    """

    config: TPTConfig
