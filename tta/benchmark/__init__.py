"""Benchmarks: a description becomes a grid of runs, which are run on any number of workers and summed up in a table."""

from tta.benchmark.cells import Cell, Failure, Outcome
from tta.benchmark.describe import DESCRIPTION, Benchmark, available, bench, entries, in_order, load, run, table, tune
from tta.benchmark.selection import WAYS
from tta.benchmark.settings import RunSettings
from tta.benchmark.summary import Summary

__all__ = [
    "DESCRIPTION",
    "WAYS",
    "Benchmark",
    "Cell",
    "Failure",
    "Outcome",
    "RunSettings",
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
