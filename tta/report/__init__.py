"""Reports: results side by side as tables, figures and an HTML page."""

from tta.report.comparison import Comparison, compare

__all__ = ["Comparison", "compare", "figures", "page", "schedule", "tables"]
