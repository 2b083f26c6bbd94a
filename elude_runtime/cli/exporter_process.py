"""The exporter that goes with a TorchServe of one's own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path

from elude_runtime.cli.server_process import stop_session
from elude_runtime.cli.server_settings import free_ports
from elude_runtime.errors import ServerError

METRICS_DIR = "ELUDE_METRICS_DIR"  # the serving configuration's `metrics_dir`
_COMMAND = "from elude_runtime.cli import main; main()"  # whatever `elude` stands on PATH


class ExporterProcess:
    """`elude exporter` as a process in a session of its own, on this host only. port: a free one by default."""

    def __init__(self, port: int | None = None) -> None:
        self._port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._started, self._log = 0.0, Path()

    @property
    def url(self) -> str:
        """Where it listens, once it was started."""
        return f"http://127.0.0.1:{self._port}"

    @property
    def pid(self) -> int:
        if self._process is None:
            raise ServerError("The exporter is not running.")
        return self._process.pid

    def start(self, directory: Path, log: Path, server: int, besides: Collection[int]) -> None:
        """Starts it on the workers' folder and returns at once; its words go to `log`. It ends with the process
        `server` at the latest. besides: ports that it may not choose."""
        self._log, self._started = log, time.time()
        self._port = self._port or free_ports(1, besides)[0]
        command = [sys.executable, "-c", _COMMAND, "exporter", "--dir", str(directory), "--port", str(self._port)]
        command += ["--while", str(server)]
        with log.open("wb") as file:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )

    def ended(self) -> str | None:
        """Why it ended by itself, in one sentence; None while it runs."""
        if self._process is None or self._process.poll() is None:
            return None
        said = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"The exporter of metrics ended: {said[-1] if said else 'it said nothing.'}"

    def stop(self) -> None:
        if self._process is not None:
            stop_session(self._process.pid, self._started)
            self._process.wait()
            self._process = None
