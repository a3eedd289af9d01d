"""Label posterior: a sticky chain of labels over the images of a stream, by forward-backward and EM on the predictions."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tta.functional import matmul

# Temperatures of the evidence. On a model's own images its probabilities hold (0.5 to 1); on corrupted ones they are too sure (2 to 3).
TEMPERATURES = (0.5, 1.0, 1.5, 2.0, 3.0)
TESTED = 2.0  # temperature of the predictions whose order is tested
TOTAL = 100.0  # images that the chain's uniform prior counts as, over all classes
PSEUDO = 10.0  # the same for the frequencies within one batch
START = 0.2  # probability to stay before anything was seen, worth 5 images
STEPS = 3  # of EM a batch; the counts of earlier batches are its start
WINDOW = 64  # images that smaller batches are tested together with
FEWEST = 32  # images without which the order tells nothing
UNEVEN = 2.0  # times the spread of batches drawn from the same frequencies


class Sweep(NamedTuple):
    """Posterior of the labels of a batch under a sticky chain; with more dimensions, of several chains (...).

    Attributes:
        labels: (batch, ..., classes), the posterior given all images of the batch.
        filtered: (..., classes), that of the last image.
        stays: (...), expected number of images that kept the label of the one before.
        jumps: (..., classes), expected numbers of labels drawn anew.
        log_likelihood: (...), of the evidence, in nats.
    """

    labels: Tensor
    filtered: Tensor
    stays: Tensor
    jumps: Tensor
    log_likelihood: Tensor


def sweep(evidence: Tensor, before: Tensor, prior: Tensor, rho: Tensor) -> Sweep:
    """Forward-backward over a batch: a label stays with probability ``rho``, else it is drawn from ``prior``.

    The chain is its own time reversal, so that both directions are one recursion, made together: a step costs a few
    operations on (2, ..., classes), without a transition matrix.

    Rabiner, "A Tutorial on Hidden Markov Models and Selected Applications in Speech Recognition", Proceedings of the IEEE 1989.

    Args:
        evidence: (batch, ..., classes), positive: how likely each image is under each label, up to a factor an image.
        before: (..., classes), distribution of the label before the first image; ``prior`` if there is none.
        prior: (..., classes), positive, of sum 1.
        rho: (...), in [0, 1).
    """
    rho = rho[..., None]
    drawn = (1 - rho) * prior
    both = torch.stack((evidence, evidence.flip(0)), dim=1)  # (batch, 2, ..., classes)
    state = torch.stack((before, prior))
    predicted, states, scales = [], [before], []
    for likely in both:
        ahead = rho * state + drawn
        joint = ahead * likely
        scale = joint.sum(-1, keepdim=True)
        state = joint / scale
        predicted.append(ahead)
        states.append(state[0])
        scales.append(scale[0])
    ahead, behind = torch.stack(predicted).unbind(1)
    earlier = torch.stack(states)
    labels = earlier[1:] * behind.flip(0) / prior
    labels = labels / labels.sum(-1, keepdim=True)
    stayed, jumped = labels * rho * earlier[:-1] / ahead, labels * drawn / ahead
    return Sweep(labels, earlier[-1], stayed.sum((0, -1)), jumped.sum(0), torch.stack(scales).log().sum((0, -1)))


def class_prior(evidence: Tensor, pseudo: float, steps: int = 5) -> Tensor:
    """Frequencies of the classes in a batch of independent labels, by EM, with ``pseudo`` images spread over all classes.

    Saerens et al., "Adjusting the Outputs of a Classifier to New a Priori Probabilities: A Simple Procedure", Neural
    Computation 2002.

    Args:
        evidence: (batch, ..., classes), positive.
        pseudo: images, above 0.
        steps: of EM.

    Returns:
        (..., classes).
    """
    count, classes = len(evidence), evidence.shape[-1]
    prior = torch.full_like(evidence[0], 1 / classes)
    for _ in range(steps):
        joint = evidence * prior
        members = (joint / joint.sum(-1, keepdim=True)).sum(0)
        prior = (members + pseudo / classes) / (count + pseudo)
    return prior


def log_likelihood(evidence: Tensor, prior: Tensor) -> Tensor:
    """Log-likelihood of the evidence (batch, ..., classes) under labels drawn independently from ``prior``, (...), in nats."""
    return (evidence * prior).sum(-1).log().sum(0)


def serial_correlation(rows: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Agreement of neighbouring rows beyond that of a random order, and the variance of it.

    Their ratio, sum / sqrt(variance), is about standard normal for rows in random order, whatever their distribution: a
    permutation test with its moments in closed form.

    Wald and Wolfowitz, "An Exact Test for Randomness in the Non-Parametric Case Based on Serial Correlation", The Annals
    of Mathematical Statistics 1943.

    Args:
        rows: (n, width), n of 3 or more.
        valid: (n,), boolean, of the rows that count, one run of them; all if left out.

    Returns:
        The sum of the products of neighbours minus its mean over all orders, and its variance over them; scalars.
    """
    valid = torch.ones_like(rows[:, 0]) if valid is None else valid.to(rows.dtype)
    count = valid.sum().clamp(min=1)
    rows = (rows - matmul(valid, rows) / count) * valid[:, None]
    products = matmul(rows, rows.T)
    neighbours = products.diagonal(1).sum()
    own = products.diagonal().sum()
    squares = products.square().sum() - products.diagonal().square().sum()
    return neighbours + own / count, squares / count


def spread(rows: Tensor, mean: Tensor, weight: Tensor) -> Tensor:
    """Distance of the mean of some rows from an earlier mean, 1 on average where both are of the same distribution.

    The ratio of the variance between to the variance within, summed over the columns; a scalar.

    Args:
        rows: (n, width), n of 2 or more.
        mean: (width,), the earlier one.
        weight: number of rows that it is of; the result is 0 while that is 0.
    """
    count = len(rows)
    centred = rows - rows.mean(0)
    within = centred.square().sum() / (count - 1)
    between = (rows.mean(0) - mean).square().sum()
    ratio = between / (within * (1 / count + 1 / weight)).clamp(min=1e-12)
    return torch.where(weight > 0, ratio, 0)


class Labels(NamedTuple):
    """Reading of a batch of predictions.

    Attributes:
        chained: (batch, classes), log-probabilities by the chain.
        sticky: whether the order of the stream's images shows that labels stay, and the chain explains this batch better
            than class frequencies do; a boolean scalar.
        staying: the former of the two alone.
        uneven: whether batches have class frequencies of their own, a boolean scalar.
        prior: (classes,), the batch's class frequencies by EM.
        state: what is to be remembered.
    """

    chained: Tensor
    sticky: Tensor
    staying: Tensor
    uneven: Tensor
    prior: Tensor
    state: dict[str, Tensor]


class LabelChain(nn.Module):
    """A sticky chain of labels, fitted to a stream of predictions without labels, and two tests of how labels arrive.

    A model may be right to be sure on clean images and wrong to be on others. So there is a chain for each of some temperatures
    of its predictions; the one answers that lately explained the predictions best: sharp ones are likely where neighbours
    confirm them, soft ones where they contradict. Counts of labels that stayed and jumped fade by half over ``memory`` images.

    *Do labels stay?* If the order of the images within a batch carries no information, neighbours agree as often as in a random
    order: :func:`serial_correlation`, in standard errors, summed over batches. A miscalibrated model predicts one class too
    often in any order, which this test does not see; nor do its thresholds depend on the number of classes.

    *Are batches uneven?* :func:`spread` of the predictions of a batch against those of earlier batches.

    Args:
        threshold: standard errors from which on labels stay.
        memory: images.
    """

    counts: Tensor | None  # (temperatures, classes), faded number of labels drawn anew
    filtered: Tensor | None  # (temperatures, classes), distribution of the last label; zeros before the first
    mean: Tensor | None  # (classes,), of earlier predictions
    recent: Tensor | None  # (WINDOW, classes), predictions of the last images, zeros while there are fewer
    stays: Tensor  # (temperatures,)
    fitness: Tensor  # (temperatures,), faded log-likelihoods
    agreement: Tensor  # (2,): faded sum of serial correlations, and their variance
    unevenness: Tensor  # faded sum of spreads and their weight
    seen: Tensor  # faded number of images
    images: Tensor  # in recent
    temperatures: Tensor

    def __init__(self, threshold: float, memory: int) -> None:
        super().__init__()
        self.threshold, self.memory = threshold, memory
        for name in ("counts", "filtered", "mean", "recent"):
            self.register_buffer(name, None)
        self.register_buffer("temperatures", torch.tensor(TEMPERATURES), persistent=False)
        self.register_buffer("stays", torch.zeros(len(TEMPERATURES)))
        self.register_buffer("fitness", torch.zeros(len(TEMPERATURES)))
        self.register_buffer("agreement", torch.zeros(2))
        self.register_buffer("unevenness", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("images", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def read(self, logits: Tensor) -> Labels:
        """The posterior of the labels of a batch of logits (batch, classes), and its regime; remembers nothing."""
        logits = logits.detach().float()
        probabilities = logits.softmax(1)
        evidence = (logits[:, None] / self.temperatures[:, None]).softmax(-1)
        chain, state = self._chain(evidence)
        best = state["fitness"].argmax()
        tested, agreement = self._agreement((logits / TESTED).softmax(1))
        state |= agreement | self._unevenness(probabilities)
        staying = tested[0] > self.threshold * tested[1].sqrt()
        sticky = staying & ((chain.log_likelihood > _independent(evidence))[best] | (len(logits) < FEWEST))
        uneven = state["unevenness"][0] > UNEVEN * state["unevenness"][1]
        chained = chain.labels[:, best].clamp(min=torch.finfo(torch.float32).tiny).log()
        return Labels(
            chained, sticky, staying, uneven & (len(logits) >= FEWEST), class_prior(probabilities, PSEUDO), state
        )

    @torch.no_grad()
    def remember(self, labels: Labels, when: Tensor) -> None:
        """Take over the state that :meth:`read` found, if ``when``, a boolean scalar, is true and all of it is finite."""
        good = when & torch.stack([value.isfinite().all() for value in labels.state.values()]).all()
        for name, value in labels.state.items():
            held = getattr(self, name)
            setattr(self, name, torch.where(good, value, torch.zeros_like(value) if held is None else held))

    def _fading(self, count: int) -> float:
        return float(0.5 ** (count / self.memory))

    def _chain(self, evidence: Tensor) -> tuple[Sweep, dict[str, Tensor]]:
        """The sweeps over a batch after EM, and the counts and the last label's distribution after them."""
        fading = self._fading(len(evidence))
        counts = torch.zeros_like(evidence[0]) if self.counts is None else self.counts * fading
        stays, filtered = self.stays * fading, torch.zeros_like(counts) if self.filtered is None else self.filtered
        drawn, stayed = counts, stays
        for _ in range(STEPS):
            prior = (drawn + TOTAL / drawn.shape[1]) / (drawn.sum(1, keepdim=True) + TOTAL)
            rho = (stayed + 5 * START) / (stayed + drawn.sum(1) + 5)
            swept = sweep(evidence, torch.where(filtered.any(), filtered, prior), prior, rho)
            drawn, stayed = counts + swept.jumps, stays + swept.stays
        fitness = self.fitness * fading + swept.log_likelihood
        return swept, {"counts": drawn, "stays": stayed, "filtered": swept.filtered, "fitness": fitness}

    def _agreement(self, evidence: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum and variance that decide whether labels stay, and what is kept of them."""
        count, seen = len(evidence), torch.zeros_like(self.images) if self.recent is None else self.images
        held = evidence.new_zeros(WINDOW, evidence.shape[1]) if self.recent is None else self.recent
        recent = torch.cat((held, evidence))[-WINDOW:]
        fading = self._fading(count)
        faded = self.agreement * evidence.new_tensor([fading, fading**2])
        if count >= WINDOW:
            tested = kept = faded + torch.stack(serial_correlation(evidence))
        else:
            valid = torch.arange(WINDOW, 0, -1, device=evidence.device) <= seen + count
            present = torch.stack(serial_correlation(recent, valid))
            tested, kept = (
                torch.where(valid.sum() >= FEWEST, faded + present, present.new_tensor([0.0, 1.0])),
                self.agreement,
            )
        images = (seen + count).clamp(max=WINDOW)
        return tested, {"agreement": kept, "recent": recent, "images": images}

    def _unevenness(self, probabilities: Tensor) -> dict[str, Tensor]:
        """The faded mean of the predictions and sum of the spreads of batches about it."""
        count = len(probabilities)
        mean = torch.zeros_like(probabilities[0]) if self.mean is None else self.mean
        seen = self.seen * self._fading(count) ** 0.5
        unevenness = self.unevenness
        if count >= FEWEST:
            unevenness = unevenness * self._fading(count)
            ratio = spread(probabilities, mean, seen)
            unevenness = unevenness + count * torch.stack((ratio, (seen > 0).to(ratio.dtype)))
        mean = (seen * mean + probabilities.sum(0)) / (seen + count)
        return {"unevenness": unevenness, "mean": mean, "seen": seen + count}


def _independent(evidence: Tensor) -> Tensor:
    """Log-likelihood of independent labels of the batch's own frequencies, less what they gain by chance, (...), in nats.

    Fitted frequencies gain half a nat for each class that they choose among.
    """
    frequencies = class_prior(evidence, PSEUDO)
    among = (-(frequencies * frequencies.log()).sum(-1)).exp()
    return log_likelihood(evidence, frequencies) - (among - 1) / 2
