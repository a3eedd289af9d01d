"""``tta train``: a source stage from the command line."""

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch

from tta import config, training
from tta.cli.arguments import UsageError, key_values
from tta.datasets import catalog
from tta.models import load_model


class Request(NamedTuple):
    """A source stage as the command line asks for it: settings of the training, and of the method's part."""

    method: str
    settings: training.TrainSettings
    hparams: dict[str, Any]
    stream: dict[str, Any]


def parse(method: str, words: Sequence[str]) -> Request:
    """Sort settings KEY=VALUE by their owner; METHOD.KEY speaks to the method, stream.KEY to a stream with domains to train on.

    Raises:
        UsageError: an unknown key (the nearest one is offered).
        ValueError: a method without a source stage, or a value out of range.
    """
    of_training = [field.name for field in fields(training.TrainSettings)]
    given: dict[str, Any] = {}
    hparams: dict[str, Any] = {}
    stream: dict[str, Any] = {}
    kind, _ = training.configured(method, training.TrainSettings(), {})
    of_method = [] if kind is None else list(kind.made_by)
    for key, value in key_values(words).items():
        owner, dot, name = key.rpartition(".")
        if dot and owner == "stream":
            stream[name] = value
        elif dot and owner == method:
            hparams[name] = value
        elif key in of_training:
            given[key] = value
        elif key in of_method:
            hparams[key] = value
        else:
            known = [*of_training, *of_method]
            raise UsageError(f"No setting '{key}'.{config.nearest(key, known)} There are: {', '.join(known)}.")
    settings = config.build(training.TrainSettings, given)
    training.configured(method, settings, hparams)
    return Request(method, settings, hparams, stream)


def check(data: str) -> None:
    """Raise a UsageError for a stream on which no classifier can be trained."""
    task = catalog.task_of(data) if data in catalog.STREAMS else None
    if task is not None:
        raise UsageError(
            f"Stream '{data}' is of {task}; a source stage trains classifiers. For segmentation, `ttt_mae` trains its decoder itself "
            "on a folder of images, source=FOLDER of `tta run`, or is given one from Python, auxiliary=."
        )


def make_model(spec: str, request: Request) -> Any:
    """The network to train: from a checkpoint, from its own weights, or from a random start that the seed decides.

    Weights for another number of classes than ``num_classes=`` are taken but for the head, which starts at random.
    """
    settings = request.settings
    torch.manual_seed(settings.seed)
    return load_model(
        spec,
        checkpoint=settings.checkpoint,
        num_classes=settings.num_classes,
        pretrained=settings.pretrained,
        new_head=settings.num_classes is not None,
        mean=settings.mean,
        std=settings.std,
    )


def images(data: str, model: Any, request: Request) -> Any:
    """Labelled images of a stream's source domain, of the domains that are not held out, or of a folder."""
    return catalog.source_images(data, model.preprocessing, stream=request.stream)
