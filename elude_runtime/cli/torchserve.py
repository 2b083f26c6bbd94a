"""A TorchServe of one's own: started with the shipped configuration in a private folder, and stopped completely."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from elude_runtime.cli.archive_digest import check_archives
from elude_runtime.cli.drain import BUSY
from elude_runtime.cli.exporter_process import METRICS_DIR, ExporterProcess
from elude_runtime.cli.health import DRAINING, not_ready, read_keys
from elude_runtime.cli.server_process import (
    WORKER_STOPPED,
    find_cause,
    read_record,
    require_programs,
    session_members,
    stop_session,
)
from elude_runtime.cli.server_settings import ADDRESSES, named_ports, write_settings
from elude_runtime.errors import EludeError, ServerError

# The path of a Unix domain socket has 107 bytes at most; TorchServe's is TEMP/.ts.sock.12345.
_LONGEST_TEMP = 90


class Server:
    """A TorchServe process as a context manager: started on entry, gone with all of its workers after it.

        with Server(Path("model_store"), ["demo.mar"]) as server:
            server.wait_ready()
            httpx.post(f"{server.url}/predictions/demo", headers=server.headers(), content=image)

    Several run side by side on one host. Ports that are not given are free ones.
    """

    def __init__(
        self,
        model_store: Path,
        models: Sequence[str] | None = None,
        *,
        inference_port: int | None = None,
        management_port: int | None = None,
        metrics_port: int | None = None,
        exporter_port: int | None = None,
        config: Path | None = None,
        token_auth: bool = True,
        run_dir: Path | None = None,
        environment: Mapping[str, str] | None = None,
        log_stdout: bool = False,
        expect: Mapping[str, str] | None = None,
    ) -> None:
        """`models`: archives in the store, `FILE.mar` or `NAME=FILE.mar`; all by default. `config`: a config.properties
        in place of the shipped one. `run_dir`: kept after the end, where a temporary one is removed. `environment`:
        additions to the server's environment, such as `ELUDE_…` settings; with ELUDE_METRICS_DIR among them, or in this
        process's own environment, somebody else serves the workers' metrics, and no exporter is started. `log_stdout`:
        the log as JSON lines on this process's standard output too. `expect`: SHA-256 digests of the archives by file
        name, checked before anything is started.

        Raises `EludeError` for a store or an archive that is missing, or an archive that is not the expected one.
        """
        self.model_store = Path(model_store).resolve()
        self._models = _find_models(self.model_store, models)
        check_archives(self.model_store, [a.rpartition("=")[2] for a in self._models], dict(expect or {}))
        self._ports = dict(zip(ADDRESSES, (inference_port, management_port, metrics_port), strict=True))
        self._config = config
        self._token_auth = token_auth
        self._run_dir = run_dir.resolve() if run_dir else None
        self._temporary = run_dir is None
        self._environment = {**os.environ, **(environment or {})}
        self._log_stdout = log_stdout
        self._exporter = None if self._environment.get(METRICS_DIR) else ExporterProcess(exporter_port)
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._addresses: dict[str, str] = {}

    @property
    def url(self) -> str:
        """The inference address."""
        return self._address("inference_address")

    @property
    def management_url(self) -> str:
        """The address that lists models and workers."""
        return self._address("management_address")

    @property
    def metrics_url(self) -> str:
        """Prometheus' text is at `/metrics` of this address, for everybody."""
        return self._address("metrics_address")

    @property
    def exporter_url(self) -> str | None:
        """Metrics that TorchServe's port cannot carry, at `/metrics`; None where no exporter was started."""
        return self._exporter.url if self._exporter else None

    @property
    def run_dir(self) -> Path:
        """Holds config.properties, key_file.json, run.json and `logs/`; readable by its owner only."""
        if self._run_dir is None:
            raise ServerError("The server was not started.")
        return self._run_dir

    @property
    def pid(self) -> int:
        """The launcher's process id, and the id of the session of all of the server's processes."""
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process.pid

    @property
    def names(self) -> list[str]:
        """The names under which the models answer."""
        return list(self._models.values())

    def token(self, purpose: str = "inference") -> str | None:
        """The key for `inference`, `management` or `API` (asking for new keys); None without token authorization."""
        return read_keys(self.run_dir).get(purpose) if self._token_auth else None

    def headers(self, purpose: str = "inference") -> dict[str, str]:
        """The request headers that carry the key."""
        token = self.token(purpose)
        return {"Authorization": f"Bearer {token}"} if token else {}

    def __enter__(self) -> Server:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # After a failure the logs are the only witnesses.
        self.stop(keep_run_dir=isinstance(error, ServerError))

    def start(self) -> Server:
        """Starts the process and returns at once, long before a model is loaded; see `wait_ready`."""
        require_programs()
        self._prepare_run_dir()
        self._addresses = write_settings(self.run_dir, self._config, self._ports, log_stdout=self._log_stdout)
        # The module instead of the `torchserve` script: workers get this very interpreter, whatever stands on PATH.
        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs"]
        command += ["--ts-config", "config.properties", "--log-config", "log4j2.xml"]
        command += ["--model-store", str(self.model_store)]
        command += [] if self._token_auth else ["--disable-token-auth"]
        command += ["--models", *self._models]
        self._started = time.time()
        with (self.run_dir / "console.log").open("wb") as console:
            self._process = subprocess.Popen(
                command,
                cwd=self.run_dir,  # where TorchServe writes key_file.json
                env=self._child_environment(),
                stdin=subprocess.DEVNULL,
                stdout=None if self._log_stdout else console,
                stderr=subprocess.STDOUT,
                # A session of its own: Ctrl-C reaches only us, and every descendant can be found again.
                start_new_session=True,
            )
        try:
            if self._exporter is not None:
                metrics, log = self.run_dir / "metrics", self.run_dir / "logs" / "exporter.log"
                self._exporter.start(metrics, log, self.pid, named_ports(self.run_dir))
            addresses = {"url": self.url, "management_url": self.management_url, "metrics_url": self.metrics_url}
            record = {"pid": self.pid, "started": self._started, **addresses, "models": self.names}
            record["temporary"] = self._temporary
            if self._exporter is not None:
                record |= {"exporter_url": self._exporter.url, "exporter_pid": self._exporter.pid}
            (self.run_dir / "run.json").write_text(json.dumps(record, indent=2), encoding="utf-8")
        except BaseException:
            self.stop()
            raise
        return self

    def wait_ready(self, timeout: float = 300.0, poll: float = 0.2) -> None:
        """Returns when every model has a READY worker, of which it asks every `poll` seconds; raises `ServerError` with
        the real cause as soon as one dies."""
        deadline = time.monotonic() + timeout
        reason: str | None = "it did not answer."
        while time.monotonic() < deadline:
            if self._process is None:
                raise ServerError("The server is not running.")
            if self._process.poll() is not None or WORKER_STOPPED.search(self._log()):
                time.sleep(0.5)  # the worker's own words may come after what the front end says of it
                raise self._failure(f"TorchServe did not start: {find_cause(self._log())}")
            if self._exporter is not None and (reason := self._exporter.ended()):
                raise self._failure(reason)
            reason = not_ready(self.management_url, self.names, self._management_token(), timeout=5.0)
            if reason is None:
                return
            time.sleep(poll)
        raise self._failure(f"TorchServe was not ready after {timeout:.0f} s: {reason}")

    def wait(self) -> int:
        """Returns the exit status when the server ends by itself."""
        if self._process is None:
            raise ServerError("The server is not running.")
        return self._process.wait()

    def stop(self, *, keep_run_dir: bool = False) -> None:
        """Ends every process of the server; may be called twice."""
        if self._process is not None:
            try:
                stop_session(self._process.pid, self._started)
            except KeyboardInterrupt:  # twice Ctrl-C: at once, but completely
                stop_session(self._process.pid, self._started, grace=0)
                raise
            self._process.wait()
            self._process = None
        if self._exporter is not None:
            self._exporter.stop()
        if self._run_dir is not None:
            _clean_run_dir(self._run_dir, remove=self._temporary and not keep_run_dir)

    def _failure(self, reason: str) -> ServerError:
        return ServerError(f"{reason} (logs in {self.run_dir / 'logs'})")

    def _address(self, key: str) -> str:
        if not self._addresses:
            raise ServerError("The server was not started.")
        return self._addresses[key]

    def _prepare_run_dir(self) -> None:
        """A private folder, cleared of an earlier run; refuses one in which a server runs, and one that is not ours."""
        if self._run_dir is None:
            self._run_dir = Path(tempfile.mkdtemp(prefix="elude-serve-"))
        elif (self._run_dir / "run.json").exists():
            pid, started = read_record(self._run_dir)
            if session_members(pid, started):
                raise ServerError(f"A server runs in {self._run_dir}; stop it with: elude serve --stop {self._run_dir}")
        elif self._run_dir.exists() and any(self._run_dir.iterdir()) and not (self._run_dir / "log4j2.xml").exists():
            raise ServerError(f"{self._run_dir} holds other things; give a new or empty folder.")
        if len(os.fsencode(self._run_dir / "tmp")) > _LONGEST_TEMP:
            raise ServerError(f"The path {self._run_dir} is too long for TorchServe's sockets; give a shorter one.")
        self._run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir.chmod(0o700)  # the keys are in it
        _clean_run_dir(self._run_dir, remove=False)
        shutil.rmtree(self._run_dir / "logs", ignore_errors=True)
        for folder in ("tmp", "logs", "metrics"):
            (self._run_dir / folder).mkdir()

    def _child_environment(self) -> dict[str, str]:
        environment = dict(self._environment)
        environment.pop("TS_CONFIG_FILE", None)  # it would go before our configuration
        environment.setdefault(METRICS_DIR, str(self.run_dir / "metrics"))
        temporary, logs = str(self.run_dir / "tmp"), str(self.run_dir / "logs")
        environment[BUSY] = temporary
        # a worker that is started again finds what the first one compiled, and nobody else's code
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(temporary) / "compiled"))
        # TMPDIR is Python's; TEMP becomes Java's, for unpacked archives and the workers' sockets.
        return {**environment, "TMPDIR": temporary, "TEMP": temporary, "LOG_LOCATION": logs, "METRICS_LOCATION": logs}

    def _management_token(self) -> str | None:
        try:
            return self.token("management")
        except ServerError:  # it is being written
            return None

    def _log(self) -> str:
        """What TorchServe and its workers logged, after what the launcher and Java printed."""
        names = ["console.log", "logs/ts_log.log", "logs/worker.jsonl"]
        files = [self.run_dir / name for name in names]
        return "\n".join(file.read_text(encoding="utf-8", errors="replace") for file in files if file.is_file())


def stop_server(run_dir: Path) -> int:
    """Stops the server of a run folder, from any process; gives the number of processes that it ended.

    Keeps the folder's logs if the folder was chosen by the user.
    """
    pid, started = read_record(run_dir)
    record = json.loads((run_dir / "run.json").read_text(encoding="utf-8"))
    count = stop_session(pid, started)
    if "exporter_pid" in record:
        count += stop_session(int(record["exporter_pid"]), started)
    temporary = record.get("temporary") is True
    _clean_run_dir(run_dir, remove=temporary)
    return count


def _clean_run_dir(run_dir: Path, *, remove: bool) -> None:
    """Removes what is large or secret: unpacked archives and keys; or the whole folder."""
    if remove:
        shutil.rmtree(run_dir, ignore_errors=True)
        return
    for name in ("tmp", "metrics"):
        shutil.rmtree(run_dir / name, ignore_errors=True)
    for name in ("key_file.json", "run.json", DRAINING):
        (run_dir / name).unlink(missing_ok=True)


def _find_models(store: Path, models: Sequence[str] | None) -> dict[str, str]:
    """TorchServe's `--models` arguments, each with the name under which its model will answer."""
    hint = f"make an archive with: elude archive CKPT --out {store}"
    if not store.is_dir():
        raise EludeError(f"The model store {store} does not exist; {hint}")
    arguments = list(models or sorted(file.name for file in store.glob("*.mar")))
    if not arguments:
        raise EludeError(f"The model store {store} has no archive (.mar); {hint}")
    found = {}
    for argument in arguments:
        name, _, file = argument.rpartition("=")
        if not (store / file).is_file():
            known = ", ".join(sorted(entry.name for entry in store.glob("*.mar"))) or "none"
            raise EludeError(f"The model store {store} has no {file} (it has: {known}).")
        try:
            with zipfile.ZipFile(store / file) as archive:
                manifest = json.loads(archive.read("MAR-INF/MANIFEST.json"))
            found[argument] = name or str(manifest["model"]["modelName"])
        except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
            raise EludeError(f"{store / file} is no model archive, or a damaged one: {error}") from error
    return found
