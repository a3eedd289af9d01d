"""The table over seeds: what stands in it, in every format."""

import csv
import io
import statistics

import pytest
from rich.console import Console

from tta import benchmark
from tta.benchmark import Failure, summary
from tta.config import ConfigError
from tta.results import Result, Row

DESCRIBED = {
    "methods": ["source", "norm", "tent"],
    "streams": ["digits-c"],
    "models": ["digits-cnn"],
    "protocols": ["continual", "mixed"],
    "seeds": [0, 1],
}
# method -> errors of (gaussian_noise, fog) in 10 samples, for seeds 0 and 1
ERRORS = {"source": [(4, 8), (6, 8)], "norm": [(2, 4), (4, 4)], "tent": [(3, 2), (3, 2)]}


def entries(**changes):
    return benchmark.entries(benchmark.load({**DESCRIBED, **changes}))


def outcome(cell):
    errors = ERRORS[cell.method][cell.seed]
    rows = tuple(Row(domain=d, samples=10, errors=n) for d, n in zip(("gaussian_noise", "fog"), errors, strict=True))
    fields = {"method": cell.method, "stream": cell.stream, "seed": cell.seed, "reset": "never", "rows": rows}
    return Result(**fields, config=dict(cell.hparams), manifest={}, seconds=1.0)


def outcomes(rows, **failing):
    found = {cell.name: outcome(cell) for cell in benchmark.in_order(rows)}
    for cell in benchmark.in_order(rows):
        if failing.get(cell.method) == cell.seed:
            found[cell.name] = Failure("no luck")
    return found


def make(**failing):
    rows = entries()
    return summary.summarise(rows, outcomes(rows, **failing))


def test_scores_are_mean_and_sample_deviation_over_seeds():
    section, other = make().sections
    assert section.place == {"stream": "digits-c", "protocol": "continual", "model": "digits-cnn"}
    assert other.place["protocol"] == "mixed"
    source, norm, _ = section.lines
    assert section.columns == ("gaussian_noise", "fog")
    assert source.score("gaussian_noise") == summary.Score(50.0, statistics.stdev([40, 60]), 2)
    assert source.score("mean") == summary.Score(65.0, statistics.stdev([60, 70]), 2)
    assert norm.difference == summary.Score(-30.0, 0.0, 2)  # seed by seed, not the difference of the means' deviations
    assert source.difference is None


def test_best_is_bold_and_second_underlined():
    lines = make().to_markdown().splitlines()
    assert lines[0] == "**digits-c · continual · model digits-cnn**"
    assert lines[2] == "| method | gauss | fog | mean | vs source |"
    assert lines[4] == "| source | 50.0 ± 14.1 | 80.0 ± 0.0 | 65.0 ± 7.1 | - |"
    assert lines[5] == "| norm | **30.0 ± 14.1** | <u>40.0 ± 0.0</u> | <u>35.0 ± 7.1</u> | -30.0 ± 0.0 |"
    assert lines[6] == "| tent | **30.0 ± 0.0** | **20.0 ± 0.0** | **25.0 ± 0.0** | -40.0 ± 7.1 |"


def test_latex_html_and_csv():
    found = make()
    assert "norm & \\textbf{30.0 $\\pm$ 14.1} & \\underline{40.0 $\\pm$ 0.0}" in found.to_latex()
    assert found.to_latex().count("\\begin{tabular}{lrrrr}") == 2
    page = found.to_html()
    assert "<td><u>40.0 ±&nbsp;0.0</u></td>" in page
    assert "http" not in page  # nothing is fetched
    rows = list(csv.DictReader(io.StringIO(found.to_csv())))
    assert [row["method"] for row in rows] == ["source", "norm", "tent"] * 2
    assert float(rows[0]["gaussian_noise std"]) == statistics.stdev([40, 60])
    assert float(rows[1]["vs source"]) == -30.0
    with pytest.raises(ValueError, match="No table format 'pdf'"):
        found.format("pdf")


@pytest.mark.parametrize("width", [60, 100])
def test_terminal_table_fits_its_width(width):
    console = Console(file=io.StringIO(), width=width)
    console.print(make(tent=0))
    lines = console.file.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert any(line.split()[:2] == ["gaussian_noise", "50.0"] for line in lines)


def test_a_failed_seed_is_named_with_its_reason_and_the_others_stand():
    found = make(tent=0)
    assert found.problems == (
        "Failed (no luck): tent on digits-c, continual, seed 0; tent on digits-c, mixed, seed 0.",
    )
    assert found.sections[0].lines[2].score("mean") == summary.Score.of([25.0])
    for kind in ("terminal", "markdown", "latex", "html"):
        assert "no luck" in found.format(kind)


def test_what_has_not_run_is_said():
    rows = entries()
    found = summary.summarise(rows, {})
    assert len(found.problems) == 1
    assert found.problems[0].startswith("Not run yet: source on digits-c, continual, seed 0; ")
    assert "failed" in found.to_markdown()


def test_streams_may_be_the_columns():
    rows = entries(streams=["digits-c", "cifar10-c"], protocols=["continual"])
    (section,) = summary.summarise(rows, outcomes(rows)).sections
    assert section.columns == ("digits-c", "cifar10-c")
    assert section.place == {"protocol": "continual", "model": "digits-cnn"}
    assert section.lines[0].score("cifar10-c") == summary.Score.of([60.0, 70.0])
    assert section.lines[0].score("mean") == summary.Score.of([60.0, 70.0])
    by_domain = summary.summarise(rows, outcomes(rows), columns="domain")
    assert [part.place["stream"] for part in by_domain.sections] == ["digits-c", "cifar10-c"]


def test_points_of_a_grid_are_lines_of_their_own():
    rows = entries(grid={"lr": [0.001, 0.01]}, protocols=["continual"])
    text = summary.summarise(rows, outcomes(rows)).to_markdown()
    assert "| tent lr=0.001 |" in text
    assert "| tent lr=0.01 |" in text


def test_published_means_stand_beside_ours():
    rows = entries(streams=["cifar10-c"], protocols=["per-domain", "continual"])
    found = summary.summarise(rows, outcomes(rows), published="tent-cifar10-c")
    first, second = found.sections
    assert [line.published for line in first.lines] == [43.5, 20.4, 18.6]
    assert [line.published for line in second.lines] == [None] * 3  # another protocol
    assert first.lines[0].versus_published == "43.5 (+21.5)"
    assert "WRN-28-10" in found.to_text()
    assert found.to_frame()["vs published"].tolist()[0] == pytest.approx(first.lines[0].score("mean").mean - 43.5)
    assert found.to_frame()["vs published"].isna().tolist() == [False] * 3 + [True] * 3
    elsewhere = summary.summarise(rows[3:], outcomes(rows), published="tent-cifar10-c")
    assert elsewhere.notes[-1].startswith(
        "published: nothing to compare with; that table is of stream 'cifar10-c' and "
    )
    with pytest.raises(ConfigError, match="No published table 'tent'"):
        summary.summarise(rows, {}, published="tent")


def test_a_table_of_means_and_metrics_sorted_by_error():
    rows = entries(protocols=["continual"])
    table = summary.summarise(
        rows, outcomes(rows, tent=1), columns="mean", metrics=["samples", "no_such"], by_error=True
    )
    (section,) = table.sections
    assert section.columns == ()
    assert [line.method for line in section.lines] == ["tent", "norm", "source"]  # 25 of one seed, 35, 65
    first, *_ = table.to_markdown().splitlines()[4:]
    assert first.startswith("| tent | **25.0** |")
    assert first.endswith(" | 20 | - |")
    down = [line.split()[0] for line in table.to_text(80).splitlines() if line.startswith(("tent", "norm", "source"))]
    assert down == ["tent", "norm", "source"]


REASON = "no luck [/] \x1b[2J <script> \\input{x}\n| :smile: =1"


@pytest.mark.parametrize(
    ("kind", "forbidden"),
    [
        ("terminal", ["\U0001f604"]),
        ("markdown", ["<script>", "\n| :smile:"]),
        ("latex", ["\\input{", "\n| :smile:"]),
        ("csv", ["\n| :smile:"]),
        ("html", ["<script>"]),
    ],
)
def test_reasons_and_names_of_others_stand_in_a_table_as_they_are(kind, forbidden):
    rows = entries(models=["timm:[/]<script>\\input{x}"])
    found = outcomes(rows, tent=1) | {cell.name: Failure(REASON) for cell in benchmark.in_order(rows)[:1]}
    text = summary.summarise(rows, found).format(kind)
    assert not any(sign in text for sign in ["\x1b", *forbidden])
    assert "no luck" in text
