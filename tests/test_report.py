"""Comparison tables: what stands in them, in every format."""

import csv
import io
import re

import numpy as np
import pytest
from rich.console import Console

import tta
from tta.report.tables import FORMATS, csv_cell, html, markdown, terminal
from tta.results import Predictions, Result, Row


def make(method, wrong, *, seed=0, **changes):
    wrong = np.asarray(wrong)
    domain, index = np.indices(wrong.shape)
    found = Predictions(
        domain=domain.ravel(), index=index.ravel(), label=np.zeros(wrong.size, int), prediction=wrong.ravel()
    )
    names = ("gaussian_noise", "fog")
    rows = (Row(domain=n, samples=len(w), errors=int(w.sum())) for n, w in zip(names, wrong, strict=True))
    fields = {
        "method": method,
        "stream": "toy-c",
        "seed": seed,
        "reset": "never",
        "rows": tuple(rows),
        "config": {},
        "manifest": {"model": {"spec": "toy", "weights": "0123456789abcdef"}, "data": {"batch_size": 4}},
        "seconds": 2.0,
        "predictions": found,
    }
    return Result(**{**fields, **changes})


SOURCE = make("source", [[1, 1, 1, 0], [1, 0, 0, 0]])
BETTER = make("tent", [[1, 0, 0, 0], [1, 0, 0, 0]], config={"lr": 0.1})


def test_terminal_table_shows_errors_mean_and_difference():
    text = tta.compare([BETTER, SOURCE]).to_text(width=100)
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}
    assert lines["domain"] == ["domain", "source", "tent"]  # the baseline comes first
    assert lines["gaussian_noise"][1:] == ["75.0", "25.0"]
    assert lines["mean"][1:] == ["50.0", "25.0"]
    assert "-25.0 [" in text
    assert "toy-c · seed 0 · reset never" in text
    assert "weights 01234567" in text


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_terminal_table_fits_its_width(width):
    results = [SOURCE, *(make(f"method{n}", [[0, 0, 0, 1], [0, 0, 0, 0]]) for n in range(9))]
    console = Console(file=io.StringIO(), width=width)
    console.print(tta.compare(results))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(f"method{n}" in line for line in lines) for n in range(9))


def test_csv_is_unrounded_and_reads_back():
    rows = list(csv.DictReader(io.StringIO(tta.compare([SOURCE, BETTER]).to_csv())))
    assert [row["method"] for row in rows] == ["source", "tent"]
    assert float(rows[1]["mean"]) == 25.0
    assert float(rows[1]["difference"]) == -25.0
    assert rows[0]["difference"] == ""


def test_markdown_marks_the_lowest_error_of_a_column():
    lines = tta.compare([SOURCE, BETTER]).to_markdown().splitlines()
    assert lines[0] == "| method | gauss | fog | mean | vs source |"
    assert lines[2].startswith("| source | 75.0 | **25.0** | 50.0 | - |")
    assert lines[3].startswith("| tent | **25.0** | **25.0** | **25.0** | -25.0 [")


def test_latex_escapes_what_latex_reads():
    text = tta.compare([SOURCE, make("my_method", [[0, 0, 0, 0], [0, 0, 0, 0]])]).to_latex()
    assert "my\\_method & \\textbf{0.0} & \\textbf{0.0}" in text
    assert text.count("\\\\") == 3


def test_html_escapes_names_and_keeps_bold():
    text = tta.compare([SOURCE, make("<i>", [[0, 0, 0, 0], [0, 0, 0, 0]])]).to_html()
    assert "<td>&lt;i&gt;</td>" in text
    assert "<td><b>0.0</b></td>" in text
    assert "<i>" not in text


def test_html_has_no_columns_of_settings_but_a_row_above_each_group_and_a_line_below_the_method():
    runs = [
        SOURCE,
        BETTER,
        make("tent", [[0] * 4] * 2, config={"lr": 0.2}, reset="batch"),
        make("norm", [[0]] * 2, seed=1),
    ]
    text = tta.compare(runs).to_html()
    assert re.findall("<th>(.*?)</th>", text) == ["method", "gauss", "fog", "mean", "vs source"]
    assert re.findall('<th colspan="5">(.*?)</th>', text) == ["seed 0", "seed 1 · reset never"]
    assert re.findall("<small>(.*?)</small>", text) == ["reset=never", "lr=0.1 reset=never", "lr=0.2 reset=batch"]
    assert re.search(r"<td>-25\.0 \[-\d+\.\d,&nbsp;[+-]?\d+\.\d\]</td>", text)  # wraps before the interval
    assert "colspan" not in tta.compare([SOURCE, BETTER]).to_html()


def test_runs_that_may_not_be_compared_are_kept_apart():
    comparison = tta.compare([SOURCE, BETTER, make("source", [[1, 1, 1, 1], [1, 1, 1, 1]], seed=1)])
    assert [len(group.runs) for group in comparison.groups] == [2, 1]
    assert comparison.varying == ("seed",)
    assert "No number is an average over runs" in comparison.to_text()


def test_labels_tell_runs_of_one_method_apart():
    other = make("tent", [[0, 0, 0, 0], [0, 0, 0, 0]], config={"lr": 0.2})
    labels = [run.label for run in tta.compare([SOURCE, BETTER, other, BETTER]).runs]
    assert labels == ["source", "tent lr=0.1", "tent lr=0.2", "tent lr=0.1 (2)"]


def test_another_baseline_can_be_named():
    comparison = tta.compare([SOURCE, BETTER], baseline="tent")
    assert [(run.label, run.difference) for run in comparison.runs] == [("tent", None), ("source", 25.0)]
    with pytest.raises(ValueError, match=r"No result of the baseline 'norm'. There are: source, tent"):
        tta.compare([SOURCE, BETTER], baseline="norm")


def test_without_predictions_there_is_a_difference_and_no_interval():
    bare = make("tent", [[1, 0, 0, 0], [1, 0, 0, 0]], predictions=None)
    text = tta.compare([SOURCE, bare]).to_text()
    assert re.search(r"vs source +- +-25\.0\n", text)
    assert "No interval where predictions are not at hand." in text


def test_skipped_updates_are_said():
    assert "tent: 3 updates skipped" in tta.compare([make("tent", [[0], [0]], skipped_updates=3)]).to_text()


def test_nothing_to_compare_and_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="got no results"):
        tta.compare([])
    with pytest.raises(ValueError, match=r"No table format 'pdf'. There are: terminal, markdown, latex, csv, html"):
        tta.compare([SOURCE]).format("pdf")


def test_metrics_stand_beside_the_errors():
    runs = [make("source", [[1, 0]] * 2, metrics={"ece": 12.3456, "nll": None}), make("tent", [[0, 0]] * 2)]
    table = tta.compare(runs, metrics=["ece"])
    assert [line.split()[1:] for line in table.to_text().splitlines() if line.startswith("ece")] == [["12.3", "-"]]
    assert table.to_markdown().splitlines()[0].endswith("| ece |")
    assert [row["ece"] for row in csv.DictReader(io.StringIO(table.to_csv()))] == ["12.3456", ""]
    assert "& 12.3 \\\\" in table.to_latex()
    with pytest.raises(ValueError, match=r"No result has a metric 'nll'\. There are: ece"):
        tta.compare(runs, metrics=["nll"])


def test_metrics_inside_others_are_named_with_dots():
    run = make("source", [[1, 0]] * 2, metrics={"collapse": {"last": {"entropy": 0.5}}, "forwards": 120000})
    table = tta.compare([run], metrics=["collapse.last.entropy", "forwards"])
    assert "| 0.500 | 120000 |" in table.to_markdown()


HOSTILE = (
    "\x1b[2J\x1b]0;x\x07$x^2$ \\input{/etc/passwd} <script>alert(1)</script> [bold]a[/] [/] `b` | c\nd\u202e :smile: %"
)
AS_NAMES = ["method", "stream", "domain", "setting", "reset"]


def hostile(where, name):
    """A source run and another one in which a name is someone else's."""
    changes = {"method": "tent", "stream": "toy-c", "reset": "never", "domain": "fog", where: name}
    settings = {name: name} if where == "setting" else {}
    rows = (Row(domain=changes["domain"], samples=4, errors=1), Row(domain="snow", samples=4, errors=2))
    common = {
        "rows": rows,
        "manifest": {"model": {"spec": "toy"}, "data": {"settings": settings}},
        "stream": changes["stream"],
        "reset": changes["reset"],
        "seed": 0,
        "config": {},
        "seconds": 1.0,
        "skipped_updates": 3,
    }
    return [Result(method=method, **common) for method in ("source", changes["method"])]


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("where", AS_NAMES)
def test_names_of_others_stand_in_a_table_as_they_are(where, kind):
    runs = hostile(where, HOSTILE)
    # A setting is in a column only where runs differ in it.
    others = hostile("seed", 0) if where in ("stream", "setting", "reset") else []
    text = tta.compare([*runs, *others]).format(kind)
    assert not any(sign in text for sign in ("\x1b", "\x07", "\u202e"))
    forbidden = {
        "terminal": ("\U0001f604",),
        "markdown": ("<script", "c\nd", " `b` | c"),
        "latex": ("\\input{", "$x^2$", "c\nd"),
        "csv": (),
        "html": ("<script",),
    }
    assert not any(sign in text for sign in forbidden[kind])
    shown = {"markdown": "&lt;script&gt;", "latex": "textbackslash{}input", "csv": "\\input{", "html": "&lt;script&gt;"}
    assert shown.get(kind, "") in text


def test_a_terminal_shows_markup_in_a_name_as_text():
    text = tta.compare(hostile("domain", "[bold]a[/] [/] :smile:")).to_text()
    assert "[bold]a[/] [/] :smile:" in text


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "@SUM(A1)", "-2+3", " =1"])
def test_csv_names_are_no_formulas(name):
    for where in ("method", "domain"):
        rows = list(csv.reader(io.StringIO(tta.compare(hostile(where, name)).to_csv())))
        cells = [cell for row in rows for cell in row]
        assert not any(cell.lstrip().startswith(tuple("=+-@")) for cell in cells if not _is_number(cell))
        assert any(cell.startswith("'") for cell in cells)


def test_csv_keeps_negative_numbers_and_dashes():
    assert [csv_cell(value) for value in ("-1.5", "-", -2.0, None, "+3")] == ["-1.5", "-", -2.0, None, "+3"]


def _is_number(text):
    try:
        return bool(float(text)) or True
    except ValueError:
        return False


@pytest.mark.parametrize("name", ["plain", "my_method lr=0.1", "gaussian_noise", "vs source: 3.5 %"])
def test_plain_names_are_not_changed(name):
    assert markdown(name) == html(name) == csv_cell(name) == terminal(name).plain == name
