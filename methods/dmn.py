"""DMN: dual memory networks, the dynamic memory alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tta.adapter import require
from tta.functional import matmul
from tta.methods._caches import Cache
from tta.methods._tda import Evidence
from tta.methods._views import Seen, TwoTowersAdapter, ViewsConfig, selection_fits


@dataclass
class DMNConfig(ViewsConfig):
    """The defaults are the released code's for its zero-shot variant.

    Attributes:
        memory_size: features kept for each class, those of lowest entropy.
        beta: sharpness of the affinity with them.
        selection: share of the views, those of lowest entropy, that decide the class and entropy of an image.
        text_weight: of the prediction by class names.
        memory_weight: of the prediction by the memory. The released code takes the best of many on the test labels.
    """

    views: int = 32
    memory_size: int = 50
    beta: float = 5.5
    selection: float = 0.1
    text_weight: float = 1.0
    memory_weight: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        selection_fits(self.selection)
        require(self.memory_size >= 1, f"memory_size={self.memory_size}", "1 or more features for each class")
        for name in ("text_weight", "memory_weight"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "a weight of 0 or more")
        require(self.text_weight + self.memory_weight > 0, "text_weight=0, memory_weight=0", "one of them above 0")


class DMN(TwoTowersAdapter):
    """Read a classifier for each image out of a memory of the stream's images and the class names.

    Zhang et al., "Dual Memory Networks: A Versatile Adaptation Approach for Vision-Language Models", CVPR 2024.

    For a vision-language model, see :class:`tta.TwoTowers`; no gradient. The surest views say which class of the memory an image
    enters, before it is predicted; kept is the feature of the image itself. Published numbers have ``memory_weight`` chosen on
    the test labels, so that they are not to be reached. Returned is the logarithm of the weighted sum of both predictions.
    """

    config: DMNConfig

    def configure_model(self) -> None:
        super().configure_model()
        classes, width = self.towers.class_features.shape
        self.memory = Cache(classes, self.config.memory_size, width)

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self._next(image) for image in self.seen(x)])

    def _next(self, image: Seen) -> Tensor:
        surest = Evidence.of(image, self.config.selection)
        label = surest.probabilities.argmax()
        self.memory.admit(label, image.features[0], surest.entropy, self.input_finite)
        return self._read(image)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logarithms of the predictions by class names and present memory, which the images do not enter."""
        return torch.stack([self._read(Seen(f[None], z[None])) for f, z in zip(*self.look(x), strict=True)])

    def _read(self, image: Seen) -> Tensor:
        feature, names = image.features[0], self.towers.class_features
        near = self.memory.affinity(feature, self.config.beta)
        by_name = (-self.config.beta * (1 - matmul(names, feature))).exp()
        read = torch.einsum("cp,cpd->cd", near, self.memory.keys) + by_name[:, None] * names
        of_memory = self.towers.logits(feature, F.normalize(read, dim=1)).log_softmax(0)
        of_names = image.logits[0].log_softmax(0)
        return torch.logaddexp(_log(self.config.text_weight) + of_names, _log(self.config.memory_weight) + of_memory)


def _log(weight: float) -> float:
    return math.log(weight) if weight else -math.inf
