"""BatchNorm statistics of a weighted pool of images and the source."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm

from tta import norms
from tta.channels_last import ChannelsLastBatchNorm2d
from tta.distributed import ALONE, Workers
from tta.functional import matmul

WIDTH = 0.7  # of a domain, in log standard deviations of the channels
LEAST_SPREAD = 0.02  # of images alike, in the source's standard deviations
# Layers that do nothing but normalise; subclasses may hold an activation.
PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, ChannelsLastBatchNorm2d)


class Pool:
    """One forward pass of a pool of images, each by statistics of those that are like it: what the layers share.

    See :func:`pooling`.

    Args:
        weights: from the :func:`signature` of all images at the first layer, (n, 2 * channels), the weight of each image in
            the statistics of each, (n, n); rows are divided by their sums.
        prior: images that the source's statistics count as.
        known: :func:`look` of the images that the kept statistics are of. The kept ones then stand in for the pool's as far as
            the pool resembles those images.
        recent: (n,), boolean, of all images, those whose statistics are kept while the model is remembering.
        workers: whose images the pool holds together.

    Attributes:
        familiar: share of the kept statistics, a scalar, after the first layer; 0 without ``known``.
    """

    familiar: Tensor

    def __init__(
        self,
        weights: Callable[[Tensor], Tensor],
        prior: float,
        known: Tensor | None = None,
        recent: Tensor | None = None,
        workers: Workers = ALONE,
    ) -> None:
        self._weigh, self._prior, self._known, self._recent, self._workers = weights, prior, known, recent, workers
        self.weights: Tensor | None = None  # (this worker's images, images of all workers)

    def begin(self, mean: Tensor, square: Tensor, scale: Tensor) -> None:
        """Settle the weights at the first layer, from each image's moments about the source's mean."""
        looks, self._mine = self._workers.gathered(signature(mean, square, scale))
        rows = self._weigh(looks)[self._mine]
        self.weights = rows / rows.sum(1, keepdim=True)
        self.number = 1 / self.weights.square().sum(1, keepdim=True)  # of images, as far as their weights are equal
        self.familiar = looks.new_zeros(()) if self._known is None else familiarity(looks, self._known)

    def statistics(self, mean: Tensor, square: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted moments of the images and the share of them in the statistics.

        The share is ``1 / (1 + prior / n + 1 / F)`` of n images. F says how far their moments are from the source's beyond
        chance: the squared distance over its expectation for images like the source's, minus one. It is 0 for
        these, and a hundred or more under noise or fog.

        Args:
            mean, square: (n, channels), moments of each of this worker's images about the source's mean. Of (n * parts,
                channels), as of a layer that is given the tokens of all images as rows, those of an image count together.
            scale: (channels,), the source's variance.

        Returns:
            Mean and square, (n, channels), and share, (n, 1).

        Raises:
            ValueError: another number of rows.
        """
        moments = torch.cat((mean / scale.sqrt(), square / scale), dim=1)
        moments = self._workers.gathered(moments)[0]
        assert self.weights is not None
        images = self.weights.shape[1]
        if len(moments) != images:
            if not images or len(moments) % images:
                raise ValueError(
                    f"A BatchNorm layer was given {len(moments)} rows for {images} images; expected the same number for each "
                    "image. Use another method, such as norm, for this model."
                )
            moments = moments.view(images, -1, moments.shape[1]).mean(1)
        centre = matmul(self.weights, moments)
        spread = matmul(self.weights, moments.square()) - centre.square()
        chance = spread.mean(1, keepdim=True).clamp(min=1e-12) / (self.number - 1).clamp(min=1)
        shift, ratio = centre.chunk(2, dim=1)
        distance = torch.cat((shift, ratio - 1), dim=1).square().mean(1, keepdim=True)
        # A single image has no noise to compare with: it counts by its number alone.
        unsure = torch.where(self.number > 1.5, 1 / (distance / chance - 1).clamp(min=1e-3), 1.0)
        return shift * scale.sqrt(), ratio * scale, 1 / (1 + self._prior / self.number + unsure)

    def kept(self, rows: Tensor) -> Tensor:
        """Mean over the recent images of all workers, of the rows (n, channels) of this worker's: (channels,)."""
        assert self._recent is not None
        recent = self._recent[self._mine].to(rows.dtype)
        return self._workers.sum(matmul(recent, rows)) / self._recent.sum()


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
    """A BatchNorm layer that normalises by kept statistics; while :func:`pooling`, each image by those of a pool and the source.

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
        self.of_source = False

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.kept_mean, self.kept_var
        if self.of_source:
            mean, var = self._stored()
        elif self.pool is not None and not self.workers.filling:
            return self._by_image(x, *self._pooled(x.detach(), self.pool))
        elif self.pool is not None:  # a worker without images: it takes part in what is gathered
            self._pooled(x.detach(), self.pool)
        out: Tensor = functional_call(self.layer, {"running_mean": mean, "running_var": var}, (x,))
        return out

    @torch.no_grad()
    def _pooled(self, x: Tensor, pool: Pool) -> tuple[Tensor, Tensor]:
        """Mean and variance that each image is normalised by, (n, channels) each."""
        source_mean, source_var = self._stored()
        rest = list(range(2, x.dim()))
        # moments about the source's mean: those about zero would lose digits where the mean is large
        centred = self.workers.rows(x).float() - source_mean.view(1, -1, *[1] * len(rest))
        mean = centred.mean(rest) if rest else centred
        square = centred.square_().mean(rest) if rest else centred.square()
        scale = source_var + self.layer.eps
        if pool.weights is None:
            pool.begin(mean, square, scale)
        shift, square, share = pool.statistics(mean, square, scale)
        var = (square - shift.square()).clamp(min=0)
        mean, var = source_mean + share * shift, source_var + share * (var - source_var)
        mean, var = mean + pool.familiar * (self.kept_mean - mean), var + pool.familiar * (self.kept_var - var)
        if self.remember:
            self._keep(pool.kept(mean), pool.kept(var))
        return mean, var

    def _by_image(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """The layer with statistics of each image's own."""
        layer, parts, wide = self.layer, len(x) // len(mean), (-1, x.shape[1], *[1] * (x.dim() - 2))
        # A plain layer is one line a channel. Any other is given values that have the source's statistics.
        plain = type(layer) in PLAIN and layer.affine
        source_mean, source_var = self._stored()
        centre, scale = (layer.bias, layer.weight) if plain else (source_mean, (source_var + layer.eps).sqrt())
        slope = scale * (var + layer.eps).rsqrt()
        shift, slope = (v.repeat_interleave(parts, 0).view(wide) for v in (centre - mean * slope, slope))
        values = torch.addcmul(shift, x, slope).to(x.dtype)
        out: Tensor = values if plain else layer(values)
        return out

    @torch.no_grad()
    def _keep(self, mean: Tensor, var: Tensor) -> None:
        finite = mean.isfinite() & var.isfinite()
        finite = finite if self.remember_when is None else finite & self.remember_when
        self.kept_mean.copy_(torch.where(finite, mean, self.kept_mean))
        self.kept_var.copy_(torch.where(finite, var, self.kept_var))


@contextmanager
def pooling(model: nn.Module, pool: Pool) -> Iterator[None]:
    """Within this context, one forward pass: every :class:`PooledBatchNorm` normalises by the pool."""
    with _set(model, "pool", pool, None):
        yield


@contextmanager
def by_source(model: nn.Module) -> Iterator[None]:
    """Within this context every :class:`PooledBatchNorm` normalises by the source's statistics."""
    with _set(model, "of_source", True, False):
        yield


@contextmanager
def _set(model: nn.Module, name: str, value: object, usual: object) -> Iterator[None]:
    layers = [module for module in model.modules() if isinstance(module, PooledBatchNorm)]
    for layer in layers:
        setattr(layer, name, value)
    try:
        yield
    finally:
        for layer in layers:
            setattr(layer, name, usual)


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


def alike(looks: Tensor) -> Tensor:
    """Weight of each image in the statistics of each, by how alike their channels' log standard deviations are, in (0, 1].

    Two images of one domain lie 0.4 apart in the median (0.15 to 0.8 in nine of ten pairs); where noise, blur and fog meet, two of
    different domains lie 0.8 (CIFAR-10-C) or 1.1 (ImageNet) apart. See :data:`WIDTH`.

    Args:
        looks: (n, 2 * channels), of :func:`signature`.

    Returns:
        (n, n), symmetric, with ones on its diagonal.
    """
    logs = looks.chunk(2, dim=1)[1]
    squares = torch.cdist(logs, logs, compute_mode="donot_use_mm_for_euclid_dist").square() / logs.shape[1]
    return torch.exp(-squares / (2 * WIDTH**2))


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
