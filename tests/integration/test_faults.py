"""What goes wrong around a real TorchServe: a worker killed in mid-batch, clients that leave, a full queue, bodies made
to keep a worker busy. The server goes on, and who has an answer has the right one."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from urllib.parse import urlsplit

import httpx
import psutil
import pytest

pytest.importorskip("ts")
from load_clients import ask_all, demo_checkpoint, demo_images, serving, workers
from mixed_traffic import Asked, Traffic, difference
from test_load import Loaded

from elude_runtime.cli.health import not_ready
from elude_runtime.cli.server_process import session_members
from elude_runtime.cli.torchserve import Server
from elude_runtime.client import Client, ProblemError

pytestmark = pytest.mark.server
BATCH, QUEUE = 8, 64  # as shipped


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loaded]:
    folder = tmp_path_factory.mktemp("faults")
    with serving(demo_checkpoint(folder), folder, demo_images(4), "demo") as loaded:
        yield loaded


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def queued(server: Server) -> int:
    (version,) = httpx.get(f"{server.management_url}/models/demo", timeout=60).json()
    return int(version["jobQueueStatus"]["pendingRequests"])


def ready(server: Server) -> bool:
    return not_ready(server.management_url, ["demo"]) is None


@contextmanager
def stopped_worker(server: Server) -> Iterator[int]:
    """The worker's process, halted: what is sent to it stays in flight for as long as a test wants."""
    until(lambda: ready(server))
    pid = workers(server)["demo"][0]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


def assert_answers(server: Server, traffic: Traffic) -> None:
    """Requests of every kind get the right answers."""
    found = ask_all(server.url, [several[0] for several in traffic.good.values()], "after")
    assert not found.faults and set(found.statuses) == {200}, found.faults


class TestWorkerKilledInMidBatch:
    def test_its_batch_is_lost_and_nothing_else(self, demo: Loaded) -> None:
        """TorchServe says 507 (or 500, where it has not yet learned how the process ended) to the batch in flight, and
        starts the worker again; what waited is answered by the new one."""
        server, traffic = demo
        raw = traffic.good["raw"]
        asked = [raw[n % len(raw)] for n in range(BATCH + 4)]
        with stopped_worker(server) as pid, ThreadPoolExecutor(len(asked)) as pool:
            found = [pool.submit(_answer, server, one) for one in asked]
            until(lambda: queued(server) >= 4)
            os.kill(pid, signal.SIGKILL)
            answers = [one.result() for one in found]
        lost = [answer for answer in answers if answer.status_code != 200]
        assert 0 < len(lost) <= BATCH
        for answer in lost:
            said = answer.json()
            assert answer.status_code in (500, 507)
            assert (said["type"], said["message"]) == ("InternalServerException", "Worker died.")
        for one, answer in zip(asked, answers, strict=True):
            if answer.status_code == 200:
                assert not one.fault("", 200, {}, answer.content)
        until(lambda: ready(server))
        assert workers(server)["demo"][0] != pid
        assert_answers(server, traffic)

    def test_the_client_asks_again(self, demo: Loaded) -> None:
        server, traffic = demo
        raw = traffic.good["raw"]

        def predict(one: Asked) -> str:
            with Client(server.url, "demo", timeout=60) as client:
                reply = json.loads(client.predict(one.body).model_dump_json())
            return difference(reply["predictions"], one.expected["predictions"])

        with stopped_worker(server) as pid, ThreadPoolExecutor(BATCH) as pool:
            found = [pool.submit(predict, raw[n % len(raw)]) for n in range(BATCH)]
            time.sleep(0.5)
            os.kill(pid, signal.SIGKILL)
            assert [one.result() for one in found] == [""] * BATCH


class TestClientsThatLeave:
    def test_before_the_answer_or_in_the_middle_of_a_body(self, demo: Loaded) -> None:
        """50 that close at once, 50 that hang up half-way, 50 that send a byte now and then: nobody else waits."""
        server, traffic = demo
        until(lambda: ready(server))
        before, image = workers(server), traffic.good["raw"][0].body
        head = f"POST /predictions/demo HTTP/1.1\r\nHost: x\r\nContent-Length: {len(image)}\r\n".encode()
        slow = [_open(server, head) for _ in range(50)]
        half = [_open(server, head + b"\r\n" + image[: len(image) // 2]) for _ in range(50)]
        for number in range(50):
            gone = _open(server, head + b"\r\n" + image)
            if number % 2:  # a reset in place of an orderly end
                gone.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            gone.close()
        for number, connection in enumerate(half):
            if number % 2:
                connection.close()
        for _ in range(5):
            for connection in slow:
                connection.sendall(b"X-Slow: 1\r\n")
            assert_answers(server, traffic)
        # who comes back to its half-sent request, or ends its slow one, is answered too
        half[0].sendall(image[len(image) // 2 :])
        slow[0].sendall(b"\r\n" + image)
        for connection in (half[0], slow[0]):
            connection.settimeout(60)
            assert connection.recv(4096).startswith(b"HTTP/1.1 200")
        for connection in [*slow, *half]:
            connection.close()
        assert workers(server) == before and queued(server) == 0
        until(lambda: _connections(server) < 10)

    def test_they_fill_the_queue_and_the_others_come_again(self, demo: Loaded) -> None:
        """Whoever left still stands in the queue: beyond it others get TorchServe's 503; a client comes again."""
        server, traffic = demo
        one = traffic.good["raw"][0]
        head = f"POST /predictions/demo HTTP/1.1\r\nHost: x\r\nContent-Length: {len(one.body)}\r\n\r\n".encode()
        with stopped_worker(server) as pid, ThreadPoolExecutor(1) as pool:
            for _ in range(QUEUE + BATCH):
                _open(server, head + one.body).close()
            until(lambda: queued(server) == QUEUE)
            refused = _answer(server, one)
            assert (refused.status_code, refused.json()["type"]) == (503, "ServiceUnavailableException")
            with pytest.raises(ProblemError, match="server-unavailable"), Client(server.url, "demo", retries=0) as once:
                once.predict(one.body)
            with Client(server.url, "demo", timeout=60, retries=8) as client:
                patient = pool.submit(client.predict, one.body)
                time.sleep(0.5)
                assert not patient.done()
                os.kill(pid, signal.SIGCONT)
                assert patient.result().predictions
        assert workers(server)["demo"] == (pid, "READY")
        assert_answers(server, traffic)


def test_bodies_that_are_made_to_keep_a_worker_busy(demo: Loaded) -> None:
    """Eight at once, each as large as the server takes: one batch of them must be over before `responseTimeout`, which
    would end the worker. Brackets alone held it for 20 seconds each."""
    server, traffic = demo
    until(lambda: ready(server))
    before, size = workers(server), 16_000_000
    cell = json.dumps({"feature": "a/P0", "mode": "ablate", "apply": {"mask": [[2] * 900] * 900}}).encode()
    bodies = {
        b"[" * size: 400,
        b"[" + b"{}," * (size // 3) + b"{}]": 400,
        b'"' * size: 400,
        b'{"a":' * (size // 5): 400,
        b'{"steer":{"edits":[' + b",".join([cell] * (size // len(cell) - 1)) + b"]}}": 422,
        b'{"explain":{"targets":[{"direction":[' + b"null," * (size // 5 - 20) + b"null]}]}}": 422,
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[' + b"1.5," * (size // 4 - 40) + b"1]}]}": 422,
        b'{"image":{"b64":"' + b"A" * (size - 40) + b'"}}': 413,
    }  # fmt: skip

    def send(body: bytes) -> httpx.Response:
        headers = {"Content-Type": "application/json"}
        return httpx.post(f"{server.url}/predictions/demo", content=body, headers=headers, timeout=120)

    with ThreadPoolExecutor(len(bodies)) as pool:
        found = list(pool.map(send, bodies))
    assert [answer.status_code for answer in found] == list(bodies.values())
    assert workers(server) == before
    assert_answers(server, traffic)


def _answer(server: Server, one: Asked) -> httpx.Response:
    return httpx.post(f"{server.url}{one.path}", content=one.body, headers=dict(one.headers), timeout=90)


def _open(server: Server, sent: bytes) -> socket.socket:
    """A connection over which this went out."""
    address = urlsplit(server.url)
    connection = socket.create_connection((str(address.hostname), address.port or 0), timeout=60)
    connection.sendall(sent)
    return connection


def _connections(server: Server) -> int:
    """Open ones, or half-closed, on the inference port."""
    port = urlsplit(server.url).port
    return sum(
        connection.laddr.port == port and connection.status in (psutil.CONN_ESTABLISHED, psutil.CONN_CLOSE_WAIT)
        for process in session_members(server.pid, 0)
        for connection in process.net_connections(kind="inet")
        if connection.laddr
    )
