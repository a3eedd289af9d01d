"""MTA: mean shift over the views of an image."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from tta.adapter import require
from tta.functional import matmul
from tta.methods._views import Seen, TwoTowersAdapter, ViewsConfig

# Of the released code: rounds, updates of each quantity in a round, and the step below which it stands still.
ROUNDS, UPDATES, STILL = 5, 5, 1e-6
NEAREST = 0.3  # share of the other views whose distances give the bandwidth of a view


@dataclass
class MTAConfig(ViewsConfig):
    """The defaults are the paper's, the same for all its benchmarks.

    Attributes:
        lambda_q: weight of the agreement with views that are predicted alike, in the inlierness of a view.
        lambda_y: temperature of the inlierness.
    """

    lambda_q: float = 4.0
    lambda_y: float = 0.2

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.lambda_y > 0, f"lambda_y={self.lambda_y}", "a temperature above 0")


class MTA(TwoTowersAdapter):
    """Predict an image by the mode of its views' features, in which views that disagree with the others count less.

    Zanella and Ben Ayed, "On the Test-Time Zero-Shot Generalization of Vision-Language Models: Do We Really Need Prompt Learning?",
    CVPR 2024.

    For a vision-language model, see :class:`tta.TwoTowers`; no gradient, no memory. The mode and the inlierness of each view are
    found in turns. All views take part, the image itself as one of them, from which the mode starts.
    """

    config: MTAConfig

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        return torch.stack([self.scores(self._mode(image)) for image in self.seen(x)])

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits of the mode of views, drawn without moving the generator on."""
        return torch.stack([self.scores(self._mode(image)) for image in self.seen(x, self.copied_generator())])

    def _mode(self, image: Seen) -> Tensor:
        """The mode of the views' features, (width,), of unit length."""
        features, probabilities = image.features, image.logits.softmax(1)
        bandwidths = self._bandwidths(features)
        alike = matmul(probabilities, probabilities.T)
        inlierness = torch.full_like(bandwidths, 1 / len(features))
        mode = features[0]

        def density(mode: Tensor) -> Tensor:
            return (-(features - mode).square().sum(1) / (2 * bandwidths)).exp()

        def next_inlierness(now: Tensor, near: Tensor) -> Tensor:
            agreement = matmul(alike, now)
            return ((near + self.config.lambda_q * agreement) / self.config.lambda_y).softmax(0)

        def next_mode(now: Tensor, inlierness: Tensor) -> Tensor:
            weights = density(now) * inlierness
            return F.normalize(matmul(weights, features) / weights.sum(), dim=0)

        for _ in range(ROUNDS):
            inlierness = _settled(next_inlierness, inlierness, density(mode))
            mode = _settled(next_mode, mode, inlierness)
        return mode

    @staticmethod
    def _bandwidths(features: Tensor) -> Tensor:
        """Half the mean squared distance of each view to its nearest others, (views,)."""
        distances = torch.cdist(features, features).sort(dim=1).values
        nearest = max(1, int(NEAREST * (len(features) - 1)))
        of_nearest = distances[:, 1 : nearest + 1].square().mean(1) / 2
        return of_nearest.nan_to_num(1.0).clamp(min=1e-12)  # one view alone has no others; equal views no distance


def _settled(update: Callable[[Tensor, Tensor], Tensor], value: Tensor, other: Tensor) -> Tensor:
    """The value after at most :data:`UPDATES` updates; once it stands still it stays. On a GPU nothing waits for that."""
    still = torch.zeros((), dtype=torch.bool, device=value.device)
    for _ in range(UPDATES):
        following = torch.where(still, value, update(value, other))
        still = still | ((following - value).norm() < STILL)
        value = following
    return value
