"""The command line, as a user types it."""

import json
import os
import re
import signal
import subprocess
import sys

import pytest
from PIL import Image
from safetensors.torch import save_file

import tta
from tta.benchmark import cells, runs
from tta.benchmark.cells import Cell, run_cell
from tta.cli import main
from tta.cli.arguments import DEMO, parse_request
from tta.datasets import write
from tta.results import Result

QUICK = ["samples=20", "batch_size=10", "corruptions=[fog,contrast]"]


def run(*words):
    return main(["run", *QUICK, *words])


def test_run_prints_the_table_and_writes_the_results(tmp_path, capsys):
    assert run("digits-c", "source", "tent", "tent.lr=0.01", "seed=3", "--out", str(tmp_path)) == 0
    out = capsys.readouterr().out
    assert "contrast" in out
    assert "vs source" in out
    (file,) = tmp_path.rglob("tent/result.json")
    found = json.loads(file.read_text())
    assert found["config"]["lr"] == 0.01
    assert found["seed"] == 3
    assert found["stream"] == "digits-c"
    assert found["samples"] == 40
    assert list(found["errors"]) == ["fog", "contrast"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
@pytest.mark.parametrize("batch", [1, 4], ids=["first-batch", "last-batch"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_fails_and_keeps_what_had_finished(tmp_path, capsys, monkeypatch, number, batch):
    before, norm, seen = signal.getsignal(number), tta.methods.find("norm"), []
    adapt = norm.adapt

    def interrupted(self, x):
        seen.append(len(x))
        if len(seen) == batch:
            os.kill(os.getpid(), number)
        return adapt(self, x)

    monkeypatch.setattr(norm, "adapt", interrupted)
    try:
        assert run("source", "norm", "tent", "--out", str(tmp_path)) == 1
    finally:
        signal.signal(number, before)  # the Trainer leaves Ctrl+C ignored
    assert "stopped before the end" in capsys.readouterr().err
    assert [file.parent.name for file in tmp_path.rglob("result.json")] == ["source"]


def test_a_second_run_overwrites_nothing(tmp_path):
    assert run("source", "--out", str(tmp_path)) == 0
    assert run("source", "--out", str(tmp_path)) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 2


@pytest.mark.slow
def test_runs_at_once_overwrite_nothing(tmp_path):
    command = [sys.executable, "-m", "tta", "run", "digits-c", "norm", *QUICK, "--out", str(tmp_path / "out")]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(3)]
    printed = [process.communicate()[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], printed
    found = sorted(file.parent.name for file in tmp_path.rglob("result.json"))
    assert found == ["norm", "norm-2", "norm-3"]


def test_two_runs_that_overlap_have_folders_of_their_own(tmp_path, monkeypatch):
    save, begun = Result.save, []

    def overlapping(result, folder):
        begun.append(folder)
        if len(begun) == 1:  # another process runs from beginning to end before this one writes
            assert run("norm", "--out", str(tmp_path)) == 0
        return save(result, folder)

    monkeypatch.setattr(Result, "save", overlapping)
    assert run("norm", "--out", str(tmp_path)) == 0
    assert sorted(file.parent.name for file in tmp_path.rglob("result.json")) == ["norm", "norm-2"]


@pytest.mark.parametrize(
    "words",
    [
        ["run", *QUICK, "source", "--out"],
        ["bench", "ttab-mini", "--out"],
        ["tune", "digits-c", "source", "--out"],
        ["source", "digits-cnn", "digits-c", "eata", "-o"],
        ["plot", "schedule", "digits-c", "-o"],
        ["corrupt", "PICTURES"],
    ],
    ids=lambda words: words[0],
)
def test_a_place_that_cannot_be_written_to_is_said_before_the_first_image(words, tmp_path, capsys, monkeypatch):
    def too_late(*_, **__):
        pytest.fail("an image was read")

    for home, name in [(runs, "make_stream"), (runs, "record"), (cells, "run_cell"), (write, "write_corrupted")]:
        monkeypatch.setattr(home, name, too_late)
    (tmp_path / "file").write_text("")
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    words = [str(pictures) if word == "PICTURES" else word for word in words]
    assert main([*words, str(tmp_path / "file" / "x.png")]) == 1
    printed = capsys.readouterr()
    assert f"Nothing can be written to '{tmp_path / 'file' / 'x.png'}': '{tmp_path / 'file'}' is a file" in printed.err
    assert printed.out == ""


def test_names_are_printed_as_they_are(tmp_path, capsys):
    out = tmp_path / "[/] :smile: \x1b[2J"
    assert run("source", "--out", str(out)) == 0
    printed = capsys.readouterr()
    assert "[/] :smile: \\x1b[2J\n" in printed.err  # in one line, though it is long
    assert main(["table", str(tmp_path / "\x1b[2J")]) == 2
    assert main(["diff", *map(str, [*out.rglob("result.json")] * 2)]) == 0
    assert main(["plot", "heatmap", str(out), "-o", str(out / "h.svg")]) == 0
    printed_later = capsys.readouterr()
    assert "\x1b" not in printed.err + printed.out + printed_later.err + printed_later.out


def test_table_reads_what_run_wrote(tmp_path, capsys):
    run("source", "norm", "--out", str(tmp_path))
    capsys.readouterr()
    for name, sign in {"terminal": "─", "markdown": "| method |", "csv": "method,", "html": "<table"}.items():
        assert main(["table", str(tmp_path), "--format", name]) == 0
        assert sign in capsys.readouterr().out


def test_leftovers_join_unless_they_are_to_be_kept(tmp_path):
    assert parse_request(["norm", "leftover=keep"]).run.leftover == "keep"
    assert parse_request(["norm"]).run.leftover == "join"
    assert run("norm", "leftover=drop", "--out", str(tmp_path)) == 2


def test_a_stream_has_a_protocol_of_its_own():
    assert parse_request(["shift", "norm"]).run.protocol == "per-domain"
    assert parse_request(["acdc", "norm", "rounds=3"]).stream_settings == {"rounds": 3}
    assert parse_request(["shift", "norm", "protocol=mixed"]).run.protocol == "mixed"
    assert parse_request(["camvid", "norm"]).run.protocol == "continual"


def test_table_shows_the_rest_and_names_a_broken_result(tmp_path, capsys):
    assert run("source", "norm", "--out", str(tmp_path)) == 0
    (broken,) = tmp_path.rglob("norm/result.json")
    broken.write_text(broken.read_text()[:100])
    capsys.readouterr()
    assert main(["table", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "source" in printed.out
    assert printed.err.startswith(f"tta: Left out: {broken}: Not a result: invalid JSON")
    assert main(["table", str(broken.parent)]) == 2  # nothing to show
    assert str(broken) in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a: [", "\xff", "- a", "methods: 5", "methods: {tent: 3}", "1: 2"])
def test_a_broken_benchmark_is_a_sentence_with_its_name(text, tmp_path, capsys):
    (tmp_path / "benchmark.yaml").write_bytes(text.encode("latin1"))
    assert main(["table", str(tmp_path)]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert str(tmp_path / "benchmark.yaml") in printed


def test_clean_images_and_metrics(tmp_path, capsys):
    assert run("source", "norm", "clean=true", "--out", str(tmp_path)) == 0
    (file,) = tmp_path.rglob("norm/result.json")
    found = json.loads(file.read_text())["metrics"]
    assert 0 <= found["source_error_before"] == found["source_error_after"] < 50
    assert file.with_name("curves.parquet").is_file()
    capsys.readouterr()
    assert main(["table", str(tmp_path), "--metrics", "ece,forwards_per_image"]) == 0
    assert re.search(r"forwards_per_image +1\.000 +1\.000", capsys.readouterr().out)
    assert main(["table", str(tmp_path), "--metrics", "ecee"]) == 2
    assert "No result has a metric 'ecee'" in capsys.readouterr().err


def test_diff_names_what_differs(tmp_path, capsys):
    run("tent", "--out", str(tmp_path / "a"))
    run("tent", "lr=0.5", "--out", str(tmp_path / "b"))
    first, second = (next((tmp_path / name).rglob("tent")) for name in "ab")
    capsys.readouterr()
    assert main(["diff", str(first), str(second)]) == 0
    out = capsys.readouterr().out
    assert "config.lr" in out
    assert "manifest" not in out
    assert main(["diff", str(first), str(first)]) == 0
    assert "agree in every field" in capsys.readouterr().out
    assert main(["diff", str(first), str(tmp_path / "c")]) == 2
    assert "No result at" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["methods", "streams", "models", "corruptions", "protocols"])
def test_list_has_a_line_for_each(what, capsys):
    assert main(["list", what]) == 0
    expected = {
        "methods": "tent",
        "streams": "digits-c",
        "models": "torchvision:NAME[/WEIGHTS]",
        "corruptions": "fog",
        "protocols": "continual",
    }
    assert expected[what] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tnet"], "'tnet' is neither a stream nor a method. Did you mean 'tent'"),
        (["digits"], "Did you mean 'digits-c'"),
        (["tent", "tent"], "Method named twice: tent"),
        (["digits-c", "digits-c"], "One run is on one stream"),
        (["tent", "lrr=1"], "has a key 'lrr'.*Did you mean 'lr'"),
        (["source", "lr=1"], "No method of this run .source. has a key 'lr'"),
        (["tent", "tent.lrr=1"], "Key 'lrr' not in 'TentConfig'. Did you mean 'lr'"),
        (["tent", "norm.alpha=1"], "'norm' is not in this run"),
        (["tent", "lr=fast"], "'fast' of type 'str' could not be converted to Float"),
        (["tent", "lr=-1"], "lr=-1.0; expected a learning rate above 0"),
        (["severity=9"], r"severity is 0 \(none\) to 5, in steps of 0.25; got 9"),
        (["stream.sevrity=3"], "Did you mean 'severity'"),
        (["reset=sometimes"], "reset is 'never', 'domain', 'batch'"),
        (["protocol=often"], "No protocol 'often'"),
        (["model=digits-cnm"], "No model 'digits-cnm'. Did you mean 'digits-cnn'"),
        (["model=digits-cnn", "checkpoint=/no/such/file"], "No checkpoint at '/no/such/file'"),
        (
            ["checkpoint=x"],
            "checkpoint= is for one model, .* has digits-cnn, digits-vit, digits-gn, digits-clip: say which, model=digits-cnn",
        ),
        (["model=digits-cnn", "num_classes=7"], "It is for 10 classes, the network is for 7"),
        (["model=digits-cnn", "mean=[0.5,0.5]"], "mean and std are three numbers each"),
        (["preset=cifar", "tent"], "no preset 'cifar'"),
        (["seed=x"], "seed"),
        (["batch_size=0"], "batch_size is 1 or more; got 0"),
        (["leftover=drop"], "leftover is one of 'join', 'keep'; got 'drop'"),
        (["precision=16-mixed"], "precision is one of 32-true, bf16-mixed; got '16-mixed'"),
        (["accelerator=abacus"], "accelerator is one of auto, gpu, .*cpu.*; got 'abacus'"),
        (["num_workers=-1"], "num_workers is 0 .* or more; got -1"),
        (["seed=-1"], "Got seed=-1; expected a number from 0 to 4294967295"),
    ],
)
def test_a_users_mistake_is_a_sentence_and_exit_code_2(words, message, tmp_path, capsys):
    assert main(["run", *words, "--out", str(tmp_path)]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert "Traceback" not in found.err
    assert list(tmp_path.iterdir()) == []
    assert re.search(message, found.err)


def test_words_may_stand_behind_an_option(tmp_path, capsys):
    quick = ["corruptions=[fog]", "samples=20"]
    assert main(["run", "--out", str(tmp_path), "digits-c", "source", *quick]) == 0
    assert main(["run", "digits-c", "--out", str(tmp_path), "norm", *quick]) == 0
    assert len(list(tmp_path.rglob("result.json"))) == 2
    for words in (["run", "--uot", "x"], ["list", "methods", "streams"]):
        assert main(words) == 2
        assert "unrecognized arguments" in capsys.readouterr().err


def pictures(folder):
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True)
        for number in range(6):
            Image.new("RGB", (32, 32), (20 * number, 0, 0)).save(folder / name / f"{number}.png")
    (folder / "dog" / "4.png").write_text("<html>404</html>")
    return [f"root={folder}", "resize=null", "crop=null", "class_map=null", "batch_size=4"]


def test_a_broken_picture_is_a_sentence_in_worker_processes_and_benchmarks_too(tmp_path, capsys):
    save_file(
        tta.load_model("digits-cnn", num_classes=2, pretrained=False).model.state_dict(), tmp_path / "two.safetensors"
    )
    model = ["model=digits-cnn", f"checkpoint={tmp_path / 'two.safetensors'}", "num_classes=2"]
    words = ["imagefolder", "source", *pictures(tmp_path / "pets"), *model]
    sentence = (
        f"'{tmp_path / 'pets' / 'dog' / '4.png'}' cannot be used as an image: cannot identify image file. It has 16"
    )
    for workers in ("num_workers=0", "num_workers=1"):
        assert main(["run", *words, workers, "--out", str(tmp_path / "out")]) == 1
        printed = capsys.readouterr().err
        assert f"tta: {sentence}" in printed
        assert "Caught" not in printed
    assert main(["run", *words, "on_error=skip", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err.startswith("tta: 1 of 12 files in ")
    cell = Cell(
        method="source",
        stream="imagefolder",
        stream_settings={"root": str(tmp_path / "pets"), "resize": None, "crop": None},
        model="digits-cnn",
        checkpoint=str(tmp_path / "two.safetensors"),
        num_classes=2,
        num_workers=1,
    )
    assert run_cell(cell).reason.startswith(sentence)


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(ValueError, match="severity is 0"):
        run("severity=9", "--debug", "--out", str(tmp_path))


def test_a_failed_run_exits_with_1(tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert run("source", "--out", str(blocked)) == 1
    assert "--debug shows where" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["frobnicate"], ["list", "nothing"], ["table"]])
def test_a_wrong_command_exits_with_2(words, capsys):
    assert main(words) == 2
    assert "usage" in "".join(capsys.readouterr())


def test_bare_keys_reach_every_method_that_has_them():
    request = parse_request(["source", "tent", "norm", "lr=0.5", "norm.alpha=0.1", "severity=2"])
    assert request.hparams == {"source": {}, "tent": {"lr": 0.5}, "norm": {"alpha": 0.1}}
    assert request.stream_settings == {"severity": 2}


def test_run_alone_is_the_demo_with_the_default_method_in_it():
    request = parse_request(DEMO)
    assert request.stream == "digits-c"
    assert request.methods == ["source", "norm", "tent", "eata", "rotta", "actmad", "dpcore", "auto"]
    assert not request.run.guard


@pytest.mark.parametrize(
    ("words", "methods", "guard"),
    [
        (["digits-c"], ["source", "auto"], True),
        (["digits-c", "guard=false"], ["source", "auto"], False),
        (["digits-c", "auto"], ["auto"], False),
        (["digits-c", "tent", "guard=true"], ["tent"], True),
    ],
)
def test_without_a_method_the_default_one_runs_guarded(words, methods, guard):
    request = parse_request(words)
    assert request.methods == methods
    assert request.run.guard is guard


def test_guard_is_around_every_method_but_the_source_model(tmp_path, capsys):
    assert run("source", "norm", "guard=true", "--out", str(tmp_path)) == 0
    found = {
        json.loads(file.read_text())["method"]: json.loads(file.read_text()) for file in tmp_path.rglob("result.json")
    }
    assert "guard" in found["norm"]["manifest"]
    assert found["norm"]["metrics"]["guard"]["batches_learned"] > 0
    assert "guard" not in found["source"]["manifest"]
    assert "guarded" in capsys.readouterr().out


def test_each_method_runs_on_the_first_model_it_supports_and_source_on_each_in_use(tmp_path):
    assert run("source", "norm", "dpcore", "steps_new=1", "--out", str(tmp_path)) == 0
    found = [json.loads(file.read_text()) for file in sorted(tmp_path.rglob("result.json"))]
    models = sorted((result["method"], result["manifest"]["model"]["spec"]) for result in found)
    assert models == [
        ("dpcore", "digits-vit"),
        ("norm", "digits-cnn"),
        ("source", "digits-cnn"),
        ("source", "digits-vit"),
    ]
    assert run("norm", "model=digits-vit", "--out", str(tmp_path)) == 2


def test_help_and_usage_errors_do_not_load_torch():
    code = "import sys, tta.cli; tta.cli.main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], stdout=subprocess.DEVNULL, check=False).returncode == 0


def test_package_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "tta", "list", "methods"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
    assert "tent" in done.stdout
