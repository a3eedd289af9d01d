"""Architectures of `matrix.py`: name -> how it is built, with random weights and 10 classes, and the size of its images.

A network of up to 0.6 billion multiplications an image is as its library has it, at its own size of image. A larger one gets
smaller images, and is narrower or of fewer blocks where its library allows it, so that a pair takes seconds on a core; kinds
of layers, heads and forwards are those of the full size.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import tta

CLASSES, SOURCE = 10, 16  # source images


class Architecture(NamedTuple):
    """A network: the function that makes it, and the height and width of its images."""

    build: Callable[[], nn.Module]
    size: int


# ---------------------------------------------------------------------- timm

TIMM = {
    "mobilenetv3_small_050": 224,
    "ghostnet_050": 224,
    "mnasnet_small": 224,
    "mobilenetv2_050": 224,
    "test_nfnet": 160,
    "regnety_002": 224,
    "edgenext_xx_small": 256,
    "levit_128s": 224,
    "efficientnet_lite0": 224,
    "efficientnet_b0": 224,
    "mobilevit_xxs": 256,
    "inception_next_atto": 224,
    "convnext_atto": 224,
    "convnextv2_atto": 224,
    "xcit_nano_12_p16_224": 224,
}
SMALL = {"img_size": 64}
FOUR = {"img_size": 64, "depth": 4}
NARROW = (32, 64, 96, 128)
TIMM_SMALLER: dict[str, tuple[int, dict[str, Any]]] = {
    "resnet18": (64, {"channels": NARROW}),
    "resnet26d": (64, {"channels": NARROW}),
    "resnetv2_18": (64, {"channels": NARROW}),
    "resnext26ts": (64, {}),
    "densenet121": (64, {"block_config": (3, 6, 6, 4)}),
    "tf_efficientnetv2_b0": (64, {}),
    "repvgg_a0": (64, {}),
    "nf_resnet26": (64, {}),
    "vit_tiny_patch16_224": (64, FOUR),
    "vit_small_patch16_rope_224": (64, {**FOUR, "embed_dim": 192, "num_heads": 3, "init_values": None}),
    "deit_tiny_patch16_224": (64, FOUR),
    "deit_tiny_distilled_patch16_224": (64, FOUR),
    "swin_tiny_patch4_window7_224": (64, {**SMALL, "embed_dim": 48, "depths": (1, 1, 2, 1), "window_size": 4}),
    "efficientformer_l1": (224, {"embed_dims": (24, 48, 96, 128)}),
    "beit_base_patch16_224": (64, {**FOUR, "embed_dim": 192, "num_heads": 3}),
    "eva02_tiny_patch14_224": (56, {"img_size": 56, "depth": 4}),
    "cait_xxs24_224": (64, FOUR),
    "pit_ti_224": (64, {**SMALL, "depth": (1, 2, 1)}),
    "coat_tiny": (64, SMALL),
    "coatnet_pico_rw_224": (64, {**SMALL, "depths": (1, 1, 2, 1)}),
    "maxvit_pico_rw_256": (64, {**SMALL, "depths": (1, 1, 1, 1)}),
    "twins_pcpvt_small": (64, {**SMALL, "embed_dims": (32, 64, 80, 128), "depths": (1, 1, 2, 1)}),
    "tiny_vit_5m_224": (64, {"embed_dims": NARROW, "num_heads": (1, 2, 3, 4)}),
    "fastvit_t8": (64, {}),
}


def bit() -> nn.Module:
    """The class of `resnetv2_50x1_bit`, of a block a stage: GroupNorm before standardised convolutions."""
    norm, layer = timm.layers.GroupNormAct, timm.layers.StdConv2d
    return timm.models.resnetv2.ResNetV2([1, 1, 1, 1], (128, 128, 256, 256), CLASSES, norm_layer=norm, conv_layer=layer)


def vgg(**options: Any) -> nn.Module:
    """The class of `vgg11`, narrower; its features have 256 values, not 4096."""
    layers = [16, "M", 32, "M", 64, 64, "M", 96, 96, "M", 128, 128, "M"]
    model: Any = timm.models.vgg.VGG(layers, num_classes=CLASSES, mlp_ratio=1 / 16, **options)
    model.pre_logits = timm.models.vgg.ConvMlp(128, 256, kernel_size=2)
    model.head = timm.layers.ClassifierHead(256, CLASSES)
    found: nn.Module = model
    return found


def mixer(**options: Any) -> nn.Module:
    """The class of `mixer_s32_224` and `resmlp_12_224`, of four blocks."""
    kind = timm.models.mlp_mixer.MlpMixer
    return kind(num_classes=CLASSES, img_size=64, patch_size=16, num_blocks=4, embed_dim=128, **options)


def metaformer(*mixers: Any, **options: Any) -> nn.Module:
    """The class of `poolformer_s12` and `caformer_s18`, of a block a stage."""
    kind = timm.models.metaformer.MetaFormer
    return kind(num_classes=CLASSES, depths=(1, 1, 1, 1), dims=NARROW, token_mixers=mixers, **options)


TIMM_CLASSES: dict[str, Callable[[], nn.Module]] = {
    "resnetv2, bit": bit,
    "vgg": vgg,
    "vgg, bn": partial(vgg, norm_layer=nn.BatchNorm2d),
    "mixer": mixer,
    "resmlp": partial(
        mixer, mlp_ratio=4, block_layer=timm.models.mlp_mixer.ResBlock, norm_layer=timm.models.mlp_mixer.Affine
    ),
    "poolformer": partial(metaformer, *4 * [timm.models.metaformer.Pooling], norm_layers=timm.layers.GroupNorm1),
    "caformer": partial(
        metaformer,
        *2 * [timm.models.metaformer.SepConv],
        *2 * [timm.models.metaformer.Attention],
        norm_layers=2 * [timm.models.metaformer.LayerNorm2dNoBias] + 2 * [timm.models.metaformer.LayerNormNoBias],
    ),
}


# ---------------------------------------------------------------------- torchvision

TORCHVISION: dict[str, tuple[int, dict[str, Any]]] = {
    "shufflenet_v2_x0_5": (224, {}),
    "mobilenet_v3_small": (224, {}),
    "mobilenet_v2": (224, {}),
    "efficientnet_b0": (224, {}),
    "regnet_y_400mf": (224, {}),
    "resnet18": (64, {}),
    "squeezenet1_0": (64, {}),
    "googlenet": (64, {"init_weights": False}),
}


def vit() -> nn.Module:
    """The class of `vit_b_32`, narrower and of four blocks."""
    kind = torchvision.models.VisionTransformer
    return kind(
        image_size=64, patch_size=16, num_layers=4, num_heads=3, hidden_dim=96, mlp_dim=192, num_classes=CLASSES
    )


def convnext() -> nn.Module:
    """The class of `convnext_tiny`, narrower and of a block a stage."""
    stages = [
        torchvision.models.convnext.CNBlockConfig(width, after, 1)
        for width, after in zip(NARROW, (*NARROW[1:], None), strict=True)
    ]
    return torchvision.models.ConvNeXt(stages, num_classes=CLASSES)


def swin() -> nn.Module:
    """The class of `swin_t`, narrower and of five blocks."""
    kind = torchvision.models.SwinTransformer
    return kind([4, 4], 24, [1, 1, 2, 1], [1, 2, 2, 2], [4, 4], num_classes=CLASSES)


def alexnet() -> nn.Module:
    """An AlexNet whose classifier was replaced by a smaller one."""
    model = torchvision.models.alexnet()
    model.classifier = nn.Sequential(nn.Linear(9216, 256), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(256, CLASSES))
    return model


# ---------------------------------------------------------------------- transformers

HUGGING_FACE: dict[str, dict[str, Any]] = {
    "ViT": {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "image_size": 64,
    },
    "ResNet": {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "ConvNext": {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]},
    "MobileViT": {"hidden_sizes": [32, 48, 64], "image_size": 64},
    "Segformer": {"hidden_sizes": [16, 32, 48, 64], "decoder_hidden_size": 32},
    "Swin": {"embed_dim": 24, "depths": [1, 1, 1], "num_heads": [1, 2, 2], "image_size": 64, "window_size": 4},
}


def hugging_face(kind: str) -> nn.Module:
    """An image classifier of transformers from its configuration; ImportError without that library."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**HUGGING_FACE[kind], num_labels=CLASSES)
    model: nn.Module = transformers.AutoModelForImageClassification.from_config(config)
    return model


# ---------------------------------------------------------------------- modules as a user writes them


class LayerNorm2d(nn.Module):
    """A LayerNorm over the channels of a map, derived from no layer of torch.nn."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, unbiased=False) + 1e-6).sqrt()
        return x * self.weight[:, None, None] + self.bias[:, None, None]


class RMSNorm2d(nn.RMSNorm):
    """torch's RMSNorm over the channels of a map."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Plain(nn.Sequential):
    """Four convolutions, each with a normalisation layer of the kind given, an average and a linear head."""

    def __init__(self, norm: Callable[[int], nn.Module], width: int = 32) -> None:
        stages = []
        for channels in (3, width, width, width):
            stages += [nn.Conv2d(channels, width, 3, 2, 1), norm(width), nn.ReLU(inplace=True)]
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Mixed(nn.Module):
    """Custom norms beside known ones, with a head under another name than any library's."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 32, 4, 4), LayerNorm2d(32), nn.GELU())
        self.body = nn.Sequential(nn.Conv2d(32, 32, 3, 1, 1), RMSNorm2d(32), nn.GELU())
        self.to_logits = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.to_logits(self.body(self.stem(x)).mean((2, 3)))
        return logits


def lightning_module() -> nn.Module:
    """A LightningModule around a ResNet, as one comes out of a training."""
    from lightning.pytorch import LightningModule

    class Classifier(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model("resnet10t", num_classes=CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.net(x)
            return logits

    return Classifier()


OWN: dict[str, Architecture] = {
    "embedded:digits-cnn": Architecture(partial(tta.load_model, "digits-cnn"), 32),
    "embedded:digits-vit": Architecture(partial(tta.load_model, "digits-vit"), 32),
    "cifar-resnet20": Architecture(partial(tta.load_model, "cifar-resnet20", pretrained=False), 32),
    "cifar-resnet26-gn": Architecture(partial(tta.load_model, "cifar-resnet26-gn", pretrained=False), 32),
    "own:LightningModule": Architecture(lightning_module, 64),
    "own:GroupNorm": Architecture(partial(Plain, partial(nn.GroupNorm, 4)), 32),
    "own:InstanceNorm": Architecture(partial(Plain, partial(nn.InstanceNorm2d, affine=True)), 32),
    "own:InstanceNorm without scale": Architecture(partial(Plain, nn.InstanceNorm2d), 32),
    "own:BatchNorm without scale": Architecture(partial(Plain, partial(nn.BatchNorm2d, affine=False)), 32),
    "own:BatchNorm without statistics": Architecture(
        partial(Plain, partial(nn.BatchNorm2d, track_running_stats=False)), 32
    ),
    "own:LayerNorm2d": Architecture(partial(Plain, LayerNorm2d), 32),
    "own:norms of two kinds": Architecture(Mixed, 32),
}

ARCHITECTURES: dict[str, Architecture] = {
    **{
        f"timm:{name}": Architecture(partial(timm.create_model, name, num_classes=CLASSES), size)
        for name, size in TIMM.items()
    },
    **{
        f"timm:{name}": Architecture(partial(timm.create_model, name, num_classes=CLASSES, **options), size)
        for name, (size, options) in TIMM_SMALLER.items()
    },
    **{f"timm:{name}": Architecture(build, 64) for name, build in TIMM_CLASSES.items()},
    **{
        f"torchvision:{name}": Architecture(
            partial(torchvision.models.get_model, name, num_classes=CLASSES, **options), size
        )
        for name, (size, options) in TORCHVISION.items()
    },
    "torchvision:alexnet": Architecture(alexnet, 64),
    "torchvision:vit": Architecture(vit, 64),
    "torchvision:convnext": Architecture(convnext, 64),
    "torchvision:swin": Architecture(swin, 64),
    **{f"transformers:{kind}": Architecture(partial(hugging_face, kind), 64) for kind in HUGGING_FACE},
    **OWN,
}


# ---------------------------------------------------------------------- a model and images for it


def noise(images: int, size: int) -> Tensor:
    """Images (images, 3, size, size) of coarse patterns that differ in colour and contrast, with a little noise on them."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(images, 3, 4, 4, generator=generator)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bilinear")
    return (0.9 * smooth + 0.1 * torch.rand(images, 3, size, size, generator=generator)).clamp(0, 1)


def prepared(name: str) -> tuple[nn.Module, Tensor]:
    """The network of a name, its statistics those of the images and its predictions spread over the classes; the images."""
    architecture = ARCHITECTURES[name]
    torch.manual_seed(0)
    model, images = architecture.build(), noise(SOURCE, architecture.size)
    if not name.startswith("embedded"):
        spread(model, images)
    return model.eval(), images


@torch.no_grad()
def spread(model: nn.Module, images: Tensor) -> None:
    """Give BatchNorm layers the statistics of the images, and the head logits of mean 0 and deviation 3."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.train().momentum = None  # the mean over forwards
    for _ in range(2 if norms else 0):
        model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.eval()
    for head in heads(model):
        if not head.weight.any():  # some start from zeros
            nn.init.normal_(head.weight, std=0.02)
    logits = logits_of(model(images))
    scale = 3 / (logits.std(0).mean() + 1e-9)
    for head in heads(model):
        head.weight *= scale
        if head.bias is not None:
            head.bias.copy_(scale * (head.bias - logits.mean(0)))


def heads(model: nn.Module) -> list[nn.Linear | nn.Conv2d]:
    """Linear layers with an output for each class, or else the last such convolution."""
    linear = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == CLASSES]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.out_channels == CLASSES]
    return [*linear] or [*convolutions[-1:]]


def logits_of(output: Any) -> Tensor:
    found: Tensor = getattr(output, "logits", output)
    return found
