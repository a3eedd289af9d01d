"""Chain: labels may stay from one image to the next, around any method: ``chain:tent``."""

from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from tta.adapter import Adapter, Config, Output, config_class, require
from tta.methods._chain import LabelChain


@dataclass
class StickinessConfig(Config):
    """Settings that the chain adds to those of the method it wraps. The constants are ours.

    Attributes:
        evidence_for: standard errors by which neighbouring predictions must agree more than in a random order.
        chain_memory: images over which the counts of labels that stayed and jumped fade by half.
    """

    evidence_for: float = 3.5
    chain_memory: int = 64

    def __post_init__(self) -> None:
        after: Any = getattr(super(), "__post_init__", lambda: None)
        after()  # that of the wrapped method's settings
        require(self.evidence_for > 0, f"evidence_for={self.evidence_for}", "standard errors above 0")
        require(self.chain_memory >= 1, f"chain_memory={self.chain_memory}", "1 or more images")


@dataclass
class ChainConfig(StickinessConfig):
    """Settings of the chain around the source model."""


class Chain(Adapter):
    """Answer by the posterior of a sticky chain of labels, where the stream's order shows that labels stay.

    Rabiner, "A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition", Proceedings of the IEEE
    1989.

    ``chain:tent`` is Tent with it; alone, it is around the source model. The method learns as without it, only its answers
    change: a label stays from one image to the next, or is drawn anew. Forward-backward gives the posterior of each
    label given all images of the batch, EM the chain's probabilities. Where a permutation test finds no sign that labels stay, or
    class frequencies of the batch explain it better, the method's own logits are the answer. Else they are
    log-probabilities.

    It lives on runs of equal labels, and looks at the later images of a batch: what it gains on a stream in the order of its
    classes says nothing about a shuffled one, where it changes nothing.
    """

    needs = "one class an image, a link of its chain"
    config: ChainConfig
    multi_label = False
    tasks = ("classification",)  # the chain is of one label an image, whatever the wrapped method serves
    wrapped: ClassVar[type[Adapter] | None] = None

    def configure_model(self) -> None:
        super().configure_model()  # that of the wrapped method
        self.labels_chain = LabelChain(self.config.evidence_for, self.config.chain_memory)
        self._inside = False  # while the wrapped method learns, predict() is its own

    def predict(self, x: Tensor) -> Tensor:
        logits = super().predict(x)
        if self._inside:
            return logits
        found = self.labels_chain.read(logits)
        return torch.where(found.sticky, found.chained, logits)

    def predicting_model(self) -> nn.Module:
        raise ValueError(
            "The chain answers by the images before and after one, which no plain model does. Export the method that it wraps."
        )

    def adapt(self, x: Tensor) -> Tensor | Output:
        self._inside = True
        try:
            output = super().adapt(x) if self.wrapped else self.predict(x)
        finally:
            self._inside = False
        logits = output.logits if isinstance(output, Output) else output
        found = self.labels_chain.read(logits)
        self.labels_chain.remember(found, self.input_finite)
        answer = torch.where(found.sticky, found.chained, logits.detach().float())
        return Output(answer, output.outlier_score) if isinstance(output, Output) else answer


@cache
def wrap(method: type[Adapter]) -> type[Adapter]:
    """The method, its answers those of the chain.

    Raises:
        ValueError: the method is the chain itself.
    """
    if issubclass(method, Chain):
        raise ValueError("The chain is around a method once; got chain:chain.")
    name = f"Chain{method.__name__}"
    settings = config_class(method)
    config: Any = dataclass(type(f"{name}Config", (StickinessConfig, settings), {"__doc__": settings.__doc__}))
    inside = {
        "__doc__": f"{method.__name__}, its answers those of a sticky chain of labels.",
        "__module__": Chain.__module__,
        "__annotations__": {"config": config},
        "scored_forward": method.scored_forward,
        "wrapped": method,
    }
    return type(name, (Chain, method), inside)
