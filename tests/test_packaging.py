"""pyproject.toml declares the packages and dependencies that there are, and the wheel holds all files."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
FOLDERS = {"tta": "tta", "methods": "tta/methods", "datasets": "tta/datasets", "configs": "tta/configs"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SHIPPED = {".py", ".yaml", ".safetensors", ".txt", ".typed", ".html", ".css", ".js"}
# Extras of the package whose libraries it imports by name; the others are for its developers.
LIBRARIES = ("detection", "plot", "hf", "clip", "ray", "serve", "demo", "export")
IMPORTED_AS = {
    "scikit-learn": "sklearn",
    "pyyaml": "yaml",
    "pillow": "PIL",
    "prometheus-client": "prometheus_client",
    "open_clip_torch": "open_clip",
    "faster-coco-eval": "faster_coco_eval",
}


def test_packages_are_the_folders_with_an_init_file() -> None:
    found = {
        ".".join(Path(home, init.parent.relative_to(ROOT / folder)).parts)
        for folder, home in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert set(PYPROJECT["tool"]["setuptools"]["packages"]) == found


def test_dependencies_are_the_libraries_imported() -> None:
    imported = set()
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    imported.add(node.module.split(".")[0])
    project = PYPROJECT["project"]
    extras = project["optional-dependencies"]
    needs = [*project["dependencies"], *(need for name in LIBRARIES for need in extras[name])]
    declared = {need.partition(">=")[0] for need in needs} - {"python-multipart"}  # fastapi imports it, for forms
    assert {IMPORTED_AS.get(name, name) for name in declared} == imported - sys.stdlib_module_names - {"tta"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree, built from a copy: a stale build/ would bring deleted modules back."""
    tree = tmp_path_factory.mktemp("tree")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    out = tmp_path_factory.mktemp("wheel")
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(out), str(tree)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *build], check=True)
    (found,) = out.glob("*.whl")
    return found


@pytest.mark.slow
def test_wheel_holds_every_file_of_the_folders(wheel: Path) -> None:
    expected = {
        Path(home, file.relative_to(ROOT / folder)).as_posix()
        for folder, home in FOLDERS.items()
        for file in (ROOT / folder).rglob("*")
        if file.suffix in SHIPPED or file.name == "py.typed"
    }
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        (entry_points,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        assert "tta = tta.cli:main" in archive.read(entry_points).decode()
    assert held == expected


@pytest.mark.slow
def test_wheel_runs_away_from_the_source_tree(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    install = ["install", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--quiet", *install], check=True)
    where = "from importlib import import_module as load; print(*(load(name).__file__ for name in {}))"
    packages = PYPROJECT["tool"]["setuptools"]["packages"]

    def python(*arguments: str) -> list[str]:
        run = subprocess.run(
            [sys.executable, *arguments],
            cwd=elsewhere,
            env=os.environ | {"PYTHONPATH": str(target)},
            capture_output=True,
            text=True,
            check=True,
        )
        return run.stdout.split()

    assert all(file.startswith(str(target)) for file in python("-c", where.format(packages)))
    assert {"source", "norm", "tent"} <= set(python("-m", "tta", "list", "methods"))
