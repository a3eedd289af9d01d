"""Test-time adaptation of vision models.

A source classifier meets a stream of shifted, unlabelled images; an adapter predicts on each batch and learns from it.

Every public name is bound on first use, so that ``import tta`` is quick and ``import tta.methods.x`` works alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tta.adapter import Adapter, Config, OptimizerConfig, Output
    from tta.benchmark import bench, tune
    from tta.datasets.catalog import stream
    from tta.engine import evaluate
    from tta.guard import Guard
    from tta.methods import adapt, load
    from tta.methods import available as list_methods
    from tta.models import load_model, preflight
    from tta.report import compare
    from tta.results import Result
    from tta.source import SourceStatistics
    from tta.towers import TwoTowers

_HOME = {
    "Adapter": ("tta.adapter", "Adapter"),
    "Config": ("tta.adapter", "Config"),
    "Guard": ("tta.guard", "Guard"),
    "OptimizerConfig": ("tta.adapter", "OptimizerConfig"),
    "Output": ("tta.adapter", "Output"),
    "Result": ("tta.results", "Result"),
    "SourceStatistics": ("tta.source", "SourceStatistics"),
    "TwoTowers": ("tta.towers", "TwoTowers"),
    "adapt": ("tta.methods", "adapt"),
    "bench": ("tta.benchmark", "bench"),
    "compare": ("tta.report", "compare"),
    "evaluate": ("tta.engine", "evaluate"),
    "list_methods": ("tta.methods", "available"),
    "load": ("tta.methods", "load"),
    "load_model": ("tta.models", "load_model"),
    "preflight": ("tta.models", "preflight"),
    "stream": ("tta.datasets.catalog", "stream"),
    "tune": ("tta.benchmark", "tune"),
}
_PACKAGES = ("configs", "datasets", "methods")

__all__ = [
    "Adapter",
    "Config",
    "Guard",
    "OptimizerConfig",
    "Output",
    "Result",
    "SourceStatistics",
    "TwoTowers",
    "adapt",
    "bench",
    "compare",
    "evaluate",
    "list_methods",
    "load",
    "load_model",
    "preflight",
    "stream",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        module, attribute = _HOME[name]
        value = getattr(import_module(module), attribute)
    elif name in _PACKAGES:
        value = import_module(f"tta.{name}")
    else:
        raise AttributeError(f"module 'tta' has no attribute '{name}'")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, *_PACKAGES])
