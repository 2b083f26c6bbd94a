"""Mixed traffic of many clients against a real TorchServe: every answer checked, no failure, no growth.

The long form, `python -m pytest -m long -s tests/integration/test_load.py`, sends 20,000 requests, then 2,500 to
DeiT-Tiny, and prints its figures.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

pytest.importorskip("ts")
from load_clients import (
    Outcome,
    demo_checkpoint,
    demo_images,
    load,
    memory,
    once,
    real_checkpoint,
    real_images,
    serving,
    workers,
)
from mixed_traffic import FORGED, WEIGHTS, Traffic

from elude_runtime.cli.torchserve import Server

pytestmark = pytest.mark.server
GROWTH = 50  # MB that a worker may grow by after it is warm
PATIENCE = 240  # seconds: how fast this machine is, is not the question here
Loaded = tuple[Server, Traffic]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("load")
    with serving(demo_checkpoint(folder), folder, demo_images(4), "demo", PATIENCE) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def deit(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Iterator[Loaded]:
    """DeiT-Tiny, its default layer split."""
    folder = tmp_path_factory.mktemp("deit")
    made = real_checkpoint(shared, "deit_tiny_3bit", folder / "made")
    images = [file.read_bytes() for file in real_images(shared)[5:400:100]]
    with serving(made, folder, images, "deit", PATIENCE) as loaded:
        yield loaded


def assert_right(outcome: Outcome) -> None:
    """No answer that is not the right one, and no 5xx but those that were asked for: `Asked.fault` allows no other."""
    assert not outcome.faults, "\n".join(outcome.faults[:20])
    assert set(outcome.statuses) <= {200, 400, 404, 412, 413, 415, 422, 500, 503}


def assert_unharmed(server: Server, before: dict[str, tuple[int, str]]) -> None:
    """The same workers, ready; and no metric that a client wrote."""
    assert workers(server) == before and {state for _, state in before.values()} == {"READY"}
    assert FORGED not in httpx.get(f"{server.metrics_url}/metrics", timeout=60).text


def test_every_request_and_a_mixed_load(demo: Loaded) -> None:
    """1,500 requests from 16 clients: every right, strange, bad and poisoned one at least once."""
    server, traffic = demo
    before = workers(server)
    first = once(server, traffic)
    assert_right(first)
    warm = memory(server)["demo"]
    mixed = load(server, traffic, 1500 - first.requests)
    assert_right(mixed)
    assert_unharmed(server, before)
    assert set(WEIGHTS) <= set(first.kinds) and len(first.kinds) > 200
    assert first.statuses[500] >= 2  # planted
    assert (first + mixed).statuses[503] > 0  # by budget
    bad = [count for kind, count in mixed.kinds.items() if kind not in WEIGHTS]
    assert 0.02 < sum(bad) / mixed.requests < 0.08
    grown = memory(server)["demo"].since(warm)
    print(f"\ndemo: {first + mixed}; the worker had {warm} and grew by {grown}")
    assert max(grown) < GROWTH


@pytest.mark.long
@pytest.mark.parametrize(("model", "requests"), [("demo", 20_000), ("deit", 2_000)])
def test_a_long_mixed_load(request: pytest.FixtureRequest, model: str, requests: int) -> None:
    server, traffic = request.getfixturevalue(model)
    before = workers(server)
    warm_up = once(server, traffic) + load(server, traffic, requests // 2, seed=1)
    assert_right(warm_up)
    warm = memory(server)
    mixed = load(server, traffic, requests, seed=2)
    grown = {name: size.since(warm[name]) for name, size in memory(server).items()}
    sizes = ", ".join(f"{name} had {size} and grew by {grown[name]}" for name, size in warm.items())
    print(f"\n{model}: {mixed}; {sizes}")
    assert_right(mixed)
    assert_unharmed(server, before)
    assert mixed.requests == requests and mixed.statuses[500] > 0
    if model == "demo":  # the real network's last blocks cost too little of a prediction to use the budget up
        assert mixed.statuses[503] > 0
    assert max(grown[model]) < GROWTH
