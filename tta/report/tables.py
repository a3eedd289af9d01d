"""How numbers, names and rows are written in tables, in each format."""

from collections.abc import Sequence

# The names that the papers' tables use.
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


def number(value: float) -> str:
    """An error in percent."""
    return f"{value:.1f}"


def signed(value: float) -> str:
    """A difference, with its sign unless it is shown as 0."""
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def measured(value: float) -> str:
    """A metric, with as many decimals as its size calls for."""
    if abs(value) < 10:
        return f"{value:.3f}"
    return f"{value:.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.1f}"


def shortened(domains: Sequence[str]) -> list[str]:
    """The papers' short names of the corruptions; the names as they are where two would become one."""
    short = [SHORT.get(domain, domain) for domain in domains]
    return short if len(set(short)) == len(short) else list(domains)


def markdown_row(cells: Sequence[str]) -> str:
    """A line of a Markdown table."""
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
    """Text with what LaTeX would read as commands quoted."""
    return "".join(LATEX.get(letter, letter) for letter in text)


def latex_row(cells: Sequence[str]) -> str:
    """A line of a LaTeX table; its cells are LaTeX already."""
    return " & ".join(cells) + " \\\\"
