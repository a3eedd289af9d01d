"""A network that corrects a classifier for the class frequencies of a stream, trained on labelled source features.

Reconstructed from what others wrote of Park et al., "Label Shift Adapter for Test-Time Adaptation under Covariate and
Label Shifts", ICCV 2023; there is no released code, and the constants are ours.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LARGEST_IMBALANCE = 100.0  # the most frequent class over the rarest one, among the priors trained for
BATCH_SIZE, LR = 256, 1e-3


class ShiftNetwork(nn.Module):
    """A scale and shift of the features and of the classifier's logits, computed from the class frequencies.

    The published adapter adds a whole matrix to the classifier's weights; here it is a scale for each class, because a
    matrix would need classes * width outputs. The frequencies enter as logarithms relative to equal ones. The network
    changes nothing before it is trained.

    Args:
        classes: of the classifier.
        width: of its features.
        hidden: of this network.
    """

    def __init__(self, classes: int, width: int, hidden: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(classes, hidden), nn.Linear(hidden, 2 * width + 2 * classes)
        # The share of the logarithms that is added to the logits directly, without the hidden layer.
        self.direct = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> "ShiftNetwork":
        """The network of a state dictionary, with its weights."""
        hidden, classes = state["inner.weight"].shape
        width = len(state["outer.bias"]) // 2 - classes
        network = cls(classes, width, hidden).to(state["inner.weight"].device)
        network.load_state_dict(dict(state))
        return network

    def forward(self, features: Tensor, prior: Tensor, head: nn.Module) -> Tensor:
        """Logits (batch, classes) for a stream whose classes have these frequencies.

        Args:
            features: (batch, width).
            prior: (classes,), above 0, sums to 1.
            head: the classifier on these features.
        """
        width, classes = features.shape[1], len(prior)
        relative = (prior * classes).log()
        parts = torch.split(self.outer(self.inner(relative).relu()), [width, width, classes, classes])
        scale, shift, class_scale, class_shift = parts
        logits: Tensor = head((1 + scale) * features + shift).float()
        return (1 + class_scale) * logits + class_shift + self.direct * relative


def bounded(prior: Tensor) -> Tensor:
    """Class frequencies raised to at least a tenth of the equal share, then scaled to sum 1."""
    prior = prior.clamp(min=0.1 / len(prior))
    return prior / prior.sum()


def long_tailed(classes: int, generator: torch.Generator) -> Tensor:
    """Random class frequencies that fall exponentially from class to class, in a random order, by a random ratio."""
    imbalance = float(torch.rand((), generator=generator)) * math.log(LARGEST_IMBALANCE)
    ranks = torch.randperm(classes, generator=generator) / max(1, classes - 1)
    return bounded((-imbalance * ranks).softmax(0))


def train(
    features: Tensor, labels: Tensor, prior: Tensor, head: nn.Module, *, hidden: int, iterations: int
) -> ShiftNetwork:
    """Train a network to give the logits that fit any class frequencies.

    Each iteration draws frequencies and minimises the cross-entropy of the logits corrected back to the source's
    frequencies, ``logits + log(source / drawn)``: the balanced softmax of Ren et al., "Balanced Meta-Softmax for
    Long-Tailed Visual Recognition", NeurIPS 2020, for any frequencies.

    Args:
        features: (images, width).
        labels: (images,).
        prior: (classes,), the source's frequencies.
        head: the classifier on these features; it stays as it is.
        hidden: width of the network.
        iterations: number of batches, of 256 images.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(
            0
        )  # torch.manual_seed would set those of GPUs too, and they are not put back
        network = ShiftNetwork(len(prior), features.shape[1], hidden).to(features.device)
    optimizer = torch.optim.Adam(network.parameters(), LR)
    source = bounded(prior).log()
    for _ in range(iterations):
        drawn = long_tailed(len(prior), generator).to(features.device)
        index = torch.randint(len(features), (BATCH_SIZE,), generator=generator).to(features.device)
        logits = network(features[index], drawn, head) + source - drawn.log()
        loss = F.cross_entropy(logits, labels[index])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return network
