"""TTT: test-time training by a rotation task."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import augment, norms, taps
from tta.adapter import require
from tta.auxiliary import Behind, Branch, own_parameters
from tta.functional import logits_of
from tta.methods._source_stage import SourceStage, SourceStageConfig

TURNS = 4  # quarter turns, counter-clockwise: the classes of the rotation task


@dataclass
class TTTConfig(SourceStageConfig):
    """The defaults are the paper's online variant for CIFAR-10: SGD 1e-3 without momentum, one step an image.

    Attributes:
        mode: ``"online"`` keeps the weights from image to image; ``"standard"`` starts every image from the source weights,
            for which the paper takes ``steps=10``.
        copies: augmented copies of an image, of which each is turned by 0 to 3 quarter turns.
        augment: ``"paper"`` (a crop from the image with an eighth of zeros around it, half of them mirrored), ``"crop"`` (the
            crop alone, for images that a mirror makes others of, such as digits), ``"none"``, or from Python a callable on a
            batch. The source stage uses the same.
        threshold: an image is learned from only if the rotation head gives its upright copy a smaller probability of being
            upright; at 1 every image is.
        split: name of the last module that both heads share; left out, the last but one stage of the network.
        statistics: BatchNorm layers normalise the copies by the ``"source"``'s statistics, or by the copies' own, which the
            stored ones follow: ``"train"``, as the released code does where it is not told otherwise. Layers such as
            GroupNorm, with which the paper's networks are built, have no such statistics.
        train_head: whether the rotation head adapts too.
        rotations: in the source stage, ``"all"`` four of each image, or one drawn at ``"random"``.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 1e-3
    momentum: float = 0.0
    mode: Literal["online", "standard"] = "online"
    copies: int = 32
    augment: Any = "paper"
    threshold: float = 1.0
    split: str | None = None
    statistics: Literal["source", "train"] = "source"
    train_head: bool = True
    rotations: Literal["all", "random"] = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode in ("online", "standard"), f"mode={self.mode!r}", "'online' or 'standard'")
        require(self.copies >= 1, f"copies={self.copies}", "1 or more")
        known = callable(self.augment) or self.augment in ("paper", "crop", "none")
        require(known, f"augment={self.augment!r}", "'paper', 'crop', 'none' or a callable")
        require(0 < self.threshold <= 1, f"threshold={self.threshold}", "a probability above 0, 1 for every image")
        require(self.statistics in ("source", "train"), f"statistics={self.statistics!r}", "'source' or 'train'")
        require(self.rotations in ("all", "random"), f"rotations={self.rotations!r}", "'all' or 'random'")


class TTT(SourceStage):
    """For each image, learn to tell how its copies were turned, with the layers that the classifier shares; then predict it.

    Sun et al., "Test-Time Training with Self-Supervision for Generalization under Distribution Shifts", ICML 2020.

    The network has two heads behind shared layers: one of classes, one of four rotations, a copy of the layers behind
    ``split``. The source stage (``tta train ttt``) trains them together; at test time the shared layers and the rotation
    head adapt, image by image. Scored is the plain image after the step. ``auxiliary=`` is the file of that training, or a
    module that maps what ``split`` puts out to four logits; with neither, a head is trained on ``source=`` images behind a
    frozen classifier, which is weaker than the paper's joint training. Images must be square. Where turned objects look
    like others upright (6 and 9), the task misleads.
    """

    needs = "one class an image"
    config: TTTConfig
    scored_forward = "after"
    made_by = ("split", "augment", "rotations")

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: TTTConfig, generator: torch.Generator) -> nn.Module:
        return Branch(model, split_of(model, config.split), TURNS, generator)

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: TTTConfig) -> nn.Module:
        return Behind(model, split_of(model, config.split), module)

    @classmethod
    def auxiliary_loss(cls, part: nn.Module, images: Tensor, config: TTTConfig, generator: torch.Generator) -> Tensor:
        return cls._task(part, views(images, config.augment, generator), config, generator)

    @classmethod
    def source_losses(
        cls, model: nn.Module, part: nn.Module, images: Tensor, labels: Tensor, config: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Classification and the rotation task, on the same augmented images."""
        rotation = cls._task(part, images, config, generator)
        return {"classification": F.cross_entropy(logits_of(model(images)), labels), "rotation": rotation}

    @staticmethod
    def _task(part: nn.Module, x: Tensor, config: TTTConfig, generator: torch.Generator) -> Tensor:
        if config.rotations == "all":
            turns = torch.arange(TURNS, device=x.device).repeat_interleave(len(x))
            x = x.repeat(TURNS, 1, 1, 1)
        else:
            turns = torch.randint(TURNS, (len(x),), generator=generator).to(x.device)
        return F.cross_entropy(part(turned(x, turns)), turns)

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self.auxiliary = self.take_auxiliary()
        for name in taps.parameters_before(self.model, split_of(self.model, self.config.split)):
            self.model.get_parameter(name).requires_grad_(True)
        for parameter in own_parameters(self.auxiliary, self.model):
            parameter.requires_grad_(self.config.train_head)

    def adapt(self, x: Tensor) -> Tensor:
        return torch.cat([self._adapt_to(image) for image in torch.split(x, 1)])

    def _adapt_to(self, image: Tensor) -> Tensor:
        chosen = self._gate(image)
        for _ in range(self.config.steps):
            turns = self._turns(self.config.copies).to(image.device)
            copies = views(image.expand(self.config.copies, -1, -1, -1), self.config.augment, self.generator)
            self.update(self._rotation_loss(turned(copies, turns), turns, chosen), when=chosen)
        with torch.no_grad():
            logits = self.predict(image)
        if self.config.mode == "standard":
            self.back_to_source()
        return logits

    def _rotation_loss(self, copies: Tensor, turns: Tensor, chosen: Tensor) -> Tensor:
        if self.config.statistics == "source":
            return F.cross_entropy(self.auxiliary(copies).float(), turns)
        with norms.training_statistics(self.auxiliary, when=chosen & self.input_finite):
            return F.cross_entropy(self.auxiliary(copies).float(), turns)

    def _gate(self, image: Tensor) -> Tensor:
        """Whether to learn from an image: its upright copy does not look upright enough. A boolean scalar."""
        if self.config.threshold >= 1:
            return torch.ones((), dtype=torch.bool, device=image.device)
        with torch.no_grad():
            upright: Tensor = self.auxiliary(image).float().softmax(1)[0, 0]
            return upright < self.config.threshold

    def _turns(self, copies: int) -> Tensor:
        return torch.randint(TURNS, (copies,), generator=self.generator)


def split_of(model: nn.Module, name: str | None) -> str:
    """Full name of the module after which the two heads part, see :class:`TTTConfig`."""
    if name is not None:
        return taps.full_name(model, name)
    stages = taps.parts(model)
    return stages[-2] if len(stages) > 1 else stages[-1]


def turned(images: Tensor, turns: Tensor) -> Tensor:
    """Square images, each turned counter-clockwise by its number of quarter turns, (batch,)."""
    require(
        images.shape[2] == images.shape[3], f"images of {images.shape[2]} x {images.shape[3]} pixels", "square ones"
    )
    every = torch.stack([torch.rot90(images, turn, (2, 3)) for turn in range(TURNS)])
    return every[turns, torch.arange(len(images), device=images.device)]


def views(images: Tensor, choice: Any, generator: torch.Generator) -> Tensor:
    """An augmented copy of each image, see :class:`TTTConfig`."""
    if callable(choice):
        made: Tensor = choice(images)
        return made
    return augment.training_view(images, choice, generator)
