"""Parts of error messages: what was given, what was expected, the name that was probably meant."""

import difflib
from collections.abc import Iterable


def require(condition: bool, given: str, expected: str) -> None:
    """Raise a ValueError that says what was given and what was expected, unless the condition holds."""
    if not condition:
        raise ValueError(f"Got {given}; expected {expected}.")


def nearest(word: str, choices: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the choice most similar to ``word``; empty if none is similar."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
