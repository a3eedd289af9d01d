"""A task: the kind of prediction that a model makes, and the number that a run is judged by.

Nothing here loads torch before a model runs: reading a saved result needs none.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["up", "down"]


class Score(NamedTuple):
    """The number that a run is judged by.

    Attributes:
        name: as tables show it, such as ``error`` or ``mIoU``.
        value: in the unit of the name; NaN where nothing was scored.
        direction: ``"up"`` where more is better, ``"down"`` where less is.
    """

    name: str
    value: float
    direction: Direction


class Scored(Protocol):
    """The part of a :class:`tta.results.Row` that a score is made of; a :class:`Tally` has it too."""

    @property
    def samples(self) -> int: ...

    @property
    def errors(self) -> int: ...

    @property
    def sums(self) -> Mapping[str, Any]: ...


class Tally(NamedTuple):
    """Counts of some predictions. They add up, see :meth:`Task.merged`.

    Attributes:
        samples: that were scored: images, or pixels of maps.
        errors: wrong ones among them.
        sums: further sums that the task's score is made of, as JSON can hold them.
    """

    samples: int
    errors: int
    sums: Mapping[str, Any] = {}


class Task:
    """A kind of prediction: what the outputs of a model look like, how they are checked and scored, who cannot serve it.

    There is one object a task, without a state: :func:`tta.tasks.find`. A method names the tasks it serves in
    ``Adapter.tasks``; :meth:`refusal` is what it says of the others.

    Attributes:
        name: as ``task=`` takes it.
        outputs: what a model of the task returns, in words.
        lacking: what a model of the task returns instead of what a method needs; the end of :meth:`refusal`.
        score_name, direction: of :meth:`score`.
        unit: of the score, ``"%"``, or empty where it is that of the labels.
        tensors: whether outputs are tensors.
        adds_up: whether the score of a run is made of sums over its batches, so that it is known while it goes on.
        of_classes: whether the outputs are scores of classes, so that a softmax of them means something.
    """

    name: ClassVar[str]
    outputs: ClassVar[str]
    lacking: ClassVar[str]
    score_name: ClassVar[str]
    direction: ClassVar[Direction]
    unit: ClassVar[str] = "%"
    tensors: ClassVar[bool] = True
    adds_up: ClassVar[bool] = True
    of_classes: ClassVar[bool] = False

    # ------------------------------------------------------------------ outputs

    def read(self, output: Any, images: "Tensor") -> Any:
        """The output of a model as methods take it, float32 where it is a tensor.

        It may see its own result again, and returns that as it is.

        Args:
            output: what the model's forward gave.
            images: (batch, channels, height, width), the images it was given.

        Raises:
            TypeError, ValueError: it is no output of this task; the message says what was expected.
        """
        raise NotImplementedError

    def refusal(self, method: str, needs: str) -> str:
        """The sentence that a method says which does not serve this task.

        Args:
            method: its name.
            needs: what it needs of a model's outputs, in words.
        """
        return f"'{method}' needs {needs}; {self.lacking}"

    def detached(self, output: Any) -> Any:
        """The output of an adapter as a user is given it, outside the graph; float32 where it is a tensor."""
        return output.detach().float()

    def finite(self, output: Any) -> "Tensor":
        """Whether the output of an adapter shows that its state is sound, boolean, of any shape.

        Minus infinity is sound in logits: it is the logarithm of a probability of 0.
        """
        # The largest of each image, NaN if it holds one: to compare each value takes four times as long on a map.
        return output.flatten(1).amax(1) < math.inf  # type: ignore[no-any-return]

    def spread(self, output: Any, good: "Tensor") -> Any:
        """The output of a batch of which only some images were good.

        Args:
            output: of the good images; of one other image if none was.
            good: (batch,), boolean.

        Returns:
            One entry for each image of the batch, NaN where it was not good.
        """
        whole = output.new_full((len(good), *output.shape[1:]), math.nan)
        if good.any():
            whole[good] = output
        return whole

    # ------------------------------------------------------------------ scores

    def columns(self, output: Any, labels: "Tensor") -> "dict[str, Tensor]":
        """Everything that is kept of the predictions of a batch, under names of :class:`tta.results.Predictions`.

        Args:
            output: of an adapter, for a batch.
            labels: of the batch, on the output's device; -1 where nothing is scored.

        Returns:
            For each name a tensor with one entry an image.
        """
        raise NotImplementedError

    def check_labels(self, labels: "Tensor", output: Any) -> None:
        """Raise a ValueError unless the labels of a batch, on the CPU, can be compared with the output."""

    def tally(self, predictions: Any) -> Tally:
        """Counts of some :class:`tta.results.Predictions`."""
        raise NotImplementedError

    def agrees(self, row: Scored, predictions: Any) -> bool:
        """Whether a saved row can be that of these predictions."""
        found = self.tally(predictions)
        return (row.samples, row.errors, dict(row.sums)) == (found.samples, found.errors, dict(found.sums))

    def merged(self, tallies: Sequence[Scored]) -> Tally:
        """Counts of several lots of predictions together."""
        names = dict.fromkeys(name for tally in tallies for name in tally.sums)
        sums = {name: _total([tally.sums[name] for tally in tallies if name in tally.sums]) for name in names}
        return Tally(sum(tally.samples for tally in tallies), sum(tally.errors for tally in tallies), sums)

    def value(self, row: Scored) -> float:
        """The score of one row; NaN where nothing was scored."""
        raise NotImplementedError

    def score(self, rows: Sequence[Scored]) -> Score:
        """The score of a run: the unweighted mean over its rows, as the papers report; a row without samples does not count."""
        return Score(self.score_name, mean_of_known(map(self.value, rows)), self.direction)

    def shown(self, value: float) -> str:
        """A score as tables show it: percents with one decimal, others with four digits."""
        return f"{value:.1f}" if self.unit == "%" or abs(value) >= 1000 else f"{value:.4g}"

    def __repr__(self) -> str:
        return self.name


def mean_of_known(values: Iterable[float | None]) -> float:
    """Mean of the numbers that are neither None nor NaN; NaN where there is none."""
    known = [value for value in values if value is not None and not math.isnan(value)]
    return math.fsum(known) / len(known) if known else math.nan


def _total(values: Sequence[Any]) -> Any:
    """Sum of numbers, or of lists of them entry by entry."""
    if isinstance(values[0], list):
        return [_total(entries) for entries in zip(*values, strict=True)]
    return sum(values)
