"""Model specs: a name and a checkpoint become a module that takes images in [0, 1] and normalises them inside, once."""

from collections.abc import Callable, Sequence
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from tta.messages import nearest
from tta.models import networks
from tta.models.checkpoints import load_weights, refuse_bad_weights
from tta.models.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD, ImageClassifier
from tta.models.families import FAMILIES, ModelSpec, from_function

FUNCTION = "PACKAGE.MODULE:FUNCTION"


class Embedded(NamedTuple):
    """A source model whose weights are part of this package."""

    make: Callable[..., nn.Module]
    file: str
    clean_error: float  # %, on the 800 held-out digits


class Untrained(NamedTuple):
    """A network that comes without weights: they are given as a checkpoint."""

    make: Callable[..., nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    line: str


EMBEDDED = {
    "digits-cnn": Embedded(networks.DigitsCNN, "digits_cnn.safetensors", 0.375),
    "digits-vit": Embedded(networks.digits_vit, "digits_vit.safetensors", 1.125),
    "digits-cnn-8": Embedded(networks.digits_cnn_8, "digits_cnn_8.safetensors", 0.3101),
}


def _resnet(depth: int) -> Callable[..., nn.Module]:
    return lambda **classes: networks.CifarResNet(depth, **classes)


OF_HE = "He et al.'s ResNet for 32-pixel images; needs checkpoint=PATH"
OF_TTT = "TTT's ResNet with GroupNorm for 32-pixel images; needs checkpoint=PATH"
UNTRAINED = {
    **{f"cifar-resnet{d}": Untrained(_resnet(d), IMAGENET_MEAN, IMAGENET_STD, OF_HE) for d in (20, 32, 44, 56, 110)},
    "cifar-resnet26-gn": Untrained(networks.CifarResNetGN, HALF, HALF, OF_TTT),
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
    """Load a source model, in ``eval()`` mode. It takes images in [0, 1] and applies mean and std inside, exactly once.

    They are those of the weights' own metadata, or of the checkpoint if it holds any (``mu`` and ``sigma``,
    ``normalize.mean`` ...). ``preprocessing`` lists them with input size, interpolation, resize and crop.

    Args:
        spec: one of ``tta list models``: ``digits-cnn``, ``digits-vit`` or ``digits-cnn-8`` (embedded), ``cifar-resnet20`` (32, 44, 56,
            110), ``cifar-resnet26-gn``, ``timm:NAME[.TAG]``, ``torchvision:NAME[/WEIGHTS]``, ``hf:NAME``,
            ``robustbench:[cifar100/]NAME``, or ``PACKAGE.MODULE:FUNCTION``, a function of yours that returns a network.
        checkpoint: weights to load instead: ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads.
        num_classes: of the classifier, if it differs from the spec's own.
        pretrained: load the spec's own weights if there is no checkpoint; ``False`` leaves the network untrained.
        mean: per channel, of images in [0, 1], if the checkpoint was trained with other values than the spec's.
        std: per channel, likewise.

    Raises:
        ValueError: an unknown spec or name of weights (the nearest is offered), a spec without weights of its own and no
            checkpoint, weights for another number of classes, a checkpoint whose names do not fit (they are listed), or
            weights that are not finite.
        FileNotFoundError: there is no such checkpoint.
        ModuleNotFoundError: ``hf:`` without transformers.
    """
    prefix, _, name = spec.partition(":")
    parsed = ModelSpec(spec, name, num_classes, pretrained and checkpoint is None)
    if spec in EMBEDDED:
        model = _embedded(parsed)
    elif spec in UNTRAINED:
        model = _untrained(parsed)
    elif prefix in FAMILIES and name:
        model = FAMILIES[prefix].make(parsed)
    elif name and _importable(prefix):
        model = from_function(prefix, parsed)
    else:
        known = [*EMBEDDED, *UNTRAINED, *(f"{family}:{name or 'NAME'}" for family in FAMILIES)]
        raise ValueError(f"No model '{spec}'.{nearest(spec, known)} There are: {', '.join(list_models())}.")
    if checkpoint is not None:
        if brought := load_weights(model.model, checkpoint):
            model.normalise_by(*brought)
        if prefix != "robustbench":  # there the spec names the weights, wherever the file is
            model.clean_error = None
    elif not pretrained:
        model.clean_error = None
    state = {name: value for name, value in model.model.state_dict().items() if isinstance(value, Tensor)}
    refuse_bad_weights({name: (value, value.dtype) for name, value in state.items()}, f"'{spec}'")
    if mean is not None or std is not None:
        own = model.preprocessing
        model.normalise_by(own["mean"] if mean is None else mean, own["std"] if std is None else std)
    return model.eval()


def list_models() -> dict[str, str]:
    """The embedded models and the forms of the other specs, each with a description of one line."""
    embedded = {name: (own.make.__doc__ or "").splitlines()[0] for name, own in EMBEDDED.items()}
    untrained = {name: network.line for name, network in UNTRAINED.items()}
    families = {family.form: family.line for family in FAMILIES.values()}
    return {**embedded, **untrained, **families, FUNCTION: "a function of yours that returns a network on [0, 1]"}


def _embedded(spec: ModelSpec) -> ImageClassifier:
    make, file, clean_error = EMBEDDED[spec.text]
    model = ImageClassifier(make(**spec.classes), HALF, HALF, spec.text, (32, 32), clean_error=clean_error)
    if spec.fetch:
        with resources.as_file(resources.files("tta") / "weights" / file) as path:
            load_weights(model.model, path)
    return model


def _untrained(spec: ModelSpec) -> ImageClassifier:
    if spec.fetch:
        raise ValueError(
            f"'{spec.text}' has no weights of its own: give checkpoint=PATH, or pretrained=False for an untrained one."
        )
    make, mean, std, _ = UNTRAINED[spec.text]
    return ImageClassifier(make(**spec.classes), mean, std, spec.text, (32, 32))


def _importable(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False
