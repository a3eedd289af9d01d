"""The folders of the package as one tree for mkdocstrings to read, and a section for every method."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
SECTION = """::: tta.methods.{name}
    options:
      show_root_full_path: false
      members_order: alphabetical
      filters: ["!^_", "!^(configure_model|adapt|predict|source_needs|parameters_to_adapt|wrap|wrapped|config)$"]
"""  # what every method has is on the page of adapters
NO_CODE = shutil.ignore_patterns("__pycache__", "*.safetensors", "*.yaml")
TREE = tempfile.TemporaryDirectory(prefix="tta-docs-")


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config: Any) -> Any:
    """Copy the modules to where their import names say, as setuptools maps them, and point mkdocstrings there."""
    package = Path(TREE.name) / "tta"
    for folder, place in {"tta": ".", "methods": "methods", "datasets": "datasets", "configs": "configs"}.items():
        shutil.copytree(ROOT / folder, package / place, ignore=NO_CODE, dirs_exist_ok=True)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [TREE.name]
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page of methods has those that there are, as `tta list methods` does: no list to keep."""
    if page.file.src_uri != "api/methods.md":
        return markdown
    names = sorted(file.stem for file in (ROOT / "methods").glob("[!_]*.py"))
    return "\n\n".join([markdown, *(SECTION.format(name=name) for name in names)])
