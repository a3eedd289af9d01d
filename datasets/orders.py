"""Orders of domains and samples, and how they are drawn: the building blocks of the protocols."""

import random
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Domain, Visit
from tta.datasets.stream import Schedule

Positions = NDArray[np.int64]
Planned = tuple[list[Domain], Schedule]  # the rows of the results, and the order of arrival

# Ten random orders of the fifteen corruptions: Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022 (CoTTA).
ORDERS: tuple[tuple[str, ...], ...] = tuple(
    tuple(line.split())
    for line in """
brightness pixelate gaussian_noise motion_blur zoom_blur glass_blur impulse_noise jpeg_compression defocus_blur elastic_transform shot_noise frost snow fog contrast
jpeg_compression shot_noise zoom_blur frost contrast fog defocus_blur elastic_transform gaussian_noise brightness glass_blur impulse_noise pixelate snow motion_blur
contrast defocus_blur gaussian_noise shot_noise snow frost glass_blur zoom_blur elastic_transform jpeg_compression pixelate brightness impulse_noise motion_blur fog
shot_noise fog glass_blur pixelate snow elastic_transform brightness impulse_noise defocus_blur frost contrast gaussian_noise motion_blur jpeg_compression zoom_blur
pixelate glass_blur zoom_blur snow fog impulse_noise brightness motion_blur frost jpeg_compression gaussian_noise shot_noise contrast defocus_blur elastic_transform
motion_blur snow fog shot_noise defocus_blur contrast zoom_blur brightness frost elastic_transform glass_blur gaussian_noise pixelate jpeg_compression impulse_noise
frost impulse_noise jpeg_compression contrast zoom_blur glass_blur pixelate snow defocus_blur motion_blur brightness elastic_transform shot_noise fog gaussian_noise
glass_blur zoom_blur impulse_noise fog snow jpeg_compression gaussian_noise frost shot_noise brightness contrast motion_blur pixelate defocus_blur elastic_transform
defocus_blur motion_blur zoom_blur shot_noise gaussian_noise glass_blur jpeg_compression fog contrast pixelate frost snow brightness elastic_transform impulse_noise
contrast gaussian_noise defocus_blur zoom_blur frost glass_blur jpeg_compression fog pixelate elastic_transform shot_noise impulse_noise snow motion_blur brightness
""".strip().splitlines()
)


def check_parameter(condition: bool, name: str, given: object, expected: str) -> None:
    """Raise a ValueError with the expected and the given value of a parameter, unless the condition holds."""
    if not condition:
        raise ValueError(f"{name} is {expected}; got {given!r}.")


def arranged(domains: Sequence[Domain], order: int | str | None) -> list[Domain]:
    """The domains in one of the ten orders; as given if ``order`` is None."""
    if order is None:
        return list(domains)
    if not isinstance(order, int) or not 0 <= order < len(ORDERS):
        raise ValueError(f"order is 0 to {len(ORDERS) - 1}; got {order!r}.")
    if strange := [domain.name for domain in domains if domain.name not in CORRUPTIONS]:
        raise ValueError(f"order={order} is an order of the fifteen corruptions; '{strange[0]}' is none of them.")
    return sorted(domains, key=lambda domain: ORDERS[order].index(domain.name))


def visits(domains: Iterable[Domain]) -> list[Domain]:
    """One row per visit of a domain: the first is the domain itself, later ones are numbered."""
    seen: Counter[str] = Counter()
    rows: list[Domain] = []
    for domain in domains:
        seen[domain.name] += 1
        rows.append(domain if seen[domain.name] == 1 else Visit(domain, seen[domain.name]))
    return rows


def stored(domain: Domain, seed: int, shuffle: bool) -> Tensor:
    """All positions of a domain, as stored or shuffled."""
    return shuffled(len(domain.index), seed) if shuffle else torch.arange(len(domain.index))


def shuffled(count: int, seed: int) -> Tensor:
    """0 to count - 1 as Python's generator shuffles them."""
    positions = list(range(count))
    random.Random(seed).shuffle(positions)
    return torch.tensor(positions, dtype=torch.int64)


def samples(domains: Sequence[Domain]) -> Tensor:
    """All samples, domain after domain: (samples, 2), number of the domain and position in it."""
    positions = [torch.arange(len(domain.index)) for domain in domains]
    return torch.cat([torch.stack([torch.full_like(where, n), where], 1) for n, where in enumerate(positions)])


def one_stream(order: Tensor, batch_size: int) -> Schedule:
    """Batches that cross domains."""
    return Schedule(order, tuple(len(part) for part in torch.split(order, batch_size) if len(part)), batch_size)


def cut(items: Positions, share: NDArray[np.float64]) -> list[Positions]:
    """Items in consecutive runs, one per share; if the shares are NaN, the last run gets all items.

    Shares are NaN when a small concentration underflows. The released code then cuts at NaN, with the same result.
    """
    ends = np.nan_to_num(np.cumsum(share)[:-1] * len(items), nan=0.0, posinf=0.0)
    return np.split(items, ends.astype(int))


def by_class(labels: Tensor, delta: float, min_size: int, seed: int) -> Tensor:
    """Positions sorted by class (stable), or in Dirichlet chunks if ``delta`` is above 0."""
    if delta == 0:
        return torch.sort(labels, stable=True).indices
    return torch.from_numpy(dirichlet_chunks(labels.numpy(), delta, min_size, np.random.RandomState(seed)))


ATTEMPTS = 1000  # draws of a whole order before giving up on chunks that are large enough


def dirichlet_chunks(labels: Positions, delta: float, min_size: int, rng: np.random.RandomState) -> Positions:
    """Positions in as many chunks as classes; a chunk holds each class as one run, and a full chunk gets no more."""
    if not len(labels):
        return np.arange(0)
    labels = labels - min(0, labels.min())  # an unknown class, -1, counts as a class of its own
    classes = int(labels.max()) + 1
    of_class = [np.flatnonzero(labels == one) for one in range(classes)]
    if classes * min_size > len(labels):
        raise ValueError(
            f"{len(labels)} samples do not fill {classes} chunks with {min_size} each: lower min_size, or set delta=0."
        )
    for _ in range(ATTEMPTS):
        sizes = np.zeros(classes, dtype=np.int64)
        runs: list[list[Positions]] = []  # for each class its run in each chunk
        for members in of_class:
            members = members.copy()
            rng.shuffle(members)
            with np.errstate(invalid="ignore"):  # 0 / 0 if only full chunks were drawn
                share = rng.dirichlet(np.repeat(delta, classes)) * (sizes < len(labels) / classes)
                runs.append(cut(members, share / share.sum()))
            sizes += [len(run) for run in runs[-1]]
        if sizes.min() >= min_size:
            break
    else:
        raise ValueError(
            f"No order with at least {min_size} samples in each of {classes} chunks in {ATTEMPTS} attempts: raise delta "
            f"(now {delta}), or lower min_size."
        )
    positions = []
    for chunk in range(classes):
        turn = np.arange(classes)
        rng.shuffle(turn)
        positions += [runs[one][chunk] for one in turn]
    return np.concatenate(positions)


# SAR's script wrote the files of these ratios one after another in one process, shuffling the classes anew for each, so
# that the file of a ratio has the shuffle of its place in the list: 1000 the second, 500000 the seventh.
RATIOS = (1, 1000, 2000, 3000, 4000, 5000, 500_000)


def class_turn(classes: int, imbalance: float, seed: int) -> list[int]:
    """Numbers of the classes in the order in which SAR lets them prevail; a ratio that it has no file of: first shuffle."""
    generator = random.Random(seed)
    turn: list[int] = []
    for _ in range(RATIOS.index(imbalance) + 1 if imbalance in RATIOS else 1):
        turn = list(range(classes))  # shuffled from the start each time, as there
        generator.shuffle(turn)
    return turn


def imbalanced(labels: Positions, imbalance: float, total: int, seed: int) -> Positions:
    """Positions drawn with replacement, one class after the other being the most frequent."""
    known = np.unique(labels)
    classes = len(known)
    check_parameter(total >= classes, "total", total, f"{classes} or more (a draw for each class)")
    turn = class_turn(classes, imbalance, seed)
    rng = np.random.RandomState(2022)
    draws = rng.random_sample((classes, total // classes))
    drawn = np.empty_like(draws, dtype=np.int64)
    rare = 1 / (imbalance + classes - 1)
    for step, prevalent in enumerate(turn):
        probability = np.full(classes, rare)
        probability[prevalent] = rare * imbalance
        below = probability.cumsum()
        drawn[step] = (below / below[-1]).searchsorted(draws[step], side="right")
    drawn = drawn.ravel()
    positions = np.empty_like(drawn)
    for number, one in enumerate(known):
        members, here = np.flatnonzero(labels == one), drawn == number
        if here.any():
            positions[here] = members[rng.randint(0, len(members), int(here.sum()))]
    return positions


def with_prior(labels: Positions, prior: float, total: int | None, seed: int) -> Positions:
    """Shuffled positions whose class frequencies are drawn from a Dirichlet distribution."""
    rng = np.random.default_rng(seed)
    known = np.unique(labels)
    frequency = rng.dirichlet(np.ones(len(known)) * prior)
    of_class = [np.flatnonzero(labels == one) for one in known]
    most = min(len(members) / share for members, share in zip(of_class, frequency, strict=True))
    wanted = int(most) * frequency if total is None else total * frequency / np.sum(frequency)
    chosen: list[int] = []
    for one, members, count in zip(known, of_class, wanted.astype(int), strict=True):
        if count > len(members):
            raise ValueError(
                f"The prior asks for {count} samples of class {one}, which has {len(members)}: lower total (now {total}), "
                "or raise prior."
            )
        chosen += members[rng.permutation(len(members))[:count]].tolist()
    if total is not None and len(chosen) < total:
        left = np.setdiff1d(np.arange(len(labels)), chosen)
        chosen += rng.choice(left, total - len(chosen), replace=False).tolist()
    np.random.default_rng(seed).shuffle(chosen)
    return np.array(chosen, dtype=np.int64)
