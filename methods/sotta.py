"""SoTTA: adaptation to streams with images that do not belong there."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tta import memory, norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import entropy, gradients_of
from tta.methods._memory import predicted_by_parts
from tta.methods._sharpness import perturbed


@dataclass
class SoTTAConfig(OptimizerConfig):
    """The defaults are the paper's: Adam 1e-3.

    Attributes:
        memory_size: number of samples kept.
        update_frequency: samples between two updates, for any batch size.
        high_threshold: probability of the predicted class from which a sample may enter the memory; None for
            0.33 (4 - log10(classes)), at most 0.99, which is the published 0.99, 0.66 and 0.33 for 10, 100 and 1000 classes.
        rho: radius of the sharpness-aware step.
        bn_momentum: share of a memory's statistics in the stored statistics of a BatchNorm layer at each forward of an update.
        exclude: parts of the names of modules that are not adapted; None for the last quarter of the blocks and the final
            norm, as for SAR: see :func:`tta.norms.top`.
        steps: optimizer steps per update.
    """

    memory_size: int = 64
    update_frequency: int = 64
    high_threshold: float | None = None
    rho: float = 0.05
    bn_momentum: float = 0.2
    exclude: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.memory_size >= 2, f"memory_size={self.memory_size}", "2 or more samples")
        require(self.update_frequency >= 1, f"update_frequency={self.update_frequency}", "1 or more samples")
        threshold = self.high_threshold
        require(threshold is None or 0 <= threshold <= 1, f"high_threshold={threshold}", "a probability in [0, 1]")
        require(self.rho > 0, f"rho={self.rho}", "a radius above 0")
        require(0 <= self.bn_momentum <= 1, f"bn_momentum={self.bn_momentum}", "a share in [0, 1]")


class SoTTA(Adapter):
    """Minimise the entropy, towards a flat minimum, of a memory that only confident samples enter, all classes alike.

    Gong et al., "SoTTA: Robust Test-Time Adaptation on Noisy Data Streams", NeurIPS 2023.

    The affine parameters of the normalisation layers below the top of the network adapt. BatchNorm layers predict by
    stored statistics, which both forwards of an update, the second one at the moved weights, draw towards the memory's.
    Every sample is predicted before an update that it triggers, so that results do not depend on how the stream is cut
    into batches. While the memory holds fewer than two samples nothing is learned; the released code does without one, and
    learns from a single one by its own statistics. It leaves what comes after the last full ``update_frequency`` samples
    unpredicted. The published threshold suits models that are sure of what they see: of the first 3200 images of digits-c the
    embedded network is sure enough of none, and 15.6 % of all are wrong; with ``high_threshold=0.66`` 9.8 % (norm 4.1).
    """

    needs = "one class an image, which its memory is sorted by"
    config: SoTTAConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        norms.layers(self.model)  # raises where there are none
        for layer in norms.layers_outside(self.model, self.config.exclude):
            layer.requires_grad_(True)
        norms.blend_statistics(self.model, self.config.bn_momentum, norms.MovingBatchNorm)
        self.memory = memory.UniformMemory(self.config.memory_size)

    def adapt(self, x: Tensor) -> Tensor:
        if not self.input_finite:  # nothing of a bad batch may enter the memory
            return self.predict(x)
        every = self.config.update_frequency
        return predicted_by_parts(self.memory, x, every, self.predict, self._remember, self._learn)

    def _remember(self, x: Tensor, logits: Tensor) -> None:
        classes = logits.shape[1]
        confidences, labels = logits.softmax(1).max(1)
        # Whether a sample is kept depends on those before it: decided on the CPU, after one wait per batch.
        confidences, labels = torch.stack((confidences, labels.float())).cpu()
        given = self.config.high_threshold
        threshold = min(0.99, 0.33 * (4 - math.log10(classes))) if given is None else given
        self.memory.add_sure(x, labels.long(), confidences >= threshold, classes, self._draw)

    def _learn(self) -> None:
        if len(self.memory) < 2:
            return
        samples, parameters = self.memory.contents(), self.optimized_parameters()
        for _ in range(self.config.steps):
            with norms.remembering(self.model):
                gradients = gradients_of(entropy(self.predict(samples)).mean(), parameters)
                with perturbed(parameters, gradients, self.config.rho):
                    loss = entropy(self.predict(samples)).mean()
                    gradients = gradients_of(loss, parameters)
            self.update(loss, gradients=gradients)

    def _draw(self, below: int) -> int:
        return int(torch.randint(below, (), generator=self.generator))
