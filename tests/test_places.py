"""Places to write to: tried before the work, claimed by one process alone, written at once."""

import os
import sys
import threading

import pytest

from tta import places


def test_a_place_is_tried_and_what_was_made_for_it_goes_again(tmp_path):
    with places.tried(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    with places.tried(tmp_path / "a" / "file.png", is_file=True):
        assert (tmp_path / "a").is_dir()
    assert list(tmp_path.iterdir()) == []
    with places.tried(tmp_path / "a" / "b") as folder:
        (folder / "kept").write_text("")
    assert (tmp_path / "a" / "b" / "kept").exists()


def test_a_place_that_cannot_be_written_to_is_said_with_the_reason(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"Nothing can be written to '.*x': '.*file' is a file"),
        places.tried(tmp_path / "file" / "x"),
    ):
        pytest.fail("the work began")
    (tmp_path / "folder").mkdir()
    with (
        pytest.raises(OSError, match=r"'.*folder' is a folder, and a file is to be written"),
        places.tried(tmp_path / "folder", is_file=True),
    ):
        pytest.fail("the work began")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="may write anywhere")
def test_a_folder_without_permission_is_said(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(OSError, match="Permission denied"), places.tried(tmp_path / "locked" / "x"):
        pytest.fail("the work began")


def test_each_claim_is_another_folder_also_before_anything_is_in_it(tmp_path):
    with places.claimed(tmp_path / "run") as first, places.claimed(tmp_path / "run") as second:
        assert [first.name, second.name] == ["run", "run-2"]
        (second / "result.json").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["run-2"]  # an empty one goes


def test_claims_at_once_are_different(tmp_path):
    gate, found = threading.Barrier(8), []

    def claim():
        gate.wait()
        with places.claimed(tmp_path / "deep" / "run") as mine:
            found.append(mine)
            gate.wait()

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 8


def test_a_file_is_whole_or_not_there(tmp_path):
    file = tmp_path / "x"

    def torn(stream):
        stream.write(b"half")
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        places.write(file, torn)
    assert list(tmp_path.iterdir()) == []
    places.write(file, lambda stream: places.write(file, lambda other: other.write(b"b")) and stream.write(b"a"))
    assert file.read_bytes() == b"a"
    assert list(tmp_path.iterdir()) == [file]
