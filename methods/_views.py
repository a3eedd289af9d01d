"""Views of one image, and what a vision-language model sees in them: shared by the methods for two towers."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import taps
from tta.adapter import Adapter, Config, require
from tta.functional import entropy, plain_images
from tta.methods._augmix import augmix_views
from tta.towers import TwoTowers, towers_of

TRIES = 10  # crops that are drawn until one fits into the image
ASPECT = 4 / 3  # largest width over height of a crop, relative to the image; 3/4 is the smallest
AT_ONCE = 256  # views in one forward


@dataclass
class ViewsConfig(Config):
    """Settings of the views that a method makes of an image.

    Attributes:
        views: number of views, the image itself among them. A batch (images, views, channels, height, width) brings its
            own, the image first.
        augment: ``"crop"`` (random crops, resized to the image's size), ``"augmix"`` (crops mixed with AugMix's operations), or
            from Python a callable that maps an image (1, 3, height, width) to its views, the image first.
        min_scale: smallest share of the image's area in a crop; of ``"crop"`` only.
        flip: mirror half of the crops; of ``"crop"`` only.
    """

    views: int = 64
    augment: Any = "crop"
    min_scale: float = 0.08
    flip: bool = True

    def __post_init__(self) -> None:
        require(self.views >= 1, f"views={self.views}", "1 or more")
        require(
            callable(self.augment) or self.augment in ("crop", "augmix"),
            f"augment={self.augment!r}",
            "'crop', 'augmix' or a callable",
        )
        require(0 < self.min_scale <= 1, f"min_scale={self.min_scale}", "a share of the area, above 0 and at most 1")


class Seen(NamedTuple):
    """An image as the model sees it: unit features (views, width) and logits (views, classes), the image itself first."""

    features: Tensor
    logits: Tensor

    def surest(self, share: float) -> Tensor:
        """Places of the views of least entropy, ascending; a share of them, one at least."""
        return entropy(self.logits).argsort(stable=True)[: max(1, int(len(self.logits) * share))]


class TwoTowersAdapter(Adapter):
    """An adapter for a model of two towers, whose images are seen one by one, each in several views."""

    two_towers = True
    needs = "one class an image"

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        found = towers_of(self.model, type(self).__name__)
        self._towers = next(name for name, module in self.model.named_modules() if module is found)
        self._head = taps.head(self.model)

    @property
    def towers(self) -> TwoTowers:
        """The two towers in the model."""
        return self.model.get_submodule(self._towers)  # type: ignore[return-value]

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the present class names, of the images themselves."""
        return super().predict(plain_images(x))

    def scores(self, features: Tensor) -> Tensor:
        """Logits of unit features (..., width) with the text features of the classes."""
        logits: Tensor = self.model.get_submodule(self._head)(features)
        return logits

    @torch.no_grad()
    def look(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Unit features (batch, width) and logits (batch, classes) of the images themselves."""
        return taps.look(self.model, self._head, plain_images(x))

    @torch.no_grad()
    def seen(self, x: Tensor, generator: torch.Generator | None = None) -> Iterator[Seen]:
        """Each image of a batch with its views, one after another; the model sees about :data:`AT_ONCE` views in a forward.

        Args:
            x: (batch, 3, height, width), or with its own views, (batch, views, 3, height, width).
            generator: of random views; the adapter's own if left out.
        """
        number = self._number(x)
        for images in torch.split(x, max(1, AT_ONCE // number)):
            views = self._views(images, number, generator or self.generator)
            features, logits = taps.look(self.model, self._head, views.flatten(0, 1))
            for f, z in zip(*(torch.split(every, views.shape[1]) for every in (features, logits)), strict=True):
                yield Seen(f, z)

    def _number(self, x: Tensor) -> int:
        return x.shape[1] if x.dim() == 5 else getattr(self.config, "views", 1)

    def _views(self, images: Tensor, number: int, generator: torch.Generator) -> Tensor:
        """(images, views, 3, height, width), the image first."""
        if images.dim() == 5:
            return images
        if number == 1:
            return images[:, None]
        config: Any = self.config
        if callable(config.augment):
            return torch.stack([config.augment(image) for image in torch.split(images, 1)])
        if config.augment == "augmix":
            mixed = [augmix_views(image, number - 1, generator) for image in images]
            return torch.cat([images[:, None], torch.stack(mixed).to(images.dtype)], dim=1)
        return torch.cat([images[:, None], crops(images, number - 1, config.min_scale, config.flip, generator)], dim=1)

    def copied_generator(self) -> torch.Generator:
        """A generator in the present state, for a prediction that must leave it as it is."""
        return torch.Generator().set_state(self.generator.get_state())


def crops(images: Tensor, number: int, min_scale: float, flip: bool, generator: torch.Generator) -> Tensor:
    """Random crops of each image, resized to its size, bilinearly.

    As torchvision's ``RandomResizedCrop``: area uniform between ``min_scale`` and 1, the logarithm of the aspect uniform, the
    first of ten draws that fits. If none does it is the whole image, where torchvision takes a central crop.

    Args:
        images: (images, 3, height, width).
        number: crops of each.
        min_scale: smallest share of the area.
        flip: mirror half of them.
        generator: on the CPU.

    Returns:
        (images, number, 3, height, width).
    """
    height, width = images.shape[-2:]
    total = len(images) * number
    # One draw for all, so that an image gets the same crops whatever batch it comes in.
    draws = torch.rand(total, 2 * TRIES + 3, generator=generator)
    area, aspect = draws[:, :TRIES], draws[:, TRIES : 2 * TRIES]
    area, aspect = min_scale + (1 - min_scale) * area, ASPECT ** (2 * aspect - 1)
    pixels = area * height * width
    wide, high = (pixels * aspect).sqrt().round(), (pixels / aspect).sqrt().round()
    fits = (wide <= width) & (high <= height) & (wide >= 1) & (high >= 1)
    first = fits.long().argmax(1, keepdim=True)  # 0 if none fits
    wide = torch.where(fits.any(1), wide.gather(1, first)[:, 0], width)
    high = torch.where(fits.any(1), high.gather(1, first)[:, 0], height)
    across, down, mirrored = draws[:, -3:].unbind(1)
    left, top = (across * (width - wide + 1)).floor(), (down * (height - high + 1)).floor()
    sign = torch.where(mirrored < 0.5, -1.0, 1.0) if flip else torch.ones(total)
    matrix = torch.zeros(total, 2, 3)
    matrix[:, 0, 0], matrix[:, 0, 2] = sign * wide / width, (2 * left + wide) / width - 1
    matrix[:, 1, 1], matrix[:, 1, 2] = high / height, (2 * top + high) / height - 1
    with torch.autocast(images.device.type, enabled=False):
        # In float32: places that bfloat16 rounds lie half a pixel beside their own.
        grid = F.affine_grid(matrix.to(images.device), [total, 3, height, width], align_corners=False)
        repeated = images.float()[:, None].expand(-1, number, -1, -1, -1).flatten(0, 1)
        found = F.grid_sample(repeated, grid, padding_mode="border", align_corners=False)
    return found.view(len(images), number, *images.shape[1:]).to(images.dtype)


def selection_fits(share: float) -> None:
    """Raise a ValueError for a share of the views that is not in (0, 1]."""
    require(
        0 < share <= 1 and math.isfinite(share), f"selection={share}", "a share of the views, above 0 and at most 1"
    )
