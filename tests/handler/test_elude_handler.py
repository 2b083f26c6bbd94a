"""The TorchServe adapter, with TorchServe's own Context and request processor, and an engine that records."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ts.context")
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl
from ts.model_loader import ModelLoaderFactory
from ts.protocol.otf_message_handler import create_predict_response
from ts.service import Service

from elude_runtime.cli.server_settings import read_properties
from elude_runtime.errors import EludeError
from elude_runtime.package_files import shipped_file

HANDLER = shipped_file("handler/elude_handler.py")


@dataclass(frozen=True)
class Row:
    parts: Mapping[str, bytes]
    content_type: str
    explain: bool
    route: str
    request_id: str
    traceparent: str


@dataclass(frozen=True)
class Reply:
    status: int
    content_type: str
    body: str
    headers: Mapping[str, str]


class Engine:
    """Answers 200 to every row and keeps what it saw; `behave` replaces the answer."""

    opened: tuple[Any, ...] = ()
    refusal: Exception | None = None

    def __init__(self) -> None:
        self.batches: list[list[Row]] = []
        self.behave: Callable[[Sequence[Row]], list[Reply]] | None = None

    @classmethod
    def open(cls, checkpoint: Path, config: Any, *, name: str, version: str) -> Engine:
        if cls.refusal is not None:
            raise cls.refusal
        cls.opened = (checkpoint, config, name, version)
        return cls()

    def answer(self, rows: Sequence[Row]) -> list[Reply]:
        self.batches.append(list(rows))
        if self.behave is not None:
            return self.behave(rows)
        return [Reply(200, "application/json", json.dumps({"id": row.request_id}), {}) for row in rows]

    def describe(self) -> dict[str, Any]:
        return {"layers": ["blocks.1"]}


class Monitor:
    """Keeps what it saw, and gives samples for TorchServe's port."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.seen: list[tuple[list[Row], list[Reply | None]]] = []
        self.samples: list[tuple[str, float, list[str]]] = []

    def saw(self, rows: list[Row], replies: list[Reply | None]) -> list[tuple[str, float, list[str]]]:
        self.seen.append((rows, replies))
        return self.samples


class ServingConfig:
    def __init__(self, section: dict[str, Any] | None) -> None:
        self.section = section
        self.device = "auto"

    @classmethod
    def resolve(cls, section: dict[str, Any] | None) -> ServingConfig:
        return cls(section)

    def model_copy(self, update: dict[str, Any]) -> ServingConfig:
        copy = ServingConfig(self.section)
        vars(copy).update(update)
        return copy


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[types.ModuleType]:
    """The handler's module, with the recording engine in place of the real one."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TS_DECODE_INPUT_REQUEST", "true")
    monkeypatch.setattr(Engine, "refusal", None)
    engine, config, monitor = types.ModuleType("engine"), types.ModuleType("config"), types.ModuleType("monitor")
    vars(monitor).update(Monitor=Monitor)
    vars(engine).update(Engine=Engine, Row=Row, Reply=Reply)
    vars(config).update(ServingConfig=ServingConfig)
    monkeypatch.setitem(sys.modules, "elude_runtime.api", types.ModuleType("api"))
    monkeypatch.setitem(sys.modules, "elude_runtime.api.engine", engine)
    monkeypatch.setitem(sys.modules, "elude_runtime.api.config", config)
    monkeypatch.setitem(sys.modules, "elude_runtime.metrics.monitor", monitor)
    spec = importlib.util.spec_from_file_location("elude_handler", HANDLER)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    before = {output: output.formatter for output in logging.getLogger().handlers}
    yield loaded
    for output, formatter in before.items():
        output.setFormatter(formatter)


def make_context(model_dir: str = "/models/m", gpu: int | None = None, yaml: dict[str, Any] | None = None) -> Context:
    manifest = {"model": {"modelName": "vit", "modelVersion": "2.0"}}
    metrics = MetricsCacheYamlImpl(str(shipped_file("deploy/metrics.yaml")))
    metrics.initialize_cache()
    return Context("vit", model_dir, manifest, 8, gpu, "0.12.0", metrics=metrics, model_yaml_config=yaml)


def run(handler: Any, requests: list[dict[str, Any]]) -> tuple[list[str], Context]:
    """Sends requests `{parts: [(name, type, value)], headers}` as TorchServe's service makes them of its messages."""
    batch = [
        {
            "requestId": f"id-{index}".encode(),
            "parameters": [
                {"name": name, "contentType": kind, "value": value} for name, kind, value in request.get("parts", [])
            ],
            "headers": [
                {"name": name.encode(), "value": value.encode()} for name, value in request.get("headers", {}).items()
            ],
        }
        for index, request in enumerate(requests)
    ]
    context = make_context()
    processors, data, ids = Service.retrieve_data_for_inference(batch)
    context.request_processor, context.request_ids = processors, ids
    out = handler.handle(data, context)
    # What the worker does next must not fail, whatever is in the replies.
    assert create_predict_response(out, ids, "Prediction success", 200, context=context)
    return out, context


def body(value: Any = b"x", kind: str = "image/jpeg", **headers: str) -> dict[str, Any]:
    return {"parts": [("body", kind, value)], "headers": {"Content-Type": kind, "explain": "False", **headers}}


@pytest.fixture
def handler(module: types.ModuleType) -> Any:
    made = module.EludeHandler()
    made.initialize(make_context())
    return made


def test_opens_the_checkpoint_of_the_archive_with_the_configuration_of_the_archive(module: types.ModuleType) -> None:
    made = module.EludeHandler()
    made.initialize(make_context("/models/m", gpu=1, yaml={"batchSize": 4, "elude": {"a": 1}}))
    checkpoint, config, name, version = Engine.opened
    assert (checkpoint, name, version) == (Path("/models/m/checkpoint"), "vit", "2.0")
    assert config.section == {"a": 1} and config.device == "cuda:1"
    assert sys.path[0] == "/models/m"
    module.EludeHandler().initialize(make_context("/models/m", gpu=None))
    assert Engine.opened[1].device == "auto"


def test_a_refusal_is_marked_in_the_log_and_raised(
    module: types.ModuleType, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(Engine, "refusal", EludeError("The digest\nof x is wrong."))
    with pytest.raises(EludeError, match="digest"):
        module.EludeHandler().initialize(make_context())
    assert f"{module.LOAD_ERROR_MARK} The digest of x is wrong." in caplog.messages
    monkeypatch.setattr(Engine, "refusal", KeyError("layers"))
    with pytest.raises(KeyError):
        module.EludeHandler().initialize(make_context())
    assert f"{module.LOAD_ERROR_MARK} KeyError: 'layers'" in caplog.messages


def test_every_row_is_read_from_its_own_headers(handler: Any) -> None:
    run(handler, [body(), body(explain="True", url_path="features/"), body(b"{}", "Application/JSON; charset=utf-8")])
    first, second, third = handler._engine.batches[0]
    assert (first.explain, first.route, first.content_type, first.request_id) == (False, "", "image/jpeg", "id-0")
    assert (second.explain, second.route, second.request_id) == (True, "features", "id-1")
    assert (third.explain, third.content_type) == (False, "application/json")


@pytest.mark.parametrize("name", ["Content-Type", "content-type", "CONTENT-TYPE"])
def test_content_type_is_found_in_any_case(handler: Any, name: str) -> None:
    run(handler, [{"parts": [("body", "", b"x")], "headers": {name: "IMAGE/PNG"}}])
    assert handler._engine.batches[0][0].content_type == "image/png"


def test_a_client_cannot_ask_for_explanations_with_a_header_of_another_case(handler: Any) -> None:
    run(handler, [body(Explain="True", Url_Path="features")])
    row = handler._engine.batches[0][0]
    assert (row.explain, row.route) == (False, "")


def test_parts_arrive_as_bytes_whatever_torchserve_made_of_them(handler: Any) -> None:
    form = {"parts": [("image", "image/png", bytearray(b"\x89")), ("request", "application/json", {"top_k": 1})]}
    run(handler, [form, body("text", "text/plain"), {"parts": [], "headers": {}}])
    first, second, third = handler._engine.batches[0]
    assert first.parts == {"image": b"\x89", "request": b'{"top_k": 1}'}
    assert type(first.parts["image"]) is bytes
    assert second.parts == {"body": b"text"} and third.parts == {} and third.content_type == ""


def test_a_part_named_like_a_header_is_no_header(handler: Any) -> None:
    parts = [("content-type", "image/png", b"1"), ("explain", "image/png", b"True"), ("url_path", "", b"2")]
    run(handler, [{"parts": parts, "headers": {"Content-Type": "multipart/form-data; boundary=a"}}])
    run(handler, [{"parts": parts, "headers": {}}])
    rows = [batch[0] for batch in handler._engine.batches]
    assert [row.content_type for row in rows] == ["multipart/form-data", ""]
    assert [(row.explain, row.route) for row in rows] == [(False, "")] * 2


def test_status_content_type_and_headers_are_set_for_the_row_alone(handler: Any) -> None:
    busy = Reply(503, "application/problem+json", "{}", {"Retry-After": "2", "X-Bad": "a\r\nSet-Cookie: b"})
    handler._engine.behave = lambda rows: [busy, Reply(200, "application/json", '{"ü": 1}', {})]
    out, context = run(handler, [body(), body()])
    assert out == ["{}", '{"ü": 1}']
    assert context.get_response_status(0) == (503, "Service Unavailable")
    assert context.get_response_headers(0) == {"content-type": "application/problem+json", "Retry-After": "2"}
    assert context.get_response_status(1) == (200, "OK")
    assert context.get_response_headers(1) == {"content-type": "application/json"}


@pytest.mark.parametrize("status", [200, 404, 412, 413, 415, 422, 599])
def test_reason_phrases_are_constant_ascii(handler: Any, status: int) -> None:
    handler._engine.behave = lambda rows: [Reply(status, "application/json", "{}", {})]
    _, context = run(handler, [body()])
    code, phrase = context.get_response_status(0)
    assert code == status and phrase.isascii() and phrase.isprintable() and phrase


def test_an_unexpected_exception_is_a_problem_for_its_row_only(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    def behave(rows: Sequence[Row]) -> list[Reply]:
        if any(row.parts["body"] == b"evil" for row in rows):
            raise ValueError("secret of row 1")
        return [Reply(200, "application/json", row.request_id, {}) for row in rows]

    handler._engine.behave = behave
    out, context = run(handler, [body(b"a"), body(b"evil"), body(b"b")])
    assert [out[0], out[2]] == ["id-0", "id-2"]
    problem = json.loads(out[1])
    assert problem["status"] == context.get_response_status(1)[0] == 500
    assert context.get_response_content_type(1) == "application/problem+json"
    assert "secret" not in out[1] and "Traceback" not in out[1] and "id-1" in problem["detail"]
    assert "ValueError" in caplog.text


def test_no_text_of_a_client_becomes_a_line_that_torchserve_reads(module: types.ModuleType) -> None:
    """TorchServe takes lines of the worker's output that begin with [METRICS] for metrics, and so on."""
    output = logging.StreamHandler(io.StringIO())
    logging.getLogger().addHandler(output)
    try:
        module.EludeHandler().initialize(make_context())
        for line_break in ("\n", "\r", "\r\n", "\x0b", "\x0c", "\x85", "\u2028", "\u2029"):
            evil = f"quoted{line_break}[METRICS]Forged.Count:1|#Level:Host"
            logging.getLogger("elude_runtime.api").warning("image %s", evil)
            try:
                raise ValueError(evil)
            except ValueError:
                logging.getLogger("elude_runtime.api").exception("failed")
        logging.getLogger("ts.metrics.caching_metric").warning("[METRICS]True.Count:1")
    finally:
        logging.getLogger().removeHandler(output)
    text = output.stream.getvalue()
    assert text.count("Forged") == 16
    assert [line for line in text.splitlines() if line.startswith("[METRICS]")] == ["[METRICS]True.Count:1"]


def test_samples_go_out_as_torchserves_metrics(handler: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Those that metrics.yaml declares, in plain decimals, with TorchServe's own dimensions last."""
    handler._monitor.samples = [
        ("elude_request_seconds", 1e-5, ["predict"]),
        ("elude_rows_total", 3, ["predict", "200"]),
        ("elude_problems_total", 12345678.0, ["overloaded"]),
        ("not_declared", 1, []),
    ]
    with caplog.at_level(logging.INFO, logger="ts.metrics"):
        run(handler, [body(), body()])
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("ts.metrics")]
    assert [line.rpartition("|#type")[0] for line in lines if "elude" in line or "not_declared" in line] == [
        "[METRICS]elude_request_seconds.Seconds:0.000010|#kind:predict,ModelName:vit,Level:Model",
        "[METRICS]elude_rows_total.Count:3.000000|#kind:predict,status:200,ModelName:vit,Level:Model",
        "[METRICS]elude_problems_total.Count:12345678.000000|#type:overloaded,ModelName:vit,Level:Model",
    ]


def test_the_monitor_sees_rows_and_replies_with_the_traceparent(handler: Any) -> None:
    handler._engine.behave = lambda rows: [] if len(rows) > 1 else 1 / 0
    run(handler, [body(Traceparent="00-ab-cd-01"), body()])
    ((rows, replies),) = handler._monitor.seen
    assert [row.traceparent for row in rows] == ["00-ab-cd-01", ""] and replies == [None, None]


def test_warnings_about_images_are_not_collected(recwarn: pytest.WarningsRecorder, handler: Any) -> None:
    """Each is another text, with numbers of the client's own, and Python would keep all of them."""
    registry: dict[Any, Any] = {}
    recwarn.clear()  # TorchServe's own, of files that it leaves open
    for number in range(3):
        text = f"Expecting to read {number} bytes"
        warnings.warn_explicit(text, UserWarning, "TiffImagePlugin.py", 1, "PIL.TiffImagePlugin", registry)
    assert not recwarn.list
    assert len(registry) <= 1  # Python's own count of the filters
    warnings.warn_explicit("another's", UserWarning, "timm.py", 1, "timm", registry)
    assert [str(w.message) for w in recwarn.list] == ["another's"]


def test_too_few_replies_are_an_error_and_not_a_shift(handler: Any) -> None:
    handler._engine.behave = lambda rows: [Reply(200, "application/json", row.request_id, {}) for row in rows][:1]
    out, _ = run(handler, [body(), body()])
    assert out == ["id-0", "id-1"]
    handler._engine.behave = lambda rows: []
    out, _ = run(handler, [body(), body()])
    assert [json.loads(text)["status"] for text in out] == [500, 500]


def test_a_reply_that_would_kill_the_worker_becomes_a_problem(handler: Any, module: types.ModuleType) -> None:
    limit = int(read_properties(shipped_file("deploy/config.properties"))["max_response_size"])
    assert limit > module.LARGEST_REPLY_BYTES
    big = "é" * (module.LARGEST_REPLY_BYTES // 2 + 1)
    replies = [Reply(200, "application/json", text, {}) for text in (big, big[:-1], "\ud800")]
    handler._engine.behave = lambda rows: replies
    out, context = run(handler, [body()] * 3)
    assert context.get_response_status(0)[0] == json.loads(out[0])["status"] == 422
    assert out[1] == big[:-1] and context.get_response_status(1)[0] == 200
    assert out[2] == "?"


def test_description_is_given_to_the_server_and_not_to_a_header(handler: Any) -> None:
    out, _ = run(handler, [{"parts": [], "headers": {"describe": "True"}}])
    assert json.loads(out[0]) == {"layers": ["blocks.1"]} and handler._engine.batches == []
    run(handler, [body(describe="True")])
    run(handler, [{"parts": [], "headers": {"describe": "True"}}, body()])
    assert [len(batch) for batch in handler._engine.batches] == [1, 2]


def test_a_worker_says_when_it_is_at_work(
    module: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a server is not stopped under it; also of a batch that fails, and of nothing where nobody asks."""
    monkeypatch.setenv("ELUDE_BUSY_DIR", str(tmp_path))
    handler = module.EludeHandler()
    handler.initialize(make_context())
    (mark,) = tmp_path.iterdir()
    assert mark.name == f"{os.getpid()}.busy" and mark.read_bytes() == b"0"
    during = []

    def behave(rows: Sequence[Row]) -> list[Reply]:
        during.append(mark.read_bytes())
        raise KeyboardInterrupt

    assert run(handler, [body()])[0] and mark.read_bytes() == b"0"
    handler._engine.behave = behave
    with pytest.raises(KeyboardInterrupt):
        run(handler, [body()])
    assert during == [b"1"] and mark.read_bytes() == b"0"
    monkeypatch.delenv("ELUDE_BUSY_DIR")
    silent = module.EludeHandler()
    silent.initialize(make_context())
    assert run(silent, [body()])[0] and list(tmp_path.iterdir()) == [mark]


def test_torchserve_leaves_json_to_the_handler(handler: Any) -> None:
    import os

    assert os.environ["TS_DECODE_INPUT_REQUEST"] == "false"


def test_torchserve_finds_exactly_one_class(module: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module's own way into TorchServe: by bare name, without a function `handle`."""
    monkeypatch.setitem(sys.modules, "elude_handler", module)
    service = ModelLoaderFactory.get_model_loader().load("vit", "/nowhere", "elude_handler.py", None, 1)
    assert isinstance(service, Service)


def test_importing_the_handler_loads_nothing_that_changes_numbers() -> None:
    """`ts.torch_handler.base_handler` switches on TF32 as it is imported."""
    code = f"import sys; sys.path.insert(0, {str(HANDLER.parent)!r}); import elude_handler; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "elude_runtime", "ts.torch_handler.base_handler"} & set(loaded)
