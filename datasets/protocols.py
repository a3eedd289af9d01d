"""Protocols: the order in which the samples of a stream's domains arrive, each as in the code that introduced it.

A protocol is a function of the domains (their labels, no image), a seed, a batch size and a few parameters of its own. It
returns the domains in the order of their rows in the results, and a :class:`~tta.datasets.stream.Schedule`. It draws from
``numpy.random.RandomState(seed)``, in the order of the released code, unless that code draws differently.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import PurePath
from typing import Any, NamedTuple

import numpy as np
import torch

from tta.datasets import ccc as walks
from tta.datasets import orders
from tta.datasets.accuracy_matrix import AccuracyMatrix, Calibration
from tta.datasets.corruptions import CORRUPTIONS
from tta.datasets.domains import Corrupted, Domain, Renamed, original
from tta.datasets.orders import Planned, Positions, check_parameter
from tta.datasets.outliers import outliers
from tta.datasets.stream import Asked, check, in_turn

# ---------------------------------------------------------------------- one domain after another


def continual(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """Domains one after another, the adapter is never reset.

    Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022. Every sample once; no batch holds two domains.

    Args:
        order: 0 to 9, one of the ten random orders of the paper; default: the stream's own.
        shuffle: each domain's images in an order drawn from the seed instead of the stored one; the same in each
            domain, by Python's generator, as in the benchmark of Marsden et al. (WACV 2024).
    """
    rows = orders.arranged(domains, order)
    return rows, in_turn(((n, orders.stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


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
    """Continual structured change, an alias of ``continual``: the counterpart of cdc.

    Zhang et al., "DPCore: Dynamic Prompt Coreset for Continual Test-Time Adaptation", ICML 2025. Parameters as
    ``continual``.
    """
    return continual(domains, seed, batch_size, order=order, shuffle=shuffle)


def batch_1(
    domains: Sequence[Domain], seed: int, batch_size: int, *, order: int | None = None, shuffle: bool = False
) -> Planned:
    """One image at a time (the batch size is ignored), domains one after another, reset before each.

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

    Every sample once in each round, in the same order. No batch holds two domains.

    Args:
        rounds: number of visits of each domain; papers use 10 to 20.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    check_parameter(rounds >= 1, "rounds", rounds, "1 or more")
    rows = orders.visits(orders.arranged(domains, order) * rounds)
    return rows, in_turn(((n, orders.stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


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

    Wang et al., CVPR 2022 (CoTTA), severity 5: the first corruption goes from 5 to 1, each other from 1 to 5 to 1. Every
    image once at each step; neighbouring steps differ by one severity. Every step has its own row, so that the mean
    error is the mean over all steps.

    Args:
        first: ``"descending"``, as above, or ``"full"``: the first corruption rises too (Marsden et al., WACV 2024).
        order: as in ``continual``; the paper's numbers are means over all ten orders.
        shuffle: as in ``continual``.
    """
    check_parameter(first in ("descending", "full"), "first", first, "'descending' or 'full'")
    steps: list[Domain] = []
    for number, domain in enumerate(orders.arranged(domains, order)):
        corrupted = original(domain)
        if not isinstance(corrupted, Corrupted):
            raise ValueError(f"Protocol 'gradual' needs domains with severities; '{domain.name}' has none.")
        highest = corrupted.severity
        check_parameter(highest % 1 == 0, "severity of protocol 'gradual'", highest, "a whole number")
        rising = [Renamed(corrupted.at(s), f"{domain.name}-{s}") for s in range(1, int(highest) + 1)]
        if number > 0 or first == "full":
            steps += rising[:-1]
        steps += reversed(rising)
    rows = orders.visits(steps)
    return rows, in_turn(((n, orders.stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)


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
    """The clean source domain after every other domain, never reset; its rows show how much was forgotten.

    As in the benchmark of Marsden et al. (WACV 2024). Each domain once, the clean one after each of them (clean, clean@2,
    ...). No batch holds two domains.

    Args:
        clean: name of the clean domain; default: the stream's images without their corruption.
        learn: whether the adapter learns from the clean domain, as published; else it is only predicted.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    named = [domain for domain in domains if domain.name == clean]
    check_parameter(
        clean is None or bool(named), "clean", clean, f"one of {', '.join(d.name for d in domains)}, or nothing"
    )
    first = original(domains[0])
    if named:
        source = named[0]
    elif isinstance(first, Corrupted):
        source = first.clean()
    else:
        raise ValueError(
            f"Protocol 'forgetting' needs clean images; domain '{domains[0].name}' has none. Name your clean "
            "domain with clean=NAME."
        )
    others = orders.arranged([domain for domain in domains if domain.name != clean], order)
    rows = orders.visits([row for domain in others for row in (domain, source)])
    check(rows, batch_size)
    schedule = in_turn(((n, orders.stored(domain, seed, shuffle)) for n, domain in enumerate(rows)), batch_size)
    if learn:
        return rows, schedule
    owner = [int(part[0, 0]) for part in torch.split(schedule.order, list(schedule.lengths))]
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
    """Batches do not wait: while a slow method learns from one, the latest model only predicts the next ones.

    Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints", ICML 2024. Domains one
    after another, never reset. The adapter learns from the first of every ceil(cost) batches.

    Args:
        cost: time to learn from a batch, in batches of the stream, 1 or more; ``"measured"``: the method's time divided by
            the time of the source model's prediction, from a warm-up on the first batch.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    fits = cost == "measured" or (not isinstance(cost, str) and cost >= 1)
    check_parameter(fits, "cost", cost, "a number, 1 or more, or 'measured'")
    rows, schedule = continual(domains, seed, batch_size, order=order, shuffle=shuffle)
    return rows, replace(schedule, cost=cost)


def feedback(
    domains: Sequence[Domain],
    seed: int,
    batch_size: int,
    *,
    delay: int = 0,
    noise: float = 0.0,
    budget: int = 3,
    order: int | None = None,
    shuffle: bool = False,
) -> Planned:
    """Answers come late: a method that can use feedback asks about a few samples of each batch, and is told, at times wrongly.

    As in Lee et al., "Test-Time Adaptation with Binary Feedback", ICML 2025: domains one after another, never reset. A method
    that cannot use feedback runs as under ``continual``. The wrong ones among the answers are drawn from the seed.

    Args:
        delay: batches between a question and its answer; 0: it comes before the next batch. What is still open at the end
            or before a reset is never answered.
        noise: share of the answers that are wrong: right for wrong, or another class.
        budget: questions a batch at most.
        order: as in ``continual``.
        shuffle: as in ``continual``.
    """
    check_parameter(delay >= 0, "delay", delay, "0 or more batches")
    check_parameter(0 <= noise <= 1, "noise", noise, "a share in [0, 1]")
    check_parameter(budget >= 1, "budget", budget, "1 or more questions a batch")
    rows, schedule = continual(domains, seed, batch_size, order=order, shuffle=shuffle)
    return rows, replace(schedule, asked=Asked(delay, noise, budget))


# ---------------------------------------------------------------------- mixed, and correlated in class


def mixed(domains: Sequence[Domain], seed: int, batch_size: int) -> Planned:
    """All domains shuffled into one stream, never reset; batches hold several domains.

    Marsden, Doebler & Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and Prior
    Correction", WACV 2024 (ROID), with Python's generator as in their code. Every sample once; only the last batch may be
    smaller.
    """
    everything = orders.samples(domains)
    return list(domains), orders.one_stream(everything[orders.shuffled(len(everything), seed)], batch_size)


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
    """Neighbouring images have the same class: sorted, or in Dirichlet-distributed chunks; never reset.

    Sorted by class: Marsden et al., WACV 2024 (ROID). Chunks: Gong et al., "NOTE: Robust Continual Test-time
    Adaptation Against Temporal Correlation", NeurIPS 2022. Every sample once. As many chunks as classes; each holds at
    least ``min_size`` samples, and those of a class in one run. The generator is seeded again for each domain. NOTE
    drops the remainder after division by 64; nothing is dropped here.

    Args:
        delta: 0 sorts by class. Above 0: concentration of the Dirichlet distribution, smaller = more correlated (the
            papers use 0.1 for 10 classes, 0.01 for 1000).
        min_size: smallest number of samples in a chunk.
        mixed: shuffle all domains together instead of ordering each by itself; batches then hold several domains.
        order: as in ``continual``.
        shuffle: shuffle each domain's images first, as in ``continual``.
    """
    check_parameter(delta >= 0, "delta", delta, "0 or more")
    rows = orders.arranged(domains, order)
    if mixed:
        shuffled = orders.shuffled(sum(len(domain.index) for domain in rows), seed)
        labels = torch.cat([domain.labels for domain in rows])[shuffled]
        return rows, orders.one_stream(
            orders.samples(rows)[shuffled][orders.by_class(labels, delta, min_size, seed)], batch_size
        )
    parts = []
    for number, domain in enumerate(rows):
        stored = orders.stored(domain, seed, shuffle)
        parts.append((number, stored[orders.by_class(domain.labels[stored], delta, min_size, seed)]))
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
    Batches cross domains; a last batch with a single sample is dropped.

    Args:
        gamma: concentration of the Dirichlet distribution.
        slots: number of slots per domain; default: the number of classes, 100 at most.
        order: as in ``continual``; ``"paper"``: order 5 if the stream has all fifteen corruptions, else the stream's own.
    """
    check_parameter(gamma > 0, "gamma", gamma, "a number above 0")
    check_parameter(slots is None or slots >= 1, "slots", slots, "1 or more")
    if order == "paper":
        order = 5 if {domain.name for domain in domains} == set(CORRUPTIONS) else None
    rows = orders.arranged(domains, order)
    rng = np.random.RandomState(seed)
    classes = np.unique(torch.cat([domain.labels for domain in rows]).numpy())
    count = min(len(classes), 100) if slots is None else slots
    arrivals = []
    for number, domain in enumerate(rows):
        shares = rng.dirichlet([gamma] * count, len(classes))
        held: list[list[Positions]] = [[] for _ in range(count)]
        for one, share in zip(classes, shares, strict=True):
            for slot, run in zip(held, orders.cut(np.flatnonzero(domain.labels.numpy() == one), share), strict=True):
                slot.append(run)
        positions = np.concatenate([slot[i] for slot in held for i in rng.permutation(len(slot))])
        arrivals.append(np.stack([np.full_like(positions, number), positions], 1))
    everything = torch.from_numpy(np.concatenate(arrivals))
    lone = len(everything) % batch_size == 1 and batch_size > 1
    return rows, orders.one_stream(everything[: len(everything) - lone], batch_size)


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
    """Class frequencies drift online, or differ from the source's; images may repeat; reset before each domain.

    *Online imbalance*: Niu et al., ICLR 2023 (SAR). One step of ``total / classes`` draws for each class, in shuffled
    order; in its step a class has ``imbalance`` times the probability of any other. Samples are drawn with replacement,
    the same in each domain. Only the order of the classes depends on the seed (Python's generator); the draws are seeded
    with 2022, as in the released code. It shuffles the classes once for each ratio of its list, 1, 1000, 2000, 3000, 4000,
    5000 and 500000, one after another, and so does this: the k-th ratio has the k-th shuffle, any other the first. On 50 000
    images sorted by class, 50 each, seeds 2022 and 2023 give the files that SAR ships, index by index. Those that it reads
    for its seed 2021 were made with another state of the generator, which nobody published: here 2021 is a seed like any.

    *Dirichlet prior* (``prior`` given): Zhao et al., "On Pitfalls of Test-Time Adaptation", ICML 2023 (TTAB). Class
    frequencies are drawn once; as many samples as the most frequent class allows, none twice, shuffled (numpy's
    ``default_rng(seed)``, as there).

    Args:
        imbalance: 1 is uniform, 500 000 practically sorted by class.
        prior: concentration of the Dirichlet prior; TTAB uses 4.
        total: draws per domain; default: twice its samples. With ``prior``: samples per domain instead of as many as
            possible; random ones fill up what rounding leaves out.
        order: as in ``continual``.
    """
    check_parameter(imbalance >= 1, "imbalance", imbalance, "1 or more")
    check_parameter(prior is None or prior > 0, "prior", prior, "a number above 0")
    check_parameter(total is None or total >= 1, "total", total, "1 or more")
    rows = orders.arranged(domains, order)
    parts = []
    for number, domain in enumerate(rows):
        labels = domain.labels.numpy()
        positions = (
            orders.imbalanced(labels, imbalance, total or 2 * len(labels), seed)
            if prior is None
            else orders.with_prior(labels, prior, total, seed)
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

    Zhang et al., "DPCore", ICML 2025. Every sample once, those of a domain in stored order; no batch holds two domains.

    Args:
        draw: ``"dirichlet"``: each domain's batches are spread over the slots by a Dirichlet draw, and a slot has
            its domains in random order. ``"multinomial"``: repeatedly a random domain that is not used up, for a random
            number of its batches.
        delta: concentration of the Dirichlet distribution.
        slots: maximum number of visits of a domain; with ``"dirichlet"``.
    """
    check_parameter(draw in ("dirichlet", "multinomial"), "draw", draw, "'dirichlet' or 'multinomial'")
    check_parameter(delta > 0, "delta", delta, "a number above 0")
    check_parameter(slots >= 1, "slots", slots, "1 or more")
    rows, rng = list(domains), np.random.RandomState(seed)
    # One more than fit, as in the released code: if the samples fill the batches, the last one is empty and is dropped.
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
    """Pairs (domain, batches): each domain's batches are spread over the slots, the domains of a slot are shuffled."""
    shares = rng.dirichlet([delta] * slots, len(counts))
    runs = [[len(run) for run in orders.cut(np.arange(n), share)] for n, share in zip(counts, shares, strict=True)]
    for slot in range(slots):
        yield from ((int(number), runs[number][slot]) for number in rng.permutation(len(counts)))


def _takes(counts: Sequence[int], rng: np.random.RandomState) -> Iterator[tuple[int, int]]:
    """Pairs (domain, batches): a domain that has batches left, and a number of them, both drawn uniformly."""
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
    """Continuously changing corruptions: two at a time, one turns into the next at constant accuracy; never reset.

    Press et al., "RDumb: A simple approach that questions our progress in continual test-time adaptation", NeurIPS 2023.
    Pairs of corruptions, the second of one being the first of the next, each along its path through the severities, 0 to 5
    in steps of 0.25 (:func:`tta.datasets.ccc.path`). Neighbouring stops differ by 0.25 in one severity, except between two
    pairs: one ends at its second corruption alone, the next starts at that corruption alone, at a severity that may
    differ. One domain, one row: the error over the whole stream, as published. Batches cross stops.

    If a model never comes near the target under a pair, the nearest path is taken, far from it (digits hardly suffer
    from jpeg_compression and zoom_blur): printing the stream shows the expected accuracy. Leave such corruptions out.

    Pairs and paths are those of the released code, given its seed (43, 44, 45 there) and its matrix. The choice of images
    is not: there it depends on the draws of earlier corruptions. Here the images are unchanged, there each is cropped and
    mirrored at random and stored as JPEG. Here the stream ends after ``total`` images, there a last file of some 25 000
    is filled.

    Args:
        target: accuracy of the source model in percent: 40, 20 and 0 in CCC-Easy, -Medium and -Hard. Below 40 without
            jpeg_compression, below 20 with noises and contrast only, never with brightness; of these, the corruptions that
            the stream has.
        speed: images at each stop; 1000, 2000 and 5000 in the paper.
        total: images in the stream; default: 150 per image of the domain, which is 7 500 000 for ImageNet's 50 000.
        matrix: accuracy matrices: a file (:meth:`tta.datasets.ccc.AccuracyMatrix.read`), a mapping as in such a file, or
            the value of :func:`tta.datasets.ccc.calibrate`. With a calibrated matrix the protocol is called ``ccc-style``.
        model: without a matrix, the source model that is calibrated on clean images of the stream, for the pairs that
            come (:class:`tta.datasets.ccc.Calibration`, whose parameters ``grid``, ``cache`` and ``progress`` are).
        per_cell: number of images to calibrate on, spread evenly over the stream's.
        recipe: of the corruptions; default: the stream's own, ``"imagenet"`` for a dataset of yours.
    """
    check_parameter(0 <= target <= 100, "target", target, "an accuracy in percent")
    check_parameter(speed >= 1, "speed", speed, "1 or more")
    check_parameter(total is None or total >= 1, "total", total, "1 or more")
    check_parameter(per_cell >= 1, "per_cell", per_cell, "1 or more")
    names, clean = _pool(domains, target)
    if recipe is None:
        first = original(domains[0])
        recipe = first.recipe if isinstance(first, Corrupted) else "imagenet"
    accuracies = _given(matrix)
    if accuracies is None:
        settings = {"recipe": recipe, "seed": seed, "grid": grid, "cache": cache, "progress": progress}
        accuracies = _calibration(model, clean, per_cell, settings)
    count = 150 * len(clean.index) if total is None else total
    stops = list(islice(walks.stops(walks.pairs(names, seed), accuracies, target), math.ceil(count / speed)))
    chosen = walks.arrivals(len(clean.index), len(stops), speed, seed)[:count]
    name = "ccc" if accuracies.calibration is None else "ccc-style"
    walk = walks.Walk(name, clean, chosen, stops, speed, recipe=recipe, seed=seed, target=target, matrix=accuracies)
    return [walk], replace(orders.one_stream(orders.samples([walk]), batch_size), protocol=name)


def _calibration(model: Any, clean: Domain, count: int, settings: dict[str, Any]) -> Calibration:
    """The calibration of a model on some images of a domain, spread evenly."""
    if model is None:
        raise ValueError(
            "Protocol 'ccc' needs accuracies: the published matrix or one of yours as matrix=PATH, or a source model to "
            "calibrate on as model=MODEL."
        )
    spread = torch.arange(0, len(clean.index), max(1, len(clean.index) // count))[:count]
    return Calibration(model, walks.to_uint8(clean.images(spread)), clean.labels[spread], **settings)


def _pool(domains: Sequence[Domain], target: float) -> tuple[list[str], Domain]:
    """The stream's corruptions among those for a target, and the clean images."""
    pool, first = walks.pool(target), original(domains[0])
    if not isinstance(first, Corrupted):
        if len(domains) > 1:
            raise ValueError(
                f"Protocol 'ccc' corrupts one domain of clean images; got {len(domains)}, {domains[0].name} and others."
            )
        return list(pool), domains[0]
    there = [name for name in pool if name in {domain.name for domain in domains}]
    if len(there) < 2:
        raise ValueError(
            f"Protocol 'ccc' with target={target:g} needs two or more of {', '.join(pool)}; the stream has: "
            f"{', '.join(there) or 'none'}."
        )
    return there, first.clean()


def _given(matrix: Any) -> AccuracyMatrix | None:
    if matrix is None or isinstance(matrix, AccuracyMatrix):
        return matrix
    if isinstance(matrix, Mapping):
        return AccuracyMatrix(matrix)
    check_parameter(
        isinstance(matrix, (str, PurePath)), "matrix", matrix, "a file, a mapping, or what calibrate() gives"
    )
    return AccuracyMatrix.read(matrix)


# ---------------------------------------------------------------------- the table


class Protocol(NamedTuple):
    """A protocol's function and its reset (see :func:`tta.evaluate`)."""

    build: Callable[..., Planned]
    reset: str

    @property
    def line(self) -> str:
        """One-line description: the first line of the function's docstring."""
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
    "feedback": Protocol(feedback, "never"),
}
