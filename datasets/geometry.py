"""Resizing and cropping of pictures to the input size of a model, as uint8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

INTERPOLATIONS = [mode.value for mode in InterpolationMode]
# Times that the longer side of a picture may be the shorter one if it is resized: 1 x 3000 pixels would become 256 x 768 000.
LONGEST = 100


@dataclass(frozen=True)
class Geometry:
    """Turns a picture of any size into an input image: resized like the published recipes, then cropped.

    Hendrycks & Dietterich, ICLR 2019, made ImageNet-C with ``Geometry(256, 224)``.

    Args:
        resize: pixels of the shorter side; None does not resize.
        crop: side of the square in the middle; None does not crop.
        squash: resize both sides to ``resize`` pixels, whatever the picture's proportions.
        interpolation: of the resizing: ``"bilinear"``, ``"bicubic"`` or another of torchvision's.

    Raises:
        ValueError: sizes that are not positive whole numbers, a crop larger than the resized picture, or an unknown
            interpolation.
    """

    resize: int | None = None
    crop: int | None = None
    squash: bool = False
    interpolation: str = "bilinear"

    def __post_init__(self) -> None:
        for name in ("resize", "crop"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is a number of pixels, or null to leave it out; got {value!r}.")
        if self.resize is not None and self.crop is not None and self.crop > self.resize:
            raise ValueError(f"crop={self.crop} does not fit into images resized to {self.resize}: raise resize.")
        if self.squash and self.resize is None:
            raise ValueError("squash=true needs resize, the pixels of both sides.")
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation is one of {', '.join(INTERPOLATIONS)}; got {self.interpolation!r}.")

    def __call__(self, picture: Any) -> Tensor:
        """A PIL picture as (3, height, width), uint8.

        Raises:
            ValueError: smaller than the crop, or too long and narrow to be resized; the reason, without the picture's name.
        """
        if self.resize is not None:
            _check_shape(picture, self.resize)
            size = [self.resize] * (2 if self.squash else 1)
            picture = F.resize(picture, size, interpolation=InterpolationMode(self.interpolation))
        if self.crop is not None:
            if min(picture.size) < self.crop:
                raise ValueError(f"it has {picture.size[0]} x {picture.size[1]} pixels, crop={self.crop} needs more")
            picture = F.center_crop(picture, [self.crop])
        return _tensor(picture)

    def enlarges_a_crop(self, image: Tensor) -> bool:
        """Whether a picture already has the size of the crop, and would be enlarged and cropped again."""
        sides = image.shape[1:]
        return self.resize is not None and self.resize > min(sides) and all(side == self.crop for side in sides)

    def __str__(self) -> str:
        resized = "" if self.resize is None else f"{'both sides' if self.squash else 'shorter side'} to {self.resize}"
        resized += f" ({self.interpolation})" if resized and self.interpolation != "bilinear" else ""
        cropped = "" if self.crop is None else f"middle {self.crop} x {self.crop}"
        return ", ".join(part for part in (resized, cropped) if part) or "as stored"


def fitted(picture: Any, preprocessing: Mapping[str, Any]) -> Tensor:
    """A PIL picture as a model's weights expect it, uint8 (3, height, width); unchanged if it has their input size.

    Args:
        picture: of any size.
        preprocessing: that of :class:`tta.models.classifier.ImageClassifier`: ``input_size`` (height, width; None leaves the
            picture unchanged), ``resize`` (pixels of the shorter side; None: 8/7 of the input), ``interpolation`` (None:
            bilinear) and ``crop`` (``"squash"`` resizes both sides to the input size; anything else crops the middle).

    Raises:
        ValueError: too long and narrow a picture to be resized.
    """
    size = preprocessing.get("input_size")
    if size is None or [picture.height, picture.width] == list(size):
        return _tensor(picture)
    _check_shape(picture, preprocessing.get("resize") or min(size))
    how = InterpolationMode(preprocessing.get("interpolation") or "bilinear")
    if preprocessing.get("crop") == "squash":
        return _tensor(F.resize(picture, list(size), interpolation=how))
    resized = F.resize(picture, [preprocessing.get("resize") or max(size) * 8 // 7], interpolation=how)
    return _tensor(F.center_crop(resized, list(size)))


def _check_shape(picture: Any, resize: int) -> None:
    width, height = picture.size
    if max(width, height) > LONGEST * min(width, height):
        factor = resize / max(1, min(width, height))
        raise ValueError(
            f"it has {width} x {height} pixels, one side more than {LONGEST} times the other; resized to {resize} pixels it "
            f"would have {width * factor:.0f} x {height * factor:.0f}"
        )


def _tensor(picture: Any) -> Tensor:
    image: Tensor = F.pil_to_tensor(picture)  # torchvision's functions are untyped
    return image
