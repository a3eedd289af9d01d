"""Monitor: decides without labels whether an adapter has become worse than the frozen source model."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from tta.guard.bounds import Bet

SCORES = (-0.5, 1.0)  # clipped: the narrower the range, the fewer images the test needs
HALF_LIFE = 256  # compared images, after which one weighs half in the means
# Classes over which the predictions of a source that is believed under a shift spread at least; in fog and contrast those of the
# digits CNN spread over 1.0 to 1.5 in 32 images, and it is wrong on 89 %.
WITNESS = 2.5
SHIFTED = 0.4  # input shift, see tta.guard.shift
MANY = 32  # images whose predicted classes say something by themselves; of smaller batches the latest that together have as many
STRIDE = 4  # pixels of maps
ROOT = 0.25  # of the pixels of a class, by which it weighs
# Images for which a map stands in the lengths above and below: its classes together say more than one class.
PICTURE = 4
SUMS = ("scored", "harm", "seen", "belief", "own_belief")
ENOUGH = 128  # compared images, before the predicted classes say anything or a trial is passed


def harm(adapted: Tensor, source: Tensor) -> Tensor:
    """Harm score of each prediction: above 0 on average if the adapter is likely worse than the source model.

    With ``p`` the probabilities of the source and ``q`` those of the adapter, ``s`` and ``a`` their predicted classes::

        (p[s] - p[a])  -  (1 - p[s])  -  ((q[a] - q[s]) - (p[s] - p[a])) / 2

    The first term is the risk that the adapter adds by the source's belief, the second the risk that the source gives
    itself: an adapter may overrule a source as often as that expects to be wrong. The third compares how sure the two are
    where they disagree.

    Args:
        adapted: logits (batch, classes) of the adapter, or maps (batch, classes, height, width).
        source: those of the source model on the same images.

    Returns:
        (batch,), clipped to -0.5 to 1; -0.5 where logits are not finite. Of a map first the mean over the pixels of each class
        that the source predicts, then over these classes, of which one weighs by the fourth root of its pixels: of all pixels
        alike, a map of nothing but background would do little harm, and batch statistics much that mend a source in noise
        (CamVid: +0.18; so -0.04); of all classes alike, stray pixels of an unsure source would hide any harm.
    """
    p, q = source.double().softmax(1), adapted.double().softmax(1)
    s, a = p.argmax(1, keepdim=True), q.argmax(1, keepdim=True)
    believed = p.gather(1, s)
    lost, gained = believed - p.gather(1, a), q.gather(1, a) - q.gather(1, s)
    scores = (lost - (1 - believed) - (gained - lost) / 2)[:, 0]
    scores = scores.nan_to_num(SCORES[0]).clamp(*SCORES)
    return scores if scores.dim() == 1 else _by_class(scores.flatten(1), s.flatten(1), source.shape[1])


def _by_class(scores: Tensor, predicted: Tensor, classes: int) -> Tensor:
    """Weighted mean over the predicted classes of a picture of the mean score of each: (pictures, pixels) twice -> (pictures,)."""
    none = scores.new_zeros(len(scores), classes)
    total = none.scatter_add(1, predicted, scores)
    count = none.scatter_add(1, predicted, torch.ones_like(scores))
    weight = count**ROOT
    return (weight * total / count.clamp(min=1)).sum(1) / weight.sum(1)


def some_pixels(logits: Tensor) -> Tensor:
    """Every :data:`STRIDE`-th pixel of every such row of maps: neighbours say the same, and all would take 16 times as long."""
    return logits if logits.dim() == 2 else logits[:, :, ::STRIDE, ::STRIDE]


@dataclass
class Monitor:
    """Comparison of an adapter with its frozen source model, on images that both have predicted.

    Two signs raise an alarm:

    * **risk**: the mean :func:`harm` is above ``tolerance`` by a sequential test (:class:`tta.guard.bounds.Bet`). If the mean
      harm given the past never is above ``tolerance``, the probability of a single such alarm, however long the stream, is at most
      ``level``. That is proved; that the score follows the error is not, it is measured (see ``docs/reliability.md``). The
      design, a proxy of the loss in a sequential test, is that of Schirmer et al., "Monitoring Risks in Test-Time
      Adaptation", NeurIPS 2025, who compare with labelled source data.
    * **collapse**: the adapter's predictions are spread over less than half as many classes (the exponential of the
      entropy of their histogram) as the source's, and the source gives them less than a third of the belief that it gives
      its own. A heuristic, for models that are so unsure of themselves that the first sign would allow anything.

    A source model that has collapsed is no witness: where its predictions are of few classes, the adapter's are not, and the
    images are far from the source's, nothing is compared. (Images of one class in a row look like the source's.)

    Of maps a picture is one sample, as its pixels are not independent of one another: its harm and belief are means over
    the classes in it, its histogram of classes is the mean over its pixels.

    Attributes:
        classes: number of classes.
        level: probability of a false alarm by risk.
        tolerance: mean harm that is allowed.
        test: of the risk.
    """

    classes: int
    level: float
    tolerance: float
    test: Bet = field(init=False)
    scored: float = 0.0  # images with a score, older ones weigh less; likewise the sums below
    harm: float = 0.0
    seen: float = 0.0  # compared images
    belief: float = 0.0  # of the source in the adapter's classes
    own_belief: float = 0.0  # of the source in its own
    predicted: Tensor = field(init=False)  # (2, classes), classes of the adapter and of the source
    latest: Tensor = field(init=False)  # (batches, 2, classes), the same of the latest MANY images

    def __post_init__(self) -> None:
        self.predicted = torch.zeros(2, self.classes, dtype=torch.float64)
        self.latest = torch.zeros(0, 2, self.classes, dtype=torch.float64)
        self.test = Bet(self.level, self.tolerance, low=SCORES[0])

    @property
    def mean(self) -> float:
        """Mean harm of the latest images; NaN before the first."""
        return self.harm / self.scored if self.scored else math.nan

    def restart(self) -> None:
        """Forget what was compared: the adapter is another one from now on. The level already spent stays spent."""
        self.scored = self.harm = self.seen = self.belief = self.own_belief = 0.0
        self.predicted.zero_()
        self.latest = self.latest[:0]
        self.test.restart()

    def update(self, adapted: Tensor, source: Tensor, shift: float = 0.0) -> str:
        """Compare predictions of the same images, both (batch, classes) or maps; the reason of an alarm, empty without one.

        ``shift`` is how far the images are from the source's, see :class:`tta.guard.shift.InputShift`.
        """
        scores = harm(adapted, source).tolist()
        self._count(adapted.detach(), source)
        if shift > SHIFTED:
            spread, of_source = _spread(self.latest.sum(0))
            if of_source < WITNESS and spread > 2 * of_source:
                return ""
        stands_for = 1 if adapted.dim() == 2 else PICTURE
        kept = 0.5 ** (len(scores) * stands_for / HALF_LIFE)
        self.scored, self.harm = kept * self.scored + len(scores), kept * self.harm + sum(scores)
        for score in scores:
            self.test.add(score)
        if self.test.found:
            return f"risk: harm {self.mean:+.2f} a prediction, surely above {self.tolerance:+.2f}"
        return self._collapse(ENOUGH / stands_for)

    def _count(self, adapted: Tensor, source: Tensor) -> None:
        """Add the predicted classes to the counts."""
        p = source.double().softmax(1)
        a, s = (logits.argmax(1, keepdim=True) for logits in (adapted, source))
        belief, own_belief = (p.gather(1, found)[:, 0] for found in (a, s))
        half_life = HALF_LIFE
        if adapted.dim() > 2:
            half_life //= PICTURE
            belief, own_belief = (
                _by_class(each.flatten(1), s.flatten(1), self.classes) for each in (belief, own_belief)
            )
        kept = 0.5 ** (len(a) / half_life)
        counts = torch.stack([torch.bincount(found.flatten(), minlength=self.classes) for found in (a, s)])
        counts = counts.double().cpu() / a[0].numel()  # pixels, 1 of a classifier
        self.predicted = kept * self.predicted + counts
        self.latest = torch.cat([self.latest, counts[None]])
        images = self.latest[:, 0].sum(1)
        after = images.flip(0).cumsum(0).flip(0) - images  # images of later batches
        self.latest = self.latest[after.round() < MANY]
        self.seen = kept * self.seen + len(a)
        self.belief = kept * self.belief + float(belief.sum())
        self.own_belief = kept * self.own_belief + float(own_belief.sum())

    def _collapse(self, enough: float) -> str:
        if self.seen < enough or self.belief > self.own_belief / 3:
            return ""
        spread, of_source = _spread(self.predicted)
        if spread > of_source / 2:
            return ""
        return f"collapse: predictions spread over {spread:.1f} classes, the source's over {of_source:.1f}"

    def numbers(self) -> dict[str, Any]:
        """The state but for the tensors, as JSON can hold it."""
        return {"test": asdict(self.test)} | {name: getattr(self, name) for name in SUMS}

    def load(self, numbers: dict[str, Any], predicted: Tensor, latest: Tensor | None) -> None:
        """Take over a state of :meth:`numbers` and the tensors beside it, the second of which earlier versions had not."""
        self.test = Bet(**numbers["test"])
        for name in SUMS:
            setattr(self, name, numbers[name])
        self.predicted = predicted.clone()
        if latest is not None:
            self.latest = latest.clone()


def _spread(counts: Tensor) -> tuple[float, float]:
    """Classes over which the predictions of the adapter and of the source spread: the exponential of their entropy."""
    shares = counts / counts.sum(1, keepdim=True)
    spread, of_source = torch.special.entr(shares).sum(1).exp().tolist()
    return spread, of_source
