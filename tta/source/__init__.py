"""Source statistics: recorded once from source images, saved, and used by methods."""

from tta.source.kinds import Known, Need, layer_moments
from tta.source.shift import ShiftNetwork, bounded
from tta.source.statistics import BATCH_SIZE, EXPECTED, Entry, SourceLike, SourceStatistics, known_from

__all__ = [
    "BATCH_SIZE",
    "EXPECTED",
    "Entry",
    "Known",
    "Need",
    "ShiftNetwork",
    "SourceLike",
    "SourceStatistics",
    "bounded",
    "known_from",
    "layer_moments",
]
