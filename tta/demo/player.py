"""The player: one thread that draws the batches, owns the adapter, and publishes what the page shows."""

import base64
import io
import json
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from tta import methods
from tta.adapter import Adapter
from tta.demo.pictures import CLEAN, Pictures, check
from tta.demo.settings import DemoSettings
from tta.labels import UNKNOWN
from tta.messages import require

LOG = logging.getLogger("tta.demo")
WINDOW = 8  # batches that a point of the curve averages over
POINTS = 240  # batches that the curve shows
MARKS = 60
LARGEST = 128  # pixels of a picture as the page gets it


class View(NamedTuple):
    """All that the page shows, as JSON, and its number: a view of another number has other content."""

    version: int
    body: bytes


class Mark(NamedTuple):
    """Something that happened at a batch: ``alarm``, ``guard``, ``domain``, ``method``, ``reset`` or ``error``."""

    batch: int
    kind: str
    text: str


@dataclass
class Score:
    """Images of known label, and how many of them the source model and the adapter got wrong."""

    images: int = 0
    source: int = 0
    adapted: int = 0

    def add(self, other: "Score") -> None:
        """Count another score in."""
        self.images += other.images
        self.source += other.source
        self.adapted += other.adapted

    def percent(self) -> tuple[float, float] | None:
        """The errors in %; None without images."""
        return (100 * self.source / self.images, 100 * self.adapted / self.images) if self.images else None


class Player:
    """Plays pictures to the source model and to an adapter, batch after batch.

    Its thread is the only one to touch the adapter; requests hand it functions, which run between two batches, and read
    the last :class:`View`.

    Args:
        model: the source model, which is not changed.
        pictures: of the stream.
        settings: see :class:`DemoSettings`.
        method: to begin with.
        source: source images or statistics, for the methods that need some.
        hparams: of ``method``; others have their own defaults.

    Raises:
        ValueError: a model, method or setting that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        pictures: Pictures,
        settings: DemoSettings,
        *,
        method: str = methods.DEFAULT,
        source: Any = None,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        check(settings.corruption, settings.severity)
        self.model, self.pictures, self.settings = model.eval(), pictures, settings
        self.corruption, self.severity, self.method = settings.corruption, settings.severity, method
        self.playing = settings.playing
        self._source, self._hparams = source, {method: dict(hparams or {})}
        self._check_classes()
        self.adapter = self._adapter(method)
        self._jobs: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run, name="tta-demo", daemon=True)
        self._version, self._due = (
            time.time_ns() // 10**6,
            0.0,
        )  # above those of a demo that ended, whose page is still open
        self._restart()

    # ------------------------------------------------------------------ for other threads

    def start(self) -> None:
        """Begin to play."""
        self._thread.start()

    def stop(self) -> None:
        """Finish the present batch, then end."""
        self._jobs.put(None)
        self._thread.join()

    def change(self, **wanted: Any) -> View:
        """Change the corruption, the severity, the method, or whether it plays; returns when this is done.

        Another corruption or severity is a change of domain: the adapter goes on. Another method begins with a fresh
        adapter.

        Args:
            wanted: any of ``corruption``, ``severity``, ``method``, ``playing``; None leaves it as it is.

        Raises:
            ValueError: there is no such thing, or the model does not fit the method; nothing was changed.
        """
        return self._called(lambda: self._change(**{key: value for key, value in wanted.items() if value is not None}))

    def reset(self) -> View:
        """Bring the adapter back to the source model and the stream to its beginning; returns when this is done."""
        return self._called(self._reset)

    def _called(self, function: Callable[[], None]) -> View:
        """The view after a function ran on the player's thread."""
        done: Future[View] = Future()

        def job() -> None:
            try:
                function()
                self._publish()
                done.set_result(self.view)
            except Exception as error:
                done.set_exception(error)

        self._jobs.put(job)
        return done.result()

    # ------------------------------------------------------------------ on its thread

    def _run(self) -> None:
        while True:
            try:
                job = self._jobs.get(timeout=max(0.0, self._due - time.monotonic()) if self.playing else None)
            except queue.Empty:
                self._due = time.monotonic() + self.settings.interval
                self._play()
                continue
            if job is None:
                return
            job()

    def _change(
        self,
        corruption: str | None = None,
        severity: int | None = None,
        method: str | None = None,
        playing: bool | None = None,
    ) -> None:
        before = self.corruption, self.severity
        domain = self.corruption if corruption is None else corruption, self.severity if severity is None else severity
        check(*domain)
        if method is not None and method != self.method:
            self.adapter = self._adapter(method)  # where this is refused, nothing has changed yet
            self.method = method
            self.since_start, self.in_domain = Score(), Score()
            self._window.clear()
            self._mark("method", f"{method}: a fresh adapter, from the source model")
        if domain != before:
            self.corruption, self.severity = domain
            self.in_domain = Score()
            self._window.clear()
            self._mark("domain", f"{self._domain()}: the adapter goes on")
        if playing is not None:
            self.playing = playing

    def _reset(self) -> None:
        self.adapter.reset()
        self._restart()

    def _restart(self) -> None:
        """Begin the stream and its counts anew."""
        self.number, self.since_start, self.in_domain = 0, Score(), Score()
        self._window: deque[Score] = deque(maxlen=WINDOW)
        self._points: deque[tuple[int, float, float]] = deque(maxlen=POINTS)
        self._marks: deque[Mark] = deque(maxlen=MARKS)
        self._shown: list[dict[str, Any]] = []
        self._answered = ""
        self._mark("reset", f"{self._domain()}, {self.method}: from the source model")
        self._publish()

    def _play(self) -> None:
        """One batch; one that fails stops the stream with a sentence."""
        try:
            shown = self.pictures.batch(self.number, self.corruption, self.severity)
            x = shown.images.to(self.adapter.device) / 255
            source, adapted = self._by_source(x), self.adapter(x)
            events = () if self.adapter.guard is None else self.adapter.guard.events
        except Exception as error:
            if not isinstance(error, (ValueError, FileNotFoundError)):
                LOG.exception("a batch failed")
            self.playing = False
            self.number += 1  # so that it is passed by when the stream goes on
            self._mark("error", f"{error} The stream is paused.")
            self._publish()
            return
        self.number += 1
        self._score(shown.labels, source.argmax(1).cpu(), adapted.argmax(1).cpu(), shown.images)
        for event in events:
            self._mark("alarm" if event.kind == "alarm" else "guard", f"{event.kind}: {event.reason}")
        guard = self.adapter.guard
        self._answered = guard.action if guard is not None else "source" if self.method == "source" else "learned"
        self._publish()

    def _by_source(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = self.model(x)
        return logits

    def _score(self, labels: Tensor, source: Tensor, adapted: Tensor, images: Tensor) -> None:
        """Count a batch and prepare it for the page."""
        known = labels != UNKNOWN
        wrong_source, wrong_adapted = known & (source != labels), known & (adapted != labels)
        score = Score(int(known.sum()), int(wrong_source.sum()), int(wrong_adapted.sum()))
        total = Score()
        self._window.append(score)
        for part in self._window:
            total.add(part)
        self.since_start.add(score)
        self.in_domain.add(score)
        if (errors := total.percent()) is not None:
            self._points.append((self.number, *errors))
        rows = zip(labels.tolist(), source.tolist(), adapted.tolist(), images, strict=True)
        self._shown = [
            {"image": data_url(image), **self._named(label, by_source, by_adapter)}
            for label, by_source, by_adapter, image in rows
        ]

    def _named(self, label: int, source: int, adapted: int) -> dict[str, Any]:
        """Classes of a picture by their names, and whether the predictions are right; None where nobody knows."""
        known = label != UNKNOWN
        return {
            "label": self._name(label) if known else None,
            "source": [self._name(source), source == label if known else None],
            "adapted": [self._name(adapted), adapted == label if known else None],
        }

    def _name(self, label: int) -> str:
        names = self.pictures.names
        return names[label] if names is not None and label < len(names) else str(label)

    # ------------------------------------------------------------------ what the page gets

    def _publish(self) -> None:
        """Replace the view as a whole, so that every reader sees one moment."""
        self._version += 1
        content = {
            "version": self._version,
            "playing": self.playing,
            "corruption": self.corruption,
            "severity": str(self.severity),
            "method": self.method,
            "batch": self.number,
            "answered": self._answered,
            "pictures": self._shown,
            "domain": asdict(self.in_domain),
            "start": asdict(self.since_start),
            "points": list(self._points),
            "marks": list(self._marks),
        }
        self.view = View(self._version, json.dumps(content).encode())

    def _mark(self, kind: str, text: str) -> None:
        self._marks.append(Mark(self.number, kind, text))

    def _domain(self) -> str:
        return "no corruption" if self.corruption == CLEAN else f"{self.corruption}, severity {self.severity}"

    # ------------------------------------------------------------------ preparing

    def _adapter(self, method: str) -> Adapter:
        """A fresh adapter of a method around the source model."""
        hparams = self._hparams.get(method, {})
        guard = self.settings.guard and method != "source"
        return methods.adapt(self.model, method, source=self._source, guard=guard, **hparams)

    def _check_classes(self) -> None:
        """Raise a ValueError where the first pictures cannot be predicted, or have classes that the model does not know."""
        images, _ = self.pictures.batch(0, self.corruption, self.severity)
        device = next((parameter.device for parameter in self.model.parameters()), torch.device("cpu"))
        outputs = self._by_source(images[:2].to(device) / 255).shape[1]
        classes = self.pictures.classes
        require(
            classes in (None, outputs),
            f"pictures of {classes} classes and a model of {outputs}",
            "as many; class_map= says which output of the model a class folder is, labels=false leaves all unknown",
        )
        require(
            self.pictures.largest < outputs,
            f"pictures of class {self.pictures.largest}",
            f"0 to {outputs - 1}, as the model",
        )


def data_url(image: Tensor) -> str:
    """A picture uint8 (3, height, width) as a ``data:`` address: every pixel of a small one, a large one reduced."""
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().numpy())
    kind = "PNG"
    if max(picture.size) > LARGEST:
        picture.thumbnail((LARGEST, LARGEST))
        kind = "JPEG"
    file = io.BytesIO()
    picture.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
