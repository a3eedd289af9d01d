"""Outputs of a model: turned into the logits that methods compute with, and back."""

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tta.functional import logits_of
from tta.messages import nearest

Outputs: TypeAlias = Literal["logits", "probabilities", "sigmoid"] | Callable[[Any], Tensor]
KINDS = ("logits", "probabilities", "sigmoid")
SMALLEST = 1e-30  # probability whose logarithm stands for that of 0


class ToLogits:
    """A forward hook that turns a model's output into logits (rows, classes).

    ``"probabilities"`` gives their logarithms, whose softmax they are. ``"sigmoid"`` makes each logit ``z`` of (batch, labels) a
    row ``(0, z)`` of two classes, so that softmax is the sigmoid and the entropy the binary one; :meth:`back` gives ``z``.

    Args:
        kind: one of :data:`KINDS`, or a function of the model's output that returns logits.

    Raises:
        ValueError: another kind.
    """

    def __init__(self, kind: Outputs) -> None:
        if not callable(kind) and kind not in KINDS:
            hint = nearest(str(kind), KINDS)
            raise ValueError(f"outputs is one of {', '.join(KINDS)}, or a function; got {kind!r}.{hint}")
        self.kind = kind
        self.labels = 1

    def __call__(self, model: Any, args: Any, output: Any) -> Tensor | None:
        if callable(self.kind):
            return self.kind(output)
        if self.kind == "logits":
            return None
        values = logits_of(output)
        if self.kind == "probabilities":
            return values.clamp_min(SMALLEST).log()
        self.labels = values.shape[1]
        return torch.stack([torch.zeros_like(values), values], 2).flatten(0, 1)

    def back(self, logits: Tensor) -> Tensor:
        """Logits as the user's model has them: (batch, labels) of ``"sigmoid"`` outputs, else unchanged."""
        return (logits[:, 1] - logits[:, 0]).view(-1, self.labels) if self.kind == "sigmoid" else logits


def problem(logits: Tensor, kind: Outputs) -> str:
    """Sentence on outputs that are taken for logits and look like something else; empty for others."""
    if kind == "logits" and logits.shape[0] > 1 and bool(((logits >= 0) & (logits <= 1)).all()):
        sums = "and sum to 1 " if torch.allclose(logits.sum(1), torch.ones(len(logits)).to(logits), atol=1e-3) else ""
        return (
            f"all outputs of the model lie in [0, 1] {sums}and are taken for logits. If they are probabilities, pass "
            "outputs='probabilities', or 'sigmoid' with the values before a sigmoid: filters and losses are wrong otherwise."
        )
    return ""
