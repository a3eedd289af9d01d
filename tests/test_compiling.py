"""Compiled forwards: which calls are compiled, and that results stay those of the eager adapter."""

import copy
import json
import pickle
import shutil

import pytest
import torch
from torch import nn

import tta
from tta import compiling, taps
from tta.cli import main


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5),
    ).eval()  # fmt: skip


@pytest.fixture
def batches():
    return torch.rand(6, 16, 3, 12, 12, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def ran(monkeypatch):
    """Numbers of images of the calls that would run compiled, in place of a compiler."""
    sizes = []

    def compiled(forward, dynamic):
        assert dynamic is False

        def run(x):
            sizes.append(len(x))
            return forward(x)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    return sizes


def test_batches_that_come_again_are_compiled_and_leftovers_are_not(model, batches, ran):
    adapter = tta.adapt(model, "tent", compile=True)
    for x in [*batches[:3], batches[3, :5], batches[4]]:
        adapter(x)
    assert ran == [16, 16, 16]


def test_only_so_many_kinds_are_compiled(model, batches, ran):
    adapter = tta.adapt(model, "tent", compile=True)
    for size in range(2, 12):
        for _ in range(2):
            adapter(batches[0, :size])
    assert ran == [2, 3, 4, 5]


def test_teachers_are_compiled_and_a_copy_too(model, batches, ran):
    adapter = copy.deepcopy(tta.adapt(model, "cotta", augment="none", compile=True))
    for x in batches[:2]:
        adapter(x)
    assert ran == [16, 16]
    assert adapter.teacher.forward.module is adapter.teacher


def test_what_a_pickle_gives_back_compiles_its_own_forward(model, batches, ran):
    compiled = nn.ModuleDict({"model": model})
    compiling.compile_forwards(compiled, model)
    for _ in range(2):
        expected = model(batches[0])
    assert ran == [16]
    again = pickle.loads(pickle.dumps(compiled))["model"]
    assert again.forward.module is again
    assert torch.equal(again(batches[0]), expected)
    again(batches[0])
    assert ran == [16, 16]


def test_autocast_makes_another_kind(model, batches, ran):
    adapter = tta.adapt(model, "norm", compile=True)
    adapter(batches[0])
    with torch.autocast("cpu", torch.bfloat16):
        adapter(batches[0])
    assert ran == []
    adapter(batches[0])
    assert ran == [16]


def test_a_forward_that_was_put_on_the_object_is_refused(model):
    model.forward = lambda x: nn.Sequential.forward(model, x)
    with pytest.raises(ValueError, match=r"the forward of the class Sequential, and this model has had another"):
        tta.adapt(model, "source", compile=True)


def test_the_limit_of_variants_is_raised_for_the_call_alone(model, batches, monkeypatch):
    seen = []
    monkeypatch.setattr(torch, "compile", lambda forward, dynamic: lambda x: seen.append(limit()) or forward(x))

    def limit():
        return torch._dynamo.config.cache_size_limit

    adapter = tta.adapt(model, "norm", compile=True)
    for x in batches[:2]:
        adapter(x)
    assert seen == [compiling.VARIANTS]
    assert limit() != compiling.VARIANTS


def test_hooks_and_vmap_see_the_eager_model(model, batches, ran):
    adapter = tta.adapt(model, "tent", compile=True)
    for _ in range(3):
        with taps.activations(adapter.model, ["4"], torch.mean) as seen:
            adapter(batches[0])
        assert "4" in seen
        with compiling.eagerly():
            adapter(batches[0])
    assert ran == []
    adapter(batches[0])
    assert ran == []
    adapter(batches[0])
    assert ran == [16]


def test_the_command_compiles_every_method_but_the_source_model(ran, tmp_path, capsys):
    words = ["digits-c", "source", "tent", "compile=true", "samples=60", "batch_size=20", "corruptions=[fog]"]
    assert main(["run", *words, "--out", str(tmp_path)]) == 0
    manifests = [json.loads(file.read_text())["manifest"] for file in sorted(tmp_path.rglob("result.json"))]
    assert {each["method"]: each.get("compiled", False) for each in manifests} == {"source": False, "tent": True}
    assert ran == [20, 20]


def test_an_export_is_plain_and_a_state_has_no_trace(model, batches, ran):
    adapter = tta.adapt(model, "norm", compile=True)
    adapter(batches[0])
    assert "forward" not in vars(adapter.export())
    tta.adapt(model, "norm").load_state_dict(adapter.state_dict())


def test_without_a_compiler_a_sentence_says_so(model, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match=r"compile=True needs a C\+\+ compiler"):
        tta.adapt(model, "tent", compile=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("tent", {}),
        ("rotta", {"memory_size": 16, "update_frequency": 16, "augment": "none"}),
        ("cotta", {"views": 2, "ap": 1.0}),
    ],
)
def test_results_are_those_of_the_eager_adapter(method, settings, model, batches, tmp_path):
    """Through a leftover batch, a pause, a saved and loaded state, and a reset."""
    if not shutil.which("g++"):
        pytest.skip("no C++ compiler on this machine")

    def logits(compile):  # the name of the argument that is tested
        adapter = tta.adapt(model, method, source=batches[0], compile=compile, **settings)
        seen = [adapter(x) for x in [*batches[:3], batches[3, :7]]]
        with adapter.paused():
            seen.append(adapter(batches[4]))
        adapter.save(tmp_path / "state.safetensors")
        again = tta.load(tmp_path / "state.safetensors", model, compile=compile)
        seen += [each(x) for x in batches[4:] for each in (adapter, again)]
        adapter.reset()
        return torch.cat([*seen, *(adapter(x) for x in batches[:3])])

    torch.testing.assert_close(logits(True), logits(False), rtol=1e-4, atol=1e-4)
