"""Pure functions of logits and activations that several methods share."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

LARGEST = 1e5  # of a pixel that may be learned from: images of 16 bits reach 65535 before they are scaled


def logits_of(output: Any) -> Tensor:
    """Logits, float32, from the output of a model: the tensor itself or its ``.logits``.

    Returns:
        (batch, classes); (batch, classes, height, width) of a model that predicts maps, see :mod:`tta.tasks`.

    Raises:
        TypeError: neither a tensor nor an object with ``.logits``.
        ValueError: neither one row of logits per image nor a map of them.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"The model returned {type(output).__name__}; expected logits (batch, classes) or an object with .logits. "
            "Wrap the model in a module whose forward returns the logits."
        )
    if logits.dim() not in (2, 4) or logits.shape[2:] == (1, 1):  # a classifier that forgot to flatten makes no map
        raise ValueError(f"The model returned a tensor of shape {tuple(logits.shape)}; expected (batch, classes).")
    return logits.float()


def rows(logits: Tensor) -> Tensor:
    """One row of logits for each prediction: those of every position of a map, in the order of images, then positions.

    A method whose rule is one of samples thereby takes the pixels of a map as its samples. Logits (batch, classes) are returned
    as they are, the tensor itself.

    Args:
        logits: (batch, classes, *positions).

    Returns:
        (batch * positions, classes); of maps stored class by class, as :func:`entropy` is fastest.
    """
    return logits if logits.dim() == 2 else logits.movedim(1, 0).flatten(1).t()


def usable(x: Tensor) -> Tensor:
    """Whether all values of a batch are finite and none is above :data:`LARGEST` in size, a boolean scalar on its device.

    One pixel of 1e30 overflows variances and squared distances, though it is finite, and would stay in every statistic.
    """
    low, high = x.detach().aminmax()
    return (low >= -LARGEST) & (high <= LARGEST)  # NaN is neither


def plain_images(x: Tensor) -> Tensor:
    """The images themselves of a batch that may bring views of them: (batch, views, 3, height, width) -> the first of each."""
    return x[:, 0] if x.dim() == 5 else x


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the predicted distribution of each sample, in nats.

    Computed in float32 through ``log_softmax``, so that it stays finite where ``softmax * log(softmax)`` would not.

    Args:
        logits: (batch, classes), or maps (batch, classes, *positions); any floating dtype.

    Returns:
        (batch,), or (batch, *positions); float32, between 0 and ln(classes).
    """
    logits = logits.float()
    if logits.dim() == 2 and len(logits) > 1 and logits.stride() == (1, len(logits)):
        # Pixels stored class by class: a softmax within rows of few classes takes eight times as long on a CPU.
        by_class = logits.t()
        return -(by_class.softmax(dim=0) * by_class.log_softmax(dim=0)).sum(dim=0)
    return -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)


def opinion_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy, in nats, of an opinion on each sample: belief in each class, and a rest that believes in none.

    Logits are logarithms of evidence: belief and rest are the softmax of the logits and ln(classes). Where all logits are
    low, the rest takes nearly all, and minimising it does not make a class sure. The length of the logits is held, so that
    their direction alone is learned: a longer vector would be surer without being righter. Finite for any logits (the
    released code, which exponentiates, is not above 88).

    Zhang et al., "COME: Test-time Adaption by Conservatively Minimizing Entropy", ICLR 2025.

    Args:
        logits: (batch, classes), or maps (batch, classes, *positions); any floating dtype.

    Returns:
        (batch,), or (batch, *positions); float32, between 0 and ln(classes + 1).
    """
    logits = logits.float()
    held = F.normalize(logits, dim=1) * logits.detach().norm(dim=1, keepdim=True)
    rest = torch.full_like(held[:, :1], math.log(logits.shape[1]))
    return entropy(torch.cat([held, rest], dim=1))


ENTROPIES: Mapping[str, Callable[[Tensor], Tensor]] = {"entropy": entropy, "come": opinion_entropy}


def confidence(logits: Tensor) -> Tensor:
    """Largest predicted probability of each sample: (batch, classes, ...) -> (batch, ...), float32."""
    return logits.float().softmax(dim=1).amax(dim=1)


def entropy_of_mean(logits: Tensor) -> Tensor:
    """Shannon entropy, in nats, of the mean of the predicted distributions, through ``log_softmax``.

    Args:
        logits: (views, classes), any floating dtype.

    Returns:
        float32 scalar.
    """
    log_mean = logits.float().log_softmax(dim=1).logsumexp(dim=0) - math.log(len(logits))
    return -(log_mean.exp() * log_mean).sum()


def soft_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Cross-entropy of each sample against the distribution of the target logits, in nats.

    Args:
        logits: (batch, classes), any floating dtype.
        target_logits: (batch, classes); gradients flow into them unless they are detached.

    Returns:
        (batch,), float32.
    """
    return -(target_logits.float().softmax(dim=1) * logits.float().log_softmax(dim=1)).sum(dim=1)


def matmul(first: Tensor, second: Tensor) -> Tensor:
    """Matrix product without autocast, whose half precision would hide small differences between features."""
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def symmetric_cross_entropy(logits: Tensor, target_logits: Tensor) -> Tensor:
    """Mean of the cross-entropies of each sample in the two directions, in nats.

    Wang et al., "Symmetric Cross Entropy for Robust Learning with Noisy Labels", ICCV 2019.

    Args:
        logits: (batch, classes), any floating dtype.
        target_logits: (batch, classes); gradients flow into them unless they are detached.

    Returns:
        (batch,), float32.
    """
    return (soft_cross_entropy(logits, target_logits) + soft_cross_entropy(target_logits, logits)) / 2


def gradients_of(loss: Tensor, tensors: Sequence[Tensor], *, materialize: bool = False) -> tuple[Any, ...]:
    """Gradients of a scalar, without autocast, which would round the backward pass of float32 operations too.

    Args:
        loss: a scalar.
        tensors: those that the gradients are taken with respect to.
        materialize: return zeros, not None, for a tensor that the loss does not depend on.
    """
    with torch.autocast(loss.device.type, enabled=False):
        return torch.autograd.grad(loss, tensors, allow_unused=True, materialize_grads=materialize)


def reliable(entropies: Tensor, margin: float) -> Tensor:
    """Mask of the samples that are reliable enough to learn from: those with an entropy below ``margin``.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    Args:
        entropies: (batch,), in nats.
        margin: in nats; 0.4 ln(classes) is usual.

    Returns:
        (batch,), boolean.
    """
    return entropies < margin


def unlike(probabilities: Tensor, average: Tensor, margin: float) -> Tensor:
    """Mask of the predictions that are not redundant: absolute cosine similarity with ``average`` below ``margin``.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    Args:
        probabilities: (batch, classes).
        average: (classes,), of the predictions learned from so far; zeros if there are none yet: no prediction is
            redundant then.
        margin: above 0, at most 1.

    Returns:
        (batch,), boolean.
    """
    return F.cosine_similarity(probabilities, average[None], dim=1).abs() < margin


def weighted_distance(
    tensors: Iterable[Tensor], anchors: Iterable[Tensor], weights: Iterable[Tensor | float]
) -> Tensor:
    """Squared distance of tensors from their anchors, each entry times its weight, summed over all; a scalar."""
    terms = [(w * (t - a).square()).sum() for t, a, w in zip(tensors, anchors, weights, strict=True)]
    return torch.stack(terms).sum()


def below_quantile(values: Sequence[Tensor], share: float) -> list[Tensor]:
    """Masks of the entries below a quantile of all entries together, interpolated linearly between ranks.

    Args:
        values: tensors of any shapes, at least two entries in all.
        share: the quantile, in [0, 1]; no entry is below that of 0.

    Returns:
        A boolean tensor for each of ``values``.
    """
    flat = torch.cat([value.flatten() for value in values])
    rank = share * (len(flat) - 1)
    low = int(rank)
    # torch.quantile refuses more than 16 million entries, and sorts them all
    at, above = (flat.kthvalue(min(k, len(flat))).values for k in (low + 1, low + 2))
    threshold = at + (above - at) * (rank - low)
    return [value < threshold for value in values]


def followed(average: Tensor, probabilities: Tensor, chosen: Tensor) -> Tensor:
    """The average prediction after a batch: 0.9 times the average before, plus 0.1 times the mean of the chosen ones.

    If none is chosen it stays as it is.

    Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022.

    Args:
        average: (classes,); zeros if there is none yet: the first mean replaces them.
        probabilities: (batch, classes).
        chosen: (batch,), boolean.

    Returns:
        (classes,).
    """
    return moved_towards(average, masked_mean(probabilities, chosen), when=chosen.any())


def moved_towards(average: Tensor, new: Tensor, when: Tensor) -> Tensor:
    """The average prediction of :func:`followed` after a batch, from the mean of the predictions chosen from it.

    Args:
        average: (classes,); zeros if there is none yet: ``new`` replaces them.
        new: (classes,).
        when: a boolean scalar, whether any prediction was chosen; the average stays as it is if not.
    """
    blended = torch.where(average.any(), 0.9 * average + 0.1 * new, new)
    return torch.where(when, blended, average)


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the rows that the mask keeps; zero, not NaN, if it keeps none.

    Args:
        values: (batch, ...).
        mask: (batch,), boolean.

    Returns:
        (...).
    """
    mask = mask.view(-1, *[1] * (values.dim() - 1))
    return torch.where(mask, values, 0).sum(0) / mask.sum().clamp(min=1)


def batch_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased variance over the batch, at every location: (batch, ...) -> (...), (...), float32.

    ``x`` is not kept for the backward pass: an in-place operation may change it before.
    """
    x = x.float()
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    # Rows in the order of memory: on a CPU, sums over a strided batch take 20 times as long.
    ordered = x.permute(0, 2, 3, 1) if last else x
    mean, var = _RowMoments.apply(ordered.reshape(len(x), -1))
    moments = mean.view(ordered.shape[1:]), var.view(ordered.shape[1:])
    return (moments[0].permute(2, 0, 1), moments[1].permute(2, 0, 1)) if last else moments


class _RowMoments(torch.autograd.Function):
    """Mean and unbiased variance of (batch, values) over the batch, with a backward pass that reads the rows once."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
        mean = rows.mean(0)
        centered = rows - mean
        ctx.save_for_backward(centered)
        return mean, (centered * centered).sum(0) / (len(rows) - 1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (centered,) = ctx.saved_tensors
        of_mean, of_var = gradients
        return torch.addcmul(of_mean / len(centered), centered, of_var * (2 / (len(centered) - 1)))


def symmetric_kl(mean: Tensor, covariance: Tensor, other_mean: Tensor, other_covariance: Tensor) -> Tensor:
    """Sum of the Kullback-Leibler divergences between two normal distributions in both directions, nats.

    NaN if a covariance is not positive definite.

    Args:
        mean, other_mean: (..., width).
        covariance, other_covariance: (..., width, width), or variances (..., width) of independent entries.

    Returns:
        (...).
    """
    difference = mean - other_mean
    if covariance.dim() == mean.dim():
        spread = difference.square()
        return ((other_covariance + spread) / covariance + (covariance + spread) / other_covariance - 2).sum(-1) / 2
    # The logarithms of the determinants cancel; what is left are the two traces.
    spread = difference[..., :, None] * difference[..., None, :]
    traces = _trace_of_ratio(other_covariance + spread, covariance) + _trace_of_ratio(
        covariance + spread, other_covariance
    )
    return traces / 2 - mean.shape[-1]


def _trace_of_ratio(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Trace of ``inverse(denominator) @ numerator``."""
    factor, failed = torch.linalg.cholesky_ex(denominator)  # unlike cholesky, it does not wait for a GPU
    trace = torch.cholesky_solve(numerator, factor).diagonal(dim1=-2, dim2=-1).sum(-1)
    return trace.masked_fill(failed != 0, torch.nan)


def otsu_threshold(scores: Tensor, valid: Tensor, thresholds: Tensor) -> Tensor:
    """The threshold that splits scores into two groups with the least variance within them.

    Otsu, "A Threshold Selection Method from Gray-Level Histograms", IEEE Trans. SMC, 1979.

    Args:
        scores: (n,).
        valid: (n,), boolean mask of the scores that count.
        thresholds: candidates, float64, ascending. A score equal to the threshold belongs to the group above it.

    Returns:
        A scalar, float64: the smallest of equally good thresholds, the first one if none splits the scores.
    """
    ordered = scores.double().masked_fill(~valid, torch.inf).sort().values
    below = torch.searchsorted(ordered, thresholds)
    above = valid.sum() - below
    sums = F.pad(torch.where(ordered.isfinite(), ordered, 0).cumsum(0), (1, 0))
    gap = sums[below] / below.clamp(min=1) - (sums[-1] - sums[below]) / above.clamp(min=1)
    between = torch.where((below > 0) & (above > 0), below * above * gap.square(), -torch.inf)
    return thresholds[between.argmax()]  # most variance between the groups is least within them
