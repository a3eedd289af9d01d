"""A page that plays a corrupted stream: the pictures, source and adapted predictions side by side, the online error."""

from tta.demo.app import create_app
from tta.demo.pictures import Pictures, of_digits, of_folder
from tta.demo.server import run
from tta.demo.settings import DemoSettings

__all__ = ["DemoSettings", "Pictures", "create_app", "of_digits", "of_folder", "run"]
