"""Augmented views of image batches, as tensors."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import compiling
from tta.messages import require

# A method's dataclass declares its field ``augment`` as Any, as OmegaConf has no type for a callable, and calls check().
# A view alone moves no pixel, as far as a map is concerned; one that does comes with a function that moves its logits back.
View: TypeAlias = Tensor | tuple[Tensor, Callable[[Tensor], Tensor]]
Augment: TypeAlias = Literal["paper", "none", "scales"] | Callable[[Tensor], View]

SCALES = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875)  # of the sides of a picture, see `scaled`

LUMA = (0.2989, 0.587, 0.114)
BLUR = 2  # half the width of the Gaussian kernel, 5 pixels
NOISE = 0.005


class ViewFactors(NamedTuple):
    """Random factors of one view: the same for every image of the batch, as in the published code.

    Attributes:
        order: of the five colour operations (brightness, contrast, saturation, hue, gamma).
        brightness, contrast, saturation, gamma: factors; 1 changes nothing.
        hue: shift, as a share of the colour circle; 0 changes nothing.
        angle: rotation, degrees.
        shift: translation (x, y), as a share of the image's width and height.
        scale: of the image; above 1 enlarges.
        sigma: of the Gaussian blur, pixels.
        flip: whether to mirror left and right.
    """

    order: tuple[int, ...] = (0, 1, 2, 3, 4)
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0
    hue: float = 0.0
    gamma: float = 1.0
    angle: float = 0.0
    shift: tuple[float, float] = (0.0, 0.0)
    scale: float = 1.0
    sigma: float = 0.001
    flip: bool = False


def draw_factors(generator: torch.Generator) -> ViewFactors:
    """Factors of one view, uniform in the published ranges, from a generator on the CPU."""
    low = (0.6, 0.7, 0.5, -0.06, 0.7, -15.0, -1 / 8, -1 / 8, 0.9, 0.001)
    high = (1.4, 1.3, 1.5, 0.06, 1.3, 15.0, 1 / 8, 1 / 8, 1.1, 0.5)
    share = torch.rand(len(low) + 1, generator=generator, dtype=torch.float64).tolist()
    values = [a + (b - a) * r for a, b, r in zip(low, high, share[:-1], strict=True)]
    brightness, contrast, saturation, hue, gamma, angle, x, y, scale, sigma = values
    order = tuple(torch.randperm(5, generator=generator).tolist())
    return ViewFactors(
        order, brightness, contrast, saturation, hue, gamma, angle, (x, y), scale, sigma, share[-1] < 0.5
    )


def paper_view(images: Tensor, factors: ViewFactors) -> Tensor:
    """A view of a batch as CoTTA and RoTTA make it, before its noise: colours, affine map, blur, flip.

    Equal to the published pipeline (colour jitter, edge padding by half the size, affine map, blur, centre crop, flip),
    without the padding: inside the crop, a sampler that repeats the edge gives the same pixels.

    Args:
        images: (batch, 3, height, width) in [0, 1], floating point; values outside are clipped.
        factors: see :func:`draw_factors`.

    Returns:
        As ``images``.

    Raises:
        ValueError: the images are not RGB.
    """
    x = _blurred(_warped(_jittered(images, factors), factors, margin=BLUR), factors.sigma)
    return x.flip(3) if factors.flip else x


def sharp_view(images: Tensor, factors: ViewFactors) -> Tensor:
    """A view of a batch as ROID makes it: colours, affine map, flip, without blur; pixels outside the image are mirrored.

    Args and errors are those of :func:`paper_view`.
    """
    x = _warped(_jittered(images, factors), factors, mirror=True)
    return x.flip(3) if factors.flip else x


def _jittered(images: Tensor, factors: ViewFactors) -> Tensor:
    _require_rgb(images)
    x = images.clamp(0, 1).contiguous()
    jitter = (
        lambda x: (x * factors.brightness).clamp_(0, 1),
        lambda x: x.lerp(_grey(x).mean((1, 2, 3), keepdim=True), 1 - factors.contrast).clamp_(0, 1),
        lambda x: x.lerp(_grey(x), 1 - factors.saturation).clamp_(0, 1),
        lambda x: shift_hue(x, factors.hue),
        lambda x: x.clamp(min=1e-8).pow_(factors.gamma),
    )
    for operation in factors.order:
        x = jitter[operation](x)
    return x


def shift_hue(images: Tensor, share: float | Tensor) -> Tensor:
    """Rotate the hue of RGB images in [0, 1] by a share of the colour circle: one for all images, or (batch, 1, 1)."""
    red, green, blue = images.unbind(1)
    value, smallest = images.amax(1), images.amin(1)
    chroma = value - smallest
    inverse = 1 / torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) * inverse,
        torch.where(value == green, (blue - red) * inverse + 2, (red - green) * inverse + 4),
    )  # in sixths of the circle
    turned = hue + 6 * share
    # Each channel falls from value to value - chroma as the hue leaves its third of the circle.
    channels = []
    for offset in (5, 3, 1):
        k = (turned + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, 1)


def _grey(images: Tensor) -> Tensor:
    red, green, blue = torch.split(images, 1, dim=1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _warped(images: Tensor, factors: ViewFactors, *, margin: int = 0, mirror: bool = False) -> Tensor:
    """Rotate, shift and scale about the centre, with a margin on each side; beyond the edge, pixels repeat or are mirrored."""
    batch, channels, height, width = images.shape
    angle = math.radians(factors.angle)
    cos, sin = math.cos(angle) / factors.scale, math.sin(angle) / factors.scale
    # Whole pixels, as published: up to 1/8 of the image, 1/16 of the padded one of the published code.
    right, down = round(factors.shift[0] * width), round(factors.shift[1] * height)
    x = torch.arange(width + 2 * margin, device=images.device) - (margin + (width - 1) / 2 + right)
    y = torch.arange(height + 2 * margin, device=images.device) - (margin + (height - 1) / 2 + down)
    y = y[:, None]
    # The images become channels of one image: they share one map, and the sampler computes its weights once.
    together = images.reshape(1, batch * channels, height, width)
    if mirror:  # the sampler's own mirror lies half a pixel further out
        together = F.pad(together, (width // 2, width // 2, height // 2, height // 2), mode="reflect")
    unit_y, unit_x = (2 / size for size in together.shape[2:])
    grid = torch.stack(((cos * x + sin * y) * unit_x, (cos * y - sin * x) * unit_y), dim=-1)
    warped = F.grid_sample(
        together, grid[None].to(images.dtype), mode="bilinear", padding_mode="border", align_corners=False
    )
    return warped.reshape(batch, channels, *warped.shape[2:])


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """Gaussian blur of 5 by 5 pixels; it removes the margin of 2 pixels on each side."""
    weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-BLUR, BLUR + 1)]
    weights = [weight / sum(weights) for weight in weights]
    for dim in (2, 3):
        size = images.shape[dim] - 2 * BLUR
        blurred = images.narrow(dim, 0, size) * weights[0]
        for start, weight in enumerate(weights[1:], start=1):
            blurred.add_(images.narrow(dim, start, size), alpha=weight)
        images = blurred
    return images


def flipped(images: Tensor, generator: torch.Generator) -> Tensor:
    """The images, each mirrored left and right with probability 0.5."""
    return torch.where(_chance(0.5, images, generator), images.flip(3), images)


def cropped(images: Tensor, generator: torch.Generator, share: float = 0.125) -> Tensor:
    """The images, each shifted by up to ``share`` of its sides, with zeros beyond the edge: a padded random crop.

    Of 32 pixels an eighth is 4, the crop that networks for CIFAR are trained with.

    Args:
        images: (batch, channels, height, width).
        generator: on the CPU; all draws come from it.
        share: in [0, 1).
    """
    height, width = images.shape[2:]
    down, right = round(share * height), round(share * width)
    padded = F.pad(images, (right, right, down, down))
    rows = torch.randint(2 * down + 1, (len(images), 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * right + 1, (len(images), 1), generator=generator) + torch.arange(width)
    rows, columns = rows.to(images.device), columns.to(images.device)
    lines = padded.gather(2, rows[:, None, :, None].expand(-1, images.shape[1], -1, padded.shape[3]))
    return lines.gather(3, columns[:, None, None, :].expand(-1, images.shape[1], height, -1))


def training_view(images: Tensor, choice: str, generator: torch.Generator) -> Tensor:
    """A view of each image as networks are trained on: ``"crop"`` is :func:`cropped`, ``"paper"`` also mirrored, ``"none"`` the image.

    Args:
        images: (batch, channels, height, width).
        choice: one of the three.
        generator: on the CPU; all draws come from it.
    """
    if choice == "none":
        return images
    made = cropped(images, generator)
    return flipped(made, generator) if choice == "paper" else made


def moco_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """A view of a batch as MoCo v2 makes it, without its crop: colours, grey, blur, flip, drawn for each image.

    Four of five images get new brightness, contrast, saturation and hue, one of five turns grey, half are blurred (sigma
    0.1 to 2 pixels), half mirrored.

    Chen et al., "Improved Baselines with Momentum Contrastive Learning", arXiv 2003.04297, 2020.

    Args:
        images: (batch, 3, height, width) in [0, 1], floating point; values outside are clipped.
        generator: on the CPU; all draws come from it.

    Returns:
        As ``images``.

    Raises:
        ValueError: the images are not RGB.
    """
    _require_rgb(images)
    x = images.clamp(0, 1)
    for operation in torch.randperm(4, generator=generator).tolist():
        if operation == 3:
            x = shift_hue(x, _uniform(-0.1, 0.1, images, generator)[:, 0])
        else:  # brightness, contrast, saturation
            towards = (torch.zeros_like(x), _grey(x).mean((1, 2, 3), keepdim=True), _grey(x))[operation]
            x = (towards + (x - towards) * _uniform(0.6, 1.4, images, generator)).clamp_(0, 1)
    x = torch.where(_chance(0.8, images, generator), x, images.clamp(0, 1))
    x = torch.where(_chance(0.2, images, generator), _grey(x).expand_as(x), x)
    sigma = _uniform(0.1, 2.0, images, generator)
    x = torch.where(_chance(0.5, images, generator), _blurred_each(x, sigma.flatten()), x)
    return flipped(x, generator)


def _require_rgb(images: Tensor) -> None:
    if images.shape[1] != 3:
        raise ValueError(
            f"The paper's augmentation changes colours and needs 3 channels; the images have {images.shape[1]}. "
            "Pass augment='none' or a callable of your own."
        )


def _uniform(low: float, high: float, images: Tensor, generator: torch.Generator) -> Tensor:
    """A number for each image, (batch, 1, 1, 1)."""
    return (low + (high - low) * torch.rand(len(images), 1, 1, 1, generator=generator)).to(images)


def _chance(probability: float, images: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.rand(len(images), 1, 1, 1, generator=generator) < probability).to(images.device)


def _blurred_each(images: Tensor, sigma: Tensor, half: int = 6) -> Tensor:
    """Gaussian blur of each image by its own sigma (batch,), up to a third of ``half``; edges are repeated."""
    offsets = torch.arange(-half, half + 1, device=images.device)
    weights = torch.exp(-0.5 * (offsets / sigma[:, None]).square())
    weights = (weights / weights.sum(1, keepdim=True)).repeat_interleave(images.shape[1], 0)
    x = F.pad(images, (half, half, half, half), mode="replicate").flatten(0, 1)[None]
    x = F.conv2d(x, weights[:, None, None, :].to(x.dtype), groups=x.shape[1])
    x = F.conv2d(x, weights[:, None, :, None].to(x.dtype), groups=x.shape[1])
    return x.view_as(images)


def rescaled(
    images: Tensor, size: tuple[int, int], flip: bool | Tensor = False, *, align_corners: bool = False
) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """A view of a batch at another size, mirrored or not, and the function that moves its maps back; both bilinear.

    Args:
        images: (batch, channels, height, width).
        size: rows and columns of the view.
        flip: mirror left and right: all images, or those of a mask (batch,).
        align_corners: as of :func:`torch.nn.functional.interpolate`.

    Returns:
        The view, (batch, channels, *size), and a function from maps (batch, classes, *size) to (batch, classes, height, width)
        that raises a ValueError for anything but maps.
    """
    which = torch.as_tensor(flip, device=images.device).expand(len(images))[:, None, None, None]

    def resized(x: Tensor, to: Sequence[int]) -> Tensor:
        return F.interpolate(x, size=tuple(to), mode="bilinear", align_corners=align_corners)

    def undo(maps: Tensor) -> Tensor:
        require(maps.dim() == 4, f"logits of shape {tuple(maps.shape)} for views of other sizes", "maps (segmentation)")
        return resized(torch.where(which, maps.flip(3), maps), images.shape[2:])

    return resized(torch.where(which, images.flip(3), images), size), undo


def scaled(generator: torch.Generator) -> Callable[[Tensor], View]:
    """A function whose first call gives the batch itself, each further one a view at the next of :data:`SCALES`, and so on.

    Each image of a view is mirrored with probability 0.5. So the segmentation code of Marsden et al. (WACV 2024) makes
    the views of CoTTA; corners are aligned.
    """
    calls = itertools.cycle((None, *SCALES))

    def view(images: Tensor) -> View:
        scale = next(calls)
        if scale is None:
            return images
        size = int(scale * images.shape[2]), int(scale * images.shape[3])
        return rescaled(images, size, _chance(0.5, images, generator).flatten(), align_corners=True)

    return view


def number(choice: Augment, views: int) -> int:
    """Number of views that are averaged: ``views``, but for ``"scales"``, which has one a scale and the batch itself."""
    return 1 + len(SCALES) if choice == "scales" else views


def augmentation(choice: Augment, generator: torch.Generator, *, sharp: bool = False) -> Callable[[Tensor], Any]:
    """A function that makes one random view of a batch.

    Args:
        choice: ``"paper"``, ``"none"`` (the batch itself), ``"scales"`` (see :func:`scaled`), or a callable on a batch.
        generator: on the CPU; all random numbers of ``"paper"`` come from it. The noise is drawn on the images' device,
            by a generator seeded from this one, so that a GPU neither waits nor receives an image of noise.
        sharp: ``"paper"`` means ROID's views, without blur and noise, not CoTTA's.
    """
    if callable(choice):
        return choice
    if choice == "none":
        return lambda images: images
    if choice == "scales":
        return scaled(generator)
    if sharp:
        return lambda images: sharp_view(images, draw_factors(generator)).clamp_(0, 1)

    def view(images: Tensor) -> Tensor:
        view = paper_view(images, draw_factors(generator))
        noise = torch.empty_like(view).normal_(0, NOISE, generator=generator_on(images.device, generator))
        return view.add_(noise).clamp_(0, 1)

    return view


def averaged(
    predict: Callable[[Tensor], Tensor], x: Tensor, view: Callable[[Tensor], View], views: int, at_once: int = 1
) -> Tensor:
    """Mean of ``predict`` over random views of the batch.

    Args:
        predict: (batch, ...) -> (batch, classes), or maps (batch, classes, height, width).
        x: the batch.
        view: makes one random view of it, see :func:`augmentation`; or a pair of a view and the function that moves its maps
            back to where the pixels of the batch are.
        views: number of views.
        at_once: views that share a forward, each with batch statistics of its own: the mean is the same. Pairs go one by one.

    Returns:
        (batch, classes), or maps.
    """
    sums = []
    for start in range(0, views, at_once):
        made = [view(x) for _ in range(min(at_once, views - start))]
        together = [v for v in made if isinstance(v, Tensor)]
        if len(made) == len(together) > 1:  # vmap: each view keeps batch statistics of its own
            with compiling.eagerly():
                sums.append(torch.vmap(predict)(torch.stack(together)).sum(0))
        else:
            sums += [_moved_back(predict, v, x) for v in made]
    return torch.stack(sums).sum(0) / views


def _moved_back(predict: Callable[[Tensor], Tensor], view: View, x: Tensor) -> Tensor:
    """The prediction of a view, a map of it where the pixels of the batch are.

    Raises:
        ValueError: the map of a view without an undo has another size than the batch; or the model cannot predict a view of another
            size than the batch.
    """
    if not isinstance(view, Tensor):
        images, undo = view
        try:
            return undo(predict(images))
        except RuntimeError as error:
            if images.shape == x.shape or isinstance(error, torch.OutOfMemoryError):
                raise
            sizes = " x ".join(map(str, images.shape[2:])), " x ".join(map(str, x.shape[2:]))
            raise ValueError(
                f"The model predicts pictures of {sizes[1]} pixels, but not their view of {sizes[0]}: {error}. Pass larger pictures, or "
                "another augment= than 'scales'."
            ) from error
    found = predict(view)
    moved = found.dim() == 4 and found.shape[2:] != x.shape[2:]
    require(
        not moved,
        f"a view of size {tuple(view.shape[2:])} without its undo",
        "views of the batch's size, or (view, undo)",
    )
    return found


def check(choice: Any, *, scales: bool = False) -> None:
    """Raise a ValueError unless :func:`augmentation` takes the ``augment`` of a method's hyper-parameters.

    Args:
        choice: as given.
        scales: whether the method takes ``"scales"`` too.
    """
    known = ("paper", "none", "scales") if scales else ("paper", "none")
    expected = f"{', '.join(map(repr, known))} or a callable"
    require(callable(choice) or choice in known, f"augment={choice!r}", expected)


def generator_on(device: torch.device, seeded_by: torch.Generator) -> torch.Generator:
    """A random generator on a device, seeded by a draw from the one on the CPU, whose state is saved."""
    seed = torch.randint(2**62, (), generator=seeded_by)
    return torch.Generator(device).manual_seed(int(seed))
