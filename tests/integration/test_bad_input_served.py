"""Bad and strange input through a real TorchServe: status and problem of every row of the table, in one batch with
plain rows that get the same digits as without it, and the worker that lives on."""

from __future__ import annotations

import itertools
import json
import shutil
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from http.client import HTTPResponse
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest

pytest.importorskip("ts")
from api_faults import damaged, wrong
from api_strategies import Call, World, right
from bad_input import CONV_MODEL, LAST_MODEL, P0, PNG, TABLE, VIT_MODEL, WIDTH, Input, last_block
from conftest import Rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import SECOND, encoded, picture

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.checkpoint.policies import save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.torchserve import Server

pytestmark = pytest.mark.server
BATCH = 3
NEIGHBOURS = [encoded(picture(400)), encoded(picture(401))]


@dataclass(frozen=True)
class Served:
    """The server, and the same checkpoints in this process."""

    server: Server
    engines: dict[str, Engine]

    def send(self, case: Input) -> httpx.Response:
        verb = "explanations" if case.explain else "predictions"
        route = f"/1.0/{case.route}" if case.route else ""
        url = f"{self.server.url}/{verb}/{case.model}{route}"
        if case.parts is not None:
            files = {name: (name, data, RAW_PARTS[name]) for name, data in case.parts.items()}
            return httpx.post(url, files=files, headers=case.headers, timeout=60)
        headers = {**case.headers, "Content-Type": case.content_type}
        return httpx.post(url, content=case.body, headers=headers, timeout=60)

    def plain(self) -> httpx.Response:
        """A prediction of the first neighbour."""
        return self.send(plain(NEIGHBOURS[0], VIT_MODEL))

    def workers(self) -> dict[str, Any]:
        """Process id and state of each model's worker."""
        found = {}
        for name in self.engines:
            (version,) = httpx.get(f"{self.server.management_url}/models/{name}").json()
            (worker,) = version["workers"]
            found[name] = (worker["pid"], worker["status"])
        return found


RAW_PARTS = {"image": "image/png", "request": "application/json", "extra": "text/plain"}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten, mobilenet: Rewritten) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bad")
    settings = folder / "model-config.yaml"
    settings.write_text(f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {BATCH}\nmaxBatchDelay: 500\nresponseTimeout: 120\n")
    paths = {
        VIT_MODEL: _with_interventions(vit, folder / "vit"),
        CONV_MODEL: mobilenet.path,
        LAST_MODEL: last_block(folder / "last"),
    }
    for name, path in paths.items():
        build_archive(path, folder / "store", name=name, config=settings)
    engines = {n: Engine.open(p, ServingConfig(), name=n, version="1.0") for n, p in paths.items()}
    with Server(folder / "store", token_auth=False, environment={"ELUDE_THREADS": "1"}) as server:
        server.wait_ready(240)
        yield Served(server, engines)


def _with_interventions(vit: Rewritten, out: Path) -> Path:
    """A copy of the checkpoint with a vector and a policy."""
    shutil.copytree(vit.path, out)
    partition = vit.model.manifest.partition_sha256
    direction = np.linspace(-1, 1, WIDTH, dtype=np.float32)
    save_vector(
        out, StoredVector("waves", SECOND, partition, "2026-01-01T00:00:00+00:00", direction, [], [], None, 1, 1)
    )
    save_policy(out, "calm", {"partition_sha256": partition, "edits": [{"feature": P0, "mode": "ablate"}]})
    return out


def content(text: str) -> dict[str, Any]:
    """A reply without what differs from one request to the next."""
    return {k: v for k, v in json.loads(text).items() if k not in ("id", "timing_ms")}


def plain(image: bytes, model: str) -> Input:
    return Input("plain", image, "image/png", model=model)


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_a_row_and_its_neighbours(served: Served, case: Input) -> None:
    before = served.workers()
    cases = [case, *(plain(image, case.model) for image in NEIGHBOURS)]
    with ThreadPoolExecutor(BATCH) as pool:
        answered, *others = pool.map(served.send, cases)
    _assert_answer(served, case, answered)
    assert [o.status_code for o in others] == [200, 200]
    # the order of arrival is the server's: in one of them every digit of the neighbours is the same in process
    found = [content(o.text) for o in others]
    engine, rows = served.engines[case.model], [c.row() for c in cases]
    assert any(
        found == _in_process(engine, rows, order, batches)
        for order in itertools.permutations(range(BATCH))
        for batches in ([3], [2, 1], [1, 2], [1, 1, 1])
    ), found
    assert served.workers() == before and {status for _, status in before.values()} == {"READY"}


def _in_process(engine: Engine, rows: list[Row], order: tuple[int, ...], batches: list[int]) -> list[dict[str, Any]]:
    """The two neighbours' replies, when the rows arrive in this order and are cut into these batches."""
    texts: dict[int, str] = {}
    left = list(order)
    for size in batches:
        taken, left = left[:size], left[size:]
        texts |= {i: a.body for i, a in zip(taken, engine.answer([rows[i] for i in taken]), strict=True)}
    return [content(texts[1]), content(texts[2])]


def _assert_answer(served: Served, case: Input, answered: httpx.Response) -> None:
    assert answered.status_code == case.status, answered.text
    assert not [name for name in answered.headers if "evil" in name.lower()]
    if case.kind:
        assert answered.headers["content-type"] == "application/problem+json"
        problem = ProblemDocument.model_validate_json(answered.text)
        assert (problem.type, problem.status) == (case.kind, case.status)
        assert case.said in answered.text and "Traceback" not in answered.text
        return
    reply = Reply.model_validate_json(answered.text)
    assert reply.explanations is None and case.same_as is not None
    if case.size is not None:
        assert (reply.input.width, reply.input.height) == case.size
    same = plain(case.same_as, case.model).row()
    padding = [plain(image, case.model).row() for image in NEIGHBOURS]
    expected = [
        content(served.engines[case.model].answer([same, *padding[: reply.batch_size - 1]])[0].body),
        content(served.engines[case.model].answer([*padding[: reply.batch_size - 1], same])[-1].body),
        content(served.engines[case.model].answer([*padding[:1], same, *padding[1:]])[1].body),
    ]
    found = [p.model_dump() for p in reply.predictions]
    assert found in [e["predictions"] for e in expected]


@pytest.mark.parametrize(
    "head",
    [
        "X-Id: a\r\n X-Evil: 1",
        "Content-Type: image/png\r\nX-Id: \x01\x02",
        "Content-Type: multipart/form-data",
        "Content-Type: multipart/form-data; boundary=",
        "Content-Type: ;;;",
        "Content-Type:",
        "Content-Type: image/png\r\nContent-Type: application/json",
        "Content-Encoding: gzip",
        "Transfer-Encoding: chunked",
        "Expect: 100-continue",
    ],
)
def test_headers_that_no_client_writes(served: Served, head: str) -> None:
    """The front end may answer these itself, and not kindly; the worker never hears of them or answers as usual."""
    before = served.workers()
    status, headers = _by_hand(served, f"POST /predictions/{VIT_MODEL} HTTP/1.1", head, PNG)
    assert "x-evil" not in headers.lower()
    assert status in (200, 400, 413, 415, 422, 500), headers
    assert served.send(plain(PNG, VIT_MODEL)).status_code == 200
    assert served.workers() == before


def test_a_body_that_never_ends(served: Served) -> None:
    """A client that promises more than it sends and leaves takes nobody with it."""
    before = served.workers()
    address = urlsplit(served.server.url)
    for _ in range(5):
        with socket.create_connection((address.hostname, address.port), timeout=10) as connection:
            head = f"POST /predictions/{VIT_MODEL} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
            connection.sendall(head.encode() + PNG[:50])
    assert served.send(plain(PNG, VIT_MODEL)).status_code == 200
    assert served.workers() == before


def test_nothing_of_a_client_is_in_the_servers_answers_to_others(served: Served) -> None:
    """Two clients at once with different mistakes: each hears of its own."""
    cases = [c for c in TABLE if c.model == VIT_MODEL and c.kind and c.said]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(served.send, cases))
    for case, answered in zip(cases, found, strict=True):
        assert answered.status_code == case.status and case.said in answered.text, case.name


def test_generated_requests(served: Served) -> None:
    """Right, wrong and damaged documents, four at a time: the engine's own statuses, no 5xx but 503 and a number that
    left float32 (`non-finite-output`), the same worker at the end, and nobody else's answer touched."""
    engine, before = served.engines[VIT_MODEL], served.workers()
    world = World.of(engine)
    calls: list[Call] = []

    @settings(max_examples=70, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.tuples(right(world), wrong(world), damaged(world)))
    def collect(drawn: tuple[Call, ...]) -> None:
        calls.extend(drawn)

    collect()
    plain_logits = {}
    with ThreadPoolExecutor(4) as pool:
        for start in range(0, len(calls), 3):
            group = calls[start : start + 3]
            *found, neighbour = pool.map(lambda ask: ask(), [*(partial(_sent, served, c) for c in group), served.plain])
            for call, answered in zip(group, found, strict=True):
                kind = answered.json()["type"] if answered.status_code != 200 else ""
                assert answered.status_code < 500 or answered.status_code == 503 or kind == "non-finite-output", call
                alone = engine.answer([call.row])[0]
                assert answered.status_code in (alone.status, 503), (call, answered.text)
                assert "Traceback" not in answered.text
            assert neighbour.status_code == 200
            reply = Reply.model_validate_json(neighbour.text)
            plain_logits.setdefault(reply.batch_size, set()).add(tuple(p.logit for p in reply.predictions))
    assert served.workers() == before and len(calls) >= 200
    largest = [value for values in plain_logits.values() for value in values]
    assert np.ptp(np.array(largest), axis=0).max() < 1e-5  # what batch shapes do to last bits, and no more


def _sent(served: Served, call: Call) -> httpx.Response:
    url = served.server.url + call.path.replace("/tiny", f"/{VIT_MODEL}")
    if "image" in call.row.parts:
        files = {name: (name, data, RAW_PARTS.get(name, "text/plain")) for name, data in call.row.parts.items()}
        return httpx.post(url, files=files, timeout=60)
    headers = {"Content-Type": call.row.content_type} if call.row.content_type else {}
    return httpx.post(url, content=call.row.parts.get("body", b""), headers=headers, timeout=60)


def _by_hand(served: Served, line: str, head: str, body: bytes) -> tuple[int, str]:
    """Status and headers of a request written byte by byte; 400 where the server only hangs up.

    One response is read and no more: TorchServe keeps a connection open even when asked to close it.
    """
    address = urlsplit(served.server.url)
    request = f"{line}\r\nHost: {address.netloc}\r\n{head}\r\n"
    if "chunked" in head:
        sent = request.encode() + b"\r\n" + f"{len(body):x}\r\n".encode() + body + b"\r\n0\r\n\r\n"
    else:
        sent = request.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection((address.hostname, address.port), timeout=60) as connection:
        connection.sendall(sent)
        response = HTTPResponse(connection, method="POST")
        try:
            response.begin()
        except ConnectionResetError:  # http.client's RemoteDisconnected is one too
            return 400, ""
        response.read()
        return response.status, str(response.headers)
