"""``tta serve``: its words become a source model, an adapter and the settings of the server."""

import dataclasses
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from tta import config, methods
from tta.adapter import Adapter, config_class
from tta.cli.arguments import UsageError, key_values

TOKEN = "TTA_SERVE_TOKEN"
OF_MODEL = ("checkpoint", "num_classes", "mean", "std")  # arguments of tta.load_model
OF_ADAPTER = ("source", "preset", "guard", "small_batches")  # arguments of tta.adapt
OF_COMMAND = ("class_names", "device")


class Request(NamedTuple):
    """A server as the command line asks for it: the method, None for the default, and settings by owner."""

    method: str | None
    server: dict[str, Any]
    model: dict[str, Any]
    adapter: dict[str, Any]
    command: dict[str, Any]


def check_extra() -> None:
    """Raise a ModuleNotFoundError that says what to install, where the server's libraries are missing."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client", "python_multipart") if not find_spec(name)]
    if missing:
        raise ModuleNotFoundError(f"tta serve needs {', '.join(missing)}: pip install 'tta-toolkit[serve]'.")


def parse(words: Sequence[str]) -> Request:
    """Sort the words after the model into the method and settings, each checked by name.

    Raises:
        UsageError: two methods, an unknown one, or an unknown key; the nearest name is offered.
    """
    from tta.serve import ServeSettings

    names = [word for word in words if "=" not in word]
    if len(names) > 1:
        raise UsageError(f"One server runs one method; got {', '.join(names)}.")
    method = names[0] if names else None
    kind = methods.find(method or methods.DEFAULT)
    hparams = [field.name for field in dataclasses.fields(config_class(kind))]
    server = [field.name for field in dataclasses.fields(ServeSettings)]
    request = Request(method, {}, {}, {}, {})
    owners: dict[str, dict[str, Any]] = dict.fromkeys(hparams, request.adapter)
    for keys, owner in ((OF_ADAPTER, request.adapter), (OF_MODEL, request.model), (OF_COMMAND, request.command)):
        owners |= dict.fromkeys(keys, owner)
    owners |= dict.fromkeys(server, request.server)
    for key, value in key_values([word for word in words if "=" in word]).items():
        name = key.removeprefix(f"{method or methods.DEFAULT}.")
        owner = request.adapter if name != key and name in hparams else owners.get(name, {})
        if name not in owners:
            raise UsageError(
                f"Neither the server, the model nor the method has a key '{name}'.{config.nearest(name, owners)}"
            )
        owner[name] = value
    if "token" not in request.server and os.environ.get(TOKEN):
        request.server["token"] = os.environ[TOKEN]
    for text in ("state", "token"):  # a number on the command line is meant as it is written
        if request.server.get(text) is not None:
            request.server[text] = str(request.server[text])
    return request


def make_adapter(spec: str, request: Request) -> Adapter:
    """The adapter that the request asks for, on its device."""
    import torch

    import tta
    from tta.datasets import catalog

    model = tta.load_model(spec, **request.model)
    if file := request.command.get("class_names"):
        model.class_names = Path(file).read_text(encoding="utf-8").splitlines()
    device = request.command.get("device", "auto")
    if device != "auto" or torch.cuda.is_available():
        model.to("cuda" if device == "auto" else device)
    settings = dict(request.adapter)
    if (folder := settings.get("source")) is not None and Path(folder).is_dir():
        settings["source"] = catalog.source_images(folder, model.preprocessing)
    return tta.adapt(model, request.method, **{"task": "classification", **settings})
