"""The HTTP client: what it sends, what it makes of every kind of reply, and when it asks again; without torch."""

from __future__ import annotations

import asyncio
import base64
import email.utils
import inspect
import io
import json
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import httpx
import numpy as np
import pytest
from PIL import Image

from elude_runtime.api.schema.operations import AddEdit, VectorsReply
from elude_runtime.api.schema.reply import Prediction, Reply
from elude_runtime.api.schema.request import AblateEdit, Explain, Request, Steer
from elude_runtime.client import AsyncClient, Client, ProblemError, exchange
from elude_runtime.client.exchange import ExplainFields, SteerFields
from elude_runtime.client.problems import SERVER_PROBLEMS
from elude_runtime.errors import EludeError, ImagesError, SettingsError

URL = "http://server:8080"
MODEL = {"name": "vit", "version": "1.0", "base_sha256": "b", "checkpoint_sha256": "c"}
PREDICTION = {"index": 2, "label": "shark", "probability": 0.9, "logit": 7.25}
REPLY: dict[str, Any] = {
    "id": "r1",
    "api_version": 1,
    "batch_size": 1,
    "timing_ms": {"total": 3.5},
    "model": MODEL,
    "input": {"width": 4, "height": 3, "crop": [0, 0, 4, 3], "window": [0.0, 0.0, 4.0, 3.0]},
    "answer": {"source": "default", "policies": [], "index": 2, "label": "shark", "probability": 0.9},
    "predictions": [PREDICTION],
    "embedding": None,
    "explanations": None,
    "steered": None,
    "shadow": None,
    "activations": None,
    "warnings": [],
}
PROBLEM = {
    "type": "unknown-feature",
    "title": "Unknown feature",
    "status": 422,
    "detail": "There is no feature 'blocks.1/P99'.",
    "errors": [{"loc": ["steer", "edits", 0, "feature"], "msg": "unknown", "suggestions": ["blocks.1/P9"]}],
}
IMAGE = b"\xff\xd8 no picture, but bytes\r\n\x00"


class Service:
    """A server of prepared responses that keeps what it was asked."""

    def __init__(self, *responses: httpx.Response | Exception | Callable[[httpx.Request], httpx.Response]) -> None:
        self.waiting = list(responses)
        self.asked: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.asked.append(request)
        response = self.waiting.pop(0) if len(self.waiting) > 1 else self.waiting[0]
        if isinstance(response, Exception):
            raise response
        return response(request) if callable(response) else response

    def client(self, **settings: Any) -> Client:
        return Client(URL, "vit", transport=httpx.MockTransport(self), **settings)

    @property
    def document(self) -> Any:
        """The JSON of the last request: its body, or the part `request` of its form."""
        return parts_of(self.asked[-1])["request"]


def parts_of(request: httpx.Request) -> dict[str, Any]:
    kind = request.headers["content-type"]
    if kind == "application/json":
        return {"request": json.loads(request.content)}
    assert kind.startswith("multipart/form-data"), kind
    message = email.message_from_bytes(f"Content-Type: {kind}\r\n\r\n".encode() + request.content)
    found: dict[str, Any] = {}
    for part in message.get_payload():
        name = part.get_param("name", header="content-disposition")
        data = part.get_payload(decode=True)
        found[name] = json.loads(data) if part.get_content_type() == "application/json" else data
    return found


def ok(values: Any = REPLY) -> httpx.Response:
    return httpx.Response(200, json=values)


def problem(values: Any = PROBLEM, status: int = 422, **headers: str) -> httpx.Response:
    headers["content-type"] = "application/problem+json"
    return httpx.Response(status, content=json.dumps(values), headers=headers)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were slept, without sleeping; the random part of a wait is always its largest."""
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    monkeypatch.setattr(exchange.random, "uniform", lambda _, high: high)
    return slept


class TestSent:
    def test_a_plain_prediction_is_the_image_alone(self) -> None:
        service = Service(ok())
        reply = service.client(token="secret").predict(IMAGE)
        (asked,) = service.asked
        assert (asked.method, str(asked.url)) == ("POST", f"{URL}/predictions/vit")
        assert asked.content == IMAGE
        assert asked.headers["content-type"] == "application/octet-stream"
        assert asked.headers["authorization"] == "Bearer secret"
        assert isinstance(reply, Reply) and reply.predictions == [Prediction(**PREDICTION)]

    def test_no_token_no_header(self) -> None:
        service = Service(ok())
        service.client().predict(IMAGE)
        assert "authorization" not in service.asked[0].headers

    def test_model_and_version_cannot_leave_their_place_in_the_path(self) -> None:
        service = Service(ok())
        Client(URL + "/", "a/../b?c", version="1/0", transport=httpx.MockTransport(service)).predict(IMAGE)
        assert service.asked[0].url.raw_path == b"/predictions/a%2F..%2Fb%3Fc/1%2F0"

    def test_with_a_document_it_is_a_form_of_two_files(self) -> None:
        service = Service(ok())
        service.client().predict(IMAGE, top_k=3)
        assert parts_of(service.asked[0]) == {"image": IMAGE, "request": {"top_k": 3}}

    def test_explain_by_fields_and_by_document(self) -> None:
        service = Service(ok())
        client = service.client()
        client.explain(IMAGE)
        assert service.document == {"explain": {}}
        client.explain(IMAGE, targets=("top1", 281, {"label": "tabby"}), top_features=3, top_k=1)
        by_fields = service.document
        assert by_fields == {
            "top_k": 1,
            "explain": {"targets": ["top1", 281, {"label": "tabby"}], "top_features": 3},
        }
        client.explain(IMAGE, Explain(targets=["top1", 281, {"label": "tabby"}], top_features=3), top_k=1)
        assert service.document == by_fields

    def test_steer_by_fields_and_by_document(self) -> None:
        service = Service(ok())
        client = service.client()
        edit = {"feature": "blocks.1/P3", "mode": "ablate", "apply": {"box": (0.0, 0.0, 0.5, 1.0)}}
        vector = {"layer": "blocks.1", "vector": np.array([0.5, -1.0], np.float32), "strength": np.float32(2)}
        client.steer(IMAGE, edits=[edit], vectors=[vector, {"name": "stripes"}], policies=["no-watermark"])
        sent = {
            "edits": [{"feature": "blocks.1/P3", "mode": "ablate", "apply": {"box": [0.0, 0.0, 0.5, 1.0]}}],
            "vectors": [{"layer": "blocks.1", "vector": [0.5, -1.0], "strength": 2.0}, {"name": "stripes"}],
            "policies": ["no-watermark"],
        }
        assert service.document == {"steer": sent}
        client.steer(IMAGE, Steer.model_validate_json(json.dumps(sent)), explain=Explain())
        assert service.document == {"steer": sent, "explain": {}}

    def test_a_document_and_its_fields_exclude_each_other(self) -> None:
        with pytest.raises(TypeError, match="not both"):
            Service(ok()).client().explain(IMAGE, Explain(), steps=3)

    def test_activations(self) -> None:
        service = Service(ok())
        service.client().activations(IMAGE, ["blocks.1/P3"], "mean")
        assert service.document == {"activations": {"features": ["blocks.1/P3"], "reduce": "mean"}}

    def test_a_request_document_goes_out_without_its_defaults(self) -> None:
        service = Service(ok())
        service.client().request(
            IMAGE, Request(id="a-1", top_k=5, steer=Steer(edits=[AblateEdit(feature="f", mode="ablate")]))
        )
        assert service.document == {"id": "a-1", "steer": {"edits": [{"feature": "f", "mode": "ablate"}]}}

    def test_a_dictionary_goes_out_as_it_is(self) -> None:
        """For what a newer service knows and this version does not."""
        service = Service(ok())
        service.client().request(IMAGE, {"colour": (1, 2), "top_k": 5})
        assert service.document == {"colour": [1, 2], "top_k": 5}

    def test_the_fields_by_name_are_those_of_the_documents(self) -> None:
        assert set(ExplainFields.__annotations__) == set(Explain.model_fields)
        assert set(SteerFields.__annotations__) == set(Steer.model_fields)

    def test_a_document_that_the_service_would_refuse_is_not_sent(self) -> None:
        service = Service(ok())
        with pytest.raises(ProblemError) as caught:
            service.client().explain(IMAGE, steps=0)
        assert (caught.value.type, caught.value.status) == ("invalid-document", None)
        assert caught.value.problem.errors is not None
        assert caught.value.problem.errors[0].loc == ["explain", "steps"]
        with pytest.raises(ProblemError, match="finite"):
            service.client().steer(IMAGE, edits=[{"feature": "f", "mode": "set", "value": float("nan")}])
        assert service.asked == []

    def test_what_has_no_place_in_json_is_named(self) -> None:
        with pytest.raises(TypeError, match="object has no place"):
            Service(ok()).client().steer(IMAGE, edits=[object()])


class TestExpected:
    """A client that is bound to one checkpoint."""

    SHA = "ab" * 32
    EXPECT: ClassVar[dict[str, Any]] = {"expect": {"checkpoint_sha256": SHA}}

    def test_it_goes_with_every_request_but_describe(self) -> None:
        page = TestOperations().page(0, cursor=None)
        service = Service(ok(), ok(), ok(), page, httpx.Response(500))
        client = service.client(checkpoint_sha256=self.SHA, retries=0)
        client.predict(IMAGE)
        assert service.document == self.EXPECT
        client.explain(IMAGE)
        assert service.document == {"explain": {}, **self.EXPECT}
        client.request(IMAGE, {"top_k": 2})
        assert service.document == {"top_k": 2, **self.EXPECT}
        list(client.features("stripes"))
        assert service.document == {"op": "features", "query": "stripes", **self.EXPECT}
        with pytest.raises(ProblemError):
            client.vectors("blocks.1", [IMAGE], [IMAGE])
        assert service.document["expect"] == self.EXPECT["expect"]
        with pytest.raises(ProblemError):  # how a client learns what is served now
            client.describe()
        assert service.document == {"op": "describe"}

    def test_a_requests_own_goes_before_it(self) -> None:
        service = Service(ok())
        own = {"expect": {"checkpoint_sha256": "cd" * 32}}
        client = service.client(checkpoint_sha256=self.SHA)
        client.request(IMAGE, Request.model_validate(own))
        assert service.document == own
        client.request(IMAGE, own)
        assert service.document == own

    def test_no_digest(self) -> None:
        with pytest.raises(SettingsError, match="64 hexadecimal digits"):
            Client(URL, "vit", checkpoint_sha256="abc")

    def test_the_other_client_too(self) -> None:
        async def ask(service: Service) -> None:
            settings: Any = {"transport": httpx.MockTransport(service), "checkpoint_sha256": self.SHA}
            async with AsyncClient(URL, "vit", **settings) as client:
                await client.predict(IMAGE)
                assert service.document == self.EXPECT
                assert [f.feature async for f in client.features()] == ["blocks.1/P0"]
                assert service.document == {"op": "features", **self.EXPECT}

        asyncio.run(ask(Service(ok(), TestOperations().page(0, cursor=None))))


class TestImages:
    def test_a_path(self, tmp_path: Path) -> None:
        (tmp_path / "a.jpg").write_bytes(IMAGE)
        service = Service(ok())
        client = service.client()
        client.predict(tmp_path / "a.jpg")
        client.predict(str(tmp_path / "a.jpg"))
        assert [a.content for a in service.asked] == [IMAGE, IMAGE]

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(ImagesError, match="none.jpg cannot be read: No such file"):
            Service(ok()).client().predict(tmp_path / "none.jpg")

    @pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "1"])
    def test_a_pil_image_loses_nothing(self, mode: str) -> None:
        picture = Image.effect_noise((9, 7), 90).convert("RGB").convert(mode)
        service = Service(ok())
        service.client().predict(picture)
        sent = Image.open(io.BytesIO(service.asked[0].content))
        assert sent.format == "PNG"
        assert np.array_equal(np.asarray(sent.convert("RGB")), np.asarray(picture.convert("RGB")))

    def test_a_pil_image_of_a_mode_that_png_lacks(self) -> None:
        service = Service(ok())
        service.client().predict(Image.new("CMYK", (3, 2), (0, 255, 0, 0)))
        assert Image.open(io.BytesIO(service.asked[0].content)).getpixel((0, 0)) == (255, 0, 255)

    def test_a_pil_image_is_turned_upright(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned by 90 degrees
        Image.new("RGB", (8, 5)).save(tmp_path / "a.jpg", exif=exif)
        service = Service(ok())
        service.client().predict(Image.open(tmp_path / "a.jpg"))
        sent = Image.open(io.BytesIO(service.asked[0].content))
        assert sent.size == (5, 8) and not sent.getexif().get(0x0112)

    def test_something_else(self) -> None:
        with pytest.raises(TypeError, match="not int"):
            Service(ok()).client().predict(3)  # type: ignore[arg-type]


class TestOperations:
    FEATURE: ClassVar[dict[str, Any]] = {
        "feature": "blocks.1/P0", "kind": "concept", "layer": "blocks.1", "token_type": "patches", "concept": None,
        "label": None, "label_source": None, "size": 3, "mean": 0.0, "std": 1.0, "quantiles": {"q50": 0.0},
        "density": 0.1, "share": 0.2,
    }  # fmt: skip

    def page(self, *numbers: int, cursor: str | None) -> httpx.Response:
        features = [{**self.FEATURE, "feature": f"blocks.1/P{n}"} for n in numbers]
        return ok(
            {"id": "r", "api_version": 1, "model": MODEL, "features": features, "total": 3, "next_cursor": cursor}
        )

    def test_features_follow_the_cursor_as_they_are_needed(self) -> None:
        service = Service(self.page(0, 1, cursor="c1"), self.page(2, cursor=None))
        found = service.client(version="2.0").features("stripes", layer="blocks.1", page=2)
        assert service.asked == []
        assert [next(found).feature, next(found).feature] == ["blocks.1/P0", "blocks.1/P1"]
        assert len(service.asked) == 1
        assert [f.feature for f in found] == ["blocks.1/P2"]
        first, second = (json.loads(a.content) for a in service.asked)
        assert first == {"op": "features", "query": "stripes", "layer": "blocks.1", "limit": 2}
        assert second == {**first, "cursor": "c1"}
        assert service.asked[0].url.path == "/predictions/vit/2.0"

    def test_vectors_and_their_edits_sent_back(self) -> None:
        edit = {"feature": "blocks.1/P0", "mode": "add", "value": 1.5, "unit": "raw", "side": "both",
                "apply": {"tokens": "all"}, "when": None}  # fmt: skip
        made = {
            "id": "r", "api_version": 1, "model": MODEL, "layer": "blocks.1", "auc": None, "direction": [0.5, 1.0],
            "features": [{"feature": "blocks.1/P0", "label": None, "weight": 2.0, "share": 1.0}], "edits": [edit],
        }  # fmt: skip
        service = Service(ok(made), ok())
        client = service.client()
        reply = client.vectors("blocks.1", [b"a", b"b"], iter([b"c"]), top_features=4)
        b64 = lambda data: {"b64": base64.b64encode(data).decode()}  # noqa: E731
        assert service.document == {
            "op": "vectors", "layer": "blocks.1", "positive": [b64(b"a"), b64(b"b")], "negative": [b64(b"c")],
            "top_features": 4,
        }  # fmt: skip
        assert isinstance(reply, VectorsReply) and isinstance(reply.edits[0], AddEdit)
        client.steer(IMAGE, edits=reply.edits)
        assert service.document["steer"]["edits"] == [{"feature": "blocks.1/P0", "mode": "add", "value": 1.5}]

    def test_describe(self) -> None:
        made = {
            "api_version": 1, "elude_version": "0.1.0", "model": MODEL, "output": "logits", "classes": 2, "layers": [],
            "data_config": {}, "partition_sha256": "p", "policies": [], "vectors": [], "limits": {"max_edits": 64},
            "threads": 1, "problems": [], "openapi": {},
        }  # fmt: skip
        service = Service(ok(made))
        assert service.client().describe().limits == {"max_edits": 64}
        assert service.document == {"op": "describe"}


class TestNewerServers:
    def test_unknown_keys_and_new_enumeration_values(self) -> None:
        newer = json.loads(json.dumps(REPLY))
        newer["surprise"] = {"a": 1}
        newer["answer"]["source"] = "consensus"
        newer["answer"]["confidence"] = 0.5
        newer["predictions"][0]["rank"] = 1
        newer["warnings"] = [{"code": "brand-new", "detail": "Something.", "since": "today"}]
        newer["explanations"] = [
            {"target": {"index": 2, "kind": "x"}, "value": 1.0, "layers": [
                {"layer": "blocks.1", "method": "new", "baseline": 0.0, "completeness_error": None, "new": 1,
                 "features": [{"feature": "f", "label": None, "activation": 1.0, "token": 3, "attribution": 0.5,
                               "effect": None, "new": [1]}]}]}]  # fmt: skip
        reply = Service(ok(newer)).client().predict(IMAGE)
        assert isinstance(reply, Reply) and isinstance(reply.predictions[0], Prediction)
        assert reply.answer.source == "consensus" and reply.warnings[0].code == "brand-new"
        assert reply.explanations is not None
        assert reply.explanations[0].layers[0].features[0].attribution == 0.5
        assert "surprise" not in reply.model_dump() and not hasattr(reply.predictions[0], "rank")

    def test_what_was_read_is_the_schemas_own(self) -> None:
        reply = Service(ok()).client().predict(IMAGE)
        assert reply == Reply.model_validate_json(json.dumps(REPLY)) == pickle.loads(pickle.dumps(reply))

    def test_the_schema_itself_stays_strict(self) -> None:
        """Reading leniently must not have touched the documents that requests are validated by."""
        Service(ok()).client().predict(IMAGE)
        with pytest.raises(ValueError, match="Extra inputs"):
            Reply.model_validate({**REPLY, "surprise": 1})

    @pytest.mark.parametrize("broken", [{"predictions": "none"}, {"model": None}, {"batch_size": "1"}])
    def test_what_is_missing_or_wrong_is_no_reply(self, broken: dict[str, Any]) -> None:
        (key,) = broken
        with pytest.raises(ProblemError, match=key) as caught:
            Service(ok({**REPLY, **broken})).client().predict(IMAGE)
        assert (caught.value.type, caught.value.status) == ("server-reply", 200)

    def test_a_problem_of_a_newer_server(self) -> None:
        newer = {**PROBLEM, "type": "brand-new", "trace": "x"}
        with pytest.raises(ProblemError) as caught:
            Service(problem(newer)).client().predict(IMAGE)
        assert caught.value.type == "brand-new"


JSON, HTML, TEXT = "application/json", "text/html", "text/plain"


def torchserve(code: int, kind: str, message: str) -> str:
    return json.dumps({"code": code, "type": kind, "message": message}, indent=2) + "\n"


# As a real TorchServe 0.12 sends them (tests/integration/test_client_served.py), and as proxies do.
FOREIGN: list[tuple[int, str, str, str, str]] = [
    (400, JSON, torchserve(400, "InvalidKeyException", "Token failed."), "server-unauthorized", "Token failed."),
    (404, JSON, torchserve(404, "ModelNotFoundException", "not found: vit"), "server-unknown-model", "not found: vit"),
    (404, JSON, torchserve(404, "ModelVersionNotFoundException", "Version: 7.0"), "server-unknown-model", "7.0"),
    (404, JSON, torchserve(404, "ResourceNotFoundException", "See API."), "server-unknown-route", "See API."),
    (413, "", "", "server-too-large", "smaller or fewer images"),
    (500, JSON, torchserve(500, "InternalServerException", "Worker died."), "server-error", "Worker died."),
    (507, JSON, torchserve(507, "InternalServerException", "Out of resources"), "server-out-of-memory", "Out of"),
    (401, TEXT, "missing token", "server-unauthorized", "missing token"),
    (403, JSON, '{"detail": "forbidden here"}', "server-unauthorized", "forbidden here"),
    (404, HTML, "<html><head><title>404 Not\n Found</title></head>x", "server-unknown-route", "404 Not Found"),
    (502, HTML, "<!DOCTYPE html><html><body>" + "x" * 5000, "server-error", "its log"),
    (504, TEXT, "upstream timed out", "server-timeout", "upstream"),
    (400, "application/problem+json", '{"nonsense": 1}', "server-error", "nonsense"),
    (418, TEXT, "line one\nline \x1b[31mtwo" + "y" * 1000, "server-error", "line one line [31mtwo"),
    (302, TEXT, "", "server-error", "its log"),
    (200, HTML, "<html><title>Welcome</title>", "server-reply", "Welcome"),
    (200, JSON, "[1]", "server-reply", "object"),
    (200, JSON, "{", "server-reply", "Invalid JSON"),
    (204, "", "", "server-reply", "another server"),
]


class TestProblems:
    def test_the_services_own(self) -> None:
        with pytest.raises(ProblemError) as caught:
            Service(problem()).client().predict(IMAGE)
        error = caught.value
        assert isinstance(error, EludeError) and error.status == 422
        assert error.problem.model_dump() == PROBLEM
        assert str(error) == "There is no feature 'blocks.1/P99'. Close to it: blocks.1/P9. (unknown-feature)"

    @pytest.mark.parametrize(("status", "kind", "text", "expected", "said"), FOREIGN)
    def test_everybody_elses(self, status: int, kind: str, text: str, expected: str, said: str) -> None:
        headers = {"content-type": kind} if kind else {}
        with pytest.raises(ProblemError) as caught:
            Service(httpx.Response(status, content=text, headers=headers)).client(retries=0).predict(IMAGE)
        error = caught.value
        assert (error.type, error.status, error.problem.status) == (expected, status, status)
        assert error.problem.title == SERVER_PROBLEMS[expected][1]
        assert said in error.problem.detail
        assert len(str(error)) < 400 and str(error).isprintable()

    @pytest.mark.parametrize(
        ("raised", "expected"),
        [
            (httpx.ConnectError("Connection refused"), "server-unreachable"),
            (httpx.ReadError("reset by peer"), "server-unreachable"),
            (httpx.RemoteProtocolError("Server disconnected"), "server-unreachable"),
            (httpx.ReadTimeout("timed out"), "server-timeout"),
            (httpx.ConnectTimeout("timed out"), "server-timeout"),
        ],
    )
    def test_no_reply(self, raised: Exception, expected: str) -> None:
        with pytest.raises(ProblemError) as caught:
            Service(raised).client(retries=0).predict(IMAGE)
        assert (caught.value.type, caught.value.status) == (expected, None)
        assert str(raised) in str(caught.value)
        assert caught.value.__cause__ is raised

    def test_every_kind_of_server_problem_is_met_by_these_tests(self) -> None:
        met = {row[3] for row in FOREIGN} | {"server-unreachable", "server-timeout", "server-unavailable"}
        assert met == set(SERVER_PROBLEMS)

    @pytest.mark.parametrize("url", ["server:8080", "ftp://server", ""])
    def test_an_address_without_a_scheme(self, url: str) -> None:
        with pytest.raises(SettingsError, match="http://"):
            Client(url, "vit")


BUSY = {"type": "overloaded", "title": "Too much work at once", "status": 503, "detail": "Ask again."}


def no_worker(_: httpx.Request) -> httpx.Response:
    text = torchserve(503, "ServiceUnavailableException", "Model has no worker to serve inference request")
    return httpx.Response(503, text=text)


def worker_died(status: int) -> Callable[[httpx.Request], httpx.Response]:
    return lambda _: httpx.Response(status, text=torchserve(status, "InternalServerException", "Worker died."))


class TestRetries:
    def test_after_503_until_it_is_answered(self, waits: list[float]) -> None:
        service = Service(problem(BUSY, 503), no_worker, ok())
        assert service.client().predict(IMAGE, top_k=2).id == "r1"
        assert len(service.asked) == 3 and waits == [0.25, 0.5]
        assert [parts_of(a)["image"] for a in service.asked] == [IMAGE] * 3

    def test_retry_after_is_kept_to_and_capped(self, waits: list[float]) -> None:
        service = Service(
            problem(BUSY, 503, **{"retry-after": "2"}), problem(BUSY, 503, **{"retry-after": "86400"}),
            problem(BUSY, 503, **{"retry-after": "soon"}), ok(),
        )  # fmt: skip
        service.client().predict(IMAGE)
        assert waits == [2.125, 30.0, 1.0]

    def test_retry_after_as_a_date(self, waits: list[float]) -> None:
        date = email.utils.formatdate(time.time() + 10, usegmt=True)
        Service(problem(BUSY, 503, **{"retry-after": date}), ok()).client().predict(IMAGE)
        assert 8 < waits[0] < 11

    @pytest.mark.parametrize("error", [httpx.ConnectError("refused"), httpx.ConnectTimeout("slow")], ids=repr)
    def test_where_no_connection_came_about(self, waits: list[float], error: httpx.HTTPError) -> None:
        service = Service(error, ok())
        service.client().predict(IMAGE)
        assert len(service.asked) == 2 and waits == [0.25]

    def test_it_gives_up_with_the_last_problem(self, waits: list[float]) -> None:
        service = Service(problem(BUSY, 503))
        with pytest.raises(ProblemError, match="overloaded"):
            service.client(retries=2).predict(IMAGE)
        assert len(service.asked) == 3
        with pytest.raises(ProblemError, match="server-unavailable"):
            Service(no_worker).client(retries=1).predict(IMAGE)

    @pytest.mark.parametrize(
        "lost",
        [
            httpx.Response(429), httpx.Response(502, text="<html><title>502 Bad Gateway</title>"),
            httpx.ReadError("reset"), httpx.WriteError("broken pipe"), httpx.RemoteProtocolError("disconnected"),
        ],
        ids=repr,
    )  # fmt: skip
    def test_where_the_server_was_lost(self, waits: list[float], lost: Any) -> None:
        service = Service(lost, lost, lost, ok())
        assert service.client().predict(IMAGE).id == "r1"
        assert len(service.asked) == 4 and waits == [0.25, 0.5, 1.0]
        service = Service(lost, ok())
        with pytest.raises(ProblemError):
            service.client(retries=0).predict(IMAGE)
        assert len(service.asked) == 1

    @pytest.mark.parametrize(
        "outcome", [worker_died(500), worker_died(507), httpx.Response(504)], ids=["500", "507", "504"]
    )
    def test_what_may_have_ended_a_worker_is_asked_once_more(self, waits: list[float], outcome: Any) -> None:
        service = Service(outcome)
        with pytest.raises(ProblemError):
            service.client(retries=9).predict(IMAGE)
        assert len(service.asked) == 2 and waits == [0.25]
        service = Service(outcome)
        with pytest.raises(ProblemError):
            service.client(retries=0).predict(IMAGE)
        assert len(service.asked) == 1
        assert Service(outcome, ok()).client().predict(IMAGE).id == "r1"

    @pytest.mark.parametrize(
        "outcome",
        [
            *(httpx.Response(s) for s in (400, 401, 404, 412, 413, 422, 500, 507)),
            problem({**PROBLEM, "type": "internal-error", "status": 500}, 500),
            httpx.ReadTimeout("x"), httpx.WriteTimeout("x"), httpx.PoolTimeout("x"),
        ],
        ids=repr,
    )  # fmt: skip
    def test_nothing_else_is_asked_twice(self, waits: list[float], outcome: Any) -> None:
        service = Service(outcome)
        with pytest.raises(ProblemError):
            service.client().predict(IMAGE)
        assert len(service.asked) == 1 and waits == []

    def test_the_random_part_stays_within_its_bounds(self) -> None:
        busy = httpx.Response(503)
        drawn = [exchange.seconds_to_wait(busy, 2, 3) for _ in range(200)]
        assert all(d is not None and 0.5 <= d <= 1.0 for d in drawn) and len(set(drawn)) > 100
        assert exchange.seconds_to_wait(busy, 40, 99) == exchange.LONGEST_WAIT


class TestAsync:
    def run(self, service: Service, work: Callable[[AsyncClient], Any], **settings: Any) -> Any:
        async def all_of_it() -> Any:
            async with AsyncClient(URL, "vit", transport=httpx.MockTransport(service), **settings) as client:
                return await work(client)

        return asyncio.run(all_of_it())

    def test_the_same_requests_as_the_other_client(self) -> None:
        calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
            ("predict", (IMAGE,), {"top_k": 2}),
            ("explain", (IMAGE,), {"steps": 3}),
            ("steer", (IMAGE,), {"policies": ["p"], "explain": Explain()}),
            ("activations", (IMAGE, ["f"], "tokens"), {}),
            ("request", (IMAGE, {"id": "a"}), {}),
        ]
        for name, arguments, fields in calls:
            one, other = Service(ok()), Service(ok())
            getattr(one.client(token="t"), name)(*arguments, **fields)
            self.run(other, lambda c, n=name, a=arguments, f=fields: getattr(c, n)(*a, **f), token="t")
            assert parts_of(one.asked[0]) == parts_of(other.asked[0])
            assert one.asked[0].url == other.asked[0].url
            assert one.asked[0].headers["authorization"] == other.asked[0].headers["authorization"]

    def test_features(self) -> None:
        pages = TestOperations()
        service = Service(pages.page(0, 1, cursor="c1"), pages.page(2, cursor=None))

        async def names(client: AsyncClient) -> list[str]:
            return [f.feature async for f in client.features(page=2)]

        assert self.run(service, names) == ["blocks.1/P0", "blocks.1/P1", "blocks.1/P2"]

    def test_retries_and_problems(self, waits: list[float]) -> None:
        service = Service(httpx.ConnectError("refused"), no_worker, problem())
        with pytest.raises(ProblemError, match="unknown-feature"):
            self.run(service, lambda c: c.predict(IMAGE))
        assert len(service.asked) == 3 and waits == [0.25, 0.5]

    def test_a_lost_server(self, waits: list[float]) -> None:
        service = Service(httpx.Response(502), httpx.ReadError("reset"), ok())
        assert self.run(service, lambda c: c.predict(IMAGE)).id == "r1"
        assert len(service.asked) == 3 and waits == [0.25, 0.5]

    def test_it_has_the_same_methods(self) -> None:
        def signatures(kind: type) -> dict[str, list[str]]:
            methods = inspect.getmembers(kind, inspect.isfunction)
            return {n: list(inspect.signature(m).parameters) for n, m in methods if not n.startswith("_")}

        assert signatures(Client) == signatures(AsyncClient)


def test_a_closed_client_is_closed() -> None:
    with Service(ok()).client() as client:
        client.predict(IMAGE)
    with pytest.raises(RuntimeError, match="closed"):
        client.predict(IMAGE)


def test_the_client_needs_neither_torch_nor_timm() -> None:
    script = (
        "import sys\n"
        "for name in ('torch', 'timm', 'torchvision', 'PIL', 'safetensors'): sys.modules[name] = None\n"
        "from elude_runtime.client import AsyncClient, Client, ProblemError\n"
        "try: Client('http://127.0.0.1:9', 'm', retries=0).explain(b'x', targets=[1])\n"
        "except ProblemError as error: print(error.type)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ran.stdout.strip() == "server-unreachable", ran.stderr
