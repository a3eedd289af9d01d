"""Source models: a spec and a checkpoint become a module that takes images in [0, 1]."""

from tta.models.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD, NO_MEAN, NO_STD, ImageClassifier
from tta.models.load import EMBEDDED, list_models, load_model
from tta.models.sanity import PreflightWarning, preflight

__all__ = [
    "EMBEDDED",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NO_MEAN",
    "NO_STD",
    "ImageClassifier",
    "PreflightWarning",
    "list_models",
    "load_model",
    "preflight",
]
