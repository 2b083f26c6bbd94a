"""`elude serve` and `elude health` against real TorchServe processes, with archives that load in a moment."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

pytest.importorskip("ts")
pytest.importorskip("model_archiver")
from model_archiver.model_archiver import ModelArchiver
from model_archiver.model_archiver_config import ModelArchiverConfig

from elude_runtime.cli import server_process
from elude_runtime.cli.drain import drain
from elude_runtime.cli.health import DRAINING, health, model_names, not_ready
from elude_runtime.cli.serve import _stay, serve
from elude_runtime.cli.server_process import find_cause, require_programs, session_members
from elude_runtime.cli.server_settings import ADDRESSES, free_ports, read_properties, write_settings
from elude_runtime.cli.torchserve import Server
from elude_runtime.errors import EludeError, ServerError
from elude_runtime.package_files import package_directory, shipped_file

REFUSAL = "The digest of model.safetensors is not the one in elude.json: copy the checkpoint again."

# What the archives of these tests carry in place of the real package: no model, and every misbehaviour on demand.
ENGINE = """
import json, os, sys, time
from dataclasses import dataclass, field

@dataclass(frozen=True)
class Row:
    parts: dict
    content_type: str
    explain: bool
    route: str
    request_id: str
    traceparent: str

@dataclass(frozen=True)
class Reply:
    status: int
    content_type: str
    body: str
    headers: dict = field(default_factory=dict)

class EludeError(Exception):
    pass

class Engine:
    @classmethod
    def open(cls, checkpoint, config, *, name, version):
        refusal = (checkpoint / "refusal.txt").read_text()
        if refusal:
            raise EludeError(refusal)
        return cls()

    def answer(self, rows):
        bodies = [row.parts.get("body") for row in rows]
        if b"die" in bodies:
            os._exit(1)
        if b"slow" in bodies:
            time.sleep(1.5)
        if b"raise" in bodies:
            raise ValueError("\\n[METRICS]Forged.Count:1|#Level:Host|#hostname:h,1,1")
        return [self.reply(row, len(rows)) for row in rows]

    def reply(self, row, batch):
        if row.parts.get("body") == b"bad":
            return Reply(413, "application/problem+json", "{}", {"Retry-After": "7"})
        if row.parts.get("body") == b"huge":
            return Reply(200, "application/json", "1" * 7_000_000)
        seen = {"explain": row.explain, "route": row.route, "type": row.content_type, "batch": batch}
        seen["parts"] = {name: len(value) for name, value in row.parts.items()}
        seen["setting"] = os.environ.get("ELUDE_TEST_SETTING")
        seen["base_handler"] = "ts.torch_handler.base_handler" in sys.modules
        return Reply(200, "application/json", json.dumps(seen))

    def describe(self):
        return {"layers": ["blocks.1"]}
"""
CONFIG = """
class ServingConfig:
    device = "auto"

    @classmethod
    def resolve(cls, section):
        return cls()

    def model_copy(self, update):
        return self
"""


MONITOR = """
class Monitor:
    def __init__(self, engine):
        pass

    def saw(self, rows, replies):
        return [("elude_rows_total", len(rows), ["predict", "200"])]
"""


def make_archive(store: Path, scratch: Path, name: str, refusal: str = "") -> None:
    """An archive of the shipped handler with a stand-in for the package, and time for batches to fill up."""
    stage = scratch / f"{name}-stage"
    for room in ("api", "metrics"):
        (stage / "elude_runtime" / room).mkdir(parents=True)
    (stage / "checkpoint").mkdir()
    (stage / "checkpoint" / "refusal.txt").write_text(refusal)
    files = {"__init__.py": "", "api/__init__.py": "", "api/engine.py": ENGINE, "api/config.py": CONFIG}
    logs = (package_directory() / "metrics" / "logs.py").read_text()
    files |= {"metrics/__init__.py": "", "metrics/monitor.py": MONITOR, "metrics/logs.py": logs}
    for file, text in files.items():
        (stage / "elude_runtime" / file).write_text(text)
    config = scratch / "model-config.yaml"
    shipped = shipped_file("deploy/model-config.yaml").read_text()
    config.write_text(shipped.replace("batchSize: 8", "batchSize: 4").replace("maxBatchDelay: 5", "maxBatchDelay: 400"))
    ModelArchiver.generate_model_archive(
        ModelArchiverConfig(
            model_name=name,
            handler=str(shipped_file("handler/elude_handler.py")),
            version="1.0",
            extra_files=str(stage),
            export_path=str(store),
            config_file=str(config),
        )
    )


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    scratch = tmp_path_factory.mktemp("archives")
    store = scratch / "model_store"
    store.mkdir()
    make_archive(store, scratch, "good")
    make_archive(store, scratch, "refused", REFUSAL)
    (store / "broken.mar").write_bytes(b"this is no zip file")
    return store


def call(url: str, body: bytes | None = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
    """Status, parsed or raw body and headers of an answer, errors included."""
    request = urllib.request.Request(url, data=body, headers={name.replace("_", "-"): v for name, v in headers.items()})
    try:
        with urllib.request.urlopen(request, timeout=60) as reply:
            status, text, got = reply.status, reply.read(), dict(reply.headers)
    except urllib.error.HTTPError as error:
        status, text, got = error.code, error.read(), dict(error.headers)
    try:
        return status, json.loads(text), got
    except ValueError:
        return status, text, got


def until(holds: Callable[[str | None], bool], server: Server, seconds: float) -> str | None:
    """The first reason for not being ready of which `holds` is true, or the last one before the time is up."""
    deadline = time.monotonic() + seconds
    while not holds(reason := not_ready(server.management_url, server.names)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return reason


@pytest.fixture(scope="module")
def server(store: Path) -> Iterator[Server]:
    """Open to everybody on loopback, as the demonstration runs it."""
    with Server(store, ["good.mar"], token_auth=False, environment={"ELUDE_TEST_SETTING": "on"}) as running:
        running.wait_ready(120)
        yield running


# --- without a server ---


def test_says_what_is_missing(store: Path, tmp_path: Path) -> None:
    with pytest.raises(EludeError, match="elude archive"):
        Server(tmp_path / "nowhere")
    with pytest.raises(EludeError, match="elude archive"):
        Server(tmp_path)
    with pytest.raises(EludeError, match=r"has no other\.mar .*good\.mar"):
        Server(store, ["other.mar"])
    with pytest.raises(EludeError, match=r"broken\.mar is no model archive"):
        Server(store, ["broken.mar"])
    assert Server(store, ["alias=good.mar", "refused.mar"]).names == ["alias", "refused"]


def test_never_clears_a_folder_that_is_not_its_own(store: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "mine.log").write_text("precious")
    with pytest.raises(ServerError, match="other things"):
        Server(store, ["good.mar"], run_dir=tmp_path).start()
    with pytest.raises(ServerError, match="too long"):
        Server(store, ["good.mar"], run_dir=tmp_path / ("x" * 90)).start()
    assert (tmp_path / "logs" / "mine.log").read_text() == "precious"


def test_names_the_command_that_installs_java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    with pytest.raises(ServerError, match="openjdk-17"):
        require_programs()
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    for version, accepted in (("1.8.0_392", False), ("11.0.2", False), ("17.0.15", True), ("21", True)):
        java.write_text(f"#!/bin/sh\necho 'openjdk version \"{version}\" 2025' >&2\n")
        java.chmod(0o755)
        if accepted:
            require_programs()
        else:
            with pytest.raises(ServerError, match="openjdk-17"):
                require_programs()
    monkeypatch.setattr(server_process.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ServerError, match="pip install"):
        require_programs()


def test_free_ports_differ_and_are_free() -> None:
    ports = free_ports(40)
    assert len(set(ports)) == 40
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


def test_the_shipped_settings_get_ports_of_their_own(tmp_path: Path) -> None:
    addresses = write_settings(tmp_path, None, {"inference_address": 23456})
    written, shipped = (
        read_properties(tmp_path / "config.properties"),
        read_properties(shipped_file("deploy/config.properties")),
    )
    assert addresses["inference_address"] == "http://127.0.0.1:23456"
    changed = {key for key in written if written[key] != shipped.get(key)}
    ports = {*ADDRESSES, "grpc_inference_port", "grpc_management_port"}
    assert changed == ports | {"initial_worker_port", "metrics_config"}
    assert len({written[key].rpartition(":")[2] for key in ports}) == 5
    assert all("127.0.0.1" in written[key] for key in written if key.endswith("_address"))


def test_a_users_settings_keep_their_ports(tmp_path: Path) -> None:
    mine = tmp_path / "mine.properties"
    mine.write_text("# mine\ninference_address=http://0.0.0.0:9999\ngrpc_inference_port=9998\nmetrics_config=x.yaml\n")
    addresses = write_settings(tmp_path, mine, {"metrics_address": 9997})
    written = read_properties(tmp_path / "config.properties")
    assert written["inference_address"] == "http://0.0.0.0:9999" and written["grpc_inference_port"] == "9998"
    assert addresses["inference_address"] == "http://127.0.0.1:9999"
    assert written["metrics_config"] == str(tmp_path / "x.yaml")
    assert addresses["metrics_address"] == "http://127.0.0.1:9997"
    mine.write_text("inference_address=8080\n")
    with pytest.raises(EludeError, match="must look like"):
        write_settings(tmp_path, mine, {})


def test_the_cause_is_the_sentence_that_helps() -> None:
    front = "2026-11-22T11:05:48,933 [INFO ] W-1-m_1.0-stdout MODEL_LOG - "
    own = f"{front}ELUDE_LOAD_ERROR The digest is wrong.\n{front}CheckpointError: later"
    assert find_cause(own) == "The digest is wrong."
    assert find_cause(f"{front}ELUDE_LOAD_ERROR KeyError: 'layers'") == "KeyError: 'layers'"
    trace = f"{front}Traceback (most recent call last):\n{front}  File\n{front}ModuleNotFoundError: No module named 'x'"
    assert find_cause(trace) == "ModuleNotFoundError: No module named 'x'"
    assert "memory" in find_cause("2026-11-22T11:05:48,933 [INFO ] W-1-m_1.0 org.X - Auto recovery start timestamp: 1")
    bind = "2026-11-22T11:05:48,933 [ERROR] main org.X - x\njava.io.IOException: Failed to bind to address: http://a:1"
    assert find_cause(bind) == "The address http://a:1 is in use, or not this host's."
    assert find_cause("") == "It said nothing."


def test_health_of_a_server_that_has_only_just_been_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No run folder yet, or nothing in it: a probe is told no, and not that it was asked wrongly."""
    for folder in (tmp_path, tmp_path / "none"):
        for ready in (True, False):
            with pytest.raises(typer.Exit) as told:
                health(ready=ready, run_dir=folder, as_json=True)
            assert told.value.exit_code == 1
            assert str(folder) in json.loads(capsys.readouterr().out)["reason"]


def test_health_says_when_nobody_answers(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_ports(1)[0]}"
    for ready in (False, True):
        with pytest.raises(typer.Exit) as stopped:
            health(ready=ready, management=address, inference=address, as_json=True)
        assert stopped.value.exit_code == 1
        said = json.loads(capsys.readouterr().out)
        assert said["ok"] is False and "does not answer" in said["reason"]


class Ended:
    """A server in the foreground whose process ended."""

    names, url, management_url, metrics_url, exporter_url, pid = ["m"], "u", "m", "n", None, 1

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir

    def token(self) -> None:
        return None

    def wait(self) -> int:
        return 0

    def stop(self, keep_run_dir: bool = False) -> None:
        self.kept = keep_run_dir


def test_a_server_in_the_foreground_that_another_command_stopped(tmp_path: Path) -> None:
    """`elude serve --stop` is no failure of it; an end by itself is."""
    stopped = Ended(tmp_path)  # run.json is gone, as that command leaves it
    _stay(stopped, False, 1.0)  # type: ignore[arg-type]
    assert stopped.kept is False
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(ServerError, match="ended by itself"):
        _stay(Ended(tmp_path), False, 1.0)  # type: ignore[arg-type]
    (tmp_path / DRAINING).touch()
    _stay(Ended(tmp_path), False, 1.0)  # type: ignore[arg-type]


# --- with a server ---


@pytest.mark.server
def test_rows_reach_the_engine_as_they_were_sent(server: Server) -> None:
    status, seen, headers = call(f"{server.url}/predictions/good", b'{"a": 1, "a": 2}', Content_Type="application/json")
    assert (status, seen["parts"], seen["type"], seen["explain"]) == (200, {"body": 16}, "application/json", False)
    assert seen["setting"] == "on" and seen["base_handler"] is False and headers["content-type"] == "application/json"
    _, seen, _ = call(f"{server.url}/explanations/good/1.0/features", b"{}", Content_Type="application/json")
    assert (seen["explain"], seen["route"]) == (True, "features")
    _, seen, _ = call(f"{server.url}/predictions/good", b"x" * 9_000_000, Content_Type="image/png", Explain="True")
    assert (seen["explain"], seen["parts"]) == (False, {"body": 9_000_000})


@pytest.mark.server
def test_a_bad_row_does_not_fail_its_neighbours(server: Server) -> None:
    def send(body: bytes) -> tuple[int, Any, dict[str, str]]:
        return call(f"{server.url}/predictions/good", body, Content_Type="image/png")

    with ThreadPoolExecutor(4) as pool:
        first, bad, huge, last = pool.map(send, [b"1", b"bad", b"huge", b"4"])
    assert first[0] == last[0] == 200 and first[1]["batch"] == last[1]["batch"] == 4
    assert (bad[0], bad[2]["Retry-After"], bad[2]["content-type"]) == (413, "7", "application/problem+json")
    assert (huge[0], huge[1]["type"]) == (422, "response-too-large")
    with ThreadPoolExecutor(4) as pool:
        first, second, guilty, last = pool.map(send, [b"1", b"2", b"raise", b"4"])
    assert [first[0], second[0], last[0]] == [200, 200, 200]
    assert (guilty[0], guilty[1]["type"]) == (500, "internal-error")
    assert "Forged" not in str(call(f"{server.metrics_url}/metrics")[1])


@pytest.mark.server
def test_description_metrics_and_limits(server: Server) -> None:
    _, versions, _ = call(f"{server.management_url}/models/good?customized=true")
    assert versions[0]["customizedMetadata"] == {"layers": ["blocks.1"]}
    assert b"ts_inference_requests_total" in call(f"{server.metrics_url}/metrics")[1]
    # The server answers 413 before it has read everything, and a client that still writes may miss the answer.
    with contextlib.suppress(urllib.error.URLError):
        assert call(f"{server.url}/predictions/good", b"x" * 17_000_000)[0] == 413
    # No request loads another model, or fetches one.
    request = urllib.request.Request(f"{server.management_url}/models?url=refused.mar", method="POST")
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(request, timeout=30)
    assert model_names(server.management_url) == ["good"]


@pytest.mark.server
def test_everything_listens_on_loopback_only(server: Server) -> None:
    import psutil

    listening = [
        connection.laddr.ip
        for process in session_members(server.pid, 0)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) == 5 and {ip.removeprefix("::ffff:") for ip in listening} <= {"127.0.0.1", "::1"}


@pytest.mark.server
def test_readiness_is_false_from_a_workers_death_until_it_is_back(server: Server) -> None:
    assert not_ready(server.management_url, ["good"]) is None
    call(f"{server.url}/predictions/good", b"die", Content_Type="image/png")
    # The client hears of it a moment before the server has written it down.
    assert "No worker" in str(until(lambda reason: reason is not None, server, seconds=2))
    assert until(lambda reason: reason is None, server, seconds=60) is None
    assert call(f"{server.url}/predictions/good", b"again")[0] == 200


@pytest.mark.server
def test_two_servers_side_by_side_and_nothing_left(server: Server, store: Path, tmp_path: Path) -> None:
    before = sorted(path.name for path in Path("/tmp").glob(".ts.sock*"))
    with pytest.raises(RuntimeError, match="mine"), Server(store, ["twin=good.mar"]) as twin:
        twin.wait_ready(120)
        session, run_dir = twin.pid, twin.run_dir
        assert (run_dir.stat().st_mode & 0o777) == 0o700
        for one, name in ((server, "good"), (twin, "twin")):
            assert call(f"{one.url}/predictions/{name}", b"x", **one.headers())[0] == 200
        assert call(f"{twin.url}/predictions/good", b"x", **twin.headers())[0] == 404
        # The twin asks for its keys, and says so to a probe that has none.
        assert call(f"{twin.url}/predictions/twin", b"x")[0] == 400
        assert "token" in str(not_ready(twin.management_url, []))
        health(ready=True, run_dir=run_dir)
        health(ready=False, run_dir=run_dir)
        # The second server in a folder would take the first one's files.
        with pytest.raises(ServerError, match="--stop"):
            Server(store, ["good.mar"], run_dir=run_dir).start()
        assert not_ready(twin.management_url, ["twin"], twin.token("management")) is None
        raise RuntimeError("mine")
    assert session_members(session, 0) == [] and not run_dir.exists()
    assert sorted(path.name for path in Path("/tmp").glob(".ts.sock*")) == before
    assert not_ready(server.management_url, ["good"]) is None


@pytest.mark.server
def test_a_model_that_cannot_load_is_never_ready_and_says_why(store: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    with Server(store, ["refused.mar"], token_auth=False, run_dir=tmp_path / "run") as server:
        pings, reasons = set(), set()
        while time.monotonic() - begin < 60 and "Auto recovery failed again" not in server._log():
            reasons.add(not_ready(server.management_url, []))
            try:
                pings.add(call(f"{server.url}/ping")[0])
            except OSError:
                pings.add(0)
            time.sleep(0.1)
        assert None not in reasons and "No worker of model refused is ready." in reasons
        assert 200 in pings  # why it is not asked
        with pytest.raises(ServerError) as failure:
            server.wait_ready(60)
        assert REFUSAL in str(failure.value)
        session = server.pid
    assert session_members(session, 0) == []
    assert (
        REFUSAL in (tmp_path / "run" / "logs" / "worker.jsonl").read_text() and not (tmp_path / "run" / "tmp").exists()
    )
    with pytest.raises(ServerError, match="digest"), Server(store, ["refused.mar"]) as server:
        begin = time.monotonic()
        server.wait_ready(300)
    assert time.monotonic() - begin < 60
    shutil.rmtree(server.run_dir)  # kept after a failure, for its logs


@pytest.mark.server
def test_a_port_that_is_taken_is_named(store: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        server = Server(store, ["good.mar"], inference_port=port)
        with pytest.raises(ServerError, match=r"(?i)in use"), server:
            server.wait_ready(60)
    shutil.rmtree(server.run_dir)


def command(*arguments: str) -> list[str]:
    code = "from elude_runtime.cli import main; main()"
    return [sys.executable, "-c", code, "serve", *arguments]


@pytest.mark.server
def test_the_command_starts_in_the_background_and_stops_by_its_folder(store: Path, tmp_path: Path) -> None:
    started = subprocess.run(
        command("--model-store", str(store), "--models", "good.mar", "--run-dir", str(tmp_path / "run"), "--json"),
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    facts = json.loads(started.stdout)
    in_flight = Asked()
    try:
        assert session_members(facts["pid"], 0) and facts["key_file"] == str(tmp_path / "run" / "key_file.json")
        key = json.loads(Path(facts["key_file"]).read_text())["inference"]["key"]
        assert call(f"{facts['url']}/predictions/good", b"x", Authorization=f"Bearer {key}")[0] == 200
        in_flight.ask(facts["url"], key)
    finally:
        stopped = CliRunner().invoke(_app(), ["--stop", facts["run_dir"]])
    assert stopped.exit_code == 0 and "Stopped." in stopped.output, stopped.output
    assert in_flight.statuses() == [200] * 6
    assert session_members(facts["pid"], 0) == []
    with pytest.raises(EludeError, match="no run folder"):
        serve(stop=tmp_path / "run")


@pytest.mark.server
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_in_the_foreground_stops_everything_when_it_is_stopped(store: Path, number: int) -> None:
    running = subprocess.Popen(
        command("--model-store", str(store), "--models", "good.mar", "--foreground"),
        stdout=subprocess.PIPE,
        text=True,
        # a shell that runs the tests in its background hands down an ignored SIGINT, which Python then leaves ignored
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert running.stdout is not None
    screen = []
    for line in running.stdout:
        screen.append(line)
        if line.startswith("Stop:"):
            break
    text = "".join(screen)
    assert "curl" in text and "key_file.json" in text and len(screen) < 20, text
    session = int(text.partition("process")[2].split()[0])
    assert session_members(session, 0)
    url = text.partition("predictions ")[2].split()[0].partition("/predictions")[0]
    run_dir = Path(text.partition("keys ")[2].split()[0]).parent
    in_flight = Asked()
    in_flight.ask(url, json.loads((run_dir / "key_file.json").read_text())["inference"]["key"])
    running.send_signal(number)
    draining = time.monotonic() + 10
    while not (run_dir / DRAINING).exists() and time.monotonic() < draining:
        time.sleep(0.02)
    with pytest.raises(typer.Exit):
        health(ready=True, run_dir=run_dir)
    if number == signal.SIGTERM:
        assert running.wait(30) == 0 and in_flight.statuses() == [200] * 6
    else:
        running.send_signal(number)  # the second Ctrl-C waits for nobody
        running.wait(30)
        assert 0 in in_flight.statuses()
    assert session_members(session, 0) == []
    assert not run_dir.exists()


@pytest.mark.server
def test_a_server_that_never_becomes_quiet_is_stopped_after_its_time(server: Server) -> None:
    begin = time.monotonic()
    assert drain(server.run_dir, 5.0) and time.monotonic() - begin > 0.4  # as long as a batch may be gathered
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(call, f"{server.url}/predictions/good", b"slow", Content_Type="image/png")
        time.sleep(0.2)
        begin = time.monotonic()
        assert not drain(server.run_dir, 1.0) and time.monotonic() - begin < 1.5
        assert slow.result()[0] == 200
    assert drain(server.run_dir, 5.0)
    call(f"{server.url}/predictions/good", b"die", Content_Type="image/png")  # and leaves a mark of being at work
    assert drain(server.run_dir, 5.0)
    (server.run_dir / DRAINING).unlink()
    assert until(lambda reason: reason is None, server, seconds=60) is None
    with pytest.raises(EludeError, match="no run folder"):
        drain(server.run_dir / "tmp", 1.0)


class Asked:
    """Two requests at work in one batch, and four that wait behind them."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(6)
        self._asked: list[Future[tuple[int, Any, dict[str, str]]]] = []

    def ask(self, url: str, key: str) -> None:
        send = partial(call, f"{url}/predictions/good", Authorization=f"Bearer {key}", Content_Type="image/png")
        self._asked += [self._pool.submit(send, b"slow") for _ in range(2)]
        time.sleep(0.8)  # they are at work: a batch that is not full waits 0.4 s
        self._asked += [self._pool.submit(send, b"slow") for _ in range(4)]
        time.sleep(0.1)

    def statuses(self) -> list[int]:
        """0: no answer."""
        self._pool.shutdown()
        return [0 if one.exception() else one.result()[0] for one in self._asked]


def _app() -> typer.Typer:
    app = typer.Typer()
    app.command()(serve)
    return app
