"""benchmarks/matrix.py tells what ran, was refused, failed and was silent."""

import importlib
import json
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tta
from tta.adapter import OptimizerConfig

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def matrix():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("matrix")


@pytest.fixture
def prepared(matrix):
    return matrix.prepared("own:GroupNorm")


def test_pairs_of_two_architectures_are_written_and_not_run_again(matrix, tmp_path):
    out = tmp_path / "matrix.jsonl"
    for name in ("own:GroupNorm", "own:BatchNorm without statistics"):
        matrix.run(name, ["norm", "source", "tent"], out)
    rows = {(row["model"], row["method"]): row for row in matrix.load(out)}
    assert {pair: row["outcome"] for pair, row in rows.items()} == {
        ("own:GroupNorm", "norm"): "refused",
        ("own:GroupNorm", "source"): "ran",
        ("own:GroupNorm", "tent"): "ran",
        ("own:BatchNorm without statistics", "norm"): "refused",
        ("own:BatchNorm without statistics", "source"): "ran",
        ("own:BatchNorm without statistics", "tent"): "ran",
    }
    assert "kinds looked for: BatchNorm" in rows["own:GroupNorm", "norm"]["reason"]
    tent = rows["own:GroupNorm", "tent"]
    assert (tent["norms"], tent["updates"], tent["changed"]) == ("4 GroupNorm", 2, 8)
    assert matrix.missing("own:GroupNorm", ["norm", "lame", "tent"], out) == ["lame"]


class FromTorch(tta.Adapter):
    def adapt(self, x):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 9x10)")


class OfPython(tta.Adapter):
    """A ValueError, though no sentence of the toolkit's."""

    def adapt(self, x):
        return torch.full((len(x), int("ten")), 0.0)


class Rows(tta.Adapter):
    def adapt(self, x):
        return self.predict(x)[:1]


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (FromTorch, "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        (OfPython, "ValueError: invalid literal for int"),
        (Rows, r"logits of shape \(1, 10\)"),
    ],
)
def test_a_raw_error_is_one(matrix, prepared, method, reason):
    row = matrix.pair(prepared[0], method, prepared[1])
    assert row["outcome"] == "raw"
    assert re.match(reason, row["reason"])


class Idle(tta.Adapter):
    def adapt(self, x):
        return self.predict(x)


class NeverSteps(tta.Adapter):
    config: OptimizerConfig

    def configure_model(self):
        self.model.requires_grad_(True)

    def adapt(self, x):
        return self.predict(x)


class StepsByNothing(NeverSteps):
    def adapt(self, x):
        logits = self.predict(x)
        self.update(0 * logits.sum())
        return logits


class Steps(NeverSteps):
    def adapt(self, x):
        logits = self.predict(x)
        self.update(logits.square().sum())
        return logits


class GoesBack(Steps):
    """As an episodic method: at the end of a batch nothing is left of its step."""

    def adapt(self, x):
        logits = super().adapt(x)
        self.restore(torch.tensor(True))
        return logits


@pytest.mark.parametrize(
    ("method", "outcome"),
    [(Idle, "silent"), (NeverSteps, "silent"), (StepsByNothing, "filtered"), (Steps, "ran"), (GoesBack, "ran")],
)
def test_one_that_never_learns_is_silent(matrix, prepared, method, outcome):
    assert matrix.pair(prepared[0], method, prepared[1])["outcome"] == outcome


def test_a_killed_process_costs_one_pair(matrix, tmp_path, monkeypatch):
    out = tmp_path / "matrix.jsonl"
    codes = iter([-9, 0])

    def child(command, check):
        if (code := next(codes)) == 0:
            method = command[command.index("--methods") + 1]
            matrix.add(out, {"model": "own:GroupNorm", "method": method, "outcome": "ran"})
        return SimpleNamespace(returncode=code)

    monkeypatch.setattr(subprocess, "run", child)
    matrix.supervise("own:GroupNorm", ["tent", "norm"], out)
    rows = [(row["method"], row["outcome"], row.get("reason")) for row in map(json.loads, out.open())]
    assert rows == [("tent", "raw", "the process ended with code -9"), ("norm", "ran", None)]


def test_the_table_is_written_between_its_markers(matrix, tmp_path):
    page = tmp_path / "models.md"
    page.write_text("\n".join(["before", *matrix.MARKERS, "after\n"]))
    row = {"model": "own:GroupNorm", "size": 32, "norms": "4 GroupNorm"}
    rows = [
        {**row, "method": "tent", "outcome": "ran", "reason": ""},
        {**row, "method": "norm", "outcome": "refused", "reason": "Plain has no layer of 3 kinds. Use another."},
        {**row, "method": "note", "outcome": "refused", "reason": "Other has no layer of 4 kinds. Use another."},
    ]
    for _ in range(2):
        matrix.write_table(rows, page)
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert lines.count("| own:GroupNorm | 32 | 4 GroupNorm | 1 | 0 | 2 | 0 | 0 |") == 1
    assert [line for line in lines if line.startswith("- 2 pairs (`norm`, `note`): Plain has no layer of 3 kinds.")]
