"""Prompts whose first words are vectors that can be learned, one sentence for each class."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta.messages import require
from tta.towers.two_towers import AT_ONCE, TwoTowers

CONTEXT = "a photo of a"


class Prompts(nn.Module):
    """The sentences ``CONTEXT NAME.`` of all classes, in which vectors take the place of the context's tokens.

    Begin, name, full stop, end and padding stay as they are, and a text ends where the class's own sentence does. The templates
    of the model are not used.

    Zhou et al., "Learning to Prompt for Vision-Language Models", IJCV 2022.

    Args:
        towers: the model; only read.
        context: the words that the vectors start from.

    Attributes:
        ids: (classes, length), tokens of the sentences.
        start: place of the first vector in a sentence.
        initial: (tokens, token width), the vectors of the context's own tokens.

    Raises:
        ValueError: the context has no token that all sentences share.
    """

    ids: Tensor
    initial: Tensor

    def __init__(self, towers: TwoTowers, context: str = CONTEXT) -> None:
        super().__init__()
        alone, nothing = towers.tokenize([context])[0], towers.tokenize([""])[0]
        ids = towers.tokenize([f"{context} {word}." for word in towers.words])
        self.start = _common(alone, nothing)
        end = min(_common(alone, row) for row in ids)
        require(end > self.start, f"context={context!r}", "words that begin the sentence of every class")
        self.register_buffer("ids", ids)
        with torch.no_grad():
            self.register_buffer("initial", towers.embed(ids[:1])[0, self.start : end].float().clone())

    def features(self, towers: TwoTowers, contexts: Tensor) -> Tensor:
        """Text features of all classes, of unit length; gradients reach the contexts.

        The text tower reads all prompts in one forward, or :data:`AT_ONCE` of them where no gradient is needed.

        Args:
            towers: the model.
            contexts: (tokens, token width) -> (classes, width), or several, (prompts, tokens, token width) -> (prompts,
                classes, width).
        """
        several = contexts if contexts.dim() == 3 else contexts[None]
        prompts, classes = len(several), len(self.ids)
        own = towers.embed(self.ids).detach().expand(prompts, -1, -1, -1)
        given = several[:, None].expand(-1, classes, -1, -1).to(own.dtype)
        before, after = own[:, :, : self.start], own[:, :, self.start + given.shape[2] :]
        embeddings, ids = torch.cat([before, given, after], dim=2).flatten(0, 1), self.ids.repeat(prompts, 1)
        at_once = len(ids) if torch.is_grad_enabled() else AT_ONCE
        parts = zip(torch.split(ids, at_once), torch.split(embeddings, at_once), strict=True)
        found = F.normalize(torch.cat([towers.text_features(*part) for part in parts]), dim=-1)
        return found.view(prompts, classes, -1) if contexts.dim() == 3 else found


def _common(first: Tensor, second: Tensor) -> int:
    """Number of tokens at the beginning of two texts that are the same."""
    length = min(len(first), len(second))
    return int((first[:length] == second[:length]).long().cumprod(0).sum())
