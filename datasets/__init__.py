"""Images as streams: domains, protocols, corruptions, and one file for each source of images."""

from tta.datasets.corruptions import CORRUPTIONS, VALIDATION_CORRUPTIONS, corrupt
from tta.datasets.domains import Domain
from tta.datasets.stream import Batch, Stream

__all__ = ["CORRUPTIONS", "VALIDATION_CORRUPTIONS", "Batch", "Domain", "Stream", "corrupt"]
