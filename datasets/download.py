"""Published archives: fetched once, resumed where a connection broke, checked, and unpacked into the data folder.

The archives, their addresses and their checksums stand in ``configs/download.yaml``.
"""

import difflib
import os
import shutil
import tarfile
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any

import pooch
import yaml

from tta.paths import data_root

CHUNK = 2**18
ATTEMPTS = 5  # in a row that bring nothing new
TIMEOUT = 60.0  # seconds without a byte
PAUSE = 1.0  # seconds before another attempt, doubled with each that brought nothing
Progress = Callable[[str, int, "int | None"], None]  # what is done, how much of it, of how much


class DownloadError(RuntimeError):
    """The server did not give the file; trying again later may help, and resumes."""


@dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        url: where it lies.
        into: folder under the data folder where it belongs, unpacked if it is an archive.
        part: the name to choose it by, where a data set has several.
        size: bytes, where known.
        hash: ``sha256:...`` or ``md5:...``; None where nobody published one.
        hash_from: who published it.
    """

    url: str
    into: str = "."
    part: str | None = None
    size: int | None = None
    hash: str | None = None
    hash_from: str | None = None

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]

    @property
    def packed(self) -> bool:
        return self.name.endswith((".tar", ".tar.gz", ".tgz", ".zip"))


@dataclass(frozen=True)
class Archive:
    """A data set as it is published.

    Attributes:
        about: what it is, in a line.
        page: where it is described.
        files: all of them.
        default: the parts that are fetched when none is named; empty: all.
    """

    about: str
    page: str
    files: tuple[File, ...]
    default: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(file.part for file in self.files if file.part))


def archives() -> dict[str, Archive]:
    """What can be downloaded, by name."""
    text = (resources.files("tta.configs") / "download.yaml").read_text(encoding="utf-8")
    return {name: _archive(**entry) for name, entry in yaml.safe_load(text).items()}


def _archive(files: Sequence[Mapping[str, Any]], default: Sequence[str] = (), **about: str) -> Archive:
    return Archive(files=tuple(File(**file) for file in files), default=tuple(default), **about)


def download(
    name: str,
    parts: Sequence[str] = (),
    *,
    root: str | Path | None = None,
    trust: bool = False,
    keep: bool = False,
    progress: Progress | None = None,
) -> list[tuple[Path, str]]:
    """Fetch a published data set and unpack it where its stream looks for it.

    What is there already is not fetched again, and what was cut off is resumed, also by a later call.

    Args:
        name: one of :func:`archives`.
        parts: which of its parts; all, or its usual ones, if none is named.
        root: the data folder; left out: ``TTA_DATA``, else ``data`` where there is one, else a cache folder.
        trust: take a file that has no published checksum as it comes.
        keep: the archives, after they were unpacked.
        progress: called with what is being done, how many bytes of it, and of how many (None: not known).

    Returns:
        The folders or files that were asked for, each with the checksum of the published file.

    Raises:
        ValueError: an unknown name or part (the nearest is offered), a file without checksum and no ``trust``, a file
            whose checksum is wrong, or an archive that would write outside its folder.
        OSError: not enough room on the disk.
        DownloadError: the server answered with an error, a web page, or not at all.
    """
    known = archives()
    if name not in known:
        raise ValueError(_unknown("archive", name, known))
    archive = known[name]
    for part in parts:
        if part not in archive.parts:
            raise ValueError(_unknown(f"part of '{name}'", part, archive.parts))
    wanted = set(parts or archive.default or archive.parts)
    files = [file for file in archive.files if file.part in wanted or not archive.parts]
    if not trust and (open_ones := [file.url for file in files if not file.hash]):
        raise ValueError(
            f"Nobody published a checksum of {', '.join(open_ones)}, so what arrives cannot be checked. --trust takes it as "
            "it comes and tells its checksum."
        )
    folder = Path(root) if root is not None else data_root()
    folder.mkdir(parents=True, exist_ok=True)
    return [_fetch(name, file, folder, keep, progress or (lambda *_: None)) for file in files]


def _unknown(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"No {what} '{given}'.{hint} There are: {', '.join(known) or 'none'}."


def _fetch(name: str, file: File, root: Path, keep: bool, progress: Progress) -> tuple[Path, str]:
    """One file: fetched unless it is there, checked, unpacked. A note beside it says that it was, and its checksum."""
    place = root / file.into
    note = root / ".downloads" / f"{name}_{file.name}.done"
    target = place if file.packed else place / file.name
    known = note.read_text().strip() if note.exists() and target.exists() else ""
    if known and file.hash in (None, known):
        return target, known
    needed = (file.size or 0) * (2 if file.packed else 1)
    if needed > (free := shutil.disk_usage(root).free):
        raise OSError(f"{file.name} needs about {needed / 1e9:.1f} GB in '{root}'; {free / 1e9:.1f} GB are free.")
    fetched = _checked(file, note.with_suffix(""), progress)
    checksum = file.hash or f"sha256:{pooch.file_hash(str(fetched))}"
    place.mkdir(parents=True, exist_ok=True)
    if file.packed:
        progress(f"unpacking {file.name}", 0, None)
        unpack(fetched, place)
        if not keep:
            fetched.unlink()
    else:
        os.replace(fetched, target)
    note.write_text(f"{checksum}\n")
    return target, checksum


def _checked(file: File, to: Path, progress: Progress) -> Path:
    """The file at ``to``, fetched and with the right checksum."""
    pooch.get_logger().setLevel("WARNING")

    def resumed(url: str, temporary: str, _: Any) -> None:
        part = to.with_name(f"{to.name}.part")
        fetch(url, part, file.size, progress)
        progress(f"checking {file.name}", 0, None)
        os.replace(part, temporary)  # pooch takes it from here, and throws it away if its checksum is wrong

    try:
        return Path(pooch.retrieve(file.url, file.hash, fname=to.name, path=to.parent, downloader=resumed))
    except ValueError as error:
        raise ValueError(
            f"{file.url} is not the file that was published ({error}) The checksum is from: {file.hash_from}. Try again; "
            "if it stays so, the file was replaced or tampered with."
        ) from None


def fetch(url: str, to: Path, size: int | None, progress: Progress) -> None:
    """Fetch ``url`` into ``to``, going on behind the bytes that are there, also after a connection broke.

    Raises:
        DownloadError: an error page, a web page, or too many attempts that brought nothing.
    """
    name, failures = url.rpartition("/")[2], 0
    while failures < ATTEMPTS:
        before = to.stat().st_size if to.exists() else 0
        if size is not None and before > size:
            to.unlink()
            before = 0
        if size is not None and before == size:
            return
        reason = "the connection ended early"
        try:
            if _attempt(url, to, before, size, lambda done, total: progress(name, done, total)):
                return
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 416, 429):
                raise DownloadError(f"{url} answered {error.code} {error.reason}.") from None
            if error.code == 416:  # nothing lies behind what is there: it is of another file
                to.unlink(missing_ok=True)
            reason = f"{error.code} {error.reason}"
        except (OSError, HTTPException) as error:
            reason = str(error) or type(error).__name__
        if to.exists() and to.stat().st_size > before:
            failures = 0
            continue
        failures += 1
        if failures < ATTEMPTS:
            time.sleep(PAUSE * 2 ** (failures - 1))
    there = to.stat().st_size if to.exists() else 0
    of = f" of {size}" if size else ""
    raise DownloadError(f"{url}: {reason}. {there}{of} bytes are there; call again to go on from them.")


def _attempt(url: str, to: Path, start: int, size: int | None, progress: Callable[[int, int | None], None]) -> bool:
    """One request, from byte ``start`` on; whether the file is whole now."""
    request = urllib.request.Request(url, headers={"User-Agent": "tta-toolkit", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumes = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if resumes else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length else size
        chunk = answer.read(CHUNK)
        if not start and _is_page(answer.headers.get("Content-Type", ""), chunk):
            raise DownloadError(
                f"{url} answered with a web page instead of the file: an error page, a login or a quota. Open it in a "
                "browser to see which."
            )
        if size is not None and total is not None and total != size:
            raise DownloadError(
                f"{url} has {total} bytes now; {size} were published. It was replaced, or is cut off there."
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("ab" if start else "wb") as file:
            while chunk:
                file.write(chunk)
                progress(file.tell(), total)
                chunk = answer.read(CHUNK)
    return total is None or to.stat().st_size == total


def _is_page(kind: str, start: bytes) -> bool:
    return kind.startswith("text/html") or start[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def unpack(archive: Path, into: Path) -> None:
    """Unpack a tar or zip file; nothing is written outside of ``into``.

    Raises:
        ValueError: it cannot be read, or a member would land outside, or is no plain file or folder.
    """
    if not hasattr(tarfile, "data_filter"):
        raise ValueError("Unpacking safely needs Python 3.10.12, 3.11.4 or later.")
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as opened:
                for member in opened.namelist():
                    if PurePosixPath(member).is_absolute() or ".." in PurePosixPath(member).parts or "\\" in member:
                        raise ValueError(
                            f"'{archive}' would write '{member}' outside of '{into}'; nothing was unpacked."
                        )
                opened.extractall(into)
        else:
            with tarfile.open(archive) as tar:
                tar.extractall(into, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
        raise ValueError(f"'{archive}' is not unpacked: {error or type(error).__name__}.") from None
