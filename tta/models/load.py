"""Model specs: a name and a checkpoint become a module that takes images in [0, 1] and normalises them inside, once."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from tta import auxiliary_file
from tta.messages import nearest
from tta.models import networks
from tta.models.checkpoints import OtherClasses, fit, load_weights, refuse_bad_weights
from tta.models.classifier import HALF, IMAGENET_MEAN, IMAGENET_STD, ImageClassifier
from tta.models.families import FAMILIES, Family, ModelSpec, from_function
from tta.models.vision_language import digits_clip, from_open_clip, from_transformers
from tta.towers import TwoTowers

FUNCTION = "PACKAGE.MODULE:FUNCTION"


DIGITS = tuple("0123456789")


class Embedded(NamedTuple):
    """A source model whose weights are part of this package."""

    make: Callable[..., nn.Module]
    file: str
    clean_error: float | None  # %, on the 800 held-out digits; None of a model of maps or boxes
    names: tuple[str, ...] = DIGITS
    side: int = 32  # pixels of the images that it was trained on


class Untrained(NamedTuple):
    """A network that comes without weights: they are given as a checkpoint."""

    make: Callable[..., nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    line: str


EMBEDDED = {
    "digits-cnn": Embedded(networks.DigitsCNN, "digits_cnn.safetensors", 0.375),
    "digits-vit": Embedded(networks.digits_vit, "digits_vit.safetensors", 1.125),
    "digits-gn": Embedded(networks.DigitsGN, "digits_gn.safetensors", 1.0),
    "digits-cnn-8": Embedded(networks.digits_cnn_8, "digits_cnn_8.safetensors", 0.3101, DIGITS[:8]),
    "digits-maps": Embedded(networks.DigitsFCN, "digits_maps.safetensors", None, (*DIGITS, "background"), 64),
    "digits-ssd": Embedded(networks.digits_ssd, "digits_ssd.safetensors", None, ("background", *DIGITS), 64),
}


# Vision-language models: they classify by the names of classes that they are given.
TOWERS: dict[str, Callable[[ModelSpec], ImageClassifier]] = {"digits-clip": digits_clip}
TOWER_FAMILIES = {
    "hf-clip": Family(
        from_transformers, "hf-clip:NAME", "a CLIP or SigLIP of the Hugging Face hub, or a folder with one"
    ),
    "open_clip": Family(from_open_clip, "open_clip:ARCH/TAG", "a model of open_clip, or a folder with one"),
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
    new_head: bool = False,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    templates: Sequence[str] | None = None,
    tokenize: Callable[[Sequence[str]], Tensor] | None = None,
) -> ImageClassifier:
    """Load a source model, in ``eval()`` mode. It takes images in [0, 1] and applies mean and std inside, exactly once.

    They are those of the weights' own metadata, or of the checkpoint if it holds any (``mu`` and ``sigma``,
    ``normalize.mean`` ...). ``preprocessing`` lists them with input size, interpolation, resize and crop.

    Args:
        spec: one of ``tta list models``: ``digits-cnn``, ``digits-vit``, ``digits-gn``, ``digits-cnn-8``, ``digits-maps``,
            ``digits-ssd`` or ``digits-clip`` (embedded), ``cifar-resnet20`` (32, 44, 56, 110), ``cifar-resnet26-gn``, ``timm:NAME[.TAG]``,
            ``torchvision:NAME[/WEIGHTS]``, ``hf:NAME``, ``hf-clip:NAME``, ``open_clip:ARCH/TAG``,
            ``robustbench:[cifar100/]NAME``, or ``PACKAGE.MODULE:FUNCTION``, a function of yours that returns a network.
        checkpoint: weights to load instead: ``.safetensors``, or a file that ``torch.load(weights_only=True)`` reads.
        num_classes: of the classifier, if it differs from the spec's own.
        pretrained: load the spec's own weights if there is no checkpoint; ``False`` leaves the network untrained.
        new_head: start of a training: of weights for another number of classes all but the head are taken, with a warning, and
            the head starts at random; ``False`` refuses them.
        mean: per channel, of images in [0, 1], if the checkpoint was trained with other values than the spec's.
        std: per channel, likewise.
        classes: names that a vision-language model classifies by, in the order of the labels.
        templates: sentences with ``{}`` in the place of a name; "a photo of a {}." if left out.
        tokenize: texts -> token ids (texts, length), in place of a vision-language model's own tokenizer.

    Raises:
        ValueError: an unknown spec or name of weights (the nearest is offered), a spec without weights of its own and no
            checkpoint, weights for another number of classes, a checkpoint whose names do not fit (they are listed), or
            weights that are not finite.
        FileNotFoundError: there is no such checkpoint.
        ModuleNotFoundError: ``hf:`` or ``hf-clip:`` without transformers, ``open_clip:`` without open_clip.
    """
    prefix, _, name = spec.partition(":")
    names, sentences = (None if given is None else tuple(given) for given in (classes, templates))
    fetch = pretrained and checkpoint is None
    parsed = ModelSpec(spec, name, num_classes, fetch, names, sentences, tokenize, checkpoint)
    try:
        model = _made(parsed)
    except OtherClasses:
        if not new_head:
            raise
        model = _with_new_head(parsed)
    if checkpoint is not None and not isinstance(model.model, TwoTowers):
        if brought := load_weights(model.model, checkpoint, new_head=new_head):
            model.normalise_by(*brought)
        model.auxiliary = auxiliary_file.read(checkpoint)
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


def reads_names(spec: str) -> bool:
    """Whether a model classifies by the names of classes that it must be given."""
    return spec.partition(":")[0] in TOWER_FAMILIES


def _made(parsed: ModelSpec) -> ImageClassifier:
    """The model of a spec, with the weights that the spec names."""
    spec, (prefix, _, name) = parsed.text, parsed.text.partition(":")
    if spec in TOWERS or (prefix in TOWER_FAMILIES and name):
        return _of_towers(parsed)
    if parsed.class_names or parsed.templates or parsed.tokenize:
        forms = ", ".join([*TOWERS, *(family.form for family in TOWER_FAMILIES.values())])
        raise ValueError(
            f"classes=, templates= and tokenize= are for vision-language models ({forms}); '{spec}' has classes of its own."
        )
    if spec in EMBEDDED:
        return _embedded(parsed)
    if spec in UNTRAINED:
        return _untrained(parsed)
    if prefix in FAMILIES and name:
        return FAMILIES[prefix].make(parsed)
    if name and _importable(prefix):
        return from_function(prefix, parsed)
    known = [*EMBEDDED, *TOWERS, *UNTRAINED, *(f"{family}:{name or 'NAME'}" for family in (*FAMILIES, *TOWER_FAMILIES))]
    raise ValueError(f"No model '{spec}'.{nearest(spec, known)} There are: {', '.join(list_models())}.")


def _with_new_head(parsed: ModelSpec) -> ImageClassifier:
    """The model of a spec with its own weights, but for a head that starts at random for another number of classes."""
    network = _made(replace(parsed, fetch=False)).model
    model = _made(replace(parsed, num_classes=None))
    fit(network, model.model.state_dict(), f"'{model.spec}'", new_head=True)
    model.model, model.clean_error, model.auxiliary = network, None, None
    return model.named(None)


def _of_towers(parsed: ModelSpec) -> ImageClassifier:
    """A vision-language model; num_classes says no more than the number of names, and is held to it."""
    prefix = parsed.text.partition(":")[0]
    make = TOWERS[prefix] if prefix in TOWERS else TOWER_FAMILIES[prefix].make
    model = make(parsed)
    names = len(model.class_names or [])
    if parsed.num_classes not in (None, names):
        raise ValueError(
            f"num_classes={parsed.num_classes}, and '{parsed.text}' has {names} names of classes: give classes=[...]."
        )
    return model


def list_models() -> dict[str, str]:
    """The embedded models and the forms of the other specs, each with a description of one line."""
    embedded = {name: (own.make.__doc__ or "").splitlines()[0] for name, own in EMBEDDED.items()}
    untrained = {name: network.line for name, network in UNTRAINED.items()}
    families = {family.form: family.line for family in (*FAMILIES.values(), *TOWER_FAMILIES.values())}
    towers = {name: (make.__doc__ or "").splitlines()[0] for name, make in TOWERS.items()}
    return {
        **embedded,
        **towers,
        **untrained,
        **families,
        FUNCTION: "a function of yours that returns a network on [0, 1]",
    }


def _embedded(spec: ModelSpec) -> ImageClassifier:
    make, file, clean_error, names, side = EMBEDDED[spec.text]
    model = ImageClassifier(make(**spec.classes), HALF, HALF, spec.text, (side, side), clean_error=clean_error)
    if spec.fetch:
        with resources.as_file(resources.files("tta") / "weights" / file) as path:
            load_weights(model.model, path)
            model.auxiliary = auxiliary_file.read(path)
        model.named(names)
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
