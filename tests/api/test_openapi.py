"""The published contract: valid, up to date with the documents and problems, and true of what they take and give."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openapi_spec_validator import validate

from elude_runtime.api import openapi as published
from elude_runtime.api.openapi import openapi
from elude_runtime.api.problems import PROBLEMS, Problem
from elude_runtime.api.schema.operations import FeaturesRequest
from elude_runtime.api.schema.request import Request
from elude_runtime.package_files import shipped_file

DOCUMENT = openapi()
IMAGE = {"b64": "AAAA"}


def valid(schema: Any, value: Any) -> bool:
    """Whether a value fits a schema of the document."""
    whole = {**schema, "components": DOCUMENT["components"]}
    return jsonschema.Draft202012Validator(whole).is_valid(value)


def body_of(path: str, kind: str = "application/json") -> Any:
    return DOCUMENT["paths"][path]["post"]["requestBody"]["content"][kind]["schema"]


def test_the_file_is_what_the_code_makes() -> None:
    """After a change of the documents: python -m elude_runtime.api.openapi --write"""
    assert shipped_file(published.FILE).read_text(encoding="utf-8") == published.text()


def test_it_is_valid_openapi() -> None:
    validate(DOCUMENT)


def test_each_call_gives_a_document_of_its_own() -> None:
    openapi()["paths"].clear()
    assert openapi()["paths"] == DOCUMENT["paths"]


def test_nothing_in_it_depends_on_the_day_or_the_checkpoint() -> None:
    script = "from elude_runtime.api.openapi import main; import sys; sys.exit(main([]))"
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert ran.stdout == published.text()


def test_writing_and_wrong_arguments(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "deploy").mkdir()
    monkeypatch.setattr(published, "__file__", str(tmp_path / "elude_runtime" / "api" / "openapi.py"))
    assert published.main(["--write"]) == 0
    assert (tmp_path / "deploy" / "openapi.json").read_text(encoding="utf-8") == published.text()
    assert published.main(["--nonsense"]) == 2
    assert "usage" in capsys.readouterr().err


def test_every_problem_stands_under_its_status_and_nothing_else_does() -> None:
    found = {}
    for status, response in DOCUMENT["components"]["responses"].items():
        schema = response["content"]["application/problem+json"]["schema"]
        for kind in schema["allOf"][1]["properties"]["type"]["enum"]:
            found[kind] = int(status)
    assert found == {kind: status for kind, (status, _) in PROBLEMS.items()}
    for path in DOCUMENT["paths"].values():
        assert {s for s in path["post"]["responses"]} == {"200", "default", *map(str, found.values())}


@pytest.mark.parametrize("kind", PROBLEMS)
def test_a_problem_document_fits_its_own_response_only(kind: str) -> None:
    problem = Problem(kind, "Something is wrong.")
    document = json.loads(problem.document().model_dump_json(exclude_none=True))
    for status, response in DOCUMENT["components"]["responses"].items():
        schema = response["content"]["application/problem+json"]["schema"]
        assert valid(schema, document) == (int(status) == problem.status)


def test_503_says_when_to_ask_again() -> None:
    header = DOCUMENT["components"]["responses"]["503"]["headers"]["Retry-After"]
    assert header == {"$ref": "#/components/headers/Retry-After"}


PREDICTION = "/predictions/{model}"
TAKEN = [
    (PREDICTION, {"image": IMAGE}),
    (PREDICTION, {"image": IMAGE, "explain": {"targets": ["top1", 3, {"index": 1, "versus": 2}], "pixels": True}}),
    (PREDICTION, {"image": IMAGE, "steer": {"edits": [{"feature": "f", "mode": "cap", "value": 1.5, "unit": "std"}]}}),
    (PREDICTION, {"image": IMAGE, "steer": {"vectors": [{"name": "a"}, {"layer": "l", "vector": [1.5]}]}}),
    (PREDICTION, {"op": "describe"}),
    (PREDICTION, {"op": "features", "query": "stripes"}),
    ("/explanations/{model}/{version}", {"image": IMAGE}),
    ("/predictions/{model}/{version}/features", {"limit": 3}),
    ("/v1/models/{model}:predict", {"instances": [{"b64": "AAAA"}]}),
    ("/v2/models/{model}/infer", {"inputs": [{"name": "i", "shape": [1], "datatype": "BYTES", "data": ["AAAA"]}]}),
]  # fmt: skip
REFUSED = [
    (PREDICTION, {}),
    (PREDICTION, {"image": None}),
    (PREDICTION, {"image": IMAGE, "colour": 1}),
    (PREDICTION, {"image": IMAGE, "explain": {"steps": 0}}),
    (PREDICTION, {"image": IMAGE, "steer": {"edits": [{"feature": "f", "mode": "scale"}]}}),
    (PREDICTION, {"image": IMAGE, "id": "two words"}),
    (PREDICTION, {"op": "nonsense"}),
    (PREDICTION, {"query": "stripes"}),
    ("/predictions/{model}/{version}/features", {"limit": "3"}),
    ("/v1/models/{model}:predict", {"instances": []}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "body"), TAKEN)
def test_what_is_taken(path: str, body: Any) -> None:
    assert valid(body_of(path), body)


@pytest.mark.parametrize(("path", "body"), REFUSED)
def test_what_is_refused(path: str, body: Any) -> None:
    assert not valid(body_of(path), body)


def test_a_form_has_the_image_as_a_file_and_not_in_the_document() -> None:
    schema = body_of(PREDICTION, "multipart/form-data")
    assert valid(schema, {"image": "bytes", "request": {"top_k": 3}})
    assert not valid(schema, {"request": {"top_k": 3}})
    assert not valid(schema, {"image": "bytes", "request": {"image": IMAGE}})


def test_requests_are_closed_and_replies_open() -> None:
    """A misspelt key of a request is refused; a key that a later version adds to a reply breaks no reader."""
    schemas = DOCUMENT["components"]["schemas"]
    for model in (Request, FeaturesRequest):
        assert schemas[model.__name__]["additionalProperties"] is False
    for name in ("Reply", "Prediction", "FeatureInfo", "ProblemDocument"):
        assert "additionalProperties" not in schemas[name]


def test_publishing_needs_no_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from elude_runtime.api.openapi import openapi; openapi()"
    subprocess.run([sys.executable, "-c", script], check=True)
