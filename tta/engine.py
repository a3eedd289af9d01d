"""The run of an adapter over a stream by Lightning's Trainer, and its result.

Only this file and those beside it, ``online.py``, ``callbacks.py`` and ``progress.py``, and the source stage in ``training/``
import lightning. ``evaluate`` equals a plain ``for`` loop over the stream bit for bit.
"""

from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch.utils.data import DataLoader

from tta import compiling, leftovers, methods
from tta.adapter import Adapter
from tta.callbacks import AdaptCallback, Consistency, SourceError
from tta.config import as_dict
from tta.datasets.stream import Batch, Stream
from tta.messages import trainer_silenced
from tta.online import OnlineModule, measure_cost, reset_period, rows_of
from tta.precision import PRECISIONS, warn_if_slow
from tta.progress import OnlineProgress
from tta.results import Result, environment
from tta.results.keeper import spread
from tta.towers import prompts_of

__all__ = ["AdaptCallback", "Consistency", "OnlineModule", "OnlineProgress", "evaluate", "measure_cost", "reset_period"]

LEFTOVERS = ("join", "keep")


def evaluate(
    adapter: Adapter,
    stream: Stream,
    *,
    reset: str | int | None = None,
    cost: float | str | None = None,
    progress: bool = True,
    logger: Logger | Sequence[Logger] | bool = False,
    callbacks: Sequence[Callback] = (),
    accelerator: str = "auto",
    precision: str = "32-true",
    num_workers: int = 0,
    clean: Stream | None = None,
    oracle_steps: int = 0,
    leftover: str = "join",
    frames: Sequence[int] | None = None,
) -> Result:
    """Online error of an adapter on a stream: every sample predicted once, when it arrives.

    Args:
        adapter: made by :func:`tta.adapt`; it continues from its present state and keeps what it learns. One that shares a stream
            with other workers (``process_group=``) takes its part of every batch; all workers call this, and each is given the
            whole result.
        stream: made by :func:`tta.stream`.
        reset: back to the source model ``"never"``, before each ``"domain"``, before each ``"batch"``, or every N
            batches (``N`` or ``"N batches"``). Default: the reset of the stream's protocol. A batch of several domains
            belongs to the domain of its first sample.
        cost: time that learning from a batch takes, in batches of the stream. The adapter learns from the first of every
            ``ceil(cost)`` batches; the others arrive too early and are only predicted. ``"measured"``: measured on the
            first batch, see :func:`measure_cost`. Default: the cost of the stream's protocol, 1 unless it is ``budget``.
        progress: show a progress bar with the domain, the online error so far and images/s.
        logger: any Lightning logger(s); receives ``error/<domain>``, ``mean_error`` and the numeric metrics (of maps
            ``mIoU/<domain>``, ``mean_mIoU``).
        callbacks: further Lightning callbacks.
        accelerator: ``"auto"``, ``"cpu"``, ``"gpu"``; one stream runs on one device.
        precision: ``"32-true"``, the reference, or ``"bf16-mixed"``.
        num_workers: processes that decode ahead; they change no number. Images travel as uint8, to a GPU from pinned
            memory, and are scaled to [0, 1] there. A GPU also makes the corruptions of generated domains; without one
            the workers make them.
        clean: the source domain, such as ``stream.clean()``, predicted before and after the run without learning, to
            measure forgetting.
        oracle_steps: above 0, the adapter takes this many steps on each batch and predicts after each; the best prediction
            by the labels counts (most correct, then lowest cross-entropy), and the adapter continues from that step. This
            is the oracle of Zhao et al., "On Pitfalls of Test-Time Adaptation", ICML 2023; no deployment has the labels.
            The adapter itself sees no label.
        leftover: ``"join"``: a leftover batch (the last of a domain or of the stream, at most a quarter of a batch or a
            single image) that the method cannot take, such as one image where a BatchNorm layer would see one value per
            channel, joins the batch before it. Whether it can is tried before the run, on a copy; the manifest says how
            many joined. All other batches are as they were. ``"keep"``: no batch is changed.
        frames: places in the stream, from 0, of pictures that a result of maps or boxes keeps for ``tta plot maps``, their longer
            side reduced to 384 pixels. Default: the last one of up to eight domains; ``[]``: none.

    Returns:
        The errors per domain, with a manifest to reproduce them. ``result.metrics`` holds, beside
        :func:`tta.results.metrics.summary`:

        * ``forwards``, ``backwards``: passes counted in images, see :class:`tta.results.cost.Passes`; also ``.._per_image``;
        * ``images_per_second``, ``peak_memory_mb``: of this run on this machine, reading of images included;
        * ``collapse``: see :func:`tta.results.curves.collapse`;
        * ``feedback``, under protocol ``feedback``: ``questions`` asked, ``labels`` that the method was told and took, how many
          answers were made ``wrong``, and how many were still ``open`` at the end;
        * ``guard``, of a guarded adapter: its decisions, and how often it took each; also the column ``guard`` of the curves;
        * ``source_error_before``, ``source_error_after``: in percent, with ``clean``.

    Raises:
        ValueError: an unknown reset, cost or ``leftover``, a precision that is not supported, ``oracle_steps`` below 0, or a place
            that the stream does not have.
        SystemExit: the run was stopped by SIGTERM or Ctrl+C.
    """
    check_settings(precision=precision, accelerator=accelerator, num_workers=num_workers, leftover=leftover)
    check_frames(frames, stream.samples)
    progress = progress and adapter.workers.rank == 0
    device, joined = adapter.device, 0
    if leftover == "join":
        with isolate_rng():
            stream, joined = leftovers.joined(stream, adapter)
            clean = None if clean is None else leftovers.joined(clean, adapter, paused=True)[0]
    forgetting = [] if clean is None else [SourceError(clean, num_workers)]
    with trainer_silenced(), isolate_rng():
        pl.seed_everything(stream.seed, verbose=False)
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=_devices(adapter, accelerator),
            # To Lightning each worker is a run of its own: they share the stream below it.
            plugins=None if adapter.workers.size == 1 else [LightningEnvironment()],
            precision=precision,  # type: ignore[arg-type]  # a str, checked above
            logger=logger,
            callbacks=[*callbacks, *forgetting, *([OnlineProgress(stream)] if progress else [])],
            enable_progress_bar=progress,
            enable_model_summary=False,
            enable_checkpointing=False,
            inference_mode=False,  # no_grad is enough, and inference tensors would make the adapter copy each batch
        )
        if adapter.workers.rank == 0:
            warn_if_slow(precision, trainer.strategy.root_device)
        module = OnlineModule(
            adapter,
            reset=stream.reset if reset is None else reset,
            cost=stream.cost if cost is None else cost,
            paused=stream.paused,
            oracle_steps=oracle_steps,
            finish=None if _on_cpu(trainer) else stream.finish,
            check_logits=stream.check_logits,
            asked=stream.asked,
            seed=stream.seed,
            frames=spread(stream.order) if frames is None else frames,
        )
        _test(trainer, module, stream, num_workers)
    adapter.to(device)
    predictions = module.predictions()
    return Result(
        method=methods.name_of(type(adapter)),
        stream=stream.name,
        seed=stream.seed,
        reset=module.reset,
        rows=module.rows or tuple(rows_of([domain.name for domain in stream.domains], predictions, module.task)),
        config=as_dict(adapter.config),
        manifest={
            **_manifest(module, stream, clean, precision, oracle_steps),
            **({"leftovers_joined": joined} if joined else {}),
        },
        seconds=module.seconds,
        skipped_updates=module.skipped_updates,
        metrics={**module.metrics, **(forgetting[0].errors if forgetting else {})},
        predictions=predictions,
        task=module.task.name,
        frames=module.frames(),
    )


def _devices(adapter: Adapter, accelerator: str) -> int | list[int]:
    """The device of a run: the first, or of several workers the one that this process has chosen."""
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return [torch.cuda.current_device()] if adapter.workers.size > 1 and on_gpu else 1


def _on_cpu(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"


def _test(trainer: pl.Trainer, module: OnlineModule, stream: Stream, num_workers: int) -> None:
    """Run the module over the stream, read by workers or by this process."""
    loader: Stream | DataLoader[Batch] = stream  # without workers a DataLoader would only add 0.1 ms per batch
    if num_workers or not _on_cpu(trainer):
        on_cuda = trainer.strategy.root_device.type == "cuda"
        loader = stream.loader(num_workers, unfinished=not _on_cpu(trainer), pin_memory=on_cuda)
    try:
        trainer.test(module, loader, verbose=False)
        if trainer.received_sigterm:  # the Trainer does not check after the last batch
            raise SIGTERMException
    finally:
        module.passes.detach()


def _manifest(
    module: OnlineModule, stream: Stream, clean: Stream | None, precision: str, oracle_steps: int
) -> dict[str, Any]:
    """The settings, data and environment that would reproduce a run."""
    adapter = module.adapter
    return {
        "method": methods.name_of(type(adapter)),
        "task": module.task.name,
        "preset": adapter.preset,
        "config": as_dict(adapter.config),
        "model": {
            "spec": getattr(adapter.model, "spec", type(adapter.model).__name__),
            "weights": adapter.source_fingerprint,
            "preprocessing": getattr(adapter.model, "preprocessing", None),
            **prompts_of(adapter.model),
        },
        "source_statistics": adapter.source_statistics,
        "data": stream.describe(),
        **({} if clean is None else {"clean": clean.describe()}),
        **({"oracle_steps": oracle_steps} if oracle_steps else {}),
        "reset": module.reset,
        "cost": module.cost,
        "paused_batches": module.paused_batches,
        "scored_forward": adapter.scored_forward,
        **({} if adapter.guard is None else {"guard": adapter.guard.described()}),
        "precision": precision,
        **({"compiled": True} if compiling.is_compiled(adapter.model) else {}),
        "device": module.device_name,
        "threads": torch.get_num_threads(),
        **({} if adapter.workers.size == 1 else {"workers": adapter.workers.size}),
        "environment": environment(),
    }


def check_settings(
    *, precision: str, accelerator: str, num_workers: int, leftover: str, reset: str | int | None = None
) -> None:
    """Refuse settings of :func:`evaluate` that do not exist, before anything is loaded for it.

    Raises:
        ValueError: says which and what there is.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}. Steps of 16-mixed would be unscaled, and "
            "steps of 1e-4 vanish in weights that are themselves 16 bits wide."
        )
    if leftover not in LEFTOVERS:
        raise ValueError(f"leftover is one of {', '.join(map(repr, LEFTOVERS))}; got {leftover!r}.")
    accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if accelerator not in accelerators:
        raise ValueError(f"accelerator is one of {', '.join(accelerators)}; got {accelerator!r}.")
    if num_workers < 0:
        raise ValueError(f"num_workers is 0 (no further process) or more; got {num_workers}.")
    if reset is not None:
        reset_period(reset)


def check_frames(frames: Sequence[int] | None, samples: int) -> None:
    """Refuse places that a stream of so many samples does not have.

    Raises:
        ValueError: names one.
    """
    for place in frames or ():
        if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < samples:
            raise ValueError(f"frames are places in the stream, from 0 to {samples - 1}; got {place!r}.")
