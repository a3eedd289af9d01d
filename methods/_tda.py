"""TDA's two caches, and what an image adds to them: shared by the methods that build on it."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from tta.adapter import require
from tta.functional import entropy, entropy_of_mean
from tta.methods._caches import Cache
from tta.methods._views import Seen, TwoTowersAdapter, ViewsConfig, selection_fits


@dataclass
class CachesConfig(ViewsConfig):
    """Settings of a positive and a negative cache; the defaults are the paper's for ImageNet.

    Attributes:
        positive_shots: features kept for each class in the positive cache; 0 for none.
        positive_alpha: weight of the positive cache.
        positive_beta: sharpness of its affinity.
        negative_shots: features kept for each class in the negative cache; 0 for none.
        negative_alpha: weight of the negative cache.
        negative_beta: sharpness of its affinity.
        entropy_lower, entropy_upper: an image enters the negative cache if its entropy in nats, divided by log2(classes), lies
            between; equal probabilities of all classes give ln 2 = 0.69.
        mask_lower, mask_upper: the negative cache speaks against classes whose probability lies between.
        selection: share of the views, those of lowest entropy, whose mean stands for the image; of one view that view.
    """

    views: int = 1
    positive_shots: int = 3
    positive_alpha: float = 2.0
    positive_beta: float = 5.0
    negative_shots: int = 2
    negative_alpha: float = 0.117
    negative_beta: float = 1.0
    entropy_lower: float = 0.2
    entropy_upper: float = 0.5
    mask_lower: float = 0.03
    mask_upper: float = 1.0
    selection: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        selection_fits(self.selection)
        for name in ("positive_shots", "negative_shots"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "0 or more features")
        for name in ("positive_beta", "negative_beta"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "a sharpness of 0 or more")


class Evidence(NamedTuple):
    """An image as a cache takes it, from its surest views: their mean feature, which is shorter than 1, and mean logits."""

    feature: Tensor  # (width,)
    logits: Tensor  # (classes,)
    probabilities: Tensor  # (classes,), mean over the views
    entropy: Tensor  # of the mean probabilities, nats

    @classmethod
    def of(cls, image: Seen, share: float) -> "Evidence":
        """The evidence of the surest views."""
        kept = image.surest(share)
        logits = image.logits[kept]
        of_mean = entropy_of_mean(logits) if len(kept) > 1 else entropy(logits)[0]
        return cls(image.features[kept].mean(0), logits.mean(0), logits.softmax(1).mean(0), of_mean)


class TwoCaches(TwoTowersAdapter):
    """An adapter that corrects logits by a positive and a negative cache of features."""

    config: CachesConfig
    negative_fifo = False

    def configure_model(self) -> None:
        super().configure_model()
        config, (classes, width) = self.config, self.towers.class_features.shape
        self.positive = Cache(classes, config.positive_shots, width)
        self.negative = Cache(classes, config.negative_shots, width, masked=True, fifo=self.negative_fifo)

    def admit(self, image: Evidence) -> None:
        """Let an image into the caches that it is fit for."""
        config, label = self.config, image.logits.argmax()
        self.positive.admit(label, image.feature, image.entropy, self.input_finite)
        share = image.entropy / torch.log2(torch.tensor(float(len(image.logits))))
        unsure = (config.entropy_lower < share) & (share < config.entropy_upper)
        against = (config.mask_lower < image.probabilities) & (image.probabilities < config.mask_upper)
        self.negative.admit(label, image.feature, image.entropy, unsure & self.input_finite, against)

    def corrected(self, image: Evidence, positive: Tensor | None = None) -> Tensor:
        """Logits with what the caches add, (classes,).

        Args:
            image: the image.
            positive: (classes,), affinity with the positive cache, if it is another than that of the cache itself.
        """
        config = self.config
        if positive is None:
            positive = self.positive.affinity(image.feature, config.positive_beta).sum(1)
        logits = image.logits + config.positive_alpha * positive
        if not config.negative_shots:
            return logits
        near = self.negative.affinity(image.feature, config.negative_beta)
        against = torch.einsum("cp,cpk->k", near, self.negative.masks.to(near.dtype))
        return logits - config.negative_alpha * against
