"""ITTA: a learnt consistency of styles, and maps added at test time."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tta import taps
from tta.adapter import require
from tta.methods._source_stage import SourceStage, SourceStageConfig

FLOOR = 1e-6  # under the root of a variance


@dataclass
class ITTAConfig(SourceStageConfig):
    """The defaults are the released code's: Adam 5e-6 on a loss times 1e-6, which Adam's epsilon of 1e-8 damps.

    Attributes:
        loss_scale: factor of the loss. It is no learning rate: Adam divides it out until gradients come near its epsilon.
        map_depth: scales and shifts of an added map, one behind the other, a ReLU between each two.
        layers: names of the stages that a map is added behind; left out, all of the network. A name that is given twice has two.
        image_size: pixels of the images' sides; the maps then have a scale and shift for each channel and place, as the released code has with
            ``224``. Left out, one for each channel, for images of any size.
        loss_depth: scales and shifts of the consistency network.
        mix: both parameters of the Beta distribution of the styles' shares.
    """

    lr: float = 5e-6
    loss_scale: float = 1e-6
    map_depth: int = 5
    layers: tuple[str, ...] | None = None
    image_size: int | None = None
    loss_depth: int = 10
    mix: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.loss_scale > 0, f"loss_scale={self.loss_scale}", "a factor above 0")
        require(self.map_depth >= 1, f"map_depth={self.map_depth}", "1 or more")
        require(self.loss_depth >= 1, f"loss_depth={self.loss_depth}", "1 or more")
        require(self.layers is None or len(self.layers) > 0, f"layers={self.layers}", "one name or more")
        require(self.image_size is None or self.image_size >= 1, f"image_size={self.image_size}", "a number of pixels")
        require(self.mix > 0, f"mix={self.mix}", "above 0")


class Maps(nn.Module):
    """Scales and shifts of every element, one behind the other: at first one and zero. A ReLU stands between each two.

    Args:
        shape: of the elements, which broadcasts over a batch.
        depth: number of scales.
        rectified: without the ReLUs if false, for inputs that may be negative, of which the first map would else change some.
    """

    def __init__(self, shape: Sequence[int], depth: int, rectified: bool = True) -> None:
        super().__init__()
        self.rectified = rectified
        self.scales = nn.Parameter(torch.ones(depth, *shape))
        self.shifts = nn.Parameter(torch.zeros(depth, *shape))

    def forward(self, x: Tensor) -> Tensor:
        for number, (scale, shift) in enumerate(zip(self.scales, self.shifts, strict=True)):
            x = (x.relu() if number and self.rectified else x) * scale + shift
        return x


class Consistency(Maps):
    """The network that tells how much two styles agree: differences of features (batch, width) -> (batch, width).

    Attributes:
        head: name of the classifier's last layer, whose input the features are.
        stages: names of the stages behind which styles are mixed.
    """

    def __init__(self, model: nn.Module, config: ITTAConfig) -> None:
        head = taps.head(model)
        last: Any = model.get_submodule(head)
        super().__init__((last.in_features,), config.loss_depth)
        self.head, self.stages = head, stages_of(model, config.layers)
        self.to(last.weight)


class Styles(NamedTuple):
    """Mixture of the styles of a batch.

    Attributes:
        site: number of the stage behind which they are, 0 or 1.
        share: of the image's own style, (batch,).
        partner: the image that the rest comes from, (batch,).
    """

    site: int
    share: Tensor
    partner: Tensor


class ITTA(SourceStage):
    """Learn maps behind each stage of a frozen network, so that features agree with those of the same image in another style.

    Chen et al., "Improved Test-Time Adaptation for Domain Generalization", CVPR 2023.

    The style of an image is the means and deviations of its channels behind the first or second stage; it is mixed with that of
    another image of the batch. How much two styles agree is told by a small network, which the source stage (``tta train itta``)
    trains so that its gradients are those of the classification. ``auxiliary=`` is the file of that training; without one the
    network keeps its initial values, of which nothing is published. Only the maps adapt, one step a batch; scored are the logits
    after it. A batch of one image has no other style and teaches nothing, so that the released evaluation, in batches of one,
    hardly adapts. Two things differ from the released source stage: batches are drawn over all domains together, where it takes
    as many images of each, and network and classifier are trained in the same step, where it alternates.
    """

    needs = "one class an image"
    config: ITTAConfig
    scored_forward = "after"
    made_by = ("layers", "loss_depth", "mix")
    part_lr = 0.1  # 5e-6 beside 5e-5, as released
    fitted_alone: ClassVar[bool] = False  # the network's loss needs the classifier's gradients, and labels

    @classmethod
    def make_auxiliary(cls, model: nn.Module, config: ITTAConfig, generator: torch.Generator) -> nn.Module:
        return Consistency(model, config)

    @classmethod
    def wrap_auxiliary(cls, model: nn.Module, module: nn.Module, config: ITTAConfig) -> nn.Module:
        return module

    @classmethod
    def source_losses(
        cls, model: nn.Module, part: Any, images: Tensor, labels: Tensor, config: Any, generator: torch.Generator
    ) -> dict[str, Tensor]:
        """Classification in both styles, consistency, and how far the gradients of the two are apart.

        The first two train the classifier, the last one the consistency network.
        """
        features, logits = taps.look(model, part.head, images)
        with added(model, part.stages, [], drawn(len(images), config.mix, generator)):
            others, again = taps.look(model, part.head, images)
        classification = F.cross_entropy(logits, labels) + F.cross_entropy(again, labels)
        fixed = {name: parameter.detach() for name, parameter in part.named_parameters()}
        consistency = functional_call(part, fixed, (others - features,)).square().mean()

        below = [p for name, p in model.named_parameters() if not name.startswith(f"{part.head}.") and p.requires_grad]
        learnt = part(others - features).square().mean()
        by_loss = torch.autograd.grad(learnt, below, create_graph=True, allow_unused=True)
        by_class = torch.autograd.grad(classification, below, retain_graph=True, allow_unused=True)
        pairs = [(a, b) for a, b in zip(by_loss, by_class, strict=True) if a is not None and b is not None]
        ours, theirs = (standardised(torch.cat([g.flatten() for g in side])) for side in zip(*pairs, strict=True))
        apart = 0.1 * (ours - theirs.detach()).square().mean()
        own = list(part.parameters())
        towards = torch.autograd.grad(apart, own, retain_graph=True)
        # A term whose value is 0 and whose gradient is that of the distance, for the network alone.
        alone = torch.stack([(p * g - (p * g).detach()).sum() for p, g in zip(own, towards, strict=True)]).sum()
        return {
            "classification": classification,
            "consistency": consistency,
            "gradients": apart.detach() + alone,
        }

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self.auxiliary = self.take_auxiliary()
        self.head = taps.head(self.model)
        self.stages = stages_of(self.model, self.config.layers)
        found = outputs_of(self.model, self.stages, self.config.image_size)
        shapes = [shape_of(output, whole=self.config.image_size is not None) for output in found]
        self.maps = nn.ModuleList(
            Maps(shape, self.config.map_depth, rectified=bool((output >= 0).all())).to(output)
            for shape, output in zip(shapes, found, strict=True)
        )

    def parameters_to_adapt(self) -> list[nn.Parameter]:
        return list(self.maps.parameters())

    def predict(self, x: Tensor) -> Tensor:
        """Logits of the network with its maps."""
        self._check_size(x)
        with added(self.model, self.stages, self.maps):
            return super().predict(x)

    def adapt(self, x: Tensor) -> Tensor:
        self._check_size(x)
        if len(x) < 2:
            self.nothing_to_learn()
        for _ in range(self.config.steps if len(x) > 1 else 0):
            styles = self._styles(len(x))
            with added(self.model, self.stages, self.maps):
                features, _ = taps.look(self.model, self.head, x)
            with added(self.model, self.stages, self.maps, styles):
                others, _ = taps.look(self.model, self.head, x)
            self.update(self.config.loss_scale * self.auxiliary(others - features).square().mean())
        with torch.no_grad():
            return self.predict(x)

    def _check_size(self, x: Tensor) -> None:
        size, (height, width) = self.config.image_size, x.shape[2:]
        require(
            size is None or height == width == size,
            f"images of {height} x {width} pixels with image_size={size}",
            "the side of the images there, or null (None in Python) for maps of any size",
        )

    def _styles(self, images: int) -> Styles:
        return drawn(images, self.config.mix, self.generator)


def drawn(images: int, mix: float, generator: torch.Generator) -> Styles:
    """Styles for a batch: behind either stage with the same chance, shares from Beta(mix, mix), partners from a permutation."""
    site = int(torch.randint(2, (), generator=generator))
    both = torch.full((images, 2), mix)
    # No public sampler takes a generator; a Beta distribution is a Dirichlet one of two parts.
    share = torch._sample_dirichlet(both, generator)[:, 0]  # noqa: SLF001
    return Styles(site, share, torch.randperm(images, generator=generator))


@contextmanager
def added(
    model: nn.Module, stages: Sequence[str], maps: Sequence[nn.Module] | nn.ModuleList, styles: Styles | None = None
) -> Iterator[None]:
    """Within this context styles are mixed behind one stage, and each stage's output then goes through its maps."""

    site = None if styles is None else model.get_submodule(stages[min(styles.site, len(stages) - 1)])

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if styles is not None and module is site:
            output = mixed(output, styles)
        for number, name in enumerate(stages):
            if model.get_submodule(name) is module and number < len(maps):
                output = maps[number](output)
        return output

    with ExitStack() as stack:
        for name in dict.fromkeys(stages):
            stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def mixed(x: Tensor, styles: Styles) -> Tensor:
    """Features with means and deviations of their channels mixed with those of the partners; these are constants.

    Zhou et al., "Domain Generalization with MixStyle", ICLR 2021.

    Args:
        x: maps (batch, channels, height, width), or tokens (batch, tokens, channels).
        styles: of the batch.
    """
    places = (2, 3) if x.dim() == 4 else (1,)
    with torch.no_grad():
        var, mean = torch.var_mean(x, dim=places, keepdim=True)
        deviation = (var + FLOOR).sqrt()
        share = styles.share.to(x).view(-1, *[1] * (x.dim() - 1))
        partner = styles.partner.to(x.device)
        new_mean = mean * share + mean[partner] * (1 - share)
        new_deviation = deviation * share + deviation[partner] * (1 - share)
    return (x - mean) / deviation * new_deviation + new_mean


def standardised(x: Tensor) -> Tensor:
    """A vector without its mean, in units of its standard deviation."""
    return (x - x.mean()) / x.std().clamp_min(1e-12)


def stages_of(model: nn.Module, names: Sequence[str] | None) -> list[str]:
    """Full names of the stages that maps are added behind, see :class:`ITTAConfig`."""
    if names is None:
        return taps.parts(model)
    return [taps.full_name(model, name) for name in names]


def outputs_of(model: nn.Module, stages: Sequence[str], size: int | None) -> list[Tensor]:
    """Outputs of some stages for noise, of images of a size or of the first one that the model takes."""

    def run(x: Tensor) -> list[Tensor]:
        x = x if size is None else x.new_ones(1, x.shape[1], size, size)
        with torch.no_grad(), taps.activations(model, list(dict.fromkeys(stages)), torch.clone) as seen:
            model(x)
        return [seen[name] for name in stages]

    return taps.probe(model, run)


def shape_of(output: Tensor, *, whole: bool) -> tuple[int, ...]:
    """Shape of a map's scales: of a stage's output without the batch, or one a channel."""
    if output.dim() == 3:
        return tuple(output.shape[1:]) if whole else (output.shape[2],)
    return tuple(output.shape[1:]) if whole else (output.shape[1], *[1] * (output.dim() - 2))
