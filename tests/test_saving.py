"""Saved adapters: whole or not at all, with an identity; and threads that share an adapter."""

import json
import os
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tta


@pytest.fixture
def images():
    return torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tent", {"lr": 1e-2}),
        ("eata", {}),
        ("rotta", {"update_frequency": 5}),
        ("gala:tent", {}),
        ("norm", {"alpha": 0.2}),
    ],
)
def test_a_loaded_adapter_goes_on_as_if_it_had_never_stopped(cnn, images, tmp_path, method, settings):
    adapter = tta.adapt(cnn, method, source=images, **settings)
    adapter(images)
    adapter.save(tmp_path / "adapter.safetensors")
    expected = [adapter(images), adapter(images.flip(0))]
    loaded = tta.load(tmp_path / "adapter.safetensors", cnn)  # no source images
    assert loaded.config == adapter.config
    assert all(torch.equal(loaded(batch), old) for batch, old in zip((images, images.flip(0)), expected, strict=True))
    assert [file.name for file in tmp_path.iterdir()] == ["adapter.safetensors"]


def test_what_differs_is_named_and_nothing_is_loaded(cnn, images):
    other = tta.adapt(cnn, "tent", lr=5e-2)
    with torch.no_grad():
        cnn.fc.weight.mul_(1.5)
    adapter = tta.adapt(cnn, "tent", lr=1e-3)
    adapter(images)
    before = adapter.state_dict()
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"source weights \w+\.\.\. there, \w+\.\.\. here; lr=0.05 there, lr=0.001 here"
        ):
            adapter.load_state_dict(other.state_dict())
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())
    with pytest.warns(RuntimeWarning, match="saved by another adapter"):
        adapter.load_state_dict(other.state_dict(), strict=False)


def test_a_state_that_does_not_fit_changes_nothing(cnn, images):
    adapter, other = tta.adapt(cnn, "tent"), tta.adapt(cnn, "tent")
    adapter(images)
    before, state = adapter.state_dict(), other.state_dict()
    state["model.fc.bias"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match="size mismatch"):
        adapter.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in adapter.state_dict().items())


def test_files_that_hold_something_else_are_named(cnn, images, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.safetensors"):
        tta.load(tmp_path / "nothing.safetensors", cnn)
    save_file({"a": torch.zeros(2)}, tmp_path / "weights.safetensors")
    with pytest.raises(ValueError, match=r"weights\.safetensors' does not hold a saved adapter"):
        tta.load(tmp_path / "weights.safetensors", cnn)
    adapter = tta.adapt(cnn, "tent")
    adapter.save(tmp_path / "whole.safetensors")
    (tmp_path / "torn.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"torn\.safetensors' does not hold a saved adapter, or is damaged"):
        tta.load(tmp_path / "torn.safetensors", cnn)
    with torch.no_grad():
        cnn.fc.weight.add_(1)
    with pytest.raises(ValueError, match=r"whole\.safetensors' does not fit this model: .*source weights"):
        tta.load(tmp_path / "whole.safetensors", cnn)


def with_header(change):
    """A damage: the JSON text of a state after ``change`` of the object, or the bytes given."""

    def damage(state):
        header = json.loads(bytes(state["adapter_state"].tolist()))
        text = change if isinstance(change, bytes) else json.dumps({**header, **change}).encode()
        return {**state, "adapter_state": torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    return damage


def replaced(name, value):
    return lambda state: {**state, name: value(state[name]) if callable(value) else value}


def without(name):
    return lambda state: {key: value for key, value in state.items() if key != name}


DAMAGES = [
    (with_header(b"{nothing"), "is no JSON text"),
    (with_header(b"[1]"), "holds a list, where an object was expected"),
    (with_header({"format": 99}), "format 99 there, 2 here"),
    (with_header({"method": 3}), "lacks method, or holds something else"),
    (with_header({"method": "tnet"}), "Did you mean 'tent'"),
    (with_header({"config": None}), "lacks config"),
    (with_header({"config": {"lrr": 1}}), "Key 'lrr' not in"),
    (with_header({"optimizer": [1, 2]}), "lacks optimizer"),
    (with_header({"optimizer": []}), "moments of 0 parameters; this adapter changes 14"),
    (without("adapter_state"), "no 'adapter_state'"),
    (without("generator"), "random generator is .* the state holds none"),
    (replaced("generator", lambda state: state.float()), r"the state holds torch\.float32"),
    (without("model.fc.bias"), "Missing key"),
    (replaced("model.extra", torch.zeros(2)), "Unexpected key"),
    (replaced("model.fc.bias", torch.zeros(3)), "size mismatch"),
    (replaced("model.fc.bias", lambda bias: bias.long()), r"fc\.bias torch\.int64 there, torch\.float32 here"),
    (replaced("_counters", lambda counters: counters.float()), "_counters torch.float32 there, torch.int64 here"),
    (replaced("optimizer.0.exp_avg", torch.zeros(3)), r"exp_avg of parameter 0 is torch\.float32 of shape \(3,\)"),
    (replaced("optimizer.0.exp_avg", lambda moment: moment.long()), r"parameter 0 is torch\.int64"),
    (without("optimizer.0.exp_avg"), "parameter 0 are exp_avg_sq, step; Adam has exp_avg, exp_avg_sq, step"),
    (replaced("optimizer.99.exp_avg", torch.zeros(3)), "Unexpected key"),
    (without("memory.samples"), "memory.samples' holds 64 floating-point samples; the state has none"),
    (replaced("memory.samples", torch.zeros(3, 3)), r"the state has torch\.float32 of shape \(3, 3\)"),
    (replaced("memory.samples", lambda samples: samples.long()), r"the state has torch\.int64"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[message for _, message in DAMAGES])
def test_a_damaged_state_is_a_sentence_that_names_the_file(cnn, images, tmp_path, damage, message):
    adapter = tta.adapt(cnn, "rotta", update_frequency=8)
    adapter(images)
    state = {name: value.contiguous() for name, value in damage(adapter.state_dict()).items()}
    save_file(state, tmp_path / "damaged.safetensors")
    with pytest.raises(ValueError, match=rf"(?s)damaged\.safetensors' .*{message}"):
        tta.load(tmp_path / "damaged.safetensors", cnn)


@pytest.mark.parametrize("entries", ["{nothing", "[3]", "[]"])
def test_damaged_source_statistics_are_a_sentence_that_names_the_file(cnn, images, tmp_path, entries):
    tta.adapt(cnn, "eata", source=images).save(tmp_path / "whole.safetensors")
    state = load_file(tmp_path / "whole.safetensors")
    save_file(state, tmp_path / "damaged.safetensors", {"statistics": entries})
    with pytest.raises(ValueError, match=r"damaged\.safetensors' does not"):
        tta.load(tmp_path / "damaged.safetensors", cnn)
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        facts = file.metadata()
    del state["source_statistics.0.layer1.bn1.bias"]
    save_file(state, tmp_path / "damaged.safetensors", facts)
    with pytest.raises(ValueError, match=r"damaged\.safetensors' is damaged: it lacks 'layer1\.bn1\.bias'"):
        tta.load(tmp_path / "damaged.safetensors", cnn)


def test_a_save_that_fails_leaves_the_file_of_before(cnn, images, tmp_path, monkeypatch):
    adapter = tta.adapt(cnn, "tent")
    adapter.save(tmp_path / "adapter.safetensors")
    before = load_file(tmp_path / "adapter.safetensors")
    adapter(images)

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        adapter.save(tmp_path / "adapter.safetensors")
    after = load_file(tmp_path / "adapter.safetensors")
    assert all(torch.equal(value, before[key]) for key, value in after.items())
    assert len(list(tmp_path.iterdir())) == 1


def test_threads_give_the_state_of_some_order_of_their_calls(cnn, images):
    one, many = tta.adapt(cnn, "tent"), tta.adapt(cnn, "tent")
    for _ in range(24):
        one(images)
    states, workers = [], []
    for _ in range(3):
        workers.append(threading.Thread(target=lambda: [many(images) for _ in range(8)]))
    workers.append(threading.Thread(target=lambda: states.extend(many.state_dict() for _ in range(20))))
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))
    steps = [
        {int(v) for k, v in state.items() if k.startswith("optimizer.") and k.endswith(".step")} for state in states
    ]
    assert all(len(found) <= 1 for found in steps)  # no state mixes two steps


def test_paused_is_of_the_thread_that_entered_it(cnn, images):
    adapter, inside, done = tta.adapt(cnn, "tent"), threading.Event(), threading.Event()

    def probe():
        with adapter.paused():
            inside.set()
            done.wait(20)

    other = threading.Thread(target=probe)
    other.start()
    inside.wait(20)
    adapter(images)
    done.set()
    other.join()
    assert adapter.progress().updates == 1
