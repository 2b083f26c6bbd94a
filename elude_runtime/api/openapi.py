"""The published contract: an OpenAPI 3.1 document made of the wire documents (`schema`) and the problem types.

`python -m elude_runtime.api.openapi --write` writes it to `deploy/openapi.json`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.base import API_VERSION
from elude_runtime.api.schema.kserve import V1Reply, V1Request, V2Reply, V2Request
from elude_runtime.api.schema.operations import (
    DescribeRequest,
    Description,
    FeaturesReply,
    FeaturesRequest,
    VectorsReply,
    VectorsRequest,
)
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.api.schema.request import Request

FILE = "deploy/openapi.json"

_REQUESTS: tuple[type[BaseModel], ...] = (
    Request, FeaturesRequest, VectorsRequest, DescribeRequest, V1Request, V2Request,
)  # fmt: skip
_REPLIES: tuple[type[BaseModel], ...] = (
    Reply, FeaturesReply, VectorsReply, Description, V1Reply, V2Reply, ProblemDocument,
)  # fmt: skip
_MODEL = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
_VERSION = {"name": "version", "in": "path", "required": True, "schema": {"type": "string"}}
_IMAGE_TYPES = ("application/octet-stream", "image/jpeg", "image/png", "image/webp")
_BINARY: dict[str, Any] = {"type": "string", "format": "binary"}
_PHRASES = {
    400: "Not JSON; or TorchServe's own refusal, such as a missing or wrong token",
    404: "Unknown sub-route; or a model or version that TorchServe does not serve",
    412: "Another checkpoint than the expected one is served",
    413: "The image is too large; or the request, for TorchServe",
    415: "Unsupported content type",
    422: "The request cannot be carried out as it stands",
    500: "The model or the server failed",
    503: "Too much work at once; ask again after Retry-After seconds",
}
_OF_TORCHSERVE_TOO = (400, 404, 500, 503)


def openapi() -> dict[str, Any]:
    """The document, a new one at each call. It is the same for every checkpoint and server."""
    made: dict[str, Any] = json.loads(_text())
    return made


@cache
def _text() -> str:
    return json.dumps(_document())


def _document() -> dict[str, Any]:
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "ELUDe serving",
            "version": str(API_VERSION),
            "description": "A vision model's predictions, unchanged, and on request the features that carry them, "
            "steering of these features and their activations. Readers ignore keys of a reply that they do not know.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "security": [{"token": []}, {}],
        "paths": _paths(),
        "components": {
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "description": "TorchServe's inference key"}
            },
            "headers": {
                "Retry-After": {
                    "description": "Seconds",
                    "required": True,
                    "schema": {"type": "integer", "minimum": 0},
                }
            },
            "responses": _problems(),
            "schemas": _schemas(),
        },
    }


def _paths() -> dict[str, Any]:
    operations = [_with_op(model) for model in (FeaturesRequest, VectorsRequest, DescribeRequest)]
    other: list[type[BaseModel]] = [FeaturesReply, VectorsReply, Description]
    paths: dict[str, Any] = {}
    for verb, what in (
        ("predictions", "Predict, and explain, steer or read activations where the document asks"),
        ("explanations", "The same, with `explain` defaulting to {}"),
    ):
        for version in ("", "/{version}"):
            name = f"{verb[:-1]}{'OfVersion' if version else ''}"
            body = {
                "application/json": {"oneOf": [_with_image(), *operations]},
                "multipart/form-data": _multipart(),
                **dict.fromkeys(_IMAGE_TYPES, _BINARY),
            }
            paths[f"/{verb}/{{model}}{version}"] = _operation(name, what, body, [Reply, *other])
    for request, reply, what in (
        (FeaturesRequest, FeaturesReply, "Find features by name, layer or words of their label"),
        (VectorsRequest, VectorsReply, "What sets images apart from other images: features, edits, a direction"),
        (DescribeRequest, Description, "What is served, and how to ask it"),
    ):
        route = _op(request)
        body = {"application/json": _ref(request)}
        made = _operation(route, what, body, [reply], required=request is not DescribeRequest)
        paths[f"/predictions/{{model}}/{{version}}/{route}"] = made
    for verb in ("predict", "explain"):
        paths[f"/v1/models/{{model}}:{verb}"] = _operation(
            f"v1{verb.capitalize()}", f"KServe V1: {verb}", {"application/json": _ref(V1Request)}, [V1Reply]
        )
    for verb in ("infer", "explain"):
        paths[f"/v2/models/{{model}}/{verb}"] = _operation(
            f"v2{verb.capitalize()}", f"KServe V2: {verb}", {"application/json": _ref(V2Request)}, [V2Reply]
        )
    return {path: {**entry, "parameters": _parameters(path)} for path, entry in paths.items()}


def _operation(
    name: str, what: str, body: dict[str, Any], replies: Sequence[type[BaseModel]], *, required: bool = True
) -> dict[str, Any]:
    """A POST operation. body: schema by content type."""
    schemas = [_ref(reply) for reply in replies]
    reply = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {
        "post": {
            "operationId": name,
            "summary": what,
            "requestBody": {"required": required, "content": {kind: {"schema": s} for kind, s in body.items()}},
            "responses": {
                "200": {"description": "Done", "content": {"application/json": {"schema": reply}}},
                **{str(status): {"$ref": f"#/components/responses/{status}"} for status in _PHRASES},
                "default": {
                    "description": "TorchServe's own errors",
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/TorchServeError"}}},
                },
            },
        }
    }


def _parameters(path: str) -> list[dict[str, Any]]:
    return [_MODEL, _VERSION] if "{version}" in path else [_MODEL]


def _problems() -> dict[str, Any]:
    """A response for every status that problems have, with the types that come with it."""
    responses = {}
    for status in sorted({status for status, _ in PROBLEMS.values()}):
        kinds = [kind for kind, (of, _) in PROBLEMS.items() if of == status]
        problem = {
            "allOf": [_ref(ProblemDocument), {"properties": {"type": {"enum": kinds}, "status": {"const": status}}}]
        }
        response: dict[str, Any] = {
            "description": f"{_PHRASES[status]} ({', '.join(kinds)})",
            "content": {"application/problem+json": {"schema": problem}},
        }
        if status in _OF_TORCHSERVE_TOO:
            own = {"$ref": "#/components/schemas/TorchServeError"}
            response["content"]["application/json"] = {"schema": own}
        if status == 503:
            response["headers"] = {"Retry-After": {"$ref": "#/components/headers/Retry-After"}}
        responses[str(status)] = response
    return responses


def _schemas() -> dict[str, Any]:
    models = [(model, "validation") for model in (*_REQUESTS, *_REPLIES)]
    _, made = models_json_schema(models, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas: dict[str, Any] = made["$defs"]
    asked = _reachable(schemas, [model.__name__ for model in _REQUESTS])
    for name, entry in schemas.items():
        if name not in asked:
            entry.pop("additionalProperties", None)  # what a newer server adds is no error for a reader
    schemas["TorchServeError"] = {
        "description": "How TorchServe itself refuses a request, before or instead of the model's handler.",
        "type": "object",
        "required": ["code", "type", "message"],
        "properties": {"code": {"type": "integer"}, "type": {"type": "string"}, "message": {"type": "string"}},
    }
    return schemas


def _reachable(schemas: dict[str, Any], names: list[str]) -> set[str]:
    """These schemas and all that they refer to."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            text = json.dumps(schemas[name])
            waiting += [other for other in schemas if f'"#/components/schemas/{other}"' in text]
    return found


def _ref(model: type[BaseModel]) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{model.__name__}"}


def _op(model: type[BaseModel]) -> str:
    return str(model.model_fields["op"].default)


def _with_op(model: type[BaseModel]) -> dict[str, Any]:
    """Without a sub-route in the path, the document says by `op` what it asks."""
    return {"allOf": [_ref(model), {"required": ["op"]}]}


def _with_image() -> dict[str, Any]:
    return {"allOf": [_ref(Request), {"required": ["image"], "properties": {"image": {"type": "object"}}}]}


def _multipart() -> dict[str, Any]:
    document = {"allOf": [_ref(Request), {"properties": {"image": {"type": "null"}}}]}
    return {
        "type": "object",
        "required": ["image"],
        "additionalProperties": False,
        "properties": {"image": _BINARY, "request": document},
    }


def text() -> str:
    """What deploy/openapi.json holds: sorted, so that a change shows as the lines that it changes."""
    return json.dumps(openapi(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def main(arguments: Sequence[str]) -> int:
    """Print the document, or with --write put it where the repository keeps it."""
    if list(arguments) == ["--write"]:
        (Path(__file__).resolve().parents[2] / FILE).write_text(text(), encoding="utf-8")
        return 0
    if arguments:
        print("usage: python -m elude_runtime.api.openapi [--write]", file=sys.stderr)
        return 2
    print(text(), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
