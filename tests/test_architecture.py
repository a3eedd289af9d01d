"""Imports go in one direction: every module of the package may import only what its row of the table names."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tta": "tta", "methods": "tta.methods", "datasets": "tta.datasets", "configs": "tta.configs"}

TOOLS = "torch tta.functional tta.norms tta.taps tta.memory tta.augment tta.augmix tta.sharpness tta.evolution tta.shift tta.fingerprint"
ADAPTER = f"{TOOLS} safetensors tta.adapter tta.source tta.source_kinds tta.contrast tta.weighting"
ANYTHING = f"{ADAPTER} tta tta.methods tta.datasets tta.models tta.config tta.configs tta.results tta.intervals tta.engine tta.sanity numpy"
MEASURING = "tta.metrics tta.curves tta.cost tta.record tta.predictions"

# module -> what it may import besides the standard library. A row `x.*` speaks for the modules inside package x.
# Nothing names tta.report or tta.cli but the two that may; a new module of tta/ needs a row of its own.
MAY_IMPORT = {
    "tta.functional": TOOLS,
    "tta.norms": TOOLS,
    "tta.taps": TOOLS,
    "tta.memory": TOOLS,
    "tta.augment": f"{TOOLS} torchvision",
    "tta.augmix": TOOLS,
    "tta.sharpness": TOOLS,
    "tta.evolution": TOOLS,
    "tta.shift": TOOLS,
    "tta.fingerprint": TOOLS,
    "tta.allocator": "",
    "tta.adapter": ADAPTER,
    "tta.source": ADAPTER,
    "tta.source_kinds": TOOLS,
    "tta.contrast": ADAPTER,
    "tta.weighting": ADAPTER,
    "tta.methods": f"{ADAPTER} tta.config",
    "tta.methods.*": f"{ADAPTER} torchvision",
    "tta.datasets": "torch tta.datasets.*",
    "tta.datasets.*": "torch torchvision numpy sklearn pooch yaml tta.fingerprint tta.paths tta.datasets.*",
    "tta.networks": "torch timm",
    "tta.classifier": TOOLS,
    "tta.checkpoints": f"{TOOLS} safetensors",
    "tta.families": f"{TOOLS} timm torchvision transformers tta.networks tta.paths tta.classifier tta.checkpoints",
    "tta.models": f"{TOOLS} tta.networks tta.classifier tta.checkpoints tta.families",
    "tta.sanity": f"{TOOLS} tta.classifier",
    "tta.paths": "pooch",
    "tta.config": "omegaconf yaml tta.adapter",
    "tta.configs": "",
    "tta.predictions": "numpy",
    "tta.curves": "numpy pyarrow tta.predictions",
    "tta.results": f"{ADAPTER} numpy pandas tta.config tta.models tta.curves tta.predictions",
    "tta.intervals": "numpy tta.predictions tta.results",
    "tta.metrics": "torch torchmetrics numpy tta.functional tta.curves tta.predictions tta.results",
    "tta.cost": "torch tta.adapter",
    "tta.record": "torch tta.adapter tta.metrics tta.predictions tta.datasets.*",
    "tta.engine": f"{ADAPTER} lightning rich tta.config tta.results tta.methods tta.datasets.* {MEASURING}",
    "tta.report": f"{ANYTHING} tta.tables rich pandas matplotlib tta.datasets.*",
    "tta.tables": "",
    "tta.runs": f"{ANYTHING} rich tta.datasets.*",
    "tta.cells": "tta.engine tta.results tta.runs",
    "tta.workers": "torch ray tta.cells tta.allocator",
    "tta.selection": "tta.cells tta.results",
    "tta.published": "tta.config tta.results",
    "tta.summary": "rich pandas tta tta.tables tta.cells tta.published tta.results tta.runs tta.selection",
    "tta.benchmark": f"{ANYTHING} yaml tta.datasets.* tta.runs tta.cells tta.workers tta.selection tta.summary",
    "tta.plots": "numpy torch matplotlib tta.datasets.*",
    "tta.figures": "numpy pandas matplotlib tta.plots tta.report tta.results tta.tables",
    "tta.page": "matplotlib tta.figures tta.report tta.results tta.summary",
    "tta.words": "tta.adapter tta.config tta.runs tta.methods tta.datasets.*",
    "tta.listings": "tta.config tta.methods tta.datasets.* tta.models tta.benchmark tta.published",
    "tta.cli": f"{ANYTHING} rich tta.datasets.* tta.allocator tta.words tta.listings tta.report tta.plots tta.figures tta.page tta.runs tta.benchmark tta.selection tta.published tta.cells",
    "tta.__main__": "tta.cli",
    "tta": "tta.* tta.datasets.*",  # the table of public names, for type checkers only
}


def module_files() -> dict[str, Path]:
    """Every module of the package, by its import name."""
    files = {}
    for folder, package in FOLDERS.items():
        for file in sorted((ROOT / folder).rglob("*.py")):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            files[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return files


MODULES = module_files()


def imported(source: str, module: str, is_package: bool = False) -> Iterator[str]:
    """Names of all modules that a source text imports, wherever in the text, relative imports spelled out.

    Of the package the module is named (``tta.adapter``), of others the top level (``torch``). What is imported from
    ``tta`` itself and is no module of it counts as an import of ``tta``.
    """
    package = module.split(".") if is_package else module.split(".")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            home = ".".join(part for part in (base, node.module) if part)
            inside = [f"{home}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else home for name in inside]
        else:
            continue
        yield from (name if name.split(".")[0] == "tta" else name.split(".")[0] for name in names)


def row_of(module: str) -> set[str]:
    """The names that a module may import."""
    for pattern in (module, f"{module.rpartition('.')[0]}.*"):
        if pattern in MAY_IMPORT:
            return set(MAY_IMPORT[pattern].split())
    raise AssertionError(f"{module} has no row in MAY_IMPORT of {__file__}: say there what it may import.")


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports and may not."""
    allowed = row_of(module)
    return sorted(
        name
        for name in set(imported(source, module, is_package))
        if name not in sys.stdlib_module_names
        and name not in allowed
        and not (name.startswith("tta.") and f"{name.rpartition('.')[0]}.*" in allowed)
    )


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_row_allows(module: str) -> None:
    file = MODULES[module]
    found = violations(file.read_text(), module, is_package=file.name == "__init__.py")
    assert not found, f"{module} may not import {', '.join(found)}"


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        ("tta.methods.tent", "from tta.methods.norm import Norm", ["tta.methods.norm"]),
        ("tta.methods.tent", "from . import norm", ["tta.methods.norm"]),
        ("tta.methods.tent", "from .norm import Norm", ["tta.methods.norm"]),
        ("tta.methods.tent", "from ..config import preset", ["tta.config"]),
        ("tta.methods.tent", "from tta.methods import find", ["tta.methods"]),
        ("tta.methods.tent", "from tta import evaluate", ["tta"]),
        ("tta.methods.tent", "def late():\n    import tta.engine", ["tta.engine"]),
        ("tta.datasets.stream", "from tta.adapter import Adapter", ["tta.adapter"]),
        ("tta.functional", "import torch, torchvision", ["torchvision"]),
        ("tta.norms", "if TYPE_CHECKING:\n    from tta.adapter import Adapter", ["tta.adapter"]),
        ("tta.results", "import lightning.pytorch as pl", ["lightning"]),
        ("tta.engine", "from omegaconf import OmegaConf", ["omegaconf"]),
        ("tta.engine", "from tta.report import table", ["tta.report"]),
        ("tta.cli", "import datasets", ["datasets"]),
        ("tta.cli", "from methods.tent import Tent", ["methods"]),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, found: list[str]) -> None:
    assert violations(source, module) == found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tta.methods.tent", "import torch.nn.functional as F\nfrom tta import norms\nfrom tta.adapter import Adapter"),
        ("tta.datasets.digits_c", "import numpy\nfrom . import stream"),
        ("tta.engine", "import json\nimport lightning.pytorch as pl\nfrom tta.datasets.stream import Stream"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_module_without_a_row_is_named() -> None:
    with pytest.raises(AssertionError, match=r"tta\.newcomer has no row"):
        row_of("tta.newcomer")


@pytest.mark.parametrize(("library", "owner"), [("lightning", "tta.engine"), ("omegaconf", "tta.config")])
def test_one_module_owns_the_library(library: str, owner: str) -> None:
    importers = [name for name, file in MODULES.items() if library in imported(file.read_text(), name)]
    assert importers == [owner]


def test_nothing_imports_the_folders_by_their_bare_names() -> None:
    """``import methods.tent`` would load a second class that is not the one of ``tta.methods.tent``."""
    files = [file for folder in (*FOLDERS, "tests", "benchmarks") for file in (ROOT / folder).rglob("*.py")]
    bare = {"methods", "datasets", "configs"}
    assert [str(file) for file in files if bare & set(imported(file.read_text(), "outside"))] == []


def test_import_tta_is_light() -> None:
    heavy = ["torch", "lightning", "torchmetrics", "torchvision", "timm", "omegaconf", "pandas", "pyarrow", "sklearn"]
    code = f"import sys, tta; print(*(name for name in {heavy} if name in sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == []
