"""RPL: robust pseudo-labelling."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from tta import norms
from tta.adapter import Adapter, OptimizerConfig, require
from tta.functional import confidence


@dataclass
class RPLConfig(OptimizerConfig):
    """Adam 1e-3 is what a later benchmark uses on CIFAR; the paper's SGD belongs to ImageNet.

    Attributes:
        q: of the generalised cross-entropy, in (0, 1]: the cross-entropy in the limit of 0, the mean absolute error at 1.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "adam"
    q: float = 0.8

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.q <= 1, f"q={self.q}", "a value in (0, 1]")


class RPL(Adapter):
    """Learn the model's own hard labels with a loss that forgives wrong ones, the generalised cross-entropy.

    Rusak et al., "If your data distribution shifts, use self-learning", TMLR 2022. The loss: Zhang and Sabuncu,
    "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy Labels", NeurIPS 2018.

    The affine parameters of the normalisation layers adapt; BatchNorm layers normalise by the batch. The teacher that
    gives the labels is the model itself. Scored are the logits before the step.
    """

    tasks = ("classification", "segmentation")
    config: RPLConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for layer in norms.layers(self.model):
            norms.use_batch_statistics(layer)
            layer.requires_grad_(True)

    def adapt(self, x: Tensor) -> Tensor:
        for _ in range(self.config.steps):
            logits = self.predict(x)
            self.update(((1 - confidence(logits) ** self.config.q) / self.config.q).mean())
        return logits
