"""Networks that no library ships: the embedded digit classifiers and the ResNets of the CIFAR benchmarks."""

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
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


def digits_vit(num_classes: int = 10) -> nn.Module:
    """A timm ViT for 32-pixel images: patch 8, width 64, 4 blocks, 4 heads, 215 000 parameters."""
    return VisionTransformer(img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=4, num_classes=num_classes)


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
        return self.linear(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))
