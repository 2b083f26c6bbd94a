"""Slots: one a living worker, found again by the next; and the exporter's totals over workers that come and go."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from elude_runtime.errors import ServerError, StorageError
from elude_runtime.metrics.exporter import exporting
from elude_runtime.metrics.slots import Slot

WORKER = """
import sys
from pathlib import Path
from types import SimpleNamespace
from elude_runtime.metrics.worker import WorkerMetrics

assert "torch" not in sys.modules
made = WorkerMetrics(Path(sys.argv[1]), "m")
made.set("elude_model_info", 1, version="1.0", checkpoint_sha256=sys.argv[2], base_sha256="b")
seen = SimpleNamespace(kind="explain", edits=2, policies=("p",), completeness=(("l", "gradient", 0.03),), sent=500,
                       stages={"decode": 0.002, "forward": 0.02}, work=3.0, received=70)
plain = SimpleNamespace(kind="predict", edits=0, policies=(), completeness=(), sent=100,
                        stages={"decode": 0.002, "forward": 0.02}, work=0.0, received=30)
made.saw([seen, plain])
print(made._slot.number, flush=True)
sys.stdin.read()
"""


class Worker:
    """A process that sees one batch of two rows, and lives until it is told."""

    def __init__(self, directory: Path, checkpoint: str = "c") -> None:
        command = [sys.executable, "-c", WORKER, str(directory), checkpoint]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.slot = int(self.process.stdout.readline())

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[Worker]]:
    made: list[Worker] = []
    yield made
    for worker in made:
        worker.kill()


def scrape(port: int) -> dict[str, float]:
    """Sample name with its labels, but `model`, and value."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics").text
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()) if k != "model")
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found


def test_totals_outlive_the_workers_and_gauges_do_not(tmp_path: Path, workers: list[Worker]) -> None:
    with exporting(tmp_path, "127.0.0.1", 0) as port:
        workers += [Worker(tmp_path), Worker(tmp_path)]
        assert [worker.slot for worker in workers] == [0, 1]
        seen = scrape(port)
        assert seen["elude_workers"] == 2 and seen["elude_edits_total"] == 4
        assert seen["elude_batch_rows_count"] == 2 and seen["elude_batch_rows_sum"] == 4
        assert seen["elude_policy_answers_total{policy=p}"] == 2
        assert seen["elude_completeness_error_bucket{layer=l,le=0.02,method=gradient}"] == 0
        assert seen["elude_completeness_error_bucket{layer=l,le=0.05,method=gradient}"] == 2
        assert seen["elude_stage_seconds_sum{stage=decode}"] == pytest.approx(2 * 2 * 0.002)  # images one by one
        assert seen["elude_stage_seconds_sum{stage=forward}"] == pytest.approx(2 * 0.02)  # once for the batch
        assert seen["elude_reply_bytes_sum{kind=explain}"] == 1000 and seen["elude_received_bytes_total"] == 200
        assert seen["elude_worker_memory_bytes{pid=0}"] > 1e6

        workers[0].kill()
        seen = scrape(port)
        assert seen["elude_workers"] == 1 and seen["elude_edits_total"] == 4
        assert "elude_worker_memory_bytes{pid=0}" not in seen

        workers.append(Worker(tmp_path, "other"))  # in the place of the first, whose counts go on
        assert workers[2].slot == 0
        seen = scrape(port)
        assert seen["elude_workers"] == 2 and seen["elude_edits_total"] == 6 and seen["elude_worker_starts_total"] == 3
        assert len(list(tmp_path.glob("counter_*.db"))) == 2  # no file more for a worker that was started again
        workers[1].kill()
        info = [name for name in scrape(port) if name.startswith("elude_model_info")]
        assert len(info) == 1 and "checkpoint_sha256=other" in info[0]


def test_a_new_exporter_wipes_what_the_dead_left_and_keeps_the_living(tmp_path: Path, workers: list[Worker]) -> None:
    workers += [Worker(tmp_path), Worker(tmp_path)]
    workers[0].kill()
    with exporting(tmp_path, "127.0.0.1", 0) as port:  # a total must not fall under Prometheus' eyes
        seen = scrape(port)
        assert seen["elude_edits_total"] == 4 and seen["elude_workers"] == 1
    workers[1].kill()
    with exporting(tmp_path, "127.0.0.1", 0) as port:
        assert scrape(port) == {}
    assert not list(tmp_path.glob("*.db"))


def test_a_disk_without_room_costs_the_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are reserved: to write into a hole of a mapped file on a full disk would end the worker."""
    Slot(tmp_path / "room").release()
    files = list((tmp_path / "room").glob("*.db"))
    assert len(files) == 5 and all(path.stat().st_blocks * 512 >= 2**20 for path in files)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(StorageError, match="No space left"):
        Slot(tmp_path / "full")


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with (
        exporting(tmp_path, "127.0.0.1", 0) as port,
        pytest.raises(ServerError, match=f"cannot listen on 127.0.0.1:{port}: address already in use"),
        exporting(tmp_path, "127.0.0.1", port),
    ):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_is_not_writable(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="cannot hold metrics"):
        Slot(tmp_path / "metrics")


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot hold metrics"):
        Slot(tmp_path / "file")


def test_the_command_ends_with_the_process_that_it_goes_with(tmp_path: Path) -> None:
    server = subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"], stdin=subprocess.PIPE)
    command = [sys.executable, "-c", "from elude_runtime.cli import main; main()", "exporter", "--dir", str(tmp_path)]
    exporter = subprocess.Popen(
        [*command, "--port", "0", "--json", "--while", str(server.pid)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert exporter.stdout is not None
        told = json.loads(exporter.stdout.readline())
        assert httpx.get(told["url"]).status_code == 200 and told["dir"] == str(tmp_path)
        assert exporter.poll() is None
        server.kill()
        server.wait()
        assert exporter.wait(20) == 0
    finally:
        server.kill()
        exporter.kill()
