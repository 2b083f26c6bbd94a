"""How much one worker with one thread carries, as a table.

    python -m pytest -m long -s tests/integration/test_capacity.py

Requests over the worker's own processor seconds are the figure to plan with: what else the machine does hardly touches
it, and the front end takes processors of its own.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ts")
from bad_input import document
from load_clients import (
    CLIENTS,
    OneClient,
    demo_checkpoint,
    demo_images,
    megabytes,
    real_checkpoint,
    real_images,
    workers,
)

from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.torchserve import Server

pytestmark = [pytest.mark.server, pytest.mark.networks, pytest.mark.long]
SECONDS, WARM_UP = 15.0, 4.0
Request = tuple[bytes, str]  # body and content type


@dataclass(frozen=True)
class Carried:
    """One row of the table. processor: the worker's, in seconds; own: memory that it shares with no other, in MB."""

    model: str
    asked: str
    requests: int
    seconds: float
    processor: float
    resident: float
    own: float

    def __str__(self) -> str:
        return (
            f"| {self.model} | {self.asked} | {self.requests / self.seconds:.0f} "
            f"| {self.requests / self.processor:.0f} | {self.resident:.0f} | {self.own:.0f} |"
        )


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[tuple[Server, dict[str, list[bytes]]]]:
    """Three models as they are shipped (batches of 8), a thread each, and images for each."""
    folder = tmp_path_factory.mktemp("capacity")
    photographs = [file.read_bytes() for file in real_images(shared)[5:400:50]]
    made = {"demo": demo_checkpoint(folder)}
    made |= {name: real_checkpoint(shared, name, folder / name) for name in ("deit_tiny_3bit", "mobilenetv2_100")}
    for name, checkpoint in made.items():
        build_archive(checkpoint, folder / "store", name=name)
    environment = {"ELUDE_THREADS": "1", "ELUDE_TRUST_FACTORY": "true"}
    with Server(folder / "store", token_auth=False, environment=environment) as server:
        server.wait_ready(240)
        yield server, {name: demo_images(8) if name == "demo" else photographs for name in made}


def test_capacity(served: tuple[Server, dict[str, list[bytes]]]) -> None:
    server, images = served
    explain = {"explain": {"method": "gradient"}}
    rows = []
    for model, encoded in images.items():
        plain = [(image, "image/jpeg") for image in encoded]
        explained = [(document(explain, image), "application/json") for image in encoded]
        for asked, requests in (("plain", plain), ("gradient explanation", explained)):
            rows.append(_measure(server, model, asked, requests))
    print("\n| model | request | a second | a second and core of the worker | worker, MB | of these its own |")
    print("|---|---|---:|---:|---:|---:|", *rows, sep="\n")
    for row in rows:
        assert row.requests > CLIENTS and row.processor > 0
        assert row.processor < 1.2 * row.seconds  # one thread it is, so the figure is one core's


def _measure(server: Server, model: str, asked: str, requests: list[Request]) -> Carried:
    worker = psutil.Process(workers(server)[model][0])
    _keep_asking(server, model, requests, WARM_UP)
    before, started = worker.cpu_times(), time.monotonic()
    count = _keep_asking(server, model, requests, SECONDS)
    seconds, after = time.monotonic() - started, worker.cpu_times()
    processor = after.user + after.system - before.user - before.system
    own = worker.memory_full_info().uss / 1e6
    return Carried(model, asked, count, seconds, processor, megabytes(server)[model], own)


def _keep_asking(server: Server, model: str, requests: list[Request], seconds: float) -> int:
    """Answers that 16 clients get, each asking again when it has one. Fails for any that is no 200."""
    end = time.monotonic() + seconds

    def one(first: int) -> int:
        client, answers = OneClient(server.url), 0
        for body, kind in itertools.islice(itertools.cycle(requests), first, None):
            status, _, text = client.send(f"/predictions/{model}", body, {"Content-Type": kind})
            assert status == 200, text
            answers += 1
            if time.monotonic() > end:
                break
        client.close()
        return answers

    with ThreadPoolExecutor(CLIENTS) as pool:
        return sum(pool.map(one, range(CLIENTS)))
