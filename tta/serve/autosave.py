"""Saved states of a server: whole or not at all, the last two, each with its checksum in its name."""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from tta.adapter import FORMAT, Adapter, saving
from tta.messages import require

LOG = logging.getLogger("tta.serve")
KEPT = 2
DIGITS = 16  # of the checksum, hexadecimal
NAME = "autosave-{:09d}-{}.safetensors"
PATTERN = f"autosave-{'[0-9]' * 9}-*.safetensors"
SNAPSHOT = "snapshot.safetensors"


class StateFolder:
    """A folder with the last states of one server.

    A file is written beside, flushed to disk, and renamed, so that a process that is killed leaves the one before. Its
    name holds a number that grows and the start of its SHA-256, so that a file that the disk has damaged is known too.

    Args:
        folder: created if it does not exist.
        told: called with ``"saved"`` or ``"failed"`` after each try.

    Raises:
        ValueError: another server uses it.
    """

    def __init__(self, folder: str | Path, told: Callable[[str], None] = lambda result: None) -> None:
        self.folder, self._told = Path(folder), told
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = FileLock(self.folder / ".lock", thread_local=False)  # closed on another thread
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another server uses the folder '{folder}': name another one, state=DIR.") from None
        for left in (
            *self.folder.glob(".*autosave*"),
            *self.folder.glob(".snapshot*"),
        ):  # of a process killed meanwhile
            left.unlink(missing_ok=True)
        self._writer = ThreadPoolExecutor(1, "tta-autosave")
        self._pending: Future[None] | None = None

    @property
    def snapshot(self) -> Path:
        """The file of the state that was last kept on request."""
        return self.folder / SNAPSHOT

    def files(self) -> list[Path]:
        """The saved states, latest first."""
        return sorted(self.folder.glob(PATTERN), reverse=True)

    def restore(self, adapter: Adapter) -> Path | None:
        """Load the latest state that is whole; says which was not. Returns its file, None where there is none.

        Raises:
            ValueError: it is whole, and of another model, method or settings.
        """
        for file in self.files():
            try:
                require(
                    _checksum(file) == file.stem.rpartition("-")[2], f"the checksum {_checksum(file)}", "its name's"
                )
                state, _, _ = saving.read(file, FORMAT)
            except (ValueError, OSError) as error:
                LOG.warning("the saved state '%s' is damaged (%s); the one before it is tried", file.name, error)
                continue
            try:
                adapter.load_state_dict(state)
            except (ValueError, RuntimeError) as error:
                raise ValueError(
                    f"'{file}' does not fit: {error} Start with the model and settings that it was saved with, or name "
                    "another folder, state=DIR."
                ) from error
            return file
        return None

    def save_soon(self, adapter: Adapter) -> None:
        """Copy the state now and write it on another thread; left out while the last one is still being written."""
        if self._pending is None or self._pending.done():
            self._pending = self._writer.submit(self._save, adapter.state_dict(), adapter)

    def save(self, adapter: Adapter) -> None:
        """Write the state, and wait for it."""
        self._writer.submit(self._save, adapter.state_dict(), adapter).result()

    def close(self) -> None:
        """Wait for what is being written, and let another server have the folder."""
        self._writer.shutdown()
        self._lock.release()

    def _save(self, state: Mapping[str, Tensor], adapter: Adapter) -> None:
        part = self.folder / ".autosave"
        try:
            saving.write(part, state, adapter.statistics)
            before = self.files()
            number = 1 + max((int(file.name.split("-")[1]) for file in before), default=0)
            os.replace(part, self.folder / NAME.format(number, _checksum(part)))
            for old in before[KEPT - 1 :]:
                old.unlink(missing_ok=True)
            self._told("saved")
        except Exception as error:  # a full disk must not stop the answers
            self._told("failed")
            LOG.error("the state was not saved: %s", error)
            part.unlink(missing_ok=True)


def _checksum(file: Path) -> str:
    with file.open("rb") as opened:
        digest = hashlib.sha256()
        while chunk := opened.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()[:DIGITS]
