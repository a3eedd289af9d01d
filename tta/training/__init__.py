"""Source stage: a classifier is trained, with a method's auxiliary part or alone, and written as one file."""

from tta.training.settings import TrainSettings
from tta.training.stage import Trained, configured, train

__all__ = ["TrainSettings", "Trained", "configured", "train"]
