"""ActMAD: activation matching to align distributions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import norms, taps
from tta.adapter import Adapter, OptimizerConfig, require
from tta.distributed import ALONE, Workers
from tta.functional import gradients_of
from tta.methods._steps import fit_steps, lr_batch
from tta.source import Known, Need, layer_moments

PUBLISHED = (1e-2, 128)  # learning rate for CIFAR-10, and images per batch


@dataclass
class ActMADConfig(OptimizerConfig):
    """The defaults are the released code's for CIFAR-10.

    Attributes:
        score: logits that are scored: those of the forward ``"before"`` the step or of a second one ``"after"`` it.
        layers: names or shell patterns of normalisation layers (``["layer3.*", "bn1"]``); None for all
            that a forward reaches.
        position: match the ``"output"`` of a layer, or the ``"activation"``, its output after a ReLU. The released CIFAR
            code matches the activation if an in-place ReLU follows, as in its Wide ResNets.
        skip_layers: number of these layers, from the input on, that are not matched. On KITTI the paper matches from the 27th
            on: 26.
        loss_scale: weight of the sum over the layers. The authors halve it for CIFAR (0.5) and not for KITTI (1).
        frozen: frozen BatchNorm layers, as torchvision's pretrained detectors have: ``"refuse"`` the model unless ``layers`` are
            named, or ``"thaw"`` them: they become BatchNorm2d layers of the same values.
        lr_batch: images per batch that ``lr`` is for. The steps of a smaller batch, whose moments are noise, are smaller by
            the square of its share; 1 for equal steps at any size. None for the published 128 with the default ``lr``, else 1.
        source_batch_size: source images per batch; means and variances are taken within a batch and averaged.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    lr: float = 1e-2
    weight_decay: float = 5e-4
    nesterov: bool = True
    score: Literal["before", "after"] = "before"
    layers: list[str] | None = None
    position: Literal["output", "activation"] = "output"
    skip_layers: int = 0
    loss_scale: float = 0.5
    frozen: Literal["refuse", "thaw"] = "refuse"
    lr_batch: int | None = None
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        self.lr_batch = lr_batch(self.lr_batch, self.lr, PUBLISHED)
        require(self.lr_batch >= 1, f"lr_batch={self.lr_batch}", "1 image or more")
        require(self.score in ("before", "after"), f"score={self.score!r}", "'before' or 'after'")
        require(self.position in ("output", "activation"), f"position={self.position!r}", "'output' or 'activation'")
        require(self.frozen in ("refuse", "thaw"), f"frozen={self.frozen!r}", "'refuse' or 'thaw'")
        require(self.skip_layers >= 0, f"skip_layers={self.skip_layers}", "a number of layers, 0 or more")
        require(self.loss_scale > 0, f"loss_scale={self.loss_scale}", "a weight above 0")
        require(self.source_batch_size >= 2, f"source_batch_size={self.source_batch_size}", "2 or more, for a variance")


def moments_need(
    model: nn.Module,
    layers: Sequence[str] | None = None,
    position: str = "output",
    batch_size: int | None = None,
    *,
    skip: int = 0,
    frozen: bool = False,
) -> Need:
    """Source statistics of activation matching: location-wise moments at normalisation layers.

    Args:
        model: any module with normalisation layers; classifiers, detectors and segmenters alike.
        layers, position: as in :class:`ActMADConfig`.
        batch_size: source images per batch.
        skip: number of these layers, from the input on, that are left out.
        frozen: whether frozen BatchNorm layers count as normalisation layers.

    Raises:
        ValueError: the model has no such layers, or none is left.
    """
    found = norms.frozen(model) if frozen else []
    known = {name for name, _ in [*found, *(norms.named_layers(model) if found else norms.present(model))]}
    chosen = taps.select([name for name, _ in model.named_modules() if name in known], layers)[skip:]
    if not chosen:
        raise ValueError(
            f"None of the {len(known)} normalisation layers is left: skip_layers={skip} are not matched. Skip fewer."
        )
    return Need("activation_moments", tuple(chosen), batch_size=batch_size, settings={"position": position})


class ActivationAlignment(nn.Module):
    """Distance of a batch's activations from the source's: a scaled sum over layers of two mean absolute differences.

    One is that of the means over the batch, the other that of the unbiased variances, location by location. It works with
    any module whose activations keep their shape, for any kind of output.

    Args:
        need: made by :func:`moments_need`.
        known: result of :meth:`tta.SourceStatistics.get` for it.
        scale: of the sum; a half in the code for CIFAR.

    Example:
        >>> import torch, torchvision, tta
        >>> from tta.methods.actmad import ActivationAlignment, moments_need
        >>> model = torchvision.models.segmentation.lraspp_mobilenet_v3_large(weights=None, weights_backbone=None).eval()
        >>> images, need = torch.rand(4, 3, 64, 64), moments_need(model, ["backbone.*"])
        >>> alignment = ActivationAlignment(need, tta.SourceStatistics.record(model, [need], images).get(need))
        >>> output, loss = alignment(model, images)
    """

    def __init__(self, need: Need, known: Known, scale: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.workers: Workers = ALONE
        self.layers = need.layers
        self.rectified = need.settings["position"] == "activation"
        self.image_shape = tuple(known["image_shape"].tolist())
        self._names = [key.removesuffix(".mean") for key in known if key.endswith(".mean")]
        for number, name in enumerate(self._names):
            self.register_buffer(f"mean{number}", known[f"{name}.mean"])
            self.register_buffer(f"var{number}", known[f"{name}.var"])

    def forward(self, model: nn.Module, x: Tensor) -> tuple[Any, Tensor]:
        """Output of the model for the images, and the loss of that same forward.

        Raises:
            ValueError: images of another size than the source's, or fewer than the two that a variance takes.
        """
        if tuple(x.shape[1:]) != self.image_shape or self.workers.total(x) < 2:
            raise ValueError(
                f"The source statistics belong to each location of images {self.image_shape} and are compared with the "
                f"variance of two images or more; got a batch of shape {tuple(x.shape)}."
            )
        with taps.activations(model, self.layers, self._moments) as seen:
            output = model(x)
        loss = torch.zeros((), device=x.device)
        for number, name in enumerate(self._names):
            mean, var = seen[name]
            loss = loss + F.l1_loss(mean, self.get_buffer(f"mean{number}"))
            loss = loss + F.l1_loss(var, self.get_buffer(f"var{number}"))
        return output, self.scale * loss

    def _moments(self, output: Tensor) -> tuple[Tensor, Tensor]:
        return layer_moments(output, self.rectified, self.workers)


class ActMAD(Adapter):
    """Move all weights so that the activations at normalisation layers have the source's means and variances again.

    Mirza et al., "ActMAD: Activation Matching to Align Distributions for Test-Time-Training", CVPR 2023.

    BatchNorm layers keep their source statistics. Only parameters that the matched activations depend on change: those
    behind the last layer, such as the classifier, are neither stepped nor decayed. The published errors are the
    smallest of all steps, chosen with the test labels; here each batch is scored once. A single image has no variance
    over the batch: it is predicted and not learned from. ``source=`` gives unlabelled images of the stream's size.
    """

    distributed = True
    tasks = ("classification", "segmentation", "regression", "detection")
    config: ActMADConfig

    @classmethod
    def source_needs(cls, model: nn.Module, config: ActMADConfig) -> list[Need]:
        if config.frozen == "refuse" and config.layers is None:
            norms.refuse_frozen(model)
        return [
            moments_need(
                model,
                config.layers,
                config.position,
                config.source_batch_size,
                skip=config.skip_layers,
                frozen=config.frozen == "thaw",
            )
        ]

    def configure_model(self) -> None:
        self.scored_forward = self.config.score
        if self.config.frozen == "thaw":
            norms.thaw(self.model)
        (need,), (known,) = self.source_needs(self.model, self.config), self.known
        if self.config.layers is None:
            norms.warn_of_unknown(self.model)
        elif unreached := [name for name in need.layers if f"{name}.mean" not in known]:
            raise ValueError(f"A forward pass never reaches layer '{unreached[0]}': leave it out of the layers.")
        self.alignment = ActivationAlignment(need, known, self.config.loss_scale)
        self.model.requires_grad_(True)
        parameters = list(self.model.parameters())
        probe = torch.zeros(2, *self.alignment.image_shape, device=self.device, dtype=self._dtype)
        _, loss = self.alignment(self.model, probe)
        reached = gradients_of(loss, parameters)
        for parameter, gradient in zip(parameters, reached, strict=True):
            parameter.requires_grad_(gradient is not None)

    def adapt(self, x: Tensor) -> Tensor:
        images = self.workers.total(x)
        if images < 2:
            self.nothing_to_learn()
            return self.predict(x)
        for _ in range(self.config.steps):
            output, loss = self.alignment(self.model, x)
            fit_steps(self.optimizer, self.config.lr, images, self.config.lr_batch)
            self.update(self.workers.part(loss))
        if self.config.score == "before":
            return self.outputs.of(output)
        with torch.no_grad():
            return self.predict(x)
