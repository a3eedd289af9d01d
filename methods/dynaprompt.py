"""DynaPrompt: a buffer of prompts that are tuned over the stream."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from tta.adapter import require
from tta.functional import entropy, entropy_of_mean
from tta.methods._tuning import PromptTunerConfig
from tta.methods._views import Seen, TwoTowersAdapter
from tta.towers import Prompts


@dataclass
class DynaPromptConfig(PromptTunerConfig):
    """The defaults are the released code's for ImageNet and its variants.

    Attributes:
        prompts: number of prompts in the buffer.
        rule: which prompts an image tunes: ``"released"``, as the released code does, or ``"paper"``: those that are surer
            of the image than the initial prompt and more upset by its views, else a new one. On corrupted digits the paper's
            rule tunes prompts that are too sure again and again: its error is twice that of ``tpt``.
        wipe: once all prompts were used, the one that was not used for longest starts anew at each image, as published; with
            the released rule only.
        initial_residuals: (prompts, tokens, token width), what the prompts start with beside the context; None for zeros.
    """

    prompts: int = 12
    rule: Literal["released", "paper"] = "released"
    wipe: bool = True
    initial_residuals: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.prompts >= 1, f"prompts={self.prompts}", "1 or more")


class DynaPrompt(TwoTowersAdapter):
    """Tune, for each image, those prompts of a buffer that suit it; they are kept for the images that follow.

    Xiao et al., "DynaPrompt: Dynamic Test-Time Prompt Tuning", ICLR 2025.

    For a vision-language model, see :class:`tta.TwoTowers`. Learned are differences from the token vectors of "a photo of a"; the
    loss is that of ``tpt``, in the mean over the chosen prompts. Scored is the image itself after the step. Under the
    released rule nearly every image ends up with one fresh prompt, so that it is nearly ``tpt``. Which prompts are tuned is
    decided on the host, which waits for the device. A prediction while paused is that of the class names: which prompts suit an
    image is known only when it tunes them.
    """

    config: DynaPromptConfig
    scored_forward = "after"
    order: Tensor  # numbers of the prompts, the one not used for longest first
    used: Tensor  # times that each was tuned since it started anew

    def configure_model(self) -> None:
        super().configure_model()
        number = self.config.prompts
        self.prompts = Prompts(self.towers, self.config.context)
        residuals = torch.zeros(number, *self.prompts.initial.shape)
        if self.config.initial_residuals is not None:
            given = torch.as_tensor(self.config.initial_residuals).float()
            require(
                given.shape == residuals.shape,
                f"initial_residuals of shape {tuple(given.shape)}",
                f"{tuple(residuals.shape)}",
            )
            residuals = given.clone()
        self.residuals = nn.Parameter(residuals.to(self.device))
        self.register_buffer("order", torch.arange(number))
        self.register_buffer("used", torch.zeros(number, dtype=torch.int64))

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        return [self.residuals]

    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._tuned(image) for image in self.seen(x)])

    def _tuned(self, image: Seen) -> Tensor:
        if not self.input_finite:
            return image.logits[0]
        chosen = self._chosen_as_released(image) if self.config.rule == "released" else self._chosen_as_in_paper(image)
        self._note(chosen)
        for _ in range(self.config.steps):
            logits = self._logits(image.features, self.residuals[chosen])  # (chosen, views, classes)
            unsure = _entropies(logits.detach()).mean(0)
            kept = unsure.argsort(stable=True)[: max(1, int(len(unsure) * self.config.selection))]
            self.update(torch.stack([entropy_of_mean(of_prompt[kept]) for of_prompt in logits]).mean())
        self.restart_optimizer()
        with torch.no_grad():
            return self._logits(image.features[:1], self.residuals[chosen]).mean(0)[0]

    def _logits(self, features: Tensor, residuals: Tensor) -> Tensor:
        """(prompts, views, classes) of prompts that differ by these from the context."""
        classes = self.prompts.features(self.towers, self.prompts.initial + residuals)
        return self.towers.logits(features, classes)

    # ------------------------------------------------------------------ which prompts

    @torch.no_grad()
    def _chosen_as_released(self, image: Seen) -> list[int]:
        oldest = int(self.order[0])
        if self.config.wipe and bool((self.used > 0).all()):
            self._start_anew(oldest)
        unsure, upset = self._judged(image, self.residuals, lambda logits: logits)
        # Fresh prompts are equal: how topk orders them decides which one is tuned, as published.
        by_entropy, by_upset = (values.topk(len(values)).indices.tolist() for values in (unsure, upset))
        rank = by_entropy.index(oldest)
        # The rank in one order is the length of a list in the other, and numbers of prompts are taken for places: as released.
        surer = by_entropy[min(rank + 1, len(by_entropy) - 1) :]
        return [by_entropy[place] for place in sorted({*surer} & {*by_upset[:rank]})] + [oldest]

    @torch.no_grad()
    def _chosen_as_in_paper(self, image: Seen) -> list[int]:
        untouched = torch.zeros_like(self.residuals[:1])
        unsure, upset = self._judged(image, torch.cat([self.residuals, untouched]), lambda logits: logits.softmax(-1))
        suits = (unsure[:-1] < unsure[-1]) & (upset[:-1] > upset[-1]) & (self.used > 0)
        if chosen := suits.nonzero()[:, 0].tolist():
            return chosen
        empty = (self.used == 0).nonzero()[:, 0].tolist()
        new = empty[0] if empty else int(self.order[0])
        self._start_anew(new)
        return [new]

    def _judged(self, image: Seen, residuals: Tensor, height: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Of each prompt: mean entropy over the views, and how much higher its answer to the image is than to the views."""
        logits = self._logits(image.features, residuals)
        highest = height(logits).amax(-1)  # (prompts, views)
        return _entropies(logits).mean(1), (highest[:, :1] - highest[:, 1:]).mean(1).nan_to_num()

    def _start_anew(self, number: int) -> None:
        self.residuals[number] = 0
        self.used[number] = 0

    def _note(self, chosen: list[int]) -> None:
        """Move the chosen prompts to the end of the order, and count them."""
        order = self.order.tolist()
        for number in chosen:
            order.append(order.pop(order.index(number)))
            self.used[number] += 1
        self.order.copy_(torch.tensor(order))


def _entropies(logits: Tensor) -> Tensor:
    """Entropies, in nats, of each prompt's prediction of each view: (prompts, views, classes) -> (prompts, views)."""
    return entropy(logits.flatten(0, 1)).view(logits.shape[:2])
