"""Places to write to: tried before anything runs, claimed by one process alone, and written at once."""

import contextlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO


@contextlib.contextmanager
def tried(path: str | os.PathLike[str], *, is_file: bool = False) -> Iterator[Path]:
    """Create a folder, or that of a file, and write in it for a trial, before the work whose result goes there.

    Folders that were created for it and are still empty in the end are removed.

    Args:
        path: the folder or the file; neither need exist.
        is_file: whether it is a file.

    Raises:
        OSError: nothing can be written there; the message says where and why.
    """
    place = Path(path)
    folder = place.parent if is_file else place
    made = list(itertools.takewhile(lambda part: not part.exists(), (folder, *folder.parents)))
    try:
        try:
            if is_file and place.is_dir():
                raise IsADirectoryError(f"'{place}' is a folder, and a file is to be written")
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder) as trial:
                trial.write(b"\0")
            if is_file and place.exists() and not os.access(place, os.W_OK):
                raise PermissionError(f"'{place}' may not be replaced")
        except OSError as error:
            raise OSError(
                f"Nothing can be written to '{place}': {_reason(error, folder)}. Name another place; nothing was run."
            ) from error
        yield place
    finally:
        for part in made:
            with contextlib.suppress(OSError):  # no longer empty
                part.rmdir()


def _reason(error: OSError, folder: Path) -> str:
    """The reason in words: a file that stands where a folder should be, else as the system says it."""
    for part in (folder, *folder.parents):
        if part.exists() and not part.is_dir():
            return f"'{part}' is a file"
    return (error.strerror or str(error)).rstrip(".")


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[Path]:
    """A new folder that no other process has: the one asked for, or the first numbered sibling that does not exist.

    It is created at once, so that of several processes each gets its own, and removed if it is still empty in the end.
    """
    for number in itertools.count(1):
        mine = folder if number == 1 else folder.with_name(f"{folder.name}-{number}")
        try:
            mine.mkdir(parents=True)
        except FileExistsError:
            continue
        break
    try:
        yield mine
    finally:
        with contextlib.suppress(OSError):
            mine.rmdir()


def write(file: Path, content: Callable[[BinaryIO], Any]) -> Path:
    """Write a file atomically: it never exists half written, not even after a crash or with two writers.

    Args:
        file: its path; a file that is there is replaced.
        content: called with the open file.
    """
    part = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with part.open("wb") as stream:
            content(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)
    return file
