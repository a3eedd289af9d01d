"""Normalisation layers: find them, choose their statistics, name their affine parameters.

The method chooses the statistics that a BatchNorm layer uses. Every function here makes the choice part of the layer
itself, so that neither ``train()`` nor ``eval()`` can change it afterwards.
"""

import math
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from tta import channels_last
from tta.distributed import ALONE, Workers
from tta.messages import require

SmallBatches: TypeAlias = Literal["blend", "source", "raise"]
PRIOR = 16  # images that source statistics count as in a blend, as published
# Images; statistics of fewer are unreliable: of 40 CIFAR images one by one norm has 32 wrong, the source model 1 (ResNet-20).
SMALL_BATCH = 8

# Subclasses count too: timm's BatchNormAct2d, GroupNormAct and LayerNorm2d, SyncBatchNorm, torchvision's LayerNorm2d.
BATCH_NORMS = (_BatchNorm,)
AFFINE_NORMS = (_BatchNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, _InstanceNorm)
FEWEST_BLOCKS = 4  # of a chain that has a top: a quarter of it is one block


def named_layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = AFFINE_NORMS) -> list[tuple[str, nn.Module]]:
    """Normalisation layers of the given kinds with their names, in the order of ``named_modules``."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def layers(model: nn.Module, kinds: tuple[type[nn.Module], ...] = AFFINE_NORMS) -> list[nn.Module]:
    """Normalisation layers of the given kinds, with a warning of :func:`unknown_layers` where all kinds are asked for.

    Raises:
        ValueError: the model has none; the message names the kinds looked for, and the similar layers that exist.
    """
    found = [module for _, module in present(model, kinds)]
    if kinds == AFFINE_NORMS:
        warn_of_unknown(model)
    return found


def present(model: nn.Module, kinds: tuple[type[nn.Module], ...] = AFFINE_NORMS) -> list[tuple[str, nn.Module]]:
    """:func:`named_layers`, of which there must be one; raises as :func:`layers` does."""
    found = named_layers(model, kinds)
    if not found:
        wanted = ", ".join(kind.__name__.removeprefix("_") for kind in kinds)
        others = sorted({type(layer).__name__ for _, layer in named_layers(model)})
        unknown = sorted({type(layer).__name__ for _, layer in unknown_layers(model)})
        derive = (
            f"To have {', '.join(unknown)} adapted, derive the class from the layer of torch.nn that it resembles. "
        )
        raise ValueError(
            f"{type(model).__name__} has no normalisation layer of the kinds looked for: {wanted}. "
            + (f"It has {', '.join([*others, *unknown])}. " if others or unknown else "")
            + (
                f"It has {len(frozen(model))} frozen BatchNorm layers: replace them by BatchNorm2d. "
                if frozen(model)
                else ""
            )
            + (derive if unknown and kinds == AFFINE_NORMS else "")
            + "Use a method that does not adapt normalisation layers, or a model that has them."
        )
    return found


def frozen(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Frozen BatchNorm layers of torchvision and detectron2, whose statistics, scale and shift are constants, with their names."""
    return [
        (name, module) for name, module in model.named_modules() if type(module).__name__.startswith("FrozenBatchNorm")
    ]


def refuse_frozen(model: nn.Module) -> None:
    """Raise a ValueError if the model has :func:`frozen` layers, which would be passed over; it says how to thaw them."""
    if found := frozen(model):
        raise ValueError(
            f"{type(model).__name__} has {len(found)} {type(found[0][1]).__name__} layers, as '{found[0][0]}': their statistics, scale "
            "and shift are constants that nothing adapts. Pass frozen='thaw' to have them replaced by BatchNorm2d layers of the same "
            "values, which adapt."
        )


def thaw(model: nn.Module) -> None:
    """Replace :func:`frozen` layers, in place, by ``nn.BatchNorm2d`` with their values: in eval mode the outputs stay."""
    thawed = {layer: _thawed(layer) for _, layer in frozen(model)}  # a layer used in two places stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if layer in thawed:
            model.set_submodule(name, thawed[layer])


@torch.no_grad()
def _thawed(layer: Any) -> nn.Module:
    """The ``nn.BatchNorm2d`` in eval mode that computes what a frozen layer does."""
    weight = layer.weight
    made = nn.BatchNorm2d(len(weight), eps=layer.eps, device=weight.device, dtype=weight.dtype)
    for part in ("weight", "bias", "running_mean", "running_var"):
        getattr(made, part).copy_(getattr(layer, part))
    return made.eval()


def unknown_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules that look like normalisation layers with a scale or shift, of none of the kinds known, with their names.

    They are recognised by their class's name (``LayerNorm2d``, ``RmsNorm``): it holds "norm", and the module holds parameters
    and no other module.
    """
    return [
        (name, module)
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, AFFINE_NORMS)
        and not any(module.children())
        and any(True for _ in module.parameters(recurse=False))
    ]


def warn_of_unknown(model: nn.Module) -> None:
    """Warn of :func:`unknown_layers`: how many there are of each kind, and that the method passes them over."""
    unknown = Counter(type(module).__name__ for _, module in unknown_layers(model))
    if unknown:
        known = len(named_layers(model))
        warnings.warn(
            f"{type(model).__name__} has normalisation layers of kinds that are not known here: "
            f"{', '.join(f'{number} {kind}' for kind, number in unknown.items())}. The method passes them over and "
            f"works on the {known} of known kinds. To include a kind, derive its class from the "
            "layer of torch.nn that it resembles (torch.nn.LayerNorm).",
            RuntimeWarning,
            stacklevel=3,
        )


def within(name: str, parts: Iterable[str]) -> bool:
    """Whether a module's dotted name contains one of the dotted parts: ``model.blocks.9.norm1`` lies within ``blocks.9``."""
    return any(f".{part}." in f".{name}." for part in parts)


def layers_outside(model: nn.Module, exclude: Sequence[str] | None = None) -> list[nn.Module]:
    """Normalisation layers outside the modules whose names contain one of ``exclude``, or, if it is None, below the :func:`top`.

    Raises:
        ValueError: no layer is left; the message lists all.
    """
    named = named_layers(model)
    left_out = set(top(model)) if exclude is None else {name for name, _ in named if within(name, exclude)}
    found = [layer for name, layer in named if name not in left_out]
    if not found:
        given = "the rule for the top of a network" if exclude is None else f"exclude={list(exclude)}"
        raise ValueError(
            f"All {len(named)} normalisation layers of {type(model).__name__} are excluded by {given}. "
            f"Exclude fewer; they are called {', '.join(name for name, _ in named)}."
        )
    return found


def top(model: nn.Module) -> list[str]:
    """Names of the normalisation layers in the last blocks of a network and behind them, found by its structure.

    SAR and the methods built on it do not adapt them. Published for a ResNet-50 (``layer4``) and a ViT-B (``blocks.9`` to
    ``blocks.11`` and the final norm); both are the last quarter of the network's chain of stages or blocks, and what
    comes behind the chain. The same is the last stage and the final norm of a ConvNeXt or Swin, whatever the modules
    are called. Fewer than four blocks have no last quarter (ResNets for CIFAR, of three stages): there, only a final
    LayerNorm or RMSNorm counts.

    Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023.
    """
    names = [name for name, _ in named_layers(model)]
    chain = _chain(names)  # name -> number
    if not chain:
        return []
    length = max(chain.values()) - min(chain.values()) + 1
    last = [name for name, number in chain.items() if number > max(chain.values()) - length // FEWEST_BLOCKS]
    end = max(place for place, name in enumerate(names) if _below(name, chain))
    behind = names[end + 1 :]
    if not last:
        behind = [name for name in behind if isinstance(model.get_submodule(name), (nn.LayerNorm, nn.RMSNorm))]
    return [name for name in names if name in behind or _below(name, last)]


def stages(model: nn.Module, most: int = 4) -> list[str]:
    """Names of the stages or blocks that a network is a chain of, in order; of more than ``most``, the last of each part.

    ``layer1`` to ``layer4`` of a ResNet-50, ``blocks.2``, ``blocks.5``, ``blocks.8`` and ``blocks.11`` of a ViT-B; none where
    there is no chain.
    """
    links = list(_chain([name for name, _ in named_layers(model)]))
    parts = min(most, len(links))
    return [links[(part + 1) * len(links) // parts - 1] for part in range(parts)]


def _chain(norms: Sequence[str]) -> dict[str, int]:
    """Names of the stages or blocks that a network is a chain of, and their numbers; from its normalisation layers' names.

    Its links are modules beside one another, named alike but for a number (``layer1`` to ``layer4``, ``blocks.0`` to
    ``blocks.11``, ``encoder_layer_0``), with normalisation layers within. Of several such families, one inside the other,
    it is the outermost that holds at least a quarter of all layers, none of its links more than three in four of them (the
    one backbone in a wrapper is no chain); of several beside one another, that with the most layers.
    """
    families: defaultdict[tuple[str, ...], Counter[str]] = defaultdict(Counter)  # of modules -> layers within each
    numbers: dict[str, int] = {}
    depths: dict[tuple[str, ...], int] = {}
    for name in norms:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1]):
            if match := re.fullmatch(r"(\D*)(\d+)(.*)", part):
                before, number, after = match.groups()
                key, module = (*parts[:depth], before, after), ".".join(parts[: depth + 1])
                families[key][module] += 1
                numbers[module] = int(number)
                depths[key] = depth - part.isdecimal()  # a list of numbered modules is where its name is
    chains = [
        key
        for key, family in families.items()
        if len(family) > 1 and 4 * family.total() >= len(norms) and 4 * max(family.values()) <= 3 * family.total()
    ]
    if not chains:
        return {}
    chosen = min(chains, key=lambda key: (depths[key], -families[key].total()))
    if chosen[-2:] == ("", ""):  # a list, which may hold modules without such layers (poolings) between its blocks
        return {module: place for place, module in enumerate(families[chosen])}
    return {module: numbers[module] for module in families[chosen]}


def _below(name: str, modules: Iterable[str]) -> bool:
    return any(name.startswith(f"{module}.") for module in modules)


def use_batch_statistics(layer: nn.Module) -> None:
    """Make a BatchNorm layer normalise by the statistics of the current batch, in ``train()`` and ``eval()`` alike.

    The running statistics are removed: a layer without them has only the batch to look at. Other layers (GroupNorm,
    LayerNorm) have no batch statistics and are left as they are.

    A plain ``nn.BatchNorm2d`` changes its class, in place: it becomes a
    :class:`~tta.channels_last.ChannelsLastBatchNorm2d`, which computes the same, and more exactly where the images are
    channels-last on a CPU.
    """
    if isinstance(layer, _BatchNorm):
        layer.track_running_stats = False
        layer.running_mean = None
        layer.running_var = None
        layer.num_batches_tracked = None
        channels_last.sum_exactly(layer)


def store_statistics(layer: _BatchNorm, values: Mapping[str, Tensor | None]) -> None:
    """Undo :func:`use_batch_statistics`: give the layer copies of these running statistics, by the names of its buffers."""
    channels_last.sum_plainly(layer)
    layer.track_running_stats = True
    for name, value in values.items():
        layer.register_buffer(name, None if value is None else value.clone())


@contextmanager
def by_batch(model: nn.Module) -> Iterator[None]:
    """Within this context BatchNorm layers normalise by the current batch; their stored statistics do not change."""
    layers: list[Any] = [layer for _, layer in named_layers(model, BATCH_NORMS)]
    stored = [(layer, type(layer), layer.running_mean, layer.running_var) for layer in layers]
    for layer, _, _, _ in stored:
        layer.running_mean = layer.running_var = None
        channels_last.sum_exactly(layer)
    try:
        yield
    finally:
        for layer, kind, mean, var in stored:
            layer.__class__, layer.running_mean, layer.running_var = kind, mean, var


@contextmanager
def training_statistics(model: nn.Module, when: Tensor | None = None) -> Iterator[None]:
    """Within this context BatchNorm layers work as in training: normalise by the batch, update the stored statistics.

    Each layer keeps its own momentum. Updates that are not finite are undone at the end of the context, because on a GPU
    a bad batch is reported one batch late; if ``when``, a boolean scalar, is false, so are all. A layer without stored
    statistics normalises by the batch anyway. Run the backward pass of an earlier forward before this context: it reads
    the stored statistics, which change here.
    """
    layers: list[Any] = [layer for _, layer in named_layers(model, BATCH_NORMS)]
    names = ("running_mean", "running_var", "num_batches_tracked")
    stored = [(layer.training, [getattr(layer, name) for name in names]) for layer in layers]
    for layer, (_, values) in zip(layers, stored, strict=True):
        layer.training = True
        for name, value in zip(names, values, strict=True):
            setattr(layer, name, None if value is None else value.clone())
    try:
        yield
    finally:
        for layer, (mode, values) in zip(layers, stored, strict=True):
            layer.training = mode
            if layer.running_mean is not None and layer.running_var is not None:
                finite = layer.running_mean.isfinite() & layer.running_var.isfinite()
                finite = finite if when is None else finite & when
                for name, value in zip(names, values, strict=True):
                    if value is not None:  # through .data: autograd would refuse to change a tensor it has saved
                        good = finite if value.dim() else finite.all()
                        value.data.copy_(torch.where(good, getattr(layer, name), value))
            for name, value in zip(names, values, strict=True):
                setattr(layer, name, value)


class BlendedBatchNorm(nn.Module):
    """A BatchNorm layer that normalises by ``(1 - weight) * stored + weight * batch`` statistics.

    The batch variance is the unbiased one, as in the published code; statistics enter as constants (no gradient flows
    through them). With ``remember`` on, the blend becomes the stored statistics (an exponential moving average). The
    wrapped layer keeps its own class, so fused activations (timm's ``BatchNormAct2d``) keep working.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020.
    """

    def __init__(self, layer: _BatchNorm, weight: float) -> None:
        super().__init__()
        if layer.running_mean is None or layer.running_var is None:
            raise ValueError(
                "A BatchNorm layer of the model has no running statistics (track_running_stats=False): "
                "there are no source statistics to blend with. Use a method that normalises by the batch alone."
            )
        self.layer = layer.eval()
        self.weight = weight
        self.remember = False
        self.remember_when: Tensor | None = None
        self.workers: Workers = ALONE

    def train(self, mode: bool = True) -> "BlendedBatchNorm":
        """Do nothing: the wrapped layer uses the statistics it is given in every mode of the model."""
        return self

    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.blended(x)
        if self.remember:
            self._store(mean, var)
        out: Tensor = functional_call(self.layer, {"running_mean": mean, "running_var": var}, (x,))
        return out

    @torch.no_grad()
    def blended(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance that this input is normalised by, (channels,) each."""
        running_mean, running_var = self._stored()
        batch_mean, batch_var, images = self._moments(x)
        weight = self._weight_of(images)
        return torch.lerp(running_mean, batch_mean, weight), torch.lerp(running_var, batch_var, weight)

    def _weight_of(self, images: float | Tensor) -> float | Tensor:
        """Weight of the statistics of a batch of so many images, of all workers."""
        return self.weight

    def _moments(self, x: Tensor) -> tuple[Tensor, Tensor, float | Tensor]:
        """Mean and unbiased variance of each channel over all workers' images, and the number of images."""
        if self.workers.size > 1:
            mean, var, count = self.workers.moments(x)
            return mean, var * (count / (count - 1).clamp(min=1)), count / x[0, 0].numel()
        mean, var = channels_last.moments(x)
        # One value per channel has no unbiased variance. Its biased one is 0: the source's share keeps the blend usable.
        values = x.numel() // x.shape[1]
        return mean, var * (values / max(values - 1, 1)), len(x)

    @torch.no_grad()
    def _store(self, mean: Tensor, var: Tensor) -> None:
        """Store statistics, except in channels where they are not finite.

        On a GPU a bad batch is reported one batch late: until then it must not enter the stored statistics.
        """
        running_mean, running_var = self._stored()
        finite = mean.isfinite() & var.isfinite()
        finite = finite if self.remember_when is None else finite & self.remember_when
        running_mean.copy_(torch.where(finite, mean, running_mean))
        running_var.copy_(torch.where(finite, var, running_var))

    def _stored(self) -> tuple[Tensor, Tensor]:
        running_mean, running_var = self.layer.running_mean, self.layer.running_var
        assert running_mean is not None
        assert running_var is not None
        return running_mean, running_var

    def _scaled(self, normalised: Tensor, dtype: torch.dtype) -> Tensor:
        """Apply the layer's own scale, shift and, if it has one, activation to normalised values."""
        mean, var = self._stored()
        neutral = {"running_mean": torch.zeros_like(mean), "running_var": torch.ones_like(var) - self.layer.eps}
        out: Tensor = functional_call(self.layer, neutral, (normalised.to(dtype),))
        return out


class SmallBatchNorm(BlendedBatchNorm):
    """A BatchNorm layer for batches of any size: ``weight = n / (n + prior)`` of n images, the rest the source's.

    Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation", NeurIPS 2020.

    Args:
        layer: with the source's statistics.
        prior: images that the source's statistics count as; infinite for the source's alone in batches below
            :data:`SMALL_BATCH`, and the batch's alone in larger ones.
    """

    def __init__(self, layer: _BatchNorm, prior: float) -> None:
        super().__init__(layer, 0.0)
        self.prior = prior

    def _weight_of(self, images: float | Tensor) -> float | Tensor:
        if self.prior < math.inf:
            return images / (images + self.prior)
        enough = images >= SMALL_BATCH
        return enough.float() if isinstance(enough, Tensor) else float(enough)


def serve_small_batches(
    module: nn.Module, source: Mapping[str, Mapping[str, Tensor | None]], how: SmallBatches
) -> None:
    """Wrap the layers that normalise by the batch so that small batches are served; see :func:`tta.adapt`.

    Args:
        module: of which ``module.model`` and copies of it are looked through.
        source: the running statistics of the source model's layers, by their names in ``module.model``.
        how: ``"blend"``, ``"source"``, or ``"raise"``, which wraps nothing here.

    Raises:
        ValueError: another word.
    """
    require(how in ("blend", "source", "raise"), f"small_batches={how!r}", "'blend', 'source' or 'raise'")
    prior = {"blend": float(PRIOR), "source": math.inf}.get(how)
    if prior is None:
        return
    for path, child in list(module.named_modules()):
        _, _, name = path.partition(".")
        if isinstance(child, _BatchNorm) and child.running_mean is None and name in source:
            store_statistics(child, source[name])
            owner, _, own = path.rpartition(".")
            setattr(module.get_submodule(owner), own, SmallBatchNorm(child, prior))


class RobustBatchNorm(BlendedBatchNorm):
    """A BatchNorm layer that normalises by its stored statistics, and updates them while :func:`remembering`.

    Then it stores a blend with the batch's statistics (biased variance) and normalises by it; gradients flow through the
    batch's share. Statistics are float32.

    Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.remember:
            out: Tensor = self.layer(x)
            return out
        values = x.float()
        if type(self.layer) is nn.BatchNorm2d and channels_last.in_rows(values, self.layer):
            out, mean, var = channels_last.normalised(values, self.layer, self.weight)
            self._store(mean, var)
            return out.to(x.dtype)
        batch_var, batch_mean = torch.var_mean(values, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        running_mean, running_var = self._stored()
        mean = (1 - self.weight) * running_mean + self.weight * batch_mean
        var = (1 - self.weight) * running_var + self.weight * batch_var
        self._store(mean, var)
        shape = [1, -1, *[1] * (x.dim() - 2)]
        return self._scaled((values - mean.view(shape)) / (var.view(shape) + self.layer.eps).sqrt(), x.dtype)


class MovingBatchNorm(BlendedBatchNorm):
    """A BatchNorm layer that normalises by its stored statistics; while :func:`remembering`, by the batch's.

    The batch's then update the stored ones, as in training mode with a momentum of ``weight``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.remember:
            out: Tensor = self.layer(x)
            return out
        count = x.numel() / x.shape[1]
        values = x.float()
        if type(self.layer) is nn.BatchNorm2d and channels_last.in_rows(values, self.layer):
            out, mean, var = channels_last.normalised(values, self.layer)
            self._follow(mean, var * (count / (count - 1)))
            return out.to(x.dtype)
        mean, var = self._take_in(values)
        return self._scaled((values - mean) / (var * ((count - 1) / count) + self.layer.eps).sqrt(), x.dtype)

    def _take_in(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and unbiased variance of the batch, (1, channels, 1, ...); the stored ones move towards them."""
        dims = [d for d in range(values.dim()) if d != 1]
        var, mean = torch.var_mean(values, dim=dims, keepdim=True)
        self._follow(mean.flatten(), var.flatten())
        return mean, var

    def _follow(self, mean: Tensor, var: Tensor) -> None:
        """Move the stored statistics towards those of a batch."""
        running_mean, running_var = self._stored()
        self._store(torch.lerp(running_mean, mean, self.weight), torch.lerp(running_var, var, self.weight))


class InstanceAwareBatchNorm(MovingBatchNorm):
    """A BatchNorm layer that moves its statistics towards an image's own where the two differ by more than chance.

    Differences below ``k`` standard errors of the image's own mean and variance count as chance. A map of a single value
    has no statistics of its own. While :func:`remembering`, the batch's statistics replace the stored ones.

    Gong et al., "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation", NeurIPS 2022.
    """

    def __init__(self, layer: _BatchNorm, weight: float, k: float) -> None:
        super().__init__(layer, weight)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        if self.remember:
            mean, var = self._take_in(values)
        else:
            shape = [1, -1, *[1] * (x.dim() - 2)]
            mean, var = (stored.view(shape) for stored in self._stored())
        count = values[0, 0].numel()
        if count > 1:
            own_var, own_mean = torch.var_mean(values, dim=list(range(2, x.dim())), keepdim=True)
            scale = var + self.layer.eps
            mean = mean + _shrunk(own_mean - mean, self.k * (scale / count).sqrt())
            var = (var + _shrunk(own_var - var, self.k * scale * (2 / (count - 1)) ** 0.5)).relu()
        return self._scaled((values - mean) * (var + self.layer.eps).rsqrt(), x.dtype)


def _shrunk(x: Tensor, by: Tensor) -> Tensor:
    """Soft threshold: ``x`` moved towards zero by a distance, at most to zero."""
    return x - torch.minimum(torch.maximum(x, -by), by)


def blend_statistics(
    model: nn.Module, weight: float, kind: Callable[[_BatchNorm, float], BlendedBatchNorm] = BlendedBatchNorm
) -> None:
    """Replace every BatchNorm layer below ``model`` by a :class:`BlendedBatchNorm` with the given batch weight."""
    blended: dict[nn.Module, BlendedBatchNorm] = {}  # a layer used in two places stays one layer
    for parent in list(model.modules()):
        if isinstance(parent, BlendedBatchNorm):
            continue
        for name, child in list(parent.named_children()):
            if isinstance(child, _BatchNorm):
                if child not in blended:
                    blended[child] = kind(child, weight)
                setattr(parent, name, blended[child])


@contextmanager
def remembering(model: nn.Module, when: Tensor | None = None) -> Iterator[None]:
    """Within this context every :class:`BlendedBatchNorm` stores the blend it computes, if ``when``, a boolean scalar, is true."""
    blended = [module for module in model.modules() if isinstance(module, BlendedBatchNorm)]
    for module in blended:
        module.remember, module.remember_when = True, when
    try:
        yield
    finally:
        for module in blended:
            module.remember, module.remember_when = False, None
