"""The HTML report: a single file with tables, figures and settings, which needs no network and no other file."""

import io
import json
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tta import tasks
from tta.report import figures
from tta.report.tables import ResultTable, html
from tta.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TITLES = {
    "maps": "Pictures",
    "heatmap": "Error by domain",
    "curve": "Error over the stream",
    "pareto": "Error against cost",
    "calibration": "Calibration",
    "grid": "Error by learning rate and steps",
}
STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1c; --faint: #666; --line: #bbb; --paper: #fff; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e6e6; --faint: #a0a0a0; --line: #555; --paper: #16181b; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 80em; margin: 0 auto;
  padding: 1.5em; }
h1 { font-size: 1.4em; } h2 { font-size: 1.05em; margin-top: 2.2em; } h3 { font-size: 0.95em; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.87em; }
th, td { padding: 0.2em 0.45em; text-align: right; border: 0; }
th { white-space: nowrap; }
small { display: block; color: var(--faint); }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
th { border-top: 2px solid var(--ink); border-bottom: 1px solid var(--line); }
tr.group th { border: 0; border-top: 1px solid var(--line); padding-top: 0.7em; font-weight: normal; color: var(--faint); }
table tr:last-child td { border-bottom: 1px solid var(--line); } tbody:last-child tr:last-child td { border-bottom: 2px solid var(--ink); }
p { color: var(--faint); max-width: 60em; font-size: 0.9em; }
figure { margin: 1em 0; background: #fff; padding: 0.6em; border-radius: 4px; overflow-x: auto; }
figure svg { max-width: 100%; min-width: 36em; height: auto; display: block; }
pre { overflow-x: auto; font-size: 0.8em; } summary { cursor: pointer; }
"""


def html_page(table: ResultTable, results: Sequence[Result], *, title: str = "Test-time adaptation") -> str:
    """The report as the text of an HTML file.

    Args:
        table: a comparison of the results, or the summary of a benchmark.
        results: drawn as figures and listed with all their settings; figures that they lack the data for are left out.
            Without the extra ``plot`` there are no figures, and the page says how to get them.
        title: title of the page.
    """
    names = " and ".join(dict.fromkeys(result.score.name for result in results)) or "error"
    in_percent = " in %" if all(tasks.find(result.task).unit == "%" for result in results) else ""
    parts = [f"<h1>{html(title)}</h1>", f"<h2>Online {names}{in_percent}</h2>", table.to_html()]
    parts += [f"<h2>{html(name)}</h2>\n<figure>{svg}</figure>" for name, svg in _figures(results).items()]
    if find_spec("matplotlib") is None:
        parts.append("<p>Figures need matplotlib: pip install 'tta-toolkit[plot]', then write this page again.</p>")
    parts.append("<h2>Settings</h2>")
    parts += [_details(label, member) for label, members in _grouped(results).items() for member in members]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    return figures.grouped(results) if results else {}


def _figures(results: Sequence[Result]) -> dict[str, str]:
    """The figures that can be drawn of the results: title -> SVG."""
    found: dict[str, str] = {}
    for name, title in TITLES.items():
        try:
            figure = figures.FIGURES[name](results)
            measure = results[0].score.name
            is_error = measure == "error" or name == "curve"  # of maps the curve is of the errors of pixels
            found[title if is_error else title.replace("Error", measure)] = _svg(figure)
        except (ValueError, ModuleNotFoundError):  # no grid, no predictions or no matplotlib
            continue
    return found


def _svg(figure: "Figure") -> str:
    """The figure as an SVG element."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    drawn = text.getvalue()
    return drawn[drawn.index("<svg") :].replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "", 1)


def _details(label: str, result: Result) -> str:
    """Configuration, metrics and manifest of a run, folded away."""
    facts = {"seed": result.seed, "config": result.config, "metrics": result.metrics, "manifest": result.manifest}
    text = html(json.dumps(facts, indent=1, default=str))
    return f"<details><summary>{html(label)} · seed {result.seed}</summary><pre>{text}</pre></details>"
