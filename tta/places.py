"""Places to write to: tried before anything runs, claimed by one process alone, and written at once."""

import contextlib
import glob
import itertools
import os
import socket
import sys
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


# ---------------------------------------------------------------------- what is being written


def unfinished(target: Path) -> Path:
    """A new hidden name beside a file or folder that is to be written, which says the process that writes it."""
    return target.with_name(f".{target.name}.{socket.gethostname()}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def abandoned(target: Path, *, ours: bool = False) -> list[Path]:
    """Unfinished parts of a file or folder whose process was killed; of other machines that cannot be known.

    Args:
        target: the file or folder.
        ours: those with the number of this process too, which is writing none: in a container every run may have the same.
    """
    return [
        part
        for part in sorted(target.parent.glob(f".{glob.escape(target.name)}.*"))
        if _is_abandoned(part.name.removeprefix(f".{target.name}.").split("."), ours)
    ]


def _is_abandoned(words: list[str], ours: bool) -> bool:
    if words[-1].isdigit() and len(words) == 1:  # as earlier versions called it: the process alone
        words = [socket.gethostname(), words[0], ""]
    *host, process, _ = words if len(words) > 2 else ("", "", "")
    if ".".join(host) != socket.gethostname() or not process.isdigit():
        return False
    return not _is_alive(int(process)) or (ours and int(process) == os.getpid())


def _is_alive(process: int) -> bool:
    if sys.platform == "win32":  # there signal 0 is Ctrl+C
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
