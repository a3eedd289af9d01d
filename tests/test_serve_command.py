"""The command tta serve: its words, its process, and the documented client."""

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest

from served import IMAGES, LABELS, ROOT, file_of
from tta.cli import main, serving
from tta.cli.arguments import UsageError


def test_words_are_sorted_by_owner(monkeypatch):
    monkeypatch.setenv("TTA_SERVE_TOKEN", "4711")
    found = serving.parse(
        ["tent", "lr=1e-2", "port=9000", "checkpoint=a.pt", "guard=true", "device=cpu", "tent.steps=2"]
    )
    assert found.method == "tent"
    assert found.server == {"port": 9000, "token": "4711"}
    assert found.adapter == {"lr": 0.01, "guard": True, "steps": 2}
    assert (found.model, found.command) == ({"checkpoint": "a.pt"}, {"device": "cpu"})


@pytest.mark.parametrize(
    ("words", "message"),
    [(["tent", "norm"], "one method"), (["prot=1"], "'prot'. Did you mean 'port'"), (["cotta.lr=1"], "key 'cotta.lr'")],
)
def test_wrong_words_are_named(words, message):
    with pytest.raises(UsageError, match=message):
        serving.parse(words)


@pytest.mark.parametrize("words", [["batch_size=0"], ["port=x"], ["tnet"], ["timeout=0"], ["guard={sped: 1}"]])
def test_wrong_settings_are_usage_errors(words, capsys):
    assert main(["serve", "digits-cnn", *words]) == 2
    assert "tta: " in capsys.readouterr().err


def test_without_the_extra_the_command_is_named(monkeypatch, capsys):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    assert main(["serve", "digits-cnn"]) == 2
    assert "pip install 'tta-toolkit[serve]'" in capsys.readouterr().err


@contextmanager
def process(tmp_path, *words, **environment):
    """A server as a process of its own; gives the process and its address."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "tta", "serve", "digits-cnn", "port=0", f"state={tmp_path}", *words]
    started = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        lines = []
        for line in started.stderr:
            lines.append(line)
            if '"listening"' in line:
                port = json.loads(line)["port"]
            if "startup complete" in line:
                break
        else:
            raise AssertionError("".join(lines))
        yield started, f"http://127.0.0.1:{port}"
    finally:
        started.kill()
        started.wait()
        started.stderr.close()


@pytest.mark.slow
def test_sigterm_saves_and_ends_well_and_the_documented_client_works(digits_cnn, tmp_path):
    import httpx

    text = (ROOT / "docs/serving.md").read_text()
    client = re.search(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)[1]
    assert len(client.splitlines()) <= 25
    pictures = [tmp_path / f"{n}.png" for n in range(3)]
    for picture, image in zip(pictures, IMAGES, strict=False):
        picture.write_bytes(file_of(image))
    state = tmp_path / "state"
    with process(state, "tent") as (server, address):
        program = tmp_path / "client.py"
        program.write_text(client.replace("http://localhost:8000", address))
        done = subprocess.run([sys.executable, program, *pictures], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert [line.split()[1] for line in done.stdout.splitlines()] == [str(int(label)) for label in LABELS[:3]]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    assert len(list(state.glob("autosave-*"))) == 1
    with process(state, "tent") as (_, address):
        assert httpx.get(f"{address}/state").json()["method"] == "tent"
