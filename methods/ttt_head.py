"""TTT of the head: for each image a linear head of its own, trained on its nearest labelled neighbours."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tta import norms, taps
from tta.adapter import Adapter, Config, require
from tta.source import Need

PUBLISHED = {"together": 1e-2, "sequential": 3e-3}  # learning rates for ImageNet


@dataclass
class TTTHeadConfig(Config):
    """The defaults are the released code's for a linear head on ImageNet.

    Attributes:
        neighbours: labelled source images, the nearest to an image, that its head is trained on; all if there are fewer.
        lr: of Adam, with which each head starts anew; None for ``0.01`` together, ``0.003`` sequential.
        learn: the neighbours ``"together"`` in each step, or ``"sequential"``, one a step, once, the nearest first.
        steps: on all neighbours together; 0 is the source model.
        local: predict by a ``"head"``, or as the paper's comparison by the ``"votes"`` of the neighbours: how many a class has.
        capacity: labelled source images remembered, a random sample; the paper remembers all of the training set.
        search: ``"exact"``, by Euclidean distance; or from Python a callable that maps features (batch, width), those
            remembered (images, width) and a number to the indices (batch, number) of the nearest, such as an index of faiss.
        heads_at_once: images whose heads are trained at once; fewer need less memory, which holds four times the heads.
        batch_statistics: BatchNorm layers normalise by the batch, of the source images too, else by the source's statistics.
        source_batch_size: source images per batch, if so.
    """

    neighbours: int = 60
    lr: float | None = None
    learn: Literal["together", "sequential"] = "together"
    steps: int = 50
    local: Literal["head", "votes"] = "head"
    capacity: int = 50_000
    search: Any = "exact"
    heads_at_once: int = 64
    batch_statistics: bool = False
    source_batch_size: int = 64

    def __post_init__(self) -> None:
        require(self.learn in PUBLISHED, f"learn={self.learn!r}", "'together' or 'sequential'")
        require(self.local in ("head", "votes"), f"local={self.local!r}", "'head' or 'votes'")
        self.lr = PUBLISHED[self.learn] if self.lr is None else self.lr
        require(self.lr > 0, f"lr={self.lr}", "a learning rate above 0")
        require(self.steps >= 0, f"steps={self.steps}", "0 or more")
        known = self.search == "exact" or callable(self.search)
        require(known, f"search={self.search!r}", "'exact', or from Python a callable")
        for name in ("neighbours", "capacity", "heads_at_once", "source_batch_size"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class TTTHead(Adapter):
    """Predict each image by a linear head of its own, trained on the labelled source images nearest to it.

    Hübotter et al., "Specialization after Generalization: Towards Understanding Test-Time Training in Foundation Models",
    arXiv 2509.24510 2025.

    Each head starts from the model's and is forgotten after its prediction: nothing is learned from the stream, and the order
    of the images makes no difference. The paper explains why this helps on images of the source domain, where the model is too
    small for all classes at once; of shifted images the neighbours may be of other classes. ``source=`` gives labelled images,
    of which the features are remembered.
    """

    needs = "one class and one feature vector an image"
    config: TTTHeadConfig
    features: Tensor  # (images, width), of the source
    labels: Tensor  # (images,)

    @classmethod
    def source_needs(cls, model: nn.Module, config: TTTHeadConfig) -> list[Need]:
        by_batch = config.batch_statistics
        size = config.source_batch_size if by_batch else None
        settings = {"samples": config.capacity}
        statistics: Literal["batch", "source"] = "batch" if by_batch else "source"
        return [Need("labelled_features", (taps.head(model),), statistics, size, labels=True, settings=settings)]

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        for _, layer in norms.named_layers(self.model, norms.BATCH_NORMS) if self.config.batch_statistics else ():
            norms.use_batch_statistics(layer)
        self._head = taps.head(self.model)
        self.register_buffer("features", self.known[0]["features"])
        self.register_buffer("labels", self.known[0]["labels"])

    def adapt(self, x: Tensor) -> Tensor:
        return self.predict(x)

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Logits (batch, classes), each row by the image's own head in the place of the model's."""
        handle = self.model.get_submodule(self._head).register_forward_hook(self._answer)
        try:
            return super().predict(x)
        finally:
            handle.remove()

    def _answer(self, head: nn.Module, seen: tuple[Tensor], logits: Tensor) -> Tensor:
        with torch.autocast(logits.device.type, enabled=False):
            images = torch.split(seen[0].float(), self.config.heads_at_once)
            return torch.cat([self._by_own_heads(features, head) for features in images])

    def _by_own_heads(self, features: Tensor, head: Any) -> Tensor:
        """Logits (batch, classes) of features (batch, width)."""
        config = self.config
        nearest = self._nearest(features)
        neighbours, labels = self.features[nearest], F.one_hot(self.labels[nearest], head.out_features).float()
        if config.local == "votes":
            return labels.sum(1)
        weights = head.weight.float().repeat(len(features), 1, 1)
        biases = features.new_zeros(len(features), 1, head.out_features)
        heads = [weights] if head.bias is None else [weights, biases.add_(head.bias)]
        # Adam treats each number by itself: one for all heads is one for each.
        optimizer = torch.optim.Adam(heads, config.lr or 0.0)
        for part in self._rounds(nearest.shape[1]):
            inputs = neighbours[:, part]
            # The gradient of the mean cross-entropy in closed form: it needs no graph, and works in inference mode.
            wrong = torch.baddbmm(biases, inputs, weights.mT).softmax(2).sub_(labels[:, part]) / inputs.shape[1]
            weights.grad, biases.grad = wrong.mT @ inputs, wrong.sum(1, keepdim=True)
            optimizer.step()
        return torch.baddbmm(biases, features[:, None], weights.mT)[:, 0]

    def _nearest(self, features: Tensor) -> Tensor:
        """Indices (batch, neighbours) of the remembered images that are nearest, the nearest first."""
        number = min(self.config.neighbours, len(self.features))
        if self.config.search != "exact":
            found: Tensor = torch.as_tensor(self.config.search(features, self.features, number))
            return found.to(features.device)
        return torch.cdist(features, self.features).topk(number, largest=False).indices

    def _rounds(self, neighbours: int) -> Iterator[slice]:
        """The part of the neighbours that each step is made on."""
        if self.config.learn == "together":
            yield from [slice(None)] * self.config.steps
        else:
            yield from (slice(place, place + 1) for place in range(neighbours))
