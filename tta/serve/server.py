"""The process: uvicorn around the application, with a clean end."""

import contextlib
import gc
import logging
import signal
import socket
import threading
import warnings

import uvicorn
from fastapi import FastAPI
from PIL import Image

from tta.serve.settings import ServeSettings

LOG = logging.getLogger("tta.serve")
CONNECTIONS = 1024  # open at once; idle ones cost little


def run(app: FastAPI, settings: ServeSettings) -> None:
    """Serve until SIGTERM or Ctrl+C; then answer what waits and save the state.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # max_pixels says what is too large
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        raise OSError(f"Nothing can listen at {settings.host}:{settings.port}: {error.strerror}.") from None
    config = uvicorn.Config(
        app,
        backlog=CONNECTIONS,
        log_config=None,
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=int(settings.timeout) + 1,
        server_header=False,
    )
    listener.listen(CONNECTIONS)  # who asks before the start is over waits, and is not turned away
    host, port = listener.getsockname()[:2]
    LOG.info("listening", extra={"facts": {"host": host, "port": port}})
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # uvicorn raises again what stopped it
    # What was imported stays for good. Python would look through all of it for garbage, while nothing is answered: with 32
    # clients 1 % of the requests took 0.5 s, where 0.05 s are to be expected.
    gc.collect()
    gc.freeze()
    with listener, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])
