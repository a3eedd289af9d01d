"""A network with its input normalisation: images in [0, 1] go in, mean and standard deviation are applied once."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from tta.auxiliary_file import Saved
from tta.towers import TwoTowers

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5)
NO_MEAN, NO_STD = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)  # of networks that take images in [0, 1] as they are


class ImageClassifier(nn.Module):
    """A network with its input normalisation: images (batch, 3, height, width) in [0, 1] -> logits (batch, classes).

    Args:
        model: the network on normalised images.
        mean: per channel, of images in [0, 1].
        std: per channel.
        spec: argument of :func:`tta.load_model`, for the manifest.
        input_size: height and width the network was trained on, if known.
        interpolation: how images were resized for the published numbers (``"bilinear"``, ``"bicubic"``), if known.
        resize: pixels of the shorter side after that, if known.
        crop: ``"center"`` if ``input_size`` was then cut out of the middle, ``"squash"`` if both sides were resized to it.
        clean_error: published error, %, on clean test images of the data set that the weights were trained on.

    Attributes:
        preprocessing: all of the above that concerns the input, as plain values, for the manifest.
        auxiliary: what a method's source stage trained beside the weights, where their file holds it; else None.
        class_names: names of the classes, in the order of the logits, where the weights say them; else None.
    """

    mean: Tensor
    std: Tensor
    selection: Tensor | None

    def __init__(
        self,
        model: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        spec: str,
        input_size: Sequence[int] | None,
        *,
        interpolation: str | None = None,
        resize: int | None = None,
        crop: str | None = None,
        clean_error: float | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.spec = spec
        self.clean_error = clean_error
        self.class_names: list[str] | None = None
        self.auxiliary: Saved | None = None
        self.preprocessing: dict[str, Any] = {
            "input_size": None if input_size is None else list(input_size),
            "interpolation": interpolation,
            "resize": resize,
            "crop": crop,
        }
        self.register_buffer("selection", None)
        self.normalise_by(mean, std)

    def normalise_by(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Use this mean and standard deviation, three numbers each, and record them.

        Raises:
            ValueError: not three finite numbers, or a standard deviation that is not above 0.
        """
        if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, (*mean, *std))) or min(std) <= 0:
            raise ValueError(
                f"mean and std are three numbers each, for images in [0, 1], std above 0; got mean={list(mean)}, "
                f"std={list(std)}."
            )
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))
        self.preprocessing |= {"mean": list(mean), "std": list(std)}

    def select_logits(self, logits: Sequence[int], of: int | None = None) -> "ImageClassifier":
        """From now on return only these of the network's logits, in this order; adaptation sees no others.

        ImageNet-A and ImageNet-R are scored in this way (Hendrycks et al., CVPR and ICCV 2021). The selection is part of
        the model's fingerprint.

        Args:
            logits: their indices, as in :attr:`tta.datasets.stream.Stream.classes`.
            of: number of logits that the network must have, if the indices mean nothing for another number.

        Raises:
            ValueError: fewer than two indices, or one that is repeated or below 0. A network that lacks some of the
                logits is refused when it is called.
        """
        if len(set(logits)) < max(2, len(logits)) or min(logits) < 0:
            raise ValueError(f"logits are two or more different outputs of the network, 0 or more; got {list(logits)}.")
        if isinstance(self.model, TwoTowers):
            return self._select_names(logits, of)
        self.register_buffer("selection", torch.tensor(logits))
        self._outputs = (max(logits) + 1, math.inf) if of is None else (of, of)
        if self.class_names is not None and max(logits) < len(self.class_names):
            self.class_names = [self.class_names[logit] for logit in logits]
        return self

    def _select_names(self, chosen: Sequence[int], of: int | None) -> "ImageClassifier":
        """Keep the names of these classes alone, which methods read and not only logits."""
        assert isinstance(self.model, TwoTowers)
        classes = len(self.model.class_names)
        if (of is not None and classes != of) or max(chosen) >= classes:
            wanted = f"{of}" if of is not None else f"{max(chosen) + 1} or more"
            raise ValueError(f"Selected are classes of a model with {wanted}; '{self.spec}' has {classes}.")
        return self.named(self.model.select_classes(chosen).class_names)

    def named(self, names: Sequence[str] | None) -> "ImageClassifier":
        """Record the names of the classes, if there are some."""
        self.class_names = None if names is None else list(names)
        return self

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.mean) / self.std)
        if self.selection is None:
            return logits
        fewest, most = self._outputs
        if not fewest <= logits.shape[1] <= most:
            wanted = f"{fewest}" if fewest == most else f"{fewest} or more"
            raise ValueError(f"Selected are outputs of a network with {wanted}; '{self.spec}' has {logits.shape[1]}.")
        return logits[:, self.selection]
