"""TTT-MAE: test-time training by masked reconstruction, image by image or over the last frames of a video."""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import taps
from tta.adapter import require
from tta.auxiliary import Behind, own_parameters, seeded
from tta.memory import LabelledQueue
from tta.methods._source_stage import SourceStage, SourceStageConfig

CELLS = 14  # patches along the shorter side, where nothing else is asked for: those of 16 pixels in an image of 224


@dataclass
class TTTMAEConfig(SourceStageConfig):
    """The defaults are those of the released code for video: AdamW 1e-4, a tenth of it for the encoder, one step a frame.

    Attributes:
        mode: ``"online"`` keeps the weights from frame to frame, until a reset at a cut; ``"standard"`` starts every image from the
            source weights and looks at it alone, for which the paper of images takes ``steps=20``.
        window: last frames, the present one among them, that a step's copies are drawn from.
        copies: masked copies in a step.
        mask_ratio: share of the patches of a copy that are masked.
        patch: side of a patch in pixels; left out, a fourteenth of the shorter side, in whole cells of the features.
        split: name of the module whose output the decoder is given; left out, the last stage of the network.
        width: channels of the decoder.
        encoder_lr: learning rate of the layers that the model shares, in those of the decoder.
        restart: a new optimizer for every frame, as in the published commands; else its moments go on.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adamw"
    lr: float = 1e-4
    weight_decay: float = 0.05
    mode: Literal["online", "standard"] = "online"
    window: int = 16
    copies: int = 32
    mask_ratio: float = 0.8
    patch: int | None = None
    split: str | None = None
    width: int = 64
    encoder_lr: float = 0.1
    restart: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.mode in ("online", "standard"), f"mode={self.mode!r}", "'online' or 'standard'")
        require(0 < self.mask_ratio < 1, f"mask_ratio={self.mask_ratio}", "a share above 0, below 1")
        require(self.encoder_lr > 0, f"encoder_lr={self.encoder_lr}", "a factor above 0")
        require(self.patch is None or self.patch >= 1, f"patch={self.patch}", "1 pixel or more")
        for name in ("window", "copies", "width"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class Reconstruction(Behind):
    """A decoder behind a network's ``split``: masked images (batch, 3, height, width) -> images as they were.

    Args:
        model: the network, whose modules up to ``split`` are shared.
        split: name of the last of them; it puts out maps (batch, channels, rows, columns), or the tokens of a ViT.
        tail: the decoder: maps -> (batch, 3 * side**2, rows, columns), the pixels of each cell, for any side.

    Attributes:
        channels: of the maps.
        cell: side of the square of pixels that a place of the maps stands for.
    """

    def __init__(self, model: nn.Module, split: str, tail: nn.Module) -> None:
        super().__init__(model, split, tail)
        self.channels, self.cell = taps.probe(model, self._measured)

    def forward(self, x: Tensor) -> Tensor:
        cells: Tensor = self.tail(maps_of(taps.output_at(self.network, self.split, x), x))
        pixels = F.pixel_shuffle(cells, math.isqrt(cells.shape[1] // 3))
        return F.interpolate(pixels, x.shape[2:], mode="bilinear", align_corners=False)

    @torch.no_grad()
    def _measured(self, x: Tensor) -> tuple[int, int]:
        maps = maps_of(taps.output_at(self.network, self.split, x), x)
        return maps.shape[1], max(1, round(x.shape[2] / maps.shape[2]))


class TTTMAE(SourceStage):
    """Learn to fill in what is masked in the last frames, with the layers that the prediction shares; then predict the frame.

    Gandelsman et al., "Test-Time Training with Masked Autoencoders", NeurIPS 2022, image by image; Wang et al., "Test-Time
    Training on Video Streams", arXiv 2307.05014 2023, online over a window.

    Encoder and decoder adapt, what stands behind ``split`` stays. Masked patches have the mean colour of their image, so that
    networks of any kind can be encoders: the released code marks them in a fourth channel, or leaves out a ViT's tokens. Copies
    are whole frames, not crops. The loss is the mean square error of masked pixels. Scored is the plain frame after the step.
    ``auxiliary=`` is the file of a joint training (``tta train ttt_mae``), or a module, see :class:`Reconstruction`; with
    neither, a decoder is trained on ``source=`` images behind a frozen encoder, which is weaker than the papers' joint training.
    """

    tasks = ("classification", "segmentation")
    config: TTTMAEConfig
    scored_forward = "after"
    made_by = ("split", "width", "patch", "mask_ratio")

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: TTTMAEConfig, generator: torch.Generator) -> nn.Module:
        part = Reconstruction(model, split_of(model, config.split), nn.Identity())
        with seeded(generator):
            decoder = nn.Sequential(
                nn.Conv2d(part.channels, config.width, 1),
                nn.GELU(),
                nn.Conv2d(config.width, config.width, 3, padding=1),
                nn.GELU(),
                nn.Conv2d(config.width, 3 * part.cell**2, 1),
            )
        part.tail = decoder.to(next(model.parameters()))
        return part

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: TTTMAEConfig) -> nn.Module:
        return Reconstruction(model, split_of(model, config.split), module)

    @classmethod
    def auxiliary_loss(
        cls, part: nn.Module, images: Tensor, config: TTTMAEConfig, generator: torch.Generator
    ) -> Tensor:
        assert isinstance(part, Reconstruction)
        patch = config.patch or part.cell * math.ceil(min(images.shape[2:]) / CELLS / part.cell)
        masked = masks(images, patch, config.mask_ratio, generator)
        filled = torch.where(masked, images.mean((2, 3), keepdim=True), images)
        errors: Tensor = (part(filled).float() - images).square().mean(1, keepdim=True)
        return (errors * masked).sum() / masked.sum()

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self.auxiliary = self.take_auxiliary()
        self.frames = LabelledQueue(self.config.window)
        assert isinstance(self.auxiliary, Reconstruction)
        self._encoder = taps.parameters_before(self.model, self.auxiliary.split)
        for parameter in [*self._shared(), *own_parameters(self.auxiliary, self.model)]:
            parameter.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        return torch.cat([self._adapt_to(frame) for frame in torch.split(x, 1)])

    def _adapt_to(self, frame: Tensor) -> Tensor:
        if self.input_finite:  # no bad frame may stay in the window
            frames = self._window(frame)
            for _ in range(self.config.steps):
                drawn = torch.randint(len(frames), (self.config.copies,), generator=self.generator)
                copies = frames[drawn.to(frames.device)]
                self.update(self.auxiliary_loss(self.auxiliary, copies, self.config, self.generator))
        with torch.no_grad():
            logits = self.predict(frame)
        if self.config.mode == "standard":
            self.back_to_source()
        elif self.config.restart:
            self.restart_optimizer()
        return logits

    def _window(self, frame: Tensor) -> Tensor:
        """The last frames, the present one included."""
        if self.config.mode == "standard":
            return frame
        self.frames.add(frame, torch.zeros(1, dtype=torch.long))
        return self.frames.contents()[0]

    def restart_optimizer(self) -> None:
        """A new optimizer, in which the layers that the model shares have a learning rate of their own."""
        super().restart_optimizer()
        assert self.optimizer is not None
        own = own_parameters(self.auxiliary, self.model)
        self.optimizer.param_groups[0]["params"] = own
        self.optimizer.add_param_group({"params": self._shared(), "lr": self.config.lr * self.config.encoder_lr})

    def _shared(self) -> list[nn.Parameter]:
        return [self.model.get_parameter(name) for name in self._encoder]


def split_of(model: nn.Module, name: str | None) -> str:
    """Full name of the encoder's last module, see :class:`TTTMAEConfig`."""
    if name is not None:
        return taps.full_name(model, name)
    return taps.parts(model)[-1]


def maps_of(features: Tensor, images: Tensor) -> Tensor:
    """Maps (batch, channels, rows, columns) as they are; of tokens (batch, tokens, width) those of patches, laid out.

    Raises:
        ValueError: neither.
    """
    if features.dim() == 4:
        return features
    require(features.dim() == 3, f"a split with an output of shape {tuple(features.shape)}", "maps, or tokens of a ViT")
    height, width = images.shape[2:]
    # The patches of a ViT are square and fill the image: as many as there are tokens, but for a few that are no patches.
    side = math.ceil(math.sqrt(height * width / features.shape[1]))
    rows, columns = height // side, width // side
    return features[:, -rows * columns :].mT.reshape(len(features), -1, rows, columns)


def masks(images: Tensor, patch: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Masked pixels (batch, 1, height, width), boolean: of each image the same share of patches, others each time."""
    height, width = images.shape[2:]
    rows, columns = math.ceil(height / patch), math.ceil(width / patch)
    count = min(max(round(ratio * rows * columns), 1), rows * columns - 1)
    require(count >= 1, f"patches of {patch} pixels in images of {height} x {width}", "two patches or more")
    order = torch.rand(len(images), rows * columns, generator=generator).argsort(1).argsort(1)
    chosen = (order < count).view(-1, 1, rows, columns).to(images.device)
    return chosen.repeat_interleave(patch, 2).repeat_interleave(patch, 3)[:, :, :height, :width]
