"""Minimisation without gradients: an evolution strategy with all its state in buffers."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class CMAES(nn.Module):
    """Covariance matrix adaptation: sample a Gaussian, rank the samples, move the Gaussian towards the best of them.

    Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, with its constants and negative weights (active
    CMA); Hansen, "Injecting External Solutions into CMA-ES", arXiv 1110.4181. It computes as the package ``cma`` (4.5) does.

    Everything is float64 and stays on the CPU when the adapter moves. Memory is two matrices of ``dimension`` squared;
    their eigendecomposition is renewed only every ``dimension / 150`` rounds, about.

    Args:
        dimension: of the vectors.
        population: samples per round.
        sigma: standard deviation of the first samples, around zero.
    """

    mean: Tensor
    sigma: Tensor
    covariance: Tensor
    axes: Tensor  # eigenvectors of the covariance, in columns, as last computed
    lengths: Tensor  # square roots of its eigenvalues
    path: Tensor  # of the mean, for the covariance
    sigma_path: Tensor  # of the mean, for sigma, where the Gaussian is round
    rounds: Tensor
    rounds_decomposed: Tensor  # rounds before the last eigendecomposition

    def __init__(self, dimension: int, population: int, sigma: float = 1.0) -> None:
        super().__init__()
        n = dimension
        raw = math.log((population + 1) / 2) - torch.arange(1, population + 1, dtype=torch.float64).log()
        better, worse = raw.clamp(min=0), raw.clamp(max=0)
        better, worse = better / better.sum(), worse / -worse.sum()
        mass, mass_worse = (float(1 / part.square().sum()) for part in (better, worse))
        self.mass = mass
        self.rate_one = min(1, population / 6) * 2 / ((n + 1.3) ** 2 + mass)
        self.rate_mu = min(1 - self.rate_one, 2 * (mass - 1.75 + 1 / mass) / ((n + 2) ** 2 + mass))
        limits = (
            1 + self.rate_one / self.rate_mu,
            (1 - self.rate_one - self.rate_mu) / (n * self.rate_mu),
            1 + 2 * mass_worse / (mass + 2),
        )
        self.better, self.worse = better[raw > 0], min(limits) * worse[raw <= 0]
        self.rate_path = (4 + mass / n) / (n + 4 + 2 * mass / n)
        self.rate_sigma = min(0.5, (mass + 2) / (n + mass + 3))
        self.damping = 1 + 2 * max(0.0, math.sqrt((mass - 1) / (n + 1)) - 1) + self.rate_sigma
        self.usual_length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n**2))  # of a standard Gaussian vector
        self.wait = 1 / (self.rate_one + self.rate_mu) / n / 10

        spread = torch.exp(torch.arange(n, dtype=torch.float64) * (1e-4 / n))  # no two eigenvalues are equal
        zeros = torch.zeros(n, dtype=torch.float64)
        state = {
            "mean": zeros,
            "sigma": torch.tensor(sigma, dtype=torch.float64),
            "covariance": torch.diag(spread),
            "axes": torch.eye(n, dtype=torch.float64),
            "lengths": spread.sqrt(),
            "path": zeros.clone(),
            "sigma_path": zeros.clone(),
            "rounds": torch.zeros((), dtype=torch.int64),
            "rounds_decomposed": torch.zeros((), dtype=torch.int64),
        }
        for name, value in state.items():
            self.register_buffer(name, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CMAES":
        """Stay on the CPU, in float64."""
        return self

    def ask(self, normals: Tensor) -> Tensor:
        """Samples (number, dimension) made of standard normal ``normals`` of that shape."""
        if self.rounds > 0 and self.rounds >= self.rounds_decomposed + self.wait:
            self.covariance.copy_((self.covariance + self.covariance.T) / 2)
            values, vectors = torch.linalg.eigh(self.covariance)
            self.lengths.copy_(values.clamp(min=1e-14).sqrt())
            self.axes.copy_(vectors)
            self.rounds_decomposed.copy_(self.rounds)
        return self.mean + self.sigma * ((self.lengths * normals) @ self.axes.T)

    def tell(self, solutions: Tensor, fitness: Tensor, injected: int = 0) -> None:
        """Learn from one round.

        Args:
            solutions: (number, dimension), at least as many as half the population.
            fitness: (number,), smaller is better.
            injected: number of solutions, the last ones, that are not samples of this round: their steps are shortened
                if they are improbably long.
        """
        n = len(self.mean)
        steps = (solutions - self.mean) / self.sigma
        longest = math.sqrt(n) + 2 * n / (n + 2)
        foreign = len(steps) - injected
        steps[foreign:] /= (self._round(steps[foreign:]).norm(dim=1, keepdim=True) / longest).clamp(min=1)
        steps = steps[fitness.argsort(stable=True)]

        move = self.better @ steps[: len(self.better)]
        self.mean += self.sigma * move
        self.rounds += 1
        rate = self.rate_sigma
        round_move = self._round(move) @ self.axes.T
        self.sigma_path.mul_(1 - rate).add_(round_move, alpha=math.sqrt(rate * (2 - rate) * self.mass))
        length = self.sigma_path.norm()
        settled = length.square() / (1 - (1 - rate) ** (2 * int(self.rounds))) / n < 2 + 4 / (n + 1)

        rate = self.rate_path
        self.path.mul_(1 - rate).add_(move * settled, alpha=math.sqrt(rate * (2 - rate) * self.mass))
        kept = 1.0 if settled else 1 - rate * (2 - rate)  # the tutorial's correction for a path that stands still
        zeros = steps.new_zeros(len(steps) - len(self.better) - len(self.worse))
        weights = torch.cat([self.better, zeros, self.worse]) * self.rate_mu
        total = self.rate_one * kept + weights.sum()
        # A bad step counts as if it were of the usual length: a long one would make the covariance indefinite.
        bad = n / (self._round(steps).norm(dim=1) + 1e-9).square()
        weights = torch.where(weights < 0, weights * bad, weights)
        self.covariance.mul_(1 - total).add_(self.rate_one * self.path.outer(self.path))
        self.covariance.add_((weights[:, None] * steps).T @ steps)
        change = self.rate_sigma / self.damping * (length / self.usual_length - 1)
        self.sigma *= change.clamp(-1, 1).exp()

    def _round(self, steps: Tensor) -> Tensor:
        """Steps (..., dimension) along the axes, in units of their lengths: standard normal for a sample."""
        return steps @ self.axes / self.lengths
