"""Prompts tuned for one image after another: shared by TPT and the methods that follow it."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from tta.adapter import OptimizerConfig
from tta.functional import entropy_of_mean
from tta.methods._views import Seen, TwoTowersAdapter, ViewsConfig, selection_fits
from tta.towers import Prompts


@dataclass
class PromptTunerConfig(ViewsConfig, OptimizerConfig):
    """Settings of prompt tuning; the defaults are those of TPT's released code.

    Attributes:
        context: words before the class names, whose token vectors are learned.
        selection: share of the views that are learned from, those of lowest entropy.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adamw"
    lr: float = 5e-3
    weight_decay: float = 0.01
    context: str = "a photo of a"
    selection: float = 0.1

    def __post_init__(self) -> None:
        ViewsConfig.__post_init__(self)
        OptimizerConfig.__post_init__(self)
        selection_fits(self.selection)


class PromptTuner(TwoTowersAdapter):
    """An adapter that learns the token vectors of a prompt's context for each image, from the same start.

    The prompt is ``CONTEXT NAME.``, whatever the templates of the model. As nothing is kept, a prediction while paused is that of
    the class names.
    """

    config: PromptTunerConfig
    scored_forward = "after"

    def configure_model(self) -> None:
        super().configure_model()
        self.prompts = Prompts(self.towers, self.config.context)
        self.context = nn.Parameter(self.prompts.initial.clone())

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        return [self.context]

    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._tuned(image) for image in self.seen(x)])

    def _tuned(self, image: Seen) -> Tensor:
        """Logits of the image after the steps; afterwards all is as before it."""
        for step in range(self.config.steps):
            classes = self.prompts.features(self.towers, self.context)
            logits = self.towers.logits(image.features, classes)
            if step == 0:
                kept = Seen(image.features, logits.detach()).surest(self.config.selection)
            self.update(self.loss(logits[kept], classes))
        with torch.no_grad():
            found = self.towers.logits(image.features[:1], self.prompts.features(self.towers, self.context))[0]
            self.context.copy_(self.prompts.initial)
        self.restart_optimizer()
        return found

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """Loss of a step, a scalar: the entropy of the mean prediction of the kept views.

        Args:
            logits: (views, classes), of the kept views.
            classes: (classes, width), unit text features that they were computed with.
        """
        return entropy_of_mean(logits)
