"""Clients that send mixed traffic to a real server at once and check every answer; what a server's processes weigh."""

from __future__ import annotations

import http.client
import itertools
import json
import shutil
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import torch
from mixed_traffic import POLICY, VECTOR, Asked, Traffic
from support import encoded

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.checkpoint.policies import save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.model_options import ModelOptions
from elude_runtime.cli.server_process import session_members
from elude_runtime.cli.torchserve import Server
from elude_runtime.demo.images import make_set, write_folder
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.rewrite import rewrite_checkpoint
from elude_runtime.partition import SplitConfig

CLIENTS = 16

# The server's limits, small enough for a mixed load to meet them.
LIMITS = {"max_work": 16, "max_batch_work": 16, "max_vector_images": 16, "max_response_bytes": 400_000}


@dataclass
class Outcome:
    """What came back. faults: sentences about answers that are not as they should be."""

    statuses: Counter[int] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def requests(self) -> int:
        return self.statuses.total()

    def __add__(self, other: Outcome) -> Outcome:
        """One after the other."""
        return Outcome(
            self.statuses + other.statuses,
            self.kinds + other.kinds,
            self.faults + other.faults,
            self.seconds + other.seconds,
        )

    def __str__(self) -> str:
        counts = ", ".join(f"{count} × {status}" for status, count in sorted(self.statuses.items()))
        rate = self.requests / self.seconds
        return f"{self.requests} requests in {self.seconds:.0f} s ({rate:.0f} a second): {counts}"


class OneClient:
    """One client with a connection that it keeps as long as the server does."""

    def __init__(self, url: str) -> None:
        address = urlsplit(url)
        assert address.hostname is not None
        self._connection = http.client.HTTPConnection(address.hostname, address.port, timeout=120)

    def send(self, path: str, body: bytes, headers: dict[str, str]) -> tuple[int, dict[str, str], bytes]:
        """Status, headers in lower case, body."""
        self._connection.request("POST", path, body, headers)
        response = self._connection.getresponse()
        said = {name.lower(): value for name, value in response.getheaders()}
        return response.status, said, response.read()

    def close(self) -> None:
        self._connection.close()


def ask_all(url: str, requests: Iterable[Asked], first: str) -> Outcome:
    """One client's requests, one after another. first: begins every identity, so that no two clients share one."""
    client, outcome = OneClient(url), Outcome()
    for number, asked in enumerate(requests):
        identity = f"{first}.{number}"
        try:
            status, headers, body = client.send(asked.path, asked.sent(identity), dict(asked.headers))
            fault = asked.fault(identity, status, headers, body)
        except (OSError, http.client.HTTPException) as error:
            client.close()
            status, fault = 0, f"{asked.kind}: no answer: {error!r}"
        outcome.statuses[status] += 1
        outcome.kinds[asked.kind] += 1
        outcome.faults += [fault] if fault else []
    client.close()
    return outcome


def load(server: Server, traffic: Traffic, requests: int, *, seed: int = 0, clients: int = CLIENTS) -> Outcome:
    """Mixed traffic from many clients, each with requests of its own."""
    each = requests // clients
    parts = [itertools.islice(traffic.drawn(seed * clients + k), each) for k in range(clients)]
    return _together(server, parts)


def once(server: Server, traffic: Traffic, clients: int = CLIENTS) -> Outcome:
    """Every request of the traffic, once, shared out among the clients."""
    return _together(server, [traffic.once[k::clients] for k in range(clients)])


def _together(server: Server, parts: list[Iterable[Asked]]) -> Outcome:
    total, started = Outcome(), time.monotonic()
    with ThreadPoolExecutor(len(parts)) as pool:
        for part in pool.map(ask_all, itertools.repeat(server.url), parts, map("c{}".format, itertools.count())):
            total.statuses += part.statuses
            total.kinds += part.kinds
            total.faults += part.faults
    total.seconds = time.monotonic() - started
    return total


@contextmanager
def serving(checkpoint: Path, folder: Path, images: Sequence[bytes], name: str) -> Iterator[tuple[Server, Traffic]]:
    """A server of a copy of the checkpoint, with a policy and a vector, and the traffic to send it."""
    copy = folder / "checkpoint"
    shutil.copytree(checkpoint, copy)
    config = ServingConfig(**LIMITS, trust_factory=True)  # type: ignore[arg-type]
    model = Engine.open(copy, config, name=name, version="1.0").model
    layer, partition = model.layers[0], model.manifest.partition_sha256
    direction = np.linspace(-1, 1, model.state(layer).linear.neurons, dtype=np.float32)
    save_vector(
        copy, StoredVector(VECTOR, layer, partition, "2026-01-01T00:00:00+00:00", direction, [], [], None, 1, 1)
    )
    ablate = [{"feature": f"{layer}/P0", "mode": "ablate"}]
    save_policy(copy, POLICY, {"partition_sha256": partition, "edits": ablate})
    build_archive(copy, folder / "store", name=name)
    engine = Engine.open(copy, config, name=name, version="1.0")
    limits = {f"ELUDE_{key.upper()}": str(value) for key, value in LIMITS.items()}
    environment = {**limits, "ELUDE_TRUST_FACTORY": "true", "ELUDE_THREADS": str(torch.get_num_threads())}
    with Server(folder / "store", token_auth=False, environment=environment, run_dir=folder / "run") as server:
        traffic = Traffic(engine, images)  # while the server loads
        server.wait_ready(240)
        yield server, traffic


def demo_checkpoint(folder: Path) -> Path:
    """The demo network rewritten, calibrated on few of its pictures."""
    network, config = load_demo_model()
    write_folder(folder / "images", make_set(60, seed=1, split="train"))
    rewrite_demo(network, config, folder / "images", folder / "made")
    return folder / "made"


def real_checkpoint(shared: Path, name: str, folder: Path) -> Path:
    """`deit_tiny_3bit` or `mobilenetv2_100` with its weights, its default layer split. shared: as in `conftest`."""
    weights, own = shared / "weights" / f"{name}.safetensors", name.startswith("deit")
    factory = f"{shared / 'weights' / 'reference_models.py'}:{name}" if own else None
    base = ModelOptions(None if own else name, weights=weights, factory=factory).build()
    config = DataConfig.parse(json.loads((shared / "weights" / "data_configs.json").read_text())[name])
    split, images = SplitConfig(tokens=100), real_images(shared)[::16]
    rewrite_checkpoint(base, images, folder, split, concepts=24, data_config=config)
    return folder


def real_images(shared: Path) -> list[Path]:
    return sorted((shared / "data" / "imagenet").glob("*.jpg"))


def demo_images(count: int) -> list[bytes]:
    return [encoded(sample.image) for sample in make_set(count, seed=77, split="natural")]


def workers(server: Server) -> dict[str, tuple[int, str]]:
    """Process id and state of each model's worker (of the first, where there are several)."""
    found = {}
    for name in server.names:
        (version,) = httpx.get(f"{server.management_url}/models/{name}", timeout=60).json()
        worker: dict[str, Any] = version["workers"][0]
        found[name] = (worker["pid"], worker["status"])
    return found


def megabytes(server: Server) -> dict[str, float]:
    """Resident memory, in MB, of each model's worker and of the front end (`java`)."""
    found = {name: psutil.Process(pid).memory_info().rss / 1e6 for name, (pid, _) in workers(server).items()}
    java = [process for process in session_members(server.pid, 0) if process.name() == "java"]
    return {**found, "java": sum(process.memory_info().rss for process in java) / 1e6}
