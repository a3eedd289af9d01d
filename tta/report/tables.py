"""Tables: the formats that each can be written in, and how numbers, names and rows are written."""

import io
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderResult

if TYPE_CHECKING:
    import pandas

FORMATS = ("terminal", "markdown", "latex", "csv", "html")
BASELINE = "source"  # the method that others are compared with
MEAN = "mean"  # the column behind the domains

# Short names of the corruptions in the papers' tables.
SHORT = {
    "gaussian_noise": "gauss",
    "shot_noise": "shot",
    "impulse_noise": "impul",
    "defocus_blur": "defoc",
    "glass_blur": "glass",
    "motion_blur": "motn",
    "zoom_blur": "zoom",
    "snow": "snow",
    "frost": "frost",
    "fog": "fog",
    "brightness": "brit",
    "contrast": "contr",
    "elastic_transform": "elast",
    "pixelate": "pixel",
    "jpeg_compression": "jpeg",
    "speckle_noise": "speck",
    "gaussian_blur": "gblur",
    "spatter": "spatt",
    "saturate": "satur",
}


class ResultTable(ABC):
    """A table of results. Print it, or write it in one of the formats of :meth:`format`."""

    @abstractmethod
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draw the table in a terminal."""

    @abstractmethod
    def to_frame(self) -> "pandas.DataFrame":
        """A pandas table with unrounded numbers."""

    @abstractmethod
    def to_markdown(self) -> str:
        """A Markdown table."""

    @abstractmethod
    def to_latex(self) -> str:
        """A LaTeX table for the package booktabs."""

    @abstractmethod
    def to_html(self) -> str:
        """An HTML fragment; :mod:`tta.report.page` makes a page of it."""

    def to_csv(self) -> str:
        """The table of :meth:`to_frame` as CSV: unrounded, an empty cell where there is no value."""
        text: str = self.to_frame().to_csv(index=False, lineterminator="\n")
        return text

    def to_text(self, width: int = 100) -> str:
        """The table as the terminal shows it, without colours."""
        console = Console(file=io.StringIO(), width=width, color_system=None)
        with console.capture() as capture:
            console.print(self)
        return "\n".join(line.rstrip() for line in capture.get().splitlines()) + "\n"

    def format(self, kind: str) -> str:
        """The table as text.

        Args:
            kind: ``terminal``, ``markdown``, ``latex``, ``csv`` or ``html``.

        Raises:
            ValueError: another kind.
        """
        if kind not in FORMATS:
            raise ValueError(f"No table format '{kind}'. There are: {', '.join(FORMATS)}.")
        writers = (self.to_text, self.to_markdown, self.to_latex, self.to_csv, self.to_html)
        return dict(zip(FORMATS, writers, strict=True))[kind]()

    def __str__(self) -> str:
        return self.to_text()


def number(value: float) -> str:
    """An error in percent."""
    return f"{value:.1f}"


def signed(value: float) -> str:
    """A difference with its sign; 0.0 without one."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def measured(value: float) -> str:
    """A metric: three decimals below 10, one below 1000, none for whole and larger numbers."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.1f}"


def shortened(domains: Sequence[str]) -> list[str]:
    """The papers' short names of the corruptions; the full names if two would get the same short one."""
    short = [SHORT.get(domain, domain) for domain in domains]
    return short if len(set(short)) == len(short) else list(domains)


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


LATEX = {
    "_": "\\_",
    "%": "\\%",
    "&": "\\&",
    "#": "\\#",
    "$": "\\$",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
}


def latex(text: str) -> str:
    """Text with LaTeX's special characters escaped."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex_row(cells: Sequence[str]) -> str:
    """One line of a LaTeX table; the cells are LaTeX already."""
    return " & ".join(cells) + " \\\\"
