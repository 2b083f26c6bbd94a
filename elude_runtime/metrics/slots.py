"""Places in a folder of metrics, one a living worker, held by a file lock.

The files of a worker carry its slot's number and not its process id: a worker that is started again goes on counting
where the last one stopped, a worker that is started over and over leaves no files behind, and an exporter in another
container, which does not see the worker's process, still sees the lock.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from prometheus_client.multiprocess import mark_process_dead

from elude_runtime.errors import StorageError

_LOCK = re.compile(r"(\d+)\.lock")
_MOST = 1024
_FILES = ("counter", "histogram", "gauge_livesum", "gauge_livemax", "gauge_liveall")
_RESERVED = 2**20  # bytes; 256 features on drift take 500 kB


class Slot:
    """A place in the folder until the process ends; `number` is the lowest that was free. StorageError where the folder
    cannot be used."""

    def __init__(self, directory: Path) -> None:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            self.number, self._file = _take(directory)
            forget(directory, self.number)  # gauges of a worker that was killed here
            _reserve(directory, self.number)
        except OSError as error:
            raise StorageError(f"{directory} cannot hold metrics: {error.strerror or error}.") from error

    def release(self) -> None:
        self._file.close()


def _reserve(directory: Path, number: int) -> None:
    """Room on the disk for the slot's files. prometheus-client maps files with holes into memory, and to write into a
    hole of a full disk ends the process. OSError where there is no room."""
    for name in _FILES:
        with (directory / f"{name}_{number}.db").open("ab") as file:
            os.posix_fallocate(file.fileno(), 0, max(_RESERVED, file.tell()))


def _take(directory: Path) -> tuple[int, IO[str]]:
    for number in range(_MOST):
        file = (directory / f"{number}.lock").open("w")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return number, file
        except BlockingIOError:
            file.close()
    raise StorageError(f"{directory} has no free place for another worker; give each server a folder of its own.")


def forget(directory: Path, number: int) -> None:
    """A worker's gauges. Its counters stay: they are part of every total."""
    mark_process_dead(number, str(directory))


def forget_dead(directory: Path) -> None:
    """The gauges of all workers that are gone."""
    for number in _without_worker(directory):
        forget(directory, number)


def wipe(directory: Path) -> None:
    """All that workers which are gone left in the folder, counters too; nothing while any lives, for a total that falls
    looks to Prometheus like a restart of all."""
    if len(list(_without_worker(directory))) < len(list(directory.glob("*.lock"))):
        return
    for number in _without_worker(directory):
        for path in directory.glob(f"*_{number}.db"):
            path.unlink(missing_ok=True)


def _without_worker(directory: Path) -> Iterator[int]:
    """The slots that a worker once had and none has; each stays free while the caller is at it."""
    for path in sorted(directory.glob("*.lock")):
        name = _LOCK.fullmatch(path.name)
        if not name:
            continue
        with path.open("r") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            yield int(name[1])
