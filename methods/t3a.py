"""T3A: test-time template adjuster."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tta import taps
from tta.adapter import Adapter, Config, require
from tta.functional import entropy, matmul, usable


@dataclass
class T3AConfig(Config):
    """The default is that of later benchmarks on ImageNet-C; the paper chooses among 1, 5, 20, 50 and 100 on source data.

    Attributes:
        filter_k: support features kept for each class, those of lowest entropy.
    """

    filter_k: int = 20

    def __post_init__(self) -> None:
        require(self.filter_k >= 1, f"filter_k={self.filter_k}", "1 or more features for each class")


class T3A(Adapter):
    """Replace the linear head by templates: the mean feature of the surest test images of each class.

    Iwasawa and Matsuo, "Test-Time Classifier Adjustment Module for Model-Agnostic Domain Generalization", NeurIPS 2021.

    For any model with a linear head: one forward, no gradient. A class starts from its row of the head (the released
    code gives the row to the class that the head predicts for it). A batch joins the supports before it is predicted.
    Returned is the feature's inner product with each template, without bias: it grows with the length of the feature, so
    that its softmax is overconfident.
    """

    needs = "one class and one feature vector an image"
    config: T3AConfig
    supports: Tensor  # (classes, filter_k, width), zeros in an empty place
    entropies: Tensor  # (classes, filter_k), infinite in an empty place

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self._head = taps.head(self.model)
        head: Any = self.model.get_submodule(self._head)
        rows = head.weight.detach().float()
        empty = rows.new_zeros(len(rows), self.config.filter_k - 1, rows.shape[1])
        self.register_buffer("supports", torch.cat([rows[:, None], empty], dim=1))
        with torch.no_grad():
            known = entropy(head(head.weight))
        self.register_buffer("entropies", torch.cat([known[:, None], empty[..., 0] + torch.inf], dim=1))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        features, logits = taps.look(self.model, self._head, x)
        # One bad image keeps the whole batch out: NaN comes last in the order of entropies.
        self._remember(features, logits.argmax(1), entropy(logits).masked_fill(~usable(x), torch.nan))
        return self._scores(features)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """The features' inner products with the present templates, (batch, classes)."""
        return self._scores(taps.look(self.model, self._head, x)[0])

    def _remember(self, features: Tensor, labels: Tensor, entropies: Tensor) -> None:
        """Of the supports and the newcomers, each class keeps the ``filter_k`` of lowest entropy."""
        classes, places = self.entropies.shape
        own = torch.arange(classes, device=labels.device)
        features = torch.cat([self.supports.flatten(0, 1), features])
        labels = torch.cat([own.repeat_interleave(places), labels])
        entropies = torch.cat([self.entropies.flatten(), entropies])
        order = entropies.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # by class, then entropy
        first = torch.searchsorted(labels[order], own)
        kept = order[first[:, None] + torch.arange(places, device=labels.device)]
        self.supports.copy_(features[kept])
        self.entropies.copy_(entropies[kept])

    def _scores(self, features: Tensor) -> Tensor:
        templates = F.normalize(F.normalize(self.supports, dim=2).sum(1), dim=1)
        return matmul(features, templates.T)
