"""The file of a source stage: a classifier and the auxiliary part that was trained with it."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tta import fingerprint, places
from tta.auxiliary import own_tensors

PREFIX = "auxiliary."  # of the names of the part's tensors in a file; the classifier's are as they are in the network
FACTS = "tta_source_stage"  # entry of the file's metadata
COUNTS = "num_batches_tracked"  # of BatchNorm layers, which nothing reads


@dataclass(frozen=True)
class Saved:
    """An auxiliary part as a file holds it.

    Attributes:
        method: that it was trained for.
        settings: those that say how it is made.
        weights: fingerprint of the classifier that was trained with it.
        names: of the classifier's tensors that were hashed.
        tensors: of the part, by name.
        facts: all else that the file says about the training.
    """

    method: str
    settings: Mapping[str, Any]
    weights: str
    names: tuple[str, ...]
    tensors: Mapping[str, Tensor] = field(repr=False)
    facts: Mapping[str, Any] = field(repr=False, default_factory=dict)

    def check(self, model: nn.Module) -> None:
        """Raise a ValueError unless a model, or the network in it, has the weights that the part was trained with."""
        state = model.state_dict()
        for prefix in ("", "model."):
            if all(prefix + name in state for name in self.names):
                found = fingerprint.of_tensors((name, state[prefix + name]) for name in self.names)
                if found == self.weights:
                    return
        raise ValueError(
            f"The auxiliary part was trained for '{self.method}' with other weights ({self.weights[:12]}...) than this model has: "
            "load the classifier of the same file (checkpoint=FILE), or train a part for this model with `tta train`."
        )

    def fill(self, part: nn.Module, model: nn.Module) -> None:
        """Put the tensors in the place of an untrained part's own.

        Raises:
            ValueError: the part has other tensors; the message names some.
        """
        own = own_tensors(part, model)
        wrong = sorted(
            name
            for name in {*own, *self.tensors}
            if not name.endswith(COUNTS)
            and (name not in own or name not in self.tensors or own[name].shape != self.tensors[name].shape)
        )
        if wrong:
            raise ValueError(
                f"The auxiliary part of the file is another than '{self.method}' makes for {type(model).__name__}: {', '.join(wrong[:5])}."
            )
        with torch.no_grad():
            for name, tensor in own.items():
                if name in self.tensors:
                    tensor.copy_(self.tensors[name])


def write(
    path: str | Path,
    model: nn.Module,
    part: nn.Module | None,
    method: str,
    settings: Mapping[str, Any],
    facts: Mapping[str, Any],
    network: nn.Module | None = None,
) -> None:
    """Write a classifier and its auxiliary part as one safetensors file, at once.

    The classifier's tensors have the names that they have in the network, so that it loads in plain torch:
    ``network.load_state_dict(load_file(path), strict=False)``. Those of the part stand behind ``auxiliary.``. The metadata
    hold, as JSON under ``tta_source_stage``, method, settings, fingerprint of the classifier, and facts of the training.

    Args:
        path: of the file.
        model: the classifier.
        part: None for plain training.
        method: name of the method.
        settings: JSON values that say how the part is made.
        facts: further JSON values.
        network: the plain network in the classifier, whose names the tensors get; the classifier itself if left out.

    Raises:
        OSError: nothing can be written there; what was there is as it was.
    """
    state = _plain((network or model).state_dict())
    own = _plain({} if part is None else own_tensors(part, model))
    weights = fingerprint.of_tensors(sorted(state.items()))
    header = {"method": method, "settings": dict(settings), "weights": weights, "facts": dict(facts)}
    tensors = state | {PREFIX + name: value for name, value in own.items()}
    content = save(tensors, {FACTS: json.dumps(header)})
    places.write(Path(path), lambda file: file.write(content))


def read(path: str | Path) -> Saved | None:
    """The auxiliary part in a file, with what is known of it; None of a file that holds weights alone.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"No file with an auxiliary part at '{path}': `tta train METHOD MODEL DATA -o FILE` writes one."
        )
    if Path(path).suffix != ".safetensors":
        return None
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FACTS)
            if text is None:
                return None
            header = json.loads(text)
            names = sorted(file.keys())
            tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in names if name.startswith(PREFIX)}
        own = tuple(name for name in names if not name.startswith(PREFIX))
        return Saved(header["method"], header["settings"], header["weights"], own, tensors, header["facts"])
    except Exception as error:  # a damaged file makes the reader raise anything
        raise ValueError(f"'{path}' cannot be read: it may be truncated or damaged ({error}).") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, without the counts; those that share memory each get their own, as safetensors asks for."""
    return {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
        if not name.endswith(COUNTS)
    }
