"""The explorer's web application against an upstream that plays the served model, and every other server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Rewritten
from starlette.testclient import TestClient

from elude_runtime.checkpoint.policies import read_policies
from elude_runtime.explore.app import Explorer
from elude_runtime.explore.guard import HEADER, SECURITY_HEADERS
from elude_runtime.explore.images import ImageStore
from elude_runtime.explore.material import Material
from elude_runtime.explore.served import ServedModel

KEY, SECRET = "the-servers-key-0123", "this-runs-secret"  # pragma: allowlist secret
HOST = "http://127.0.0.1:8999"
IMAGE = b"\x89PNG not decoded here"
Handler = Callable[[httpx.Request], httpx.Response]


class Upstream:
    """Notes what it is asked, and answers by the operation or with what a test puts there."""

    def __init__(self, checkpoint_sha256: str) -> None:
        self.requests: list[httpx.Request] = []
        self.checkpoint_sha256 = checkpoint_sha256
        self.answer: Handler | None = None

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.requests.append(request)
        if self.answer is not None:
            return self.answer(request)
        if request.headers["content-type"] == "application/json":
            operation = json.loads(request.content)["op"]
            return httpx.Response(200, json=self.description() if operation == "describe" else {"features": []})
        return httpx.Response(200, json={"echo": 1.25})

    def description(self, **changed: Any) -> dict[str, Any]:
        info = {"name": "m", "version": "1.0", "base_sha256": "0", "checkpoint_sha256": self.checkpoint_sha256}
        made: dict[str, Any] = {
            "api_version": 1, "elude_version": "0", "model": info, "output": "logits", "classes": 3, "layers": [],
            "data_config": {}, "partition_sha256": "0", "policies": [], "vectors": [],
            "limits": {"max_image_bytes": 40}, "threads": 1, "problems": [], "openapi": {},
        }  # fmt: skip
        return {**made, **changed}

    @property
    def last(self) -> httpx.Request:
        return self.requests[-1]


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    """The tiny network's checkpoint as far as the explorer reads it, to write into."""
    folder = tmp_path / "ckpt"
    folder.mkdir()
    for name in ("elude.json", "features.parquet"):
        (folder / name).write_bytes((vit.path / name).read_bytes())
    return folder


@pytest.fixture
def upstream(checkpoint: Path) -> Upstream:
    return Upstream(Material(checkpoint).manifest.checkpoint_sha256)


@pytest.fixture
def explorer(checkpoint: Path, upstream: Upstream, tmp_path: Path) -> Explorer:
    pages = tmp_path / "pages"
    pages.mkdir()
    (pages / "index.html").write_text("<p>overview</p>")
    (pages / "explore.html").write_text("<p>explorer</p>")
    (tmp_path / "private.txt").write_text("not a page")
    (pages / "link.txt").symlink_to(tmp_path / "private.txt")
    material = Material(checkpoint)
    transport = httpx.MockTransport(upstream)
    served = ServedModel("http://upstream:1", "m", material.manifest.checkpoint_sha256, token=KEY, transport=transport)
    return Explorer(served, material, pages, SECRET)


@contextmanager
def visitor(explorer: Explorer, **headers: str) -> Iterator[TestClient]:
    """A browser that was never here."""
    with TestClient(explorer.app(), base_url=HOST, headers=headers, raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def browser(explorer: Explorer) -> Iterator[TestClient]:
    """A browser that opened the printed address."""
    with visitor(explorer, **{HEADER: "1"}) as client:
        assert client.get("/", params={"key": SECRET}).text == "<p>explorer</p>"
        yield client


def sent(browser: TestClient, image: bytes = IMAGE) -> str:
    reply = browser.post("/api/images", content=image)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["image"])


def asked(browser: TestClient, request: dict[str, Any], **extra: Any) -> httpx.Response:
    return browser.post("/api/ask", json={"image": sent(browser), "request": request, **extra})


# --- who may speak to it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/", "/explore.html", "/index.html", "/api/checkpoint", "/api/server", "/nothing"])
def test_nothing_is_served_without_the_runs_secret(explorer: Explorer, upstream: Upstream, path: str) -> None:
    with visitor(explorer, **{HEADER: "1"}) as client:
        assert client.get(path).status_code == 403
        assert client.get(path, params={"key": "guessed"}).status_code == 403
        client.cookies.set("elude-explore", "guessed")
        assert client.get(path).status_code == 403
    assert not upstream.requests


def test_the_secret_comes_as_a_cookie_that_no_script_reads(explorer: Explorer) -> None:
    with visitor(explorer) as client:
        reply = client.get("/", params={"key": SECRET}, follow_redirects=False)
        assert reply.status_code == 303 and reply.headers["location"] == "/explore.html"
        cookie = reply.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=lax" in cookie
        assert client.get("/index.html").text == "<p>overview</p>"


@pytest.mark.parametrize("others", ["theme=dark mode; {}", 'a={{"x":1}}; {}', "{}; a=b c", "={}; {}"])
def test_malformed_cookies_of_other_ports_do_not_lock_it(explorer: Explorer, others: str) -> None:
    with visitor(explorer) as client:
        own = f"elude-explore={SECRET}"
        assert client.get("/index.html", headers={"Cookie": others.format(*[own] * 2)}).status_code == 200
        assert client.get("/index.html", headers={"Cookie": f"not-{own}"}).status_code == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:8999", "127.0.0.1.evil.example:8999", ""])
def test_a_foreign_host_name_gets_nothing(browser: TestClient, host: str) -> None:
    assert browser.get("/explore.html", headers={"Host": host}).status_code == 421
    assert browser.post("/api/images", content=IMAGE, headers={"Host": host}).status_code == 421


@pytest.mark.parametrize("host", ["localhost:8999", "127.0.0.1:1", "localhost"])
def test_a_tunnel_may_change_the_port(explorer: Explorer, host: str) -> None:
    with visitor(explorer, Host=host) as client:
        assert client.get("/", params={"key": SECRET}, follow_redirects=False).status_code == 303


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_requests_of_other_pages_are_refused(browser: TestClient, upstream: Upstream, headers: dict[str, str]) -> None:
    assert browser.post("/api/images", content=IMAGE, headers=headers).status_code == 403
    assert browser.get("/api/server", headers=headers).status_code == 403
    assert not upstream.requests


def test_a_post_needs_the_header_that_foreign_forms_cannot_send(browser: TestClient) -> None:
    del browser.headers[HEADER]
    assert browser.post("/api/images", content=IMAGE).status_code == 403
    assert browser.post("/api/images", content=IMAGE, headers={HEADER: "1", "Origin": HOST}).status_code == 200


@pytest.mark.parametrize("path", ["/explore.html", "/nothing", "/api/checkpoint", "/api/samples/3", "/api/nothing"])
def test_every_reply_has_the_security_headers(browser: TestClient, path: str) -> None:
    reply = browser.get(path)
    assert SECURITY_HEADERS.items() <= {k.title(): v for k, v in reply.headers.items()}.items() | reply.headers.items()
    policy = reply.headers["content-security-policy"]
    assert "script-src 'self'" in policy and "unsafe" not in policy and "default-src 'none'" in policy


@pytest.mark.parametrize(
    "path", ["/../private.txt", "/assets/../../private.txt", "//private.txt", "/..\\private.txt", "/link.txt", "/\0"]
)
def test_no_file_outside_the_pages_is_served(explorer: Explorer, path: str) -> None:
    """As a server hands a path on, decoded, which a client would tidy up before it sends it."""
    said: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        said.append(message)

    headers = [(b"host", b"127.0.0.1:8999"), (b"cookie", f"elude-explore={SECRET}".encode())]
    scope = {"type": "http", "method": "GET", "path": path, "query_string": b"", "headers": headers, "root_path": ""}
    asyncio.run(explorer.app()(scope, receive, send))
    assert said[0]["status"] in {400, 404} and b"not a page" not in b"".join(m.get("body", b"") for m in said)


# --- the server's key -------------------------------------------------------------------------------------------------


def _echo(request: httpx.Request, status: int, kind: str) -> httpx.Response:
    """A strange server that sends back what it was sent."""
    text = json.dumps({"type": "x", "title": "x", "status": status, "detail": request.headers["authorization"]})
    return httpx.Response(status, content=text, headers={"content-type": kind, "x-seen": KEY})


@pytest.mark.parametrize("status", [200, 400, 422, 500, 503])
@pytest.mark.parametrize("kind", ["application/json", "application/problem+json", "text/html"])
def test_the_key_is_in_no_reply(browser: TestClient, upstream: Upstream, status: int, kind: str) -> None:
    upstream.answer = lambda request: _echo(request, status, kind)
    replies = [
        browser.get("/api/checkpoint"),
        browser.get("/api/server"),
        asked(browser, {}),
        browser.post("/api/features", json={"query": "x"}),
        browser.post("/api/exemplars", json={"features": ["x"]}),
        browser.post("/api/policies", json={"name": "p", "change": {"edits": [{"feature": "f", "mode": "ablate"}]}}),
    ]
    assert all(request.headers["authorization"] == f"Bearer {KEY}" for request in upstream.requests)
    assert len(upstream.requests) == 4
    for reply in replies:
        assert KEY not in reply.text and KEY not in str(reply.headers)


# --- what is passed on ------------------------------------------------------------------------------------------------


def test_a_question_goes_out_as_the_api_takes_it_and_the_answer_comes_back_as_it_is(
    browser: TestClient, upstream: Upstream
) -> None:
    edit = {"feature": "blocks.0/P1", "mode": "scale", "value": -0.5}
    reply = asked(browser, {"top_k": 3, "steer": {"edits": [edit]}})
    assert reply.status_code == 200 and reply.content == b'{"echo":1.25}'
    assert upstream.last.url.path == "/predictions/m"
    body = upstream.last.content
    assert IMAGE in body
    document = json.loads(body[body.index(b'{"') : body.rindex(b"}") + 1])
    assert document == {
        "top_k": 3,
        "steer": {"edits": [edit]},
        "expect": {"checkpoint_sha256": upstream.checkpoint_sha256},
    }


def test_a_search_goes_out_as_the_operation_and_nothing_else_can(browser: TestClient, upstream: Upstream) -> None:
    assert browser.post("/api/features", json={"query": "stripes", "limit": 5}).json() == {"features": []}
    sent = json.loads(upstream.last.content)
    assert (sent["op"], sent["query"], sent["limit"]) == ("features", "stripes", 5)
    assert browser.post("/api/features", json={"op": "vectors", "query": "x"}).status_code == 422
    assert asked(browser, {"op": "vectors"}).status_code == 422
    assert len(upstream.requests) == 1


@pytest.mark.parametrize("field", [{"id": "mine"}, {"expect": {"checkpoint_sha256": "0"}}, {"image": {"b64": "AA=="}}])
def test_what_the_explorer_sets_itself_is_refused(
    browser: TestClient, upstream: Upstream, field: dict[str, Any]
) -> None:
    reply = asked(browser, field)
    assert reply.status_code == 422 and next(iter(field)) in reply.json()["detail"]
    assert not upstream.requests


@pytest.mark.parametrize(
    ("body", "kind", "status"),
    [
        (b"{", "application/json", 400),
        (b'{"image": 1, "image": 2}', "application/json", 400),
        (b'{"image": NaN}', "application/json", 400),
        (b"[" * 100 + b"]" * 100, "application/json", 400),
        (b"\xff", "application/json", 400),
        (b"{}", "application/json", 422),
        (b"[]", "application/json", 422),
        (b'{"image": "../x", "request": {}}', "application/json", 422),
        (b"{}", "text/plain", 415),
        (b"a=b", "application/x-www-form-urlencoded", 415),
    ],
)
def test_a_bad_document_is_a_problem(
    browser: TestClient, upstream: Upstream, body: bytes, kind: str, status: int
) -> None:
    reply = browser.post("/api/ask", content=body, headers={"Content-Type": kind})
    assert reply.status_code == status
    assert reply.headers["content-type"] == "application/problem+json"
    assert reply.json()["detail"]
    assert not upstream.requests


def test_an_image_that_was_dropped_from_memory_is_asked_for_again(browser: TestClient) -> None:
    reply = browser.post("/api/ask", json={"image": "0" * 64, "request": {}})
    assert (reply.status_code, reply.json()["type"]) == (404, "unknown-image")


def test_bodies_have_a_limit_and_images_the_servers(browser: TestClient, upstream: Upstream) -> None:
    assert browser.post("/api/images", content=b"x" * 5_000_001).status_code == 413
    assert browser.post("/api/images", content=(b"x" * 100_000 for _ in range(60))).status_code == 413
    assert browser.get("/api/server").json()["limits"] == {"max_image_bytes": 40}
    reply = browser.post("/api/images", content=b"x" * 41)
    assert reply.status_code == 413 and "40 bytes" in reply.json()["detail"]
    assert browser.post("/api/images", content=b"").status_code == 422
    long = json.dumps({"query": "x" * 1_000_001}).encode()
    headers = {"Content-Type": "application/json"}
    assert browser.post("/api/features", content=long, headers=headers).status_code == 413


# --- states of the server ---------------------------------------------------------------------------------------------


def test_a_problem_comes_through_with_the_time_to_wait(browser: TestClient, upstream: Upstream) -> None:
    problem = {"type": "overloaded", "title": "Too much", "status": 503, "detail": "Later.", "new": 1}
    headers = {"content-type": "application/problem+json", "Retry-After": "7"}
    upstream.answer = lambda request: httpx.Response(503, json=problem, headers=headers)
    reply = asked(browser, {})
    assert (reply.status_code, reply.headers["retry-after"], reply.json()["detail"]) == (503, "7", "Later.")


def test_torchserves_own_errors_have_the_same_form(browser: TestClient, upstream: Upstream) -> None:
    error = {"code": 404, "type": "ModelNotFoundException", "message": "Model not found: m"}
    upstream.answer = lambda request: httpx.Response(404, json=error)
    for reply in (asked(browser, {}), browser.get("/api/server")):
        assert (reply.status_code, reply.json()["type"]) == (404, "server-unknown-model")


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (httpx.ConnectError("refused"), "server-unreachable", 503),
        (httpx.ReadTimeout("slow"), "server-timeout", 504),
        (httpx.RemoteProtocolError("gone"), "server-unreachable", 503),
    ],
)
def test_a_server_that_does_not_answer_is_a_state(
    browser: TestClient, upstream: Upstream, error: Exception, kind: str, status: int
) -> None:
    def fail(request: httpx.Request) -> httpx.Response:
        raise error

    upstream.answer = fail
    for reply in (browser.get("/api/server"), asked(browser, {})):
        assert (reply.status_code, reply.json()["type"]) == (status, kind)


def test_another_checkpoint_and_an_older_server_are_told(browser: TestClient, upstream: Upstream) -> None:
    upstream.checkpoint_sha256 = "f" * 64
    reply = browser.get("/api/server")
    assert (reply.status_code, reply.json()["type"]) == (412, "other-checkpoint")
    assert "ffffffffffff" in reply.json()["detail"]
    old = {k: v for k, v in upstream.description().items() if k != "limits"}
    upstream.answer = lambda request: httpx.Response(200, json=old)
    reply = browser.get("/api/server")
    assert (reply.status_code, reply.json()["type"]) == (502, "server-other-version")
    assert "limits" in reply.json()["detail"]
    upstream.answer = lambda request: httpx.Response(200, text="<html>hello")
    assert browser.get("/api/server").json()["type"] == "server-other-version"


def test_a_failure_of_the_explorer_logs_its_place_and_no_users_text(
    explorer: Explorer, browser: TestClient, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(feature: str) -> None:
        raise RuntimeError(f"secret words of a user: {feature}")

    monkeypatch.setattr(explorer.material, "face", fail)
    reply = browser.post("/api/exemplars", json={"features": ["users-text"]})
    assert reply.status_code == 500
    out, err = capfd.readouterr()
    assert "users-text" not in reply.text + out + err
    assert "RuntimeError at test_app.py" in err


# --- the checkpoint ---------------------------------------------------------------------------------------------------


def test_the_checkpoint_is_told_without_a_server(browser: TestClient, upstream: Upstream, vit: Rewritten) -> None:
    facts = browser.get("/api/checkpoint").json()
    assert [layer["name"] for layer in facts["layers"]] == vit.model.layers
    assert facts["labels"] == vit.model.manifest.labels and facts["samples"] == []
    assert "elude catalogue" in facts["catalogue_missing"]
    name = vit.model.concept_names(vit.layer)[0]
    face = browser.post("/api/exemplars", json={"features": [name]}).json()[name]
    assert face == {"label": None, "automatic": False, "ends": {"positive": [], "negative": []}}
    assert browser.get("/api/samples/0").status_code == 404
    assert not upstream.requests


def test_a_policy_is_tried_on_the_server_and_kept_beside_the_checkpoint(
    browser: TestClient, upstream: Upstream, checkpoint: Path, vit: Rewritten
) -> None:
    edits = [{"feature": vit.model.concept_names(vit.layer)[0], "mode": "scale", "value": 2.0}]
    wish = {"name": "louder", "description": "Why <b>not</b>", "change": {"edits": edits}}
    reply = browser.post("/api/policies", json=wish)
    assert reply.status_code == 200 and reply.json()["replaced"] is False
    assert b"louder" not in upstream.last.content and b'"mode":"scale"' in upstream.last.content
    partition = vit.model.manifest.partition_sha256
    stored = read_policies(checkpoint, partition)
    assert stored == {"louder": {"partition_sha256": partition, "description": "Why <b>not</b>", "edits": edits}}
    assert browser.post("/api/policies", json=wish).json()["replaced"] is True


@pytest.mark.parametrize(
    "wish",
    [
        {"name": "../x", "change": {"edits": [{"feature": "f", "mode": "ablate"}]}},
        {"name": "", "change": {"edits": [{"feature": "f", "mode": "ablate"}]}},
        {"name": "nothing", "change": {"edits": []}},
        {"name": "typo", "change": {"edits": [{"feature": "f", "mode": "scale"}]}},
        {"name": "more", "change": {"edits": [], "policies": ["other"]}},
    ],
)
def test_a_policy_that_cannot_be_is_not_stored(
    browser: TestClient, upstream: Upstream, checkpoint: Path, wish: dict[str, Any]
) -> None:
    assert browser.post("/api/policies", json=wish).status_code == 422
    assert not upstream.requests and not (checkpoint / "policies.json").exists()


def test_a_policy_that_the_server_refuses_or_the_disk_is_not_stored(
    browser: TestClient, upstream: Upstream, checkpoint: Path
) -> None:
    wish = {"name": "p", "change": {"edits": [{"feature": "nothing/P1", "mode": "ablate"}]}}
    problem = {"type": "unknown-feature", "title": "Unknown", "status": 422, "detail": "There is no nothing/P1."}
    kind = {"content-type": "application/problem+json"}
    upstream.answer = lambda request: httpx.Response(422, json=problem, headers=kind)
    reply = browser.post("/api/policies", json=wish)
    assert (reply.status_code, reply.json()["detail"]) == (422, "There is no nothing/P1.")
    assert not (checkpoint / "policies.json").exists()
    upstream.answer = None
    (checkpoint / "policies.json").write_text("{")
    reply = browser.post("/api/policies", json=wish)
    assert reply.status_code == 409 and "damaged" in reply.json()["detail"]


def test_images_in_memory_are_bounded() -> None:
    store = ImageStore(count=3, total_bytes=10)
    names = [store.put(bytes([i]) * 3) for i in range(4)]
    assert [store.get(name) is not None for name in names] == [False, True, True, True]
    assert store.put(b"x" * 9) and store.get(names[3]) is None
    assert store.get(store.put(b"y" * 11)) == b"y" * 11  # one is always kept
