"""Files of adapters: written whole or not at all, read with a sentence about what is wrong."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tta import places
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
    tensors, entries = dict(state), ""
    if statistics is not None:
        known, entries = statistics.tensors()
        tensors |= {STATISTICS + name: value for name, value in known.items()}
    tensors = {name: value.cpu().contiguous() for name, value in tensors.items()}
    content = save(tensors, {"adapter": "2", "statistics": entries})
    places.write(Path(path), lambda file: file.write(content))


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


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved configuration that its file holds: not those that were objects, a callable or a tensor."""
    return {name: value for name, value in config.items() if not _is_object(value)}


def _is_object(value: Any) -> bool:
    """Whether a value is the text of an object, as :func:`tta.hyperparameters.as_dict` gives it."""
    return isinstance(value, str) and value.startswith(("<", "tensor("))
