"""Model specs: a name and a checkpoint become a module that takes images in [0, 1] and normalises them inside, once."""

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import Tensor, nn

from tta import networks

FORMS = {
    "timm:NAME[.TAG]": "any classifier of timm, with the weights of that tag",
    "torchvision:NAME[/WEIGHTS]": "any classifier of torchvision; without WEIGHTS it is untrained",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
CIFAR_RESNETS = {f"cifar-resnet{depth}": depth for depth in (20, 32, 44, 56, 110)}


class ImageClassifier(nn.Module):
    """A network with its input normalisation: images (batch, 3, height, width) in [0, 1] -> logits (batch, classes).

    Args:
        model: the network on normalised images.
        mean: per channel, of images in [0, 1].
        std: per channel.
        spec: what :func:`load_model` was asked for, for the manifest.
        input_size: height and width the network was trained on, where known.
    """

    mean: Tensor
    std: Tensor
    selection: Tensor | None

    def __init__(
        self, model: nn.Module, mean: Sequence[float], std: Sequence[float], spec: str, input_size: Sequence[int] | None
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.preprocessing: dict[str, Any] = {"input_size": None if input_size is None else list(input_size)}
        self.register_buffer("selection", None)
        self.normalise_by(mean, std)

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Use this mean and standard deviation, three numbers each, and record them.

        Raises:
            ValueError: not three numbers, or a standard deviation that is not above 0.
        """
        if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
            raise ValueError(
                f"mean and std are three numbers each, for images in [0, 1], std above 0; got mean={list(mean)}, "
                f"std={list(std)}."
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.preprocessing |= {"mean": list(mean), "std": list(std)}

    def select_logits(self, logits: Sequence[int], of: int | None = None) -> "ImageClassifier":
        """Give these of the network's logits alone, in this order, from now on: what adaptation sees are they.

        So ImageNet-A and ImageNet-R are scored (Hendrycks et al., CVPR and ICCV 2021). The selection is part of the
        model's fingerprint.

        Args:
            logits: which, as :attr:`tta.datasets.stream.Stream.classes` tells them.
            of: how many the network gives, where they mean nothing for another number.

        Raises:
            ValueError: fewer than two, one twice or below 0. A network without them all says so when it is called.
        """
        if len(set(logits)) < max(2, len(logits)) or min(logits) < 0:
            raise ValueError(f"logits are two or more different outputs of the network, 0 or more; got {list(logits)}.")
        self.register_buffer("selection", torch.tensor(logits))
        self._outputs = (max(logits) + 1, math.inf) if of is None else (of, of)
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits = self.model((images - self.mean) / self.std)
        if self.selection is None:
            return logits
        fewest, most = self._outputs
        if not fewest <= logits.shape[1] <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            raise ValueError(f"Selected are outputs of a network with {wanted}; '{self.spec}' has {logits.shape[1]}.")
        return logits[:, self.selection]


# name -> (the network, its weights in this package)
EMBEDDED: dict[str, tuple[Callable[..., nn.Module], str]] = {
    "digits-cnn": (networks.DigitsCNN, "digits_cnn.safetensors"),
    "digits-vit": (networks.digits_vit, "digits_vit.safetensors"),
}


def load_model(
    spec: str,
    *,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    pretrained: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> ImageClassifier:
    """A source model in ``eval()`` mode that takes images in [0, 1]; mean and std are applied inside, exactly once.

    Args:
        spec: one of ``tta list models``: ``digits-cnn`` or ``digits-vit`` (embedded), ``cifar-resnet20`` (32, 44, 56,
            110), ``timm:NAME[.TAG]``, or ``torchvision:NAME[/WEIGHTS]``.
        checkpoint: weights to load instead: ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads.
        num_classes: of the classifier, where it differs from the spec's own.
        pretrained: fetch the spec's own weights (timm, torchvision with ``/WEIGHTS``) when there is no checkpoint;
            ``False`` leaves the network untrained.
        mean: per channel, of images in [0, 1], where the checkpoint was trained with other values than the spec's.
        std: per channel, likewise.

    Raises:
        ValueError: an unknown spec (the nearest is offered), a spec without weights of its own and no checkpoint, or a
            checkpoint whose names do not fit (they are listed).
        FileNotFoundError: there is no such checkpoint.
    """
    prefix, _, name = spec.partition(":")
    classes = {} if num_classes is None else {"num_classes": num_classes}
    fetch = pretrained and checkpoint is None
    if spec in EMBEDDED:
        make, file = EMBEDDED[spec]
        model = ImageClassifier(make(**classes), HALF, HALF, spec, (32, 32))
        if fetch:
            with resources.as_file(resources.files("tta") / "weights" / file) as path:
                load_weights(model.model, path)
    elif spec in CIFAR_RESNETS:
        if fetch:
            raise ValueError(
                f"'{spec}' has no weights of its own: give checkpoint=PATH, or pretrained=False for an untrained one."
            )
        resnet = networks.CifarResNet(CIFAR_RESNETS[spec], **classes)
        model = ImageClassifier(resnet, IMAGENET_MEAN, IMAGENET_STD, spec, (32, 32))
    elif prefix == "timm" and name:
        network = _create_timm(name, fetch, classes)
        cfg = timm.data.resolve_model_data_config(network)
        model = ImageClassifier(network, cfg["mean"], cfg["std"], spec, cfg["input_size"][1:])
    elif prefix == "torchvision" and name:
        model = _create_torchvision(spec, name, fetch, classes)
    else:
        match = difflib.get_close_matches(spec, [*EMBEDDED, *CIFAR_RESNETS], n=1)
        hint = f" Did you mean '{match[0]}'?" if match else ""
        raise ValueError(f"No model '{spec}'.{hint} There are: {', '.join(list_models())}.")
    if checkpoint is not None:
        load_weights(model.model, Path(checkpoint))
    if mean is not None or std is not None:
        model.normalise_by(mean or model.preprocessing["mean"], std or model.preprocessing["std"])
    return model.eval()


def list_models() -> dict[str, str]:
    """The embedded models and the forms of the other specs, each with what it is in a line."""
    embedded = {name: (make.__doc__ or "").splitlines()[0] for name, (make, _) in EMBEDDED.items()}
    cifar = dict.fromkeys(CIFAR_RESNETS, "He et al.'s ResNet for 32-pixel images; needs checkpoint=PATH")
    return {**embedded, **cifar, **FORMS}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a checkpoint; ``state_dict``/``model`` wrappings and a ``module.`` prefix are taken off.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: names are missing or unexpected, or shapes differ; they are listed.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No checkpoint at '{path}'.")
    state: Any = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    for wrapping in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapping), Mapping):
            state = state[wrapping]
    state = {key.removeprefix("module."): value for key, value in state.items()}
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
    if any(wrong.values()):
        lines = [f"{len(keys)} {kind}: {_some(keys)}" for kind, keys in wrong.items() if keys]
        raise ValueError(f"The checkpoint '{path}' does not fit {type(model).__name__}. " + " ".join(lines))
    model.load_state_dict(state, strict=False)  # num_batches_tracked alone may be absent: nothing reads it in eval()


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:10]) + (f", and {len(keys) - 10} more." if len(keys) > 10 else ".")


def _create_timm(name: str, pretrained: bool, classes: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name.split(".")[0]):
        match = difflib.get_close_matches(name, timm.list_models(), n=1)
        hint = f" Did you mean '{match[0]}'?" if match else ""
        raise ValueError(f"timm has no model '{name}'.{hint}")
    return timm.create_model(name, pretrained=pretrained, **classes)


def _create_torchvision(spec: str, name: str, pretrained: bool, classes: Mapping[str, int]) -> ImageClassifier:
    name, _, tag = name.partition("/")
    if name not in torchvision.models.list_models(module=torchvision.models):
        match = difflib.get_close_matches(name, torchvision.models.list_models(module=torchvision.models), n=1)
        hint = f" Did you mean '{match[0]}'?" if match else ""
        raise ValueError(f"torchvision has no classifier '{name}'.{hint}")
    mean, std, size = IMAGENET_MEAN, IMAGENET_STD, None
    weights = None
    if tag:
        known = torchvision.models.get_model_weights(name)
        if tag not in known.__members__:
            raise ValueError(f"'{name}' has no weights '{tag}'. There are: {', '.join(known.__members__)}.")
        weights = known[tag]
        transforms = weights.transforms()
        mean, std, size = tuple(transforms.mean), tuple(transforms.std), transforms.crop_size * 2
    network = torchvision.models.get_model(name, weights=weights if pretrained else None, **classes)
    return ImageClassifier(network, mean, std, spec, size)
