"""From the bytes of one request to a validated document and an image."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image
from pydantic import ValidationError

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.problems import Problem, at, invalid_document
from elude_runtime.api.schema import Explain, JSONError, Request, parse_json
from elude_runtime.errors import ImagesError, ImageTooLargeError
from elude_runtime.network.preprocessing import SERVED_FORMATS, decode_image

ROUTES = ("features", "vectors", "describe")
_RAW_TYPES = ("", "application/octet-stream", "application/x-www-form-urlencoded")

# What the interface specifies and later versions bring, by its place in the document: answered 501, not 422.
_EDIT_MODES = frozenset({"set", "cap", "floor", "add", "zero"})
# with the value that asks for nothing beyond what this version does
_EDIT_FIELDS: dict[str, Any] = {"when": None, "unit": "raw", "side": "both", "apply": {"tokens": "all"}}
_STEER_FIELDS: dict[str, Any] = {"vectors": [], "policies": [], "strength_multiplier": 1.0, "conflict": "error"}


@dataclass(frozen=True)
class Row:
    """One request of a batch, as bytes. parts: {"body": …} of a raw or JSON body, {"image": …, "request": …} of a
    multipart one; content_type: lower case, without parameters; explain: it came in on /explanations; route: what
    follows the version in the path."""

    parts: Mapping[str, bytes]
    content_type: str
    explain: bool
    route: str
    request_id: str


@dataclass(frozen=True)
class Intake:
    """What one request asks: its validated document and its upright RGB image."""

    request: Request
    image: Image.Image


def read_row(row: Row, config: ServingConfig, layers: int) -> Intake:
    """Validate one request to a checkpoint with that many split layers and decode its image. Raises Problem."""
    document, encoded = _documents(row, config)
    _refuse_later(document)
    if row.explain and isinstance(document, dict) and document.get("explain") is None:
        document["explain"] = {}
    try:
        request = Request.model_validate(document)
    except ValidationError as error:
        raise invalid_document(error) from error
    _check_limits(request, config, layers)
    if encoded is None:
        if request.image is None:
            raise Problem("invalid-document", "image: the request has no image.", at(["image"], "Field required"))
        try:
            encoded = base64.b64decode(request.image.b64, validate=True)
        except (binascii.Error, ValueError) as error:
            detail = "image.b64: the text is not base64."
            raise Problem("invalid-image", detail, at(["image", "b64"], "not base64")) from error
    elif request.image is not None:
        raise Problem("invalid-document", "image: the image came as a part of its own; leave it out of the document.")
    if len(encoded) > config.max_image_bytes:
        raise Problem("image-too-large", f"The image has {len(encoded)} bytes, the limit is {config.max_image_bytes}.")
    try:
        image = decode_image(bytes(encoded), config.max_image_pixels, SERVED_FORMATS)
    except ImagesError as error:
        too_large = isinstance(error, ImageTooLargeError)
        raise Problem("image-too-large" if too_large else "invalid-image", str(error)) from error
    return Intake(request, image)


def route_of(row: Row, config: ServingConfig) -> str:
    """ "" for a prediction, "describe" for a description. Problem for what is unknown (404) or comes later (501)."""
    route = row.route
    if route and route not in ROUTES:
        raise Problem("unknown-route", f"There is no sub-route {route[:40]!r}; there are {', '.join(ROUTES)}.")
    if not route and row.content_type == "application/json" and b'"op"' in row.parts.get("body", b""):
        document = _json(row.parts["body"], config)
        route = str(document.get("op", "")) if isinstance(document, dict) else ""
        if route and route not in ROUTES:
            raise Problem("unknown-route", f"There is no operation {route[:40]!r}; there are {', '.join(ROUTES)}.")
    if route in ("features", "vectors"):
        raise _later(f"the sub-route {route!r}")
    return route


def _documents(row: Row, config: ServingConfig) -> tuple[Any, bytes | None]:
    """(request document, encoded image where it came as bytes of its own)."""
    parts = row.parts
    if row.content_type == "multipart/form-data" or "image" in parts or "request" in parts:
        unknown = sorted(set(parts) - {"image", "request"})
        if unknown or "image" not in parts:
            raise Problem(
                "invalid-document", "A multipart request has the parts `image` (a file) and `request` (JSON)."
            )
        return _json(parts["request"], config) if parts.get("request") else {}, parts["image"]
    body = parts.get("body", parts.get("data", b""))
    if row.content_type == "application/json" or (row.content_type in _RAW_TYPES and body[:1] == b"{"):
        return _json(body, config), None
    if row.content_type in _RAW_TYPES or row.content_type.startswith("image/"):
        if not body:
            raise Problem("invalid-image", "The body is empty; send an image, or a JSON document with one.")
        return {}, body
    raise Problem(
        "unsupported-content-type",
        f"Content type {row.content_type[:60]!r} is not taken; send an image, application/json or multipart/form-data.",
    )


def _json(body: bytes, config: ServingConfig) -> Any:
    try:
        return parse_json(bytes(body), config.max_json_depth)
    except JSONError as error:
        raise Problem("not-json", str(error)) from error


def _refuse_later(document: Any) -> None:
    """Problem 501 for parts of the interface that this version does not have."""
    if not isinstance(document, dict):
        return
    for key, what in (("activations", "`activations`"), ("instances", "KServe V1"), ("inputs", "KServe V2")):
        if key in document:
            raise _later(what)
    explain, steer = document.get("explain"), document.get("steer")
    if isinstance(explain, dict):
        if explain.get("pixels") is True:
            raise _later("`explain.pixels`")
        if explain.get("pixels") is False:
            del explain["pixels"]
        if explain.get("heatmaps") == "png":
            raise _later("`explain.heatmaps: png`")
    if not isinstance(steer, dict):
        return
    _drop_defaults(steer, _STEER_FIELDS, "steer")
    edits = steer.get("edits")
    for edit in edits if isinstance(edits, list) else []:
        if isinstance(edit, dict):
            if isinstance(edit.get("mode"), str) and edit["mode"] in _EDIT_MODES:
                raise _later(f"the edit mode {edit['mode']!r}")
            _drop_defaults(edit, _EDIT_FIELDS, "steer.edits")


def _drop_defaults(part: dict[str, Any], fields: dict[str, Any], where: str) -> None:
    """Take out of a document what it need not say; Problem 501 for any other value of these keys."""
    for key, default in fields.items():
        if key in part and (part[key] != default or isinstance(part[key], bool)):
            raise _later(f"`{where}.{key}` other than {default!r}")
        part.pop(key, None)


def _later(what: str) -> Problem:
    return Problem(
        "not-implemented", f"This version does not have {what[:100]} yet; `describe` shows the schema it takes."
    )


def _check_limits(request: Request, config: ServingConfig, layers: int) -> None:
    explain: Explain | None = request.explain
    found: list[tuple[str, int, int]] = []
    if explain is not None:
        explained = layers if explain.layers is None else len(explain.layers)
        targets = sum(getattr(t, "top", 1) for t in explain.targets)
        found += [
            ("explain.targets", targets, config.max_targets),
            ("explain.layers", explained, config.max_layers),
            ("explain.top_features", explain.top_features, config.max_top_features),
            ("explain.steps", explain.steps, config.max_steps),
        ]
        if explain.method == "ablation":
            ablations = targets * explain.top_features * explained
            found.append(
                ("explain.top_features times targets and layers, with ablation", ablations, config.max_ablations)
            )
        nodes = explain.steps if explain.method in ("auto", "integrated_gradients") else 1
        rows = explained * (nodes * (1 + targets) + 1)  # one forward pass of all nodes, a backward pass a target
        found.append(("explain.steps times targets and layers", rows, config.max_tail_rows))
    if request.steer is not None:
        found.append(("steer.edits", len(request.steer.edits), config.max_edits))
    for name, value, limit in found:
        if value > limit:
            raise Problem("limit-exceeded", f"{name} is {value}, the limit is {limit}; ask for less.")
