"""The worker: one thread that owns the adapter, forms batches of what waits, and is the only one to change anything."""

import logging
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from tta.adapter import Adapter

LOG = logging.getLogger("tta.serve")
T = TypeVar("T")


ID_BITS = 63  # of the number of a prediction: an adapter keeps it as int64, and nobody guesses it


class Answer(NamedTuple):
    """The answer to one image: probabilities (classes,), whether its batch was ``learned``, ``held``, or by ``source``, and its id."""

    probabilities: Tensor
    answered: str
    id: int


class Batch(NamedTuple):
    """A batch that was answered: probabilities (batch, classes), what was done with it, and events of the guard."""

    probabilities: Tensor
    answered: str
    events: tuple[Any, ...]


@dataclass(eq=False)
class Ticket:
    """The images of one request, answered together."""

    future: "Future[list[Answer]]"
    answers: list[Answer | None]

    def put(self, place: int, answer: Answer) -> None:
        """Keep one answer; the last one that was missing resolves the future."""
        self.answers[place] = answer
        if None not in self.answers and self.future.set_running_or_notify_cancel():
            self.future.set_result([answer for answer in self.answers if answer is not None])

    def fail(self, error: Exception) -> None:
        """Answer the request with an error, once."""
        if not self.future.done() and self.future.set_running_or_notify_cancel():
            self.future.set_exception(error)


class Waiting(NamedTuple):
    """One image that waits: uint8 (3, height, width)."""

    image: Tensor
    ticket: Ticket
    place: int
    since: float


@dataclass(eq=False)
class Command(Generic[T]):
    """A function of the adapter, run between two batches."""

    function: Callable[[Adapter], T]
    future: "Future[T]" = field(default_factory=Future)

    def run(self, adapter: Adapter) -> None:
        """Run it, and hand its result or its error to who waits for it."""
        if self.future.set_running_or_notify_cancel():
            try:
                self.future.set_result(self.function(adapter))
            except Exception as error:
                self.future.set_exception(error)


class Worker:
    """Owns an adapter: nobody else touches it, so that nobody sees a half-written model.

    Images of several requests form a batch in the order of their arrival: when ``batch_size`` of one shape wait, or the
    first has waited ``batch_timeout`` seconds. A request of ``batch_size`` images is a batch of its own if nothing waits.

    Args:
        adapter: it must not be used elsewhere from now on.
        batch_size: images a batch at most.
        batch_timeout: seconds.
        paused: predict only.
        after: called on the worker's thread after each batch, with the adapter and the batch.
    """

    def __init__(
        self,
        adapter: Adapter,
        batch_size: int,
        batch_timeout: float,
        paused: bool,
        after: Callable[[Adapter, Batch], None],
    ) -> None:
        self.adapter, self.batch_size, self.batch_timeout, self.paused = adapter, batch_size, batch_timeout, paused
        self._after = after
        self._changed = threading.Condition()
        self._images: deque[Waiting] = deque()
        self._commands: deque[Command[Any]] = deque()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="tta-adapter", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Answer all that waits, then end; returns when it has ended."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether it answers: it has started, and neither ended nor failed."""
        return self._thread.is_alive()

    @property
    def ready(self) -> bool:
        """Whether it answers and is not about to end."""
        return self.alive and not self._stopping

    @property
    def waiting(self) -> int:
        """Images that wait for their batch."""
        return len(self._images)

    def submit(self, images: Sequence[Tensor]) -> "Future[list[Answer]]":
        """Queue the images of a request, one or more, each uint8 (3, height, width); cancelling the future drops them."""
        ticket = Ticket(Future(), [None] * len(images))
        now = time.monotonic()
        with self._changed:
            if self._stopping:
                ticket.fail(RuntimeError("the server is stopping"))
                return ticket.future
            self._images.extend(Waiting(image, ticket, place, now) for place, image in enumerate(images))
            self._changed.notify()
        return ticket.future

    def call(self, function: Callable[[Adapter], T]) -> "Future[T]":
        """Queue a function of the adapter; it runs before the images that wait."""
        command = Command(function)
        with self._changed:
            if self._stopping:
                command.future.set_exception(RuntimeError("the server is stopping"))
                return command.future
            self._commands.append(command)
            self._changed.notify()
        return command.future

    # ------------------------------------------------------------------ on its thread

    def _run(self) -> None:
        while (job := self._next()) is not None:
            if isinstance(job, Command):
                job.run(self.adapter)
            else:
                self._answer(job)

    def _next(self) -> "Command[Any] | list[Waiting] | None":
        """The next command or batch, as soon as there is one; None at the end."""
        with self._changed:
            while True:
                while self._images and self._images[0].ticket.future.done():  # cancelled, or failed in another batch
                    self._images.popleft()
                if self._commands:
                    return self._commands.popleft()
                if not self._images:
                    if self._stopping:
                        return None
                    self._changed.wait()
                    continue
                left = self._images[0].since + self.batch_timeout - time.monotonic()
                if len(self._images) >= self.batch_size or left <= 0 or self._stopping:
                    return self._batch()
                self._changed.wait(left)

    def _batch(self) -> list[Waiting]:
        """Take the images of the first one's shape from the front of the queue."""
        batch: list[Waiting] = []
        while self._images and len(batch) < self.batch_size:
            first = self._images[0]
            if first.ticket.future.done():
                self._images.popleft()
            elif batch and first.image.shape != batch[0].image.shape:
                break
            else:
                batch.append(self._images.popleft())
        return batch

    def _answer(self, batch: list[Waiting]) -> None:
        try:
            x = torch.stack([waiting.image for waiting in batch]).to(self.adapter.device) / 255
            ids = [secrets.randbits(ID_BITS) for _ in batch]
            logits, answered = self._predicted(x, ids)
            probabilities = logits.softmax(1).cpu()
        except Exception as error:
            if not isinstance(error, ValueError):
                LOG.exception("a batch of %d images failed", len(batch))
            for waiting in batch:
                waiting.ticket.fail(error)
            return
        guard = self.adapter.guard
        events = guard.events if guard is not None and not self.paused else ()
        try:
            self._after(self.adapter, Batch(probabilities, answered, events))
        except Exception:  # what watches must not stop what is watched
            LOG.exception("what follows a batch failed")
        for waiting, row, number in zip(batch, probabilities, ids, strict=True):
            waiting.ticket.put(waiting.place, Answer(row, answered, number))

    def _predicted(self, x: Tensor, ids: list[int]) -> tuple[Tensor, str]:
        """Logits, and who gave them."""
        guard = self.adapter.guard
        if self.paused:
            with self.adapter.paused():
                by_source = guard is not None and guard.answers_by_source
                return self.adapter.step(x, ids).logits, "source" if by_source else "held"
        logits = self.adapter.step(x, ids).logits
        if guard is not None:
            return logits, guard.action
        return logits, "source" if self.adapter.method == "source" else "learned"
