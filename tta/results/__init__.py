"""Results: what a run leaves on disk and what is computed from it.

Modules that load torch (``cost``, ``metrics``, ``record``) are imported when asked for: reading a result needs none.
"""

from tta.results.intervals import Interval, compare_errors, error_interval
from tta.results.predictions import Predictions
from tta.results.result import Result, Row, differences, environment, find_results

__all__ = [
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
