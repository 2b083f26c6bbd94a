"""The load generator against a small server that keeps count of what reaches it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from elude_runtime.cli.server_settings import free_ports
from elude_runtime.errors import EludeError, ServerError
from elude_runtime.explore.listen import in_background
from elude_runtime.traffic.figures import answered
from elude_runtime.traffic.generator import Answer, Ask, Generator
from elude_runtime.traffic.process import LoadProcess, pinned, split_cores


@dataclass
class Seen:
    """What a server saw; `seconds`: how long it lets each request wait."""

    url: str = ""
    seconds: float = 0.0
    bodies: list[bytes] = field(default_factory=list)
    connections: set[int] = field(default_factory=set)
    now: int = 0
    most: int = 0


@pytest.fixture
def server() -> Iterator[Seen]:
    seen = Seen()

    async def answer(request: Request) -> PlainTextResponse:
        seen.bodies.append(await request.body())
        assert request.client is not None
        seen.connections.add(request.client.port)
        seen.now += 1
        seen.most = max(seen.most, seen.now)
        await asyncio.sleep(seen.seconds)
        seen.now -= 1
        return PlainTextResponse(
            "no room" if seen.bodies[-1] == b"bad" else "ok", 503 if b"bad" in seen.bodies else 200
        )

    with in_background(Starlette(routes=[Route("/", answer, methods=["POST"])])) as seen.url:
        yield seen


def closed(asks: list[Ask], clients: int) -> list[Answer]:
    async def run() -> list[Answer]:
        generator = Generator(timeout=5)
        try:
            return await generator.closed(asks, clients)
        finally:
            await generator.close()

    return asyncio.run(run())


def opened(asks: list[Ask], times: list[float]) -> list[Answer]:
    async def run() -> list[Answer]:
        generator = Generator(timeout=5)
        try:
            return await generator.open(asks, times)
        finally:
            await generator.close()

    return asyncio.run(run())


class TestClosedLoop:
    def test_every_request_is_sent_once_and_answers_stand_in_order(self, server: Seen) -> None:
        answers = closed([Ask(server.url, b"%d" % n, {}, f"kind {n % 2}") for n in range(20)], clients=3)
        assert sorted(server.bodies, key=int) == [b"%d" % n for n in range(20)]
        assert [answer.kind for answer in answers] == [f"kind {n % 2}" for n in range(20)]
        assert {answer.status for answer in answers} == {200}

    def test_so_many_clients_wait_for_their_answers_on_connections_of_their_own(self, server: Seen) -> None:
        server.seconds = 0.03
        answers = closed([Ask(server.url, b"x")] * 12, clients=4)
        assert server.most == 4 and len(server.connections) == 4
        assert all(answer.seconds >= 0.03 for answer in answers)
        assert answers[-1].due >= 0.06  # the last four were sent after two rounds


class TestOpenLoop:
    def test_the_schedule_waits_for_no_answer(self, server: Seen) -> None:
        server.seconds = 0.5
        times = [0.02 * n for n in range(8)]
        answers = opened([Ask(server.url, b"x")] * 8, times)
        assert server.most == 8 and [answer.due for answer in answers] == times
        assert all(answer.seconds >= 0.5 and answer.late >= 0 for answer in answers)

    def test_a_late_request_is_counted_from_when_it_was_due(self, server: Seen) -> None:
        (answer,) = opened([Ask(server.url, b"x")], [-1.0])
        assert answer.late >= 1 and answer.seconds >= answer.late

    def test_times_and_requests_belong_together(self, server: Seen) -> None:
        with pytest.raises(ValueError):
            opened([Ask(server.url, b"x")] * 2, [0.0])


class TestFailures:
    def test_a_refusal_is_counted_with_its_reason(self, server: Seen) -> None:
        answers = closed([Ask(server.url, b"x"), Ask(server.url, b"bad"), Ask(server.url, b"bad")], clients=1)
        assert [answer.status for answer in answers] == [200, 503, 503] and answers[1].error == "no room"
        with pytest.raises(ServerError, match=r"2 of 3 requests failed \(503: no room\)"):
            answered(answers)

    def test_nobody_there(self) -> None:
        url = f"http://127.0.0.1:{free_ports(1)[0]}"
        (answer,) = closed([Ask(url, b"x")], clients=1)
        assert answer.status == 0 and "ConnectError" in answer.error
        with pytest.raises(ServerError, match="no answer: ConnectError"):
            answered([answer])


class TestProcess:
    def test_it_asks_from_a_process_and_cores_of_its_own(self, server: Seen) -> None:
        servers, generator = split_cores()
        with LoadProcess(generator) as load:
            answers = load.closed([Ask(server.url, b"x" * 1000)] * 6, clients=2)
            later = load.open([Ask(server.url, b"y")] * 2, [0.0, 0.05])
            pid = load._process.pid
            assert pid not in (None, os.getpid())
            if generator:
                assert os.sched_getaffinity(pid) == generator and not generator & servers
        assert [a.status for a in answers + later] == [200] * 8 and len(server.bodies) == 8
        assert len(server.connections) == 2  # kept from run to run
        assert not load._process.is_alive()

    def test_its_end_is_an_error(self, server: Seen) -> None:
        with LoadProcess() as load:
            load._process.kill()
            load._process.join()
            with pytest.raises(EludeError, match="ended by itself"):
                load.closed([Ask(server.url, b"x")], clients=1)

    @pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system pins no processes")
    def test_pinning_lasts_as_long_as_its_block(self) -> None:
        before = os.sched_getaffinity(0)
        with pinned(frozenset([min(before)])):
            assert os.sched_getaffinity(0) == {min(before)}
            with pinned(frozenset()):
                assert os.sched_getaffinity(0) == {min(before)}
        assert os.sched_getaffinity(0) == before
