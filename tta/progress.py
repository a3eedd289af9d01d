"""The progress bar of the engine."""

import math
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tta.datasets.stream import Stream
from tta.messages import plain


class OnlineProgress(ProgressBar):
    """A progress bar with the domain, the score so far (the online error) and images/s, refreshed at most 4 times a second."""

    REFRESH_SECONDS = 0.25

    def __init__(self, stream: Stream) -> None:
        super().__init__()
        self._stream = stream

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("{task.fields[status]}"), TimeRemainingColumn()]
        self._bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
        self._bar.start()
        self._task = self._bar.add_task("starting", total=len(self._stream), status="")
        self._started = self._refreshed = time.perf_counter()
        self._images = 0

    def on_test_batch_end(
        self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        self._images += len(batch.images)
        now = time.perf_counter()
        if now - self._refreshed < self.REFRESH_SECONDS:
            return
        self._refreshed = now
        score = pl_module.score()
        task = pl_module.task
        value = "-" if math.isnan(score.value) else f"{task.shown(score.value)} {task.unit}".strip()
        self._bar.update(
            self._task,
            completed=batch_idx + 1,
            description=escape(plain(self._stream.domains[int(batch.domain[0])].name)),
            status=f"online {score.name} {value}, {self._images / (now - self._started):.0f} images/s",
            refresh=True,
        )

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if hasattr(self, "_bar"):
            self._bar.stop()
