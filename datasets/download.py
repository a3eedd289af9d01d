"""Published archives: downloaded once, resumed after a broken connection, checked, and unpacked into the data folder.

The archives, their addresses and their checksums are in ``configs/download.yaml``.
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
from http.client import HTTPException, HTTPResponse
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import pooch
import yaml

from tta.paths import data_root

CHUNK = 2**18
ATTEMPTS = 5  # consecutive ones without new bytes
TIMEOUT = 60.0  # seconds without a byte
LEAST = 2**14  # bytes in ATTEMPTS * TIMEOUT seconds; a connection that brings fewer (55 a second) would never end
HEAD = 64  # bytes that tell a web page from a file
PAUSE = 1.0  # seconds before another attempt, doubled after each attempt without new bytes
Progress = Callable[[str, int, "int | None"], None]  # current action, bytes done, bytes in total


class DownloadError(RuntimeError):
    """The server did not deliver the file; calling again later resumes the download."""


@dataclass(frozen=True)
class File:
    """One published file.

    Attributes:
        url: its address.
        into: folder under the data folder for it, or for its content if it is an archive.
        part: the part of the data set that it belongs to, if there are several.
        size: bytes, if known.
        hash: ``sha256:...`` or ``md5:...``; None if no checksum is published.
        hash_from: publisher of the checksum.
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
    """A published data set.

    Attributes:
        about: one-line description.
        page: address of its description.
        files: all files.
        default: the parts that are downloaded by default; empty: all.
    """

    about: str
    page: str
    files: tuple[File, ...]
    default: tuple[str, ...] = ()

    @property
    def parts(self) -> list[str]:
        return list(dict.fromkeys(file.part for file in self.files if file.part))


def archives() -> dict[str, Archive]:
    """The data sets that can be downloaded, by name."""
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
    """Download a published data set and unpack it where its stream looks for it.

    Existing files are not downloaded again, and an interrupted download is resumed, also by a later call.

    Args:
        name: one of :func:`archives`.
        parts: names of its parts; default: its default parts, or all.
        root: the data folder; default: ``TTA_DATA``, else ``data`` if it exists, else a cache folder.
        trust: accept a file without a published checksum.
        keep: keep the archives after unpacking.
        progress: called with the current action, the bytes done, and the bytes in total (None: not known).

    Returns:
        The requested folders or files, each with the checksum of the published file.

    Raises:
        ValueError: an unknown name or part (the message suggests the nearest), a file without checksum and no ``trust``, a
            file with a wrong checksum, or an archive that would write outside its folder.
        OSError: not enough disk space.
        DownloadError: the server answered with an error, with a web page, or not at all.
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
            f"Nobody published a checksum of {', '.join(open_ones)}, so the download cannot be checked. --trust accepts "
            "it anyway and shows its checksum."
        )
    folder = Path(root) if root is not None else data_root()
    folder.mkdir(parents=True, exist_ok=True)
    return [_fetch(name, file, folder, keep, progress or (lambda *_: None)) for file in files]


def _unknown(what: str, given: str, known: Mapping[str, Any] | list[str]) -> str:
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    hint = f" Did you mean '{match[0]}'?" if match else ""
    return f"No {what} '{given}'.{hint} There are: {', '.join(known) or 'none'}."


def _fetch(name: str, file: File, root: Path, keep: bool, progress: Progress) -> tuple[Path, str]:
    """Download one file if it is missing, check and unpack it; a note beside it records its checksum."""
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
    """Download the file to ``to`` and check its checksum."""
    pooch.get_logger().setLevel("WARNING")

    def resumed(url: str, temporary: str, _: Any) -> None:
        part = to.with_name(f"{to.name}.part")
        fetch(url, part, file.size, progress)
        progress(f"checking {file.name}", 0, None)
        os.replace(part, temporary)  # pooch checks the temporary file, and deletes it if its checksum is wrong

    try:
        return Path(pooch.retrieve(file.url, file.hash, fname=to.name, path=to.parent, downloader=resumed))
    except ValueError as error:
        raise ValueError(
            f"{file.url} is not the file that was published ({error}) The checksum is from: {file.hash_from}. Try again; "
            "if the error remains, the file was replaced or tampered with."
        ) from None


def fetch(url: str, to: Path, size: int | None, progress: Progress) -> None:
    """Download ``url`` into ``to``, continuing after the bytes that are there, also after a broken connection.

    What arrives is kept at once, so that a connection that breaks often still gets on.

    Raises:
        DownloadError: an error page, a web page, more bytes than were published, too many attempts without new bytes, or a
            connection that brings next to nothing (fewer than ``LEAST`` bytes in ``ATTEMPTS * TIMEOUT`` seconds).
    """
    failures = most = 0
    while failures < ATTEMPTS:
        before = _bytes_in(to)
        most = max(most, before)
        if size is not None and before > size:
            to.unlink()
            before = 0
        if size is not None and before == size:
            return
        reason = _failure(url, to, before, size, progress)
        if reason is None:
            return
        # More than ever: a server that starts again each time would otherwise seem to bring new bytes for ever.
        if _bytes_in(to) > most:
            failures = 0
            continue
        failures += 1
        if failures < ATTEMPTS:
            time.sleep(PAUSE * 2 ** (failures - 1))
    of = f" of {size}" if size else ""
    raise DownloadError(f"{url}: {reason}. {_bytes_in(to)}{of} bytes are there; call again to go on from them.")


def _bytes_in(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def _failure(url: str, to: Path, start: int, size: int | None, progress: Progress) -> str | None:
    """Make one attempt; None if the file is complete now, else the reason why not. Raises if another would not help."""
    name = url.rpartition("/")[2]
    try:
        complete = _attempt(url, to, start, size, lambda done, total: progress(name, done, total))
        return None if complete else "the connection ended early"
    except urllib.error.HTTPError as error:
        if error.code < 500 and error.code not in (408, 416, 429):
            raise DownloadError(f"{url} answered {error.code} {error.reason}.") from None
        if error.code == 416:  # the server has no bytes after ours: they are of another file
            to.unlink(missing_ok=True)
        return f"{error.code} {error.reason}"
    except (OSError, HTTPException) as error:
        return str(error) or type(error).__name__


def _attempt(url: str, to: Path, start: int, size: int | None, progress: Callable[[int, int | None], None]) -> bool:
    """One request, from byte ``start`` on; returns whether the file is complete now."""
    request = urllib.request.Request(url, headers={"User-Agent": "tta-toolkit", "Accept-Encoding": "identity"})
    if start:
        request.add_header("Range", f"bytes={start}-")
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        resumes = answer.status == 206 and answer.headers.get("Content-Range", "").startswith(f"bytes {start}-")
        start = start if resumes else 0
        length = answer.headers.get("Content-Length")
        total = start + int(length) if length and length.isdecimal() else size
        chunk = _head(answer)
        if not start and _is_page(answer.headers.get("Content-Type", ""), chunk):
            raise DownloadError(
                f"{url} answered with a web page instead of the file: an error page, a login or a quota. Open it in a "
                "browser to see which."
            )
        if size is not None and total is not None and total != size:
            raise DownloadError(
                f"{url} has {total} bytes now; {size} were published. It was replaced, or is truncated on the server."
            )
        to.parent.mkdir(parents=True, exist_ok=True)
        with to.open("ab" if start else "wb") as file:
            _keep(answer, chunk, file, url, size, lambda done: progress(done, total))
        if size is not None and to.stat().st_size > size:
            to.unlink()
            raise DownloadError(
                f"{url} sends more than the {size} bytes that were published. It was replaced, or the server does not know "
                "where it ends; nothing of it was kept."
            )
    return total is None or to.stat().st_size == total


def _head(answer: HTTPResponse) -> bytes:
    """The first bytes of an answer, enough to tell a web page from a file; fewer only at its end."""
    head = b""
    while len(head) < HEAD and (more := answer.read1(HEAD - len(head))):
        head += more
    return head


def _keep(
    answer: HTTPResponse, chunk: bytes, file: BinaryIO, url: str, size: int | None, progress: Callable[[int], None]
) -> None:
    """Write an answer, ``chunk`` first, as it arrives; stops behind the published size.

    Raises:
        DownloadError: next to nothing comes.
    """
    since, seen = time.monotonic(), file.tell()
    while chunk:
        file.write(chunk)
        done = file.tell()
        progress(done)
        if size is not None and done > size:
            return
        now = time.monotonic()
        if done - seen >= LEAST:
            since, seen = now, done
        elif now - since > ATTEMPTS * TIMEOUT:
            of = f" of {size}" if size else ""
            raise DownloadError(
                f"{url}: only {done - seen} bytes came in {now - since:.0f} seconds. {done}{of} bytes are there; call again "
                "to go on from them."
            )
        chunk = answer.read1(
            CHUNK
        )  # what has arrived, where read() would wait for a whole chunk and lose it with the connection


def _is_page(kind: str, start: bytes) -> bool:
    return kind.startswith("text/html") or start[:64].lstrip().lower().startswith((b"<!doctype html", b"<html"))


def unpack(archive: Path, into: Path) -> None:
    """Unpack a tar or zip file; nothing is written outside ``into``.

    Raises:
        ValueError: it cannot be read, or a member would be written outside, or is not a plain file or folder.
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
