"""Bounds and tests of a mean that hold at all times at once, however often one looks."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LARGEST_BET = 0.75  # the constant c of the paper
MEMORY = 64  # values after which one weighs half in the bets to come
DOUBT = 16  # values that stand for "no difference", so that the first few do not decide the bets
SPREAD = 0.25  # mean square of these
ROUND = 64  # values after which the next part of the money is put in


@dataclass
class LowerBound:
    """Lower bound of the mean of bounded values, at every time with probability 1 - level.

    The empirical-Bernstein confidence sequence with predictable plug-in: Waudby-Smith and Ramdas, "Estimating means of
    bounded random variables by betting", JRSS B 2024, theorem 2, one-sided; Howard et al., "Time-uniform, nonparametric,
    nonasymptotic confidence sequences", Annals of Statistics 2021. It holds for values whose mean given the past does not
    change; if these means change and are at most m each, the bound stays below m.

    Attributes:
        level: probability that the bound is ever above the mean, in (0, 1).
        low: smallest possible value.
        high: largest possible value.
        count: values seen.
    """

    level: float
    low: float
    high: float
    count: int = 0
    total: float = 0.0  # all sums below are of values scaled to [0, 1]
    squares: float = 0.0  # of the distances to the running means
    bets: float = 0.0
    weighted: float = 0.0
    price: float = 0.0

    def update(self, values: NDArray[np.floating[Any]]) -> None:
        """Add values, shape (n,), in the order in which they arrived.

        Raises:
            ValueError: a value is not between ``low`` and ``high``.
        """
        if not len(values):
            return
        x = (values.astype(np.float64) - self.low) / (self.high - self.low)
        if not ((x > -1e-6) & (x < 1 + 1e-6)).all():
            raise ValueError(f"Values are between {self.low} and {self.high}; got {values.min()} to {values.max()}.")
        times = self.count + np.arange(1, len(x) + 1)
        totals = self.total + np.cumsum(x)
        means = (0.5 + totals) / (times + 1)
        mean_before = np.concatenate([[(0.5 + self.total) / (self.count + 1)], means[:-1]])
        squares = self.squares + np.cumsum(np.square(x - means))
        squares_before = np.concatenate([[self.squares], squares[:-1]])
        variance_before = (0.25 + squares_before) / times
        bets = np.minimum(
            np.sqrt(2 * math.log(1 / self.level) / (variance_before * times * np.log1p(times))), LARGEST_BET
        )
        self.bets += float(bets.sum())
        self.weighted += float((bets * x).sum())
        self.price += float((np.square(x - mean_before) * (-np.log1p(-bets) - bets)).sum())
        self.count, self.total, self.squares = int(times[-1]), float(totals[-1]), float(squares[-1])

    @property
    def value(self) -> float:
        """The bound now; ``low`` before the first value."""
        if not self.count:
            return self.low
        bound = (self.weighted - math.log(1 / self.level) - self.price) / self.bets
        return self.low + (self.high - self.low) * max(0.0, bound)

    @property
    def mean(self) -> float:
        """Plain mean of the values; NaN before the first."""
        return self.low + (self.high - self.low) * self.total / self.count if self.count else math.nan


@dataclass
class Bet:
    """Test whether the mean of values in [-1, 1] is above a threshold, at all times with false alarms of at most ``level``.

    Money is bet on each value before it is seen: ``money *= 1 + bet * (value - threshold)``. If the mean of each value given those
    before it is at most the threshold, no bets make money on average, and from 1 to begin with it ever becomes ``1 / level`` with
    probability ``level`` at most (Ville's inequality). Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", JRSS B 2024, section 4; with values -1, 0 and 1 it needs half as many as :class:`LowerBound`.

    The bets follow the latest values, and the money is put in by parts, 6 / (pi j)^2 for j = 1, 2, ..., one every 64 values and
    one at each restart, so that what was long ago weighs little.

    Attributes:
        level: probability that it ever finds what is not there, in (0, 1).
        threshold: that the mean must be above.
        found: whether the money was ever enough since the last restart.
        parts: of the money put in so far.
        money: in play.
        count: values since the last restart.
        weight: of the latest values, older ones weigh less; likewise the sums below.
        total: of the values.
        squares: of their distances to the threshold.
    """

    level: float
    threshold: float
    found: bool = False
    parts: int = 0
    money: float = 0.0
    count: int = 0
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Bet on a value, in [-1, 1], that comes after those before it."""
        if self.count % ROUND == 0:
            self.parts += 1
            self.money += 6 / (math.pi * self.parts) ** 2
        above = value - self.threshold
        edge = (self.total - self.threshold * self.weight) / (self.weight + DOUBT)
        square = (self.squares + DOUBT * SPREAD) / (self.weight + DOUBT)
        largest = LARGEST_BET / max(1 + self.threshold, 1e-3)  # no value takes more than three quarters of the money
        self.money *= 1 + min(max(edge / square, 0.0), largest) * above
        kept = 0.5 ** (1 / MEMORY)
        self.weight, self.total = kept * self.weight + 1, kept * self.total + value
        self.squares = kept * self.squares + above**2
        self.count += 1
        self.found = self.found or self.money >= 1 / self.level

    def restart(self) -> None:
        """Forget the values; the money already put in is lost, so that the level holds over all restarts."""
        self.found, self.count = False, 0
        self.money = self.weight = self.total = self.squares = 0.0

    @property
    def mean(self) -> float:
        """Mean of the latest values; 0 before the first."""
        return self.total / self.weight if self.weight else 0.0
