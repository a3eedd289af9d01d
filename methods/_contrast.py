"""Contrast with the source's class prototypes, which keeps target features where the source classifier expects them."""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, taps
from tta.adapter import OptimizerConfig, require
from tta.functional import matmul
from tta.source import Known, Need


@dataclass
class ContrastConfig(OptimizerConfig):
    """Hyper-parameters of self-training together with a contrast with source prototypes.

    Attributes:
        lambda_ce_trg: weight of the self-training.
        lambda_cont: weight of the contrast; 0 needs no source.
        temperature: of the contrast.
        projection_dim: width of the projector's hidden layer and output.
        projector: from Python, the initial module that maps features to the space of the contrast; None draws one.
        augment: the views: ``"paper"`` (RGB images in [0, 1]), ``"none"`` (the images themselves once more), or from
            Python a callable that maps a batch to a view of it.
        source_labels: the source images come with their labels, as in the papers; else the source model's predictions
            are used.
        source_batch_size: source images per batch; BatchNorm layers normalise by it.
    """

    lambda_ce_trg: float = 1.0
    lambda_cont: float = 1.0
    temperature: float = 0.1
    projection_dim: int = 128
    projector: Any = None
    augment: Any = "paper"
    source_labels: bool = False
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lambda_ce_trg", "lambda_cont"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "a weight of 0 or more")
        require(self.temperature > 0, f"temperature={self.temperature}", "a temperature above 0")
        require(self.projection_dim >= 1, f"projection_dim={self.projection_dim}", "1 or more")
        augment.check(self.augment)
        module = self.projector is None or isinstance(self.projector, nn.Module)
        require(module, f"projector={self.projector!r}", "a torch.nn.Module, or None")
        require(self.source_batch_size >= 1, f"source_batch_size={self.source_batch_size}", "1 image or more")


def prototypes_need(model: nn.Module, config: ContrastConfig) -> list[Need]:
    """Source statistics of the contrast: mean features of the classes, with BatchNorm layers as they adapt."""
    if not config.lambda_cont:
        return []
    return [
        Need(
            "class_moments",
            (taps.head(model),),
            "batch",
            batch_size=config.source_batch_size,
            labels=config.source_labels,
        )
    ]


def new_projector(width: int, dim: int, generator: torch.Generator) -> nn.Module:
    """Two linear layers with a ReLU between, (batch, width) -> (batch, dim), drawn as ``nn.Linear`` draws its weights."""
    layers = [nn.utils.skip_init(nn.Linear, before, dim) for before in (width, dim)]  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for layer in layers:
            bound = layer.in_features**-0.5
            for parameter in layer.parameters():
                parameter.uniform_(-bound, bound, generator=generator)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1])


class PrototypeContrast(nn.Module):
    """Contrastive loss that pulls together the features of an image, of a view of it, and its nearest source prototype.

    Döbler et al., "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023.

    The projector, which maps features to the space of the contrast, adapts too.

    Args:
        known: result of :meth:`tta.SourceStatistics.get` for :func:`prototypes_need`.
        config: see :class:`ContrastConfig`.
        generator: on the CPU; a new projector is drawn from it.
    """

    prototypes: Tensor  # (classes, width)
    absent: Tensor  # (classes,), boolean: the source had no image of this class

    def __init__(self, known: Known, config: ContrastConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.register_buffer("prototypes", known["mean"])
        self.register_buffer("absent", known["prior"] == 0)
        width, device = known["mean"].shape[1], known["mean"].device
        given = config.projector
        new = new_projector(width, config.projection_dim, generator) if given is None else copy.deepcopy(given)
        self.projector = new.requires_grad_(True).to(device)

    def forward(self, features: Tensor, view_features: Tensor) -> Tensor:
        """The loss, a scalar.

        Args:
            features: of the images, (batch, width).
            view_features: of views of them, likewise.
        """
        with torch.no_grad():
            similarity = matmul(F.normalize(features.float()), F.normalize(self.prototypes).T)
            nearest = self.prototypes[similarity.masked_fill(self.absent, -torch.inf).argmax(1)]
        views = torch.stack([self.projector(part) for part in (nearest, features, view_features)])
        return contrastive(views, self.temperature)


def contrastive(views: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross-entropy: views of one item attract each other, and repel those of all others.

    Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, with each item as a class of its own.

    Args:
        views: (views, items, width), two views or more; normalised here.
        temperature: above 0.

    Returns:
        A scalar, the mean over every view as the anchor and every other view of the same item.
    """
    number, items = views.shape[:2]
    vectors = F.normalize(views.float(), dim=2).flatten(0, 1)
    similarity = matmul(vectors, vectors.T) / temperature
    itself = torch.eye(len(vectors), dtype=torch.bool, device=views.device)
    same = torch.eye(items, dtype=torch.bool, device=views.device).repeat(number, number) & ~itself
    log_share = similarity.masked_fill(itself, -torch.inf).log_softmax(1)
    return -torch.where(same, log_share, 0).sum() / (number * items * (number - 1))
