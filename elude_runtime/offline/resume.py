"""What a long job keeps on disk while it runs, so that the same command goes on after a kill.

Each process saves its own share under a name; whatever several processes make of their shares together is computed
again. The folder lies beside what is to come (a checkpoint, a catalogue), and is gone once that is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch

from elude_runtime.checkpoint.manifest import canonical_json
from elude_runtime.checkpoint.storage import storage_error, sync_file, write_file
from elude_runtime.errors import StorageError
from elude_runtime.offline.collect import State
from elude_runtime.offline.ranks import Ranks

SAVE_SECONDS = 60.0
_SETTINGS, _LOCK = "settings", "lock"


def resume_folder(out: Path) -> Path:
    """Where a run that makes `out` keeps its progress."""
    out = out.absolute()
    return out.parent / f".{out.name}.resume"


class Resume:
    """A context: progress found in it belongs to the same settings. Left behind by an error once something was saved,
    with a note on the error that says so.

    settings: everything that the result depends on; None where the images cannot be told from others, and nothing is
    saved. every: seconds between saves. basis: what else the states to come depend on, known only on the way; those
    saved on another basis are not loaded. Raises StorageError while another run writes to the same place.
    """

    def __init__(self, out: Path, settings: dict[str, Any] | None, ranks: Ranks, every: float = SAVE_SECONDS) -> None:
        self.out, self.folder, self.ranks, self.every = out.absolute(), resume_folder(out), ranks, every
        self.digest = None if settings is None else hashlib.sha256(canonical_json(settings)).hexdigest()
        self.basis = ""
        self._saved = False
        self._last = time.monotonic()
        self._lock = -1

    def __enter__(self) -> Self:
        if self.ranks.first:
            try:
                self._take_lock()
                try:
                    self._begin()
                except BaseException as error:
                    self._leave(error)
                    raise
            except OSError as error:
                raise storage_error(error, self.folder) from error
        self.ranks.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        if self.ranks.first:
            self._leave(error)

    def _begin(self) -> None:
        found = self.folder / _SETTINGS
        self._saved = self.digest is not None and found.is_file() and found.read_text() == self.digest
        for entry in self.folder.iterdir():
            if entry.is_dir():  # a checkpoint cut short
                shutil.rmtree(entry, ignore_errors=True)
        if not self._saved:
            self._empty()
            write_file(found, (self.digest or "").encode())

    def _leave(self, error: BaseException | None) -> None:
        """Unlock, and remove everything unless the same command can go on from it."""
        if error is not None and self._saved:
            error.add_note(f"Progress is kept in {self.folder}; the same command goes on from it.")
            os.close(self._lock)
            return
        with suppress(OSError):
            self._empty()
            (self.folder / _LOCK).unlink()  # the last, so that no other run begins in what is being emptied
        os.close(self._lock)
        with suppress(OSError):  # after the lock: a network file system keeps an open file in its folder
            self.folder.rmdir()

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.digest is not None and time.monotonic() - self._last >= self.every

    def save(self, name: str, state: State) -> None:
        """Keep this process's state under a name, whole or not at all, also when the machine fails."""
        path = self._path(name)
        temporary = path.with_suffix(".new")
        try:
            torch.save({"basis": self.basis, "state": state}, temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter over a full disk
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else OSError(28, str(error))
            raise storage_error(cause, path) from error
        self._saved, self._last = True, time.monotonic()

    def load(self, name: str) -> State | None:
        """What this process saved under that name and on the same basis, in this run or the one before; None where that
        is damaged."""
        path = self._path(name)
        if not path.is_file():
            return None
        try:
            kept = torch.load(path, map_location="cpu", weights_only=True)
            return kept["state"] if kept["basis"] == self.basis else None
        except Exception:  # of a damaged file torch makes anything
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.ranks.rank}.pt"

    def _take_lock(self) -> None:
        """Lock the folder, by a file in it that is open for writing: a network file system asks for that."""
        path, there = self.folder / _LOCK, False
        while not there:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                with suppress(FileNotFoundError):  # a run that has just ended took the file away
                    there = os.path.samestat(os.fstat(self._lock), os.stat(path))
            except BlockingIOError as error:
                raise StorageError(f"Another run is writing to {self.out}; wait for it, or write elsewhere.") from error
            finally:
                if not there:
                    os.close(self._lock)

    def _empty(self) -> None:
        """Remove all files but the lock."""
        for entry in self.folder.iterdir():
            if entry.name != _LOCK:
                entry.unlink()
