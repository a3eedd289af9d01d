"""Files of adapters: written whole or not at all, read with a sentence about what is wrong."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tta.source import SourceStatistics

HEADER = "adapter_state"
STATISTICS = "source_statistics."  # before the names of their tensors


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Facts in which a saved state is not of this adapter, each with both values; versions of the toolkit do not count."""
    if saved.get("format") != own["format"]:
        return [f"format {saved.get('format')} there, {own['format']} here"]
    found = []
    if saved["method"] != own["method"]:
        found.append(f"method '{saved['method']}' there, '{own['method']}' here")
    if saved["weights"] != own["weights"]:
        found.append(f"source weights {saved['weights'][:12]}... there, {own['weights'][:12]}... here")
    for name in ("outputs", "small_batches"):
        if saved.get(name) != own[name]:
            found.append(f"{name}={saved.get(name)} there, {name}={own[name]} here")
    there, here = saved["config"], json.loads(json.dumps(own["config"]))
    for key in {**there, **here}:
        if there.get(key) != here.get(key):
            found.append(f"{key}={there.get(key)} there, {key}={here.get(key)} here")
    return found


def write(path: str | Path, state: Mapping[str, Tensor], statistics: SourceStatistics | None) -> None:
    """Write a state and the source statistics behind it as one safetensors file, then rename it to ``path``.

    Raises:
        OSError: the folder does not exist, is full or cannot be written; ``path`` is as it was.
    """
    path = Path(path)
    tensors, entries = dict(state), ""
    if statistics is not None:
        known, entries = statistics.tensors()
        tensors |= {STATISTICS + name: value for name, value in known.items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    handle, part = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        save_file(tensors, part, {"adapter": "2", "statistics": entries})
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], SourceStatistics | None]:
    """The state in a file, its header, and the source statistics.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds something else, or is damaged; the message names it.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no saved adapter at '{path}': adapter.save(path) writes one.")
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header: dict[str, Any] = json.loads(bytes(tensors[HEADER].tolist()))
    except Exception as error:
        raise ValueError(f"'{path}' does not hold a saved adapter, or is damaged ({error}).") from error
    known = {name.removeprefix(STATISTICS): value for name, value in tensors.items() if name.startswith(STATISTICS)}
    state = {name: value for name, value in tensors.items() if not name.startswith(STATISTICS)}
    entries = facts.get("statistics")
    statistics = SourceStatistics.of_tensors(header["weights"], known, entries) if entries else None
    return state, header, statistics


def plain_settings(config: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a saved configuration that a file can hold: those that differ from the defaults, objects left out."""
    return {name: value for name, value in config.items() if name in fields and not _is_object(value)}


def _is_object(value: Any) -> bool:
    """Whether a value of a saved configuration is the text of an object: a callable, a tensor."""
    return isinstance(value, str) and (value.startswith("<") or value.startswith("tensor("))


def dtype_of(state: Mapping[str, Tensor]) -> torch.dtype:
    """Precision of the first floating-point tensor of a state."""
    return next((value.dtype for value in state.values() if value.is_floating_point()), torch.float32)
