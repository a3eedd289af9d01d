"""The table of methods, `tta list methods` and docs/methods.md, says what the code, its docstrings and the tests say."""

import importlib.util
import re
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


def references():
    """Title -> (venue as printed, year) of docs/references.bib."""
    found = {}
    for entry in re.split(r"^@", (ROOT / "docs" / "references.bib").read_text(), flags=re.MULTILINE)[1:]:
        fields = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", entry, re.MULTILINE))
        venue = fields.get("booktitle") or fields["journal"]
        found[re.sub(r"[{}]", "", fields["title"]).lower()] = (venue.lower(), fields["year"])
    return found


def test_every_method_is_in_the_table():
    own = [file.stem for file in (ROOT / "methods").glob("[!_]*.py")]
    assert list(FACTS) == sorted(own), AGAIN


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
    assert FACTS[method]["papers"]
    for paper in FACTS[method]["papers"]:
        title, venue, year = re.fullmatch(r"(.+), (\D.*) (\d{4})", paper).groups()
        printed, printed_year = references()[title.lower()]
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
