"""The ``tta`` command."""

from tta.cli.commands import main

__all__ = ["main"]
