"""Benchmarks: what a description becomes, cells on disk, resuming after a kill, workers."""

import dataclasses
import inspect
import json
import os
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import yaml

import tta
from tta import benchmark
from tta.benchmark import Cell, Failure, cells, claims, settings, workers
from tta.cli import main
from tta.config import ConfigError
from tta.results import Result, Row

TINY = {
    "name": "tiny",
    "methods": ["source", "norm", "tent"],
    "streams": {"digits-c": {"samples": 20, "corruptions": ["fog", "contrast"]}},
    "models": ["digits-cnn"],
    "seeds": [0, 1],
}


def result(method="tent", seed=0, errors=(1, 2), **changes):
    rows = tuple(Row(domain=name, samples=10, errors=n) for name, n in zip(("fog", "snow"), errors, strict=True))
    fields = {"config": {}, "manifest": {}, "seconds": 1.0, "stream": "digits-c", "reset": "never"}
    return Result(method=method, seed=seed, rows=rows, **{**fields, **changes})


def names(described):
    return [cell.name for cell in benchmark.in_order(benchmark.entries(benchmark.load(described)))]


def test_a_description_becomes_the_same_cells_every_time():
    described = {**TINY, "protocols": {"continual": {}, "correlated": {"delta": 0.1}}, "grid": {"lr": [1e-3, 5e-3]}}
    found = names(described)
    assert found == names(described)
    assert len(found) == len(set(found)) == 2 * 2 * (2 + 2)  # protocols, seeds; source, norm, tent twice
    assert all(name.startswith("digits-c_") for name in found)
    one = Cell(method="tent", stream="digits-c", hparams={"lr": 0.001}, model="timm:vit/x", accelerator="cpu")
    assert one.name == Cell(method="tent", stream="digits-c", hparams={"lr": 0.001}, model="timm:vit/x").name
    assert one.name == "digits-c_continual_timm-vit-x_tent_lr=0.001_seed0_" + one.name[-8:]


def test_a_description_keeps_the_name_that_it_has_on_disk():
    assert (
        Cell(method="source", stream="digits-c", model="digits-cnn").name
        == "digits-c_continual_digits-cnn_source_seed0_21a71514"
    )
    whole = Cell(
        method="tent",
        hparams={"lr": 0.005, "steps": 1},
        stream="digits-c",
        stream_settings={"samples": 7, "delta": 0.1},
        protocol="correlated",
        model="digits-cnn",
        checkpoint="x.safetensors",
        num_classes=7,
        mean=[0.5, 0.5, 0.5],
        std=[1, 1, 1],
        preset="cifar10-c",
        source="s",
        batch_size=5,
        reset="domain",
        precision="bf16-mixed",
        clean=True,
        consistency=True,
        accelerator="cpu",
        num_workers=2,
    )
    assert whole.name == "digits-c_correlated_digits-cnn_tent_lr=0.005_steps=1_seed0_0feafb17"


SHARED = {
    "checkpoint": "x.safetensors",
    "source": "statistics",
    "batch_size": 50,
    "reset": "domain",
    "precision": "bf16-mixed",
    "clean": True,
    "accelerator": "cpu",
    "num_workers": 2,
    "guard": True,
    "compile": True,
}


def test_a_vision_language_model_is_benchmarked_with_its_zero_shot_error_as_a_line(tmp_path):
    """``tta run`` puts the zero-shot error beside every method unasked; a cell has one method."""
    few = {"seeds": [0, 1], "methods": ["source", "tda"], "stream.samples": 6, "stream.corruptions": ["fog"]}
    summary = tta.bench("vlm-mini", out=tmp_path, settings=few)
    assert "failed" not in str(summary)
    found = [
        cells.read(tmp_path / "cells", cell)
        for cell in benchmark.in_order(benchmark.entries(benchmark.load("vlm-mini", few)))
    ]
    assert [(one.method, one.seed) for one in found] == [("source", 0), ("tda", 0), ("source", 1), ("tda", 1)]
    assert all((one.samples, one.manifest["model"]["templates"]) == (6, ["a photo of a {}."]) for one in found)
    first, second = (one.predictions.index.tolist() for one in found[1::2])
    assert first != second
    assert sorted(first) == sorted(second)


def test_the_papers_protocol_is_run_with_every_method_that_takes_single_images():
    described = benchmark.load("vlm-mini")
    assert {*described.methods} == {"source", *tta.list_methods(two_towers=True)} - {"batclip"}
    assert described.protocols == {"batch-1": {"shuffle": True}}
    samples = described.streams["digits-c"]["samples"]
    assert described.methods["onzeta"]["length"] == samples
    assert len(described.seeds) >= 3


def test_settings_of_a_benchmark_are_those_of_its_cells_and_of_their_requests():
    assert SHARED.keys() == {field.name for field in dataclasses.fields(settings.SharedSettings)}
    for cell in benchmark.in_order(benchmark.entries(benchmark.load({**TINY, **SHARED}))):
        assert {name: getattr(cell, name) for name in SHARED} == SHARED
        assert {name: getattr(cell.request.run, name) for name in SHARED} == SHARED


def test_settings_that_are_handed_on_are_arguments_of_the_function():
    of_model = {"classes" if name == "class_names" else name for name in settings.OF_MODEL}
    assert of_model <= inspect.signature(tta.load_model).parameters.keys()
    assert set(settings.OF_ENGINE) <= inspect.signature(tta.evaluate).parameters.keys()
    assert {*settings.OF_MODEL, *settings.OF_ENGINE} <= {
        field.name for field in dataclasses.fields(settings.RunSettings)
    }


def test_the_description_on_disk_is_the_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(cells, "run_cell", lambda cell: result(cell.method, cell.seed))
    tta.bench({**TINY, **SHARED}, out=tmp_path)
    assert benchmark.load(tmp_path / benchmark.DESCRIPTION) == benchmark.load({**TINY, **SHARED})
    written = list(yaml.safe_load((tmp_path / benchmark.DESCRIPTION).read_text()))
    assert (written[0], written[-len(SHARED) :]) == ("name", list(SHARED))


def test_lists_and_dictionaries_say_the_same_and_numbers_are_numbers():
    words = {**TINY, "methods": {"source": None, "norm": {}, "tent": {"lr": "1e-3"}}}
    assert names(words) == names({**TINY, "methods": {"source": {}, "norm": {}, "tent": {"lr": 0.001}}})
    assert names(words) != names(TINY)


def test_an_axis_is_what_was_asked_for_and_no_more():
    assert list(benchmark.load({**TINY, "protocols": ["mixed"]}).protocols) == ["mixed"]
    assert list(benchmark.load(TINY).protocols) == ["continual"]


def test_cells_of_one_stream_follow_one_another():
    seeds = [name.split("_seed")[1][0] for name in names(TINY)]
    assert seeds == ["0"] * 3 + ["1"] * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["tnet"]}, "No method 'tnet'. Did you mean 'tent'"),
        ({"streams": ["digits"]}, "No stream 'digits'. Did you mean 'digits-c'"),
        ({"protocols": ["continul"]}, "No protocol 'continul'. Did you mean 'continual'"),
        ({"models": ["digits-cn"]}, "No model 'digits-cn'. Did you mean 'digits-cnn'"),
        ({"models": {"digits-cnn": {"chekpoint": "x"}}}, "Did you mean 'checkpoint'"),
        ({"streams": {"digits-c": {"sevrity": 3}}}, "Did you mean 'severity'"),
        ({"protocols": {"correlated": {"detla": 1}}}, "Did you mean 'delta'"),
        ({"methods": {"tent": {"lrr": 1}}}, "Key 'lrr' not in 'TentConfig'. Did you mean 'lr'"),
        ({"methods": {"tent": {"lr": "fast"}}}, "'fast' of type 'str' could not be converted"),
        ({"grid": {"lrr": [1]}}, "Did you mean 'lr'"),
        ({"grid": {"lr": 0.1}}, "expected a list of values for 'lr'"),
        ({"seeds": ["one"]}, "seeds"),
        ({"seeds": []}, "needs methods, streams and seeds"),
        ({"presets": ["cifar"]}, "has a preset 'cifar'"),
        ({"select": ["oracle"]}, "No way of selection 'oracle'"),
        ({"methods": {"tent": {"stream.sampels": 5}}}, "Did you mean 'samples'"),
        ({"columns": "method"}, "There are: domain, stream"),
        ({"order": "eror"}, "Did you mean 'error'"),
        ({"sedes": [0]}, "Did you mean 'seeds'"),
    ],
)
def test_what_does_not_exist_is_said_before_anything_runs(change, message):
    with pytest.raises(ConfigError, match=message):
        benchmark.entries(benchmark.load({**TINY, **change}))


def test_settings_reach_into_the_description():
    described = {**TINY, "grid": {"tent": {"steps": [3]}}}
    settings = {"stream.samples": 5, "protocol.shuffle": True, "tent.lr": 0.5, "grid.tent.steps": [1, 2], "seeds": [3]}
    found = benchmark.in_order(benchmark.entries(benchmark.load(described, settings)))
    assert described == {**TINY, "grid": {"tent": {"steps": [3]}}}
    assert {(cell.seed, cell.stream_settings["samples"], cell.stream_settings["shuffle"]) for cell in found} == {
        (3, 5, True)
    }
    assert [dict(cell.hparams) for cell in found if cell.method == "tent"] == [
        {"lr": 0.5, "steps": 1},
        {"lr": 0.5, "steps": 2},
    ]
    with pytest.raises(ConfigError, match=r"'norn' is not in this benchmark. Did you mean 'norm'"):
        benchmark.load(TINY, {"norn.alpha": 0.1})


@pytest.mark.parametrize("name", benchmark.available())
def test_benchmarks_of_the_toolkit_are_valid(name):
    assert benchmark.available()[name]
    assert names(name)


def test_a_method_may_have_settings_of_its_stream():
    described = {
        "methods": {"norm": {"alpha": 0.3}, "tent": {"lr": 0.1, "stream.samples": 5, "stream.batch_size": 7}},
        "streams": {"digits-c": {"samples": 20}},
        "batch_size": 50,
    }
    norm, tent = benchmark.in_order(benchmark.entries(benchmark.load(described)))
    assert (norm.stream_settings, norm.batch_size, norm.hparams) == ({"samples": 20}, 50, {"alpha": 0.3})
    assert (tent.stream_settings, tent.batch_size, tent.hparams) == ({"samples": 5}, 7, {"lr": 0.1})


def test_a_cell_is_finished_when_its_result_is_whole_and_its_description_the_same(tmp_path):
    cell = Cell(method="tent", stream="digits-c")
    assert cells.read(tmp_path, cell) is None
    cells.write(tmp_path, cell, Failure("no luck", "where"))
    assert cells.read(tmp_path, cell) == Failure("no luck", "where")
    cells.write(tmp_path, cell, result())
    assert cells.read(tmp_path, cell) == result()
    cells.write(tmp_path, cell, result(errors=(0, 0)))
    assert cells.read(tmp_path, cell) == result()  # what is finished stays
    (home,) = tmp_path.iterdir()  # and nothing lies about
    (home / "result.json").write_text((home / "result.json").read_text()[:50])
    assert cells.read(tmp_path, cell) is None  # half-written: to be run again
    cells.write(tmp_path, cell, result())
    described = json.loads((home / "cell.json").read_text())
    (home / "cell.json").write_text(json.dumps({**described, "seed": 5}))
    assert cells.read(tmp_path, cell) is None


def test_what_a_killed_process_left_half_written_goes(tmp_path):
    cell = Cell(method="tent", stream="digits-c")
    left_over = tmp_path / f".{cell.name}.12345"
    left_over.mkdir()
    cells.write(tmp_path, cell, result())
    assert [path.name for path in tmp_path.iterdir()] == [cell.name]


def test_what_a_live_process_is_writing_stays(tmp_path):
    cell = Cell(method="tent", stream="digits-c")
    host = socket.gethostname()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    kept = [f".{cell.name}.{host}.{os.getpid()}.0a1b2c3d", f".{cell.name}.elsewhere.1.0a1b2c3d"]
    gone = [f".{cell.name}.{host}.{ended.pid}.0a1b2c3d", f".{cell.name}.{ended.pid}"]
    for name in kept + gone:
        (tmp_path / name).mkdir()
    cells.write(tmp_path, cell, result())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*kept, cell.name])


WRITING = """
import sys
from pathlib import Path
from tta.benchmark import Cell, Failure, cells
from tta.results import Result, Row
rows = tuple(Row(domain=name, samples=10, errors=n) for name, n in (("fog", 1), ("snow", 2)))
fields = {"config": {}, "manifest": {}, "seconds": 1.0, "stream": "digits-c", "reset": "never"}
result = Result(method="tent", seed=0, rows=rows, **fields)
folder, seeds = Path(sys.argv[1]), range(30)
print("ready", flush=True)
sys.stdin.readline()
for seed in seeds:
    cell = Cell(method="tent", stream="digits-c", seed=seed)
    cells.write(folder, cell, Failure("no luck"))
    cells.write(folder, cell, result)
    assert isinstance(cells.read(folder, cell), Result), seed
"""


def test_two_processes_write_the_same_cells(tmp_path):
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen([sys.executable, "-c", WRITING, str(tmp_path)], **pipes) for _ in range(2)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.communicate()[1] for process in running] == ["", ""]
    assert len(list(tmp_path.iterdir())) == 30  # and nothing lies about


@pytest.mark.slow
def test_two_benches_on_one_folder_share_the_work(tmp_path):
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(json.dumps(TINY))
    command = [sys.executable, "-m", "tta", "bench", str(file), "--out", str(out), "--format", "csv", "--debug"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    running = [subprocess.Popen(command, **pipes) for _ in range(2)]
    printed = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], printed
    assert printed[0][0] == printed[1][0]
    assert "Traceback" not in printed[0][1] + printed[1][1]
    assert len(list(out.glob("cells/*/result.json"))) == 6
    assert [path.name for path in (out / "cells").iterdir() if path.name.startswith(".")] == []


def test_a_cell_runs_in_one_process_and_the_other_waits_for_it(tmp_path, monkeypatch):
    cell, other = (Cell(method="tent", stream="digits-c", seed=seed) for seed in (0, 1))
    holder, said, ran = claims.Claims(tmp_path), [], []
    assert holder.take(cell)

    def say(text):
        said.append(text)
        cells.write(tmp_path, cell, result())
        holder.free(cell)

    def work(mine):
        for one in mine:
            ran.append(one)
            yield one, result(seed=one.seed)

    found = list(claims.shared([cell, other], tmp_path, work, say))
    assert ran == [other]
    assert found == [(other, result(seed=1)), (cell, result())]
    assert said == [f"1 cell is run by process {os.getpid()} on {socket.gethostname()}: waiting for that."]


def test_a_failure_by_another_process_is_taken_and_an_old_one_tried_again(tmp_path):
    old, new = (Cell(method="tent", stream="digits-c", seed=seed) for seed in (0, 1))
    cells.write(tmp_path, old, Failure("old"))

    def work(mine):
        cells.write(tmp_path, new, Failure("new"))  # by another process, after this one began
        for one in mine:
            yield one, result(seed=one.seed)

    found = list(claims.shared([old, new], tmp_path, work, print))
    assert found == [(old, result()), (new, Failure("new"))]


HOLDING = """
import sys, time
from pathlib import Path
from tta.benchmark import Cell
from tta.benchmark.claims import Claims
claims = Claims(Path(sys.argv[1]))
print(claims.take(Cell(method="tent", stream="digits-c")), flush=True)
time.sleep(600)
"""


def test_the_cell_of_a_killed_process_is_taken_over(tmp_path):
    cell = Cell(method="tent", stream="digits-c")
    holding = subprocess.Popen([sys.executable, "-c", HOLDING, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holding.stdout.readline() == "True\n"
    said = []

    def say(text):
        said.append(text)
        holding.kill()
        holding.wait()

    def work(mine):
        return ((one, result()) for one in mine)

    assert list(claims.shared([cell], tmp_path, work, say)) == [(cell, result())]
    assert said == [f"1 cell is run by process {holding.pid} on {socket.gethostname()}: waiting for that."]
    assert [path.name for path in tmp_path.iterdir()] == [cell.name]


def test_workers_take_a_cell_only_when_there_is_room_for_it():
    taken = []

    def tasks():
        for number in range(4):
            taken.append(number)
            yield f"{number} + 0"

    found = workers.in_processes(eval, tasks(), jobs=2)
    next(found)
    assert taken == [0, 1]
    assert len(list(found)) == 3


def test_one_failed_cell_stops_no_other_and_is_tried_again(tmp_path, monkeypatch):
    ran = []

    def run_cell(cell):
        ran.append(cell.name)
        fails = cell.method == "norm" and cell.seed == 1 and len(ran) < 7
        return Failure("no luck") if fails else result(cell.method, cell.seed)

    monkeypatch.setattr(cells, "run_cell", run_cell)
    summary = tta.bench(TINY, out=tmp_path)
    assert len(ran) == 6
    assert summary.problems == ("Failed (no luck): norm on digits-c, continual, seed 1.",)
    assert len(tta.bench(TINY, out=tmp_path).problems) == 0
    assert len(ran) == 7
    assert "norm" in ran[-1]
    assert benchmark.table(tmp_path) == tta.bench(TINY, out=tmp_path)
    assert len(ran) == 7


def test_an_error_inside_a_cell_is_an_outcome():
    found = cells.run_cell(Cell(method="dpcore", stream="digits-c", model="digits-cnn", stream_settings={"samples": 5}))
    assert isinstance(found, Failure)
    assert "VisionTransformer" in found.reason
    assert "Traceback" in found.traceback


@pytest.mark.slow
def test_killed_half_way_a_benchmark_goes_on_where_it_was(tmp_path, capsys):
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(json.dumps(TINY))  # JSON is YAML
    command = [sys.executable, "-m", "tta", "bench", str(file), "--out", str(out)]
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while running.poll() is None and not list(out.glob("cells/[!.]*/result.json")):
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    finished = {path: path.stat().st_mtime_ns for path in out.glob("cells/[!.]*/result.json")}
    assert 1 <= len(finished) < 6

    assert main(["table", str(out)]) == 0
    assert "Not run yet" in capsys.readouterr().out
    assert main(["bench", str(file), "--out", str(out), "--format", "csv"]) == 0
    resumed = capsys.readouterr()
    assert {path: path.stat().st_mtime_ns for path in finished} == finished
    assert resumed.err.count("%") == 6 - len(finished)
    assert main(["bench", str(file), "--out", str(tmp_path / "whole"), "--format", "csv"]) == 0
    assert capsys.readouterr().out == resumed.out


def test_processes_give_every_outcome_though_one_dies():
    tasks = [
        "1 + 1",
        "__import__('os')._exit(3)",
        "2 + 2",
        "(x for x in '')",
        "__import__('os').environ['OMP_NUM_THREADS']",
    ]
    found = dict(workers.in_processes(eval, tasks, jobs=2))
    assert [found[tasks[0]], found[tasks[2]]] == [2, 4]
    assert found[tasks[1]] == Failure(workers.DIED)
    assert "pickle" in found[tasks[3]].reason  # an outcome that cannot be sent
    assert int(found[tasks[4]]) >= 1


def test_processes_end_with_the_one_that_started_them(tmp_path):
    task = (
        f"open({str(tmp_path)!r} + '/' + str(__import__('os').getpid()), 'w').close() or __import__('time').sleep(60)"
    )
    code = f"from tta.benchmark import workers; list(workers.in_processes(eval, [{task!r}] * 2, 2))"
    parent = subprocess.Popen([sys.executable, "-c", code])
    while parent.poll() is None and len(list(tmp_path.iterdir())) < 2:
        time.sleep(0.05)
    parent.kill()
    parent.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    deadline = time.monotonic() + 20
    while any(_is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(pids) == 2
    assert not any(_is_alive(pid) for pid in pids)


def _is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_cells_on_ray_run_where_freed_memory_is_kept(monkeypatch):
    seen = []
    ray = SimpleNamespace(
        init=lambda **_: None,
        nodes=lambda: [{"Alive": True, "Resources": {"CPU": 2}}, {"Alive": False, "Resources": {"CPU": 8}}],
        remote=lambda **_: lambda function: SimpleNamespace(remote=lambda *given: (function, given)),
        wait=lambda tasks, num_returns, timeout: (tasks[:num_returns], tasks[num_returns:]),
        get=lambda task: task[0](*task[1]),
        exceptions=SimpleNamespace(RayError=RuntimeError),
        shutdown=lambda: seen.append("down"),
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setattr(workers, "keep_freed_memory", lambda: seen.append("kept"))
    assert list(workers.over_ray(eval, ["1 + 1", "2 + 2"], "local")) == [("1 + 1", 2), ("2 + 2", 4)]
    assert seen == ["kept", "kept", "down"]


def test_without_ray_the_message_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r"pip install 'tta-toolkit\[ray\]'"):
        list(workers.over_ray(eval, ["1"], "local"))
    with pytest.raises(ConfigError, match="Ray decides"):
        tta.bench(TINY, jobs=2, ray="local")


@pytest.mark.parametrize("amount", ["two", True, -1, 1.5, float("nan"), None])
def test_what_a_run_takes_of_a_machine_is_a_number(amount):
    with pytest.raises(ConfigError, match=r"resources: expected for 'GPU' .* GPU: 0\.5"):
        benchmark.load(TINY, {"resources": {"GPU": amount}})


def test_what_a_run_takes_of_a_machine_changes_no_cell(monkeypatch, tmp_path):
    given = {"resources": {"GPU": 0.5, "a100": 1}}
    assert names(TINY) == names({**TINY, **given})
    seen = []
    monkeypatch.setattr(workers, "over_ray", lambda *arguments: seen.append(arguments) or iter(()))
    tta.bench({**TINY, **given}, out=tmp_path, ray="auto")
    tta.bench({**TINY, "accelerator": "cpu"}, out=tmp_path, ray="auto")
    assert [arguments[3] for arguments in seen] == [given["resources"], {"GPU": 0}]


def test_command_line_lists_refuses_and_shows(tmp_path, capsys):
    assert main(["list", "benchmarks"]) == 0
    assert "ttab-mini" in capsys.readouterr().out
    assert main(["bench", "ttab-mni", "--out", str(tmp_path / "x")]) == 2
    assert "No benchmark 'ttab-mni'. Did you mean 'ttab-mini'" in capsys.readouterr().err
    assert main(["bench", "ttab-mini", "seeds", "--out", str(tmp_path / "x")]) == 2
    assert "expected KEY=VALUE" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
