"""The folders of the package as one tree, ``tta/methods`` and the others included, for mkdocstrings to read."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

ROOT = Path(__file__).parent.parent
TREE = tempfile.TemporaryDirectory(prefix="tta-docs-")


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config: Any) -> Any:
    """Copy the modules to where their import names say, as setuptools maps them, and point mkdocstrings there."""
    package = Path(TREE.name) / "tta"
    for folder, place in {"tta": ".", "methods": "methods", "datasets": "datasets", "configs": "configs"}.items():
        for module in (ROOT / folder).glob("*.py"):
            (package / place).mkdir(parents=True, exist_ok=True)
            shutil.copy(module, package / place)
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [TREE.name]
    return config
