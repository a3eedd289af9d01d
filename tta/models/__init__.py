"""Source models: a spec and a checkpoint become a module that takes images in [0, 1]."""

from tta.models.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD, NO_MEAN, NO_STD, ImageClassifier
from tta.models.load import EMBEDDED, list_models, load_model, reads_names
from tta.models.sanity import PreflightWarning, preflight
from tta.models.vision_language import imagenet_names

__all__ = [
    "EMBEDDED",
    "HALF",
    "IMAGENET_MEAN",
    "IMAGENET_STD",
    "NO_MEAN",
    "NO_STD",
    "ImageClassifier",
    "PreflightWarning",
    "imagenet_names",
    "list_models",
    "load_model",
    "preflight",
    "reads_names",
]
