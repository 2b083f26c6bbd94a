"""The image's own command, user and files, run in a sandbox as a container engine would: read-only, as process 1."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from demo_archive import demo_archive
from deploy_files import DEPLOY, check_call, container, dockerfile, exec_form, load
from sandbox import OUTSIDE, REPOSITORY, Sandbox, require_namespaces

pytest.importorskip("ts")

pytestmark = pytest.mark.server

ASK = """
import json, sys, urllib.error, urllib.request
address, file = sys.argv[1:3]
body = open(file, 'rb').read() if file else None
request = urllib.request.Request(address, body, {'Content-Type': 'image/png'} if body else {})
try:
    reply = urllib.request.urlopen(request, timeout=30)
    print(reply.status, reply.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(0, error)
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration network, calibrated on a handful of pictures; beside it a picture to ask about."""
    return demo_archive(tmp_path_factory.mktemp("archive"))


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory, archive: Path) -> Iterator[Sandbox]:
    """ENTRYPOINT and CMD without tini, so that the program itself is process 1: no easier than in the image."""
    require_namespaces()
    (user,) = [rest for word, rest in dockerfile()["serving"] if word == "USER"]
    command = [*exec_form("serving", "ENTRYPOINT"), *exec_form("serving", "CMD")]
    assert command[:3] == ["tini", "--", "elude"]
    files = {
        "/etc/elude/config.properties": DEPLOY / "container" / "config.properties",
        "/etc/elude/metrics.yaml": DEPLOY / "metrics.yaml",
        "/models/demo.mar": archive,
        "/models/picture.png": next((archive.parents[1] / "images").rglob("*.png")),
        "/models/ask.py": _script(tmp_path_factory.mktemp("ask") / "ask.py"),
    }
    environment = {"ELUDE_THREADS": "1", "OMP_NUM_THREADS": "1", "ELUDE_METRICS_DIR": "/metrics"}
    folder = tmp_path_factory.mktemp("sandbox")
    with Sandbox(folder, command[2:], user=user, files=files, environment=environment) as sandbox:
        yield sandbox


def _script(file: Path) -> Path:
    file.write_text(ASK, encoding="utf-8")
    return file


def healthy(sandbox: Sandbox) -> tuple[int, str]:
    said = sandbox.execute(exec_form("serving", "HEALTHCHECK"))
    return said.returncode, said.stdout + said.stderr


def until_healthy(sandbox: Sandbox) -> list[tuple[int, str]]:
    """What the health check said until it held, for at most five minutes."""
    answers = []
    deadline = time.monotonic() + 300
    while not (answers and answers[-1][0] == 0) and time.monotonic() < deadline and sandbox.running():
        answers.append(healthy(sandbox))
        time.sleep(1)
    assert answers and answers[-1][0] == 0, f"{answers[-1:]}\n{sandbox.output.read_text()}"
    return answers


def ask(sandbox: Sandbox, address: str, file: str = "") -> tuple[int, str]:
    """Status and body of an answer, from inside; status 0 and the reason without one."""
    said = sandbox.execute([sys.executable, "/models/ask.py", address, file])
    assert said.returncode == 0, said.stderr
    status, _, body = said.stdout.partition(" ")
    return int(status), body


def test_the_health_check_is_false_until_the_model_is_loaded_and_then_true(started: Sandbox) -> None:
    answers = until_healthy(started)
    assert answers[0][0] == 1 and {status for status, _ in answers} == {0, 1}


def test_predictions_and_metrics_are_reachable_from_outside_and_management_is_not(started: Sandbox) -> None:
    status, body = ask(started, f"http://{OUTSIDE}:8080/predictions/demo", "/models/picture.png")
    assert status == 200 and json.loads(body)["predictions"], body
    assert ask(started, f"http://{OUTSIDE}:8080/ping")[0] == 200  # the liveness probe, without a key
    status, text = ask(started, f"http://{OUTSIDE}:8082/metrics")
    for series in ("ts_queue_latency_microseconds", "ts_inference_requests_total"):
        assert status == 200 and series in text
    assert ask(started, "http://127.0.0.1:8081/models")[0] == 200
    for port in (8081, 7070, 7071):
        status, reason = ask(started, f"http://{OUTSIDE}:{port}/models")
        assert status == 0 and "refused" in reason, f"{port}: {status} {reason}"


def test_the_exporter_beside_it_serves_what_the_worker_wrote(started: Sandbox) -> None:
    """The pod's second container, by the arguments of the manifest."""
    pod = load(DEPLOY / "kubernetes" / "base" / "deployment.yaml")["spec"]["template"]["spec"]
    words = container(pod, "exporter")["args"]
    check_call(words)
    running = started.start(["elude", *words])
    try:
        deadline = time.monotonic() + 60
        status, text = 0, ""
        while status != 200 and time.monotonic() < deadline:
            time.sleep(0.5)
            status, text = ask(started, f"http://{OUTSIDE}:9464/metrics")
        assert status == 200 and re.search(r"^elude_workers\S* 1(\.0)?$", text, re.MULTILINE), text
    finally:
        running.kill()
        running.wait()


def test_the_log_goes_to_the_standard_output(started: Sandbox) -> None:
    """As lines that a collector can parse; after the screen that the command prints once."""
    lines = [line for line in started.output.read_text().splitlines() if line.startswith("{")]
    assert lines and all({"time", "level", "message"} <= set(json.loads(line)) for line in lines)


def test_nothing_was_written_but_in_the_writable_folders(started: Sandbox) -> None:
    """The user is the image's, with no rights; the root is read-only, so that a write elsewhere would have failed."""
    said = started.execute(["sh", "-c", "id -u; grep -E '^(CapEff|CapBnd|NoNewPrivs)' /proc/1/status; ls -A /tmp"])
    words = said.stdout.split()
    assert words[0] == "10001" and words[1:7] == [
        "CapEff:", "0000000000000000", "CapBnd:", "0000000000000000", "NoNewPrivs:", "1",
    ]  # fmt: skip
    host = REPOSITORY.parts[2] if REPOSITORY.parts[1] == "tmp" else None  # the sandbox shows the package in its place
    assert {name for name in words[7:] if name != host and not name.startswith("hsperfdata")} == {"elude"}
    assert started.execute(["touch", "/models/x"]).returncode != 0
    log = started.execute(["cat", "/tmp/elude/logs/ts_log.log", "/tmp/elude/console.log"]).stdout
    assert "Read-only file system" not in log and "Permission denied" not in log
    java = started.execute(["sh", "-c", "cat /proc/*/cmdline | tr '\\0' '\\n'"]).stdout.split("\n")
    assert "-XX:MaxRAMPercentage=25" in java and "-XX:+ExitOnOutOfMemoryError" in java


def test_it_ends_in_order_when_the_platform_says_so(started: Sandbox) -> None:
    """Last: SIGTERM to process 1, which has to handle it itself, and can once it serves."""
    until_healthy(started)
    os.kill(started.pid, signal.SIGTERM)
    assert started.wait(30) == 0, started.output.read_text()
