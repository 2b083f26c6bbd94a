"""A stand-in for a TorchServe instance behind nginx: it notes what arrives, and misbehaves on demand."""

from __future__ import annotations

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

PROBLEM = {"type": "non-finite-output", "title": "x", "status": 500, "detail": "y"}


class Instance(ThreadingHTTPServer):
    """Stands for one instance. mode: how it answers; asked: what arrived, as (method, path, headers, size)."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, name: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.name, self.mode, self.delay = name, "ok", 0.0
        self.asked: list[tuple[str, str, dict[str, str], int]] = []
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.server_port}"


class _Answer(BaseHTTPRequestHandler):
    server: Instance
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet an answer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.asked.append((self.command, self.path, headers, len(body)))
        time.sleep(self.server.delay)
        mode = self.server.mode
        if mode == "cut":
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif mode == "problem":
            self.send(500, PROBLEM, "application/problem+json")
        elif mode == "busy":
            self.send(
                503, {**PROBLEM, "type": "overloaded", "status": 503}, "application/problem+json", retry_after="0"
            )
        elif mode == "half":
            self.send(200, {"by": self.server.name}, promised=1000)
            self.close_connection = True
        else:
            self.send(200, {"by": self.server.name})

    do_GET = do_POST

    def send(self, status: int, values: Any, kind: str = "application/json", promised: int = 0, **more: str) -> None:
        body = json.dumps(values).encode()
        self.send_response(status)
        headers = {
            "Content-Type": kind,
            "Content-Length": str(promised or len(body)),
            "x-request-id": "torchserves-own",
        }
        headers |= {"pragma": "no-cache", "cache-control": "private", "expires": "Thu, 01 Jan 1970 00:00:00 UTC"}
        for name, value in (headers | {k.replace("_", "-"): v for k, v in more.items()}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass
