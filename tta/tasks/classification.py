"""Classification: one class an image."""

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from tta.labels import UNKNOWN
from tta.tasks.task import Scored, Tally, Task

if TYPE_CHECKING:
    from torch import Tensor


class Classification(Task):
    """One row of logits an image, scored by the share of wrong classes."""

    name = "classification"
    outputs = "logits (batch, classes)"
    lacking = "this model gives one row of logits an image."
    score_name = "error"
    direction = "down"
    of_classes = True

    def read(self, output: Any, images: "Tensor") -> "Tensor":
        from tta.functional import logits_of

        logits = logits_of(output)
        if logits.dim() != 2:
            raise ValueError(
                f"The model returned a map of shape {tuple(logits.shape)}; task='classification' expects logits (batch, "
                "classes). Pass task='segmentation' for a class of every pixel."
            )
        return logits

    def columns(self, output: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """Class, confidence, entropy and losses of each prediction, from one softmax.

        Args:
            output: logits (batch, classes).
            labels: (batch,), int64, on the same device; -1 for an unknown class.

        Returns:
            Each (batch,): ``prediction``; ``confidence``, the highest probability; ``entropy`` in nats; ``nll``, minus the
            log-probability of the label; ``brier``, the squared distance of the probabilities to the label's, in [0, 2].
            The last two are NaN for an unknown class; a label beyond the model's classes has probability 0.
        """
        import torch

        logits: Tensor = output
        log_probabilities = logits.log_softmax(dim=1)
        probabilities = log_probabilities.exp()
        has_it = labels < logits.shape[1]
        place = labels.clamp(0, logits.shape[1] - 1)[:, None]
        of_label = torch.where(has_it, log_probabilities.gather(1, place)[:, 0], -torch.inf)
        nll = torch.where(labels == UNKNOWN, torch.nan, -of_label)
        return {
            "prediction": logits.argmax(dim=1),
            "confidence": probabilities.amax(dim=1),
            "entropy": -(probabilities * log_probabilities).sum(dim=1),
            "nll": nll,
            "brier": probabilities.square().sum(dim=1) - 2 * (-nll).exp() + 1,
        }

    def tally(self, predictions: Any) -> Tally:
        known = predictions.label != UNKNOWN
        wrong = known & (predictions.prediction != predictions.label)
        return Tally(int(np.count_nonzero(known)), int(np.count_nonzero(wrong)))

    def value(self, row: Scored) -> float:
        """Online error in percent."""
        return 100.0 * row.errors / row.samples if row.samples else math.nan
