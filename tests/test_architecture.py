"""Imports go in one direction: a module may import only what the row of its room names, and of a folder only its face."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from inspect import ismodule
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tta": "tta", "methods": "tta.methods", "datasets": "tta.datasets", "configs": "tta.configs"}

# Building blocks: flat files, one idea each, that may use one another.
BLOCKS = (
    "tta.messages tta.functional tta.distributed tta.norms tta.pooled tta.channels_last tta.taps tta.memory tta.ema tta.augment tta.fingerprint "
    "tta.hyperparameters tta.caches tta.compiling tta.precision"
)
ADAPTER = f"{BLOCKS} tta.towers tta.tasks tta.adapter tta.source"

# room -> what its modules may import besides the standard library and the room itself. A room is a folder or a file;
# nothing imports a room below it in this table, and nothing imports `tta` but as a user would.
MAY_IMPORT = {
    **dict.fromkeys(BLOCKS.split(), f"torch {BLOCKS}"),
    "tta.messages": "",
    "tta.augment": f"torch torchvision {BLOCKS}",
    "tta.paths": "pooch",
    "tta.places": "",
    "tta.auxiliary": f"torch {BLOCKS}",
    "tta.auxiliary_file": f"torch safetensors tta.places tta.auxiliary {BLOCKS}",
    "tta.labels": "",
    "tta.batches": "torch tta.labels",
    "tta.allocator": "",
    "tta.tasks": f"torch numpy faster_coco_eval tta.allocator tta.labels {BLOCKS}",
    "tta.towers": f"torch {BLOCKS}",
    "tta.models": f"torch timm torchvision transformers open_clip safetensors tta.paths tta.auxiliary_file tta.towers {BLOCKS}",
    "tta.source": f"torch safetensors tta.places tta.tasks {BLOCKS}",
    "tta.adapter": f"torch safetensors tta.places tta.towers tta.tasks tta.source {BLOCKS}",
    "tta.artefact": "torch safetensors onnx onnxruntime tta.places tta.functional",
    "tta.guard": f"torch numpy {ADAPTER}",
    "tta.configs": "",
    "tta.config": "omegaconf yaml tta.configs tta.hyperparameters tta.messages tta.adapter",
    "tta.methods.*": f"torch torchvision sklearn safetensors tta.auxiliary tta.auxiliary_file {ADAPTER}",
    "tta.methods": f"torch tta.config tta.guard tta.methods.* {ADAPTER}",
    "tta.datasets": "torch torchvision numpy PIL sklearn pooch yaml tta.fingerprint tta.labels tta.messages tta.paths",
    "tta.results": "torch torchmetrics numpy pandas pyarrow tta.messages tta.places tta.functional tta.labels tta.tasks tta.adapter "
    "tta.auxiliary tta.config",
    "tta.report": "numpy pandas rich matplotlib tta.messages tta.tasks tta.datasets tta.results",
    "tta.progress": "lightning rich tta.messages tta.datasets",
    "tta.callbacks": f"lightning torch tta.batches tta.methods tta.datasets tta.results {ADAPTER}",
    "tta.leftovers": f"torch tta.datasets {ADAPTER}",
    "tta.oracle": f"torch tta.labels tta.datasets {ADAPTER}",
    "tta.online": f"lightning torch numpy tta.tasks tta.oracle tta.labels tta.batches tta.datasets tta.results {ADAPTER}",
    "tta.engine": f"lightning torch tta.leftovers tta.methods tta.datasets tta.results tta.config tta.callbacks tta.progress tta.online {ADAPTER}",
    "tta.training": f"lightning torch tta.places tta.auxiliary tta.auxiliary_file tta.methods tta.config {ADAPTER}",
    "tta.benchmark": f"rich pandas yaml torch ray filelock tta tta.tasks tta.allocator tta.places tta.models tta.methods tta.datasets tta.results "
    f"tta.report tta.engine tta.config {ADAPTER}",
    "tta.serve": "fastapi uvicorn pydantic prometheus_client torch safetensors PIL filelock tta.messages tta.hyperparameters "
    "tta.adapter tta.datasets",
    "tta.demo": f"fastapi uvicorn pydantic torch PIL tta.labels tta.config tta.methods tta.datasets {ADAPTER}",
    "tta.cli": f"rich tta torch tta.training tta.serve tta.demo tta.artefact tta.allocator tta.places tta.models tta.methods tta.datasets tta.results tta.report tta.benchmark "
    f"tta.engine tta.config {ADAPTER}",
    "tta.__main__": "tta.cli",
    "tta": "tta.adapter tta.benchmark tta.datasets tta.engine tta.guard tta.methods tta.models tta.report tta.results tta.source tta.towers",
}
FOLDERS_WITH_A_FACE = [
    "tta.towers",
    "tta.models",
    "tta.tasks",
    "tta.source",
    "tta.adapter",
    "tta.guard",
    "tta.results",
    "tta.report",
    "tta.training",
    "tta.benchmark",
    "tta.serve",
    "tta.demo",
    "tta.cli",
    "tta.datasets.corruptions",
]


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


def room_of(module: str) -> str:
    """The room that a module belongs to: itself or the nearest package above that has a row."""
    if module.startswith("tta.methods."):
        return "tta.methods.*"
    parts = module.split(".")
    for length in range(len(parts), 1, -1):
        if ".".join(parts[:length]) in MAY_IMPORT:
            return ".".join(parts[:length])
    return module


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """Imports of a module that are not allowed: of another room, a library, another method, or a private part of a folder."""
    room = room_of(module)
    if room not in MAY_IMPORT:
        raise AssertionError(f"{module} has no row in MAY_IMPORT of {__file__}: say there what it may import.")
    allowed = {*MAY_IMPORT[room].split(), room}
    found = set()
    for name in imported(source, module, is_package):
        is_method = module.startswith("tta.methods.") and name.startswith("tta.methods.")
        if (
            name not in sys.stdlib_module_names
            and (room_of(name) not in allowed or (is_method and not is_shared(name)))
        ) or is_private(name, module):
            found.add(name)
    return sorted(found)


def is_shared(name: str) -> bool:
    """Whether a module of the methods' folder is one that methods share: ``_contrast.py``."""
    return name.startswith("tta.methods._")


def is_private(name: str, module: str) -> bool:
    """Whether a module lies in a folder that neither names it in its ``__all__`` nor holds the importing module."""
    for folder in FOLDERS_WITH_A_FACE:
        if name.startswith(f"{folder}.") and not f"{module}.".startswith(f"{folder}."):
            return name.removeprefix(f"{folder}.") not in face_of(folder)
    return False


@cache
def face_of(folder: str) -> tuple[str, ...]:
    """The names in a folder's ``__all__``."""
    for node in ast.parse(MODULES[folder].read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            return tuple(ast.literal_eval(node.value))
    raise AssertionError(f"{folder} names no face: give its __init__ an __all__.")


@pytest.mark.parametrize("module", MODULES)
def test_module_imports_only_what_its_room_may(module: str) -> None:
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
        ("tta.results.result", "import lightning.pytorch as pl", ["lightning"]),
        ("tta.results.record", "from tta.datasets.stream import Batch", ["tta.datasets.stream"]),
        ("tta.engine", "from omegaconf import OmegaConf", ["omegaconf"]),
        ("tta.engine", "from tta.report import table", ["tta.report"]),
        (
            "tta.engine",
            "from tta.results.curves import collapse\nfrom tta.results.result import Row",
            ["tta.results.result"],
        ),
        ("tta.datasets.stream", "from tta.datasets.corruptions.blur import disk", ["tta.datasets.corruptions.blur"]),
        (
            "tta.methods.cmf",
            "from tta.methods._weighting import x\nfrom tta.methods.roid import y",
            ["tta.methods.roid"],
        ),
        ("tta.cli.commands", "import datasets", ["datasets"]),
        ("tta.cli.commands", "from methods.tent import Tent", ["methods"]),
    ],
)
def test_a_forbidden_import_is_found(module: str, source: str, found: list[str]) -> None:
    assert violations(source, module) == found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("tta.methods.tent", "import torch.nn.functional as F\nfrom tta import norms\nfrom tta.adapter import Adapter"),
        ("tta.datasets.digits_c", "import numpy\nfrom . import stream"),
        ("tta.methods.cmf", "from tta.methods._weighting import SelfTraining"),
        ("tta.datasets.corruptions.blur", "from tta.datasets.corruptions import draws"),
        ("tta.report.tables", "from tta.results import metrics"),
        ("tta.engine", "import json\nimport lightning.pytorch as pl\nfrom tta.datasets.stream import Stream"),
    ],
)
def test_an_allowed_import_is_not(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_a_module_without_a_row_is_named() -> None:
    with pytest.raises(AssertionError, match=r"tta\.newcomer has no row"):
        violations("", "tta.newcomer")


@pytest.mark.parametrize(
    ("library", "owners"),
    [
        (
            "lightning",
            ["tta.callbacks", "tta.engine", "tta.online", "tta.progress", "tta.training.module", "tta.training.stage"],
        ),
        ("omegaconf", ["tta.config"]),
    ],
)
def test_a_library_has_its_owners(library: str, owners: list[str]) -> None:
    importers = [name for name, file in MODULES.items() if library in imported(file.read_text(), name)]
    assert importers == owners


@pytest.mark.parametrize("folder", FOLDERS_WITH_A_FACE)
def test_no_module_has_the_name_of_a_function_of_its_face(folder: str) -> None:
    """Importing the module would put it in the function's place."""
    modules = {name.removeprefix(f"{folder}.") for name in MODULES if name.startswith(f"{folder}.")}
    face = import_module(folder)
    assert [
        name for name in face.__all__ if name in modules and not ismodule(getattr(import_module(folder), name, sys))
    ] == []


def test_rows_are_rooms_and_the_table_has_one_direction() -> None:
    """Every row is of a module that there is, and no two rooms may import each other but the building blocks."""
    assert set(MAY_IMPORT) - {"tta.methods.*"} <= set(MODULES)
    order = list(MAY_IMPORT)
    below = {
        room: {name for name in row.split() if name in order and name != "tta"} for room, row in MAY_IMPORT.items()
    }
    rising = [
        (room, name)
        for room, names in below.items()
        for name in names
        if order.index(name) > order.index(room) and not {room, name} <= set(BLOCKS.split())
    ]
    assert rising == []


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
