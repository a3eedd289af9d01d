"""Feedback: an adapter gives its predictions ids, says which it would like to be told about, and takes answers, late."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from tta.adapter.defence import Defence
from tta.adapter.guarding import Guarding
from tta.adapter.waiting import EXPIRY, WAITING, Answers, Told, Waiting, as_ids
from tta.hyperparameters import OptimizerConfig
from tta.messages import require

USERS = "bitta, simatta"  # methods that can use feedback; a test holds it to the code


@dataclass
class FeedbackConfig(OptimizerConfig):
    """Hyper-parameters of a method with a gradient step that learns from answers.

    Attributes:
        waiting: images kept for answers; one that is asked about is kept before others.
        expiry: batches after which an image without an answer is given up.
    """

    waiting: int = WAITING
    expiry: int = EXPIRY

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.waiting >= 1, f"waiting={self.waiting}", "1 or more images")
        require(self.expiry >= 0, f"expiry={self.expiry}", "0 or more batches")


class Feedback(Defence):
    """The part of an adapter that is told, at times, whether it was right; see :class:`tta.adapter.Adapter`."""

    uses_feedback: ClassVar[
        tuple[str, ...]
    ] = ()  # kinds of answers it learns from, "correct" or "labels", its own first
    waiting: Waiting
    _fresh: bool  # whether the present batch was learned from

    # ------------------------------------------------------------------ what a method defines

    def choose(self, count: int) -> Tensor:
        """Slots of ``self.waiting`` that it would like to be told about, at most ``count``, the most wanted first."""
        raise NotImplementedError(f"{type(self).__name__} must define choose(self, count) to ask questions.")

    def be_told(self, answers: Told) -> None:
        """Remember answers, to learn from them with the next batch."""
        raise NotImplementedError(f"{type(self).__name__} must define be_told(self, answers) to use feedback.")

    # ------------------------------------------------------------------ for a user

    @property
    def listens_to(self) -> tuple[str, ...]:
        """Kinds of answers that :meth:`feedback` takes, the most useful first: of the method, else of its guard, else none."""
        return self.uses_feedback or (("labels", "correct") if self._listener is not None else ())

    def queries(self, count: int) -> list[int]:
        """Ids of the samples that the method would like to be told about, the most wanted first.

        Each is asked about once, and kept for its answer before others are. Of a method that cannot use feedback the guard
        asks, about samples chosen at random.

        Args:
            count: at most so many, 1 or more; fewer where it has seen fewer, or wants no more.

        Raises:
            ValueError: the method cannot use feedback and has no guard; the message names those that can.
        """
        require(count >= 1, f"count={count}", "1 or more samples")
        self._check_listens()
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if not self.uses_feedback:
                assert self.guard is not None
                return self.guard.ask(count)
            slots = self.choose(count)[:count] if self.waiting.samples is not None else torch.zeros(0).long()
            self.waiting.asked[slots] = True
            ids = self.waiting.ids[slots]
            if self.guard is not None:
                self.guard.leave_out(ids)
            asked: list[int] = ids.tolist()
        return asked

    def feedback(
        self, ids: Sequence[int] | Tensor, *, correct: Sequence[bool] | Tensor | None = None, labels: Any = None
    ) -> Answers:
        """Tell the adapter about predictions that it made: whether they were correct, or the classes.

        It may be late, for a few samples, and wrong at times. The first answer to a sample counts; the method learns from
        it with the next batch, and a guard compares the adapter with the source model by it. An id that is expired or unknown
        is counted, and warned of once.

        Args:
            ids: (n,), of :attr:`Output.ids`.
            correct: (n,), for each whether the predicted class was right.
            labels: (n,), for each its class; instead of ``correct``.

        Returns:
            Counts of these answers; :meth:`answers` counts all.

        Raises:
            ValueError: the method cannot use feedback, or not of this kind, and has no guard; not one answer for each id; a
                label that is no class of the model. Nothing was taken.
        """
        self._check_listens()
        require((correct is None) != (labels is None), "feedback with both or neither", "either correct= or labels=")
        kind, given = ("labels", labels) if correct is None else ("correct", correct)
        if kind not in self.listens_to:
            raise ValueError(
                f"{self.method} learns from {self.uses_feedback[0]}=; {kind}= tells it nothing that it could use."
            )
        numbers, values = as_ids(ids), torch.as_tensor(given).cpu()
        require(values.shape == numbers.shape, f"{values.numel()} answers for {len(numbers)} ids", "one for each")
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if kind == "labels":
                self._check_labels(values)
            counted = self._told(numbers, *((values.bool(), None) if kind == "correct" else (None, values)))
        if counted.expired or counted.unknown:
            kept = "image is kept: see waiting= and expiry=" if self.uses_feedback else "prediction is kept"
            self._warn("answers", f"{counted} An answer counts while its {kept}.")
        return counted

    def answers(self) -> Answers:
        """Counts of all answers since it was made or reset."""
        self._check_listens()
        if not self.uses_feedback:
            assert self.guard is not None
            return self.guard.answers
        return Answers(*self.waiting.counts.tolist())

    # ------------------------------------------------------------------ inner workings

    @property
    def _listener(self) -> Guarding | None:
        """The guard, if it takes answers; of several workers each knows the predictions of its own part alone."""
        return self.guard if self.workers.size == 1 else None

    def _told(self, ids: Tensor, right: Tensor | None, labels: Tensor | None) -> Answers:
        """Hand answers to the method and to its guard; the counts of the method, else of the guard."""
        of_guard = None if self.guard is None else self.guard.tell(ids, right, labels)
        if not self.uses_feedback:
            assert of_guard is not None
            return of_guard
        counted, slots = self.waiting.answer(ids, right, labels)
        if len(slots):
            self.be_told(self.waiting.told(slots))
        return counted

    def _start_waiting(self) -> None:
        """Set up the bank of samples that wait, for a method that uses feedback; others have none."""
        self._fresh = False
        if self.uses_feedback:
            config = self.config
            self.waiting = Waiting(getattr(config, "waiting", WAITING), getattr(config, "expiry", EXPIRY))

    def _checked_ids(self, ids: Sequence[int] | Tensor | None, x: Tensor) -> Tensor | None:
        """The ids given for a batch.

        Raises:
            ValueError: not one whole number of its own for each image, or images of another size than those that wait.
        """
        if self.uses_feedback:
            self.waiting.check(x)  # before anything is learned
        if ids is None:
            return None
        numbers = as_ids(ids)
        require(len(numbers) == len(x), f"{len(numbers)} ids for {len(x)} images", "one for each")
        require(len(set(numbers.tolist())) == len(x), "an id that two images share", "ids that differ")
        return numbers

    def _remembered(self, x: Tensor, logits: Tensor, ids: Tensor | None, *, guarded: bool) -> Tensor | None:
        """Ids of a batch that was predicted; what answers will be about is kept: images by the method, predictions by the guard.

        Without ids of the user's, a batch that is not kept has -1 for each image. ``guarded``: the guard has seen the batch.
        """
        if self.uses_feedback and self._fresh and self.input_finite:
            ids = self.waiting.add(x, logits, ids)
        elif ids is None and (self.uses_feedback or (self._listener is not None and not guarded)):
            ids = torch.full((len(x),), -1)
        return self._listener.remember(x, ids) if guarded and self._listener is not None else ids

    def _check_listens(self) -> None:
        if not self.listens_to:
            raise ValueError(
                f"{self.method} cannot use feedback. Methods that can: {USERS}. With guard=True the guard of any method can, "
                "unless several workers share the stream."
            )

    def answer_classes(self) -> int:
        """Number of classes that a label may name; 0 before the first batch."""
        return int(self.waiting.classes) if self.uses_feedback or self.guard is None else self.guard.classes

    def _check_labels(self, labels: Tensor) -> None:
        classes = self.answer_classes()
        whole = not (labels.is_floating_point() or labels.dtype == torch.bool) or not labels.numel()
        fits = whole and bool(((labels >= 0) & (labels < max(classes, 1))).all())
        require(fits or not classes, f"labels {labels.tolist()}", f"whole numbers from 0 to {classes - 1}")
