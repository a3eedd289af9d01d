"""SimATTA: active adaptation, from the labels of a few samples chosen by clustering."""

from dataclasses import dataclass
from typing import Literal

import torch
from sklearn.cluster import KMeans
from torch import Tensor, nn

from tta import norms, taps
from tta.adapter import Adapter, FeedbackConfig, Told, require
from tta.functional import entropy
from tta.memory import LabelledQueue

FEW = 0.2  # weight of labelled anchors at most, while there are few source-like ones


@dataclass
class SimATTAConfig(FeedbackConfig):
    """The defaults are the paper's for VLCS: SGD 1e-3.

    Attributes:
        statistics: that BatchNorm layers normalise by: the ``"source"``'s, as in the paper, or the ``"batch"``'s.
        e_high: entropy, nats, from which a sample may be asked about.
        e_low: entropy of the source model, nats, below which a sample is source-like.
        clusters: number of clusters when it first asks.
        clusters_increase: number by which the clusters grow each time it asks; None for as many as it may ask about, so that
            old anchors do not use up the budget of labels; published is 1.
        source_capacity: source-like anchors kept; the paper keeps all.
        target_capacity: labelled anchors kept; the paper keeps all.
        source_per_batch: source-like samples taken of a batch, the surest.
        cold_start: source-like anchors below which labelled ones weigh 0.2 at most.
        anchors_per_step: anchors of each kind in a step.
        steps: optimizer steps per batch; the paper's, without this cap, go on until the loss of the labelled stays.
    """

    optimizer: Literal["adam", "sgd", "adamw"] = "sgd"
    steps: int = 10
    statistics: Literal["source", "batch"] = "source"
    e_high: float = 1e-2
    e_low: float = 1e-3
    clusters: int = 10
    clusters_increase: int | None = None
    source_capacity: int = 500
    target_capacity: int = 300
    source_per_batch: int = 100
    cold_start: int = 100
    anchors_per_step: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.statistics in ("source", "batch"), f"statistics={self.statistics!r}", "'source' or 'batch'")
        require(self.e_high >= 0, f"e_high={self.e_high}", "an entropy, 0 or more")
        require(self.e_low >= 0, f"e_low={self.e_low}", "an entropy, 0 or more")
        increase = self.clusters_increase
        require(increase is None or increase >= 0, f"clusters_increase={increase}", "0 or more, or None")
        require(self.cold_start >= 0, f"cold_start={self.cold_start}", "0 or more anchors")
        for name in ("clusters", "source_capacity", "target_capacity", "source_per_batch", "anchors_per_step"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")


class SimATTA(Adapter):
    """Learn the labels of chosen samples, and the source model's own where it is sure, so that nothing is forgotten.

    Gui et al., "Active Test-Time Adaptation: Theoretical Analyses and An Algorithm", ICLR 2024.

    Asked about are uncertain samples of the last batch, one from each cluster of features that holds no sample asked about
    before, the largest clusters first. All parameters adapt, on labelled and source-like anchors, whose share of the loss is
    their share of the anchors. A batch is predicted, and learned from when the next arrives, so that answers to it may come in
    between. Without any answer it learns from the source-like samples alone, which changes little.
    """

    uses_feedback = ("labels",)
    needs = "one class an image, which the answers are about"
    config: SimATTAConfig
    clusters: Tensor  # number of clusters the next time it asks

    def configure_model(self) -> None:
        self.model.requires_grad_(True)
        for _, layer in norms.named_layers(self.model) if self.config.statistics == "batch" else ():
            norms.use_batch_statistics(layer)
        self.head = taps.head(self.model)
        self.source_like = LabelledQueue(self.config.source_capacity)
        self.labelled = LabelledQueue(self.config.target_capacity)
        self.register_buffer("clusters", torch.tensor(self.config.clusters))

    def adapt(self, x: Tensor) -> Tensor:
        if not self.input_finite:  # nothing of a bad batch may become an anchor, or hold back what the last one teaches
            with torch.no_grad():
                return self.predict(x)
        self._learn()
        with torch.no_grad():
            logits = self.predict(x)
            self._find_source_like(x)
        return logits

    def _find_source_like(self, x: Tensor) -> None:
        """Remember the samples of which the source model is surest, with its predictions."""
        logits = self.predict_as_source(x)
        entropies = entropy(logits)
        surest = entropies.argsort()[: self.config.source_per_batch]
        surest = surest[entropies[surest] < self.config.e_low]
        if len(surest):
            self.source_like.add(x[surest], logits[surest].argmax(1).cpu())

    # ------------------------------------------------------------------ learning

    def _learn(self) -> None:
        """Steps on equal numbers of anchors of both kinds, drawn at random."""
        kinds = (self.source_like, self.labelled)
        if not any(map(len, kinds)):
            if self.waiting.samples is not None:
                self.nothing_to_learn()
            return
        share = self._share_of_labelled()
        for _ in range(self.config.steps):
            drawn = [self._drawn(anchors) for anchors in kinds if len(anchors)]
            logits = torch.split(self.predict(torch.cat([images for images, _ in drawn])), [len(y) for _, y in drawn])
            losses = [nn.functional.cross_entropy(own, labels) for own, (_, labels) in zip(logits, drawn, strict=True)]
            sure = losses[0] if len(self.source_like) else losses[0].new_zeros(())
            labelled = losses[-1] if len(self.labelled) else losses[0].new_zeros(())
            self.update((1 - share) * sure + share * labelled)

    def _share_of_labelled(self) -> float:
        """Weight of the labelled anchors in the loss."""
        sure, labelled = len(self.source_like), len(self.labelled)
        share = labelled / (labelled + sure)
        return min(share, FEW) if sure < self.config.cold_start else share

    def _drawn(self, anchors: LabelledQueue) -> tuple[Tensor, Tensor]:
        """Images and labels of some anchors of a kind."""
        images, labels = anchors.contents()
        chosen = torch.randperm(len(images), generator=self.generator)[: self.config.anchors_per_step].to(images.device)
        return images[chosen], labels[chosen]

    # ------------------------------------------------------------------ asking

    def be_told(self, answers: Told) -> None:
        assert answers.labels is not None
        self.labelled.add(answers.images, answers.labels, answers.notes)

    def choose(self, count: int) -> Tensor:
        """Of each cluster without a sample asked about before, the one nearest to the centre; the largest clusters first."""
        fresh = self.waiting.open(1)
        features, logits = taps.look(self.model, self.head, self.waiting.images(fresh))
        uncertain = (entropy(logits) >= self.config.e_high).cpu()
        fresh, features = fresh[uncertain], features.cpu()[uncertain]
        if not len(fresh):
            return fresh
        known, weights = self._asked_before()
        points = torch.cat([known.view(-1, features.shape[1]), features])
        groups = min(max(int(self.clusters), count), len(points))
        increase = self.config.clusters_increase
        self.clusters += count if increase is None else increase
        cluster, distance = self._grouped(points, torch.cat([weights, torch.ones(len(fresh))]), groups)
        of_known, of_fresh = torch.split(cluster, [len(known), len(fresh)])
        size = torch.bincount(of_fresh, minlength=groups)
        held = torch.bincount(of_known, minlength=groups)
        self._weigh_more((size / held.clamp(min=1))[of_known])
        nearest = _first_of(of_fresh, distance[len(known) :], groups)
        asking = ((held == 0) & (size > 0)).nonzero()[:, 0]
        asking = asking[size[asking].argsort(descending=True, stable=True)][:count]
        slots = fresh[nearest[asking]]
        self.waiting.notes[slots] = size[asking].float()
        return slots

    def _asked_before(self) -> tuple[Tensor, Tensor]:
        """Features and weights of the labelled anchors and of the samples that an answer is awaited for."""
        pending = self.waiting.pending()
        images = [self.labelled.contents()[0]] if len(self.labelled) else []
        images += [self.waiting.images(pending)] if len(pending) else []
        weights = torch.cat([self.labelled.weights[self.labelled.slots()], self.waiting.notes[pending]])
        if not images:
            return torch.zeros(0), weights
        return taps.look(self.model, self.head, torch.cat(images))[0].cpu(), weights

    def _weigh_more(self, by: Tensor) -> None:
        """Add to the weights of the samples of :meth:`_asked_before`: they stand for the new ones of their clusters too."""
        slots, pending = self.labelled.slots(), self.waiting.pending()
        of_labelled, of_pending = torch.split(by, [len(slots), len(pending)])
        self.labelled.weights[slots] += of_labelled
        self.waiting.notes[pending] += of_pending

    def _grouped(self, points: Tensor, weights: Tensor, groups: int) -> tuple[Tensor, Tensor]:
        """Cluster of each point by weighted k-means, and its distance to the centre."""
        seed = int(torch.randint(2**31 - 1, (), generator=self.generator))
        found = KMeans(groups, n_init=10, random_state=seed).fit(points.numpy(), sample_weight=weights.numpy())
        cluster = torch.from_numpy(found.labels_).long()
        return cluster, (points - torch.from_numpy(found.cluster_centers_)[cluster]).norm(dim=1)


def _first_of(cluster: Tensor, distance: Tensor, groups: int) -> Tensor:
    """Place of the point nearest to the centre of each cluster, -1 for a cluster without a point."""
    by_distance = distance.argsort(stable=True)
    order = by_distance[cluster[by_distance].argsort(stable=True)]  # by cluster, then by distance
    sizes = torch.bincount(cluster, minlength=groups)
    starts = sizes.cumsum(0) - sizes
    return torch.where(sizes > 0, order[starts.clamp(max=len(order) - 1)], -1)
