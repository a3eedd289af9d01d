"""Folders of data."""

import os
from pathlib import Path

import pooch


def data_root() -> Path:
    """The folder of data sets and published weights: ``TTA_DATA``, else ``data`` if it exists, else a cache."""
    if given := os.environ.get("TTA_DATA"):
        return Path(given)
    return Path("data") if Path("data").is_dir() else Path(pooch.os_cache("tta"))
