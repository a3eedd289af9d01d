"""Parts of messages: what was given, what was expected, the name that was probably meant; names that others chose."""

import difflib
import logging
import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


def require(condition: bool, given: str, expected: str) -> None:
    """Raise a ValueError that says what was given and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"Got {given}; expected {expected}.")


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the choice most similar to ``word``; empty if none is similar."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""


# Control and format characters (terminal escapes, text that runs backwards), halves of pairs, ends of lines.
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")


def plain(text: str, *, lines: bool = False) -> str:
    """A text of someone else's as one that can be printed: characters that would not be seen stand as their codes.

    A result, a file or a folder may be called anything. Printed as they are, control characters move the cursor, set the
    title of the window, or end a line and begin one that looks like ours.

    Args:
        text: such as ``"a\\x1b[2J"``.
        lines: keep ends of lines, for a text of several.
    """
    kept = "\n" if lines else ""
    return "".join(
        letter if letter in kept or unicodedata.category(letter) not in UNSEEN else repr(letter)[1:-1]
        for letter in text
    )


@contextmanager
def trainer_silenced() -> Iterator[None]:
    """Within this context Lightning's banners, tips and hints are not shown; errors are."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric", "lightning")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
