"""deploy/nginx.conf before instances that misbehave on demand: keys, routes, limits, second attempts, releases."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from nginx_front import DEPLOY, INSTALLED, KEYS, MISSING, Front
from nginx_instance import Instance

from elude_runtime.cli.server_settings import read_properties
from elude_runtime.client import ProblemError
from elude_runtime.client.problems import SERVER_PROBLEMS

pytestmark = pytest.mark.skipif(not INSTALLED, reason=MISSING)
PREDICT = "/predictions/demo"


@pytest.fixture(scope="module")
def instances() -> Iterator[dict[str, Instance]]:
    made = {name: Instance(name) for name in ("blue-1", "blue-2", "green-1")}
    yield made
    for one in made.values():
        one.shutdown()
        one.server_close()


@pytest.fixture(scope="module")
def nginx(tmp_path_factory: pytest.TempPathFactory, instances: dict[str, Instance]) -> Iterator[Front]:
    prefix = tmp_path_factory.mktemp("nginx")
    blue = [instances[name].address for name in ("blue-1", "blue-2")]
    with Front(prefix, blue, [instances["green-1"].address]) as front:
        yield front


@pytest.fixture
def front(nginx: Front, instances: dict[str, Instance]) -> Front:
    """Healthy instances that were asked nothing, an nginx that holds none of them for failed, all on blue."""
    used = nginx.release != "blue" or any(one.mode != "ok" for one in instances.values())
    for one in instances.values():
        one.mode, one.delay = "ok", 0.0
        one.asked.clear()
    if used:
        nginx.switch("blue")
    return nginx


def asked(instances: dict[str, Instance]) -> dict[str, int]:
    return {name: len(one.asked) for name, one in instances.items()}


class TestKeys:
    @pytest.mark.parametrize(
        "header", [None, "Bearer", f"Bearer {'0' * 64}", KEYS["ann"], f"Basic {KEYS['ann']}", "x,y"]
    )
    def test_no_key_no_answer(self, front: Front, instances: dict[str, Instance], header: str | None) -> None:
        headers = {"Authorization": header} if header else {}
        with front.http(who=None) as http:
            reply = http.post(PREDICT, content=b"image", headers=headers)
        assert (reply.status_code, reply.json()["type"]) == (401, "server-unauthorized")
        assert reply.headers["www-authenticate"] == "Bearer" and reply.headers["x-request-id"]
        assert not any(asked(instances).values())

    def test_the_client_says_so(self, front: Front) -> None:
        with front.client("demo", token="0" * 64) as client, pytest.raises(ProblemError) as caught:
            client.predict(b"image")
        assert (caught.value.type, caught.value.status) == ("server-unauthorized", 401)

    def test_every_client_has_its_own(self, front: Front) -> None:
        for who in KEYS:
            with front.http(who) as http:
                assert http.post(PREDICT, content=b"image").status_code == 200
        assert front.log(lambda lines: {line["client"] for line in lines} >= set(KEYS))

    def test_the_key_stays_here(self, front: Front, instances: dict[str, Instance]) -> None:
        with front.http() as http:
            http.post(PREDICT, content=b"image", headers={"explain": "True", "Describe": "True", "url_path": "x"})
        ((_, _, headers, _),) = instances["blue-1"].asked + instances["blue-2"].asked
        assert not {"authorization", "explain", "describe", "url_path"} & set(headers)
        text = (front.prefix / "elude.log").read_text() + (front.prefix / "error.log").read_text()
        assert not any(key in text for key in KEYS.values())


ALLOWED = [
    ("POST", PREDICT), ("POST", "/predictions/demo/1.0"), ("POST", "/predictions/demo/1.0/describe"),
    ("POST", "/explanations/demo"), ("POST", "/explanations/demo/2.0"), ("POST", "/v1/models/demo:predict"),
    ("POST", "/v1/models/demo:explain"), ("POST", "/v2/models/demo/infer"), ("POST", "/v2/models/demo/explain"),
    ("GET", "/v2/health/ready"), ("GET", "/v2/models/demo/ready"), ("GET", "/ping"),
]  # fmt: skip
REFUSED = [
    ("GET", "/models"), ("POST", "/models?url=x.mar"), ("GET", "/models/demo"), ("PUT", "/models/demo/2.0/set-default"),
    ("DELETE", "/models/demo"), ("POST", "/models/demo/invoke"), ("POST", "/invocations"), ("GET", "/metrics"),
    ("OPTIONS", "/"), ("GET", "/api-description"), ("GET", PREDICT), ("PUT", PREDICT), ("OPTIONS", PREDICT),
    ("POST", "/predictions/"), ("POST", "/predictions/a/b/c/d"), ("POST", "/predictions/../models"),
    ("POST", "/predictions/%2e%2e%2fmodels%2fdemo"), ("POST", "/v2/models/demo/1.0/infer"),
    ("POST", "/v2/repository/index"), ("POST", "/token"), ("GET", "/"),
]  # fmt: skip


class TestRoutes:
    @pytest.mark.parametrize(("method", "path"), ALLOWED, ids=map(" ".join, ALLOWED))
    def test_goes_through(self, front: Front, instances: dict[str, Instance], method: str, path: str) -> None:
        with front.http() as http:
            assert http.request(method, path, content=b"{}").status_code == 200
        ((got, target, _, _),) = [call for one in instances.values() for call in one.asked]
        assert (got, target) == (method, path)

    @pytest.mark.parametrize(("method", "path"), REFUSED, ids=map(" ".join, REFUSED))
    def test_does_not(self, front: Front, instances: dict[str, Instance], method: str, path: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "Host: x", f"Authorization: Bearer {KEYS['ann']}", "Connection: close"]
        plain = socket.create_connection(("127.0.0.1", front.port))  # httpx would tidy the path
        with front.trust().wrap_socket(plain, server_hostname="127.0.0.1") as tls:
            tls.sendall("".join(f"{line}\r\n" for line in [*lines, ""]).encode())
            text = b"".join(iter(lambda: tls.recv(65536), b"")).decode()
        assert text.startswith("HTTP/1.1 404 ") and '"server-unknown-route"' in text
        assert not any(asked(instances).values())

    def test_a_watcher_needs_no_key(self, front: Front) -> None:
        with front.http(who=None) as http:
            assert http.get("/ping").status_code == 200
            assert http.post("/ping").status_code == 200, "as TorchServe's own"

    def test_identities_and_headers(self, front: Front, instances: dict[str, Instance]) -> None:
        trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
        with front.http() as http:
            reply = http.post(PREDICT, content=b"x", headers={"X-Request-Id": "my.id-1", "traceparent": trace})
            made = http.post(PREDICT, content=b"x", headers={"X-Request-Id": 'forged"\x7f'})
        calls = {headers["x-request-id"]: headers for one in instances.values() for _, _, headers, _ in one.asked}
        assert calls["my.id-1"]["traceparent"] == trace
        assert reply.headers.get_list("x-request-id") == ["my.id-1"]
        assert len(made.headers["x-request-id"]) == 32 and made.headers["x-request-id"] in calls
        assert reply.headers.get_list("cache-control") == ["no-store"] and reply.headers["server"] == "nginx"
        assert not {"pragma", "expires"} & set(reply.headers)
        lines = front.log(lambda lines: any(line["request"] == "my.id-1" for line in lines))
        (line,) = [line for line in lines if line["request"] == "my.id-1"]
        assert (line["torchserve"], line["trace"], line["status"]) == ("torchserves-own", trace, 200)


class TestLimits:
    def test_the_configurations_agree(self) -> None:
        text = (DEPLOY / "nginx.conf").read_text()
        largest = int(read_properties(DEPLOY / "config.properties")["max_request_size"])
        assert f"client_max_body_size {largest};" in text and f"may have {largest} bytes" in text
        (line,) = [
            x for x in (DEPLOY / "model-config.yaml").read_text().splitlines() if x.startswith("responseTimeout:")
        ]
        (reading,) = [x for x in text.splitlines() if x.strip().startswith("proxy_read_timeout")]
        assert int(line.split()[1]) < int(reading.split()[1].rstrip("s;"))

    def test_a_body_to_the_byte(self, front: Front, instances: dict[str, Instance]) -> None:
        largest = int(read_properties(DEPLOY / "config.properties")["max_request_size"])
        with front.http() as http:
            assert http.post(PREDICT, content=b"x" * largest).status_code == 200
            assert max(size for one in instances.values() for *_, size in one.asked) == largest
        with front.client("demo") as client, pytest.raises(ProblemError) as caught:
            client.predict(b"x" * (largest + 1))
        assert (caught.value.type, caught.value.status) == ("server-too-large", 413)
        assert sum(asked(instances).values()) == 1

    def test_a_body_of_unannounced_length(self, front: Front, instances: dict[str, Instance]) -> None:
        with front.http() as http:
            reply = http.post(PREDICT, content=(b"x" * 2**20 for _ in range(17)))
        assert (reply.status_code, reply.json()["type"]) == (413, "server-too-large")
        assert not any(asked(instances).values())

    def test_too_many_a_second(self, front: Front) -> None:
        """The rate is a client's: others do not notice."""
        front.rewrite(lambda text: text.replace("rate=100r/s", "rate=1r/s").replace("burst=200", "burst=5"))
        try:
            with front.http("bob") as http:
                replies = [http.post(PREDICT, content=b"x") for _ in range(12)]
            with front.http("ann") as http:
                assert http.post(PREDICT, content=b"x").status_code == 200
        finally:
            front.rewrite(lambda text: text)
        refused = [r for r in replies if r.status_code == 429]
        # nginx counts the burst either with the first request or beside it
        assert 3 <= len(refused) <= 7 and [r.status_code for r in replies[:5]] == [200] * 5
        assert refused[0].json()["type"] == "server-unavailable" and refused[0].headers["retry-after"] == "1"

    def test_too_many_at_once(self, front: Front, instances: dict[str, Instance]) -> None:
        """What one client has under way is bounded, and others do not notice."""
        front.rewrite(lambda text: text.replace("limit_conn elude_under_way 32;", "limit_conn elude_under_way 3;"))
        for instance in instances.values():
            instance.delay = 1.0
        try:
            with front.http("bob") as bob, front.http("ann") as ann, ThreadPoolExecutor(9) as pool:
                asked = [pool.submit(bob.post, PREDICT, content=b"x") for _ in range(8)]
                other = pool.submit(ann.post, PREDICT, content=b"x")
                replies = [one.result() for one in asked]
                assert other.result().status_code == 200
        finally:
            for instance in instances.values():
                instance.delay = 0.0
            front.rewrite(lambda text: text)
        assert sorted(r.status_code for r in replies) == [200] * 3 + [429] * 5
        assert {r.json()["type"] for r in replies if r.status_code == 429} == {"server-unavailable"}

    def test_its_own_answers_are_of_the_clients_family(self) -> None:
        lines = [
            x.strip() for x in (DEPLOY / "nginx.conf").read_text().splitlines() if "return 4" in x or "return 5" in x
        ]
        made = [(int(x.split()[1]), json.loads(x.split("'")[1])) for x in lines if "'" in x]
        assert len(made) == 6
        for status, document in made:
            assert document["status"] == status and document["title"] == SERVER_PROBLEMS[document["type"]][1]


class TestElsewhere:
    """What a failed attempt costs a client: nothing, where another instance may do better."""

    def ask(self, front: Front, count: int = 6) -> list[httpx.Response]:
        with front.http() as http:
            return [http.post(PREDICT, content=b"image") for _ in range(count)]

    def test_an_instance_that_is_not_there(self, front: Front, instances: dict[str, Instance]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            gone = f"127.0.0.1:{free.getsockname()[1]}"
        front.rewrite(lambda text: text.replace(instances["blue-1"].address, gone))
        try:
            replies = self.ask(front, 12)
        finally:
            front.rewrite(lambda text: text)
        assert [r.json() for r in replies] == [{"by": "blue-2"}] * 12
        lines = front.log(lambda lines: any(gone in line["instances"] for line in lines))
        tried = [line for line in lines if gone in line["instances"]]
        assert 1 <= len(tried) <= 2, "after two failures it is left alone"

    def test_a_connection_that_breaks_off(self, front: Front, instances: dict[str, Instance]) -> None:
        instances["blue-1"].mode = "cut"
        assert [r.json() for r in self.ask(front)] == [{"by": "blue-2"}] * 6
        assert len(instances["blue-1"].asked) >= 1

    def test_all_gone(self, front: Front, instances: dict[str, Instance]) -> None:
        """502 in the client's words; and two instances are asked, not every one again and again."""
        instances["blue-1"].mode = instances["blue-2"].mode = "cut"
        (reply,) = self.ask(front, 1)
        assert (reply.status_code, reply.json()["type"]) == (502, "server-unavailable")
        assert reply.headers["retry-after"] == "1"
        with front.client("demo", retries=0) as client, pytest.raises(ProblemError, match="server-unavailable"):
            client.predict(b"image")

    @pytest.mark.parametrize(("mode", "status"), [("problem", 500), ("busy", 503)])
    def test_what_would_be_so_everywhere_stays(
        self, front: Front, instances: dict[str, Instance], mode: str, status: int
    ) -> None:
        """No second attempt, the instance's own document, and nobody is held for failed."""
        for name in ("blue-1", "blue-2"):
            instances[name].mode = mode
        replies = self.ask(front, 8)
        assert [r.status_code for r in replies] == [status] * 8
        assert replies[0].headers["content-type"] == "application/problem+json"
        assert replies[0].json()["type"] == {"problem": "non-finite-output", "busy": "overloaded"}[mode]
        assert sum(asked(instances).values()) == 8 and min(len(instances[n].asked) for n in ("blue-1", "blue-2")) >= 3

    def test_half_an_answer_is_asked_again_by_the_client(self, front: Front, instances: dict[str, Instance]) -> None:
        """nginx cannot: what came has gone out."""
        instances["blue-1"].mode = instances["blue-2"].mode = "half"
        with front.client("demo", retries=1) as client, pytest.raises(ProblemError) as caught:
            client.predict(b"image")
        assert caught.value.type == "server-unreachable" and sum(asked(instances).values()) == 2

    def test_whoever_is_slow_gets_fewer(self, front: Front, instances: dict[str, Instance]) -> None:
        instances["blue-1"].delay = 0.3

        async def ask() -> list[str]:
            headers = {"Authorization": f"Bearer {KEYS['cleo']}"}
            limits = httpx.Limits(max_connections=4)
            async with httpx.AsyncClient(verify=front.trust(), headers=headers, limits=limits, timeout=30) as http:
                replies = await asyncio.gather(*[http.post(front.url + PREDICT, content=b"x") for _ in range(60)])
            return [r.json()["by"] for r in replies]

        by = asyncio.run(ask())
        assert by.count("blue-1") < 15


class TestReleases:
    def by(self, front: Front, path: str = PREDICT, who: str = "ann") -> str:
        with front.http(who) as http:
            return str(http.post(path, content=b"image").json()["by"]).partition("-")[0]

    def test_switch_and_back(self, front: Front) -> None:
        assert self.by(front) == "blue"
        front.switch("green")
        assert self.by(front) == "green"
        front.switch("blue")
        assert self.by(front) == "blue"

    @pytest.mark.parametrize("release", ["blue", "green", "canary"])
    def test_a_named_version_is_always_its_own(self, front: Front, release: str) -> None:
        front.switch(release)
        for verb in ("predictions", "explanations"):
            assert self.by(front, f"/{verb}/demo/1.0") == "blue"
            assert self.by(front, f"/{verb}/demo/2.0/describe") == "green"
        assert self.by(front, "/predictions/demo/9.9") in ("blue", "green")

    def test_a_canary_is_a_client_and_not_a_request(self, front: Front) -> None:
        canary = front.prefix / "elude" / "canary.conf"
        shipped = canary.read_text()
        front.switch("canary")
        assert {self.by(front, who=who) for who in KEYS} <= {"blue", "green"}
        canary.write_text(shipped.replace("10%", "50%"))
        try:
            front.reload()
            found = {who: {self.by(front, who=who) for _ in range(3)} for who in KEYS}
        finally:
            canary.write_text(shipped)
        assert all(len(pools) == 1 for pools in found.values())
        assert {pool for pools in found.values() for pool in pools} == {"blue", "green"}

    def test_explanations_have_a_pool_of_their_own_if_wanted(
        self, tmp_path: Path, instances: dict[str, Instance], front: Front
    ) -> None:
        blue = [instances["blue-1"].address]
        with (
            Front(tmp_path, blue, change=lambda text: text.replace("#rewrite", "rewrite")) as other,
            other.http() as http,
        ):
            for path in ("/explanations/demo", "/explanations/demo/1.0", PREDICT):
                assert http.post(path, content=b"x").status_code == 200
        paths = [path for _, path, _, _ in instances["blue-1"].asked]
        assert paths == ["/explanations/demo-explain", "/explanations/demo-explain/1.0", PREDICT]

    def test_a_reload_loses_nothing(self, front: Front, instances: dict[str, Instance]) -> None:
        """Under load, with requests under way that take long, and without one retry: a connection a request, since an
        idle one may be closed at the very moment at which a client takes it up again."""
        for one in instances.values():
            one.delay = 0.05
        answers: list[str] = []
        end = threading.Event()

        def load() -> None:
            trust = front.trust()
            while not end.is_set():
                headers = {"Authorization": f"Bearer {KEYS['dan']}", "Connection": "close"}
                reply = httpx.post(
                    front.url + PREDICT, content=b"x" * 20_000, headers=headers, verify=trust, timeout=30
                )
                answers.append(reply.json()["by"] if reply.status_code == 200 else str(reply.status_code))

        threads = [threading.Thread(target=load) for _ in range(4)]
        for thread in threads:
            thread.start()
        for release in ("green", "blue", "canary", "blue"):
            front.switch(release)
            time.sleep(0.15)
        end.set()
        for thread in threads:
            thread.join(30)
        assert set(answers) == {"blue-1", "blue-2", "green-1"} and len(answers) > 20
        assert sum(asked(instances).values()) == len(answers)
