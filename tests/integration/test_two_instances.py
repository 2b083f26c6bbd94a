"""Two TorchServe instances behind nginx under mixed load: one is killed, a worker is killed, a release is switched."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

pytest.importorskip("ts")
from conftest import Rewritten
from nginx_front import INSTALLED, MISSING, Front
from support import FIRST, LABELS, SECOND, VIT_ARGS, VIT_DATA, encoded, picture

import elude_runtime as elude
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.schema.reply import Reply
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.health import not_ready
from elude_runtime.cli.server_settings import free_ports
from elude_runtime.cli.torchserve import Server
from elude_runtime.client import Client, ProblemError

pytestmark = [pytest.mark.server, pytest.mark.skipif(not INSTALLED, reason=MISSING)]
IMAGES = [encoded(picture(seed)) for seed in range(500, 504)]
P0 = f"{SECOND}/P0"
DOCUMENTS: list[dict[str, Any]] = [
    {},
    {"top_k": 3},
    {"explain": {"top_features": 3}},
    {"steer": {"edits": [{"feature": P0, "mode": "scale", "value": -2.0}]}},
    {"activations": {"features": [P0, f"{FIRST}/P1"]}},
]
BLUE, GREEN = "1.0", "2.0"


@dataclass
class Fleet:
    """Two instances, a and b, behind nginx, and the checkpoints that they serve in this process, by version."""

    front: Front
    engines: dict[str, Engine]
    ports: dict[str, int]
    servers: dict[str, Server] = field(default_factory=dict)
    archives: dict[str, list[str]] = field(default_factory=dict)
    _expected: dict[tuple[str, int, int], Reply] = field(default_factory=dict)

    def start(self, name: str, archives: list[str]) -> None:
        """Returns at once; see `ready`."""
        server = Server(
            self.front.prefix.parent / "store",
            archives,
            token_auth=False,
            inference_port=self.ports[name],
            environment={"ELUDE_THREADS": "1"},
        )
        self.servers[name], self.archives[name] = server.start(), archives

    def ready(self, **archives: list[str]) -> None:
        """Instances that serve these archives, started anew only where they do not. (`Server.wait_ready` would not
        have one whose worker died before.)"""
        for name, wanted in archives.items():
            if self.archives.get(name) != wanted:
                if name in self.servers:
                    self.stop(name)
                self.start(name, wanted)
        deadline = time.monotonic() + 180
        for name in archives:
            while reason := not_ready(self.servers[name].management_url, ["demo"]):
                assert time.monotonic() < deadline, reason
                time.sleep(0.2)

    def address(self, name: str) -> str:
        return f"127.0.0.1:{self.ports[name]}"

    def stop(self, name: str) -> None:
        """All of its processes at once, without a word; returns when they are gone."""
        del self.archives[name]
        server = self.servers.pop(name)
        os.killpg(server.pid, signal.SIGKILL)
        server.stop()

    def expected(self, version: str, image: int, document: int) -> Reply:
        """The reply of the engine in this process."""
        key = (version, image, document)
        if key not in self._expected:
            parts = {"image": IMAGES[image], "request": _json(DOCUMENTS[document])}
            (answered,) = self.engines[version].answer([Row(parts, "multipart/form-data", False, "", "r")])
            assert answered.status == 200, answered.body
            self._expected[key] = Reply.model_validate_json(answered.body)
        return self._expected[key]


@dataclass(frozen=True)
class Outcome:
    """One call of a client. problem: None if it was answered; begin, end: seconds of the epoch."""

    who: str
    problem: ProblemError | None
    version: str
    begin: float
    end: float


class Load:
    """Threads that ask for everything in turn, and compare every answer with the engine's."""

    def __init__(self, fleet: Fleet) -> None:
        self.fleet, self.outcomes = fleet, list[Outcome]()
        self.wrong: list[str] = []
        self._end = threading.Event()
        self._clients = {
            "patient": fleet.front.client("demo", "ann", retries=3),
            "impatient": fleet.front.client("demo", "bob", retries=0),
        }
        for version in fleet.engines:  # before the load, so that it has the processor for itself
            for image, document in itertools.product(range(len(IMAGES)), range(len(DOCUMENTS))):
                fleet.expected(version, image, document)
        self._threads = [
            threading.Thread(target=self._run, args=(who, number)) for who in self._clients for number in range(3)
        ]

    def _run(self, who: str, number: int) -> None:
        turn = number
        while not self._end.is_set():
            turn += 1
            image, document = turn % len(IMAGES), turn % len(DOCUMENTS)
            identity = f"{who}.{number}.{turn}"
            begin = time.time()
            problem, version = None, ""
            try:
                reply = self._clients[who].request(IMAGES[image], {"id": identity, **DOCUMENTS[document]})
                version = reply.model.version
                self._compare(reply, identity, self.fleet.expected(version, image, document))
            except ProblemError as error:
                problem = error
            except Exception as error:  # a thread's own failure must not go unseen
                self.wrong.append(f"{identity}: {error!r}")
            self.outcomes.append(Outcome(who, problem, version, begin, time.time()))
            time.sleep(0.02)  # leaves an instance the processor time to start

    def _compare(self, reply: Reply, identity: str, expected: Reply) -> None:
        if reply.id != identity:
            self.wrong.append(f"{identity} got the answer to {reply.id}")
        away = {"id", "timing_ms", "batch_size"}
        if not close(reply.model_dump(exclude=away), expected.model_dump(exclude=away)):
            self.wrong.append(f"{identity}: {reply} instead of {expected}")

    def log(self, since: int = 0) -> list[dict[str, Any]]:
        """nginx's lines of this load's requests; since: how many there were before."""
        lines = self.fleet.front.log(lambda lines: len(asked(lines[since:])) >= len(self.outcomes))
        return asked(lines[since:])

    def failures(self, who: str) -> list[Outcome]:
        return [o for o in self.outcomes if o.who == who and o.problem is not None]

    def wait(self, until: Callable[[], bool], seconds: float = 180.0) -> None:
        """Until the condition holds, and half a second of load more."""
        deadline = time.monotonic() + seconds
        while not until():
            assert time.monotonic() < deadline, "it did not come about in time"
            time.sleep(0.1)
        time.sleep(0.5)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        time.sleep(1.0)
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join(90)
        for client in self._clients.values():
            client.close()


def asked(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line["asked"].startswith("POST")]


def close(found: Any, expected: Any) -> bool:
    """Equal, but for the last bits that the size of a batch changes."""
    if isinstance(expected, float) and isinstance(found, float):
        return abs(found - expected) <= 1e-4 * max(1.0, abs(expected))
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        return found.keys() == expected.keys() and all(close(found[k], expected[k]) for k in expected)
    if isinstance(expected, list) and isinstance(found, list):
        return len(found) == len(expected) and all(map(close, found, expected))
    return bool(found == expected)


def _json(document: dict[str, Any]) -> bytes:
    return httpx.Request("POST", "http://x", json=document).content


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("fleet")
    # Time enough for batches to fill, and for a request to be under way when its instance dies.
    settings = folder / "model-config.yaml"
    settings.write_text("minWorkers: 1\nmaxWorkers: 1\nbatchSize: 4\nmaxBatchDelay: 100\nresponseTimeout: 60\n")
    elude.rewrite(
        vit.base, vit.folder, out=folder / "green", layers=[SECOND, FIRST], subunits=4, concepts=4, tokens=24,
        batch_size=8, data_config=VIT_DATA, model_args=VIT_ARGS, labels=LABELS,
    )  # fmt: skip
    paths = {BLUE: vit.path, GREEN: folder / "green"}
    (folder / "store").mkdir()
    for version, path in paths.items():
        made = build_archive(path, folder / version, name="demo", version=version, config=settings)
        made.rename(folder / "store" / {BLUE: "blue.mar", GREEN: "green.mar"}[version])
    engines = {v: Engine.open(p, ServingConfig(), name="demo", version=v) for v, p in paths.items()}
    ports = dict(zip("ab", free_ports(2), strict=True))
    with Front(folder / "nginx", [f"127.0.0.1:{port}" for port in ports.values()]) as front:
        made_fleet = Fleet(front, engines, ports)
        try:
            yield made_fleet
        finally:
            for name in list(made_fleet.servers):
                made_fleet.stop(name)


ONE_EACH = {"a": ["demo=blue.mar"], "b": ["demo=blue.mar"]}
# The first archive of a model is its default version.
BOTH_ON_A = {"a": ["demo=blue.mar", "demo=green.mar"], "b": ["demo=blue.mar"]}


def test_an_instance_is_killed_and_started_again(fleet: Fleet) -> None:
    """With nginx sending nothing twice that an instance may have begun: only what was under way on the dead instance
    fails, and the client's retries hide that. It comes back with a second version of the model beside the first."""
    fleet.ready(**ONE_EACH)
    fleet.front.rewrite(lambda text: text.replace(" non_idempotent;", ";"))
    try:
        with Load(fleet) as load:
            before = time.time()
            fleet.stop("a")  # by SIGKILL to all of its processes
            after = time.time()
            load.wait(lambda: time.time() > after + 1)
            fleet.start("a", BOTH_ON_A["a"])
            restarted = time.time()
            load.wait(lambda: answers_of(fleet, "a", since=restarted) > 0)
    finally:
        fleet.front.rewrite(lambda text: text)
    assert load.wrong == []
    assert load.failures("patient") == []
    lost = [line for line in load.log() if line["status"] != 200]
    assert 1 <= len(lost) <= 6, "at most one a thread"
    for line in lost:
        assert line["instances"] == fleet.address("a") and line["status"] == 502
        assert line["end"] - line["seconds"] <= after and line["end"] >= before
    assert len(load.failures("impatient")) == sum(line["client"] == "bob" for line in lost)
    assert {o.problem.type for o in load.failures("impatient") if o.problem} <= {"server-unavailable"}
    print(f"{len(load.outcomes)} requests, {len(lost)} lost with the instance, 0 seen by clients that retry")


def answers_of(fleet: Fleet, name: str, since: float) -> int:
    """Requests that an instance answered well since a moment."""
    lines = [line for line in fleet.front.log() if line["end"] > since and line["status"] == 200]
    return sum(line["instances"].endswith(fleet.address(name)) for line in lines)


def test_a_worker_is_killed(fleet: Fleet) -> None:
    """Its instance says so of the batch and of nothing else, and starts another worker; nginx does not ask twice."""
    fleet.ready(**BOTH_ON_A)
    (old,) = workers(fleet, "b")
    seen = len(fleet.front.log())
    with Load(fleet) as load:
        os.kill(old, signal.SIGKILL)
        died = time.time()
        load.wait(lambda: workers(fleet, "b") not in ([old], []) and answers_of(fleet, "b", since=died + 1) > 0)
    assert load.wrong == []
    assert load.failures("patient") == []
    lost = [line for line in load.log(seen) if line["status"] != 200]
    assert 1 <= len(lost) <= 4, "a batch"
    assert {(line["instances"], line["status"] in (500, 507)) for line in lost} == {(fleet.address("b"), True)}
    assert len(load.failures("impatient")) == sum(line["client"] == "bob" for line in lost)
    print(f"{len(load.outcomes)} requests, {len(lost)} lost with the worker")


def workers(fleet: Fleet, name: str) -> list[int]:
    """Process ids of the model's READY workers."""
    versions = httpx.get(f"{fleet.servers[name].management_url}/models/demo/all", timeout=30).json()
    return [int(w["pid"]) for version in versions for w in version["workers"] if w["status"] == "READY"]


def set_default(fleet: Fleet, version: str) -> None:
    """Instance a answers with this version from now on, until it is started again."""
    reply = httpx.put(f"{fleet.servers['a'].management_url}/models/demo/{version}/set-default", timeout=30)
    assert reply.status_code == 200, reply.text


@pytest.fixture(scope="class")
def pools(fleet: Fleet) -> Iterator[Fleet]:
    """b is blue and a is green."""
    fleet.ready(**BOTH_ON_A)
    set_default(fleet, GREEN)
    before = fleet.front.blue, fleet.front.green
    fleet.front.blue, fleet.front.green = [fleet.address("b")], [fleet.address("a")]
    fleet.front.rewrite(lambda text: text)
    yield fleet
    set_default(fleet, BLUE)
    fleet.front.blue, fleet.front.green = before
    fleet.front.rewrite(lambda text: text)


class TestBlueAndGreen:
    def test_a_switch_and_a_rollback_under_load(self, pools: Fleet) -> None:
        moments = [time.time()]
        with Load(pools) as load:
            for release in ("green", "blue"):
                moments.append(time.time())
                pools.front.switch(release)
                moments.append(time.time())
                load.wait(lambda: any(o.begin > moments[-1] and o.version for o in load.outcomes))
        start, before_green, green, before_blue, blue = moments
        assert load.wrong == []
        assert load.failures("patient") == []
        # An idle connection may be closed just when a client takes it up again: nothing was sent that nginx has seen.
        assert {o.problem.type for o in load.failures("impatient") if o.problem} <= {"server-unreachable"}
        assert {line["status"] for line in load.log() if line["end"] > start} == {200}
        said = [o for o in load.outcomes if o.problem is None]
        assert {o.version for o in said if o.end < before_green or o.begin > blue} == {BLUE}
        assert {o.version for o in said if o.begin > green and o.end < before_blue} == {GREEN}

    def test_what_expect_does_for_a_client(self, pools: Fleet) -> None:
        blue, green = (pools.engines[v].info.checkpoint_sha256 for v in (BLUE, GREEN))
        edit = {"feature": P0, "mode": "scale", "value": -2.0}
        with pools.front.client("demo") as anybody, pools.front.client("demo", checkpoint_sha256=blue) as bound:
            before = bound.steer(IMAGES[0], edits=[edit])
            pools.front.switch("green")
            try:
                after = anybody.steer(IMAGES[0], edits=[edit])
                assert after.predictions == before.predictions, "the base model is the same, to the last digit"
                assert before.steered and after.steered and before.steered.predictions != after.steered.predictions, (
                    "the name means another feature now, and nothing says so to a client that expects nothing"
                )
                for ask in (bound.predict, bound.explain, lambda image: bound.steer(image, edits=[edit])):
                    with pytest.raises(ProblemError) as caught:
                        ask(IMAGES[0])
                    assert (caught.value.type, caught.value.status) == ("other-checkpoint", 412)
                    assert green in str(caught.value)
                with pytest.raises(ProblemError, match="other-checkpoint"):
                    list(bound.features())
                assert bound.describe().model.checkpoint_sha256 == green
            finally:
                pools.front.switch("blue")
            assert bound.steer(IMAGES[0], edits=[edit]).steered == before.steered

    def test_a_named_version_before_and_after_the_switch(self, pools: Fleet) -> None:
        for release in ("blue", "green", "blue"):
            pools.front.switch(release)
            for version, engine in pools.engines.items():
                with pools.front.client("demo", version=version) as client:
                    model = client.predict(IMAGES[1]).model
                    assert (model.version, model.checkpoint_sha256) == (version, engine.info.checkpoint_sha256)

    def test_the_other_client(self, pools: Fleet) -> None:
        async def ask() -> list[Reply]:
            async with pools.front.async_client("demo") as client:
                return await asyncio.gather(*[client.predict(image) for image in IMAGES])

        for number, reply in enumerate(asyncio.run(ask())):
            assert close(reply.predictions[0].logit, pools.expected(BLUE, number, 0).predictions[0].logit)

    def test_without_a_proxy_by_torchserves_default_version(self, pools: Fleet) -> None:
        """Of one instance with both versions; `enable_model_api=false` forbids to load and to remove models only."""
        server = pools.servers["a"]
        with Client(server.url, "demo", timeout=60) as client:
            for version in (BLUE, GREEN):
                set_default(pools, version)
                assert client.predict(IMAGES[0]).model.version == version
        for method, path in (("DELETE", f"/models/demo/{BLUE}"), ("POST", "/models?url=blue.mar")):
            assert httpx.request(method, server.management_url + path, timeout=30).status_code == 405


def test_as_shipped_nobody_notices(fleet: Fleet) -> None:
    """Predictions may be asked twice, so nginx asks the other instance, and not even clients without retries see it."""
    fleet.ready(**BOTH_ON_A)
    seen = len(fleet.front.log())
    with Load(fleet) as load:
        fleet.stop("b")
        died = time.time()
        load.wait(lambda: time.time() > died + 1)
    assert load.wrong == []
    assert load.failures("patient") == load.failures("impatient") == []
    tried = [line for line in load.log(seen) if line["instances"].startswith(f"{fleet.address('b')}, ")]
    assert tried and {line["status"] for line in tried} == {200}
    print(f"{len(load.outcomes)} requests, {len(tried)} answered by the other instance")


@pytest.mark.long
def test_one_after_the_other_again_and_again(fleet: Fleet) -> None:
    """Six deaths in a row under load: no client that retries notices, and every answer is right."""
    fleet.ready(**ONE_EACH)
    with Load(fleet) as load:
        for name in "ab" * 3:
            fleet.stop(name)
            fleet.start(name, ONE_EACH[name])
            restarted = time.time()
            load.wait(lambda n=name, t=restarted: answers_of(fleet, n, since=t) > 5)
    assert load.wrong == []
    assert load.failures("patient") == load.failures("impatient") == []
    print(f"{len(load.outcomes)} requests, six instances killed, no failure seen")
