"""Downloads, from a server on this machine that cuts connections, lies, and answers with web pages."""

import contextlib
import hashlib
import io
import socket
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tta.cli import main
from tta.datasets import download as module
from tta.datasets.download import Archive, DownloadError, File, archives, download, fetch, unpack

BODY = bytes(range(256)) * 4096  # 1 MiB: four chunks


def tar_of(files):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


class Server:
    """Answers of the server: ``body`` under every path, its connection cut behind ``cut`` bytes, ``cuts`` times."""

    def __init__(self):
        self.body, self.kind, self.status = BODY, "application/octet-stream", 200
        self.cut, self.cuts, self.ranges, self.length = None, 0, True, True
        self.hang, self.drip = 0.0, 0.0  # seconds: behind a cut before the connection ends, and before each byte
        self.asked = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                wanted = self.headers.get("Range")
                outer.asked.append(wanted)
                start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and outer.ranges else 0
                if outer.status != 200:
                    return self.send_error(outer.status)
                if start >= len(outer.body):
                    return self.send_error(416)
                part = outer.body[start:]
                self.send_response(206 if start else 200)
                if start:
                    self.send_header("Content-Range", f"bytes {start}-{len(outer.body) - 1}/{len(outer.body)}")
                self.send_header("Content-Type", outer.kind)
                if outer.length:
                    self.send_header("Content-Length", str(len(part)))
                self.end_headers()
                with contextlib.suppress(ConnectionError):  # the client may have hung up
                    self.answer(part)

            def answer(self, part):
                if outer.drip:
                    for byte in part:
                        time.sleep(outer.drip)
                        self.wfile.write(bytes([byte]))
                elif outer.cuts:
                    outer.cuts -= 1
                    cut = outer.cut.pop(0) if isinstance(outer.cut, list) else outer.cut
                    self.wfile.write(part[:cut])
                    self.wfile.flush()
                    time.sleep(outer.hang)
                    self.connection.shutdown(socket.SHUT_RDWR)
                else:
                    self.wfile.write(part)

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(module, "PAUSE", 0.0)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    running = Server()
    yield running
    running.http.shutdown()
    running.http.server_close()


@pytest.fixture
def offer(server, monkeypatch):
    """Let `tta download set` be an archive on the server."""

    def offered(body, name="set.tar", **about):
        server.body = body
        about = {"size": len(body), "hash": f"sha256:{hashlib.sha256(body).hexdigest()}", **about}
        files = (File(url=f"{server.url}/{name}", **about),)
        monkeypatch.setattr(module, "archives", lambda: {"set": Archive("a set", "page", files)})
        return files[0]

    return offered


def silent(*args):
    pass


def test_a_broken_connection_is_resumed(server, tmp_path):
    server.cut, server.cuts = 300_000, 2
    fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.asked == [None, "bytes=300000-", "bytes=600000-"]


def test_a_later_call_goes_on_from_what_is_there(server, tmp_path):
    (tmp_path / "file").write_bytes(BODY[:1000])
    seen = []
    fetch(f"{server.url}/file", tmp_path / "file", None, lambda *told: seen.append(told))
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.asked == ["bytes=1000-"]
    assert seen[-1] == ("file", len(BODY), len(BODY))


def test_a_server_without_ranges_starts_again(server, tmp_path):
    server.ranges, server.cut, server.cuts = False, 1000, 1
    fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert (tmp_path / "file").read_bytes() == BODY


def test_a_server_that_always_cuts_is_given_up(server, tmp_path):
    server.ranges, server.cut, server.cuts = False, 1000, 100
    with pytest.raises(DownloadError, match=rf"1000 of {len(BODY)} bytes are there; call again to go on"):
        fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert len(server.asked) == 1 + module.ATTEMPTS


def test_a_server_that_sends_more_than_was_published_is_left(server, tmp_path):
    server.length = False  # its answers have no end but that of the connection
    with pytest.raises(DownloadError, match="sends more than the 1000 bytes that were published"):
        fetch(f"{server.url}/file", tmp_path / "file", 1000, silent)
    assert len(server.asked) == 1
    assert not (tmp_path / "file").exists()
    fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)  # the right size, without a length, is taken
    assert (tmp_path / "file").read_bytes() == BODY


def test_what_came_before_a_connection_hung_is_kept(server, tmp_path, monkeypatch):
    """Less than a chunk, and then nothing until the client gives up."""
    monkeypatch.setattr(module, "TIMEOUT", 0.3)
    server.cut, server.cuts, server.hang = 100_000, 2, 0.6
    fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert (tmp_path / "file").read_bytes() == BODY
    assert server.asked == [None, "bytes=100000-", "bytes=200000-"]


def test_a_server_that_never_gets_further_is_given_up(server, tmp_path):
    """Without ranges each attempt starts again: now 1000 bytes, now 500, is no progress."""
    server.ranges, server.cut, server.cuts = False, [1000, 500] * 20, 40
    with pytest.raises(DownloadError, match=f"of {len(BODY)} bytes are there; call again to go on"):
        fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert len(server.asked) == 1 + module.ATTEMPTS


def test_a_connection_that_drips_is_given_up_and_what_it_brought_is_kept(server, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "TIMEOUT", 0.2)
    server.drip = 0.01
    with pytest.raises(DownloadError, match=r"only \d+ bytes came in \d+ seconds\. \d+ of 1048576 bytes are there"):
        fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    kept = (tmp_path / "file").read_bytes()
    assert kept == BODY[: len(kept)] != b""
    assert len(server.asked) == 1


def test_more_than_there_is_starts_again(server, tmp_path):
    (tmp_path / "file").write_bytes(BODY + b"more")
    fetch(f"{server.url}/file", tmp_path / "file", None, silent)
    assert (tmp_path / "file").read_bytes() == BODY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": 404}, "answered 404"),
        ({"status": 503}, "503 .*0 of 1048576 bytes are there"),
        ({"kind": "text/html; charset=utf-8"}, "answered with a web page instead of the file"),
        ({"body": b"  <!DOCTYPE html><html>Too many requests"}, "answered with a web page instead of the file"),
        ({"body": BODY[:-5]}, "has 1048571 bytes now; 1048576 were published"),
    ],
)
def test_an_answer_that_is_not_the_file_is_said_to_be_none(server, tmp_path, change, message):
    vars(server).update(change)
    with pytest.raises(DownloadError, match=message):
        fetch(f"{server.url}/file", tmp_path / "file", len(BODY), silent)
    assert not (tmp_path / "file").exists()


def test_an_archive_is_checked_and_unpacked_once(server, offer, tmp_path):
    body = tar_of({"CIFAR-10-C/labels.npy": b"labels"})
    file = offer(body, into="there")
    server.cut, server.cuts = 100, 1
    assert download("set", root=tmp_path) == [(tmp_path / "there", file.hash)]
    assert (tmp_path / "there" / "CIFAR-10-C" / "labels.npy").read_bytes() == b"labels"
    assert [path.name for path in (tmp_path / ".downloads").iterdir()] == ["set_set.tar.done"]
    server.asked.clear()
    download("set", root=tmp_path)
    assert server.asked == []


def test_kept_archives_are_not_fetched_again(server, offer, tmp_path):
    offer(tar_of({"a": b"a"}))
    download("set", root=tmp_path, keep=True)
    (tmp_path / ".downloads" / "set_set.tar.done").unlink()
    server.asked.clear()
    download("set", root=tmp_path)
    assert server.asked == []


def test_plain_files_are_put_in_place(offer, tmp_path):
    offer(b"numbers", "v6.npy", into="CIFAR-10.1")
    ((path, _),) = download("set", root=tmp_path)
    assert path.read_bytes() == b"numbers"
    assert path == tmp_path / "CIFAR-10.1" / "v6.npy"


def test_a_wrong_checksum_throws_the_file_away(server, offer, tmp_path):
    offer(tar_of({"a": b"a"}), hash=f"md5:{'0' * 32}", hash_from="its authors")
    with pytest.raises(ValueError, match=r"is not the file that was published.*The checksum is from: its authors"):
        download("set", root=tmp_path)
    assert list((tmp_path / ".downloads").iterdir()) == []
    assert not (tmp_path / "a").exists()


def test_without_a_checksum_it_takes_trust(server, offer, tmp_path):
    body = tar_of({"a": b"a"})
    offer(body, hash=None)
    with pytest.raises(ValueError, match=r"Nobody published a checksum.*--trust"):
        download("set", root=tmp_path)
    assert server.asked == []
    ((_, checksum),) = download("set", root=tmp_path, trust=True)
    assert checksum == f"sha256:{hashlib.sha256(body).hexdigest()}"


def test_too_little_room_is_said_before(server, offer, tmp_path):
    offer(b"x", size=10**18)
    with pytest.raises(OSError, match=r"set.tar needs about 2000000000\.0 GB"):
        download("set", root=tmp_path)
    assert server.asked == []


def link(name, target):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = tarfile.SYMTYPE, target
        tar.addfile(info)
    return packed.getvalue()


def zip_of(name):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as opened:
        opened.writestr(name, b"evil")
    return packed.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.tar", tar_of({"../evil": b"evil"})),
        ("a.tar", link("evil", "/etc/passwd")),
        ("a.tar", link("evil", "../../evil")),
        ("a.zip", zip_of("../evil")),
        ("a.zip", zip_of("/evil")),
        ("a.zip", b"no zip"),
        ("a.tar.gz", b"no tar"),
    ],
)
def test_nothing_is_unpacked_outside(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    (tmp_path / "deep" / "into").mkdir(parents=True)
    with pytest.raises(ValueError, match=name):
        unpack(tmp_path / name, tmp_path / "deep" / "into")
    assert not [path for path in tmp_path.rglob("*evil*") if path.is_file() or path.is_symlink()]


def test_absolute_names_in_a_tar_land_inside(tmp_path):
    (tmp_path / "a.tar").write_bytes(tar_of({"/evil": b"evil"}))
    unpack(tmp_path / "a.tar", tmp_path / "into")
    assert (tmp_path / "into" / "evil").read_bytes() == b"evil"


def test_zip_files_are_unpacked(tmp_path):
    (tmp_path / "a.zip").write_bytes(zip_of("sketch/n01440764/x.jpg"))
    unpack(tmp_path / "a.zip", tmp_path / "into")
    assert (tmp_path / "into" / "sketch" / "n01440764" / "x.jpg").exists()


@pytest.mark.parametrize("name", archives())
def test_every_published_file_is_described(name):
    archive = archives()[name]
    assert archive.about
    assert archive.page.startswith("http")
    assert set(archive.default) <= set(archive.parts)
    for file in archive.files:
        assert file.url.startswith("http")
        assert not file.into.startswith(("/", ".."))
        if file.hash:
            kind, _, digits = file.hash.partition(":")
            assert len(digits) == {"md5": 32, "sha256": 64}[kind]
            int(digits, 16)
            assert file.hash_from
            assert file.size
    names = [file.name for file in archive.files]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cifar10c"], "No archive 'cifar10c'. Did you mean 'cifar10-c'"),
        (["imagenet-c", "noize"], "No part of 'imagenet-c' 'noize'. Did you mean 'noise'"),
        (["imagenet-sketch"], "Nobody published a checksum"),
    ],
)
def test_the_command_answers_mistakes(words, message, tmp_path, capsys):
    assert main(["download", *words, "--root", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_the_command_lists_and_fetches(offer, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["download"]) == 0
    listed = capsys.readouterr().out
    assert "imagenet-c" in listed
    assert "66.0 GB (noise blur weather digital extra)" in " ".join(listed.split())
    file = offer(tar_of({"a": b"a"}))
    monkeypatch.setenv("TTA_DATA", str(tmp_path / "data"))
    assert main(["download", "set"]) == 0
    assert capsys.readouterr().out.split() == [str(tmp_path / "data"), file.hash]
    assert (tmp_path / "data" / "a").read_bytes() == b"a"


def test_the_data_folder_is_found(tmp_path, monkeypatch):
    from tta.paths import data_root

    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TTA_DATA", raising=False)
    assert data_root().name == "tta"
    (tmp_path / "data").mkdir()
    assert str(data_root()) == "data"
    monkeypatch.setenv("TTA_DATA", "/elsewhere")
    assert str(data_root()) == "/elsewhere"
