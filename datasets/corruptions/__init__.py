"""Nineteen corruptions of images, in both published recipes."""

from tta.datasets.corruptions.recipes import (
    CORRUPTIONS,
    HIGHEST,
    QUARTERS,
    RECIPES,
    VALIDATION_CORRUPTIONS,
    apply,
    constants,
    corrupt,
    corrupt_masks,
    draw,
)

__all__ = [
    "CORRUPTIONS",
    "HIGHEST",
    "QUARTERS",
    "RECIPES",
    "VALIDATION_CORRUPTIONS",
    "apply",
    "constants",
    "corrupt",
    "corrupt_masks",
    "draw",
]
