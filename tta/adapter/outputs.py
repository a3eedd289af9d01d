"""Outputs of a model: turned into what methods compute with, and back."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from tta.functional import logits_of, rows
from tta.messages import nearest
from tta.tasks import CLASSIFICATION, DETECTION, SEGMENTATION, Task, find

Outputs: TypeAlias = Literal["logits", "probabilities", "sigmoid"] | Callable[[Any], Tensor]
KINDS = ("logits", "probabilities", "sigmoid")
SMALLEST = 1e-30  # probability whose logarithm stands for that of 0


class ToLogits:
    """A forward hook that turns a model's output into logits (rows, classes), or into what another task has.

    ``"probabilities"`` gives their logarithms, whose softmax they are. ``"sigmoid"`` makes each logit ``z`` of (batch, labels) a
    row ``(0, z)`` of two classes, so that softmax is the sigmoid and the entropy the binary one; :meth:`back` gives ``z``.
    Where no task was given, outputs that can be nothing else than maps are read as such. The copies of a model that a method
    makes share the object, and with it what was recognised.

    Args:
        kind: one of :data:`KINDS`, or a function of the model's output that returns logits.
        task: name of the task; None to recognise it.
        method: name of the method, for its refusal.
        served: names of the tasks that the method serves.
        needs: what it needs of outputs, in words.

    Raises:
        ValueError: another kind, another task, or one that the method does not serve.
    """

    def __init__(
        self, kind: Outputs, task: str | None = None, method: str = "", served: Sequence[str] = (), needs: str = ""
    ) -> None:
        if not callable(kind) and kind not in KINDS:
            hint = nearest(str(kind), KINDS)
            raise ValueError(f"outputs is one of {', '.join(KINDS)}, or a function; got {kind!r}.{hint}")
        self.kind = kind
        self.labels = 1
        self.given = task
        self._method, self._served, self._needs = method, tuple(served), needs
        self._task = None if task is None else self._accepted(find(task))
        if task is None and served and CLASSIFICATION.name not in served:
            raise ValueError(
                f"'{method}' is a method for {' and '.join(served)}, which is never guessed. Pass task='{served[0]}' if the model "
                f"returns {find(served[0]).outputs}."
            )

    @property
    def task(self) -> Task:
        """The task: as given, else as recognised; classification until another was."""
        return self._task or CLASSIFICATION

    def __call__(self, model: Any, args: Any, output: Any) -> Any:
        """The output as methods take it; None for one that is so already."""
        if callable(self.kind):
            output = self.kind(output)
        if self._task is None and SEGMENTATION.is_map(output):
            self._task = self._accepted(SEGMENTATION)
        elif self._task is None and DETECTION.is_detection(output):
            self._task = self._accepted(DETECTION)
        if self.task is CLASSIFICATION:
            return self._to_rows(output)
        found = self.task.read(output, args[0])
        return found.clamp_min(SMALLEST).log() if self.kind == "probabilities" else found

    def _to_rows(self, output: Any) -> Tensor | None:
        """Logits (rows, classes) of a classifier."""
        if self._task is not None:
            CLASSIFICATION.read(output, output)
        if callable(self.kind) or self.kind == "logits":
            return output if callable(self.kind) else None
        values = logits_of(output)
        if self.kind == "probabilities":
            return values.clamp_min(SMALLEST).log()
        self.labels = values.shape[1]
        return torch.stack([torch.zeros_like(values), values], 2).flatten(0, 1)

    def _accepted(self, task: Task) -> Task:
        """The task, if the method serves it with outputs of this kind."""
        if task.name not in self._served:
            raise ValueError(task.refusal(self._method, self._needs))
        if self.kind == "sigmoid" and task is not CLASSIFICATION:
            raise ValueError(
                f"outputs='sigmoid' are labels of an image, not of task='{task.name}'. Let the model return {task.outputs}."
            )
        if self.kind == "probabilities" and not task.of_classes:
            raise ValueError(
                f"outputs='probabilities' are of classes, which task='{task.name}' has none of. Leave it out."
            )
        return task

    def of(self, output: Any) -> Tensor:
        """Output of the model behind this hook, as a method returns it: logits or numbers, float32, or a detector's boxes."""
        found: Tensor = logits_of(output) if self.task.tensors else output
        return found

    def back(self, logits: Tensor) -> Tensor:
        """Logits as the user's model has them: (batch, labels) of ``"sigmoid"`` outputs, else unchanged."""
        return (logits[:, 1] - logits[:, 0]).view(-1, self.labels) if self.kind == "sigmoid" else logits

    def __deepcopy__(self, memo: dict[int, Any]) -> "ToLogits":
        return self


def problem(logits: Tensor, kind: Outputs) -> str:
    """Sentence on outputs that are taken for logits and look like something else; empty for others."""
    logits = rows(logits)
    if kind == "logits" and logits.shape[0] > 1 and bool(((logits >= 0) & (logits <= 1)).all()):
        sums = "and sum to 1 " if torch.allclose(logits.sum(1), torch.ones(len(logits)).to(logits), atol=1e-3) else ""
        return (
            f"all outputs of the model lie in [0, 1] {sums}and are taken for logits. If they are probabilities, pass "
            "outputs='probabilities', or 'sigmoid' with the values before a sigmoid: filters and losses are wrong otherwise."
        )
    return ""
