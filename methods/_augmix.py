"""AugMix: views of one image that mix several chains of operations, as tensors."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

CHAINS, DEPTH = 3, 3
FILL = 128 / 255  # value of pixels outside the image
SMALL = 100  # pixels; smaller images are cropped as those of CIFAR, others as those of ImageNet


def augmix_views(image: Tensor, number: int, generator: torch.Generator) -> Tensor:
    """Views of one image as MEMO makes them: a random crop and mirror, mixed with three chains of operations on it.

    Each chain applies one to three of nine operations (autocontrast, equalize, rotate, solarize, shear and translate in
    x and y, posterize) at severity 1. The weights of the chains are Dirichlet(1, 1, 1), the share of the plain crop is
    Beta(1, 1). Pixels are rounded to 8 bits between operations, as published. All draws are made on the CPU.

    Hendrycks et al., "AugMix: A Simple Data Processing Method to Improve Robustness and Uncertainty", ICLR 2020; Zhang et
    al., "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS 2022.

    Args:
        image: (3, height, width) in [0, 1].
        number: of views.
        generator: on the CPU.

    Returns:
        (number, 3, height, width) in [0, 1].
    """
    plain = _rounded(_crops(image.nan_to_num().clamp(0, 1), number, generator))
    weights = -torch.rand(number, CHAINS, generator=generator).clamp(min=1e-12).log()  # normalised: Dirichlet(1, 1, 1)
    weights = (weights / weights.sum(1, keepdim=True)).to(image.device)[..., None, None, None]
    share = torch.rand(number, generator=generator).to(image.device)[:, None, None, None]
    mixed = torch.zeros_like(plain)
    for chain in range(CHAINS):
        x = plain.clone()
        depths = torch.randint(1, DEPTH + 1, (number,), generator=generator)
        for depth in range(DEPTH):
            chosen = torch.randint(len(OPERATIONS), (number,), generator=generator)
            level = 0.1 + 0.9 * torch.rand(number, generator=generator)
            sign = 1 - 2 * torch.randint(2, (number,), generator=generator)
            for index, operation in enumerate(OPERATIONS):
                of = ((chosen == index) & (depth < depths)).nonzero()[:, 0]
                if len(of):
                    x[of.to(x.device)] = _rounded(operation(x[of.to(x.device)], level[of], sign[of]))
        mixed += weights[:, chain] * x
    return share * plain + (1 - share) * mixed


def _rounded(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def _crops(image: Tensor, views: int, generator: torch.Generator) -> Tensor:
    """Random crops, half of them mirrored: of the image padded by 4 pixels, or, of a large one, resized as for ImageNet."""
    height, width = image.shape[1:]
    crops = []
    for _ in range(views):
        if min(height, width) < SMALL:
            top, left = torch.randint(9, (2,), generator=generator).tolist()
            crop = F.pad(image, (4, 4, 4, 4))[:, top : top + height, left : left + width]
        else:
            top, left, high, wide = _resized_crop(height, width, generator)
            part = image[None, :, top : top + high, left : left + wide]
            crop = F.interpolate(part, (height, width), mode="bilinear", antialias=True)[0]
        crops.append(crop.flip(2) if torch.rand((), generator=generator) < 0.5 else crop)
    return torch.stack(crops)


def _resized_crop(height: int, width: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Top, left, height and width of a crop of 8 to 100 % of the area, with an aspect ratio of 3/4 to 4/3."""
    for _ in range(10):
        area, ratio, down, right = torch.rand(4, generator=generator).tolist()
        area = height * width * (0.08 + 0.92 * area)
        ratio = (3 / 4) ** (1 - 2 * ratio)
        high, wide = round(math.sqrt(area / ratio)), round(math.sqrt(area * ratio))
        if 0 < high <= height and 0 < wide <= width:
            return int(down * (height - high + 1)), int(right * (width - wide + 1)), high, wide
    side = min(height, width)
    return (height - side) // 2, (width - side) // 2, side, side


# Operations on images (views, 3, height, width) in [0, 1]; level (views,) from 0.1 to 1 and sign (views,), on the CPU.


def _autocontrast(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    low, high = x.amin((2, 3), keepdim=True), x.amax((2, 3), keepdim=True)
    return torch.where(high > low, (x - low) / (high - low).clamp(min=1 / 255), x)


def _equalize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    """Equalise the histogram of each channel, with the integer arithmetic of the Python Imaging Library."""
    values = (x * 255).round().long().flatten(2)  # (views, 3, pixels)
    histogram = torch.zeros(*values.shape[:2], 256, dtype=torch.int64, device=x.device)
    histogram.scatter_add_(2, values, torch.ones_like(values))
    brightest = histogram.gather(2, values.amax(2, keepdim=True))
    step = (values.shape[2] - brightest) // 255
    below = histogram.cumsum(2) - histogram
    table = ((below + step // 2) // step.clamp(min=1)).clamp(max=255)
    return torch.where(step > 0, table.gather(2, values), values).view(x.shape).to(x.dtype) / 255


def _solarize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    threshold = (256 - (25.6 * level).int()).to(x.device)[:, None, None, None]
    return torch.where(x * 255 < threshold - 0.5, x, 1 - x)


def _posterize(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return (x * 255).round().div(16, rounding_mode="floor") * 16 / 255  # 4 bits at every level of severity 1


def _rotate(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    angle = torch.deg2rad((sign * (3 * level).int()).float())
    return _mapped(x, angle.cos(), -angle.sin(), angle.sin(), angle.cos(), centred=True)


def _shear_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _mapped(x, xy=sign * 0.03 * level)


def _shear_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _mapped(x, yx=sign * 0.03 * level)


def _translate_x(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _mapped(x, dx=sign * (level * x.shape[3] / 30).int())


def _translate_y(x: Tensor, level: Tensor, sign: Tensor) -> Tensor:
    return _mapped(x, dy=sign * (level * x.shape[2] / 30).int())


OPERATIONS = (
    _autocontrast,
    _equalize,
    _posterize,
    _rotate,
    _solarize,
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)


def _mapped(
    images: Tensor,
    xx: Tensor | float = 1.0,
    xy: Tensor | float = 0.0,
    yx: Tensor | float = 0.0,
    yy: Tensor | float = 1.0,
    dx: Tensor | float = 0.0,
    dy: Tensor | float = 0.0,
    centred: bool = False,
) -> Tensor:
    """Affine map: the output pixel at (x, y) is the input at (xx x + xy y + dx, yx x + yy y + dy), grey outside the image.

    Coordinates are pixels from the top left corner, or from the middle if ``centred``.
    """
    views, _, height, width = images.shape
    matrix = torch.zeros(views, 2, 3)
    for row, column, value in ((0, 0, xx), (0, 1, xy), (0, 2, dx), (1, 0, yx), (1, 1, yy), (1, 2, dy)):
        matrix[:, row, column] = torch.as_tensor(value).float()
    matrix = matrix.to(images.device)
    y, x = torch.meshgrid(
        torch.arange(height, device=images.device) + 0.5, torch.arange(width, device=images.device) + 0.5, indexing="ij"
    )
    size = torch.tensor([width, height], device=images.device)
    origin = size / 2 if centred else torch.zeros(2, device=images.device)
    places = torch.cat([torch.stack((x, y), -1) - origin, torch.ones_like(x)[..., None]], dim=-1)
    source = (matrix[:, None, None] * places[..., None, :]).sum(
        -1
    ) + origin  # a sum, as autocast would round a matrix product
    grid = (2 * source / size - 1).to(images.dtype)
    return F.grid_sample(images - FILL, grid, mode="bilinear", padding_mode="zeros", align_corners=False) + FILL
