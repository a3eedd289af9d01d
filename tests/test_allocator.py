"""Freed memory is used again, and the collector rests, where the process asked for it."""

import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from tta import cli
from tta.allocator import uncollected
from tta.benchmark import workers

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")

FAULTS = """
import resource, torch
def use_and_free():
    for _ in range(20):
        torch.ones(10_000_000)  # 40 MB, above any size that glibc would keep by itself
use_and_free()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use_and_free()
faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
"""
SCRIPT = f"""
from tta.allocator import keep_freed_memory
kept = keep_freed_memory()
{FAULTS}
print(kept, faults)
"""


def kept_and_faults(**settings: str) -> tuple[str, int]:
    others = ("MALLOC_", "GLIBC_", "LD_PRELOAD")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)} | settings
    command = [sys.executable, "-c", SCRIPT]
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    kept, faults = output.stdout.split()
    return kept, int(faults)


def test_freed_memory_is_mapped_once() -> None:
    kept, faults = kept_and_faults()
    assert kept == "True"
    assert faults < 20  # 0 seen; one 40 MB tensor mapped anew is up to 9 766 pages


def test_a_setting_of_the_users_stays() -> None:
    kept, faults = kept_and_faults(MALLOC_MMAP_THRESHOLD_="1000000")
    assert kept == "False"
    assert faults >= 20  # each of the 20 tensors is mapped anew: by 9 766 small pages or 20 huge ones


def test_workers_keep_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_", "LD_PRELOAD"))]:
        monkeypatch.delenv(name)
    task = f"(found := {{}}, exec({FAULTS!r}, found))[0]['faults']"
    ((_, faults),) = workers.in_processes(eval, [task], jobs=1)  # type: ignore[arg-type]
    assert isinstance(faults, int)
    assert faults < 20


def test_only_the_command_line_keeps_it(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[bool] = []
    monkeypatch.setattr("tta.cli.commands.keep_freed_memory", lambda: kept.append(True))
    assert cli.main(["list", "methods"]) == 0  # from a program
    assert not kept
    monkeypatch.setattr(sys, "argv", ["tta", "list", "methods"])
    assert cli.main() == 0
    assert kept


def test_the_collector_is_off_within_the_context_and_as_it_was_after_it() -> None:
    with uncollected():
        assert not gc.isenabled()
        with uncollected():
            assert not gc.isenabled()
        assert not gc.isenabled()
    assert gc.isenabled()


def test_only_the_command_line_freezes_objects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    frozen: list[bool] = []
    monkeypatch.setattr("tta.cli.commands.gc.freeze", lambda: frozen.append(True))
    words = ["run", "digits-c", "source", "samples=4", "corruptions=[fog]", "--out"]
    assert cli.main([*words, str(tmp_path / "of_a_program")]) == 0
    assert not frozen
    monkeypatch.setattr(sys, "argv", ["tta", *words, str(tmp_path / "of_the_command")])
    monkeypatch.setattr("tta.cli.commands.keep_freed_memory", lambda: None)
    assert cli.main() == 0
    assert frozen
