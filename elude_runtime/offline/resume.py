"""What a long rewrite keeps on disk while it runs, so that the same command goes on after a kill.

Each process saves its own share under a name; whatever several processes make of their shares together is computed
again. The folder lies beside the checkpoint to come, and is gone once that is complete.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import Any, Self

import torch

from elude_runtime.checkpoint.manifest import canonical_json
from elude_runtime.checkpoint.storage import storage_error, write_file
from elude_runtime.errors import StorageError
from elude_runtime.offline.collect import State
from elude_runtime.offline.ranks import Ranks

SAVE_SECONDS = 60.0
_SETTINGS = "settings"


def resume_folder(out: Path) -> Path:
    """Where a rewrite to `out` keeps its progress."""
    out = out.absolute()
    return out.parent / f".{out.name}.resume"


class Resume:
    """A context: progress found in it belongs to the same settings. Left behind by an error once something was saved.

    settings: everything that the result depends on; None where the images cannot be told from others, and nothing is
    saved. every: seconds between saves. Raises StorageError while another run writes to the same checkpoint.
    """

    def __init__(self, out: Path, settings: dict[str, Any] | None, ranks: Ranks, every: float = SAVE_SECONDS) -> None:
        self.out, self.folder, self.ranks, self.every = out.absolute(), resume_folder(out), ranks, every
        self.digest = None if settings is None else hashlib.sha256(canonical_json(settings)).hexdigest()
        self._saved = False
        self._last = time.monotonic()
        self._lock = -1

    def __enter__(self) -> Self:
        if self.ranks.first:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take_lock()
                found = self.folder / _SETTINGS
                if self.digest is None or not found.is_file() or found.read_text() != self.digest:
                    self._empty()
                    write_file(found, (self.digest or "").encode())
                else:
                    self._saved = True  # by the run that this one continues
                for stale in self.out.parent.glob(f".{self.out.name}.*.part"):
                    shutil.rmtree(stale, ignore_errors=True)
            except OSError as error:
                raise storage_error(error, self.folder) from error
        self.ranks.wait()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.ranks.first:
            if kind is None or not self._saved:
                shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self.digest is not None and time.monotonic() - self._last >= self.every

    def save(self, name: str, state: State) -> None:
        """Keep this process's state under a name, whole or not at all."""
        path = self._path(name)
        temporary = path.with_suffix(".new")
        try:
            torch.save(state, temporary)
            os.replace(temporary, path)
        except (OSError, RuntimeError) as error:  # torch's writer raises the latter over a full disk
            temporary.unlink(missing_ok=True)
            cause = error if isinstance(error, OSError) else OSError(28, str(error))
            raise storage_error(cause, path) from error
        self._saved, self._last = True, time.monotonic()

    def load(self, name: str) -> State | None:
        """What this process saved under that name, in this run or the one before."""
        path = self._path(name)
        return torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.{self.ranks.rank}.pt"

    def _take_lock(self) -> None:
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise StorageError(
                f"Another rewrite is writing to {self.out}; wait for it, or choose another --out."
            ) from error

    def _empty(self) -> None:
        for entry in self.folder.iterdir():
            entry.unlink()
