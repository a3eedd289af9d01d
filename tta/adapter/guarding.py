"""The interface of a guard, as the adapter that it guards sees it; :mod:`tta.guard` is one."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from torch import Tensor, nn

from tta.distributed import Workers

if TYPE_CHECKING:
    from tta.adapter.base import Adapter
    from tta.adapter.defence import Output
    from tta.adapter.waiting import Answers

StateDict: TypeAlias = dict[str, Tensor]


class Guarding(Protocol):
    """Stands between an adapter and its stream."""

    action: str
    """Taken with the last batch: one of :data:`tta.results.predictions.ACTIONS`."""

    events: tuple[Any, ...]
    """Decisions of the last batch."""

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of decisions since the start."""

    @property
    def answers_by_source(self) -> bool:
        """Whether the source model answers now."""

    def step(self, adapter: "Adapter", x: Tensor) -> "Output":
        """Predict a checked batch, and learn from it where that is wise."""

    def predict(self, adapter: "Adapter", x: Tensor) -> Tensor:
        """Logits as the guarded adapter would give them now; changes no state."""

    @property
    def classes(self) -> int:
        """Classes of the model, 0 before the first batch."""

    @property
    def answers(self) -> "Answers":
        """Counts of all answers since the start."""

    def remember(self, x: Tensor, ids: Tensor | None) -> Tensor | None:
        """Keep what was predicted for the images of the last :meth:`step`; their ids, counted where none are given."""

    def ask(self, count: int) -> list[int]:
        """Ids of predictions that it would like to be told about, at most ``count``."""

    def tell(self, ids: Tensor, right: Tensor | None, labels: Tensor | None) -> "Answers":
        """Take answers about predictions: whether they were right, or their classes, each (n,)."""

    def leave_out(self, ids: Tensor) -> None:
        """Let answers about some predictions tell nothing, since the method chose them."""

    def reset(self) -> None:
        """Start anew."""

    def share(self, workers: Workers) -> list[nn.Module]:
        """Decide about batches of which each worker holds a part; the models that it calls with these parts."""

    def described(self) -> dict[str, Any]:
        """The settings as plain values."""

    def state(self) -> tuple[dict[str, Any], StateDict]:
        """Everything remembered: numbers that JSON can hold, and tensors."""

    def load(self, plain: Mapping[str, Any], tensors: StateDict) -> None:
        """Take over a state of :meth:`state`."""

    def move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move what it keeps along with the adapter."""
