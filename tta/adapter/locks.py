"""A lock that belongs to a module."""

import threading
from types import TracebackType
from typing import Any


class ModuleLock:
    """A re-entrant lock; a copied or pickled one is new and open, so that the module that holds it can be copied."""

    def __init__(self) -> None:
        self._lock = threading.RLock()

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ModuleLock":
        return ModuleLock()

    def __reduce__(self) -> tuple[type["ModuleLock"], tuple[()]]:
        return ModuleLock, ()
