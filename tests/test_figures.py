"""Pictures and the HTML report: what they show are the numbers of the results."""

import dataclasses
from html.parser import HTMLParser

import numpy as np
import pytest

import tta
from tta.cli import main
from tta.messages import plain
from tta.report import figures
from tta.report.page import html_page

pytest.importorskip("matplotlib", reason="the extra plot is not installed")


@pytest.fixture(scope="module")
def results():
    """Two methods, two seeds each, on two domains of 40 digits."""
    model = tta.load_model("digits-cnn")
    settings = {"corruptions": ["fog", "contrast"], "samples": 40, "batch_size": 10}
    return [
        tta.evaluate(tta.adapt(model, method), tta.stream("digits-c", seed=seed, **settings), progress=False)
        for method in ("source", "norm")
        for seed in (0, 1)
    ]


def mean(results, name):
    return np.mean([result.mean_error if name == "mean" else result.errors[name] for result in results])


def test_runs_of_several_seeds_share_an_entry_and_settings_are_told_where_they_differ(results):
    assert list(figures.grouped(results)) == ["source", "norm"]
    other = dataclasses.replace(results[2], config={**results[2].config, "alpha": 0.5})
    assert len(figures.grouped([*results, other])) == 3


def test_curve_is_the_error_of_each_batch_and_domains_are_bounded(results):
    axes = figures.curve(results, window=1).axes[0]
    source, *_ = axes.get_lines()
    errors = [result.curves["error"] for result in results[:2]]
    np.testing.assert_allclose(source.get_ydata(), (errors[0] + errors[1]) / 2)
    assert list(source.get_xdata()) == [10, 20, 30, 40, 50, 60, 70, 80]
    assert {"fog", "contr"} <= {text.get_text() for text in axes.texts}
    assert [line.get_xdata()[0] for line in axes.get_lines() if len(line.get_xdata()) == 2] == [40, 80]


def test_a_window_ends_with_its_domain(results):
    one = results[:1]
    drawn = figures.curve(one, window=3).axes[0].get_lines()[0].get_ydata()
    error = one[0].curves["error"].to_numpy()
    expected = [error[:1], error[:2], error[:3], error[1:4], error[4:5], error[4:6], error[4:7], error[5:8]]
    np.testing.assert_allclose(drawn, [part.mean() for part in expected])


def test_heatmap_holds_every_error_best_method_first(results):
    axes = figures.heatmap(results).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["norm", "source"]
    numbers = [text.get_text() for text in axes.texts]
    expected = [mean(runs, name) for runs in (results[2:], results[:2]) for name in ("fog", "contrast", "mean")]
    assert numbers == [f"{value:.1f}" for value in expected]


def test_pareto_stands_at_passes_and_error(results):
    axes = figures.pareto(results).axes[0]
    norm = axes.get_lines()[0]
    assert (norm.get_xdata()[0], norm.get_ydata()[0]) == (1.0, pytest.approx(mean(results[2:], "mean")))
    assert any(text.get_text().startswith("1  norm") for text in axes.get_legend().get_texts())
    with pytest.raises(ValueError, match="No result has the cost 'money'"):
        figures.pareto(results, cost="money")


def test_the_front_is_what_nothing_beats_in_both():
    assert figures._front([(2, 5.0), (1, 9.0), (3, 6.0), (1, 8.0), (4, 1.0)]) == [(1, 8.0), (2, 5.0), (4, 1.0)]


def test_calibration_is_that_of_the_predictions(results):
    confidence, accuracy, count = figures.reliability(results[:2])
    assert count.sum() == 160
    assert np.nansum(accuracy * count) / 100 == sum(result.predictions.correct.sum() for result in results[:2])
    filled = count > 0
    edges = np.linspace(0, 100, figures.BINS + 1)
    assert ((confidence >= edges[:-1] - 1e-6) & (confidence <= edges[1:] + 1e-6))[filled].all()
    first = figures.calibration(results).axes[0].get_legend().get_texts()[0].get_text()
    gap = (count * np.abs(np.nan_to_num(accuracy - confidence))).sum() / count.sum()
    assert first == f"source  (ECE {gap:.1f} %)"
    one = figures.reliability(results[:1])
    assert (one[2] * np.abs(np.nan_to_num(one[1] - one[0]))).sum() / 8000 == pytest.approx(
        results[0].metrics["ece"] / 100, abs=1e-4
    )


def test_grid_has_a_cell_for_each_pair_that_ran(results):
    with pytest.raises(ValueError, match="several learning rates or steps"):
        figures.grid(results)
    runs = [
        dataclasses.replace(results[n], method="tent", config={"lr": lr, "steps": steps})
        for n, (lr, steps) in enumerate([(1e-3, 1), (1e-2, 1), (1e-3, 2)])
    ]
    axes = figures.grid(runs).axes[0]
    assert axes.get_title(loc="left") == "tent"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01"]
    assert [text.get_text() for text in axes.texts] == [f"{result.mean_error:.1f}" for result in runs]


def test_grid_keeps_validation_corruptions_apart_from_those_of_the_test(results):
    runs = [dataclasses.replace(results[0], method="tent", config={"lr": lr, "steps": 1}) for lr in (1e-3, 1e-2)]
    validation = [
        dataclasses.replace(run, rows=(dataclasses.replace(run.rows[0], domain="spatter", errors=0),), predictions=None)
        for run in runs
    ]
    cells = {axes.get_title(loc="left"): axes.texts for axes in figures.grid([*runs, *validation]).axes}
    assert list(cells) == ["tent\nfog +1", "tent\nspatter"]
    assert [text.get_text() for text in cells["tent\nfog +1"]] == [f"{runs[0].mean_error:.1f}"] * 2
    assert [text.get_text() for text in cells["tent\nspatter"]] == ["0.0"] * 2


def test_thirty_methods_have_styles_of_their_own(results):
    many = [dataclasses.replace(results[n % 2], method=f"method{n}") for n in range(30)]
    lines = [line for line in figures.curve(many).axes[0].get_lines() if line.get_label().startswith("method")]
    assert (
        len({(line.get_color(), str(line.get_linestyle()), str(line._unscaled_dash_pattern)) for line in lines}) == 30
    )


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.open, self.links, self.words = [], [], []
        self.feed(text)

    def handle_startendtag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href") and value]

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data.strip())


def test_the_report_is_one_whole_page_that_needs_nothing_else(results):
    table = tta.compare(results)
    text = html_page(table, results, title="a <b> c")
    found = Page(text)
    assert not found.open
    assert all(link.startswith(("#", "data:")) for link in found.links)
    assert text.count("<svg") == 4  # no grid here
    assert "a <b> c" in found.words
    numbers = {word for row in table.to_markdown().splitlines()[2:6] for word in row.replace("*", "").split(" | ")}
    assert {f"{result.mean_error:.1f}" for result in results} <= numbers & set(found.words)
    assert any('"batch_size": 10' in word for word in found.words)


def test_without_matplotlib_the_tables_stand_alone(results, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    text = html_page(tta.compare(results), results)
    assert "<svg" not in text
    assert "<table" in text


def test_command_line_draws_and_names_what_there_is(results, tmp_path, capsys):
    for number, result in enumerate(results):
        result.save(tmp_path / "runs" / str(number))
    out = tmp_path / "heat.svg"
    assert main(["plot", "heatmap", str(tmp_path / "runs"), "-o", str(out)]) == 0
    assert out.read_text().lstrip().startswith("<?xml")
    assert main(["plot", "haetmap", str(tmp_path / "runs")]) == 2
    assert "Did you mean 'heatmap'" in capsys.readouterr().err
    assert main(["table", str(tmp_path / "runs"), "--format", "html"]) == 0
    assert capsys.readouterr().out.startswith("<!DOCTYPE html>")


@pytest.mark.parametrize("name", ["$\\frac{$", "_hidden", "a\x1b[2J", "a\nb"])
def test_names_of_others_are_drawn_as_they_are(results, name):
    named = [dataclasses.replace(result, method=name) for result in results[:2]]
    page = html_page(tta.compare(named), named)
    assert page.count("<figure>") == 4
    assert "\x1b" not in page
    axes = figures.curve(named).axes[0]
    assert [text.get_text().strip() for text in axes.get_legend().get_texts()] == [plain(name).replace("$", "\\$")]
