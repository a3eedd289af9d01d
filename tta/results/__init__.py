"""Results of runs: files on disk, and the metrics and intervals computed from them.

Modules that load torch (``cost``, ``keeper``, ``metrics``, ``record``) are imported only on demand: reading a result needs none.
"""

from tta.results.frames import Frame
from tta.results.intervals import Interval, compare_errors, error_interval
from tta.results.predictions import ACTIONS, Predictions
from tta.results.result import BrokenResultWarning, Result, Row, differences, environment, find_results

__all__ = [
    "ACTIONS",
    "BrokenResultWarning",
    "Frame",
    "Interval",
    "Predictions",
    "Result",
    "Row",
    "boxes",
    "compare_errors",
    "cost",
    "curves",
    "differences",
    "environment",
    "error_interval",
    "find_results",
    "frames",
    "keeper",
    "maps",
    "metrics",
    "numbers",
    "published",
    "record",
]
