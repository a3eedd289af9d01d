"""A guard around an adapter: it watches without labels, goes back, holds learning, and lets the source model answer."""

from tta.guard.guard import Event, Guard, Guardian
from tta.guard.labelled import Labelled
from tta.guard.monitor import Monitor, harm

__all__ = ["Event", "Guard", "Guardian", "Labelled", "Monitor", "harm"]
