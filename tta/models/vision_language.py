"""Vision-language models: towers with their weights, their own preprocessing, and a classifier over class names."""

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from tta.messages import nearest
from tta.models.checkpoints import load_weights, read
from tta.models.classifier import HALF, ImageClassifier
from tta.models.families import ModelSpec, processor_geometry, processor_normalisation
from tta.towers import CLIP, CLIP_LOGIT_SCALE, TEMPLATE, ImageTower, TextTower, TwoTowers, WordTokenizer

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
WORDS = (
    "<pad> a photo of the digit number . zero one two three four five six seven eight nine picture drawing handwritten "
    "blurry noisy dark bright an image small large this is clean written by hand , it x"
)
DIGITS_WORDS = [*WORDS.split(), *(f"<unused{number}>" for number in range(38, 46)), "<start>", "<end>"]
DIGITS_CLASSES = ("zero", "one", "two", "three", "four", "five", "number six", "seven", "digit eight", "nine")
DIGITS_LENGTH, DIGITS_HEADS = 16, (4, 4)


def names_of(spec: ModelSpec) -> Sequence[str]:
    """The names of the classes that were given.

    Raises:
        ValueError: none were.
    """
    if not spec.class_names:
        raise ValueError(
            f"'{spec.text}' classifies by names: give classes=[...] in the order of the labels, and templates=[...] if you like."
        )
    return spec.class_names


def imagenet_names() -> list[str]:
    """Names of ImageNet's 1000 classes as CLIP's authors curated them, with which the published numbers were made; all different.

    Two of the published names stand twice, "missile" and "sunglasses", so that their second class is never predicted: here 744
    is "projectile" and 836 "sunglass", WordNet's first words for them.

    Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
    https://github.com/openai/CLIP, notebooks/Prompt_Engineering_for_ImageNet.ipynb; its licence stands in the file of the names.
    """
    lines = (resources.files("tta") / "class_names" / "imagenet.txt").read_text(encoding="utf-8").splitlines()
    names = (line for line in lines if not line.startswith("#"))
    return [ALIKE.get(number, name) for number, name in enumerate(names)]


ALIKE = {744: "projectile", 836: "sunglass"}  # beside 657, missile, and 837, sunglasses

# ---------------------------------------------------------------------- embedded


def digits_clip(spec: ModelSpec) -> ImageClassifier:
    """A tiny CLIP of 0.3 million weights for digits of 32 pixels, trained with the words for them."""
    towers = _digits_towers(spec)
    model = TwoTowers(
        towers.image,
        towers.text,
        spec.tokenize or WordTokenizer(DIGITS_WORDS, DIGITS_LENGTH),
        spec.class_names or DIGITS_CLASSES,
        spec.templates or (TEMPLATE,),
        logit_scale=towers.logit_scale,
    )
    size = towers.image.image_size
    return ImageClassifier(
        model, CLIP_MEAN, CLIP_STD, spec.text, (size, size), interpolation="bicubic", resize=size, crop="center"
    ).named(model.class_names)


def _digits_towers(spec: ModelSpec) -> CLIP:
    """The towers with the embedded weights, with those of a checkpoint, or untrained."""
    image, text = ImageTower(32, 8, 64, 3, DIGITS_HEADS[0], 32), TextTower(48, 16, 64, 3, DIGITS_HEADS[1], 32)
    if spec.checkpoint is not None:
        weights = read(spec.checkpoint)
    elif spec.fetch:
        with resources.as_file(resources.files("tta") / "weights" / "digits_clip.safetensors") as path:
            weights = load_file(path)
    else:
        return CLIP(image, text, torch.tensor(CLIP_LOGIT_SCALE))
    towers = CLIP.from_weights(weights, DIGITS_HEADS)
    shapes, expected = (
        [value.shape for tower in pair for value in tower.state_dict().values()] for pair in (towers[:2], (image, text))
    )
    if shapes != expected:
        raise ValueError(
            f"'{spec.checkpoint}' holds a CLIP of another size than '{spec.text}', for which the number of heads would be wrong. Load it "
            "by its architecture: open_clip:ARCH with checkpoint=PATH."
        )
    return towers


# ---------------------------------------------------------------------- transformers


class Tower(nn.Module):
    """A tower of transformers and the projection behind it, if there is one: images or ids -> features."""

    def __init__(self, tower: nn.Module, projection: nn.Module | None) -> None:
        super().__init__()
        self.tower, self.projection = tower, projection

    def forward(self, x: Tensor) -> Tensor:
        features: Tensor = self.tower(x).pooler_output
        return features if self.projection is None else self.projection(features)


def from_transformers(spec: ModelSpec) -> ImageClassifier:
    """Make a classifier over class names of a CLIP or SigLIP of the Hugging Face hub, or of a folder where one was saved."""
    try:
        from transformers import AutoConfig, AutoModel, CLIPModel, SiglipModel
    except ImportError:
        raise ModuleNotFoundError(f"'{spec.text}' needs transformers: pip install 'tta-toolkit[hf]'.") from None
    names = names_of(spec)
    try:
        config = AutoConfig.from_pretrained(spec.name)
        if config.model_type not in KINDS:
            raise ValueError(
                f"'{spec.text}' is a '{config.model_type}'; expected one of {', '.join(KINDS)}. Wrap other towers in tta.TwoTowers."
            )
        network: Any = _fetched(spec) if spec.fetch else AutoModel.from_config(config)
        tokenize = spec.tokenize or _tokenizer(spec.name, config)
    except OSError as error:
        raise ValueError(f"'{spec.text}' cannot be loaded: {str(error).splitlines()[0]}") from None
    assert isinstance(network, (CLIPModel, SiglipModel))
    if spec.checkpoint is not None:
        load_weights(network, spec.checkpoint)
    network.float().eval()
    model = TwoTowers(
        Tower(network.vision_model, getattr(network, "visual_projection", None)),
        Tower(network.text_model, getattr(network, "text_projection", None)),
        tokenize,
        names,
        spec.templates or (TEMPLATE,),
        logit_scale=network.logit_scale,
        logit_bias=getattr(network, "logit_bias", 0.0),
    )
    mean, std, geometry = _preprocessing(spec.name, config)
    return ImageClassifier(model, mean, std, spec.text, **geometry).named(model.class_names)


def _fetched(spec: ModelSpec) -> Any:
    """The network with the weights that the spec names; some that are missing would be random."""
    from transformers import AutoModel

    network, found = AutoModel.from_pretrained(spec.name, output_loading_info=True)
    if found["missing_keys"]:
        raise ValueError(
            f"'{spec.text}' has no weights for {', '.join(sorted(found['missing_keys'])[:5])}: it is no trained model of two towers."
        )
    return network


KINDS = ("clip", "siglip")


class Tokenizer:
    """Texts -> ids, as the text tower was trained: SigLIP's reads its last token, so that texts are padded to one length.

    Args:
        tokenizer: of transformers.
        siglip: whether the tower is SigLIP's, which knows small letters alone; else CLIP's.
        longest: most tokens that the tower reads.
    """

    def __init__(self, tokenizer: Any, siglip: bool, longest: int) -> None:
        self.tokenizer, self.siglip, self.longest = tokenizer, siglip, longest

    def __call__(self, texts: Sequence[str]) -> Tensor:
        given = [text.lower() if self.siglip else text for text in texts]
        padding = "max_length" if self.siglip else True
        found = self.tokenizer(given, padding=padding, truncation=True, max_length=self.longest, return_tensors="pt")
        ids: Tensor = found["input_ids"]
        return ids


def _tokenizer(name: str, config: Any) -> Tokenizer:
    from transformers import AutoTokenizer

    longest = config.text_config.max_position_embeddings
    return Tokenizer(AutoTokenizer.from_pretrained(name), config.model_type == "siglip", longest)


def _preprocessing(name: str, config: Any) -> tuple[Sequence[float], Sequence[float], dict[str, Any]]:
    """Mean, std and geometry of the image processor; of a folder without one those that the family was trained with."""
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(name)
    except OSError:
        side = config.vision_config.image_size
        of_clip = config.model_type == "clip"
        geometry = {"input_size": (side, side), "resize": side, "interpolation": "bicubic"}
        mean, std = (CLIP_MEAN, CLIP_STD) if of_clip else (HALF, HALF)
        return mean, std, {**geometry, "crop": "center" if of_clip else "squash"}
    return *processor_normalisation(processor), processor_geometry(processor)


# ---------------------------------------------------------------------- open_clip


class OpenText(nn.Module):
    """The text side of an open_clip model: ids (texts, length) -> features."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        encode: Any = getattr(self.model, "encode_text", self.model)
        features: Tensor = encode(ids)
        return features


def from_open_clip(spec: ModelSpec) -> ImageClassifier:
    """Make a classifier over class names of an open_clip model, by architecture and tag of its weights, or of a folder."""
    try:
        import open_clip
    except ImportError:
        raise ModuleNotFoundError(f"'{spec.text}' needs open_clip: pip install 'tta-toolkit[clip]'.") from None
    names = names_of(spec)
    network, tokenizer = _open_clip(open_clip, spec)
    if spec.checkpoint is not None:
        load_weights(network, spec.checkpoint)
    if not hasattr(network, "visual") or not hasattr(network, "logit_scale"):
        raise ValueError(
            f"'{spec.text}' is a {type(network).__name__}; expected a model of two towers with a logit scale."
        )
    network.float().eval()
    image, preprocessing = network.visual, dict(network.visual.preprocess_cfg)
    bias = getattr(network, "logit_bias", None)
    scale, separate = network.logit_scale, getattr(network, "text", None)
    del network.visual  # what is left is the text side
    model = TwoTowers(
        image,
        OpenText(network if separate is None else separate),
        spec.tokenize or tokenizer,
        names,
        spec.templates or (TEMPLATE,),
        logit_scale=scale,
        logit_bias=0.0 if bias is None else bias,
    )
    size = preprocessing["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return ImageClassifier(
        model,
        preprocessing["mean"],
        preprocessing["std"],
        spec.text,
        (height, width),
        interpolation=preprocessing["interpolation"],
        resize=min(height, width),
        crop="center" if preprocessing["resize_mode"] == "shortest" else "squash",
    ).named(model.class_names)


def _open_clip(open_clip: Any, spec: ModelSpec) -> tuple[Any, Any]:
    """The network and the tokenizer of a spec."""
    if Path(spec.name).is_dir():
        where = f"local-dir:{spec.name}"
        return open_clip.create_model(where, load_weights=spec.fetch), open_clip.get_tokenizer(where)
    architecture, _, tag = spec.name.partition("/")
    known = open_clip.list_models()
    if architecture not in known:
        raise ValueError(
            f"open_clip has no model '{architecture}', and there is no such folder.{nearest(architecture, known)}"
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if spec.fetch and tag not in tags:
        there = f"There are: {', '.join(tags)}." if tags else "It has none: give checkpoint=PATH."
        raise ValueError(f"'open_clip:{architecture}' has no weights '{tag}'.{nearest(tag, tags)} {there}")
    # Weights that were trained with the quick GELU give silently worse logits without it.
    quick = bool((open_clip.get_pretrained_cfg(architecture, tag) or {}).get("quick_gelu", False)) if tag else False
    network = open_clip.create_model(architecture, pretrained=tag if spec.fetch else None, force_quick_gelu=quick)
    return network, open_clip.get_tokenizer(architecture)
