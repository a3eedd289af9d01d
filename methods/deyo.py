"""DeYO: destroy your object."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy, masked_mean, reliable
from tta.methods._kept import WORTHWHILE, alone


@dataclass
class DeYOConfig(OptimizerConfig):
    """Adam 1e-3 and a threshold of 0.2 are what a later benchmark uses on CIFAR; the paper has ImageNet only.

    Attributes:
        margin: samples of a higher entropy (nats) teach nothing; None for the paper's 0.5 ln(classes).
        margin_e0: entropy at which the entropy's part of a weight is one; None for the paper's 0.4 ln(classes).
        plpd_threshold: a sample teaches if the destruction lowers the predicted class's probability by more than this.
        reweight_ent: let surer samples weigh more.
        reweight_plpd: let samples that lose more probability weigh more. Without either, all weigh the same.
        augment: how objects are destroyed: ``"patch"`` (shuffled patches), ``"pixel"`` (shuffled pixels, the same way in
            each image), ``"occ"`` (the middle covered by the mean colour), or from Python a callable on a batch.
        patch_len: patches along a side.
        exclude: parts of the names of modules that are not adapted; None for the last quarter of the blocks and the
            final norm, as published for a ResNet-50 and a ViT-B: see :func:`tta.norms.top`.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    margin: float | None = None
    margin_e0: float | None = None
    plpd_threshold: float = 0.2
    reweight_ent: bool = True
    reweight_plpd: bool = True
    augment: Any = "patch"
    patch_len: int = 4
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        known = callable(self.augment) or self.augment in DESTRUCTIONS
        require(known, f"augment={self.augment!r}", f"one of {', '.join(DESTRUCTIONS)}, or a callable")
        require(self.patch_len >= 1, f"patch_len={self.patch_len}", "1 patch or more along a side")


class DeYO(Adapter):
    """Entropy minimisation on samples whose prediction is sure and depends on the shape of the object.

    Lee et al., "Entropy is not Enough for Test-Time Adaptation: From the Perspective of Disentangled Factors", ICLR 2024.

    The shape is tested by destroying the object: the pseudo-label's probability must fall (the pseudo-label
    probability difference, PLPD). The affine parameters of the normalisation layers adapt; BatchNorm layers normalise by
    the batch, destroyed images by those that are sure. A batch that teaches nothing makes no step. Scored are the logits
    before the step.
    """

    needs = "one class an image, which stays when parts of the image are moved"
    config: DeYOConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
        for layer in norms.layers_outside(self.model, self.config.exclude):
            layer.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        config = self.config
        for _ in range(config.steps):
            logits = self.predict(x)
            entropies, classes = entropy(logits), logits.shape[1]
            margin = 0.5 * math.log(classes) if config.margin is None else config.margin
            # Destroyed images are normalised among themselves: their number has to be waited for on a GPU.
            sure = reliable(entropies, margin).nonzero()[:, 0]
            if not len(sure):
                self.nothing_to_learn()
                continue
            entropies = entropies[sure]
            with torch.no_grad():
                plpd = self._loss_of_confidence(x[sure], logits[sure].softmax(1))
                e0 = 0.4 * math.log(classes) if config.margin_e0 is None else config.margin_e0
                chosen = plpd > config.plpd_threshold
                weights = config.reweight_ent * (e0 - entropies).exp() + config.reweight_plpd * plpd.exp()
            teaching = sure.new_zeros(len(x), dtype=torch.bool).index_fill(0, sure[chosen], True)
            if (kept := alone(self.model, x, teaching, WORTHWHILE)) is not None:  # the backward pass is of these alone
                entropies, weights, chosen = entropy(self.predict(x[kept])), weights[chosen], chosen[chosen]
            if config.reweight_ent or config.reweight_plpd:
                entropies = weights * entropies
            self.update(masked_mean(entropies, chosen), when=chosen.any())
        return logits

    def _loss_of_confidence(self, x: Tensor, before: Tensor) -> Tensor:
        """Drop of the predicted class's probability when the object is destroyed, (batch,)."""
        choice = self.config.augment
        destroyed = choice(x) if callable(choice) else DESTRUCTIONS[choice](x, self.config.patch_len, self.generator)
        label = before.argmax(1, keepdim=True)
        return (before - self.predict(destroyed).softmax(1)).gather(1, label)[:, 0]


def shuffle_patches(x: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Cut each image into ``patches`` by ``patches`` pieces and put them back in an order of its own.

    Sides that ``patches`` does not divide are made smaller before and larger afterwards.
    """
    images, channels, *size = x.shape
    height, width = (side // patches for side in size)
    x = _resized(x, [height * patches, width * patches])
    order = torch.rand(images, patches**2, generator=generator).argsort(1).to(x.device)
    x = x.reshape(images, channels, patches, height, patches, width).permute(0, 2, 4, 1, 3, 5)
    x = x.reshape(images, patches**2, channels, height, width)[torch.arange(images, device=x.device)[:, None], order]
    x = x.reshape(images, patches, patches, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    return _resized(x.reshape(images, channels, height * patches, width * patches), size)


def shuffle_pixels(x: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Put the pixels of all images in one random order."""
    order = torch.randperm(x[0, 0].numel(), generator=generator).to(x.device)
    return x.flatten(2)[..., order].view_as(x)


def cover_middle(x: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Cover the middle, half as high and half as wide as the image, by the image's mean colour."""
    height, width = x.shape[2:]
    covered = x.clone()
    covered[..., height // 4 : height // 4 + height // 2, width // 4 : width // 4 + width // 2] = x.mean((2, 3), True)
    return covered


def _resized(x: Tensor, size: list[int]) -> Tensor:
    if list(x.shape[2:]) == size:
        return x
    return F.interpolate(x, size, mode="bilinear", antialias=True)


DESTRUCTIONS: Mapping[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "patch": shuffle_patches,
    "pixel": shuffle_pixels,
    "occ": cover_middle,
}
