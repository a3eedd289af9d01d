"""Checkpoints: weights from a file into a network, or an error that says why they do not fit."""

import pickle
import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta import auxiliary_file, taps

WRAPPINGS = ("state_dict", "model", "net")
# Under these names wrapped networks save the constants of their input normalisation.
NORMALISATION = (("mu", "sigma"), ("normalize.mean", "normalize.std"), ("mean", "std"))


class OtherClasses(ValueError):
    """Weights fit a network but for its head, which they have for another number of classes."""


def read(path: str | Path) -> dict[str, Any]:
    """Read the weights in a ``.safetensors`` or torch file, without ``state_dict`` / ``model`` / ``net`` around them.

    No code in the file is run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read (truncated, a web page instead of weights), or holds more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at '{path}'.")
    with path.open("rb") as file:
        if file.read(64).lstrip().startswith(b"<"):
            raise ValueError(f"'{path}' is a web page, not a checkpoint: its download was answered by an error page.")
    try:
        state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"'{path}' holds more than weights ({_reason(error)}). If you trust its author, convert it once: "
            f"torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)."
        ) from None
    except Exception as error:  # a damaged file makes the readers raise anything
        raise ValueError(
            f"'{path}' cannot be read as a checkpoint: it has {path.stat().st_size} bytes and may be truncated or damaged "
            f"({_reason(error)})."
        ) from None
    for wrapping in WRAPPINGS:
        if isinstance(state, Mapping) and isinstance(state.get(wrapping), Mapping):
            state = state[wrapping]
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        found = ", ".join(map(str, list(state)[:10])) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(
            f"'{path}' holds no weights by name, bare or under {', '.join(map(repr, WRAPPINGS))}; it holds: {found}."
        )
    return dict(state)


def _reason(error: Exception) -> str:
    """The reason that torch or safetensors give, without their advice: a type that is no tensor, or the first sentence."""
    if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return f"an object of type {found[1]}"
    return (str(error) or type(error).__name__).splitlines()[0].partition(". ")[0].rstrip(".")


def load_weights(
    model: nn.Module, path: str | Path, *, new_head: bool = False
) -> tuple[list[float], list[float]] | None:
    """Load a checkpoint into a network, without prefixes such as ``module.``.

    Args:
        model: the network.
        path: of the checkpoint.
        new_head: see :func:`fit`.

    Returns:
        Mean and std of the input normalisation if the checkpoint holds them, else None.

    Raises:
        FileNotFoundError: there is no such file.
        OtherClasses: the checkpoint's head is for another number of classes.
        ValueError: it cannot be read, or names are missing or unexpected, or shapes differ, or weights are not finite or
            not floating-point numbers; they are listed.
    """
    own = model.state_dict()
    state = {key.removeprefix("module."): value for key, value in read(path).items()}
    state = {key: value for key, value in state.items() if not key.startswith(auxiliary_file.PREFIX)}
    normalisation = None
    for pair in NORMALISATION:
        if all(key in state and key not in own for key in pair):
            mean, std = (state.pop(key).flatten().float().tolist() for key in pair)
            normalisation = mean, std
    fit(model, _aligned(state, own), f"The checkpoint '{path}'", new_head=new_head)
    return normalisation


def fit(model: nn.Module, state: Mapping[str, Tensor], where: str, *, new_head: bool = False) -> None:
    """Load weights by the network's own names.

    Args:
        model: the network.
        state: name -> tensor.
        where: the origin of the weights, which begins each message.
        new_head: whether a head for another number of classes is left out, with a warning, and the network's stays as it is.

    Raises:
        OtherClasses: the head is for another number of classes.
        ValueError: names are missing or unexpected, or shapes differ, or weights are not finite or not floating-point
            numbers; they are listed.
    """
    own = model.state_dict()
    wrong = {
        "missing": sorted(key for key in own if key not in state and not key.endswith("num_batches_tracked")),
        "unexpected": sorted(key for key in state if key not in own),
        "of another shape": sorted(
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ),
    }
    other = None if wrong["missing"] or wrong["unexpected"] else _other_classes(model, state)
    if other and new_head:
        warnings.warn(
            f"{where} was trained for {other.given} classes: the head ({', '.join(other.heads)}) starts at random for "
            f"{other.expected}, all other weights are taken.",
            stacklevel=2,
        )
        state = {key: value for key, value in state.items() if key.rpartition(".")[0] not in other.heads}
    elif any(wrong.values()):
        lines = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in wrong.items() if keys]
        text = f"{where} does not fit {type(model).__name__}. " + " ".join(lines)
        if other is None:
            raise ValueError(text)
        raise OtherClasses(
            f"{text} It is for {other.given} classes, the network is for {other.expected}: num_classes={other.given} makes "
            f"one for {other.given}; `tta train` with num_classes={other.expected} trains a new head."
        )
    refuse_bad_weights({key: (state[key], own[key].dtype) for key in own if key in state}, where)
    # Absent are at most the head that starts anew, and num_batches_tracked, which nothing reads in eval().
    model.load_state_dict(state, strict=False)


def refuse_bad_weights(weights: Mapping[str, tuple[Tensor, torch.dtype]], where: str) -> None:
    """Raise a ValueError, with the names of the tensors, for weights that no network can use.

    Args:
        weights: name -> the tensor, and the dtype that the network has it in; whole numbers of a network are not checked.
        where: the origin of the weights, which begins the message.
    """
    floating = {name: (value, kind) for name, (value, kind) in weights.items() if kind.is_floating_point}
    if wrong := [f"{name} ({value.dtype})" for name, (value, _) in floating.items() if not value.is_floating_point()]:
        raise ValueError(
            f"{where} holds weights that are not floating-point numbers, as of a quantised network: {_some(wrong)} "
            "Convert them to float32 with the code that made them."
        )
    # As the network will have them: 1e300 is finite in float64 alone.
    bad = [name for name, (value, kind) in floating.items() if not _is_finite(value.to(kind))]
    if bad:
        raise ValueError(
            f"{where} holds weights that are NaN or infinite: {_some(bad)} The training that made them diverged, or the "
            "file is damaged; use an earlier checkpoint."
        )


def _is_finite(value: Tensor) -> bool:
    if value.is_meta:  # a network without memory has no values to look at
        return True
    wide = value.float() if value.element_size() == 1 else value  # not every kernel knows 8-bit numbers
    return bool(wide.isfinite().all())


def _aligned(state: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the network's own names: a prefix that all names share is removed, or added."""
    ours = _first_parts(own)
    shorter = state
    while shorter and not ours & _first_parts(shorter):
        if not _share_prefix(shorter):
            break
        shorter = {key.partition(".")[2]: value for key, value in shorter.items()}
    else:
        return shorter
    if _share_prefix(own):
        return {f"{next(iter(ours))}.{key}": value for key, value in state.items()}
    return state


def _first_parts(names: Iterable[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def _share_prefix(names: Iterable[str]) -> bool:
    return len(_first_parts(names)) == 1 and all("." in name for name in names)


class _Other(NamedTuple):
    """Heads, and the classes of the weights and of the network, where these numbers are all that differs."""

    heads: list[str]
    given: int
    expected: int


def _other_classes(model: nn.Module, state: Mapping[str, Tensor]) -> _Other | None:
    own = model.state_dict()
    differing = {key for key in own if key in state and state[key].shape != own[key].shape}
    if not differing or any(state[key].shape[1:] != own[key].shape[1:] for key in differing):
        return None
    try:
        heads = taps.heads(model)
    except ValueError:
        return None
    numbers = {(len(state[key]), len(own[key])) for key in differing}
    if len(numbers) > 1 or {key.rpartition(".")[0] for key in differing} != set(heads):
        return None
    return _Other(heads, *numbers.pop())


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (f", and {len(keys) - 10} more." if len(keys) > 10 else ".")
