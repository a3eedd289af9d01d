"""Leftover batches: one that is too small for a method joins the batch before it, decided before the run."""

import copy
import warnings
from collections.abc import Sequence

from torch import Tensor

from tta.adapter import Adapter
from tta.datasets.domains import to_float
from tta.datasets.stream import Plan, Schedule, Stream

SMALL = 4  # a leftover is tried if it is at most this part of a batch; all methods take larger ones


def joined(stream: Stream, adapter: Adapter, *, paused: bool = False) -> tuple[Stream, int]:
    """The stream in which each leftover that the adapter cannot take has joined the batch before it, and their number.

    A function of the stream and the adapter, which learns nothing: a copy is tried on one leftover of each size. It may
    draw from the global random state.
    The order of the samples is that of the stream. Without such a leftover the stream itself is returned.

    Args:
        stream: its batches.
        adapter: in the state that it will begin in.
        paused: whether the whole stream is predicted without learning.
    """
    plans = stream.schedule()
    small = [number for number in range(1, len(plans)) if _is_small(number, plans, stream.batch_size)]
    refused: dict[tuple[int, bool], bool] = {}
    joining = set()
    for number in small:
        still = paused or plans[number].paused
        kind = (plans[number].samples, still)
        if kind not in refused:
            refused[kind] = not _takes(adapter, to_float(stream.read(number).images), still)
        if refused[kind]:
            joining.add(number)
    return (_with(stream, plans, joining) if joining else stream), len(joining)


def _is_small(number: int, plans: Sequence[Plan], batch_size: int) -> bool:
    """Whether a batch is a leftover that may be too small, with a batch before it that it may join."""
    before, plan = plans[number - 1], plans[number]
    if plan.samples >= batch_size or (plan.samples > 1 and SMALL * plan.samples > batch_size):
        return False
    ends = number == len(plans) - 1 or plans[number + 1].domains != plan.domains
    return ends and (before.domains == plan.domains or len(before.domains) > 1)


def _takes(adapter: Adapter, images: Tensor, paused: bool) -> bool:
    """Whether a copy of the adapter can make its step on the images."""
    trial = copy.deepcopy(adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if paused:
                with trial.paused():
                    trial.step(images.to(trial.device))
            else:
                trial.step(images.to(trial.device))
        except ValueError:
            return False
    return True


def _with(stream: Stream, plans: Sequence[Plan], joining: set[int]) -> Stream:
    """The stream with each of these batches behind the samples of the one before it."""
    lengths: list[int] = []
    paused: list[bool] = []
    for number, plan in enumerate(plans):
        if number in joining:
            lengths[-1] += plan.samples
            paused[-1] |= plan.paused  # nothing is learned from an image that is only to be predicted
        else:
            lengths.append(plan.samples)
            paused.append(plan.paused)
    return Stream(
        stream.name,
        stream.domains,
        batch_size=stream.batch_size,
        seed=stream.seed,
        protocol=stream.protocol,
        reset=stream.reset,
        settings=stream.settings,
        schedule=Schedule(
            stream.order, tuple(lengths), stream.batch_size, tuple(paused), stream.cost, asked=stream.asked
        ),
    )
