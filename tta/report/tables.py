"""Tables: the formats that each can be written in, and how numbers, names and rows are written."""

import html as markup
import io
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from tta.messages import plain

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
        """The table of :meth:`to_frame` as CSV: unrounded, an empty cell where there is no value.

        A name that a spreadsheet would compute as a formula has an apostrophe in front of it, see :func:`csv_cell`.
        """
        frame = self.to_frame()
        frame.columns = [csv_cell(name) for name in frame.columns]
        text: str = frame.apply(lambda column: column.map(csv_cell)).to_csv(index=False, lineterminator="\n")
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


def signed(value: float, write: Callable[[float], str] = number) -> str:
    """A difference with its sign, without one if nothing of it is seen."""
    text = write(abs(value))
    return text if not float(text) else f"{'-' if value < 0 else '+'}{text}"


def measured(value: float) -> str:
    """A metric: three decimals below 10, one below 1000, none for whole and larger numbers."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.1f}"


def shortened(domains: Sequence[str]) -> list[str]:
    """The papers' short names of the corruptions; the full names if two would get the same short one."""
    short = [SHORT.get(domain, domain) for domain in domains]
    return short if len(set(short)) == len(short) else list(domains)


FORMULA = "=+-@"  # a spreadsheet computes a cell that begins with one of these


def csv_cell(value: Any) -> Any:
    """A value as a cell of a CSV file: text that a spreadsheet would compute as a formula gets an apostrophe in front.

    Numbers, also as text, and a lone dash stay as they are.
    """
    if not isinstance(value, str):
        return value
    text = plain(value)
    if not text.lstrip().startswith(tuple(FORMULA)) or text == "-":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def markdown(text: str) -> str:
    """Text that Markdown shows as it stands: neither HTML nor marks of its own in it."""
    return re.sub(r"(^[-+]|[\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", markup.escape(plain(text), quote=False))


def html(text: str) -> str:
    """Text that HTML shows as it stands."""
    return markup.escape(plain(text))


def terminal(text: str, **options: Any) -> Text:
    """Text that a terminal shows as it stands; ``options`` as of :class:`rich.text.Text`."""
    return Text(plain(text), **options)


def drawn(text: str) -> str:
    """Text that matplotlib draws as it stands: no mathematics between dollars, and no legend leaves it out."""
    text = plain(text).replace("$", "\\$")
    return f" {text}" if text.startswith("_") else text


def markdown_row(cells: Sequence[str]) -> str:
    """One line of a Markdown table; the cells are Markdown already."""
    return "| " + " | ".join(cells) + " |"


LATEX = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "<": "\\textless{}",
    ">": "\\textgreater{}",
    "|": "\\textbar{}",
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
    return "".join(LATEX.get(letter, letter) for letter in plain(text))


def latex_comment(text: str) -> str:
    """A line that LaTeX skips, without commands even for one who takes the sign in front away."""
    return f"% {latex(text)}"


def latex_row(cells: Sequence[str]) -> str:
    """One line of a LaTeX table; the cells are LaTeX already."""
    return " & ".join(cells) + " \\\\"
