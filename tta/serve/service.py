"""The service: an adapter with its worker, its metrics and its saved states; no word of HTTP."""

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from safetensors.torch import save
from torch import Tensor

from tta.adapter import FORMAT, Adapter, saving
from tta.hyperparameters import as_dict
from tta.messages import nearest
from tta.serve import pictures
from tta.serve.autosave import StateFolder
from tta.serve.feedback import Feedback, hexadecimal
from tta.serve.metrics import Metrics
from tta.serve.refusals import Refusal
from tta.serve.settings import ServeSettings
from tta.serve.worker import Answer, Batch, Worker

LOG = logging.getLogger("tta.serve")
DECODERS = 2  # threads; Pillow decodes outside of Python's lock


class Service:
    """Predicts pictures with an adapter that learns from them, and keeps its state.

    Args:
        adapter: it must not be used elsewhere from now on.
        settings: see :class:`ServeSettings`.
        spec: name of the source model.
        preprocessing: that of :class:`tta.models.ImageClassifier`.
        class_names: in the order of the logits, where they are known.

    Raises:
        ValueError: the saved states are of another adapter, or another server uses their folder.
    """

    def __init__(
        self,
        adapter: Adapter,
        settings: ServeSettings,
        *,
        spec: str,
        preprocessing: Mapping[str, Any],
        class_names: Sequence[str] | None,
    ) -> None:
        self.settings, self.preprocessing, self.class_names = settings, preprocessing, class_names
        self.decoders = ThreadPoolExecutor(DECODERS, "tta-decode")
        self.worker = Worker(adapter, settings.batch_size, settings.batch_timeout, settings.paused, self._after)
        self.metrics = Metrics(class_names, lambda: self.worker.waiting)
        self.metrics.paused.set(settings.paused)
        self.folder: StateFolder | None = None
        self._snapshot: dict[str, Tensor] | None = None
        self._unsaved = self._batches = 0
        if settings.state is not None:
            self.folder = StateFolder(settings.state, lambda result: self.metrics.states.labels(result).inc())
            self._resume(adapter, self.folder)
        self._facts = {
            "version": metadata.version("tta-toolkit"),
            "model": spec,
            "method": adapter.method,
            "configuration": as_dict(adapter.config),
            "fingerprint": adapter.source_fingerprint,
            "guard": None if adapter.guard is None else adapter.guard.described(),
            "feedback": list(adapter.listens_to),
            "preprocessing": dict(preprocessing),
            "class_names": None if class_names is None else list(class_names),
            "settings": settings.described(),
            "summary": str(adapter.summary()),
        }
        self._counts = self._counted(adapter)

    def _resume(self, adapter: Adapter, folder: StateFolder) -> None:
        try:
            found = folder.restore(adapter)
        except ValueError:
            folder.close()
            raise
        if found is None:
            LOG.info("no saved state in '%s': the source model starts", folder.folder)
        else:
            LOG.info("went on from '%s'", found)

    # ------------------------------------------------------------------ life

    def start(self) -> None:
        """Begin to answer."""
        self.worker.start()

    def stop(self) -> None:
        """Answer what waits, save the state, and end."""
        self.worker.stop()
        self.decoders.shutdown(wait=False, cancel_futures=True)
        if self.folder is not None:
            self.folder.save(self.worker.adapter)
            self.folder.close()
            LOG.info("the state was saved in '%s'", self.folder.folder)

    # ------------------------------------------------------------------ for a request

    def decode(self, bodies: Sequence[bytes]) -> list[Tensor]:
        """The pictures in files, as the model takes them; see :func:`tta.serve.pictures.decode`."""
        return pictures.decode(bodies, self.preprocessing, self.settings.max_pixels)

    def described(self, answer: Answer, top: int) -> dict[str, Any]:
        """An answer as plain values, with an id and the ``top`` most probable classes."""
        values, labels = answer.probabilities.topk(min(top, len(answer.probabilities)))
        classes = [
            {"label": label, "name": self.name_of(label), "probability": value}
            for value, label in zip(values.tolist(), labels.tolist(), strict=True)
        ]
        return {"id": hexadecimal(answer.id), **classes[0], "answered": answer.answered, "top": classes}

    def name_of(self, label: int) -> str | None:
        """The name of a class, where it is known."""
        return None if self.class_names is None else self.class_names[label]

    def state(self) -> dict[str, Any]:
        """Facts of the adapter, and its counts after the last batch; the model is not touched."""
        return {**self._facts, **self._counts, "paused": self.worker.paused}

    # ------------------------------------------------------------------ feedback; each runs on the worker's thread

    def asking(self, count: int) -> Callable[[Adapter], list[str]]:
        """The function that asks which predictions the adapter would like to be told about."""

        def ask(adapter: Adapter) -> list[str]:
            _check_listens(adapter)
            return [hexadecimal(number) for number in adapter.queries(count)]

        return ask

    def telling(self, feedback: Feedback) -> Callable[[Adapter], dict[str, int]]:
        """The function that hands answers to the adapter, and counts them.

        Raises:
            Refusal: a name that is no class.
        """
        labels = None if feedback.labels is None else [self._number_of(label) for label in feedback.labels]

        def tell(adapter: Adapter) -> dict[str, int]:
            _check_listens(adapter)
            try:
                counted = adapter.feedback(feedback.numbers(), correct=feedback.correct, labels=labels)
            except ValueError as error:
                raise Refusal(422, str(error)) from None
            self._counts = self._counted(adapter)
            for result, count in counted._asdict().items():
                self.metrics.feedback.labels(result).inc(count)
            return counted._asdict()

        return tell

    def _number_of(self, label: int | str) -> int:
        """The number of a class, given by its number or its name."""
        if isinstance(label, int):
            return label
        names = list(self.class_names or [])
        if label not in names:
            known = nearest(label, names) or (" This model has no names: give numbers." if not names else "")
            raise Refusal(422, f"No class is called '{label}'.{known}")
        return names.index(label)

    # ------------------------------------------------------------------ control; each runs on the worker's thread

    def reset(self, adapter: Adapter) -> str:
        """Go back to the source model."""
        adapter.reset()
        self._counts = self._counted(adapter)
        return "The adapter is the source model again."

    def snapshot(self, adapter: Adapter) -> str:
        """Keep the present state; on disk too where there is a folder."""
        self._snapshot = adapter.state_dict()
        if self.folder is not None:
            adapter.save(self.folder.snapshot)
        return "The present state is kept: POST /rollback goes back to it."

    def rollback(self, adapter: Adapter) -> str:
        """Go back to the state that was last kept.

        Raises:
            Refusal: there is none, or it cannot be read.
        """
        state = self._snapshot
        if state is None and self.folder is not None and self.folder.snapshot.is_file():
            try:
                state, _, _ = saving.read(self.folder.snapshot, FORMAT)
            except ValueError as error:
                raise Refusal(409, str(error)) from None
        if state is None:
            raise Refusal(409, "No state was kept: POST /snapshot keeps the present one.")
        adapter.load_state_dict(state)
        self._counts = self._counted(adapter)
        return "The adapter is as it was at the last snapshot."

    def pausing(self, on: bool) -> Callable[[Adapter], str]:
        """The function that stops learning, or lets it go on."""

        def pause(adapter: Adapter) -> str:
            self.worker.paused = on
            self.metrics.paused.set(on)
            return "Nothing is learned from now on." if on else "The adapter learns."

        return pause

    def export(self, adapter: Adapter) -> bytes:
        """Weights of a plain copy of the source model with what was learned: a safetensors file.

        Raises:
            Refusal: no plain model predicts as this method does.
        """
        try:
            plain = adapter.export()
        except ValueError as error:
            raise Refusal(409, str(error)) from None
        state = {name: value.detach().cpu().clone().contiguous() for name, value in plain.state_dict().items()}
        return save(state, {"model": str(self._facts["model"]), "method": adapter.method})

    # ------------------------------------------------------------------ after a batch, on the worker's thread

    def _after(self, adapter: Adapter, batch: Batch) -> None:
        self.metrics.saw(adapter, batch)
        for event in batch.events:
            LOG.warning("guard: %s: %s", event.kind, event.reason, extra={"facts": {"batch": event.batch}})
        self._batches += 1
        self._unsaved += not self.worker.paused
        self._counts = self._counted(adapter)
        if self.folder is not None and self._unsaved >= self.settings.autosave:
            self._unsaved = 0
            self.folder.save_soon(adapter)

    def _counted(self, adapter: Adapter) -> dict[str, Any]:
        """Counts since the adapter was made or loaded; replaced as a whole, so that a reader sees those of one batch."""
        return {
            "batches": self._batches,
            "progress": adapter.progress()._asdict(),
            "guard_counts": None if adapter.guard is None else adapter.guard.counts,
        }


def _check_listens(adapter: Adapter) -> None:
    """Refuse answers that neither the method nor a guard can use; the sentence names those that can."""
    if not adapter.listens_to:
        try:
            adapter.answers()
        except ValueError as error:
            raise Refusal(409, str(error)) from None
