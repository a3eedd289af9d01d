"""Channels last: when it pays, and batch statistics that are exact in it."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def pays(model: nn.Module) -> bool:
    """Whether a model is faster with channels last: it has more than 100 000 parameters, mostly convolution weights.

    On a CPU a batch of norm then takes 0.7 times as long, one of tent 0.75 (CIFAR ResNet-20, batch 200); a network with
    76 000 parameters gains nothing. A model with subclasses of BatchNorm stays as it is, as these cannot become a
    :class:`ChannelsLastBatchNorm2d`.
    """
    sizes = [(parameter.dim(), parameter.numel()) for parameter in model.parameters()]
    convolutional = 2 * sum(size for dim, size in sizes if dim == 4) > sum(size for _, size in sizes) > 100_000
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return convolutional and all(type(norm) is nn.BatchNorm2d for norm in norms)


def sum_exactly(layer: nn.Module) -> None:
    """Turn a plain ``nn.BatchNorm2d`` into a :class:`ChannelsLastBatchNorm2d`, in place; other layers stay as they are."""
    if type(layer) is nn.BatchNorm2d:
        layer.__class__ = ChannelsLastBatchNorm2d


def sum_plainly(layer: nn.Module) -> None:
    """Turn a :class:`ChannelsLastBatchNorm2d` back into a plain ``nn.BatchNorm2d``, in place."""
    if type(layer) is ChannelsLastBatchNorm2d:
        layer.__class__ = nn.BatchNorm2d  # type: ignore[assignment]


class ChannelsLastBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm whose batch statistics of channels-last images are as exact as those of channels-first images.

    On a CPU, PyTorch sums channels-last statistics and their gradients one value after the other: with a batch of 200 and
    32-pixel maps the outputs are off by 3e-3 after a ReLU, here by 2e-6. All other inputs go to ``nn.BatchNorm2d``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return normalised(x, self)[0] if in_rows(x, self) else super().forward(x)


def in_rows(x: Tensor, layer: nn.BatchNorm2d) -> bool:
    """Whether :func:`normalised` serves the input of a layer: both float32, channels last on a CPU, more than one value a channel."""
    return _has_rows(x) and layer.weight is not None and layer.weight.dtype == x.dtype and not _is_traced()


def _has_rows(x: Tensor) -> bool:
    fits = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 and x.stride(1) == 1
    return fits and x.numel() > x.shape[1]  # one value has no variance: nn.BatchNorm2d raises the error


def normalised(x: Tensor, layer: nn.BatchNorm2d, share: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise a batch by a blend of its own statistics, through which gradients flow, and the layer's stored ones.

    Plain operations on a whole batch, one after the other, take six times as long forward and backward (ResNet-20, 64 images).

    Args:
        x: that :func:`in_rows` serves.
        layer: gives scale and shift, and, for a share below 1, the stored statistics.
        share: of the batch's mean and biased variance, in [0, 1].

    Returns:
        The output, and the mean and variance that it was normalised by, (channels,) each and detached.
    """
    stored = (None, None) if share == 1 else (layer.running_mean, layer.running_var)
    out, mean, var, _ = _NormaliseRows.apply(x, layer.weight, layer.bias, layer.eps, *stored, share)
    return out, mean, var


@torch.no_grad()
def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel, (channels,), float32; the sums are exact and fast channels last too.

    ``torch.var_mean`` reads channels-last images one value after the other: it takes 30 times as long on a CPU.
    """
    x = x.float()
    if not _has_rows(x) or _is_traced():
        var, mean = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        return mean, var
    return _moments(*_wide(x))


def _is_traced() -> bool:
    """Whether a trace or an export is under way, which is to hold operations of torch alone."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return tracing or torch.compiler.is_compiling()


class _NormaliseRows(torch.autograd.Function):
    """``F.batch_norm`` by the batch, or by a blend with stored statistics, on images that are viewed as fewer pixels with more channels.

    ``k`` consecutive pixels count as one pixel with ``k`` times the channels. PyTorch's channels-last kernels then sum
    ``1 / k`` of the values one after the other, and the ``k`` sums of a channel are added here.
    """

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        eps: float,
        stored_mean: Tensor | None,
        stored_var: Tensor | None,
        share: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own, var = _moments(*_wide(x))
        mean = own.clone()  # an output of its own
        if stored_mean is not None and stored_var is not None:
            mean = (1 - share) * stored_mean + share * own
            var = (1 - share) * stored_var + share * var
        out = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        return out, mean, var, own

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, _, ctx.eps, _, _, ctx.share = inputs
        _, *statistics = output
        ctx.mark_non_differentiable(*statistics)
        ctx.save_for_backward(x, weight, *statistics)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var, own = ctx.saved_tensors
        wide, k = _wide(x)
        of_out, _ = _wide(gradients[0])
        # With given statistics the kernel returns both sums in one pass; the gradient through the statistics is added here.
        _, *sums = torch.ops.aten.native_batch_norm_backward(
            of_out, wide, None, _repeated(mean, k), _repeated(var, k), None, None, False, ctx.eps, [False, True, True]
        )
        of_weight, of_bias = (part.view(k, -1).sum(0) for part in sums)
        if not ctx.needs_input_grad[0]:  # the input is an image
            return None, of_weight, of_bias, None, None, None, None
        gain = weight * (var + ctx.eps).rsqrt()
        through = gain * (ctx.share * -len(mean) / x.numel())  # the batch's statistics
        of_x = torch.batch_norm(x, through * of_weight, through * of_bias, own, var, False, 0.0, ctx.eps, False)
        _wide(of_x)[0].addcmul_(of_out, _repeated(gain, k).view(1, -1, 1, 1))
        return of_x, of_weight, of_bias, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """Normalise each of the stacked batches by itself."""
        each = zip(
            *(
                [value] * info.batch_size if dim is None else value.unbind(dim)
                for value, dim in zip(inputs, in_dims, strict=True)
            ),
            strict=True,
        )
        outputs = [torch.stack(parts) for parts in zip(*(_NormaliseRows.apply(*one) for one in each), strict=True)]
        return tuple(outputs), (0,) * len(outputs)


def _moments(wide: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel from ``k`` sums of each."""
    means, variances = (part.view(k, -1) for part in torch.batch_norm_update_stats(wide, None, None, 0.0))
    mean = means.mean(0)
    return mean, (means - mean).square_().add_(variances).mean(0)


WIDE = 2048  # number of channels at which the kernels reach their full speed


@cache
def _slots(pixels: int, channels: int) -> int:
    """Number of pixels to merge into one: a divisor of ``pixels``, smaller than it."""
    return next((k for k in range(min(WIDE // channels, pixels // 2), 1, -1) if pixels % k == 0), 1)


def _wide(x: Tensor) -> tuple[Tensor, int]:
    """Images (batch, channels, height, width) as one image (1, k * channels, pixels / k, 1), and k; channels last."""
    channels = x.shape[1]
    pixels = x.numel() // channels
    k = _slots(pixels, channels)
    rows = x.permute(0, 2, 3, 1).reshape(1, pixels // k, 1, k * channels)
    return rows.permute(0, 3, 1, 2), k


def _repeated(values: Tensor, k: int) -> Tensor:
    """One value per channel, (channels,) -> (k * channels,)."""
    return values.expand(k, -1).reshape(-1)
