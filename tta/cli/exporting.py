"""``tta export``: a saved adapter becomes a plain model in a file."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import tta
from tta import artefact, config, fingerprint
from tta.adapter import FORMAT, Adapter, saving
from tta.cli.arguments import UsageError, key_values
from tta.cli.serving import OF_MODEL
from tta.datasets import catalog
from tta.models import ImageClassifier

OF_COMMAND = ("images", "samples", "class_names", "guard")
SAMPLES = 256  # images of the folder: enough for the statistics of a BatchNorm layer
NOISE = 8  # images of noise where the folder is not named and not needed


class Request(NamedTuple):
    """An export as the command line asks for it: settings of the source model, and of the command."""

    model: dict[str, Any]
    command: dict[str, Any]


class Plain(NamedTuple):
    """A plain model of what was learned, images to compare it on, and the logits that the adapter gives them."""

    model: torch.nn.Module
    images: Tensor
    expected: Tensor


def parse(words: Sequence[str]) -> Request:
    """Sort settings KEY=VALUE by their owner.

    Raises:
        UsageError: an unknown key (the nearest one is offered), or a value out of range.
    """
    request = Request({}, {})
    owners = {**dict.fromkeys(OF_MODEL, request.model), **dict.fromkeys(OF_COMMAND, request.command)}
    for key, value in key_values(words).items():
        if key not in owners:
            raise UsageError(
                f"No setting '{key}'.{config.nearest(key, owners)} There are: {', '.join(owners)}. The method's own are in STATE."
            )
        owners[key][key] = value
    samples = request.command.get("samples", SAMPLES)
    if not isinstance(samples, int) or samples < 2:
        raise UsageError(f"samples={samples}: expected a number of images, 2 or more.")
    if request.command.get("guard", True) not in (True, False):
        raise UsageError(f"guard={request.command['guard']}: expected true or false.")
    return request


def check_places(state: Path, out: Path) -> None:
    """Raise an error where there is nothing to read, or where no format is known by the file's suffix.

    Raises:
        FileNotFoundError, ValueError, ModuleNotFoundError: with what was found and what would work.
    """
    artefact.check_format(out)
    if state.is_dir():
        files = sorted(state.glob("*.safetensors"), reverse=True)
        hint = f", such as '{files[0]}'" if files else ", and it holds none"
        raise UsageError(f"'{state}' is a folder: name one of its files{hint}.")
    if not state.is_file():
        raise FileNotFoundError(
            f"There is no saved adapter at '{state}': adapter.save(path) or `tta serve` writes one."
        )


def make_model(spec: str, request: Request) -> ImageClassifier:
    """The source model."""
    model = tta.load_model(spec, **request.model)
    if file := request.command.get("class_names"):
        model.class_names = Path(str(file)).read_text(encoding="utf-8").splitlines()
    return model


def make_adapter(state: Path, model: ImageClassifier, request: Request) -> Adapter:
    """The adapter of a state, without its guard if that is asked for.

    Raises:
        ValueError: no state, a damaged one, one of other source weights, or one whose guard lets the source model answer.
    """
    _, header, _ = saving.read(state, FORMAT)
    own = fingerprint.of_model(model)
    if header["weights"] != own:
        raise ValueError(
            f"'{state}' was saved with other source weights ({header['weights'][:12]}...) than those of '{model.spec}' "
            f"({own[:12]}...): name the model, and its checkpoint=FILE, that it was made with."
        )
    adapter = tta.load(state, model)
    if not request.command.get("guard", True):
        adapter.guard = None
    if adapter.guard is not None and adapter.guard.answers_by_source:
        raise ValueError(
            f"The guard in '{state}' lets the source model answer, since it found the adapter worse: export an earlier state, "
            "or deploy the source model. guard=false exports the adapter all the same."
        )
    return adapter


def make_plain(adapter: Adapter, model: ImageClassifier, request: Request) -> Plain:
    """The plain model of an adapter, and what the adapter predicts without learning.

    Raises:
        ValueError: no plain model predicts as the method does, or images are needed and not named.
    """
    adapter.predicting_model()  # or a sentence of why no plain model predicts the same
    images = _images(model, request)
    if images is None:
        images = _noise(adapter, model)
    with adapter.paused():
        expected = adapter(images)
    return Plain(adapter.export(calibration=images, exact=True), images, expected)


def _noise(adapter: Adapter, model: ImageClassifier) -> Tensor:
    """Images to compare on, for a method that needs none to store its statistics.

    Raises:
        ValueError: the method needs some, or their size is not known.
    """
    try:
        adapter.export()
    except ValueError as error:
        raise ValueError(
            f"{adapter.method} normalises by the present batch, so that the statistics of the plain model must be taken from "
            "images of the domain that it is for: name a folder of them, images=DIR."
        ) from error
    if (size := model.preprocessing["input_size"]) is None:
        raise ValueError(f"'{model.spec}' does not say how large its images are: name a folder of some, images=DIR.")
    return torch.rand(NOISE, 3, *size, generator=torch.Generator().manual_seed(0))


def _images(model: ImageClassifier, request: Request) -> Tensor | None:
    """Images of the folder named, (batch, 3, height, width) in [0, 1]; None where there is none."""
    if (folder := request.command.get("images")) is None:
        return None
    if not Path(str(folder)).is_dir():
        raise FileNotFoundError(f"There is no folder '{folder}': images=DIR names one of pictures.")
    found: Any = catalog.source_images(str(folder), model.preprocessing)
    number = min(len(found), request.command.get("samples", SAMPLES))
    if number < 2:
        raise ValueError(f"'{folder}' holds {number} picture: 2 or more are needed, and many more for good statistics.")
    pictures = [found[index] for index in range(number)]
    images = torch.stack([picture[0] if isinstance(picture, tuple) else picture for picture in pictures])
    return images / 255 if images.dtype == torch.uint8 else images


def facts(adapter: Adapter, model: ImageClassifier, images: Tensor, request: Request) -> dict[str, Any]:
    """Facts about the model for the file's metadata, as values that JSON knows."""
    given = adapter.identity()
    return {
        "made_by": f"tta-toolkit {metadata.version('tta-toolkit')}",
        "model": model.spec,
        "method": adapter.method,
        "config": given["config"],
        "source_weights": given["weights"],
        "input": "RGB images (batch, 3, height, width) in [0, 1]; mean and std are applied inside the model",
        "preprocessing": model.preprocessing,
        "output": "logits (batch, classes)",
        "class_names": model.class_names,
        "checked_on": {"images": len(images), "of": "noise" if request.command.get("images") is None else "a folder"},
    }
