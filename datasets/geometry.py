"""How a picture of any size becomes an image of the model's: resized, cropped, uint8."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

INTERPOLATIONS = [mode.value for mode in InterpolationMode]


@dataclass(frozen=True)
class Geometry:
    """How a picture of any size becomes an image of the model's: resized as the published recipes do, then cropped.

    Hendrycks & Dietterich, ICLR 2019, made ImageNet-C with ``Geometry(256, 224)``.

    Args:
        resize: pixels of the shorter side; None leaves the picture as it is.
        crop: side of the square taken from the middle; None takes all.
        squash: both sides become ``resize`` pixels, whatever the picture's proportions.
        interpolation: of the resizing: ``"bilinear"``, ``"bicubic"`` or another of torchvision's.

    Raises:
        ValueError: sizes that are no positive whole numbers, a crop larger than what is left after resizing, or an unknown
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
        """A PIL picture as (3, height, width), uint8."""
        if self.resize is not None:
            size = [self.resize] * (2 if self.squash else 1)
            picture = F.resize(picture, size, interpolation=InterpolationMode(self.interpolation))
        if self.crop is not None:
            if min(picture.size) < self.crop:
                raise ValueError(f"it has {picture.size[0]} x {picture.size[1]} pixels, crop={self.crop} needs more")
            picture = F.center_crop(picture, [self.crop])
        return F.pil_to_tensor(picture)

    def enlarges_a_crop(self, image: Tensor) -> bool:
        """Whether a picture has the size of the crop already and would be enlarged, to be cropped once more."""
        sides = image.shape[1:]
        return self.resize is not None and self.resize > min(sides) and all(side == self.crop for side in sides)

    def __str__(self) -> str:
        resized = "" if self.resize is None else f"{'both sides' if self.squash else 'shorter side'} to {self.resize}"
        resized += f" ({self.interpolation})" if resized and self.interpolation != "bilinear" else ""
        cropped = "" if self.crop is None else f"middle {self.crop} x {self.crop}"
        return ", ".join(part for part in (resized, cropped) if part) or "as stored"


def fitted(picture: Any, preprocessing: Mapping[str, Any]) -> Tensor:
    """A PIL picture as a model's weights expect it, uint8 (3, height, width); one of their input size stays as it is.

    Args:
        picture: of any size.
        preprocessing: as :class:`tta.models.classifier.ImageClassifier` has it: ``input_size`` (height, width; None leaves the
            picture as it is), ``resize`` (pixels of the shorter side; None: 8/7 of the input), ``interpolation`` (None:
            bilinear) and ``crop`` (``"squash"`` resizes both sides to the input size; all else crops the middle).
    """
    size = preprocessing.get("input_size")
    if size is None or [picture.height, picture.width] == list(size):
        return F.pil_to_tensor(picture)
    how = InterpolationMode(preprocessing.get("interpolation") or "bilinear")
    if preprocessing.get("crop") == "squash":
        return F.pil_to_tensor(F.resize(picture, list(size), interpolation=how))
    resized = F.resize(picture, [preprocessing.get("resize") or max(size) * 8 // 7], interpolation=how)
    return F.pil_to_tensor(F.center_crop(resized, list(size)))
