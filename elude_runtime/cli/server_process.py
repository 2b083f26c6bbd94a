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


def read_record(run_dir: Path) -> tuple[int, float]:
    """Session id and start time (seconds of the epoch) of the server in this run folder."""
    try:
        record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
        return int(record["pid"]), float(record["started"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EludeError(f"{run_dir} is no run folder of `elude serve`: run.json cannot be read.") from error


def session_members(session: int, started: float) -> list[psutil.Process]:
    """The living processes of a session: launcher, Java, workers, also those whose parent is gone.

    `started`: none that is older than the server (but for a clock that was set), for the system may have given its
    number to somebody else since.
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

    The order matters: Java, asked first, ends its workers (a worker that is ended under it is started anew), and the
    launcher, which leads the session, ends by itself after Java, having reaped it.
    """
    asked: set[int] = set()
    seen: set[int] = set()
    begin = time.monotonic()
    while members := session_members(session, started):
        waited = time.monotonic() - begin
        if waited > grace + 10:
            raise ServerError(f"Processes {[member.pid for member in members]} of the server do not end.")
        seen.update(member.pid for member in members)
        followers = [member for member in members if member.pid != session]
        java = [member for member in followers if _parent(member) == session]
        for member in members if waited > grace else java or followers or (members if waited > 2 else []):
            with contextlib.suppress(psutil.Error):
                if waited > grace:
                    member.kill()
                elif member.pid not in asked:
                    asked.add(member.pid)
                    member.terminate()
        time.sleep(0.05)
    return len(seen)


def _parent(process: psutil.Process) -> int | None:
    with contextlib.suppress(psutil.Error):
        return int(process.ppid())
    return None


def find_cause(log: str, mark: str = "ELUDE_LOAD_ERROR") -> str:
    """The most telling sentence of a server's log: the handler's own, a worker's exception, the front end's error."""
    messages = [_message(found[1] if (found := _MESSAGE.match(line)) else line) for line in log.splitlines()]
    for message in messages:
        if mark in message:
            return message.partition(mark)[2].strip()
    if taken := re.search(r"Failed to bind to address: (\S+)", log):
        return f"The address {taken[1]} is in use, or not this host's."
    for index, message in enumerate(messages):
        if "Failed to load model" in message:
            return " ".join([message, *[after for after in messages[index + 1 : index + 3] if _ERROR.match(after)][:1]])
    errors = [message for message in messages if _ERROR.match(message) and "WorkerInitialization" not in message]
    if errors:
        return errors[0]
    if "Auto recovery start" in log:
        return "The worker ended without a word; it may have been killed for lack of memory."
    return next((message for message in reversed(messages) if message.strip()), "It said nothing.")


def _message(line: str) -> str:
    """What a line of the worker says: the message of one in JSON."""
    if line.startswith('{"time"'):
        with contextlib.suppress(ValueError, KeyError):
            return str(json.loads(line)["message"])
    return line
