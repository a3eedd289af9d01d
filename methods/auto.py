"""Auto: the method that needs no choice, by statistics of a pool of images and a posterior of their labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tta import memory, norms, pooled
from tta.adapter import Adapter, Config, require
from tta.functional import logits_of
from tta.methods._chain import LabelChain, Labels
from tta.methods._doubt import Doubt

ENOUGH = 16  # images whose statistics may stand for their domain
CORRELATED_PRIOR = 2.0  # times ``prior`` where labels are correlated
REFERENCE = 16  # latest images that say what the present domain looks like, where batches are smaller


@dataclass
class AutoConfig(Config):
    """The constants are ours, chosen on streams that no published table holds.

    Attributes:
        posterior: answer by the posterior of the labels where they are correlated; ``False`` for the logits alone.
        prior: images that the source's statistics count as against those of the pool.
        memory_size: images kept, balanced over their predicted classes.
        evidence_for: standard errors by which neighbouring predictions must agree more than in a random order, for labels
            to count as correlated.
    """

    posterior: bool = True
    prior: float = 8.0
    memory_size: int = 64
    evidence_for: float = 3.5

    def __post_init__(self) -> None:
        require(self.prior > 0, f"prior={self.prior}", "images above 0")
        require(self.memory_size >= 1, f"memory_size={self.memory_size}", "1 or more images")
        require(self.evidence_for > 0, f"evidence_for={self.evidence_for}", "standard errors above 0")


class Auto(Adapter):
    """Statistics of the images that are like an image, and a posterior of labels that come in runs.

    No gradient, at most 3 forwards an image. Each image is normalised by the images of the batch that are like it at the first
    layer, and by the source's statistics, layer by layer the more the less the two differ beyond chance: so images of several
    domains may share a batch. While labels are correlated, and for batches below 16, a class-balanced memory joins the
    batch, each class weighing the same; such pools cost two forwards an image, which small batches save up for. Whether
    labels are correlated is decided by a permutation test on the order of the predictions, and by how class frequencies vary
    between batches. Then the answer is the posterior of a sticky chain of labels, or that under the batch's class
    frequencies. One batch in eight is compared with the source model; where the adapted predictions tell less of the
    classes than the source's (:class:`~tta.methods._doubt.Doubt`), the answer is the mean of both log-probabilities.

    A model without BatchNorm layers predicts as it is, with the posterior.

    Blend of statistics: Schneider et al., "Improving robustness against common corruptions by covariate shift adaptation",
    NeurIPS 2020. Memory: Yuan et al., "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023. Class frequencies: Saerens
    et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities: A Simple Procedure", Neural Computation 2002.
    """

    distributed = True
    needs = "one class an image, whose order in the stream it tests"
    config: AutoConfig
    correlated: Tensor
    credit: Tensor

    def configure_model(self) -> None:
        self.model.requires_grad_(False)
        self._pools = bool(norms.named_layers(self.model, norms.BATCH_NORMS))
        norms.blend_statistics(self.model, 1.0, pooled.PooledBatchNorm)
        self.labels_chain = LabelChain(self.config.evidence_for, 64)
        self.doubt = Doubt()
        self.memory = memory.BalancedMemory(self.config.memory_size, lambda_t=1.0, lambda_u=0.0)
        self.register_buffer("correlated", torch.zeros((), dtype=torch.bool))
        self.look: Tensor | None
        self.register_buffer("look", None)  # of the images that the kept statistics are of
        self.register_buffer("credit", torch.zeros((), dtype=torch.int64))  # images that may yet go through a pool

    def predict(self, x: Tensor) -> Tensor:
        """Logits by the batch, the kept statistics and the labels of the images around."""
        logits = self._first(x)
        if self._doubted():
            logits = _mean(logits, self._by_source(x))
        return self._answer(logits, self._read(logits))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        self.memory.check(x)
        logits = self._first(x)
        if not (self.workers.all(logits.isfinite()) and self.input_finite):
            return self.predict(x)  # nothing of a bad batch may be remembered
        others = self._compared(x, logits)
        logits = _mean(logits, others)
        found = self._read(logits)
        if self._pools:
            if not self._alone(x) or _correlated(found):
                logits, found = self._by_pool(x, logits, found, others)
            classes = self.workers.gathered(logits.argmax(1))[0].cpu()
            self.memory.add(x, classes, torch.zeros(len(classes)), classes=logits.shape[1])
        self.labels_chain.remember(found, self.input_finite)
        self.correlated.copy_(_correlated(found))
        return self._answer(logits, found)

    def _doubted(self) -> bool:
        """Whether the source's predictions are to be heard too."""
        return self._pools and not self.correlated and self.doubt.raised()

    def _compared(self, x: Tensor, logits: Tensor) -> Tensor | None:
        """The source's logits of a batch that is compared, if they are to be heard.

        While labels are correlated nothing is: predictions of one class are no collapse then.
        """
        if not self._pools or self.correlated:
            return None
        if not self.doubt.due():
            self.doubt.skip()
            return None
        if not self._alone(x):
            self.credit.sub_(self.workers.total(x))  # a forward less for pools
        source = self._by_source(x)
        self.doubt.compare(self.workers.gathered(logits)[0], self.workers.gathered(source)[0])
        return source if self.doubt.raised() else None

    def _by_source(self, x: Tensor) -> Tensor:
        with pooled.by_source(self.model):
            return logits_of(self.model(x))

    def _alone(self, x: Tensor) -> bool:
        """Whether a batch's own statistics may stand for its domain."""
        return self.workers.total(x) >= ENOUGH and not self.correlated

    def _read(self, logits: Tensor) -> Labels:
        """The reading of the whole batch, of all workers, with the posterior of this worker's images."""
        whole, mine = self.workers.gathered(logits)
        found = self.labels_chain.read(whole)
        return found._replace(chained=found.chained[mine])

    def _first(self, x: Tensor) -> Tensor:
        """Logits by the statistics of the batch and the source, or by the kept ones as far as the batch looks alike."""
        alone = self._alone(x)
        if not self._pools or (self.look is None and not alone):
            return logits_of(self.model(x))
        pool = pooled.Pool(pooled.alike, self.config.prior, None if alone else self.look, workers=self.workers)
        with pooled.pooling(self.model, pool):
            return logits_of(self.model(x))

    def _by_pool(self, x: Tensor, logits: Tensor, found: Labels, others: Tensor | None) -> tuple[Tensor, Labels]:
        """Logits by the statistics of the batch and the memory, which are kept, if there is credit for them."""
        count = self.workers.total(x)
        size = count + len(self.memory)
        self.credit.add_(2 * count).clamp_(max=count + self.config.memory_size)
        if self.credit < size:
            return logits, found
        self.credit.sub_(size)
        images, classes, recent = self._pool_of(x, logits.argmax(1))
        uneven = bool(_correlated(found) | self.correlated)

        def weights(looks: Tensor) -> Tensor:
            self.look = pooled.look(looks, recent)
            near = pooled.alike(looks)
            if not uneven:
                return near
            held = near.new_zeros(size, logits.shape[1]).index_add_(1, classes, near)  # images like each one, by class
            return near / (held[:, classes] + 0.5)

        prior = (CORRELATED_PRIOR if uneven else 1.0) * self.config.prior
        pool = pooled.Pool(weights, prior, recent=recent, workers=self.workers)
        with pooled.pooling(self.model, pool), norms.remembering(self.model):
            logits = _mean(logits_of(self.model(images))[: len(x)], others)
        return logits, self._read(logits)

    def _pool_of(self, x: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images of the batch and the memory, their predicted classes, and whether they show what the domain looks like now.

        Of several workers each takes its part of the memory, in which all hold the same; classes and the last are of all images.
        """
        recent = torch.ones(len(x), dtype=torch.bool, device=x.device)
        slots = (self.memory.labels >= 0).nonzero()[:, 0][self.workers.rank :: self.workers.size]
        images = x
        if self.memory.samples is not None and len(slots):
            latest = self.memory.ages[slots] <= REFERENCE - self.workers.total(x)
            images = torch.cat((x, self.memory.samples[slots.to(x.device)].to(x.dtype)))
            classes = torch.cat((classes, self.memory.labels[slots].to(x.device)))
            recent = torch.cat((recent, latest.to(x.device)))
        return images, self.workers.gathered(classes)[0], self.workers.gathered(recent)[0]

    def _answer(self, logits: Tensor, found: Labels) -> Tensor:
        if not self.config.posterior:
            return logits
        by_frequency = logits.log_softmax(1) + found.prior.log()
        # Without pools a domain in which the model prefers a class looks as if its labels did.
        uneven = found.uneven & self._pools
        return torch.where(found.sticky, found.chained, torch.where(uneven, by_frequency, logits))


def _mean(logits: Tensor, others: Tensor | None) -> Tensor:
    """The mean of log-probabilities; the logits as they are without others."""
    return logits if others is None else (logits.log_softmax(1) + others.log_softmax(1)) / 2


def _correlated(found: Labels) -> Tensor:
    return found.staying | found.uneven
