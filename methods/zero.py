"""ZERO: votes of the surest views, at a temperature of zero."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tta.methods._views import Seen, TwoTowersAdapter, ViewsConfig, selection_fits


@dataclass
class ZEROConfig(ViewsConfig):
    """The defaults are the paper's, the same for all its benchmarks.

    Attributes:
        selection: share of the views that vote, those of lowest entropy.
    """

    selection: float = 0.3

    def __post_init__(self) -> None:
        super().__post_init__()
        selection_fits(self.selection)


class ZERO(TwoTowersAdapter):
    """Let the surest views of an image vote for its class; no gradient, no memory.

    Farina et al., "Frustratingly Easy Test-Time Adaptation of Vision-Language Models", NeurIPS 2024.

    For a vision-language model, see :class:`tta.TwoTowers`. Of tied classes the one wins that the surest of the other views
    votes for; if none votes for one of them, the surest view of all decides by its logits (the released code leaves out one
    wrong class there, and any other may win). Returned are the numbers of votes, whose softmax is no probability.
    """

    config: ZEROConfig
    returns_logits = False

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._votes(image) for image in self.seen(x)])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Votes of views, drawn without moving the generator on."""
        return torch.stack([self._votes(image) for image in self.seen(x, self.copied_generator())])

    def _votes(self, image: Seen) -> Tensor:
        order, kept = image.surest(1.0), len(image.surest(self.config.selection))
        logits = image.logits[order]  # the surest view first
        ballots = F.one_hot(logits.argmax(1), logits.shape[1]).to(logits.dtype)  # (views, classes)
        votes = ballots[:kept].sum(0)
        tied = votes == votes.max()
        return votes + torch.where(tied.sum() > 1, self._casting(logits[0], ballots[kept:], tied), 0)

    @staticmethod
    def _casting(surest: Tensor, others: Tensor, tied: Tensor) -> Tensor:
        """One more vote for one of the tied classes, (classes,).

        Args:
            surest: (classes,), logits of the surest view of all.
            others: (views, classes), ballots of the views that did not vote, the surest first.
            tied: (classes,), boolean.
        """
        by_logits = F.one_hot(surest.masked_fill(~tied, -torch.inf).argmax(), len(tied)).to(others.dtype)
        ballots = torch.cat([others * tied, by_logits[None]])
        first = ballots.any(1).long().argmax(0, keepdim=True)  # of (1,): a scalar as an index would be read on the host
        return ballots[first][0]
