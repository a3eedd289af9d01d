"""Benchmarks: a description becomes a grid of runs, the runs are done wherever there is room, a table sums them up."""

from tta.benchmark.cells import Failure
from tta.benchmark.describe import DESCRIPTION, Benchmark, available, bench, entries, in_order, load, run, table, tune
from tta.benchmark.selection import WAYS
from tta.benchmark.summary import Summary

__all__ = [
    "DESCRIPTION",
    "WAYS",
    "Benchmark",
    "Failure",
    "Summary",
    "available",
    "bench",
    "entries",
    "in_order",
    "load",
    "run",
    "runs",
    "table",
    "tune",
]
