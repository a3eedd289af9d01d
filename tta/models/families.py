"""Families of models: each makes classifiers of one kind of spec, with the preprocessing of their weights.

The numbers are those of the weights' own metadata (timm's ``pretrained_cfg``, torchvision's ``weights.transforms()``,
the image processor of the Hugging Face hub), so that no table here can go out of date.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torchvision
from torch import Tensor, nn

from tta import paths
from tta.messages import nearest
from tta.models import networks
from tta.models.checkpoints import OtherClasses, load_weights
from tta.models.classifier import HALF, NO_MEAN, NO_STD, ImageClassifier


@dataclass(frozen=True)
class ModelSpec:
    """A parsed spec.

    Attributes:
        text: the spec as given, for messages.
        name: the part behind the family's prefix.
        num_classes: of the classifier; None for that of the weights.
        fetch: whether to load the weights that the spec names, or to leave the network untrained.
        class_names: that a vision-language model classifies by; None for the model's own.
        templates: sentences around them; None for the model's own.
        tokenize: makes token ids of texts, in place of the model's own tokenizer.
        checkpoint: weights that a vision-language model loads before it reads its class names.
    """

    text: str
    name: str
    num_classes: int | None
    fetch: bool
    class_names: tuple[str, ...] | None = None
    templates: tuple[str, ...] | None = None
    tokenize: Callable[[Sequence[str]], Tensor] | None = None
    checkpoint: str | Path | None = None

    @property
    def classes(self) -> dict[str, Any]:
        """Keyword arguments of a function that makes the network."""
        return {} if self.num_classes is None else {"num_classes": self.num_classes}

    def check_classes(self, of_weights: int) -> None:
        """Raise an error if weights are to be loaded whose classifier has another number of classes."""
        if self.fetch and self.num_classes not in (None, of_weights):
            raise OtherClasses(
                f"The weights of '{self.text}' are for {of_weights} classes; num_classes={self.num_classes} would leave "
                "the classifier untrained. Give checkpoint=PATH for weights with that many, leave num_classes out, or let "
                "`tta train` train a new head."
            )


# ---------------------------------------------------------------------- timm


def from_timm(spec: ModelSpec) -> ImageClassifier:
    """Make any classifier of timm."""
    architecture, _, tag = spec.name.partition(".")
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no model '{spec.name}'.{nearest(architecture, timm.list_models())}")
    known = timm.list_models(f"{architecture}.*", pretrained=True)
    tags = [name.partition(".")[2] for name in known]
    if tag and tag not in tags:
        there = f"There are: {', '.join(tags)}." if tags else "It has none."
        raise ValueError(f"'timm:{architecture}' has no weights '{tag}'.{nearest(tag, tags)} {there}")
    if spec.fetch and not known and architecture in timm.list_models():
        raise ValueError(
            f"'{spec.text}' has no published weights: give checkpoint=PATH, or pretrained=False for an untrained one."
        )
    published = timm.models.get_pretrained_cfg(spec.name)
    if published is not None and published.num_classes:
        spec.check_classes(published.num_classes)
    network: Any = timm.create_model(spec.name, pretrained=spec.fetch, **spec.classes)
    if not network.num_classes:
        raise ValueError(
            f"'{spec.text}' is published without a classifier: give num_classes=K and checkpoint=PATH of one trained "
            "on its features."
        )
    cfg = timm.data.resolve_model_data_config(network)  # type: ignore[attr-defined, no-untyped-call]
    # The tag belongs to the record: the weights of a bare name have changed between releases of timm.
    text = f"timm:{architecture}.{network.pretrained_cfg['tag']}" if spec.fetch else spec.text
    height, width = cfg["input_size"][1:]
    return ImageClassifier(
        network,
        cfg["mean"],
        cfg["std"],
        text,
        (height, width),
        interpolation=cfg["interpolation"],
        resize=math.floor(min(height, width) / cfg["crop_pct"]),
        crop=cfg["crop_mode"],
    ).named(_timm_names(network) if spec.fetch else None)


def _timm_names(network: Any) -> list[str] | None:
    """Names of the classes of ImageNet and its subsets; None for weights of other data."""
    names = network.pretrained_cfg.get("label_names")
    if names:
        return [str(name) for name in names]
    data: Any = timm.data  # its names are not declared
    subset = data.infer_imagenet_subset(network)
    if subset is None:
        return None
    known = data.ImageNetInfo(subset)
    return [known.index_to_description(number) for number in range(known.num_classes())]


# ---------------------------------------------------------------------- torchvision


def from_torchvision(spec: ModelSpec) -> ImageClassifier:
    """Make any classifier of torchvision."""
    name, _, tag = spec.name.partition("/")
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        raise ValueError(f"torchvision has no classifier '{name}'.{nearest(name, known)}")
    published = torchvision.models.get_model_weights(name)
    tags = [weights.name for weights in published]
    if tag and tag not in published.__members__:
        raise ValueError(f"'{name}' has no weights '{tag}'.{nearest(tag, tags)} There are: {', '.join(tags)}.")
    if spec.fetch and not tag:
        specs = " or ".join(f"torchvision:{name}/{known_tag}" for known_tag in tags)
        raise ValueError(
            f"'{spec.text}' names no weights: say {specs}, give checkpoint=PATH, or pretrained=False for an untrained "
            "one."
        )
    weights = published[tag or "DEFAULT"]
    spec.check_classes(len(weights.meta["categories"]))
    network = torchvision.models.get_model(name, weights=weights if spec.fetch else None, **spec.classes)
    transforms = weights.transforms()
    metrics = weights.meta.get("_metrics", {}).get("ImageNet-1K", {})
    return ImageClassifier(
        network,
        transforms.mean,
        transforms.std,
        f"torchvision:{name}/{weights.name}" if tag else spec.text,
        transforms.crop_size * 2,
        interpolation=transforms.interpolation.value,
        resize=transforms.resize_size[0],
        crop="center",
        clean_error=round(100 - metrics["acc@1"], 3) if spec.fetch and metrics else None,
    ).named(weights.meta["categories"] if spec.fetch else None)


# ---------------------------------------------------------------------- Hugging Face


PIL_NUMBERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # PIL's numbers, as saved by image processors


class Logits(nn.Module):
    """A classifier of transformers that returns its logits, not an object that holds them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.network(pixel_values=x).logits
        return logits


def from_huggingface(spec: ModelSpec) -> ImageClassifier:
    """Make an image classifier of the Hugging Face hub, or of a folder where one was saved."""
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification
    except ImportError:
        raise ModuleNotFoundError(f"'{spec.text}' needs transformers: pip install 'tta-toolkit[hf]'.") from None
    name = spec.name
    try:
        config = AutoConfig.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError as error:
        raise ValueError(f"'{spec.text}' cannot be loaded: {str(error).splitlines()[0]}") from None
    spec.check_classes(config.num_labels)
    if spec.fetch:
        network, found = AutoModelForImageClassification.from_pretrained(name, output_loading_info=True)
        if found["missing_keys"]:
            raise ValueError(
                f"'{spec.text}' is published without weights for {', '.join(sorted(found['missing_keys'])[:5])}: it is "
                "no trained classifier. Give checkpoint=PATH of one."
            )
    else:
        if spec.num_classes is not None:
            config.num_labels = spec.num_classes
        network = AutoModelForImageClassification.from_config(config)
    mean, std = processor_normalisation(processor)
    names = [config.id2label[number] for number in range(config.num_labels)] if spec.fetch else None
    return ImageClassifier(Logits(network), mean, std, spec.text, **processor_geometry(processor)).named(names)


def processor_normalisation(processor: Any) -> tuple[list[float], list[float]]:
    """Mean and std for images in [0, 1], equal to the operations of an image processor on images in [0, 255]."""
    scale = 255 * processor.rescale_factor if getattr(processor, "do_rescale", True) else 255.0
    offset = 1.0 if getattr(processor, "rescale_offset", False) else 0.0
    mean, std = [0.0] * 3, [1.0] * 3
    if getattr(processor, "do_normalize", True):
        mean, std = list(processor.image_mean), list(processor.image_std)
    again = std if getattr(processor, "include_top", False) else [1.0] * 3  # EfficientNet's divides by std once more
    return [(m + offset) / scale for m in mean], [s * t / scale for s, t in zip(std, again, strict=True)]


def processor_geometry(processor: Any) -> dict[str, Any]:
    """Input size, interpolation, resize and crop of an image processor."""

    def side(of: str, key: str) -> int | None:
        sizes = getattr(processor, of, None) or {}
        return sizes.get(key) if hasattr(sizes, "get") else getattr(sizes, key, None)

    edge, height, width = side("size", "shortest_edge"), side("size", "height"), side("size", "width")
    share = getattr(processor, "crop_pct", None)
    size: tuple[int | None, int | None] = edge or height, edge or width
    resize, crop = edge or height, "center" if edge else "squash"
    if edge and share:  # ConvNeXt's: below 384 pixels a central crop, else the whole image
        resize, crop = (int(edge / share), "center") if edge < 384 else (edge, "squash")
    elif getattr(processor, "do_center_crop", False) and side("crop_size", "height"):
        size, crop = (side("crop_size", "height"), side("crop_size", "width")), "center"
    resample: Any = getattr(processor, "resample", None)
    interpolation = PIL_NUMBERS.get(resample) or getattr(resample, "value", resample)
    return {
        "input_size": None if None in size else size,
        "interpolation": interpolation,
        "resize": resize,
        "crop": crop,
    }


# ---------------------------------------------------------------------- RobustBench


@dataclass(frozen=True)
class Published:
    """Weights of RobustBench's corruptions leader board.

    Attributes:
        make: the network, given its number of classes.
        mean: of images in [0, 1].
        std: likewise.
        drive: id of the file on Google Drive; it has no other address and no published checksum.
        clean_error: % on the clean test set, from RobustBench's ``model_info``; None if that does not have these weights.
    """

    make: Callable[[int], nn.Module]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    drive: str
    clean_error: float | None


def _wide(depth: int, width: int) -> Callable[[int], nn.Module]:
    return lambda num_classes: networks.WideResNet(depth, width, num_classes)


AUGMIX = "Hendrycks2020AugMix_WRN", "Hendrycks2020AugMix_ResNeXt"
ROBUSTBENCH = {
    "cifar10/Standard": Published(_wide(28, 10), NO_MEAN, NO_STD, "1t98aEuzeTL8P7Kpd5DIrCoCL21BNZUhC", 5.22),
    f"cifar10/{AUGMIX[0]}": Published(_wide(40, 2), HALF, HALF, "1wy7gSRsUZzCzj8QhmTbcnwmES_2kkNph", None),
    f"cifar10/{AUGMIX[1]}": Published(networks.CifarResNeXt, HALF, HALF, "1uGP3nZbL3LC160kOsxwkkt6tDd4qbZT1", None),
    f"cifar100/{AUGMIX[0]}": Published(_wide(40, 2), HALF, HALF, "1XpFFdCdU9LcDtcyNfo6_BV1RZHKKkBVE", 23.72),
    f"cifar100/{AUGMIX[1]}": Published(networks.CifarResNeXt, HALF, HALF, "1ocnHbvDdOBLvgNr6K7vEYL08hUdkD1Rv", 21.10),
}


def from_robustbench(spec: ModelSpec) -> ImageClassifier:
    """Make one of RobustBench's networks for CIFAR-C; the package itself is not needed."""
    of = "cifar100" if spec.num_classes == 100 else "cifar10"
    name = spec.name if "/" in spec.name else f"{of}/{spec.name}"
    if name not in ROBUSTBENCH:
        raise ValueError(
            f"No model 'robustbench:{name}' here.{nearest(name, ROBUSTBENCH)} There are: {', '.join(ROBUSTBENCH)}. "
            "RobustBench's ImageNet models are torchvision's: torchvision:resnet50 with checkpoint=PATH."
        )
    published, (dataset, _, entry) = ROBUSTBENCH[name], name.partition("/")
    classes = int(dataset.removeprefix("cifar"))
    spec.check_classes(classes)
    network = published.make(spec.num_classes or classes)
    if spec.fetch:
        file = paths.data_root() / "models" / dataset / "corruptions" / f"{entry}.pt"
        if not file.is_file():
            raise FileNotFoundError(
                f"No weights of 'robustbench:{name}' at '{file}'. Give checkpoint=PATH, or put there the file that "
                f"RobustBench publishes on Google Drive, https://drive.google.com/uc?id={published.drive}."
            )
        load_weights(network, file)
    clean_error = published.clean_error if spec.num_classes in (None, classes) else None
    return ImageClassifier(
        network, published.mean, published.std, f"robustbench:{name}", (32, 32), clean_error=clean_error
    )


# ---------------------------------------------------------------------- a function of the user's


def from_function(module: str, spec: ModelSpec) -> ImageClassifier:
    """The network that a function of an importable module returns; it takes images in [0, 1]."""
    found = getattr(import_module(module), spec.name, None)
    if not callable(found):
        choices = [name for name, value in vars(import_module(module)).items() if callable(value)]
        raise ValueError(f"Module '{module}' has no function '{spec.name}'.{nearest(spec.name, choices)}")
    network = found(**spec.classes)
    if isinstance(network, ImageClassifier):
        return network
    if not isinstance(network, nn.Module):
        raise TypeError(f"'{spec.text}' returned {type(network).__name__}; expected a torch.nn.Module.")
    return ImageClassifier(network, NO_MEAN, NO_STD, spec.text, None)


@dataclass(frozen=True)
class Family:
    """One kind of spec: the function that makes its models, how the spec is written, a description of one line."""

    make: Callable[[ModelSpec], ImageClassifier]
    form: str
    line: str


FAMILIES = {
    "timm": Family(from_timm, "timm:NAME[.TAG]", "any classifier of timm, with the weights of that tag"),
    "torchvision": Family(
        from_torchvision,
        "torchvision:NAME[/WEIGHTS]",
        "any classifier of torchvision, such as torchvision:resnet50/IMAGENET1K_V1",
    ),
    "hf": Family(from_huggingface, "hf:NAME", "an image classifier of the Hugging Face hub, or a folder with one"),
    "robustbench": Family(
        from_robustbench,
        "robustbench:[cifar100/]NAME",
        f"{', '.join(['Standard', *AUGMIX])}: weights in TTA_DATA, or checkpoint=PATH",
    ),
}
