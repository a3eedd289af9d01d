"""Protocols: which samples of which domains arrive when, each as the code that introduced it has it.

A protocol is a function of the domains (their labels, no image), a seed, a batch size and a few parameters of its own. It
gives the domains in the order of their rows in the results, and a :class:`~tta.datasets.stream.Schedule`. What it draws
comes from ``numpy.random.RandomState(seed)``, drawn in the order of the released code, unless that code draws otherwise.
"""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tta.datasets import ccc as walks
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import DatasetImages, Domain, Renamed, Visit, WithOutliers
from tta.datasets.stream import Schedule, check, in_turn

Positions = NDArray[np.int64]
Planned = tuple[list[Domain], Schedule]

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


# ---------------------------------------------------------------------- one domain after another


def continual(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """Domains one after another, the adapter is never reset.

    Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022. Every sample once; batches do not cross domains.

    Args:
        order: 0 to 9, one of the ten random orders of the paper; left out, the stream's own.
        shuffle: each domain's images in an order drawn from the seed instead of as they are stored; the same in each
            domain, by Python's generator, as in the benchmark of Marsden et al. (WACV 2024).
    """
    rows = _arranged(domains, order)
    return rows, in_turn(((n, _stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


def per_domain(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """Domains one after another, reset before each.

    Wang et al., "Tent: Fully Test-Time Adaptation by Entropy Minimization", ICLR 2021. Parameters as ``continual``.
    """
    return continual(domains, seed, batch_size, order=order, shuffle=shuffle)


def episodic(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """Domains one after another, reset before every batch.

    Zhang et al., "MEMO: Test Time Robustness via Adaptation and Augmentation", NeurIPS 2022. Parameters as
    ``continual``.
    """
    return continual(domains, seed, batch_size, order=order, shuffle=shuffle)


def csc(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """Continual structured change: continual, by the name it has beside cdc.

    Zhang et al., "DPCore: Dynamic Prompt Coreset for Continual Test-Time Adaptation", ICML 2025. Parameters as
    ``continual``.
    """
    return continual(domains, seed, batch_size, order=order, shuffle=shuffle)


def batch_1(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """One image at a time whatever the batch size, domains one after another, reset before each.

    Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023 (SAR). Parameters as
    ``continual``.
    """
    return continual(domains, seed, 1, order=order, shuffle=shuffle)


def recurring(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    rounds: int = 10,
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """All domains again and again, never reset; each round has rows of its own (fog, fog@2, ...).

    Every sample once in each round, in the same order. Batches do not cross domains.

    Args:
        rounds: how often each domain comes; papers have 10 to 20.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    _require(rounds >= 1, "rounds", rounds, "1 or more")
    rows = _visits(_arranged(domains, order) * rounds)
    return rows, in_turn(((n, _stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


def gradual(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    first: str = "descending",
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """Each corruption rises to the stream's severity and falls again, never reset; rows fog-1, fog-2, ..., fog-1@2.

    Wang et al., CVPR 2022 (CoTTA), severity 5: the first corruption runs 5 to 1, each other 1 to 5 to 1. Every image
    once at each step; neighbouring steps differ by one severity. Every step has a row of its own, so that the
    mean error is the mean over all steps.

    Args:
        first: ``"descending"``, as above, or ``"full"``: the first corruption rises too (Marsden et al., WACV 2024).
        order: as in ``continual``; the paper's numbers are means over all ten.
        shuffle: as in ``continual``.
    """
    _require(first in ("descending", "full"), "first", first, "'descending' or 'full'")
    steps: list[Domain] = []
    for number, domain in enumerate(_arranged(domains, order)):
        if not hasattr(domain, "severity"):
            raise ValueError(f"Protocol 'gradual' needs domains with severities; '{domain.name}' has none.")
        _require(domain.severity % 1 == 0, "severity of protocol 'gradual'", domain.severity, "a whole number")
        severities = range(1, int(domain.severity) + 1)
        rising = [Renamed(domain.at(s), f"{domain.name}-{s}") for s in severities]  # type: ignore[attr-defined]
        if number > 0 or first == "full":
            steps += rising[:-1]
        steps += reversed(rising)
    rows = _visits(steps)
    return rows, in_turn(((n, _stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


def forgetting(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    clean: str | None = None,
    learn: bool = True,
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """The clean source domain after every other domain, never reset; its rows tell what has been forgotten.

    As in the benchmark of Marsden et al. (WACV 2024). Each domain once, the clean one after each of them (clean, clean@2,
    ...). Batches do not cross domains.

    Args:
        clean: which of the domains is the clean one; left out, the stream's images without their corruption.
        learn: whether the clean domain is learned from, as published; else it is only predicted.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    named = [domain for domain in domains if domain.name == clean]
    _require(clean is None or bool(named), "clean", clean, f"one of {', '.join(d.name for d in domains)}, or nothing")
    if not named and not hasattr(domains[0], "clean"):
        raise ValueError(
            f"Protocol 'forgetting' needs clean images; domain '{domains[0].name}' has none. Say which of your "
            "domains is the clean one with clean=NAME."
        )
    source: Domain = named[0] if named else domains[0].clean()  # type: ignore[attr-defined]
    others = _arranged([domain for domain in domains if domain.name != clean], order)
    rows = _visits([row for domain in others for row in (domain, source)])
    check(rows, batch_size)
    schedule = in_turn(((n, _stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)
    if learn:
        return rows, schedule
    owner = [int(part[0, 0]) for part in schedule.order.split(schedule.lengths)]  # type: ignore[no-untyped-call]
    return rows, replace(schedule, paused=tuple(number % 2 == 1 for number in owner))


def budget(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    cost: float | str = "measured",
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """Batches do not wait: while a slow method learns from one, the next are only predicted, by the latest model.

    Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints", ICML 2024. Domains one
    after another, never reset. Of every ceil(cost) batches the first is learned from.

    Args:
        cost: time of learning from a batch, in batches of the stream, 1 or more; ``"measured"``: the time the method
            takes over that of the source model's prediction, from a warm-up on the first batch.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    fits = cost == "measured" or (not isinstance(cost, str) and cost >= 1)
    _require(fits, "cost", cost, "a number, 1 or more, or 'measured'")
    rows, schedule = continual(domains, seed, batch_size, order=order, shuffle=shuffle)
    return rows, replace(schedule, cost=cost)


# ---------------------------------------------------------------------- mixed, and correlated in class


def mixed(domains: Sequence[Domain], seed: int, batch_size: int) -> Planned:
    """All domains shuffled into one stream, never reset; batches hold several domains.

    Marsden, Doebler & Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction", WACV 2024 (ROID), with Python's generator as in their code. Every sample once; only the last batch may be
    smaller.
    """
    everything = _samples(domains)
    return list(domains), _one_stream(everything[_shuffled(len(everything), seed)], batch_size)


def correlated(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    delta: float = 0.0,
    min_size: int = 10,
    mixed: bool = False,
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """Neighbouring images are of the same class: sorted, or in Dirichlet-distributed chunks; never reset.

    Sorted by class: Marsden et al., WACV 2024 (ROID). Chunks: Gong et al., "NOTE: Robust Continual Test-time
    Adaptation Against Temporal Correlation", NeurIPS 2022. Every sample once. As many chunks as classes; each holds at
    least ``min_size`` samples, and those of a class in one run. The generator starts anew in each domain. NOTE leaves
    out what remains after division by 64; nothing is left out here.

    Args:
        delta: 0 sorts by class. Above 0: concentration of the Dirichlet distribution, smaller = more correlated (the
            papers have 0.1 for 10 classes, 0.01 for 1000).
        min_size: fewest samples in a chunk.
        mixed: over all domains shuffled together instead of within each; batches then hold several domains.
        order: as in ``continual``.
        shuffle: each domain's images shuffled beforehand, as in ``continual``.
    """
    _require(delta >= 0, "delta", delta, "0 or more")
    rows = _arranged(domains, order)
    if mixed:
        shuffled = _shuffled(sum(len(domain.index) for domain in rows), seed)
        labels = torch.cat([domain.labels for domain in rows])[shuffled]
        return rows, _one_stream(_samples(rows)[shuffled][_by_class(labels, delta, min_size, seed)], batch_size)
    parts = []
    for number, domain in enumerate(rows):
        stored = _stored(domain, seed, shuffle)
        parts.append((number, stored[_by_class(domain.labels[stored], delta, min_size, seed)]))
    return rows, in_turn(parts, batch_size)


def ptta(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    gamma: float = 0.1,
    slots: int | None = None,
    order: int | str | None = "paper",
) -> Planned:
    """Practical TTA: domains change and classes come in Dirichlet-distributed slots, one stream, never reset.

    Yuan, Xie & Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023 (RoTTA). Every sample once, domain
    after domain; within a domain each class is spread over the slots by a Dirichlet draw, and makes one run in each.
    Batches cross domains; a last batch of a single sample is left out.

    Args:
        gamma: concentration of the Dirichlet distribution.
        slots: how many a domain; left out, as many as classes, 100 at most.
        order: as in ``continual``; ``"paper"``: order 5 if all fifteen corruptions are there, else the stream's own.
    """
    _require(gamma > 0, "gamma", gamma, "a number above 0")
    _require(slots is None or slots >= 1, "slots", slots, "1 or more")
    if order == "paper":
        order = 5 if {domain.name for domain in domains} == set(CORRUPTIONS) else None
    rows = _arranged(domains, order)  # type: ignore[arg-type]
    rng = np.random.RandomState(seed)
    classes = np.unique(torch.cat([domain.labels for domain in rows]).numpy())
    count = min(len(classes), 100) if slots is None else slots
    arrivals = []
    for number, domain in enumerate(rows):
        shares = rng.dirichlet([gamma] * count, len(classes))
        held: list[list[Positions]] = [[] for _ in range(count)]
        for one, share in zip(classes, shares, strict=True):
            for slot, run in zip(held, _cut(np.flatnonzero(domain.labels.numpy() == one), share), strict=True):
                slot.append(run)
        positions = np.concatenate([slot[i] for slot in held for i in rng.permutation(len(slot))])
        arrivals.append(np.stack([np.full_like(positions, number), positions], 1))
    everything = torch.from_numpy(np.concatenate(arrivals))
    lone = len(everything) % batch_size == 1 and batch_size > 1
    return rows, _one_stream(everything[: len(everything) - lone], batch_size)


def label_shift(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    imbalance: float = 500_000,
    prior: float | None = None,
    total: int | None = None,
    order: int | None = None,
) -> Planned:
    """The classes' frequencies drift online, or differ from the source's; images may come repeatedly; reset per domain.

    *Online imbalance*: Niu et al., ICLR 2023 (SAR). A step for each class, in shuffled order, of ``total / classes``
    draws; in it that class has ``imbalance`` times the probability of any other. Samples are drawn with replacement, the
    same in each domain. Only the order of the classes follows the seed (Python's generator); the draws are seeded
    with 2022, as in the released code.

    *Dirichlet prior* (``prior`` given): Zhao et al., "On Pitfalls of Test-Time Adaptation", ICML 2023 (TTAB). Class
    frequencies drawn once; as many samples as the most frequent class allows, none twice, shuffled (numpy's
    ``default_rng(seed)``, as there).

    Args:
        imbalance: 1 is uniform, 500 000 practically sorted by class.
        prior: concentration of the Dirichlet prior; TTAB has 4.
        total: draws a domain; left out, twice its samples. With ``prior``: samples a domain instead of as many as
            possible, random ones added where rounding leaves some out.
        order: as in ``continual``.
    """
    _require(imbalance >= 1, "imbalance", imbalance, "1 or more")
    _require(prior is None or prior > 0, "prior", prior, "a number above 0")
    _require(total is None or total >= 1, "total", total, "1 or more")
    rows = _arranged(domains, order)
    parts = []
    for number, domain in enumerate(rows):
        labels = domain.labels.numpy()
        positions = (
            _imbalanced(labels, imbalance, total or 2 * len(labels), seed)
            if prior is None
            else _with_prior(labels, prior, total, seed)
        )
        parts.append((number, torch.from_numpy(positions)))
    return rows, in_turn(parts, batch_size)


# ---------------------------------------------------------------------- batches of domains in turn


def cdc(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    draw: str = "dirichlet",
    delta: float = 1.0,
    slots: int = 3,
) -> Planned:
    """Continual dynamic change: domains come back several times, for a random number of batches; never reset.

    Zhang et al., "DPCore", ICML 2025. Every sample once, those of a domain in stored order; batches do not cross
    domains.

    Args:
        draw: ``"dirichlet"``: each domain's batches are spread over the slots by a Dirichlet draw, and a slot plays
            its domains in random order. ``"multinomial"``: again and again a domain that is not yet done, for a random
            number of its batches.
        delta: concentration of the Dirichlet distribution.
        slots: how often a domain comes at most; with ``"dirichlet"``.
    """
    _require(draw in ("dirichlet", "multinomial"), "draw", draw, "'dirichlet' or 'multinomial'")
    _require(delta > 0, "delta", delta, "a number above 0")
    _require(slots >= 1, "slots", slots, "1 or more")
    rows, rng = list(domains), np.random.RandomState(seed)
    # One more than fit, as in the released code: where the samples fill the batches, the last is empty and falls out.
    counts = [len(domain.index) // batch_size + 1 for domain in rows]
    turns = _slots(counts, delta, slots, rng) if draw == "dirichlet" else _takes(counts, rng)
    done: Counter[int] = Counter()
    parts = []
    for number, batches in turns:
        start = done[number] * batch_size
        done[number] += batches
        stop = min(done[number] * batch_size, len(rows[number].index))
        parts.append((number, torch.arange(start, max(start, stop))))
    return rows, in_turn(parts, batch_size)


def _slots(counts: Sequence[int], delta: float, slots: int, rng: np.random.RandomState) -> Iterator[tuple[int, int]]:
    """(domain, batches) in turn: shares of each domain over the slots, the domains of a slot shuffled."""
    shares = rng.dirichlet([delta] * slots, len(counts))
    runs = [[len(run) for run in _cut(np.arange(n), share)] for n, share in zip(counts, shares, strict=True)]
    for slot in range(slots):
        yield from ((int(number), runs[number][slot]) for number in rng.permutation(len(counts)))


def _takes(counts: Sequence[int], rng: np.random.RandomState) -> Iterator[tuple[int, int]]:
    """(domain, batches) in turn: a domain that has batches left, and how many of them, both uniform."""
    left = dict(enumerate(counts))
    while left:
        number = int(rng.choice(list(left), 1)[0])
        batches = int(rng.choice(np.arange(1, left[number] + 1)))
        left[number] -= batches
        if not left[number]:
            del left[number]
        yield number, batches


# ---------------------------------------------------------------------- two corruptions at a time


def ccc(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    target: float = 20.0,
    speed: int = 1000,
    total: int | None = None,
    matrix: Any = None,
    model: Any = None,
    per_cell: int = 200,
    grid: float = 0.5,
    recipe: str | None = None,
    cache: str | PurePath | None = None,
    progress: Any = None,
) -> Planned:
    """Continuously changing corruptions: two at a time, one turns into the next while accuracy stays the same; never reset.

    Press et al., "RDumb: A simple approach that questions our progress in continual test-time adaptation", NeurIPS 2023.
    Pairs of corruptions, the second of one being the first of the next, each along its path through the severities, 0 to 5
    in steps of 0.25 (:func:`tta.datasets.ccc.path`). Neighbouring stops differ by 0.25 in one severity, but where a pair
    follows on another: one ends at its second corruption alone, the next starts at that corruption alone, at a severity
    that may differ. One domain, one row: the error over the whole stream, as published. Batches cross stops.

    A pair under which a model never comes near the target has the nearest path there is, far from it (digits hardly suffer
    from jpeg_compression and zoom_blur): the stream, printed, tells the accuracy to expect. Leave such corruptions out.

    The pairs are those of the released code from the same seed (43, 44, 45 there), the paths too from its matrix. Which
    images come is not: there it hangs on the draws of the corruptions before. Here the images come as the stream has them,
    there a random crop of each, mirrored at random, stored as JPEG; and as many as are asked for, there a last file of
    some 25 000 is filled.

    Args:
        target: accuracy of the source model in percent: 40, 20 and 0 in CCC-Easy, -Medium and -Hard. Below 40 without
            jpeg_compression, below 20 with noises and contrast only, never with brightness; of these, the corruptions that
            the stream has.
        speed: images at each stop; 1000, 2000 and 5000 in the paper.
        total: images in the stream; left out, 150 for each there is, the 7 500 000 of ImageNet's 50 000.
        matrix: accuracy matrices: a file (:meth:`tta.datasets.ccc.AccuracyMatrix.read`), a mapping such a file holds, or
            what :func:`tta.datasets.ccc.calibrate` gives. The protocol is called ``ccc-style`` where it is calibrated.
        model: source model on which the pairs that come are calibrated where there is no matrix, on clean images of the
            stream (:class:`tta.datasets.ccc.Calibration`); grid, cache and progress are the calibration's too.
        per_cell: how many images that is, spread evenly over the stream's.
        recipe: of the corruptions; left out, the stream's own, ``"imagenet"`` for a dataset of yours.
    """
    _require(0 <= target <= 100, "target", target, "an accuracy in percent")
    _require(speed >= 1, "speed", speed, "1 or more")
    _require(total is None or total >= 1, "total", total, "1 or more")
    _require(per_cell >= 1, "per_cell", per_cell, "1 or more")
    names, clean = _pool(domains, target)
    if recipe is None:
        recipe = str(getattr(domains[0], "recipe", "imagenet"))
    accuracies = _given(matrix)
    if accuracies is None and model is None:
        raise ValueError(
            "Protocol 'ccc' needs accuracies: the published matrix or one of yours as matrix=PATH, or a source model to "
            "calibrate on as model=MODEL."
        )
    if accuracies is None:
        spread = torch.arange(0, len(clean.index), max(1, len(clean.index) // per_cell))[:per_cell]
        images = walks.to_uint8(clean.images(spread))
        accuracies = walks.Calibration(
            model, images, clean.labels[spread], recipe=recipe, seed=seed, grid=grid, cache=cache, progress=progress
        )
    count = 150 * len(clean.index) if total is None else total
    stops = list(islice(walks.stops(walks.pairs(names, seed), accuracies, target), math.ceil(count / speed)))
    chosen = walks.arrivals(len(clean.index), len(stops), speed, seed)[:count]
    name = "ccc" if accuracies.calibration is None else "ccc-style"
    walk = walks.Walk(name, clean, chosen, stops, speed, recipe=recipe, seed=seed, target=target, matrix=accuracies)
    return [walk], replace(_one_stream(_samples([walk]), batch_size), protocol=name)


def _pool(domains: Sequence[Domain], target: float) -> tuple[list[str], Domain]:
    """Which corruptions there are of those that a target needs, and the images without them."""
    pool, first = walks.pool(target), domains[0]
    if not hasattr(first, "clean"):
        if len(domains) > 1:
            raise ValueError(
                f"Protocol 'ccc' corrupts one domain of clean images; got {len(domains)}, {first.name} and others."
            )
        return list(pool), first
    there = [name for name in pool if name in {domain.name for domain in domains}]
    if len(there) < 2:
        raise ValueError(
            f"Protocol 'ccc' with target={target:g} needs two or more of {', '.join(pool)}; the stream has: "
            f"{', '.join(there) or 'none'}."
        )
    return there, first.clean()


def _given(matrix: Any) -> walks.AccuracyMatrix | None:
    if matrix is None or isinstance(matrix, walks.AccuracyMatrix):
        return matrix
    if isinstance(matrix, Mapping):
        return walks.AccuracyMatrix(matrix)
    _require(isinstance(matrix, (str, PurePath)), "matrix", matrix, "a file, a mapping, or what calibrate() gives")
    return walks.AccuracyMatrix.read(matrix)


# ---------------------------------------------------------------------- unknown classes


def outliers(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    rate: float = 0.2,
    outliers: Any = "gaussian-noise",
    order: int | None = None,
) -> Planned:
    """Images of unknown classes mixed into each domain at a rate, reset before each domain.

    Yu et al., "STAMP: Outlier-Aware Test-Time Adaptation with Stable Memory Replay", ECCV 2024. Each domain's images
    and the first outliers, shuffled, every one once. Outliers have the label -1 and are left out of the errors.

    Args:
        rate: share of the outliers in a domain; 0.2 are the 2 500 beside 10 000 images of the paper.
        outliers: ``"gaussian-noise"``, one of the paper's sources, or a dataset of your own, used as it is (its labels
            are ignored). The paper corrupts photographs as it does the domain's images: pass a mapping from domain
            names to datasets for such.
        order: as in ``continual``.
    """
    _require(0 <= rate < 1, "rate", rate, "a share from 0 up to, not including, 1")
    _require(not isinstance(outliers, str) or outliers == "gaussian-noise", "outliers", outliers, "'gaussian-noise'")
    rng = np.random.RandomState(seed)
    rows: list[Domain] = []
    parts = []
    for number, domain in enumerate(_arranged(domains, order)):
        count = round(len(domain.index) * rate / (1 - rate))
        if isinstance(outliers, str):
            others: Domain = GaussianNoise(domain, count)
        else:
            own = isinstance(outliers, Mapping)
            _require(not own or domain.name in outliers, "outliers", outliers, f"a dataset for '{domain.name}' too")
            others = DatasetImages("outliers", outliers[domain.name] if own else outliers)
        rows.append(WithOutliers(domain, others, count))
        parts.append((number, torch.from_numpy(rng.permutation(len(rows[-1].index)))))
    return rows, in_turn(parts, batch_size)


class GaussianNoise:
    """Pixels drawn from a normal distribution of mean 0.5 and variance 1, clipped: outliers that need no files.

    Args:
        like: a domain, whose images say how large these are.
        count: how many images.
    """

    name = "outliers"
    origin = "Gaussian noise"

    def __init__(self, like: Domain, count: int) -> None:
        self.index = torch.arange(count)
        self.labels = torch.full((count,), -1)
        self._like = like

    def images(self, positions: Tensor) -> Tensor:
        """Images at these positions, uint8."""
        _, height, width = self._like.images(torch.tensor([0])).shape[1:]
        return _noise(len(self.index), height, width)[positions]

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the images; the seed is always 1."""
        return {"origin": self.origin, "count": len(self.index), "seed": 1}


@cache
def _noise(count: int, height: int, width: int) -> Tensor:
    rng = np.random.RandomState(1)
    images = torch.empty(count, 3, height, width, dtype=torch.uint8)
    for image in images:  # one at a time: in float64 all of them would take eight times the room
        pixels = np.clip(rng.randn(height, width, 3) + 0.5, 0, 1) * 255
        image.copy_(torch.from_numpy(pixels.astype(np.uint8)).permute(2, 0, 1))
    return images


# ---------------------------------------------------------------------- the table


class Protocol(NamedTuple):
    """How a stream is built, and the reset that belongs to it (see :func:`tta.evaluate`)."""

    build: Callable[..., Planned]
    reset: str

    @property
    def line(self) -> str:
        """What it is, in a line."""
        return (self.build.__doc__ or "").splitlines()[0]


PROTOCOLS = {
    "continual": Protocol(continual, "never"),
    "per-domain": Protocol(per_domain, "domain"),
    "episodic": Protocol(episodic, "batch"),
    "gradual": Protocol(gradual, "never"),
    "mixed": Protocol(mixed, "never"),
    "correlated": Protocol(correlated, "never"),
    "ptta": Protocol(ptta, "never"),
    "cdc": Protocol(cdc, "never"),
    "csc": Protocol(csc, "never"),
    "recurring": Protocol(recurring, "never"),
    "label-shift": Protocol(label_shift, "domain"),
    "batch-1": Protocol(batch_1, "domain"),
    "ccc": Protocol(ccc, "never"),
    "outliers": Protocol(outliers, "domain"),
    "forgetting": Protocol(forgetting, "never"),
    "budget": Protocol(budget, "never"),
}


# ---------------------------------------------------------------------- what they share


def _require(condition: bool, name: str, given: Any, expected: str) -> None:
    if not condition:
        raise ValueError(f"{name} is {expected}; got {given!r}.")


def _arranged(domains: Sequence[Domain], order: int | None) -> list[Domain]:
    """The domains in one of the ten orders, or as they are."""
    if order is None:
        return list(domains)
    _require(isinstance(order, int) and 0 <= order < len(ORDERS), "order", order, f"0 to {len(ORDERS) - 1}")
    if strange := [domain.name for domain in domains if domain.name not in CORRUPTIONS]:
        raise ValueError(f"order={order} is an order of the fifteen corruptions; '{strange[0]}' is none of them.")
    return sorted(domains, key=lambda domain: ORDERS[order].index(domain.name))


def _visits(domains: Iterable[Domain]) -> list[Domain]:
    """A row for each coming of a domain: the first is the domain itself, later ones are numbered."""
    seen: Counter[str] = Counter()
    rows: list[Domain] = []
    for domain in domains:
        seen[domain.name] += 1
        rows.append(domain if seen[domain.name] == 1 else Visit(domain, seen[domain.name]))
    return rows


def _stored(domain: Domain, seed: int, shuffle: bool) -> Tensor:
    """All positions of a domain, as stored or shuffled."""
    return _shuffled(len(domain.index), seed) if shuffle else torch.arange(len(domain.index))


def _shuffled(count: int, seed: int) -> Tensor:
    """0 to count - 1 as Python's generator shuffles them."""
    positions = list(range(count))
    random.Random(seed).shuffle(positions)
    return torch.tensor(positions, dtype=torch.int64)


def _samples(domains: Sequence[Domain]) -> Tensor:
    """(samples, 2): which domain, which position in it; all of them in turn."""
    positions = [torch.arange(len(domain.index)) for domain in domains]
    return torch.cat([torch.stack([torch.full_like(where, n), where], 1) for n, where in enumerate(positions)])


def _one_stream(order: Tensor, batch_size: int) -> Schedule:
    """Batches that cross domains."""
    return Schedule(order, tuple(len(part) for part in order.split(batch_size) if len(part)), batch_size)


def _cut(items: Positions, share: NDArray[np.float64]) -> list[Positions]:
    """Items in consecutive runs, one for each share of them; the last gets all where the shares are not numbers.

    They are not where a small concentration underflows. The released code then cuts at NaN, which comes to the same.
    """
    ends = np.nan_to_num(np.cumsum(share)[:-1] * len(items), nan=0.0, posinf=0.0)
    return np.split(items, ends.astype(int))


def _by_class(labels: Tensor, delta: float, min_size: int, seed: int) -> Tensor:
    """Positions sorted by class (in their order within each), or in Dirichlet chunks where ``delta`` is above 0."""
    if delta == 0:
        return torch.sort(labels, stable=True).indices
    return torch.from_numpy(_dirichlet_chunks(labels.numpy(), delta, min_size, np.random.RandomState(seed)))


ATTEMPTS = 1000  # draws of a whole order until every chunk is large enough


def _dirichlet_chunks(labels: Positions, delta: float, min_size: int, rng: np.random.RandomState) -> Positions:
    """Positions in as many chunks as classes, each class in one run of a chunk; chunks that are full get no more."""
    if not len(labels):
        return np.arange(0)
    labels = labels - min(0, labels.min())  # an unknown class, -1, counts as one
    classes = int(labels.max()) + 1
    of_class = [np.flatnonzero(labels == one) for one in range(classes)]
    if classes * min_size > len(labels):
        raise ValueError(
            f"{len(labels)} samples do not fill {classes} chunks with {min_size} each: lower min_size, or set delta=0."
        )
    for _ in range(ATTEMPTS):
        sizes = np.zeros(classes, dtype=np.int64)
        runs: list[list[Positions]] = []  # class by class, its run in each chunk
        for members in of_class:
            members = members.copy()
            rng.shuffle(members)
            with np.errstate(invalid="ignore"):  # 0 / 0 where all that was drawn are full chunks
                share = rng.dirichlet(np.repeat(delta, classes)) * (sizes < len(labels) / classes)
                runs.append(_cut(members, share / share.sum()))
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


def _imbalanced(labels: Positions, imbalance: float, total: int, seed: int) -> Positions:
    """Positions drawn with replacement while one class after the other prevails."""
    known = np.unique(labels)
    classes = len(known)
    _require(total >= classes, "total", total, f"{classes} or more (a draw for each class)")
    turn = list(range(classes))
    random.Random(seed).shuffle(turn)
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


def _with_prior(labels: Positions, prior: float, total: int | None, seed: int) -> Positions:
    """Positions whose classes have frequencies drawn from a Dirichlet distribution, shuffled."""
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
