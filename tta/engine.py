"""The online loop on Lightning: each batch is predicted, learned from and scored once, as it arrives.

Only this file, ``callbacks.py`` and ``progress.py`` import lightning. ``evaluate`` equals a plain ``for`` loop over the
stream bit for bit.
"""

import copy
import logging
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tta import leftovers, methods
from tta.adapter import Adapter, Output
from tta.batches import images_and_labels
from tta.callbacks import AdaptCallback, Consistency, SourceError, refuse_processes
from tta.config import as_dict
from tta.datasets.domains import to_float
from tta.datasets.stream import Batch, Stream
from tta.labels import UNKNOWN
from tta.progress import OnlineProgress
from tta.results import Predictions, Result, Row, curves, environment, metrics
from tta.results.cost import Passes, forget_peak_memory, peak_memory_mb
from tta.results.record import Record

__all__ = ["AdaptCallback", "Consistency", "OnlineModule", "OnlineProgress", "evaluate", "measure_cost", "reset_period"]

LEFTOVERS = ("join", "keep")
PRECISIONS = ("32-true", "bf16-mixed")
# A measured cost up to this much above a whole number counts as that number: the rest is noise of the clock, and a
# method that only predicts must not miss batches.
MARGIN = 0.1


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
) -> Result:
    """Online error of an adapter on a stream: every sample predicted once, when it arrives.

    Args:
        adapter: made by :func:`tta.adapt`; it continues from its present state and keeps what it learns.
        stream: made by :func:`tta.stream`.
        reset: back to the source model ``"never"``, before each ``"domain"``, before each ``"batch"``, or every N
            batches (``N`` or ``"N batches"``). Default: the reset of the stream's protocol. A batch of several domains
            belongs to the domain of its first sample.
        cost: time that learning from a batch takes, in batches of the stream. The adapter learns from the first of every
            ``ceil(cost)`` batches; the others arrive too early and are only predicted. ``"measured"``: measured on the
            first batch, see :func:`measure_cost`. Default: the cost of the stream's protocol, 1 unless it is ``budget``.
        progress: show a progress bar with the domain, the online error so far and images/s.
        logger: any Lightning logger(s); receives ``error/<domain>``, ``mean_error`` and the numeric metrics.
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

    Returns:
        The errors per domain, with a manifest to reproduce them. ``result.metrics`` holds, beside
        :func:`tta.results.metrics.summary`:

        * ``forwards``, ``backwards``: passes counted in images, see :class:`tta.results.cost.Passes`; also ``.._per_image``;
        * ``images_per_second``, ``peak_memory_mb``: of this run on this machine, reading of images included;
        * ``collapse``: see :func:`tta.results.curves.collapse`;
        * ``source_error_before``, ``source_error_after``: in percent, with ``clean``.

    Raises:
        ValueError: an unknown reset, cost or ``leftover``, a precision that is not supported, or ``oracle_steps`` below 0.
        SystemExit: the run was stopped by SIGTERM or Ctrl+C.
    """
    if precision not in PRECISIONS:
        raise ValueError(
            f"precision is one of {', '.join(PRECISIONS)}; got {precision!r}. Steps of 16-mixed would be unscaled, and "
            "steps of 1e-4 vanish in weights that are themselves 16 bits wide."
        )
    if leftover not in LEFTOVERS:
        raise ValueError(f"leftover is one of {', '.join(map(repr, LEFTOVERS))}; got {leftover!r}.")
    device, joined = adapter.device, 0
    if leftover == "join":
        with isolate_rng():
            stream, joined = leftovers.joined(stream, adapter)
            clean = None if clean is None else leftovers.joined(clean, adapter, paused=True)[0]
    forgetting = [] if clean is None else [SourceError(clean, num_workers)]
    with _quiet(), isolate_rng():
        pl.seed_everything(stream.seed, verbose=False)
        trainer = pl.Trainer(
            accelerator=accelerator,
            devices=1,
            precision=precision,  # type: ignore[arg-type]  # a str, checked above
            logger=logger,
            callbacks=[*callbacks, *forgetting, *([OnlineProgress(stream)] if progress else [])],
            enable_progress_bar=progress,
            enable_model_summary=False,
            enable_checkpointing=False,
            inference_mode=False,  # no_grad is enough, and inference tensors would make the adapter copy each batch
        )
        module = OnlineModule(
            adapter,
            reset=stream.reset if reset is None else reset,
            cost=stream.cost if cost is None else cost,
            paused=stream.paused,
            oracle_steps=oracle_steps,
            finish=None if _on_cpu(trainer) else stream.finish,
            check_logits=stream.check_logits,
        )
        _test(trainer, module, stream, num_workers)
    adapter.to(device)
    predictions = module.predictions()
    return Result(
        method=methods.name_of(type(adapter)),
        stream=stream.name,
        seed=stream.seed,
        reset=module.reset,
        rows=tuple(_rows([domain.name for domain in stream.domains], predictions)),
        config=as_dict(adapter.config),
        manifest={
            **_manifest(module, stream, clean, precision, oracle_steps),
            **({"leftovers_joined": joined} if joined else {}),
        },
        seconds=module.seconds,
        skipped_updates=module.skipped_updates,
        metrics={**module.metrics, **(forgetting[0].errors if forgetting else {})},
        predictions=predictions,
    )


def _on_cpu(trainer: pl.Trainer) -> bool:
    return trainer.strategy.root_device.type == "cpu"


def _test(trainer: pl.Trainer, module: "OnlineModule", stream: Stream, num_workers: int) -> None:
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
    module: "OnlineModule", stream: Stream, clean: Stream | None, precision: str, oracle_steps: int
) -> dict[str, Any]:
    """The settings, data and environment that would reproduce a run."""
    adapter = module.adapter
    return {
        "method": methods.name_of(type(adapter)),
        "preset": adapter.preset,
        "config": as_dict(adapter.config),
        "model": {
            "spec": getattr(adapter.model, "spec", type(adapter.model).__name__),
            "weights": adapter.source_fingerprint,
            "preprocessing": getattr(adapter.model, "preprocessing", None),
        },
        "source_statistics": adapter.source_statistics,
        "data": stream.describe(),
        **({} if clean is None else {"clean": clean.describe()}),
        **({"oracle_steps": oracle_steps} if oracle_steps else {}),
        "reset": module.reset,
        "cost": module.cost,
        "paused_batches": module.paused_batches,
        "scored_forward": adapter.scored_forward,
        "precision": precision,
        "device": module.device_name,
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }


def _rows(domains: Sequence[str], predictions: Predictions) -> Iterator[Row]:
    for number, domain in enumerate(domains):
        here = (predictions.domain == number) & (predictions.label != UNKNOWN)
        wrong = here & (predictions.prediction != predictions.label)
        yield Row(domain=domain, samples=int(here.sum()), errors=int(wrong.sum()))


def reset_period(reset: str | int) -> tuple[str, int]:
    """A reset by its name in results, and the number of batches between two resets (0: never, -1: each domain).

    Raises:
        ValueError: not ``never``, ``domain``, ``batch``, a positive number or ``"N batches"``.
    """
    fixed = {"never": 0, "domain": -1, "batch": 1}
    if reset in fixed:
        return str(reset), fixed[str(reset)]
    number = str(reset).removesuffix("batches").strip()
    if not number.isdigit() or int(number) < 1:
        raise ValueError(f"reset is 'never', 'domain', 'batch', or a number of batches such as 10; got {reset!r}.")
    return ("batch", 1) if int(number) == 1 else (f"{int(number)} batches", int(number))


def measure_cost(adapter: Adapter, images: Tensor, *, repeats: int = 10) -> float:
    """Time of a step of the adapter on a batch, divided by the time its model takes to predict the batch; 1 or more.

    Alfarra et al., "Evaluation of Test-Time Adaptation Under Computational Time Constraints", ICML 2024. The two run
    alternately, and the fastest run of each counts. They run on a copy: the adapter itself learns nothing.

    Args:
        adapter: on its present device, in its present state.
        images: one batch, as the adapter takes it.
        repeats: number of timed runs, after one that is not timed.
    """
    trial = copy.deepcopy(adapter)

    def seconds(run: Callable[[Tensor], Any]) -> float:
        _wait_for(images.device)
        start = time.perf_counter()
        run(images)
        _wait_for(images.device)
        return time.perf_counter() - start

    with isolate_rng(), torch.no_grad():
        times = [(seconds(trial), seconds(trial.model)) for _ in range(repeats + 1)]
    learning, predicting = (min(column) for column in zip(*times[1:], strict=True))
    return float(max(1.0, learning / predicting))


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class OnlineModule(pl.LightningModule):
    """An adapter as a LightningModule, for ``Trainer.test`` and ``Trainer.predict`` of your own.

    A loader may give :class:`~tta.datasets.Batch` objects, pairs ``(images, labels)``, mappings of Hugging Face with
    ``pixel_values`` (or ``images``, ``image``, ``img``) and ``labels`` (or ``label``), or in ``predict`` images alone.
    Only images reach the adapter. ``test_step`` returns the logits to callbacks as ``outputs["logits"]``.

    One process adapts to the whole stream: a Trainer with several is refused with a ValueError.

    Args:
        adapter: made by :func:`tta.adapt`.
        reset: as in :func:`tta.evaluate`.
        cost: as in :func:`tta.evaluate`.
        paused: for each batch whether it is predicted without learning; empty if none is.
        oracle_steps: as in :func:`tta.evaluate`.
        finish: applied to each batch once its images are on the device, such as :meth:`tta.datasets.Stream.finish` for
            an unfinished loader.
        check_logits: called with the number of logits of the first batch; raises if the model has other classes.
    """

    def __init__(
        self,
        adapter: Adapter,
        *,
        reset: str | int = "never",
        cost: float | str = 1.0,
        paused: Sequence[bool] = (),
        oracle_steps: int = 0,
        finish: Callable[[Batch], Batch] | None = None,
        check_logits: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if oracle_steps < 0:
            raise ValueError(f"oracle_steps is a number of steps a batch, 0 for no oracle; got {oracle_steps}.")
        if cost != "measured" and (isinstance(cost, str) or not 1 <= cost < math.inf):
            raise ValueError(f"cost is a number of batches, 1 or more, or 'measured'; got {cost!r}.")
        self.adapter = adapter
        self.reset, self._period = reset_period(reset)
        self.cost = cost
        self.paused_batches = 0
        self._margin = MARGIN if cost == "measured" else 0.0
        self._paused = paused
        self._oracle_steps = oracle_steps
        self.seconds = 0.0
        self.device_name = "cpu"
        self.finish = finish
        self.check_logits = check_logits
        self.metrics: dict[str, Any] = {}
        self.passes = Passes()
        self._record = Record()
        self._last_domain = -1
        self._skipped = 0

    @property
    def skipped_updates(self) -> int:
        """Updates skipped in this run, over all resets."""
        return self._skipped + self.adapter.skipped_updates

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Batch:
        """Move only the images: labels stay where no adapter can see them."""
        if isinstance(batch, Batch):
            images, labels, domain, index = batch
        else:
            images, labels = images_and_labels(batch)
            first = self._record.samples
            domain = torch.full((len(images),), dataloader_idx)
            index = torch.arange(first, first + len(images))
        here = Batch(images.to(device, non_blocking=True), labels, domain, index)
        here = here if self.finish is None else self.finish(here)
        return here._replace(images=to_float(here.images))

    def setup(self, stage: str) -> None:
        refuse_processes(self.trainer, type(self).__name__)

    def on_test_start(self) -> None:
        self._begin()
        self.passes = Passes()
        self.passes.attach(self.adapter)
        forget_peak_memory(self.device)

    def on_predict_start(self) -> None:
        self._begin()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        output = self._predict_and_learn(batch, batch_idx)
        if batch_idx == 0 and self.check_logits is not None:
            self.check_logits(output.logits.shape[1])
        self._record.add(output.logits, batch.labels, batch.domain, batch.index, output.outlier_score)
        return {"logits": output.logits}

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._predict_and_learn(batch, batch_idx).logits

    def on_test_epoch_end(self) -> None:
        _wait_for(self.device)
        if self.device.type == "cuda":
            self.device_name = torch.cuda.get_device_name(self.device)
        self.seconds = time.perf_counter() - self._started
        self.passes.detach()
        predictions = self.predictions()
        if not len(predictions):
            return
        loader = self.trainer.test_dataloaders
        known = getattr(getattr(loader, "dataset", loader), "domains", None)
        highest = int(predictions.domain.max())
        names = [domain.name for domain in known] if known else [str(number) for number in range(highest + 1)]
        rows = list(_rows(names, predictions))
        self.metrics = self._measured(predictions, rows)
        scored = {f"error/{row.domain}": row.error for row in rows if row.samples}
        if scored:
            numbers = {
                name: float(value)
                for name, value in self.metrics.items()
                if isinstance(value, (int, float)) and not math.isnan(value)
            }
            mean = sum(scored.values()) / len(scored)
            self.log_dict({**scored, "mean_error": mean, **numbers}, batch_size=1)

    def _measured(self, predictions: Predictions, rows: Sequence[Row]) -> dict[str, Any]:
        images, passes = len(predictions), self.passes
        return {
            **metrics.summary(predictions, rows, classes=self._record.classes),
            "collapse": curves.collapse(curves.per_batch(predictions, [row.domain for row in rows])),
            "forwards": passes.forwards,
            "backwards": passes.backwards,
            "forwards_per_image": passes.forwards / images,
            "backwards_per_image": passes.backwards / images,
            "images_per_second": images / self.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
        }

    def predictions(self) -> Predictions:
        """The predictions so far, in stream order."""
        return self._record.predictions()

    def wrong_and_known(self) -> tuple[int, int]:
        """Errors and samples with a known class so far; synchronises the device."""
        return self._record.wrong_and_known()

    def _begin(self) -> None:
        self._record = Record()
        self._last_domain = -1
        self._skipped = -self.adapter.skipped_updates
        self.paused_batches = 0
        self._started = time.perf_counter()

    def _predict_and_learn(self, batch: Batch, batch_idx: int) -> Output:
        domain = int(batch.domain[0])
        changed, self._last_domain = domain != self._last_domain, domain
        if (self._period == -1 and changed) or (self._period > 0 and batch_idx % self._period == 0):
            self._skipped += self.adapter.skipped_updates  # a reset clears the adapter's own count
            self.adapter.reset()
        if isinstance(self.cost, str):
            start = time.perf_counter()
            self.cost = measure_cost(self.adapter, batch.images)
            spent = time.perf_counter() - start
            self._started += spent
            self._record.leave_out(spent)
        missed = batch_idx % math.ceil(self.cost - self._margin) > 0
        if missed or (batch_idx < len(self._paused) and self._paused[batch_idx]):
            self.paused_batches += 1
            with self.adapter.paused():
                return self.adapter.step(batch.images)
        return self._best_of_steps(batch) if self._oracle_steps else self.adapter.step(batch.images)

    def _best_of_steps(self, batch: Batch) -> Output:
        """The best prediction, by the labels, after each of some steps on a batch; the adapter continues from that step."""
        best: tuple[float, float] | None = None
        for number in range(self._oracle_steps):
            self.adapter.step(batch.images)
            with self.adapter.paused():
                output = self.adapter.step(batch.images)
            quality = _quality(output.logits.cpu(), batch.labels)
            if best is None or quality > best:
                best, found, chosen, state = quality, output, number, self.adapter.state_dict()
        if chosen < self._oracle_steps - 1:
            self.adapter.load_state_dict(state)
        return found


def _quality(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Number of correct predictions, then minus the sum of cross-entropies, over known classes; higher is better."""
    known = labels != UNKNOWN
    logits, labels = logits[known], labels[known]
    return float((logits.argmax(1) == labels).sum()), -float(
        nn.functional.cross_entropy(logits, labels, reduction="sum")
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the trainer's banners, tips and data loader hints; errors are still shown."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
