"""CTA, reconstructed: cross-task alignment of a supervised and a self-supervised encoder."""

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, norms, taps
from tta.adapter import require
from tta.auxiliary import linear, seeded
from tta.methods._source_stage import SourceStage, SourceStageConfig


@dataclass
class CTAConfig(SourceStageConfig):
    """Reconstructed: neither code nor numbers were to be had. All values are ours, after methods of the same authors.

    Attributes:
        steps: optimizer steps a batch.
        mode: ``"episodic"`` starts every batch from the source weights, ``"online"`` keeps them.
        augment: the two views of an image: ``"paper"`` (a padded crop, colours, blur, mirrored; RGB images), ``"crop"`` (the crop alone), or from
            Python a callable on a batch.
        temperature: of the similarities between views.
        align_temperature: of those between the two encoders.
        contrast: weight of the self-supervised loss beside the alignment, in the source stage.
        width: of the vectors in which views are compared.
        start: the self-supervised encoder begins as a copy of the ``"source"`` model's, or at ``"random"``, as encoders that are trained
            independently do; the second needs a long source stage.
    """

    lr: float = 1e-4
    steps: int = 5
    mode: Literal["episodic", "online"] = "episodic"
    augment: Any = "paper"
    temperature: float = 0.5
    align_temperature: float = 0.1
    contrast: float = 1.0
    width: int = 128
    start: Literal["source", "random"] = "source"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode in ("episodic", "online"), f"mode={self.mode!r}", "'episodic' or 'online'")
        known = callable(self.augment) or self.augment in ("paper", "crop")
        require(known, f"augment={self.augment!r}", "'paper', 'crop' or a callable")
        for name in ("temperature", "align_temperature"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)}", "above 0")
        require(self.contrast >= 0, f"contrast={self.contrast}", "0 or more")
        require(self.width >= 1, f"width={self.width}", "1 or more")
        require(self.start in ("source", "random"), f"start={self.start!r}", "'source' or 'random'")


class Twin(nn.Module):
    """A second encoder with the classifier's own head, and the projector in whose space views are compared.

    Args:
        source: the classifier.
        network: of the same head: images -> logits.
        projector: features (batch, width) -> (batch, width of the comparison).
    """

    def __init__(self, source: nn.Module, network: nn.Module, projector: nn.Module) -> None:
        super().__init__()
        self.source, self.network, self.projector = source, network, projector
        self.source_head, self.head = taps.head(source), taps.head(network)  # found once: each search copies the model

    def features(self, x: Tensor) -> Tensor:
        """Features of the second encoder, (batch, width)."""
        return taps.look(self.network, self.head, x)[0]

    @torch.no_grad()
    def source_features(self, x: Tensor) -> Tensor:
        """Features of the classifier, (batch, width), as constants."""
        return taps.look(self.source, self.source_head, x)[0]


class CTA(SourceStage):
    """Reconstructed: adapt an encoder, aligned with the classifier's features, so that views of an image agree; then classify by it.

    Barbeau et al., "CTA: Cross-Task Alignment for Better Test Time Training", arXiv 2507.05221, 2025.

    No code is published, and the steps are ours, from the paper's abstract: nothing here may be compared with its numbers. The
    source stage (``tta train cta``) trains a second encoder beside the classifier: for each image its features are to be those
    of the classifier and of no other image's, and two views are to be alike. At test time the views' loss adapts that
    encoder, batch by batch, with the projector and the classifier's head fixed; scored is the head on its features after the last step, with
    the stored BatchNorm statistics, which move meanwhile. A batch of one image has no other to differ from and teaches nothing.
    ``auxiliary=`` is the file of the training, or a network with the same head whose features are aligned; with neither the
    encoder is trained on ``source=`` images.
    """

    needs = "one class and one feature vector an image"
    config: CTAConfig
    scored_forward = "after"
    made_by = ("augment", "temperature", "align_temperature", "contrast", "width", "start")

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: CTAConfig, generator: torch.Generator) -> nn.Module:
        head: Any = model.get_submodule(taps.head(model))
        network = copy.deepcopy(model, {id(head): head})
        if config.start == "random":
            restart(network, head, generator)
        layers = (
            linear(head.in_features, config.width, generator),
            nn.ReLU(),
            linear(config.width, config.width, generator),
        )
        return Twin(model, network, nn.Sequential(*layers).to(head.weight.device))  # features are float32

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: CTAConfig) -> nn.Module:
        return Twin(model, module, nn.Identity())

    @classmethod
    def auxiliary_loss(cls, part: Any, images: Tensor, config: CTAConfig, generator: torch.Generator) -> Tensor:
        aligned = alignment(part.features(images), part.source_features(images), config.align_temperature)
        return aligned + config.contrast * agreement(part, images, config, generator)

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        twin: Any = self.take_auxiliary()
        self.auxiliary = twin
        twin.network.requires_grad_(True)
        twin.network.get_submodule(twin.head).requires_grad_(False)

    def _network(self) -> nn.Module:
        twin: Any = self.auxiliary
        network: nn.Module = twin.network
        return network

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the classifier's head on the features of the second encoder."""
        return self.outputs.of(self._network()(x))

    def predicting_model(self) -> nn.Module:
        return self._network()

    def adapt(self, x: Tensor) -> Tensor:
        if len(x) < 2:
            self.nothing_to_learn()
        for _ in range(self.config.steps if len(x) > 1 else 0):
            with norms.training_statistics(self._network(), when=self.input_finite):
                loss = agreement(self.auxiliary, x, self.config, self.generator)
            self.update(loss)
        with torch.no_grad():
            logits = self.predict(x)
        if self.config.mode == "episodic":
            self.back_to_source()
        return logits


def agreement(part: Any, images: Tensor, config: CTAConfig, generator: torch.Generator) -> Tensor:
    """Contrastive loss (NT-Xent) of two views of each image against those of the others, a scalar.

    Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020.
    """
    views = torch.cat([view(images, config.augment, generator) for _ in range(2)])
    z = F.normalize(part.projector(part.features(views)), dim=1)
    similar = z @ z.T / config.temperature
    similar.fill_diagonal_(-torch.inf)  # a view is not compared with itself
    partner = torch.arange(len(z), device=z.device).roll(len(images))
    return F.cross_entropy(similar, partner)


def alignment(ours: Tensor, theirs: Tensor, temperature: float) -> Tensor:
    """Contrastive loss of the features of two encoders (batch, width), in both directions, plus the error of their lengths; a scalar.

    Without the length the classifier's head, which has a bias, would see features of another scale.
    """
    similar = F.normalize(ours, dim=1) @ F.normalize(theirs, dim=1).T / temperature
    images = torch.arange(len(ours), device=ours.device)
    both = (F.cross_entropy(similar, images) + F.cross_entropy(similar.T, images)) / 2
    lengths = ours.norm(dim=1) / theirs.norm(dim=1).clamp_min(1e-6)
    found: Tensor = both + (lengths - 1).square().mean()
    return found


def view(images: Tensor, choice: Any, generator: torch.Generator) -> Tensor:
    """A random view of each image, see :class:`CTAConfig`."""
    if callable(choice):
        made: Tensor = choice(images)
        return made
    made = augment.cropped(images, generator)
    return augment.moco_view(made, generator) if choice == "paper" else made


def restart(network: nn.Module, head: nn.Module, generator: torch.Generator) -> None:
    """Give all layers but the head new weights, as torch draws them, from a seed that the generator gives."""
    with seeded(generator):
        for module in network.modules():
            if module is not head and callable(getattr(module, "reset_parameters", None)):
                fresh: Any = copy.deepcopy(module).cpu()
                fresh.reset_parameters()
                module.load_state_dict(fresh.state_dict())
