"""The online loop as a LightningModule: each batch is predicted, learned from and scored once, as it arrives."""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data.distributed import DistributedSampler

from tta.adapter import Adapter, Output
from tta.batches import images_and_labels
from tta.datasets.domains import to_float
from tta.datasets.stream import Asked, Batch
from tta.distributed import Workers
from tta.functional import rows
from tta.labels import UNKNOWN
from tta.oracle import Oracle
from tta.results import ACTIONS, Frame, Predictions, Row, curves, metrics
from tta.results.cost import Passes, forget_peak_memory, peak_memory_mb
from tta.results.keeper import FrameKeeper
from tta.results.record import Record
from tta.tasks import Score, Task, resized

# A measured cost up to this much above a whole number counts as that number: the rest is noise of the clock, and a
# method that only predicts must not miss batches.
MARGIN = 0.1


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

    Several processes of a Trainer (``strategy="ddp"``) adapt to one stream together, with a method that can
    (:attr:`tta.adapter.Adapter.distributed`). Each reads the batches whole and takes its part, so that the Trainer must not
    divide the samples: ``Trainer(..., use_distributed_sampler=False)``. Metrics, logged numbers and predictions are of all
    parts, in the order of the stream, and the same in every process. A callback of the Trainer that
    has a method ``on_guard_event(trainer, module, event)`` is called with each decision of a guard.

    Args:
        adapter: made by :func:`tta.adapt`.
        reset: as in :func:`tta.evaluate`.
        cost: as in :func:`tta.evaluate`.
        paused: for each batch whether it is predicted without learning; empty if none is.
        oracle_steps: as in :func:`tta.evaluate`.
        finish: applied to each batch once its images are on the device, such as :meth:`tta.datasets.Stream.finish` for
            an unfinished loader.
        check_logits: called with the number of logits of the first batch; raises if the model has other classes.
        asked: answers that the method is given about its predictions, if it can use any; None: none.
        seed: of the wrong ones among them.
        frames: places in the stream of pictures that are kept, see :func:`tta.evaluate`.

    Raises:
        ValueError: a setting that does not fit; in a run, several processes with a method that cannot share a stream, with
            a sampler that divides the samples, or with a setting that only one process can serve.
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
        asked: Asked | None = None,
        seed: int = 0,
        frames: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if oracle_steps and asked is not None:
            raise ValueError("oracle_steps chooses steps by the labels; leave it out under protocol 'feedback'.")
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
        self._asked, self._seed = asked, seed
        self._oracle: Oracle | None = None
        self.seconds = 0.0
        self.device_name = "cpu"
        self.finish = finish
        self.check_logits = check_logits
        self.metrics: dict[str, Any] = {}
        self.rows: tuple[Row, ...] = ()
        self.passes = Passes()
        self._record = Record()
        self._chosen = tuple(frames)
        self._keeper = FrameKeeper()
        self._first = 0  # place in the stream of the first sample of this worker's part of the last batch
        self.guard_events: list[dict[str, Any]] = []
        self._last_domain = self._domain = -1
        self._skipped = self._arrived = 0
        self._joined = False  # whether this module made the adapter share the stream
        self._whole: Predictions | None = None  # of all workers, after the run

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
            domain = torch.full((len(images),), dataloader_idx)
            index = torch.arange(self._arrived, self._arrived + len(images))
        self._domain = int(domain[0])
        self._first = self._arrived + self.adapter.workers.first_of(len(images))
        self._arrived += len(images)
        mine = Batch(*map(self.adapter.workers.part_of, (images, labels, domain, index)))
        here = mine._replace(images=mine.images.to(device, non_blocking=True))
        here = here if self.finish is None or not len(here.labels) else self.finish(here)
        return here._replace(images=to_float(here.images))

    def setup(self, stage: str) -> None:
        if self.trainer.world_size > 1 and self.adapter.workers.size == 1:
            self.adapter.to(self.trainer.strategy.root_device)
            self.adapter.join(torch.distributed.group.WORLD)
            self._joined = True
        if self.adapter.workers.size > 1:
            self._check_shared()

    def teardown(self, stage: str) -> None:
        if self._joined:
            self.adapter.join(None)
            self._joined = False

    def _check_shared(self) -> None:
        """Refuse what the workers would not decide alike."""
        wanted = {
            "oracle_steps": self._oracle_steps > 0,
            "protocol 'feedback'": self._asked is not None,
            "cost='measured'": self.cost == "measured",
        }
        if found := [name for name, given in wanted.items() if given]:
            raise ValueError(f"{', '.join(found)} would be decided by one worker's part; use one process.")

    def _check_sampler(self, loaders: Any) -> None:
        loader = loaders[0] if isinstance(loaders, list) else loaders
        if self.adapter.workers.size > 1 and isinstance(getattr(loader, "sampler", None), DistributedSampler):
            raise ValueError(
                "The loader gives each process samples of its own, some twice and not in the stream's order. Use Trainer(..., "
                "use_distributed_sampler=False): each process reads the batches and takes its part."
            )

    def on_test_start(self) -> None:
        self._check_sampler(self.trainer.test_dataloaders)
        self._begin()
        self.passes = Passes()
        self.passes.attach(self.adapter)
        forget_peak_memory(self.device)

    def on_predict_start(self) -> None:
        self._check_sampler(self.trainer.predict_dataloaders)
        self._begin()

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Tensor]:
        output = self._predict_and_learn(batch, batch_idx)
        if batch_idx == 0 and self.check_logits is not None and self.task.of_classes:
            self.check_logits(output.logits.shape[1])
        action = self._note_guard(batch_idx)
        self._record.add(
            output.logits, batch.labels, batch.domain, batch.index, output.outlier_score, action, self.adapter.task
        )
        self._keeper.add(self._first, batch.images, batch.labels, batch.domain, output.logits, self.task)
        return {"logits": output.logits}

    def _note_guard(self, batch_idx: int) -> int | None:
        """Note the guard's decisions on the last batch; its action as a place in ``ACTIONS``, None without a guard."""
        guard = self.adapter.guard
        if guard is None:
            return None
        for event in guard.events:
            self.guard_events.append({"batch": batch_idx, "kind": event.kind, "reason": event.reason})
            for callback in self.trainer.callbacks:  # type: ignore[attr-defined]  # the Trainer's own list
                if hasattr(callback, "on_guard_event"):
                    callback.on_guard_event(self.trainer, self, event)
        return ACTIONS.index(guard.action)

    def predict_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Tensor:
        return self._predict_and_learn(batch, batch_idx).logits

    def on_test_epoch_end(self) -> None:
        _wait_for(self.device)
        if self.device.type == "cuda":
            self.device_name = torch.cuda.get_device_name(self.device)
        self.seconds = time.perf_counter() - self._started
        self.passes.detach()
        predictions = self._whole = _together(self._record.predictions(), self.adapter.workers)
        if not len(predictions):
            return
        loader = self.trainer.test_dataloaders
        known = getattr(getattr(loader, "dataset", loader), "domains", None)
        highest = int(predictions.domain.max())
        names = [domain.name for domain in known] if known else [str(number) for number in range(highest + 1)]
        found = self.rows = tuple(rows_of(names, predictions, self.task))
        self.metrics = self._measured(predictions, found)
        name = self.task.score_name
        scored = {f"{name}/{row.domain}": self.task.value(row) for row in found if row.samples}
        if scored:
            numbers = {
                name: float(value)
                for name, value in self.metrics.items()
                if isinstance(value, (int, float)) and not math.isnan(value)
            }
            mean = sum(scored.values()) / len(scored)
            # The same in every process: synchronised only because Lightning would warn.
            shared = self.trainer.world_size > 1
            self.log_dict({**scored, f"mean_{name}": mean, **numbers}, batch_size=1, sync_dist=shared)

    def _measured(self, predictions: Predictions, rows: Sequence[Row]) -> dict[str, Any]:
        images, columns = len(predictions), curves.per_batch(predictions, [row.domain for row in rows])
        counts = self.adapter.workers.objects((self.passes.forwards, self.passes.backwards))
        forwards, backwards = (sum(column) for column in zip(*counts, strict=True))
        return {
            **metrics.summary(predictions, rows, classes=self._record.classes),
            "collapse": curves.collapse(columns),
            "forwards": forwards,
            "backwards": backwards,
            "forwards_per_image": forwards / images,
            "backwards_per_image": backwards / images,
            "images_per_second": images / self.seconds,
            "peak_memory_mb": peak_memory_mb(self.device),
            **({} if self.adapter.guard is None else {"guard": self._guarded(columns["guard"])}),
            **({} if self._oracle is None else {"feedback": {**self._oracle.counts, "open": self._oracle.open}}),
        }

    def _guarded(self, actions: Sequence[str]) -> dict[str, Any]:
        """Counts of the guard's decisions in this run, of what it did with each batch, and the decisions."""
        kinds = [event["kind"] for event in self.guard_events]
        return {
            "alarms": kinds.count("alarm") + kinds.count("labelled"),
            "labelled": kinds.count("labelled"),
            "overruled": kinds.count("overruled"),
            "rollbacks": kinds.count("rollback"),
            **{f"batches_{name}": actions.count(name) for name in ACTIONS},
            "events": self.guard_events,
        }

    def predictions(self) -> Predictions:
        """The predictions so far, in stream order; of several processes those of this one, and of all once the run has ended."""
        return self._record.predictions() if self._whole is None else self._whole

    def frames(self) -> tuple[Frame, ...]:
        """The pictures that were kept, those of all workers, in stream order."""
        parts = self.adapter.workers.objects(self._keeper.frames())
        return tuple(sorted((frame for part in parts for frame in part), key=lambda frame: frame.position))

    @property
    def task(self) -> Task:
        """The task of the adapter, once its outputs were seen."""
        return self.adapter.task

    def wrong_and_known(self) -> tuple[int, int]:
        """Errors and samples with a known class so far, of maps pixels; synchronises the device."""
        return self._record.wrong_and_known()

    def score(self) -> Score:
        """The score of all predictions so far; synchronises the device."""
        return self._record.score()

    def _begin(self) -> None:
        self._record, self._whole, self._arrived = Record(), None, 0
        self._keeper = FrameKeeper(self._chosen)
        self._oracle = None if self._asked is None else Oracle(self._asked, self._seed)
        self.guard_events = []
        self._last_domain = -1
        self._skipped = -self.adapter.skipped_updates
        self.paused_batches = 0
        self._started = time.perf_counter()

    def _predict_and_learn(self, batch: Batch, batch_idx: int) -> Output:
        changed, self._last_domain = self._domain != self._last_domain, self._domain
        if (self._period == -1 and changed) or (self._period > 0 and batch_idx % self._period == 0):
            self._skipped += self.adapter.skipped_updates  # a reset clears the adapter's own count
            self.adapter.reset()
            if self._oracle is not None:
                self._oracle.forget()
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
        if self._oracle_steps:
            return self._best_of_steps(batch)
        output = self.adapter.step(batch.images)
        if self._oracle is not None:
            self._oracle.after(self.adapter, output, batch.labels.cpu())
        return output

    def _best_of_steps(self, batch: Batch) -> Output:
        """The best prediction, by the labels, after each of some steps on a batch; the adapter continues from that step."""
        if not self.task.of_classes:
            raise ValueError(
                f"oracle_steps chooses steps by the classes; task='{self.task.name}' has other labels. Leave it out."
            )
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


def rows_of(domains: Sequence[str], predictions: Predictions, task: Task) -> Iterator[Row]:
    """The row of each domain, in their order."""
    for number, domain in enumerate(domains):
        yield Row(domain=domain, **task.tally(predictions.select(predictions.domain == number))._asdict())


def _together(own: Predictions, workers: Workers) -> Predictions:
    """The predictions of all workers in stream order: batch by batch, the parts of a batch in the order of the workers."""
    if workers.size == 1:
        return own
    parts = [dict(columns) for columns in workers.objects(dict(own.columns()))]
    names = [name for name in parts[0] if all(name in columns for columns in parts)]
    whole = {name: np.concatenate([columns[name] for columns in parts]) for name in names}
    order = np.argsort(whole["batch"], kind="stable")
    return Predictions(**{name: values[order] for name, values in whole.items()})


def _quality(logits: Tensor, labels: Tensor) -> tuple[float, float]:
    """Number of correct predictions, then minus the sum of cross-entropies, over known classes; higher is better.

    Args:
        logits: (batch, classes), or maps (batch, classes, height, width), resized where the masks have another size.
        labels: (batch,), or masks (batch, rows, columns), whose pixels count one by one.
    """
    if logits.dim() == 4:
        logits = resized(logits, labels)
    logits, labels = rows(logits), labels.flatten()
    known = labels != UNKNOWN
    logits, labels = logits[known], labels[known]
    return float((logits.argmax(1) == labels).sum()), -float(
        nn.functional.cross_entropy(logits, labels, reduction="sum")
    )
