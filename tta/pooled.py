"""BatchNorm statistics of a weighted pool of images and the source."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from tta import norms
from tta.distributed import ALONE, Workers
from tta.functional import matmul

LEAST_SPREAD = 0.02  # of images alike, in the source's standard deviations


class Pool:
    """One forward pass by the statistics of a pool of images: what its layers share. See :func:`pooling`.

    Args:
        weights: of the images, (n,), or a function that gives them from the images' :func:`signature` at the first layer,
            (n, 2 * channels); they are divided by their sum. Of several workers, a function is given the images of all.
        prior: images that the source's statistics count as.
        known: :func:`look` of the images that the kept statistics are of. The kept ones then stand in for the pool's as far as
            the pool resembles those images.
        workers: whose images the pool holds together.

    Attributes:
        familiar: share of the kept statistics, a scalar, after the first layer; 0 without ``known``.
        share: of the pool in the statistics, a scalar, after the first layer: ``1 / (1 + prior / n + 1 / F)`` of n images.
            F is how far their second moments at the first layer are from the source's, in units of their sampling noise:
            1 or less for images like the source's, a hundred or more under noise or fog.
    """

    share: Tensor
    familiar: Tensor

    def __init__(
        self,
        weights: Tensor | Callable[[Tensor], Tensor],
        prior: float,
        known: Tensor | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self._given, self._prior, self._known, self._workers = weights, prior, known, workers
        self.weights: Tensor | None = None  # of this worker's images

    def begin(self, mean: Tensor, square: Tensor, scale: Tensor) -> None:
        """Settle weights and share at the first layer, from each image's moments about the source's mean."""
        looks, mine = self._workers.gathered(signature(mean, square, scale))
        given = self._workers.gathered(self._given)[0] if isinstance(self._given, Tensor) else self._given(looks)
        weights = given / given.sum()
        self.weights = weights[mine]
        self.familiar = looks.new_zeros(()) if self._known is None else familiarity(looks, self._known)
        number = 1 / weights.square().sum()  # of images, as far as their weights are equal
        ratio = square / scale
        centre = self.weighted(ratio)
        noise = self.weighted((ratio - centre).square()) / (number - 1).clamp(min=1)
        excess = (centre - 1).square().mean() / noise.mean().clamp(min=1e-12)
        # A single image has no noise to compare with: it counts by its number alone.
        doubt = torch.where(number > 1.5, 1 / excess, 1.0)
        self.share = 1 / (1 + self._prior / number + doubt)

    def weighted(self, values: Tensor) -> Tensor:
        """Weighted mean over the images, of values (n, channels) of this worker's: (channels,).

        Values (n * parts, channels), as of a layer that is given the tokens of all images as rows, count by their image.

        Raises:
            ValueError: another number of rows.
        """
        assert self.weights is not None
        images = len(self.weights)
        if len(values) != images:
            if not images or len(values) % images:
                raise ValueError(
                    f"A BatchNorm layer was given {len(values)} rows for {images} images; expected the same number for each "
                    "image. Use another method, such as norm, for this model."
                )
            values = values.view(images, -1, values.shape[1]).mean(1)
        return self._workers.sum(matmul(self.weights, values))


def signature(mean: Tensor, square: Tensor, scale: Tensor) -> Tensor:
    """Look of each image at a layer: its channels' means and log standard deviations, in the source's units.

    Args:
        mean, square: (n, channels), first and second moments of each image about the source's mean.
        scale: (channels,), the source's variance.

    Returns:
        (n, 2 * channels).
    """
    variance = (square - mean.square()) / scale
    return torch.cat((mean / scale.sqrt(), variance.clamp(min=1e-6).log() / 2), dim=1)


class PooledBatchNorm(norms.BlendedBatchNorm):
    """A BatchNorm layer that normalises by kept statistics; while :func:`pooling`, by those of a weighted pool and the source.

    ``(1 - share) * source + share * pool``. Statistics enter as constants. The kept ones start at the source's.
    """

    kept_mean: Tensor
    kept_var: Tensor

    def __init__(self, layer: _BatchNorm, weight: float) -> None:
        super().__init__(layer, weight)
        mean, var = self._stored()
        self.register_buffer("kept_mean", mean.clone())
        self.register_buffer("kept_var", var.clone())
        self.pool: Pool | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.pool is None:
            mean, var = self.kept_mean, self.kept_var
        else:
            mean, var = self._pooled(x.detach(), self.pool)
            if self.remember:
                self._keep(mean, var)
        out: Tensor = functional_call(self.layer, {"running_mean": mean, "running_var": var}, (x,))
        return out

    @torch.no_grad()
    def _pooled(self, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        source_mean, source_var = self._stored()
        rest = list(range(2, x.dim()))
        # moments about the source's mean: those about zero would lose digits where the mean is large
        centred = self.workers.rows(x).float() - source_mean.view(1, -1, *[1] * len(rest))
        mean = centred.mean(rest) if rest else centred
        square = centred.square().mean(rest) if rest else centred.square()
        if pool.weights is None:
            pool.begin(mean, square, source_var + self.layer.eps)
        shift = pool.weighted(mean)
        var = (pool.weighted(square) - shift.square()).clamp(min=0)
        mean, var = source_mean + pool.share * shift, torch.lerp(source_var, var, pool.share)
        return torch.lerp(mean, self.kept_mean, pool.familiar), torch.lerp(var, self.kept_var, pool.familiar)

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        finite = mean.isfinite() & var.isfinite()
        finite = finite if self.remember_when is None else finite & self.remember_when
        self.kept_mean.copy_(torch.where(finite, mean, self.kept_mean))
        self.kept_var.copy_(torch.where(finite, var, self.kept_var))


@contextmanager
def pooling(model: nn.Module, pool: Pool) -> Iterator[None]:
    """Within this context, one forward pass: every :class:`PooledBatchNorm` normalises by the pool."""
    layers = [module for module in model.modules() if isinstance(module, PooledBatchNorm)]
    for layer in layers:
        layer.pool = pool
    try:
        yield
    finally:
        for layer in layers:
            layer.pool = None


def look(looks: Tensor, reference: Tensor) -> Tensor:
    """Centre of the signatures of the images of reference, and their mean distance from it: (width + 1,).

    Args:
        looks: (n, width), of :func:`signature`.
        reference: (n,), boolean, of at least one image.
    """
    among = reference.to(looks.dtype)
    centre = matmul(among, looks) / among.sum()
    return torch.cat((centre, (matmul(among, distances(looks, centre)) / among.sum()).view(1)))


def distances(looks: Tensor, centre: Tensor) -> Tensor:
    """Root mean square difference of each signature from a centre: (n, width), (width,) -> (n,)."""
    return (looks - centre).square().mean(1).sqrt()


def resemblance(looks: Tensor, reference: Tensor) -> Tensor:
    """Weight of each image by its distance from the images of reference, in (0, 1].

    1 within their own spread, falling exponentially beyond it.

    Args:
        looks: (n, width), of :func:`signature`.
        reference: (n,), boolean, of the images to resemble, at least one; they weigh 1.

    Returns:
        (n,).
    """
    known = look(looks, reference)
    beyond = distances(looks, known[:-1]) / (known[-1] + LEAST_SPREAD) - 1
    return torch.where(reference, 1.0, torch.exp(-beyond.clamp(min=0)))


def familiarity(looks: Tensor, known: Tensor) -> Tensor:
    """Resemblance of some images together to those of a :func:`look`, a scalar in (0, 1].

    1 while their centre is within half the spread, and 1 / n more for n images, then falling by the exponential of twice what
    lies beyond. Batches of 64 with few classes lie at 0.8 spreads at most while the domain stays, and at 0.7 to 12 after a
    change (CIFAR-10-C, ResNet-20).

    Args:
        looks: (n, width), of :func:`signature`.
        known: (width + 1,).
    """
    distance = distances(looks.mean(0, keepdim=True), known[:-1])[0]
    beyond = distance / (known[-1] + LEAST_SPREAD) - 0.5 - 1 / len(looks)
    return torch.exp(-2 * beyond.clamp(min=0))
