"""Results of runs: files on disk, and the metrics and intervals computed from them.

Modules that load torch (``cost``, ``metrics``, ``record``) are imported only on demand: reading a result needs none.
"""

from tta.results.intervals import Interval, compare_errors, error_interval
from tta.results.predictions import Predictions
from tta.results.result import BrokenResultWarning, Result, Row, differences, environment, find_results

__all__ = [
    "BrokenResultWarning",
    "Interval",
    "Predictions",
    "Result",
    "Row",
    "compare_errors",
    "cost",
    "curves",
    "differences",
    "environment",
    "error_interval",
    "find_results",
    "metrics",
    "published",
    "record",
]
