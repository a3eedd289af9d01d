"""Workers: processes that adapt to one stream together, each to its part of every batch; sums, means and rows over all of them.

Convention: a loss is a worker's *part*, and the parts add up to the loss of the whole batch. So a mean is the sum over a worker's own
images, divided by the number of images of all (a mean of means would weigh the images of a small part more), and gradients
and logged losses are sums over the workers. Without a group every method here is the plain operation and sends nothing.
"""

import os
import re
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tta import channels_last
from tta.functional import batch_moments, logits_of, masked_mean

ProcessGroup: TypeAlias = Any  # torch.distributed.ProcessGroup, which a torch built without distributed lacks


class Met(NamedTuple):
    """Facts about the present batch that all workers share: images, those that are not finite, and whether all are usable."""

    images: int
    bad: int
    usable: bool


class Workers:
    """One process among those that share a stream; alone without a group.

    Every method is called by all workers, in the same order. Copies are alone: a group is of its processes.

    Args:
        group: of :mod:`torch.distributed`; None for one process alone.

    Attributes:
        size: number of workers.
        rank: number of this one, from 0; its images come in this place of every batch.
        images: of all workers in the present batch, once it was met.

    Raises:
        ValueError: this process is not in the group.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self.group, self.size, self.rank, self.images = group, 1, 0, 0
        self.filling = False  # whether an image of zeros goes through the model, for a worker that has none
        if group is not None:
            from torch import distributed  # not every build of torch has it

            self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)
            if self.rank < 0:
                raise ValueError("This process is not in the process group: pass one that it belongs to.")

    def __reduce__(self) -> tuple[Any, ...]:
        return Workers, ()

    # ------------------------------------------------------------------ losses

    def sum(self, x: Tensor) -> Tensor:
        """The sum over all workers; the gradient of the workers' losses together flows back through it."""
        if self.size == 1:
            return x
        total: Tensor = _Sum.apply(x, self.group)
        return total

    def mean(self, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """This worker's part of the mean over the rows of all workers that the mask keeps; 0 if it keeps none.

        Args:
            values: (batch, ...).
            mask: (batch,), boolean; all rows if left out.
        """
        if self.size == 1:
            return values.mean(0) if mask is None else masked_mean(values, mask)
        mask = values.new_ones(len(values), dtype=torch.bool) if mask is None else mask
        kept = torch.where(mask.view(-1, *[1] * (values.dim() - 1)), values, 0).sum(0)
        return kept / self.sum(mask.sum().float()).clamp(min=1)

    def part(self, x: Tensor) -> Tensor:
        """This worker's part of a loss that all workers computed alike: an equal one."""
        return x if self.size == 1 else x / self.size

    def part_of(self, x: Tensor) -> Tensor:
        """This worker's rows of a whole batch: a run of them, in the order of the workers, as equal as they can be."""
        return x.tensor_split(self.size)[self.rank]

    def first_of(self, count: int) -> int:
        """Place in a whole batch of ``count`` rows of the first of this worker's."""
        whole, rest = divmod(count, self.size)
        return self.rank * whole + min(self.rank, rest)

    def any(self, mask: Tensor) -> Tensor:
        """Whether the mask is true anywhere, at any worker; a boolean scalar."""
        return mask.any() if self.size == 1 else self.sum(mask.sum().float()) > 0

    def all(self, mask: Tensor) -> Tensor:
        """Whether the mask is true everywhere, at all workers; a boolean scalar."""
        return mask.all() if self.size == 1 else ~self.any(~mask)

    @torch.no_grad()
    def summed(self, tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Sums of several tensors over all workers, sent as one; None stays None."""
        given = [tensor for tensor in tensors if tensor is not None]
        if self.size == 1 or not given:
            return list(tensors)
        flat = self.sum(torch.cat([tensor.detach().float().flatten() for tensor in given]))
        parts = iter(torch.split(flat, [tensor.numel() for tensor in given]))
        return [None if t is None else next(parts).view(t.shape).to(t.dtype) for t in tensors]

    # ------------------------------------------------------------------ rows

    @torch.no_grad()
    def gathered(self, rows: Tensor) -> tuple[Tensor, slice]:
        """The rows (n, ...) of all workers, in order, and where this worker's own are among them; no gradient flows."""
        if self.size == 1:
            return rows, slice(None)
        counts = self._all([len(rows)], rows.device)[:, 0].tolist()
        first = sum(counts[: self.rank])
        plain = rows.detach().to(torch.uint8) if rows.dtype == torch.bool else rows.detach()
        padded = plain.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = plain
        from torch import distributed

        parts = [torch.empty_like(padded) for _ in counts]
        if padded.numel():
            distributed.all_gather(parts, padded, group=self.group)
        whole = torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.dtype)
        return whole, slice(first, first + len(rows))

    @torch.no_grad()
    def picked(self, rows: Tensor, numbers: Tensor) -> Tensor:
        """Some rows of those of all workers, by their numbers in order; only these are sent."""
        if self.size == 1 or not len(numbers):
            return rows[numbers]
        first = int(self._all([len(rows)], rows.device)[: self.rank].sum())
        mine = (numbers >= first) & (numbers < first + len(rows))
        found = rows.new_zeros(len(numbers), *rows.shape[1:])
        found[mine] = rows.detach()[numbers[mine] - first]
        return self.sum(found)

    def total(self, x: Tensor) -> int:
        """Number of images of all workers in the present batch, of which ``x`` is this worker's part."""
        return len(x) if self.size == 1 else self.images

    # ------------------------------------------------------------------ statistics of batches

    def rows(self, x: Tensor) -> Tensor:
        """The rows of this worker's images in a layer's input or output; none where zeros stand in for images."""
        return x[:0] if self.filling else x

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and biased variance of each channel over the images of all workers, and the number of values in a channel.

        The variance is taken about that mean, as rounding of a difference of large sums would be seen in it. Gradients flow
        through both, as through the statistics of one worker with the whole batch.

        Args:
            x: (batch, channels, ...), this worker's part.

        Returns:
            (channels,), (channels,) and a scalar, float32.
        """
        own = self.rows(x).float()
        dims = [d for d in range(x.dim()) if d != 1]
        sums = self.sum(torch.cat([own.sum(dims), own.new_full((1,), own.numel() / x.shape[1])]))
        mean, count = sums[:-1] / sums[-1], sums[-1].detach()
        return mean, self.sum((own - _channelwise(mean, x)).square().sum(dims)) / count, count

    def batch_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """:func:`tta.functional.batch_moments` over the images of all workers, (batch, ...) -> (...), (...)."""
        if self.size == 1:
            return batch_moments(x)
        own = self.rows(x).float()
        count = self.sum(own.new_full((), len(own)))
        mean = self.sum(own.sum(0)) / count
        return mean, self.sum((own - mean).square().sum(0)) / (count - 1)

    # ------------------------------------------------------------------ one step together

    def meet(
        self, x: Any, device: torch.device, *, refusal: Exception | None, bad: int, usable: bool, paused: bool
    ) -> tuple[Tensor, Met]:
        """Agree on a batch before its step: one worker's fault is all workers', so that none waits for the others for ever.

        Args:
            x: this worker's part; it may be empty.
            device: of the adapter, where the group can send.
            refusal: why this part is refused; None if it is not.
            bad: number of its images that are not finite.
            usable: whether its values may be learned from.
            paused: whether this worker only predicts.

        Returns:
            The part, an empty one with the other workers' shape of an image; and what all parts hold together.

        Raises:
            ValueError: at every worker: a part is refused, images are of different shapes, or not all are paused.
        """
        shape = tuple(x.shape) if refusal is None else (0, 0, 0, 0)
        facts = self._all([refusal is not None, bad, not usable, paused, *shape], device).tolist()
        if any(fact[0] for fact in facts):
            self._refuse(refusal)
        shapes = {tuple(fact[5:]) for fact in facts if fact[4]}
        if len(shapes) > 1:
            raise ValueError(f"The workers' images have different shapes: {', '.join(map(str, sorted(shapes)))}.")
        if len({fact[3] for fact in facts}) > 1:
            who = ", ".join(str(rank) for rank, fact in enumerate(facts) if fact[3])
            raise ValueError(f"Of {self.size} workers only {who} would predict without learning: pause all or none.")
        self.images = sum(fact[4] for fact in facts)
        met = Met(self.images, sum(fact[1] for fact in facts), not any(fact[2] for fact in facts))
        return (x if len(x) or not shapes else x.new_zeros(0, *shapes.pop())), met

    def require_alike(self, facts: dict[str, Any]) -> None:
        """Raise a ValueError, at every worker, unless all workers have the same facts; it names those that differ."""
        # The text of a function holds its address, which differs from process to process.
        texts = {name: re.sub(r" at 0x[0-9a-f]+", "", str(value)) for name, value in facts.items()}
        everywhere = self.objects(texts)
        if differing := [name for name in texts if len({other.get(name) for other in everywhere}) > 1]:
            raise ValueError(
                f"The {self.size} workers do not hold the same adapter: they differ in {', '.join(differing)}. Build it alike "
                "in each, from the same weights and settings."
            )

    def objects(self, value: Any) -> list[Any]:
        """Plain values of all workers, in order."""
        if self.size == 1:
            return [value]
        from torch import distributed

        values: list[Any] = [None] * self.size
        distributed.all_gather_object(values, value, group=self.group)
        return values

    def _refuse(self, refusal: Exception | None) -> None:
        """Raise what this worker refused, or a sentence about those that did."""
        texts = self.objects(None if refusal is None else str(refusal))
        if refusal is not None:
            raise refusal
        rank, text = next((rank, text) for rank, text in enumerate(texts) if text is not None)
        raise ValueError(
            f"Worker {rank} of {self.size} was given a batch that is refused, so no worker learned: {text}"
        )

    def _all(self, numbers: Sequence[int], device: torch.device) -> Tensor:
        """Whole numbers of all workers, (size, numbers), on the CPU."""
        from torch import distributed

        mine = torch.tensor([int(number) for number in numbers], device=device)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine, group=self.group)
        return torch.stack(parts).cpu()


class _Sum(torch.autograd.Function):
    """A sum over all workers; backward, the sum of what each worker's loss says of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: ProcessGroup) -> Tensor:
        from torch import distributed

        ctx.group = group
        total = x.clone(memory_format=torch.contiguous_format)
        distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Sum.forward(ctx, gradients[0], ctx.group), None


ALONE = Workers()


@contextmanager
def launched() -> Iterator[ProcessGroup | None]:
    """Within this context the group of the processes that ``torchrun`` started, over gloo or, with GPUs, NCCL; None if it started none.

    Each process has the GPU of its ``LOCAL_RANK``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "LOCAL_RANK" not in os.environ:
        yield None
        return
    from torch import distributed

    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield distributed.group.WORLD
        distributed.barrier()  # gloo may abort a process whose peers have closed their connections
    finally:
        distributed.destroy_process_group()
        # A thread of gloo still lets go of the tensors of the last collectives, for which it needs the interpreter; where that ends
        # first, the process aborts ("terminate called without an active exception", 4 of 120 busy processes, none after this).
        time.sleep(0 if on_gpu else 0.2)


@contextmanager
def said_once(group: ProcessGroup | None) -> Iterator[None]:
    """Within this context only the first worker of a group warns."""
    if Workers(group).rank == 0:
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _channelwise(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


class Fill:
    """Forward pre-hook of a model: a worker without images puts an image of zeros through it, to keep in step with the others."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.workers.size == 1 or len(args[0]):
            return None
        self.workers.filling = True
        return (args[0].new_zeros(1, *args[0].shape[1:]), *args[1:])


class Drop:
    """Forward hook of a model after :class:`Fill`: the image of zeros has no logits."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if not self.workers.filling:
            return None
        self.workers.filling = False
        return None if output is None else logits_of(output)[:0]  # None: the forward failed


class Normalise:
    """Forward pre-hook of a BatchNorm layer without stored statistics: its input, normalised by the images of all workers.

    The layer then has statistics that change nothing, and does the rest: scale, shift, an activation of its own.

    Attributes:
        exact: whether the layer sums channels-last images exactly when it is alone, in which it would take no statistics.
    """

    def __init__(self, workers: Workers, exact: bool) -> None:
        self.workers, self.exact = workers, exact

    def __call__(self, layer: _BatchNorm, args: tuple[Any, ...]) -> tuple[Tensor] | None:
        (x,) = args
        if self.workers.size == 1:
            return None
        if self.workers.images * x[0].numel() == x.shape[1]:
            raise ValueError("Expected more than 1 value per channel, of all workers together")  # as torch says it
        mean, var, _ = self.workers.moments(x)
        normalised = (x.float() - _channelwise(mean, x)) * _channelwise((var + layer.eps).rsqrt(), x)
        layer.running_mean, layer.running_var = torch.zeros_like(mean), torch.full_like(var, 1 - layer.eps)
        return (normalised.to(x.dtype),)


class Forget:
    """Forward hook of a BatchNorm layer after :class:`Normalise`: it has no statistics again."""

    def __init__(self, workers: Workers) -> None:
        self.workers = workers

    def __call__(self, layer: _BatchNorm, args: tuple[Any, ...], output: Any) -> None:
        if self.workers.size > 1:
            layer.running_mean = layer.running_var = None


HOOKS = (Fill, Drop, Normalise, Forget)


def connect(module: nn.Module, models: Sequence[nn.Module], workers: Workers) -> None:
    """Let every layer of a module take its statistics over all workers; with a worker alone, as they were before.

    Args:
        module: an adapter. Parts of it that have an attribute ``workers`` are given them.
        models: its classifiers, which are called with images.
        workers: to share with.
    """
    for part in [module, *(part for model in models for part in model.modules()), *module.modules()]:
        _remove_hooks(part)
        if hasattr(part, "workers"):
            part.workers = workers  # type: ignore[assignment]
    layers = {part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is None}
    if workers.size > 1:
        for layer in layers:
            exact = isinstance(layer, channels_last.ChannelsLastBatchNorm2d)
            channels_last.sum_plainly(layer)
            layer.register_forward_pre_hook(Normalise(workers, exact))
            layer.register_forward_hook(Forget(workers), always_call=True)
        for model in models:
            model.register_forward_pre_hook(Fill(workers))
            model.register_forward_hook(Drop(workers), always_call=True)


def _remove_hooks(part: nn.Module) -> None:
    for hooks in (part._forward_pre_hooks, part._forward_hooks):  # noqa: SLF001  # a handle is lost in a copy
        for key in [key for key, hook in hooks.items() if isinstance(hook, HOOKS)]:
            if getattr(hooks.pop(key), "exact", False):
                channels_last.sum_exactly(part)
