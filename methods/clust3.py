"""ClusT3: test-time training by clusters that are informative about features."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import norms, taps
from tta.adapter import require
from tta.auxiliary import linear
from tta.functional import logits_of
from tta.methods._source_stage import SourceStage, SourceStageConfig


@dataclass
class ClusT3Config(SourceStageConfig):
    """The defaults are the released code's for CIFAR-10: Adam 1e-5, 15 projectors of 10 clusters on each of two stages.

    Attributes:
        clusters: of each projector.
        projectors: on each stage, with weights of their own.
        layers: names of the modules whose outputs are clustered; left out, the first two stages of the network.
        steps: optimizer steps a batch. The paper reports the best of 1 to 100 by the test labels; 20 is fixed here.
        weight: of the clusters' loss beside the classification, in the source stage.
        layout: ``"channels"`` makes clusters of a location's channels, as the paper has it; ``"released"`` as the code does, which reads
            (images, clusters, height, width) as (clusters, all else) and so mixes clusters with images.
    """

    lr: float = 1e-5
    steps: int = 20
    clusters: int = 10
    projectors: int = 15
    layers: tuple[str, ...] | None = None
    weight: float = 1.0
    layout: Literal["channels", "released"] = "channels"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.clusters >= 2, f"clusters={self.clusters}", "2 or more")
        require(self.projectors >= 1, f"projectors={self.projectors}", "1 or more")
        require(self.weight >= 0, f"weight={self.weight}", "0 or more")
        require(self.layout in ("channels", "released"), f"layout={self.layout!r}", "'channels' or 'released'")
        require(self.layers is None or len(self.layers) > 0, f"layers={self.layers}", "one name or more")


class Projectors(nn.Module):
    """Linear maps of a network's stages to clusters, several on each.

    Args:
        network: the classifier.
        layers: names of the stages.
        maps: for each stage its projectors: (batch, channels, ...) -> (batch, clusters, ...).
    """

    def __init__(self, network: nn.Module, layers: Sequence[str], maps: nn.ModuleList) -> None:
        super().__init__()
        self.network, self.layers, self.maps = network, tuple(layers), maps

    def forward(self, x: Tensor) -> list[Tensor]:
        """Logits of clusters, each (batch, clusters, ...): of every projector of every stage, in order."""
        return self.look(x)[1]

    def look(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Logits of classes and of clusters, of one forward."""
        with taps.activations(self.network, self.layers) as seen:
            logits = logits_of(self.network(x))
        maps: Any = self.maps
        pairs = zip(self.layers, maps, strict=True)
        return logits, [projector(as_maps(seen[name])) for name, own in pairs for projector in own]


class ClusT3(SourceStage):
    """For each batch, make the clusters of the lower stages' features sure and balanced; predict it; go back to the source.

    Vargas Hakim et al., "ClusT3: Information Invariant Test-Time Training", ICCV 2023.

    The source stage (``tta train clust3``) trains linear projectors of feature maps to clusters beside the classifier, by the
    mutual information of location and cluster. At test time the layers up to the last clustered stage adapt by the same
    loss, with the projectors fixed. Every batch starts from the source weights. BatchNorm layers normalise by the batch
    while learning, and their stored statistics move; scored is a forward with these after the last step. ``auxiliary=`` is
    the file of the training, or a ``ModuleList`` with a ``ModuleList`` of projectors for each stage; with neither, the
    projectors are trained on ``source=`` images behind a frozen classifier, which is weaker.
    """

    needs = "one class an image"
    config: ClusT3Config
    scored_forward = "after"
    made_by = ("clusters", "projectors", "layers", "layout", "weight")

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: ClusT3Config, generator: torch.Generator) -> nn.Module:
        layers = layers_of(model, config.layers)
        maps = nn.ModuleList()
        for width in widths(model, layers):
            own = (linear(width, config.clusters, generator) for _ in range(config.projectors))
            maps.append(nn.ModuleList(pointwise(layer) for layer in own))
        return Projectors(model, layers, maps.to(next(model.parameters())))

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: ClusT3Config) -> nn.Module:
        layers = layers_of(model, config.layers)
        fits = isinstance(module, nn.ModuleList) and len(module) == len(layers)
        require(
            fits,
            f"auxiliary={type(module).__name__}",
            f"a ModuleList of {len(layers)}, one ModuleList of projectors a stage",
        )
        return Projectors(model, layers, module)  # type: ignore[arg-type]

    @classmethod
    def auxiliary_loss(
        cls, part: nn.Module, images: Tensor, config: ClusT3Config, generator: torch.Generator
    ) -> Tensor:
        return config.weight * clustered(part(images), config)

    @classmethod
    def source_losses(
        cls, model: nn.Module, part: Any, images: Tensor, labels: Tensor, config: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Classification and clusters, of one forward."""
        logits, found = part.look(images)
        return {
            "classification": F.cross_entropy(logits, labels),
            "clusters": config.weight * clustered(found, config),
        }

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self.auxiliary: nn.Module = self.take_auxiliary()
        begun, _ = taps.reached(self.model, layers_of(self.model, self.config.layers))
        for module in begun:
            for parameter in module.parameters(recurse=False):
                parameter.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            with norms.training_statistics(self.model, when=self.input_finite):
                found = self.auxiliary(x)
            self.update(clustered(found, self.config))
        with torch.no_grad():
            logits = self.predict(x)
        self.back_to_source()
        return logits


def clustered(found: Sequence[Tensor], config: ClusT3Config) -> Tensor:
    """The sum of :func:`information` over the projectors."""
    return torch.stack([information(arranged(z.float(), config.layout)) for z in found]).sum()


def information(z: Tensor) -> Tensor:
    """Mean entropy of the clusters at a location, and how far their mean logits are from balance; to be minimised.

    The balance weighs 1 / clusters, as released.

    Args:
        z: logits (locations, clusters).
    """
    logs = z.log_softmax(1)
    entropy = -(logs.exp() * logs).sum(1).mean()
    clusters = z.shape[1]
    balanced = torch.full_like(z[0], 1 / clusters)
    return entropy + F.kl_div(z.mean(0).log_softmax(0), balanced, reduction="sum") / clusters


def arranged(z: Tensor, layout: str) -> Tensor:
    """Logits (batch, clusters, ...) as (locations, clusters), see :class:`ClusT3Config`."""
    clusters = z.shape[1]
    if layout == "released":
        return z.reshape(clusters, -1).T
    return z.flatten(2).transpose(1, 2).reshape(-1, clusters)


def as_maps(features: Tensor) -> Tensor:
    """Features of a layer as (batch, channels, rows, columns): tokens (batch, tokens, channels) as a column, vectors as one place."""
    if features.dim() == 3:
        return features.transpose(1, 2).unsqueeze(3)
    return features if features.dim() == 4 else features[:, :, None, None]


def pointwise(layer: nn.Linear) -> nn.Conv2d:
    """A 1 by 1 convolution with the weights of a linear layer."""
    made = nn.Conv2d(layer.in_features, layer.out_features, 1, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        made.weight.copy_(layer.weight[:, :, None, None])
        assert made.bias is not None
        made.bias.copy_(layer.bias)
    return made


def layers_of(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Full names of the stages that are clustered, see :class:`ClusT3Config`."""
    if names is None:
        return taps.parts(model)[:2]
    return [taps.full_name(model, name) for name in names]


def widths(model: nn.Module, layers: Sequence[str]) -> list[int]:
    """Number of channels that each of some layers puts out."""

    def channels(x: Tensor) -> list[int]:
        with torch.no_grad(), taps.activations(model, layers, lambda features: as_maps(features).shape[1]) as seen:
            model(x)
        return [int(seen[name]) for name in layers]

    return taps.probe(model, channels)
