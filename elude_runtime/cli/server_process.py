"""The processes of one TorchServe instance: found by their session, stopped all together; and what their log says."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import psutil  # type: ignore[import-untyped, unused-ignore]

from elude_runtime.errors import EludeError, ServerError

_JAVA_HINT = (
    "TorchServe needs Java 17 or newer: sudo apt-get install -y openjdk-17-jre-headless "
    "(macOS: brew install openjdk@17)"
)
# What the front end logs when a worker or an archive did not make it.
WORKER_STOPPED = re.compile(r"Backend worker process died|Auto recovery start|Failed to load model|Failed to bind")
_MESSAGE = re.compile(r"^\S+ \[\w+ *\] \S+ \S+ - (.*)$")
_ERROR = re.compile(r"^[\w.]*(?:Error|Exception|Warning|Exit|Interrupt)\b.*")


def require_programs() -> None:
    """Raises `EludeError` naming the command that installs what is missing: TorchServe, Java 17."""
    if importlib.util.find_spec("ts") is None or importlib.util.find_spec("ts.model_server") is None:
        raise ServerError("TorchServe is not installed: pip install 'elude-serving[serve]'")
    # The same choice as TorchServe's launcher makes.
    home = os.environ.get("JAVA_HOME")
    java = f"{home}/bin/java" if home else "java"
    if shutil.which(java) is None:
        raise ServerError(f"{java} was not found. {_JAVA_HINT}")
    said = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=60, check=False).stderr
    version = re.search(r'version "(?:1\.)?(\d+)', said)
    if version is None or int(version[1]) < 17:
        raise ServerError(f"{java} is {said.splitlines()[0] if said else 'not working'}. {_JAVA_HINT}")


def read_record(run_dir: Path) -> dict[str, object]:
    """What `elude serve` wrote down about the server in this run folder."""
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        return {**record, "pid": int(record["pid"]), "started": float(record["started"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EludeError(f"{run_dir} is no run folder of `elude serve`: run.json cannot be read.") from error


def session_members(session: int, started: float) -> list[psutil.Process]:
    """The living processes of a session: launcher, Java, workers, also those whose parent is gone.

    `started`: none that is older than the server, for the system may have given its number to somebody else since.
    """
    members = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if os.getsid(process.pid) != session or process.create_time() < started - 60:
                continue
            if process.status() != psutil.STATUS_ZOMBIE:
                members.append(process)
    return members


def stop_session(session: int, started: float, grace: float = 8.0) -> int:
    """Ends all processes of a session: asks first, kills what is left after `grace` seconds; gives their number.

    The front end starts a worker anew while it is being stopped, so the members are listed until there are none. The
    launcher, which leads the session, is left to end by itself after Java, for it is the one who reaps it.
    """
    asked: set[int] = set()
    seen: set[int] = set()
    begin = time.monotonic()
    while members := session_members(session, started):
        waited = time.monotonic() - begin
        if waited > grace + 10:
            raise ServerError(f"Processes {[member.pid for member in members]} of the server do not end.")
        for member in members:
            seen.add(member.pid)
            with contextlib.suppress(psutil.Error):
                if waited > grace:
                    member.kill()
                elif member.pid not in asked and (member.pid != session or (len(members) == 1 and waited > 2)):
                    member.terminate()
                    asked.add(member.pid)
        time.sleep(0.05)
    return len(seen)


def find_cause(log: str, mark: str = "ELUDE_LOAD_ERROR") -> str:
    """The most telling sentence of a server's log: the handler's own, a worker's exception, the front end's error."""
    messages = [found[1] if (found := _MESSAGE.match(line)) else line for line in log.splitlines()]
    for message in messages:
        if mark in message:
            # The family name in front is for programmers; other exceptions' names say something.
            return re.sub(r"^(?:\w*Error: )(?=[A-Z].*\s)", "", message.partition(mark)[2].strip())
    for pattern in (r"Failed to bind|Address already in use", r"Failed to load model"):
        at = next((index for index, message in enumerate(messages) if re.search(pattern, message)), None)
        if at is not None:
            reasons = [message for message in messages[at : at + 3] if _ERROR.match(message)]
            return " ".join([messages[at], *reasons[:1]])
    errors = [message for message in messages if _ERROR.match(message) and "WorkerInitialization" not in message]
    if errors:
        return errors[0]
    return next((message for message in reversed(messages) if message.strip()), "It said nothing.")
