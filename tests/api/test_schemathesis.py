"""Generated requests, in batches: by schemathesis from the published schema, by hypothesis as documents, right and
damaged. Each reply has to fit the schema, and no row may touch another."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import api_schema
import api_strategies as gen
import numpy as np
import pytest
import schemathesis
import torch
from api_faults import damaged, wrong
from api_witness import Tally, Witness, alike, plain, problem
from conftest import REPOSITORY, Rewritten
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from support import CLASSES, FIRST, SECOND
from werkzeug import Request, Response

import elude_runtime as elude
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Answered, Engine
from elude_runtime.api.problems import PROBLEMS
from elude_runtime.checkpoint.catalogue import read_catalogue
from elude_runtime.checkpoint.vectors import StoredVector

P0 = f"{SECOND}/P0"
# Room for every request that the strategies call right; images are small, so that a large one need not be.
CONFIG = {"max_work": 4000, "max_batch_work": 100_000, "max_image_bytes": 50_000}
# Nothing but the schema: no configuration file, no constants out of the code that happens to be loaded.
SETTINGS = schemathesis.Config.from_dict({"analysis": {"constants": {"enabled": False}}})
CHECKS = [
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]


def examples(count: int) -> settings:
    """The same examples in every run, nothing kept from one to the next. Failures are reported as small as found."""
    return settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )


def opened(vit: Rewritten, **limits: Any) -> Engine:
    """The tiny ViT with its catalogue, two policies and a vector."""
    partition = vit.model.manifest.partition_sha256
    direction = np.linspace(-1, 1, vit.model.state(SECOND).linear.neurons, dtype=np.float32)
    stripes = StoredVector("stripes", SECOND, partition, "2026-01-01T00:00:00+00:00", direction, [], [], None, 1, 1)
    policies = {
        name: {"partition_sha256": partition, "edits": [{"feature": feature, "mode": "ablate"}]}
        for name, feature in (("no-watermark", f"{SECOND}/P0"), ("calm", f"{FIRST}/C1"))
    }
    return Engine(
        vit.model,
        ServingConfig(**{**CONFIG, **limits}),
        name="tiny",
        version="1.0",
        catalogue=read_catalogue(vit.path),
        vectors={"stripes": stripes},
        policies=policies,
    )


@pytest.fixture(scope="module")
def tally() -> Tally:
    return Tally()


@pytest.fixture(scope="module")
def witness(vit: Rewritten, tally: Tally) -> Witness:
    return Witness(opened(vit), tally)


@pytest.fixture(scope="module")
def world(witness: Witness) -> gen.World:
    return gen.World.of(witness.engine)


# --- documents --------------------------------------------------------------------------------------------------------


def test_right_documents_are_answered_as_if_they_were_alone(witness: Witness, world: gen.World) -> None:
    @examples(120)
    @given(st.lists(gen.right(world), min_size=2, max_size=4))
    def ask(calls: list[gen.Call]) -> None:
        for call, answered in zip(calls, witness.ask("right", calls), strict=True):
            assert answered.status == 200, answered.body
            alike(json.loads(witness.engine.answer([call.row])[0].body), json.loads(answered.body))

    ask()


def test_a_single_fault_gets_its_own_problem(witness: Witness, world: gen.World) -> None:
    @examples(120)
    @given(st.lists(wrong(world), min_size=1, max_size=3))
    def ask(calls: list[gen.Call]) -> None:
        for call, answered in zip(calls, witness.ask("wrong", calls), strict=True):
            assert problem(answered) == call.kind, answered.body
            assert witness.engine.answer([call.row])[0].body == answered.body

    ask()


def test_damaged_documents_hurt_nobody(witness: Witness, world: gen.World) -> None:
    @examples(200)
    @given(st.lists(damaged(world) | gen.right(world), min_size=1, max_size=4))
    def ask(calls: list[gen.Call]) -> None:
        for call, answered in zip(calls, witness.ask("damaged", calls), strict=True):
            if call.kind is not None:
                assert problem(answered) == call.kind, answered.body

    ask()


# --- the published schema ---------------------------------------------------------------------------------------------


class Server:
    """A WSGI application before an engine: first it takes down all requests of a batch, then gives out the answers."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self.calls: list[gen.Call] = []
        self.answers: Iterator[Answered] | None = None

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        request = Request(environ)
        if request.path == "/openapi.json":
            return Response(json.dumps(self.document), 200, mimetype="application/json")(environ, start_response)
        if self.answers is None:
            self.calls.append(read(request))
            return Response("", 202)(environ, start_response)
        answered = next(self.answers)
        made = Response(answered.body, answered.status, dict(answered.headers), content_type=answered.content_type)
        return made(environ, start_response)


def read(request: Request) -> gen.Call:
    """A request as TorchServe takes it apart."""
    if request.mimetype == gen.MULTIPART:
        parts = {name: file.read() for name, file in request.files.items()}
        parts |= {name: value.encode() for name, value in request.form.items()}
    else:
        parts = {"body": request.get_data()}
    return gen.call(request.path, parts, request.mimetype)


@pytest.fixture(scope="module")
def formats(world: gen.World) -> None:
    for name, strategy in api_schema.formats(world).items():
        schemathesis.openapi.format(name, strategy)


def cases(schema: Any, mode: GenerationMode) -> st.SearchStrategy[Any]:
    """Of all operations and content types."""
    return st.one_of(
        [
            schema[path]["POST"].as_strategy(
                mode, path_parameters={"model": "tiny", "version": "1.0"} if "{version}" in path else {"model": "tiny"}
            )
            for path in schema
        ]
    )


def run_schema(witness: Witness, test: str, document: Mapping[str, Any], mode: GenerationMode, count: int) -> None:
    server = Server(document)
    schema = schemathesis.openapi.from_wsgi("/openapi.json", server, config=SETTINGS)

    @examples(count)
    @given(st.lists(cases(schema, mode), min_size=2, max_size=4))
    def ask(asked: list[Any]) -> None:
        server.calls, server.answers = [], None
        for case in asked:
            case.call()
        server.answers = iter(witness.ask(test, server.calls))
        for case in asked:
            case.validate_response(case.call(), checks=CHECKS)

    ask()


def test_requests_of_the_schema_with_names_that_are_there(witness: Witness, world: gen.World, formats: None) -> None:
    document = api_schema.narrowed(witness.published, world)
    run_schema(witness, "schema, narrowed", document, GenerationMode.POSITIVE, 120)


def test_requests_of_the_schema_as_it_is(witness: Witness) -> None:
    run_schema(witness, "schema", witness.published, GenerationMode.POSITIVE, 60)


def test_requests_that_break_the_schema_are_refused(witness: Witness, world: gen.World, formats: None) -> None:
    document = api_schema.informed(witness.published)
    run_schema(witness, "schema, broken", document, GenerationMode.NEGATIVE, 100)


# --- what needs a special state ---------------------------------------------------------------------------------------


def asked(document: Mapping[str, Any], kind: str | None = "", path: str = "/predictions/tiny") -> gen.Call:
    return gen.call(path, {"body": gen.text({"image": gen.b64(gen.IMAGES[0]), **document})}, kind=kind)


def test_a_busy_batch_refuses_the_dearest_and_no_plain_row(vit: Rewritten, tally: Tally) -> None:
    """What is refused is an answer when it is asked alone."""
    busy = Witness(opened(vit, max_work=64, max_batch_work=64), tally)
    world = gen.World.of(busy.engine)

    @examples(10)
    @given(st.lists(gen.explanations(world), min_size=2, max_size=4))
    def ask(explanations: list[dict[str, Any]]) -> None:
        dear = {"explain": {"pixels": True, "targets": [{"top": 3}], "top_features": 2}}
        calls = [asked(dear), *(asked({"explain": one}) for one in explanations), *[asked(dear)] * 3]
        found = busy.ask("overloaded", calls)
        assert {problem(answered) for answered in found} <= {"", "overloaded", "limit-exceeded"}
        assert "overloaded" in map(problem, found) and "" in map(problem, found)
        (alone,) = busy.ask("overloaded", [asked(dear)])
        assert alone.status == 200

    ask()


def test_a_reply_that_is_too_large(vit: Rewritten, tally: Tally) -> None:
    narrow = Witness(opened(vit, max_response_bytes=10_000), tally)
    large = {"explain": {"top_features": 50, "level": "subunits", "heatmaps": "values"}}
    found = narrow.ask("too large", [asked({}), asked(large), asked({"top_k": 2})])
    assert [problem(answered) for answered in found] == ["", "response-too-large", ""]


def test_a_server_that_fails(vit: Rewritten, tally: Tally, monkeypatch: pytest.MonkeyPatch) -> None:
    """An internal error says nothing of its reason, wherever it comes from, and its neighbours are answered."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(f"{REPOSITORY}/elude_runtime/secret.py")

    failing = Witness(opened(vit), tally)
    assert failing.engine.catalogue is not None
    monkeypatch.setattr(failing.engine.catalogue, "search", fail)
    monkeypatch.setattr("elude_runtime.api.batch.explain_batch", fail)
    monkeypatch.setattr("elude_runtime.api.operations.contrast", fail)
    picture = gen.b64(gen.IMAGES[0])
    vectors = {"layer": FIRST, "positive": [picture], "negative": [picture]}
    calls = [
        asked({"explain": {}}),
        gen.call("/predictions/tiny/1.0/features", {}),
        gen.call("/predictions/tiny/1.0/vectors", {"body": gen.text(vectors)}),
    ]
    answers = failing.engine.answer([row for call in calls for row in (plain(0), call.row)])
    for good, bad, call in zip(answers[::2], answers[1::2], calls, strict=True):
        failing.check(call.path, bad)
        tally.add("internal error", bad)
        assert good.status == 200 and problem(bad) == "internal-error"


def test_a_model_with_weights_that_are_not_finite(vit: Rewritten, tally: Tally, world: gen.World) -> None:
    model = elude.load(vit.path)
    with torch.no_grad():
        model.base.head.bias.fill_(float("nan"))
    engine = Engine(model, ServingConfig(**CONFIG), name="tiny", version="1.0")

    @examples(20)
    @given(st.lists(gen.documents(world).filter(lambda d: "steer" not in d), min_size=1, max_size=3))
    def ask(documents: list[dict[str, Any]]) -> None:
        for answered in engine.answer([asked(document).row for document in documents]):
            tally.add("broken model", answered)
            assert problem(answered) == "non-finite-output" and answered.status == 500

    ask()


@st.composite
def extremes(draw: st.DrawFn, world: gen.World) -> gen.Call:
    """Valid documents with numbers from the whole range of JSON; of an image, too, as KServe's numbers."""
    number = draw(st.floats(allow_nan=False, allow_infinity=False))
    edit = {"feature": draw(st.sampled_from(world.features)), "value": number}
    mode = draw(st.sampled_from("scale set cap floor add".split()))
    layer = draw(st.sampled_from(world.layers))
    steerings: list[dict[str, Any]] = [
        {"edits": [{**edit, "mode": mode}]},
        {"edits": [{**edit, "mode": "scale", "value": 0}], "strength_multiplier": number},
        {"vectors": [{"layer": layer, "vector": [number] * world.widths[layer]}]},
        {"vectors": [{"name": "stripes", "strength": number}]},
    ]
    documents: list[dict[str, Any]] = [
        *({"steer": steer} for steer in steerings),
        *({"steer": steer, "explain": {}} for steer in steerings),
        {"explain": {"targets": [{"direction": [number] * len(world.labels)}]}},
        {"explain": {"targets": [{"direction": [number] * len(world.labels)}], "method": "ablation", "pixels": True,
                     "top_features": 2, "heatmaps": "png"}},
    ]  # fmt: skip
    document = draw(st.none() | st.sampled_from(documents))
    if document is not None:
        return asked(document, None)
    shape = [1, *world.input_size]
    tensor = {"name": "input", "datatype": "FP32", "shape": shape, "data": [number, 0.5] * (math.prod(shape) // 2)}
    template = draw(st.sampled_from([{}, {"explain": {"heatmaps": "png"}}, {"activations": {"features": [P0]}}]))
    body = {"inputs": [tensor], "parameters": {"elude": template}}
    return gen.call("/v2/models/tiny/infer", {"body": gen.text(body)}, kind=None)


def test_extreme_numbers_are_their_senders_own_trouble(witness: Witness, world: gen.World) -> None:
    """An answer, a refusal, or an output that is not finite; never an error of the server."""

    @examples(150)
    @given(st.lists(extremes(world), min_size=1, max_size=2))
    def ask(calls: list[gen.Call]) -> None:
        witness.ask("extremes", calls)

    ask()


# Each was an internal error once.
BEYOND = {
    **{
        f"scale by 1e{n}": {"steer": {"edits": [{"feature": P0, "mode": "scale", "value": 10.0**n}]}}
        for n in range(15, 23)
    },
    "add 1e39": {"steer": {"edits": [{"feature": P0, "mode": "add", "value": 1e39}]}},
    "a vector of 1e39": {"steer": {"vectors": [{"layer": FIRST, "vector": [1e39] * 32}]}},
    "a direction of 1e38": {"explain": {"targets": [{"direction": [1e38] * CLASSES}]}},
}


@pytest.mark.parametrize("document", BEYOND.values(), ids=list(BEYOND))
def test_numbers_beyond_float32(witness: Witness, document: dict[str, Any]) -> None:
    witness.ask("beyond float32", [asked(document, None)])


# --- all of them ------------------------------------------------------------------------------------------------------

GENERATED = ("right", "wrong", "damaged", "schema, narrowed", "schema", "schema, broken")
SPECIAL = ("overloaded", "too large", "internal error", "broken model")


def test_a_third_is_answered_and_every_problem_is_reached(
    tally: Tally, record_property: Callable[[str, object], None]
) -> None:
    if not {*GENERATED, *SPECIAL} <= set(tally.by_test):
        pytest.skip("counts what all tests of this module asked")
    statuses: Counter[int] = sum((tally.by_test[test] for test in GENERATED), Counter())
    record_property("statuses", dict(statuses))
    assert statuses[200] >= 0.3 * statuses.total() and statuses.total() > 1000
    assert tally.by_test["schema, narrowed"][200] >= 0.3 * tally.by_test["schema, narrowed"].total()
    assert set(tally.kinds) == set(PROBLEMS)
