"""The explorer's own small server: a loopback socket, and uvicorn on it until Ctrl-C."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from starlette.types import ASGIApp

from elude_runtime.errors import ServerError

HOST = "127.0.0.1"


def loopback_socket(port: int | None = None) -> socket.socket:
    """A socket on a port of this host alone, a free one by default. ServerError for one that is taken."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HOST, port or 0))
    except OSError as error:
        listening.close()
        raise ServerError(
            f"Port {port} of {HOST} cannot be used ({error.strerror}); give another with --port."
        ) from error
    return listening


def web_server(app: ASGIApp) -> uvicorn.Server:
    """Runs with `run(sockets=[…])`, which returns after `should_exit`; no line is logged for a request."""
    config = uvicorn.Config(
        app, log_config=None, access_log=False, server_header=False, proxy_headers=False, timeout_graceful_shutdown=2
    )
    return uvicorn.Server(config)


@contextmanager
def in_background(app: ASGIApp) -> Iterator[str]:
    """The application's address while a thread serves it: for measurements and tests."""
    listening = loopback_socket()
    server = web_server(app)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(timeout=10)
        listening.close()
