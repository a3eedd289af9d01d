"""The process: uvicorn around the page, at one address of this machine."""

import contextlib
import socket
import webbrowser

import uvicorn
from fastapi import FastAPI

from tta.demo.settings import DemoSettings


def run(app: FastAPI, settings: DemoSettings) -> None:
    """Show the page until Ctrl+C; its address is printed.

    Raises:
        OSError: the address is in use, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family)
    except OSError as error:
        raise OSError(f"Nothing can listen at {settings.host}:{settings.port}: {error.strerror}.") from None
    host = f"[{settings.host}]" if family is socket.AF_INET6 else settings.host
    address = f"http://{host}:{listener.getsockname()[1]}"
    print(f"tta demo: {address} (Ctrl+C ends it)", flush=True)
    if settings.open:
        webbrowser.open(address)
    config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False)
    with listener, contextlib.suppress(KeyboardInterrupt):
        uvicorn.Server(config).run([listener])
