"""``tta demo``: its words become pictures, a source model and the settings of the page."""

import dataclasses
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tta import config, methods
from tta.adapter import config_class
from tta.cli.arguments import UsageError, key_values
from tta.cli.serving import OF_MODEL

if TYPE_CHECKING:
    from tta.demo import DemoSettings

DIGITS = ("digits", "digits-c")
MODEL = "digits-cnn"  # of the digits
OF_PICTURES = ("batch_size", "seed")
OF_FOLDER = ("labels", "class_map", "class_order")
OF_COMMAND = ("source", "device")


class Request(NamedTuple):
    """A demo as the command line asks for it: the folder, None for the digits; model and method; settings by owner."""

    folder: str | None
    spec: str
    method: str
    demo: dict[str, Any]
    model: dict[str, Any]
    pictures: dict[str, Any]
    hparams: dict[str, Any]
    command: dict[str, Any]


def check_extra() -> None:
    """Raise a ModuleNotFoundError that says what to install, where the page's libraries are missing."""
    missing = [name for name in ("fastapi", "uvicorn") if not find_spec(name)]
    if missing:
        raise ModuleNotFoundError(f"tta demo needs {', '.join(missing)}: pip install 'tta-toolkit[demo]'.")


def parse(words: Sequence[str]) -> Request:
    """Sort the words into pictures, model, method and settings, each checked by name.

    Raises:
        UsageError: a word that is none of these, two of a kind, a folder without a model, or an unknown key.
    """
    from tta.demo import DemoSettings

    named: dict[str, str] = {}
    for word in (word for word in words if "=" not in word):
        kind = _kind(word)
        if kind in named:
            raise UsageError(f"One demo shows one {kind}; got {named[kind]}, {word}.")
        named[kind] = word
    folder = named.get("stream")
    folder = None if folder in DIGITS else folder
    if folder is not None and "model" not in named:
        raise UsageError(f"A folder needs a model that knows its classes: tta demo {folder} torchvision:resnet18.")
    method = named.get("method", methods.DEFAULT)
    request = Request(folder, named.get("model", MODEL), method, {}, {}, {}, {}, {})
    hparams = [field.name for field in dataclasses.fields(config_class(methods.find(method)))]
    of_pictures = OF_PICTURES if folder is None else (*OF_PICTURES, *OF_FOLDER)
    owners: dict[str, dict[str, Any]] = dict.fromkeys(hparams, request.hparams)
    owners |= dict.fromkeys(of_pictures, request.pictures) | dict.fromkeys(OF_MODEL, request.model)
    owners |= dict.fromkeys(OF_COMMAND, request.command)
    owners |= dict.fromkeys([field.name for field in dataclasses.fields(DemoSettings)], request.demo)
    for key, value in key_values([word for word in words if "=" in word]).items():
        name = key.removeprefix(f"{method}.")
        owner = request.hparams if name != key and name in hparams else owners.get(name)
        if owner is None:
            raise UsageError(
                f"Neither the demo, the model nor the method has a key '{name}'.{config.nearest(name, owners)}"
            )
        owner[name] = value
    return request


def _kind(word: str) -> str:
    """The kind of a word: stream, model or method. A folder is one that is there, or a word with a slash."""
    from tta.models import list_models

    if methods.is_known(word):
        return "method"
    if word in DIGITS or Path(word).is_dir():
        return "stream"
    models = list_models()
    if word in models or ":" in word:
        return "model"
    if "/" in word:
        return "stream"
    known = [*DIGITS, *models, *methods.available()]
    raise UsageError(
        f"'{word}' is neither a folder, a model nor a method.{config.nearest(word, known)} See tta list models, and methods."
    )


def make_app(request: Request) -> "tuple[Any, DemoSettings]":
    """The page that the request asks for, and where it is to be shown."""
    import torch

    import tta
    from tta import demo
    from tta.datasets import catalog

    settings = config.build(demo.DemoSettings, request.demo)
    model = tta.load_model(request.spec, **request.model)
    device = request.command.get("device", "auto")
    if device != "auto" or torch.cuda.is_available():
        model.to("cuda" if device == "auto" else device)
    if request.folder is None:
        pictures = demo.of_digits(**request.pictures)
    else:
        pictures = demo.of_folder(request.folder, model, **request.pictures)
    source = request.command.get("source", DIGITS[1] if request.folder is None else None)
    if source is not None and (source in catalog.STREAMS or Path(source).is_dir()):
        source = catalog.source_images(source, model.preprocessing)
    app = demo.create_app(model, pictures, settings, method=request.method, source=source, hparams=request.hparams)
    return app, settings
