"""Settings of the demo: where it listens, its pace, and what it begins with."""

import math
from dataclasses import dataclass

from tta.messages import require


@dataclass(frozen=True, kw_only=True)
class DemoSettings:
    """Settings of :func:`tta.demo.create_app` and of ``tta demo``.

    Attributes:
        host: address to listen at; by default nobody but this machine reaches it.
        port: port, 0 for any free one.
        open: show the page in a browser.
        corruption: what the first pictures are damaged by; ``none`` leaves them alone.
        severity: 1 to 5.
        interval: seconds from one batch to the next, at least.
        guard: put a guard around every method, so that its alarms are seen.
        playing: begin at once.
    """

    host: str = "127.0.0.1"
    port: int = 8001
    open: bool = False
    corruption: str = "frost"
    severity: int = 5
    interval: float = 1.0
    guard: bool = True
    playing: bool = True

    def __post_init__(self) -> None:
        require(0 <= self.port < 2**16, f"port={self.port}", "a port from 0 to 65535")
        require(0 <= self.interval < math.inf, f"interval={self.interval}", "seconds, 0 or more")
