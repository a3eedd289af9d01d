"""Auto: the method that needs no choice, by statistics of a pool of images and a posterior of their labels."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tta import memory, norms, pooled
from tta.adapter import Adapter, Config, require
from tta.functional import logits_of
from tta.methods._chain import LabelChain, Labels

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
    """Statistics of whichever images tell most of the present domain, and a posterior of labels that come in runs.

    No gradient, at most 3 forwards an image. A batch of 16 or more whose labels look independent is normalised by its own
    statistics and the source's, the latter more the less the two differ. Otherwise by a pool of the batch and a
    class-balanced memory, each class weighing the same, memories of another domain little; pools cost two forwards
    an image, which small batches save up for. Whether labels are correlated is decided by a permutation test on the order of
    the predictions, and by how class frequencies vary between batches. Then the answer is the posterior of a sticky
    chain of labels, or that under the batch's class frequencies.

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
        self.memory = memory.BalancedMemory(self.config.memory_size, lambda_t=1.0, lambda_u=0.0)
        self.register_buffer("correlated", torch.zeros((), dtype=torch.bool))
        self.look: Tensor | None
        self.register_buffer("look", None)  # of the images that the kept statistics are of
        self.register_buffer("credit", torch.zeros((), dtype=torch.int64))  # images that may yet go through a pool

    def predict(self, x: Tensor) -> Tensor:
        """Logits by the batch, the kept statistics and the labels of the images around."""
        logits = self._first(x)
        return self._answer(logits, self._read(logits))

    @torch.no_grad()
    def adapt(self, x: Tensor) -> Tensor:
        self.memory.check(x)
        logits = self._first(x)
        found = self._read(logits)
        if not (self.workers.all(logits.isfinite()) and self.input_finite):
            return self._answer(logits, found)  # nothing of a bad batch may be remembered
        if self._pools and (not self._alone(x) or _correlated(found)):
            logits, found = self._by_pool(x, logits, found)
        if self._pools:
            classes = self.workers.gathered(logits.argmax(1))[0].cpu()
            self.memory.add(x, classes, torch.zeros(len(classes)), classes=logits.shape[1])
        self.labels_chain.remember(found, self.input_finite)
        self.correlated.copy_(_correlated(found))
        return self._answer(logits, found)

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
        ones = torch.ones(len(x), device=x.device)
        known = None if alone else self.look
        with pooled.pooling(self.model, pooled.Pool(ones, self.config.prior, known, self.workers)):
            return logits_of(self.model(x))

    def _by_pool(self, x: Tensor, logits: Tensor, found: Labels) -> tuple[Tensor, Labels]:
        """Logits by the statistics of the batch and the memory, which are kept, if there is credit for them."""
        count = self.workers.total(x)
        size = count + len(self.memory)
        self.credit.add_(2 * count).clamp_(max=count + self.config.memory_size)
        if self.credit < size:
            return logits, found
        self.credit.sub_(size)
        images, classes, recent = self._pool_of(x, logits.argmax(1))
        balance, prior = torch.ones(size, device=x.device), self.config.prior
        if _correlated(found) | self.correlated:
            held = logits.new_zeros(logits.shape[1]).index_add_(0, classes, balance)
            balance, prior = 1 / (held[classes] + 0.5), CORRELATED_PRIOR * prior

        def weights(looks: Tensor) -> Tensor:
            self.look = pooled.look(looks, recent)
            return balance * pooled.resemblance(looks, recent)

        pool = pooled.Pool(weights, prior, workers=self.workers)
        with pooled.pooling(self.model, pool), norms.remembering(self.model):
            logits = logits_of(self.model(images))[: len(x)]
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


def _correlated(found: Labels) -> Tensor:
    return found.staying | found.uneven
