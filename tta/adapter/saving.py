"""Files of adapters: written whole or not at all, read with a sentence about what is wrong."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from tta import places
from tta.source import SourceStatistics

HEADER = "adapter_state"
FACTS: dict[str, type] = {"method": str, "weights": str, "config": dict, "optimizer": list}  # what a header must hold
STATISTICS = "source_statistics."  # before the names of their tensors


def header_of(tensor: Tensor, form: int) -> dict[str, Any]:
    """The JSON part of a state, from its bytes.

    Args:
        tensor: entry ``adapter_state`` of a state.
        form: number of the format that is read.

    Raises:
        ValueError: no JSON, another format, or without the facts that a state has; the message says which.
    """
    try:
        header = json.loads(bytes(tensor.flatten().tolist()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"its entry '{HEADER}' is no JSON text ({error})") from error
    if not isinstance(header, dict):
        raise ValueError(f"its entry '{HEADER}' holds a {type(header).__name__}, where an object was expected")
    if header.get("format") != form:
        raise ValueError(f"format {header.get('format')} there, {form} here: it is of another version of this toolkit")
    wrong = [name for name, kind in FACTS.items() if not isinstance(header.get(name), kind)]
    if wrong or not all(isinstance(moments, dict) for moments in header["optimizer"]):
        wrong = wrong or ["optimizer"]
        raise ValueError(f"its entry '{HEADER}' lacks {', '.join(wrong)}, or holds something else there")
    return header


def kinds(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> list[str]:
    """Tensors of a saved state that are of another precision than the adapter's own, with both."""
    return [
        f"{name} {state[name].dtype} there, {value.dtype} here"
        for name, value in own.items()
        if name in state and state[name].dtype != value.dtype
    ]


def differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    """Facts in which a saved state is not of this adapter, each with both values; versions of the toolkit do not count."""
    found = []
    if saved["method"] != own["method"]:
        found.append(f"method '{saved['method']}' there, '{own['method']}' here")
    if saved["weights"] != own["weights"]:
        found.append(f"source weights {saved['weights'][:12]}... there, {own['weights'][:12]}... here")
    for name in ("outputs", "task", "small_batches", "guard"):
        unsaid = name == "task" and None in (saved.get(name), own[name])  # recognised by the outputs
        if saved.get(name) != own[name] and not unsaid:
            found.append(f"{name}={saved.get(name)} there, {name}={own[name]} here")
    there, here = saved["config"], json.loads(json.dumps(own["config"]))
    # Of settings that name a file or are objects, what these hold is compared where it is known: a file may have been moved.
    theirs, ours = saved.get("contents", {}), own.get("contents", {})
    known = theirs.keys() & ours.keys()
    found += [f"another {key} there than here" for key in sorted(known) if theirs[key] != ours[key]]
    for key in [key for key in {**there, **here} if key not in known]:
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


def read(path: str | Path, form: int) -> tuple[dict[str, Tensor], dict[str, Any], SourceStatistics | None]:
    """The state in a file, its header of format ``form``, and the source statistics.

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
        header = header_of(tensors[HEADER], form)
        known = {name.removeprefix(STATISTICS): value for name, value in tensors.items() if name.startswith(STATISTICS)}
        entries = facts.get("statistics")
        statistics = SourceStatistics.of_tensors(header["weights"], known, entries) if entries else None
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"'{path}' does not hold a saved adapter, or is damaged ({reason}).") from error
    return {name: value for name, value in tensors.items() if not name.startswith(STATISTICS)}, header, statistics


@contextmanager
def fitting(path: str | Path) -> Iterator[None]:
    """Within this context an error of making an adapter of what was read names the file."""
    try:
        yield
    except KeyError as error:
        raise ValueError(f"'{path}' is damaged: it lacks {error}.") from error
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"'{path}' does not fit this model: {error}") from error


def plain_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a saved configuration that its file holds: not those that were objects, a callable or a tensor."""
    return {name: value for name, value in config.items() if not _is_object(value)}


def _is_object(value: Any) -> bool:
    """Whether a value is the text of an object, as :func:`tta.hyperparameters.as_dict` gives it."""
    return isinstance(value, str) and value.startswith(("<", "tensor("))
