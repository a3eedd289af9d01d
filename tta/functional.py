"""Pure functions of logits that several methods share."""

import torch
from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the predicted distribution of each sample, in nats.

    Computed in float32 through ``log_softmax``, so that it stays finite where ``softmax * log(softmax)`` would not.

    Args:
        logits: (batch, classes), any floating dtype.

    Returns:
        (batch,), float32, between 0 and ln(classes).
    """
    logits = logits.float()
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of each sample against the distribution of the target logits, in nats.

    Args:
        logits: (batch, classes), any floating dtype.
        target_logits: (batch, classes); gradients flow into them unless they are detached.

    Returns:
        (batch,), float32.
    """
    return -(target_logits.float().softmax(dim=1) * logits.float().log_softmax(dim=1)).sum(dim=1)


def mean_where(values: Tensor, chosen: Tensor) -> Tensor:
    """Mean over the chosen values, 0 where none is chosen; values that are not chosen get no gradient.

    Args:
        values: (batch,).
        chosen: (batch,), boolean.
    """
    return torch.where(chosen, values, 0.0).sum() / chosen.sum().clamp(min=1)
