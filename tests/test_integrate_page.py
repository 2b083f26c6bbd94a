"""deploy/integrate.md: its code blocks run as they stand, on a tiny checkpoint, and give the engine's own answers."""

from __future__ import annotations

import ast
import asyncio
import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from conftest import Rewritten
from support import encoded, picture

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.client import AsyncClient, ProblemError

PAGE = (Path(__file__).resolve().parent.parent / "deploy" / "integrate.md").read_text(encoding="utf-8")
BLOCKS = {re.match(r"# (\w+)\.py", code).group(1): code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)}  # type: ignore[union-attr]
PNG = encoded(picture(200))
OTHER = encoded(picture(201))


@pytest.fixture
def block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a code block of the page as the module that it says it is."""

    def load(name: str) -> ModuleType:
        (tmp_path / f"{name}.py").write_text(BLOCKS[name])
        spec = importlib.util.spec_from_file_location(name, tmp_path / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    precision = torch.get_float32_matmul_precision()
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    yield load
    torch.set_float32_matmul_precision(precision)


@pytest.fixture
def engine(vit: Rewritten) -> Engine:
    return Engine.open(vit.path, ServingConfig(), name="tiny", version="1.0")


def without_times(body: str | bytes) -> Any:
    values = json.loads(body)
    return {k: v for k, v in values.items() if k not in ("id", "timing_ms", "batch_size")}


def make_context(model_dir: Path) -> Any:
    context = pytest.importorskip("ts.context")
    manifest = {"model": {"modelName": "tiny", "modelVersion": "1.0"}}
    return context.Context("tiny", str(model_dir), manifest, 8, None, "0.12.0", metrics=None, model_yaml_config=None)


def test_every_block_is_run_here() -> None:
    assert set(BLOCKS) == {"my_handler", "my_elude_handler", "service"}


@pytest.mark.parametrize("name", ["my_handler", "my_elude_handler"])
def test_a_handlers_module_has_one_class(name: str) -> None:
    """TorchServe refuses a handler module with several, and reads it by its bare name."""
    assert sum(isinstance(node, ast.ClassDef) for node in ast.parse(BLOCKS[name]).body) == 1


def test_the_model_alone(block: Any, vit: Rewritten) -> None:
    handler = block("my_handler").MyHandler()
    (vit.path.parent / "checkpoint").symlink_to(vit.path)
    try:
        handler.initialize(make_context(vit.path.parent))
    finally:
        (vit.path.parent / "checkpoint").unlink()
    x = vit.images
    with torch.no_grad():
        expected = vit.base(x)
    assert torch.equal(handler.inference(x), expected)
    why = handler.why(x)
    assert len(why) == len(x) and all(len(per_image) == 3 * len(vit.model.layers) for per_image in why)
    strongest = max(why[0], key=lambda pair: abs(pair[1]))[0]
    steered = handler.without(x[:1], strongest)
    assert steered.shape == expected[:1].shape and not torch.equal(steered, expected[:1])


class TestHandler:
    @pytest.fixture
    def handler(self, block: Any, vit: Rewritten, tmp_path: Path) -> Any:
        made = block("my_elude_handler").MyEludeHandler()
        (tmp_path / "checkpoint").symlink_to(vit.path)
        made.initialize(make_context(tmp_path))
        return made

    def handle(self, handler: Any, *requests: tuple[dict[str, bytes], dict[str, Any]]) -> tuple[list[str], Any]:
        """The replies of one batch, and TorchServe's context after it. requests: (parts, headers)."""
        from ts.context import RequestProcessor

        context = make_context(Path())
        context._request_processor = [RequestProcessor(headers) for _, headers in requests]
        context.request_ids = {n: f"request-{n}" for n in range(len(requests))}
        return handler.handle([{n: bytearray(p) for n, p in parts.items()} for parts, _ in requests], context), context

    def test_a_batch_of_all_kinds(self, handler: Any, engine: Engine) -> None:
        replies, context = self.handle(
            handler,
            ({"body": PNG}, {"Content-Type": "image/png"}),
            ({"image": OTHER, "request": b'{"top_k": 2}'}, {"content-type": "multipart/form-data; boundary=x"}),
            ({"body": b"junk"}, {}),
            ({"body": PNG}, {"explain": "True"}),
            ({"body": b"{}"}, {"content-type": "application/json", "url_path": "describe"}),
        )
        statuses = [context.get_response_status(n)[0] for n in range(5)]
        assert statuses == [200, 200, 422, 200, 200]
        assert context.get_response_content_type(2) == "application/problem+json"
        assert ProblemDocument.model_validate_json(replies[2]).type == "invalid-image"
        assert len(json.loads(replies[1])["predictions"]) == 2
        assert json.loads(replies[3])["explanations"]
        assert json.loads(replies[4])["layers"]

    def test_alone_it_is_the_engines_answer_and_the_addition(self, handler: Any, engine: Engine) -> None:
        (reply,), _ = self.handle(handler, ({"body": PNG}, {"content-type": "image/png"}))
        (expected,) = engine.answer([Row({"body": PNG}, "image/png", False, "", "r")])
        assert without_times(reply) == {**without_times(expected.body), "served_by": "my team"}


class TestService:
    @pytest.fixture
    def service(self, block: Any, vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
        pytest.importorskip("fastapi")
        monkeypatch.setenv("ELUDE_CHECKPOINT", str(vit.path))
        monkeypatch.setenv("ELUDE_MODEL_NAME", "tiny")
        module = block("service")
        yield module
        module.thread.shutdown()

    def run(self, service: Any, work: Any) -> Any:
        async def all_of_it() -> Any:
            transport = httpx.ASGITransport(app=service.app)
            async with AsyncClient("http://service", "tiny", transport=transport, retries=0) as client:
                return await work(client, client._http)

        return asyncio.run(all_of_it())

    def test_the_client_speaks_to_it(self, service: Any, engine: Engine, vit: Rewritten) -> None:
        async def work(client: AsyncClient, _: Any) -> None:
            plain = await client.predict(PNG)
            (expected,) = engine.answer([Row({"body": PNG}, "image/png", False, "", "r")])
            assert plain.predictions == Reply.model_validate_json(expected.body).predictions
            explained = await client.explain(PNG, top_features=2)
            assert explained.explanations is not None and len(explained.explanations[0].layers[0].features) == 2
            assert (await client.describe()).layers[0].name in vit.model.layers
            assert [f.feature async for f in client.features(ids=[f"{vit.layer}/P0"])] == [f"{vit.layer}/P0"]
            with pytest.raises(ProblemError, match="invalid-image"):
                await client.predict(b"junk")

        self.run(service, work)

    def test_requests_of_one_moment_share_a_batch(self, service: Any) -> None:
        async def work(client: AsyncClient, _: Any) -> list[Reply]:
            return await asyncio.gather(*[client.predict(PNG) for _ in range(12)])

        replies = self.run(service, work)
        assert sorted({r.batch_size for r in replies})[-1] > 1 and max(r.batch_size for r in replies) <= service.BATCH
        assert len({r.predictions[0].index for r in replies}) == 1

    def test_paths(self, service: Any) -> None:
        async def work(_: AsyncClient, http: httpx.AsyncClient) -> None:
            describe = await http.post("http://service/predictions/tiny/1.0/describe", content=b"")
            assert describe.json()["model"]["name"] == "tiny"
            explained = await http.post("http://service/explanations/tiny", content=PNG)
            assert explained.json()["explanations"]
            v1 = await http.post("http://service/v1/models/tiny:predict", json={"instances": [{}]})
            assert v1.status_code == 200 and v1.json()["predictions"][0]["type"] == "invalid-document"
            v2 = await http.post("http://service/v2/models/tiny/infer", json={"inputs": []})
            assert v2.status_code == 422
            assert (await http.get("http://service/v2/health/ready")).json()["ready"]
            large = await http.post("http://service/predictions/tiny", content=b"x" * (service.LARGEST_BODY + 1))
            assert large.status_code == 413
            chunked = await http.post("http://service/predictions/tiny", content=pieces())
            assert chunked.status_code == 413, "a body of unannounced length has no bound"

        async def pieces() -> Any:
            yield b"x"

        self.run(service, work)

    def test_an_engine_that_fails_does_not_leave_clients_waiting(self, service: Any, monkeypatch: Any) -> None:
        def fail(_: Any) -> Any:
            raise RuntimeError("out of order")

        monkeypatch.setattr(service.engine, "answer", fail)

        async def work(client: AsyncClient, _: Any) -> None:
            with pytest.raises(RuntimeError, match="out of order"):  # a real server makes 500 of it
                await asyncio.wait_for(client.predict(PNG), 10)

        self.run(service, work)
