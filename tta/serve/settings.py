"""Settings of the server: where it listens, how it batches, and its limits."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from tta.messages import require


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Settings of :func:`tta.serve.create_app` and of ``tta serve``.

    Attributes:
        host: address to listen at; ``0.0.0.0`` for all of the machine's.
        port: port, 0 for any free one.
        batch_size: images a batch at most.
        batch_timeout: seconds that an image waits for others to fill its batch.
        max_body: bytes of a request's body.
        max_pixels: pixels of all pictures of a request together, as sent.
        max_images: pictures of a request.
        max_requests: requests to predict at once; further ones are answered 429.
        timeout: seconds from the first byte of a request to its answer.
        state: folder of the saved states; None saves nothing. One server a folder.
        autosave: batches between two saved states.
        token: secret of the requests that control the server; None: there are none. ``tta serve`` takes it from the
            environment variable ``TTA_SERVE_TOKEN`` too.
        paused: predict only, until ``POST /pause?on=false``.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    batch_size: int = 32
    batch_timeout: float = 0.01
    max_body: int = 16 * 2**20
    max_pixels: int = 50_000_000
    max_images: int = 64
    max_requests: int = 64
    timeout: float = 30.0
    state: str | None = None
    autosave: int = 100
    token: str | None = None
    paused: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_body", "max_pixels", "max_images", "max_requests", "autosave"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "1 or more")
        require(0 <= self.port < 2**16, f"port={self.port}", "a port from 0 to 65535")
        require(0 <= self.batch_timeout < math.inf, f"batch_timeout={self.batch_timeout}", "seconds, 0 or more")
        require(self.batch_timeout < self.timeout < math.inf, f"timeout={self.timeout}", "seconds above batch_timeout")
        require(self.token is None or bool(self.token), "an empty token", "a secret, or none")

    def described(self) -> dict[str, Any]:
        """The settings as plain values, without the secret and the folder."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key not in ("token", "state")}
