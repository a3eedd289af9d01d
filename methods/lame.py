"""LAME: Laplacian adjusted maximum-likelihood estimation."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import taps
from tta.adapter import Adapter, Config, require

MOST_STEPS = 100
TOLERANCE = 1e-8  # relative change of the energy at which the steps end


@dataclass
class LAMEConfig(Config):
    """The defaults are those of the released code and of later benchmarks.

    Attributes:
        affinity: of two images of the batch, from their features at length 1: ``"rbf"`` (a Gaussian as wide as the mean
            distance to the ``knn``-th neighbour), ``"knn"`` (1 for the nearest neighbours) or ``"linear"`` (inner product).
        knn: neighbours; as published, ``"rbf"`` counts the image itself and ``"knn"`` does not.
        symmetric: take the mean of the affinity in both directions.
    """

    affinity: Literal["rbf", "knn", "linear"] = "rbf"
    knn: int = 5
    symmetric: bool = False

    def __post_init__(self) -> None:
        require(self.affinity in ("rbf", "knn", "linear"), f"affinity={self.affinity!r}", "'rbf', 'knn' or 'linear'")
        require(self.knn >= 1, f"knn={self.knn}", "1 or more neighbours")


class LAME(Adapter):
    """Correct the predictions of a batch so that similar images get similar ones; the model stays as it is.

    Boudiaf et al., "Parameter-free Online Test-time Adaptation", CVPR 2022.

    For any model with a linear head: one forward, no gradient, nothing remembered. Returned are log-probabilities. Made
    for batches in which few classes occur; where many do it may be far worse than the source model.
    """

    needs = "one class and one feature vector an image"
    config: LAMEConfig

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self._head = taps.head(self.model)

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Log-probabilities (batch, classes) of the batch as a whole."""
        features, logits = taps.look(self.model, self._head, x)
        with torch.autocast(x.device.type, enabled=False):  # energies are compared to a relative 1e-8
            unary = -(logits.softmax(1) + 1e-10).log()
            return _laplacian_optimisation(unary, self._affinity(F.normalize(features, dim=1)))

    def _affinity(self, features: Tensor) -> Tensor:
        """Affinity matrix (batch, batch): a row holds the weights of all images for one image."""
        if self.config.affinity == "linear":
            affinity = features @ features.T
        else:
            distances = torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")
            others = min(self.config.knn, len(features) - 1)
            # The image itself comes first, also among exact copies of it.
            nearest = distances.fill_diagonal_(-1).topk(others + 1, largest=False)
            distances.fill_diagonal_(0)
            if self.config.affinity == "knn":
                affinity = torch.zeros_like(distances).scatter_(1, nearest.indices[:, 1:], 1.0)
            else:
                kth = nearest.values[:, min(self.config.knn, len(features)) - 1].clamp(min=0)
                width = kth.mean().clamp(min=1e-6)  # equal images, or a single one, have no distances
                affinity = (-0.5 * (distances / width).square()).exp()
        return (affinity + affinity.T) / 2 if self.config.symmetric else affinity


def _laplacian_optimisation(unary: Tensor, affinity: Tensor) -> Tensor:
    """The assignment of least energy, as log-probabilities (batch, classes), by concave-convex steps."""
    score, assigned = -unary, (-unary).softmax(1)
    energy = torch.full((), torch.inf, device=unary.device)
    done = torch.zeros((), dtype=torch.bool, device=unary.device)
    for step in range(MOST_STEPS):
        pairwise = affinity @ assigned
        score = torch.where(done, score, pairwise - unary)
        assigned = score.softmax(1)
        new_energy = (unary * assigned - pairwise * assigned + assigned * assigned.clamp(min=1e-20).log()).sum()
        if step > 1:
            done = done | ((new_energy - energy).abs() <= TOLERANCE * energy.abs())
            if done.device.type == "cpu" and done:  # a GPU is not waited for: its remaining steps change nothing
                break
        energy = new_energy
    return score.log_softmax(1)
