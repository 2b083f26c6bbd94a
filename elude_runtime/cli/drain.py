"""Before a server is stopped: waiting until no request is queued or being answered.

TorchServe, asked to end, resets every connection at once, and no setting makes it refuse new requests before. So the
order is: no longer ready, then no requests in flight, then the end.
"""

from __future__ import annotations

import time
import urllib.parse
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from elude_runtime.cli.health import DRAINING, fetch_json, model_names, read_addresses, read_keys
from elude_runtime.cli.server_process import read_record
from elude_runtime.errors import ServerError

BUSY = "ELUDE_BUSY_DIR"
"""The environment variable that names the folder where each worker says whether it is at work (`PID.busy`, 1 or 0)."""
_LOOK = 0.05
# From the queue to the worker and from the worker to the client a request is nowhere to be seen for some milliseconds,
# and while a batch is gathered: nothing must be seen for longer than both.
_UNSEEN = 0.25


def drain(run_dir: Path, grace: float) -> bool:
    """Waits until the server of this run folder has nothing left to answer, at most `grace` seconds; gives whether.

    From its beginning on `elude health --ready --run-dir` says that the server is not ready, and a balancer that asks
    sends no more. Requests that come all the same are answered, so under steady traffic the time runs out. A server
    whose process is gone has nothing to wait for. Raises `EludeError` if this is no run folder.
    """
    management, _ = read_addresses(run_dir)
    server, _ = read_record(run_dir)
    (run_dir / DRAINING).touch()
    token = read_keys(run_dir).get("management")
    deadline = time.monotonic() + grace
    quiet_since: float | None = None
    while True:
        try:
            versions = _versions(management, token)
        except ServerError:
            if not psutil.pid_exists(server):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK)
            continue
        now = time.monotonic()
        if any(v["jobQueueStatus"]["pendingRequests"] for v in versions) or _busy(run_dir / "tmp"):
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        gathering = max((v.get("maxBatchDelay", 0) for v in versions), default=0) / 1000
        if quiet_since is not None and now - quiet_since > gathering + _UNSEEN:
            return True
        if now > deadline:
            return False
        time.sleep(_LOOK)


def _versions(management: str, token: str | None) -> list[dict[str, Any]]:
    """What the management port says of every version of every model."""
    found: list[dict[str, Any]] = []
    for name in model_names(management, token):
        found += fetch_json(f"{management.rstrip('/')}/models/{urllib.parse.quote(name, safe='')}/all", token)
    return found


def _busy(folder: Path) -> bool:
    """Whether a living worker is at work; one that died over a batch has left its mark behind."""
    return any(
        mark.read_bytes() == b"1" and psutil.pid_exists(int(mark.stem))
        for mark in folder.glob("*.busy")
        if mark.stem.isdecimal()
    )
