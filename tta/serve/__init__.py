"""A server around an adapter: it answers over HTTP, learns from what it is asked, is watched, and restarts where it was."""

from tta.serve.app import create_app
from tta.serve.server import run
from tta.serve.settings import ServeSettings

__all__ = ["ServeSettings", "create_app", "logs", "run"]
