"""Networks that no library ships: the embedded digit classifiers and those of the CIFAR benchmarks.

The CIFAR networks carry the parameter names of the published weights, so that those load as they are.
"""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, and a shortcut made by ``shortcut(channels_in, channels, stride)``."""

    def __init__(
        self, channels_in: int, channels: int, stride: int, shortcut: Callable[[int, int, int], nn.Module]
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.shortcut = shortcut(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def projection(channels_in: int, channels: int, stride: int) -> nn.Module:
    """A 1x1 convolution where the shape changes."""
    same = stride == 1 and channels_in == channels
    return nn.Identity() if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)


class DigitsCNN(nn.Module):
    """A residual network with BatchNorm for 32-pixel images, 76 000 parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = BasicBlock(16, 16, 1, projection)
        self.layer2 = BasicBlock(16, 32, 2, projection)
        self.layer3 = BasicBlock(32, 64, 2, projection)
        self.fc = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


class GroupedBlock(nn.Module):
    """Two 3x3 convolutions, each with GroupNorm behind it, and a 1x1 convolution as shortcut where the shape changes."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.GroupNorm(8, channels)
        self.shortcut = projection(channels_in, channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class DigitsGN(nn.Module):
    """A residual network with GroupNorm for 32-pixel images, trained with a rotation head (TTT), 55 000 parameters."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.norm1 = nn.GroupNorm(8, 16)
        self.layer1 = GroupedBlock(16, 16, 1)
        self.layer2 = GroupedBlock(16, 32, 2)
        self.layer3 = GroupedBlock(32, 48, 2)
        self.fc = nn.Linear(48, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.conv1(x)))
        logits: Tensor = self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


def digits_cnn_8(num_classes: int = 8) -> nn.Module:
    """The network of ``digits-cnn`` for the digits 0 to 7; 8 and 9 are classes that it does not know."""
    return DigitsCNN(num_classes)


def digits_vit(num_classes: int = 10) -> nn.Module:
    """A timm ViT for 32-pixel images: patch 8, width 64, 4 blocks, 4 heads, 215 000 parameters."""
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=num_classes)


class SeparableConv(nn.Module):
    """A 3x3 convolution of each channel alone, then one of 1x1 over all, each with BatchNorm and ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int = 1, dilation: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(
            channels_in, channels_in, 3, stride, dilation, dilation, groups=channels_in, bias=False
        )
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.pointwise = nn.Conv2d(channels_in, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(self.bn2(self.pointwise(x)))


class DigitsFCN(nn.Module):
    """A fully convolutional network with BatchNorm for mosaics of digits, 27 000 parameters; maps of half the size.

    Two strided stages, two dilated layers, and the pixels of the first stage again for the borders. Sides are multiples of 4.
    """

    def __init__(self, num_classes: int = 11) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = SeparableConv(16, 32, stride=2)
        self.stage2 = SeparableConv(32, 64)
        self.context = nn.Sequential(SeparableConv(64, 96, dilation=2), SeparableConv(96, 96, dilation=2))
        self.reduce = nn.Conv2d(96, 32, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(32)
        self.decode = SeparableConv(48, 32)
        self.head = nn.Conv2d(32, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = torch.relu(self.bn1(self.conv1(x)))
        coarse = self.context(self.stage2(self.stage1(fine)))
        coarse = torch.relu(self.bn2(self.reduce(coarse)))
        large = F.interpolate(coarse, size=fine.shape[-2:], mode="bilinear", align_corners=False)
        maps: Tensor = self.head(self.decode(torch.cat([fine, large], 1)))
        return maps


class DigitsTrunk(nn.Module):
    """Features of canvases of digits at a quarter of their size: (batch, 3, height, width) -> one map of 96 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stages = nn.Sequential(SeparableConv(16, 32, stride=2), SeparableConv(32, 64))
        self.context = nn.Sequential(SeparableConv(64, 96, dilation=2), SeparableConv(96, 96, dilation=2))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"0": self.context(self.stages(torch.relu(self.bn1(self.conv1(x)))))}


def digits_ssd(num_classes: int = 11) -> nn.Module:
    """A torchvision SSDLite with BatchNorm for canvases of digits, 39 000 parameters; class 0 is the background."""
    from torchvision.models.detection.anchor_utils import DefaultBoxGenerator
    from torchvision.models.detection.ssd import SSD
    from torchvision.models.detection.ssdlite import SSDLiteHead

    # Digits are 5 to 13 pixels wide and 16 high: boxes of 10 and 13 pixels, and one twice as high.
    anchors = DefaultBoxGenerator([[2]], scales=[0.16, 0.26], steps=[4])
    head = SSDLiteHead([96], anchors.num_anchors_per_location(), num_classes, nn.BatchNorm2d)
    found = {"score_thresh": 0.05, "nms_thresh": 0.45, "detections_per_img": 20, "topk_candidates": 60}
    raw = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3}  # normalised before
    detector: nn.Module = SSD(DigitsTrunk(), anchors, (64, 64), num_classes, head=head, **raw, **found)
    return detector


class PaddedShortcut(nn.Module):
    """Option A of the ResNet paper: strided pixels, and zero channels on both sides; it has no parameters."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.before = (channels - channels_in) // 2
        self.after = channels - channels_in - self.before

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 1:
            return x
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.before, self.after))


class CifarResNet(nn.Module):
    """The ResNet for 32-pixel images: three stages of 16, 32 and 64 channels, in the parameter names of published weights.

    He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2.

    Args:
        depth: 20, 32, 44, 56 or 110 layers, 6 n + 2.
        num_classes: of the classifier ``linear``.
    """

    def __init__(self, depth: int = 20, num_classes: int = 10) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise ValueError(f"depth is 6 n + 2, such as 20, 32, 44, 56 or 110; got {depth}.")
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks, 1)
        self.layer2 = self._stage(16, 32, blocks, 2)
        self.layer3 = self._stage(32, 64, blocks, 2)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(channels_in, channels, stride, PaddedShortcut)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1, PaddedShortcut) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        logits: Tensor = self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
        return logits


class WideBlock(nn.Module):
    """BatchNorm and ReLU before each 3x3 convolution; if the channels change, the shortcut starts behind the first ReLU."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.convShortcut = None if channels_in == channels else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn1(x))
        shortcut = x if self.convShortcut is None else self.convShortcut(y)
        out: Tensor = shortcut + self.conv2(torch.relu(self.bn2(self.conv1(y))))
        return out


class WideStage(nn.Module):
    """Blocks in a row, the first of which changes channels and resolution."""

    def __init__(self, channels_in: int, channels: int, blocks: int, stride: int) -> None:
        super().__init__()
        rest = (WideBlock(channels, channels, 1) for _ in range(blocks - 1))
        self.layer = nn.Sequential(WideBlock(channels_in, channels, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer(x)
        return out


class WideResNet(nn.Module):
    """WRN-depth-width for 32-pixel images, in RobustBench's parameter names.

    Zagoruyko & Komodakis, "Wide Residual Networks", BMVC 2016. Croce et al., "RobustBench", NeurIPS Datasets and
    Benchmarks 2021, whose ``Standard`` is a WRN-28-10 and whose ``Hendrycks2020AugMix_WRN`` a WRN-40-2.

    Args:
        depth: 6 n + 4 layers.
        width: factor of the channels of a ResNet, 16, 32 and 64.
        num_classes: of the classifier ``fc``.
    """

    def __init__(self, depth: int = 28, width: int = 10, num_classes: int = 10) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth is 6 n + 4, such as 16, 28 or 40; got {depth}.")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.block1 = WideStage(16, 16 * width, blocks, 1)
        self.block2 = WideStage(16 * width, 32 * width, blocks, 2)
        self.block3 = WideStage(32 * width, 64 * width, blocks, 2)
        self.bn1 = nn.BatchNorm2d(64 * width)
        self.fc = nn.Linear(64 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        logits: Tensor = self.fc(torch.relu(self.bn1(x)).mean((2, 3)))
        return logits


class GroupedBottleneck(nn.Module):
    """1x1, grouped 3x3 and 1x1 convolution; in the middle ``groups`` groups of ``dim`` channels."""

    def __init__(self, channels_in: int, dim: int, groups: int, channels: int, stride: int) -> None:
        super().__init__()
        inner = dim * groups
        self.conv_reduce = nn.Conv2d(channels_in, inner, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(inner)
        self.conv_conv = nn.Conv2d(inner, inner, 3, stride, 1, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(inner)
        self.conv_expand = nn.Conv2d(inner, channels, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or channels_in != channels:
            convolution = nn.Conv2d(channels_in, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.bn_reduce(self.conv_reduce(x)))
        y = self.bn_expand(self.conv_expand(torch.relu(self.bn(self.conv_conv(y)))))
        return torch.relu(y + (x if self.downsample is None else self.downsample(x)))


class CifarResNeXt(nn.Module):
    """ResNeXt-29 of 4 groups of 32 channels for 32-pixel images, in RobustBench's parameter names.

    Xie et al., "Aggregated Residual Transformations for Deep Neural Networks", CVPR 2017, section 5.3; RobustBench's
    ``Hendrycks2020AugMix_ResNeXt``.

    Args:
        num_classes: of the classifier ``classifier``.
    """

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        self.stage_1 = self._stage(64, 256, 1)
        self.stage_2 = self._stage(256, 512, 2)
        self.stage_3 = self._stage(512, 1024, 2)
        self.classifier = nn.Linear(1024, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, stride: int, blocks: int = 3, groups: int = 4) -> nn.Sequential:
        dim = channels // 8  # 32 in the first stage, doubled with the channels
        first = GroupedBottleneck(channels_in, dim, groups, channels, stride)
        return nn.Sequential(first, *(GroupedBottleneck(channels, dim, groups, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn_1(self.conv_1_3x3(x)))
        logits: Tensor = self.classifier(self.stage_3(self.stage_2(self.stage_1(x))).mean((2, 3)))
        return logits


class GroupNormBlock(nn.Module):
    """GroupNorm and ReLU before each 3x3 convolution; the shortcut averages pixels and appends zero channels."""

    def __init__(self, channels_in: int, channels: int, stride: int, groups: int) -> None:
        super().__init__()
        self.stride = stride
        self.added = channels - channels_in
        self.bn1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.bn2 = nn.GroupNorm(groups, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(torch.relu(self.bn1(x)))
        y = self.conv2(torch.relu(self.bn2(y)))
        out: Tensor = y + F.pad(F.avg_pool2d(x, self.stride), (0, 0, 0, 0, 0, self.added))
        return out


class CifarResNetGN(nn.Module):
    """ResNet-26 with GroupNorm for 32-pixel images, in the parameter names of TTT's released code (also MEMO's).

    Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML 2020.

    Args:
        depth: 6 n + 2 layers.
        num_classes: of the classifier ``fc``.
        groups: of each norm layer.
    """

    def __init__(self, depth: int = 26, num_classes: int = 10, groups: int = 8) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if blocks < 1 or rest:
            raise ValueError(f"depth is 6 n + 2, such as 20, 26 or 32; got {depth}.")
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.layer1 = self._stage(16, 16, blocks, 1, groups)
        self.layer2 = self._stage(16, 32, blocks, 2, groups)
        self.layer3 = self._stage(32, 64, blocks, 2, groups)
        self.bn = nn.GroupNorm(groups, 64)
        self.fc = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(channels_in: int, channels: int, blocks: int, stride: int, groups: int) -> nn.Sequential:
        first = GroupNormBlock(channels_in, channels, stride, groups)
        return nn.Sequential(first, *(GroupNormBlock(channels, channels, 1, groups) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        logits: Tensor = self.fc(torch.relu(self.bn(x)).mean((2, 3)))
        return logits
