"""The exporter: a process of its own that serves the metrics of all workers of one folder to Prometheus."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]
from prometheus_client import CollectorRegistry, Metric, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from elude_runtime.errors import ServerError, StorageError
from elude_runtime.metrics.slots import forget_dead, wipe

_LOOK_SECONDS = 2.0


class _Workers(Collector):
    """All workers' metrics, without the gauges of those that are gone."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._merged = MultiProcessCollector(None, str(directory))

    def collect(self) -> Iterable[Metric]:
        forget_dead(self._directory)
        return self._merged.collect()


@contextmanager
def exporting(directory: Path, address: str, port: int) -> Iterator[int]:
    """Serve `/metrics` for the length of the block; gives the port, which is a free one for 0.

    Wipes what workers that are gone left in the folder. ServerError for an address that is taken, StorageError for a
    folder that cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"{directory} cannot hold metrics: {error.strerror}.") from error
    wipe(directory)
    registry = CollectorRegistry()
    registry.register(_Workers(directory))
    try:
        server, thread = start_http_server(port, address, registry)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        place = f"{address}:{port}"
        raise ServerError(f"The exporter cannot listen on {place}: {reason}; choose another --port.") from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def until_told(process: int | None = None) -> None:
    """Returns on SIGTERM or SIGINT, and soon after the end of a process."""
    told = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: told.set())
    while not told.wait(_LOOK_SECONDS):
        if process is not None and not psutil.pid_exists(process):
            return
