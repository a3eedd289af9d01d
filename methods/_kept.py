"""Forwards of the samples that a filter keeps, where the others would change nothing: shared by SAR, EATA and DeYO."""

from torch import Tensor, nn

from tta import norms

# Share of a batch up to which it is worthwhile to run the kept images again and leave out the backward pass of the whole batch.
# For a share k a step then costs 1 + 2.1 k forwards, 2.1 otherwise (ViT-Tiny, whose norms adapt): at a third a fifth less.
WORTHWHILE = 1 / 3


def alone(model: nn.Module, x: Tensor, chosen: Tensor, most: float = 1.0) -> Tensor | None:
    """Places of the kept images, where a forward of these alone gives them the same logits, to rounding, for less work.

    That holds for models without BatchNorm layers, which would take their statistics from fewer images. It is done on a CPU
    only: a GPU would have to be waited for to know how many are kept.

    Args:
        model: that the forward is of.
        x: the batch.
        chosen: (batch,), boolean; where it is of the pixels of maps, the whole batch is taken.
        most: share of the batch above which the work is not less.

    Returns:
        (kept,), int64, or None where the whole batch has to be taken.
    """
    if x.device.type != "cpu" or len(chosen) != len(x) or norms.named_layers(model, norms.BATCH_NORMS):
        return None
    kept = chosen.nonzero()[:, 0]
    return kept if 0 < len(kept) < len(x) and len(kept) <= most * len(x) else None
