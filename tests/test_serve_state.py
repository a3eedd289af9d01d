"""Saved states of the server: it goes on where it was, and nothing damaged or foreign is loaded."""

import logging
import shutil
from contextlib import contextmanager

import pytest

import tta
from served import IMAGES, ask, metrics_of, same_state, serving_of, state_of
from tta.serve import ServeSettings, create_app
from tta.serve.autosave import StateFolder
from tta.serve.service import saving


def test_it_goes_on_as_if_it_had_never_stopped(digits_cnn, tmp_path):
    with serving_of(digits_cnn) as client:
        ask(client, IMAGES[:32])
        expected = ask(client, IMAGES[32:64])
    with serving_of(digits_cnn, settings={"state": str(tmp_path)}) as client:
        ask(client, IMAGES[:32])
    with serving_of(digits_cnn, settings={"state": str(tmp_path)}) as client:
        found = ask(client, IMAGES[32:64])
    assert [one["top"] for one in found] == [one["top"] for one in expected]


def test_every_n_batches_are_saved_and_two_are_kept(digits_cnn, tmp_path):
    with serving_of(digits_cnn, settings={"state": str(tmp_path), "autosave": 2}) as client:
        for number in range(8):
            ask(client, IMAGES[8 * number : 8 * number + 8])
            pending = client.service.folder._pending
            if pending is not None:
                pending.result()
        files = sorted(file.name for file in tmp_path.glob("*.safetensors"))
        assert [name.split("-")[1] for name in files] == ["000000003", "000000004"]
        assert metrics_of(client)['tta_autosaves_total{result="saved"}'] == 4


def damage_by_cutting(file):
    file.write_bytes(file.read_bytes()[:-100])


def damage_by_a_bit(file):
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)


def damage_by_emptying(file):
    file.write_bytes(b"")


@pytest.fixture(scope="module")
def two_states(digits_cnn, tmp_path_factory):
    """A folder with two saved states, and the first of them."""
    folder = tmp_path_factory.mktemp("states")
    with serving_of(digits_cnn, settings={"state": str(folder)}) as client:
        ask(client, IMAGES[:32])
        good = state_of(client)
    with serving_of(digits_cnn, settings={"state": str(folder)}) as client:
        ask(client, IMAGES[32:64])
    return folder, good


@pytest.mark.parametrize("damage", [damage_by_cutting, damage_by_a_bit, damage_by_emptying])
def test_a_damaged_state_is_passed_over_with_a_sentence(digits_cnn, two_states, tmp_path, damage, caplog):
    settings = {"state": str(tmp_path)}
    folder, good = two_states
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    _, last = sorted(tmp_path.glob("autosave-*"))
    damage(last)
    with caplog.at_level(logging.WARNING, "tta.serve"), serving_of(digits_cnn, settings=settings) as client:
        assert same_state(good, state_of(client))
    assert f"'{last.name}' is damaged" in caplog.text
    for file in tmp_path.glob("autosave-*"):
        damage_by_emptying(file)
    with serving_of(digits_cnn, settings=settings) as client:
        assert same_state(tta.adapt(digits_cnn, "tent").state_dict(), state_of(client))


def test_a_state_of_other_settings_or_weights_is_refused_and_kept(digits_cnn, tmp_path):
    with serving_of(digits_cnn, settings={"state": str(tmp_path)}) as client:
        ask(client, IMAGES[:32])
    before = sorted(tmp_path.glob("autosave-*"))
    other = tta.load_model("digits-cnn")
    other.model.load_state_dict(
        {name: value + (1e-3 if value.is_floating_point() else 0) for name, value in other.model.state_dict().items()}
    )
    for adapter in (tta.adapt(digits_cnn, "tent", lr=0.5), tta.adapt(digits_cnn, "norm"), tta.adapt(other, "tent")):
        with pytest.raises(ValueError, match=r"does not fit: .* another folder, state=DIR"):
            create_app(adapter, ServeSettings(state=str(tmp_path)))
    assert sorted(tmp_path.glob("autosave-*")) == before
    create_app(tta.adapt(digits_cnn, "tent"), ServeSettings(state=str(tmp_path))).state.service.folder.close()


def test_a_folder_has_one_server(digits_cnn, tmp_path):
    with serving_of(digits_cnn, settings={"state": str(tmp_path)}) as client:
        with pytest.raises(ValueError, match="Another server uses the folder"):
            create_app(tta.adapt(digits_cnn, "tent"), ServeSettings(state=str(tmp_path)))
        assert len(ask(client, IMAGES[:8])) == 8


def test_what_a_killed_server_left_is_removed(tmp_path):
    for name in (".autosave", "..autosave.1234", ".snapshot.safetensors.12"):
        (tmp_path / name).write_bytes(b"half")
    StateFolder(tmp_path).close()
    assert [file.name for file in tmp_path.iterdir()] == [".lock"]


@contextmanager
def room_for(size):
    """Within this context no file of this process grows beyond ``size`` bytes: a write fails in the middle."""
    resource = pytest.importorskip("resource", reason="limits of POSIX")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_state_that_the_disk_cuts_off_leaves_nothing(digits_cnn, tmp_path):
    with serving_of(digits_cnn, settings={"state": str(tmp_path), "autosave": 1}) as client:
        with room_for(100_000):
            assert len(ask(client, IMAGES[:8])) == 8
            client.service.folder._pending.result()
        assert metrics_of(client)['tta_autosaves_total{result="failed"}'] == 1
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    (kept,) = tmp_path.glob("autosave-*")  # of the end, when there was room again
    assert kept.stat().st_size > 100_000


def test_a_full_disk_stops_no_answer(digits_cnn, tmp_path, monkeypatch):
    with serving_of(digits_cnn, settings={"state": str(tmp_path), "autosave": 1}) as client:
        ask(client, IMAGES[:8])
        client.service.folder._pending.result()
        (kept,) = tmp_path.glob("autosave-*")

        def full(*args):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(saving, "write", full)
            assert len(ask(client, IMAGES[8:16])) == 8
            client.service.folder._pending.result()
            assert metrics_of(client)['tta_autosaves_total{result="failed"}'] == 1
            assert list(tmp_path.glob("autosave-*")) == [kept]
