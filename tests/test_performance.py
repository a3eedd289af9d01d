"""benchmarks/performance.py writes its tables between the markers of its page, and nothing else of the page."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def performance():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("performance")


def test_only_what_stands_between_the_markers_is_written(performance):
    page = performance.PAGE.read_text(encoding="utf-8")
    for name in ("steps", "growth"):
        first, last = f"<!-- {name} -->", f"<!-- end of {name} -->"
        found = performance.written(page, name, "NEW")
        assert found == f"{page.split(first)[0]}{first}\n\nNEW\n\n{last}{page.split(last)[1]}"


def test_a_page_without_markers_is_refused(performance):
    with pytest.raises(ValueError, match="<!-- steps --> and <!-- end of steps -->"):
        performance.written("<!-- end of steps --> <!-- steps -->", "steps", "NEW")


def test_a_row_is_in_frozen_forwards(performance):
    seconds = {"frozen": 2.0, "last": 1.0, "eager": 5.0, "compiled": 3.0, "beside": 10.0}
    *_, row = performance.table({"tent": (seconds, 7_000_000)}).splitlines()
    assert row == "| `tent` | 2.50 | 1.50 | 5.00 | 0.50 | 0.30 | 1.00 | 2.50 | 7 |"


def test_the_exponent_is_that_of_a_power(performance):
    assert performance.exponent([1, 2, 4], [3.0, 12.0, 48.0]) == pytest.approx(2.0)
