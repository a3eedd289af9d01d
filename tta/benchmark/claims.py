"""Claims: of several processes on one folder of cells, each runs others. A claim ends with the process that holds it."""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from tta.benchmark import cells
from tta.benchmark.cells import Cell, Outcome
from tta.results import Result

POLL_SECONDS = 0.5  # between two looks at the cells that other processes run
Work = Callable[[Iterable[Cell]], Iterator[tuple[Cell, Outcome]]]


class Claims:
    """The cells of a folder that this process runs, each held by a lock of the system on a file beside it.

    The system frees the lock of a process that ends in any way, so that no claim outlives its process. Where the file
    system has no locks every cell may be claimed: then two processes may run the same cell, and the first result stays.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held: dict[str, FileLock] = {}

    def take(self, cell: Cell) -> bool:
        """Claim a cell; False if another process has it."""
        lock = FileLock(self._file(cell, "lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return False
        except (NotImplementedError, OSError):
            return True
        self._held[cell.name] = lock
        owner = {"process": os.getpid(), "host": socket.gethostname()}
        self._file(cell, "owner").write_text(json.dumps(owner), encoding="utf-8")
        return True

    def free(self, cell: Cell) -> None:
        """End the claim on a cell."""
        lock = self._held.pop(cell.name, None)
        if lock is None:
            return
        for kind in ("owner", "lock"):  # still held: whoever opens the file from now on makes a new one
            with contextlib.suppress(OSError):
                self._file(cell, kind).unlink()
        lock.release()

    def free_all(self, of: Iterable[Cell]) -> None:
        """End all claims that are left, as after an error."""
        for cell in of:
            self.free(cell)

    def owner(self, cell: Cell) -> str:
        """The process that has a cell, in words."""
        try:
            owner = json.loads(self._file(cell, "owner").read_text(encoding="utf-8"))
            return f"process {owner['process']} on {owner['host']}"
        except (OSError, ValueError, KeyError, TypeError):
            return "another process"

    def _file(self, cell: Cell, kind: str) -> Path:
        return self._folder / f".{cell.name}.{kind}"


def shared(
    todo: Sequence[Cell], folder: Path, work: Work, say: Callable[[str], None]
) -> Iterator[tuple[Cell, Outcome]]:
    """Outcomes of cells as they finish, written to disk; a cell that another process runs is waited for.

    Args:
        todo: the cells to run, without a result so far.
        folder: where their outcomes are.
        work: runs the cells that it is given, and takes each only when it can start with it.
        say: called once, with a sentence on which processes are waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    claims, announced = Claims(folder), False
    failed_before = {cell.name: _failed_at(folder, cell) for cell in todo}
    left = list(todo)
    try:
        while left:
            finished: list[tuple[Cell, Outcome]] = []
            others: list[Cell] = []
            for cell, outcome in work(_mine(left, folder, claims, failed_before, finished, others)):
                cells.write(folder, cell, outcome)
                claims.free(cell)
                yield cell, outcome
            yield from finished
            if others and not announced:
                announced = True
                names = ", ".join(dict.fromkeys(map(claims.owner, others)))
                count = "1 cell is" if len(others) == 1 else f"{len(others)} cells are"
                say(f"{count} run by {names}: waiting for that.")
            if len(others) == len(left):
                time.sleep(POLL_SECONDS)
            left = others
    finally:
        claims.free_all(todo)


def _mine(
    left: Iterable[Cell],
    folder: Path,
    claims: Claims,
    failed_before: Mapping[str, int | None],
    finished: list[tuple[Cell, Outcome]],
    others: list[Cell],
) -> Iterator[Cell]:
    """The cells that this process is to run, each claimed when it is asked for.

    Those that another process has meanwhile finished go into ``finished``, those that it is running into ``others``.
    """
    for cell in left:
        if not claims.take(cell):
            others.append(cell)
        elif (outcome := _since(folder, cell, failed_before[cell.name])) is not None:
            claims.free(cell)
            finished.append((cell, outcome))
        else:
            yield cell


def _failed_at(folder: Path, cell: Cell) -> int | None:
    """Time in ns at which a cell's failure was written; None without one."""
    try:
        return (folder / cell.name / "failed.json").stat().st_mtime_ns
    except OSError:
        return None


def _since(folder: Path, cell: Cell, failed_before: int | None) -> Outcome | None:
    """The outcome that another process gave a cell since this one began: a result, or a failure that is new."""
    outcome = cells.read(folder, cell)
    if outcome is None or isinstance(outcome, Result) or _failed_at(folder, cell) != failed_before:
        return outcome
    return None
