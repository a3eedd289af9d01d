"""The table of methods, `tta list methods` and docs/methods.md, says what the code, its docstrings and the tests say."""

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest

import tta
from tta import config
from tta.adapter import config_class
from tta.cli import main
from tta.methods import find

ROOT = Path(__file__).parent.parent
SPEC = importlib.util.spec_from_file_location("methods_table", ROOT / "benchmarks" / "methods_table.py")
table = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(table)
FACTS = table.load()
AGAIN = "run python benchmarks/methods_table.py"


def test_every_method_is_in_the_table():
    own = [file.stem for file in (ROOT / "methods").glob("[!_]*.py")]
    assert list(FACTS) == sorted(own), AGAIN


@pytest.mark.parametrize("method", [name for name in FACTS if name != "source"])
def test_a_method_is_finished(method):
    assert table.missing(method) == []


def test_an_unfinished_method_is_told_in_a_sentence_and_nothing_is_written(tmp_path):
    """A method as CONTRIBUTING has it after its first step: a file, and nothing else."""
    for folder in ("tta", "methods", "datasets", "configs", "benchmarks", "docs", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    text = (ROOT / "methods" / "tent.py").read_text().replace("Tent", "Newcomer")
    (tmp_path / "methods" / "newcomer.py").write_text(text.replace("Fully Test-Time Adaptation", "Unheard of"))
    code = (
        "import sys; from importlib.util import module_from_spec, spec_from_file_location as at\n"
        "for name, folder in {'tta': 'tta', 'tta.methods': 'methods', 'tta.datasets': 'datasets', 'tta.configs': 'configs'}.items():\n"
        "    spec = at(name, f'{folder}/__init__.py', submodule_search_locations=[folder])\n"
        "    sys.modules[name] = module_from_spec(spec)\n"
        "    spec.loader.exec_module(sys.modules[name])\n"
        "sys.argv = ['methods_table.py', 'newcomer']\n"
        "import runpy; runpy.run_path('benchmarks/methods_table.py', run_name='__main__')\n"
    )
    before = (tmp_path / "configs" / "methods.yaml").read_text()
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "newcomer is not finished, nothing was written. Missing: an entry '" in done.stderr
    assert "tests/test_newcomer.py, which recomputes one update" in done.stderr
    assert (tmp_path / "configs" / "methods.yaml").read_text() == before


def test_readme_counts_the_methods_that_its_table_leaves_out():
    assert table.MORE.findall(table.README.read_text()) == [str(table.more_in_readme())], AGAIN


def test_the_page_is_made_of_the_table():
    assert table.PAGE.read_text() == table.page(FACTS), AGAIN


@pytest.mark.parametrize("method", FACTS)
def test_what_the_code_declares(method):
    for key, value in table.declared(method).items():
        assert FACTS[method][key] == value, AGAIN


@pytest.mark.slow
@pytest.mark.parametrize("method", FACTS)
def test_what_is_measured(method):
    measured = table.measured(method, FACTS[method]["models"])
    assert FACTS[method]["batch"] == measured["batch"], AGAIN
    for key in ("forwards", "backwards"):  # another processor may let a sample more or less through a filter
        assert FACTS[method][key] == pytest.approx(measured[key], abs=0.11), AGAIN


@pytest.mark.parametrize("method", [name for name in FACTS if name != "source"])
def test_papers_are_those_of_the_references(method):
    for paper in FACTS[method]["papers"]:
        title, venue, year = re.fullmatch(r"(.+), (\D.*) (\d{4})", paper).groups()
        printed, printed_year = table.references()[title.lower()]
        assert year == printed_year
        assert all(word in printed for word in venue.lower().split())


@pytest.mark.parametrize("method", FACTS)
def test_options_of_the_released_code_are_valid_and_not_the_defaults(method):
    kind = config_class(find(method))
    given = {name: value for name, value in table.released(kind).items() if value is not None}
    default, changed = kind(), config.build(kind, given)
    assert all(getattr(changed, name) != getattr(default, name) for name in given)


def test_an_option_of_the_released_code_is_read_from_its_documentation():
    @dataclass
    class Example(tta.Config):
        """An example.

        Attributes:
            plain: says nothing.
            switch: an average is kept, as in the released code.
            same: ``"a"``, as the released code does, or ``"b"``.
            mode: ``"exact"``, or as the ``"released"`` code has it.
            margin: None for none,
                ``2.5`` in the released program, which is ``7`` elsewhere.
            size: of a batch. The released code takes the stream's.
        """

        plain: int = 1
        switch: bool = False
        same: str = "a"
        mode: str = "exact"
        margin: float | None = None
        size: int = 3

    assert table.released(Example) == {"switch": True, "mode": "released", "margin": 2.5, "size": None}
    assert table.attributes(Example)["plain"] == "says nothing."


def test_parity_needs_a_comparison_that_runs():
    keys = [
        pytest.param("tent", marks=pytest.mark.xfail(reason="not yet")),
        pytest.param("sar", marks=pytest.mark.slow),
    ]

    @pytest.mark.parametrize("key", ["norm", *keys])
    def compare(key): ...

    assert list(table._compared(SimpleNamespace(test_logits_equal_the_released_code=compare))) == ["norm", "sar"]
    assert list(table._compared(SimpleNamespace(test_another=compare))) == []


def test_list_methods_shows_the_table(capsys):
    assert main(["list", "methods"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for fact in ("ICLR 2021", "recovery=weights", "golden parity", "fisher", "1 forward, 1 backward", "ViT"):
        assert fact in shown
