"""Doubt in adapted predictions: whether they tell less of the classes than the source model's, by mutual information."""

import math

import torch
from torch import Tensor, nn

WINDOW = 64  # images after which what was seen counts by half
FEWEST = 16  # images without which there is no doubt
EVERY = 8  # batches, of which one is compared while there is no doubt
LEAST = 0.06  # times ln(classes): loss of information that is held against the adapted predictions


class Doubt(nn.Module):
    """A comparison of adapted predictions with the source model's on the same images, without labels.

    Of each it estimates the mutual information of image and label, entropy of the mean prediction minus mean entropy: large
    where single images are told apart surely, 0 where all get the same class, however surely. Statistics of few images
    leave a model of many classes unsure, sometimes unsure rather than wrong; the mean of both log-probabilities is then better
    than either.

    Information as a sign of good predictions: Bridle, Heading and MacKay, "Unsupervised Classifiers, Mutual Information and
    'Phantom Targets'", NeurIPS 1991.
    """

    sums: Tensor | None  # (2, classes), faded sum of the predictions, adapted and source
    entropies: Tensor  # (2,), faded sums
    images: Tensor  # faded number
    batches: Tensor  # since the last comparison; the first one is compared

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("sums", None)
        self.register_buffer("entropies", torch.zeros(2))
        self.register_buffer("images", torch.zeros(()))
        self.register_buffer("batches", torch.tensor(EVERY - 1))

    @property
    def information(self) -> Tensor:
        """Mutual information of the adapted and of the source predictions, in nats, (2,); zeros before any comparison."""
        if self.sums is None:
            return torch.zeros_like(self.entropies)
        images = self.images.clamp(min=1e-12)
        return _entropy(self.sums / images) - self.entropies / images

    def raised(self) -> bool:
        """Whether the adapted predictions tell so much less that the source's are to be heard too."""
        if self.sums is None or self.images < FEWEST:
            return False
        adapted, source = self.information
        return bool(adapted < source - LEAST * math.log(self.sums.shape[1]))

    def due(self) -> bool:
        """Whether the next batch is to be compared."""
        return self.raised() or bool(self.batches >= EVERY - 1)

    @torch.no_grad()
    def skip(self) -> None:
        """Count a batch that is not compared."""
        self.batches.add_(1)

    @torch.no_grad()
    def compare(self, adapted: Tensor, source: Tensor) -> None:
        """Take in two predictions, logits (batch, classes), of the same images; of values that are not finite nothing is kept."""
        both = torch.stack((adapted, source)).float().softmax(-1)
        fading = 0.5 ** (both.shape[1] / WINDOW)
        sums, entropies = both.sum(1), _entropy(both).sum(1)
        good = sums.isfinite().all()
        held = torch.zeros_like(sums) if self.sums is None else self.sums
        self.sums = torch.where(good, held * fading + sums, held)
        self.entropies.copy_(torch.where(good, self.entropies * fading + entropies, self.entropies))
        self.images.copy_(torch.where(good, self.images * fading + both.shape[1], self.images))
        self.batches.zero_()


def _entropy(probabilities: Tensor) -> Tensor:
    summed: Tensor = torch.special.entr(probabilities).sum(-1)
    return summed
