"""Pure functions of logits that several methods share."""

from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the predicted distribution of each sample, in nats.

    Computed in float32 through ``log_softmax``, so that it stays finite where ``softmax * log(softmax)`` would not.

    Args:
        logits: (batch, classes), any floating dtype.

    Returns:
        (batch,), float32, between 0 and ln(classes).
    """
    log_probabilities = logits.float().log_softmax(dim=1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=1)
