"""The files with which one TorchServe instance is configured: addresses, log, metrics."""

from __future__ import annotations

import random
import re
import shutil
import socket
from collections.abc import Collection
from pathlib import Path

from elude_runtime.errors import EludeError, ServerError
from elude_runtime.package_files import shipped_file

ADDRESSES = ("inference_address", "management_address", "metrics_address")
_OTHER_PORTS = ("grpc_inference_port", "grpc_management_port", "initial_worker_port")
_ADDRESS = re.compile(r"(https?)://([^:/]+)(?::(\d+))?")

# The log of a server that runs for months must stay bounded. TorchServe's own settings roll once a day without a bound
# on the day, and write everything to the console too. Workers print JSON lines (elude_runtime/metrics/logs.py), and
# whatever their libraries print.
_LOG_SETTINGS = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration>
  <Appenders>
    {appenders}
  </Appenders>
  <Loggers>
    <Logger name="ACCESS_LOG" level="info" additivity="false"><AppenderRef ref="access_log"/></Logger>
    <Logger name="MODEL_LOG" level="info" additivity="false">
      {worker}
    </Logger>
    <Logger name="io.netty" level="error"/>
    <Logger name="org.apache" level="off"/>
    <Root level="info">{front}</Root>
  </Loggers>
</Configuration>
"""
_FILE = """<RollingFile name="{0}" fileName="${{env:LOG_LOCATION}}/{1}" filePattern="${{env:LOG_LOCATION}}/{1}.%i">
      <PatternLayout pattern="{2}"/>
      <Policies><SizeBasedTriggeringPolicy size="20 MB"/></Policies>
      <DefaultRolloverStrategy max="4"/>
    </RollingFile>"""
_CONSOLE = """<Console name="{0}"><PatternLayout><Pattern>{1}</Pattern></PatternLayout></Console>"""
_REFERENCE = """<AppenderRef ref="{0}">
        <RegexFilter regex="[{{]&quot;time&quot;.*" onMatch="{1}" onMismatch="{2}"/>
      </AppenderRef>"""
_LINE = "%d{ISO8601} [%-5p] %t %c - %m%n"
_JSON_LINE = (
    '{"time": "%d{yyyy-MM-dd\'T\'HH:mm:ss.SSS}{UTC}+00:00", "level": "%p", "logger": "%enc{%c}{JSON}", '
    '"message": "%enc{%m%throwable}{JSON}"}%n'
)


def _log_settings(*, stdout: bool) -> str:
    """log4j2.xml: files of a bounded size, and on request everything as JSON lines on the standard output too."""
    appenders = [
        _FILE.format("ts_log", "ts_log.log", _LINE),
        _FILE.format("access_log", "access_log.log", _LINE),
        _FILE.format("worker_log", "worker.jsonl", "%m%n"),
    ]
    json_lines, others = [("worker_log", "ACCEPT", "DENY")], [("ts_log", "DENY", "ACCEPT")]
    front = '<AppenderRef ref="ts_log"/>'
    if stdout:
        appenders += [_CONSOLE.format("stdout", _JSON_LINE), _CONSOLE.format("stdout_raw", "%m%n")]
        json_lines.append(("stdout_raw", "ACCEPT", "DENY"))
        others.append(("stdout", "DENY", "ACCEPT"))
        front += '<AppenderRef ref="stdout"/>'
    return _LOG_SETTINGS.format(
        appenders="\n    ".join(appenders),
        worker="\n      ".join(_REFERENCE.format(*reference) for reference in json_lines + others),
        front=front,
    )


def write_settings(
    run_dir: Path, config: Path | None, ports: dict[str, int | None], *, log_stdout: bool = False
) -> dict[str, str]:
    """Writes config.properties, metrics.yaml and log4j2.xml into `run_dir`; gives the three addresses by their keys.

    `config`: a user's config.properties, whose ports and metrics file are kept; the shipped one names TorchServe's
    default ports, which are replaced by free ones. `ports`, by key of `ADDRESSES`, go before both. `log_stdout`: the
    log as JSON lines on the standard output too.
    """
    settings = read_properties(config or shipped_file("deploy/config.properties"))
    free = iter(free_ports(len(ADDRESSES) + len(_OTHER_PORTS)))
    for key in ADDRESSES:
        scheme, host, own = _split(key, settings.get(key, "http://127.0.0.1"))
        settings[key] = f"{scheme}://{host}:{ports.get(key) or (config and own) or next(free)}"
    for key in _OTHER_PORTS:
        settings[key] = (config and settings.get(key)) or str(next(free))
    if config is None or "metrics_config" not in settings:
        shutil.copyfile(shipped_file("deploy/metrics.yaml"), run_dir / "metrics.yaml")
        settings["metrics_config"] = str(run_dir / "metrics.yaml")
    else:  # a path beside the user's file; the server runs elsewhere
        settings["metrics_config"] = str(config.resolve().parent / settings["metrics_config"])
    # A backslash begins an escape in this format.
    lines = [f"{key}={value}\n".replace("\\", "\\\\") for key, value in settings.items()]
    (run_dir / "config.properties").write_text("".join(lines), encoding="utf-8")
    (run_dir / "log4j2.xml").write_text(_log_settings(stdout=log_stdout), encoding="utf-8")
    return {key: settings[key].replace("//0.0.0.0:", "//127.0.0.1:") for key in ADDRESSES}


def read_properties(file: Path) -> dict[str, str]:
    """The keys and values of a properties file, one a line (no continued lines)."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise EludeError(f"{file} cannot be read: {error}") from error
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith(("#", "!")))
    return {key.strip(): value.strip() for key, _, value in pairs}


def named_ports(run_dir: Path) -> set[int]:
    """Every port that the server's own configuration names."""
    settings = read_properties(run_dir / "config.properties")
    values = [value.rpartition(":")[2] for key, value in settings.items() if key in ADDRESSES or key in _OTHER_PORTS]
    return {int(value) for value in values if value.isdecimal()}


def free_ports(count: int, besides: Collection[int] = ()) -> list[int]:
    """Ports of the loopback interface that nobody listens on, all different, and none of `besides`.

    From below the range that the system hands out to outgoing connections, and by chance, so that two servers that
    start at the same moment do not choose the same.
    """
    ports: list[int] = []
    for port in random.SystemRandom().sample(range(20_000, 32_000), 2_000):
        if port in besides:
            continue
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise ServerError(f"There are no {count} free ports between 20000 and 32000.")


def _split(key: str, address: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an address."""
    found = _ADDRESS.fullmatch(address)
    if not found:
        raise EludeError(f"{key}={address} must look like http://127.0.0.1:8080.")
    return found[1], found[2], int(found[3]) if found[3] else None
