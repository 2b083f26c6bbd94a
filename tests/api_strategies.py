"""Hypothesis strategies for requests that have an answer, in every envelope that the server takes."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from support import encoded, picture

from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row

JSON, MULTIPART = "application/json", "multipart/form-data"
IMAGES = [
    encoded(picture(500)),
    encoded(picture(501, 64, 30), "JPEG", quality=90),
    encoded(picture(502, 33, 47), "WEBP"),
]
SIDES = ("both", "positive", "negative")


@dataclass(frozen=True, repr=False)
class World:
    """What the schema cannot know: what a served checkpoint is called and how large it is. widths: by layer; patch,
    prefix: features of the two token types."""

    widths: Mapping[str, int]
    patch: tuple[str, ...]
    prefix: tuple[str, ...]
    labels: tuple[str, ...]
    vectors: tuple[str, ...]
    policies: tuple[str, ...]
    input_size: tuple[int, int, int]
    digest: str

    @classmethod
    def of(cls, engine: Engine) -> World:
        model, features = engine.model, []
        for layer in model.layers:
            features += [*model.concept_names(layer), *(f"{layer}/{k}/{t}0" for k in (0, 7) for t in "pc")]
        return cls(
            {layer: model.state(layer).linear.neurons for layer in model.layers},
            tuple(f for f in features if _type(f) == "p"),
            tuple(f for f in features if _type(f) == "c"),
            tuple(model.manifest.labels),
            tuple(engine.vectors),
            tuple(engine.policies.rules),
            model.data_config.input_size,
            model.manifest.checkpoint_sha256,
        )

    @property
    def features(self) -> tuple[str, ...]:
        return self.patch + self.prefix

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self.widths)


def _type(feature: str) -> str:
    return feature.rpartition("/")[2][0].lower()


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


@dataclass(frozen=True)
class Call:
    """A request as it reaches the engine, at its path. kind: the problem it has to end in, "" for an answer, None for
    either."""

    path: str
    row: Row
    kind: str | None = ""


def call(path: str, parts: Mapping[str, bytes], content_type: str = JSON, kind: str | None = "") -> Call:
    """What the handler makes of a request on one of the published paths."""
    _, first, _, *further = path.split("/")
    explain = first == "explanations" or path.endswith(("explain", ":explain"))
    route = further[1] if first == "predictions" and len(further) == 2 else ""
    return Call(path, Row(dict(parts), content_type, explain, route, "r"), kind)


@dataclass(frozen=True)
class Token:
    """Text that stands in a document in place of a value. json: whether JSON, as the API takes it, has it."""

    text: str
    json: bool = False


class Twice(dict[str, Any]):
    """An object that says its first key a second time."""


def text(value: Any) -> bytes:
    """A document with all its tokens and repeated keys, as JSON text."""
    return _text(value).encode()


def _text(value: Any) -> str:
    if isinstance(value, Token):
        return value.text
    if isinstance(value, dict):
        pairs = [*value.items(), *([next(iter(value.items()))] if isinstance(value, Twice) and value else [])]
        return "{" + ",".join(f"{json.dumps(k)}:{_text(v)}" for k, v in pairs) + "}"
    if isinstance(value, list) and any(isinstance(v, dict | list | Token) for v in value):
        return "[" + ",".join(map(_text, value)) + "]"
    return json.dumps(value)


# --- right documents --------------------------------------------------------------------------------------------------

NUMBERS = st.floats(-4, 4, width=32) | st.integers(-3, 3)
IDENTITIES = st.from_regex(r"\A[A-Za-z0-9._:-]{1,20}\Z")


@st.composite
def scopes(draw: st.DrawFn, token_type: str = "") -> dict[str, Any]:
    """Tokens that a feature of this type (a vector: of any) can act on."""
    if token_type == "c":
        return {"tokens": draw(st.sampled_from(["all", "cls"]))}
    kind = draw(st.sampled_from(["tokens", "box", "mask"]))
    if kind == "tokens":
        return {"tokens": draw(st.sampled_from(["all", "patches"] + (["cls"] if not token_type else [])))}
    if kind == "box":
        low = [draw(st.floats(0, 0.75)) for _ in range(2)]
        return {"box": [*low, *(v + draw(st.floats(0.01, 0.25)) for v in low)]}
    width = draw(st.integers(1, 5))
    rows = st.lists(st.integers(0, 1), min_size=width, max_size=width)
    return {"mask": draw(st.lists(rows, min_size=1, max_size=4))}


def conditions(world: World) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"feature": st.sampled_from(world.features), "op": st.sampled_from([">", ">=", "<", "<="]), "value": NUMBERS}
    )


@st.composite
def edits(draw: st.DrawFn, world: World) -> dict[str, Any]:
    feature = draw(st.sampled_from(world.features))
    made = {"feature": feature, "mode": draw(st.sampled_from("scale set cap floor add ablate zero".split()))}
    if made["mode"] not in ("ablate", "zero"):
        made["value"] = draw(NUMBERS)
    if made["mode"] not in ("ablate", "zero", "scale") and draw(st.booleans()):
        made["unit"] = draw(st.sampled_from(["raw", "std"]))
    optional = {"side": st.sampled_from(SIDES), "apply": scopes(_type(feature)), "when": conditions(world)}
    return {**made, **draw(st.fixed_dictionaries({}, optional=optional))}


@st.composite
def vectors(draw: st.DrawFn, world: World) -> dict[str, Any]:
    optional = {"strength": NUMBERS, "apply": scopes(), "when": conditions(world)}
    made = draw(st.fixed_dictionaries({}, optional=optional))
    if world.vectors and draw(st.booleans()):
        return {"name": draw(st.sampled_from(world.vectors)), **made}
    layer = draw(st.sampled_from(world.layers))
    numbers = draw(st.lists(NUMBERS, min_size=world.widths[layer], max_size=world.widths[layer]))
    if draw(st.booleans()):
        packed = base64.b64encode(np.asarray(numbers, dtype="<f4").tobytes()).decode()
        return {"layer": layer, "vector": {"b64_f32": packed}, **made}
    return {"layer": layer, "vector": numbers, **made}


@st.composite
def steerings(draw: st.DrawFn, world: World) -> dict[str, Any]:
    made = {
        "edits": draw(st.lists(edits(world), max_size=3)),
        "vectors": draw(st.lists(vectors(world), max_size=1)),
        "policies": draw(st.lists(st.sampled_from(world.policies), unique=True)),
        "conflict": draw(st.sampled_from(["sum", "last"])),
    }
    if len(made["edits"]) < 2 and draw(st.booleans()):
        made["conflict"] = "error"
    if draw(st.booleans()):
        made["strength_multiplier"] = draw(NUMBERS)
    return made


def targets(world: World) -> st.SearchStrategy[Any]:
    classes = st.integers(0, len(world.labels) - 1)
    numbers = st.lists(NUMBERS, min_size=len(world.labels), max_size=len(world.labels))
    return st.one_of(
        st.just("top1"),
        classes,
        st.fixed_dictionaries({"top": st.integers(1, 3)}),
        st.fixed_dictionaries({"label": st.sampled_from(world.labels)}),
        st.fixed_dictionaries({"index": classes}, optional={"versus": classes}),
        st.fixed_dictionaries({"direction": numbers}),
    )


@st.composite
def explanations(draw: st.DrawFn, world: World) -> dict[str, Any]:
    """Small enough for every limit, ablations included."""
    optional = {
        "targets": st.lists(targets(world), min_size=1, max_size=2),
        "method": st.sampled_from(["auto", "gradient", "integrated_gradients", "ablation"]),
        "steps": st.integers(1, 6),
        "layers": st.none() | st.lists(st.sampled_from(world.layers), min_size=1, unique=True),
        "level": st.sampled_from(["concepts", "subunits"]),
        "sign": st.sampled_from(SIDES),
        "heatmaps": st.sampled_from(["none", "values", "png"]),
        "pixels": st.booleans(),
    }
    return {**draw(st.fixed_dictionaries({}, optional=optional)), "top_features": draw(st.integers(1, 3))}


def documents(world: World) -> st.SearchStrategy[dict[str, Any]]:
    """Prediction requests that have an answer, without their image."""
    asked = st.fixed_dictionaries(
        {"features": st.lists(st.sampled_from(world.features), min_size=1, max_size=4)},
        optional={"reduce": st.sampled_from(["peak", "mean", "tokens"])},
    )
    return st.fixed_dictionaries(
        {},
        optional={
            "id": IDENTITIES,
            "expect": st.just({"checkpoint_sha256": world.digest}),
            "top_k": st.integers(1, 9),
            "explain": explanations(world),
            "steer": steerings(world),
            "activations": asked,
        },
    )


def operations(world: World) -> st.SearchStrategy[dict[str, Any]]:
    """Documents of the operations, each with its `op`."""
    images = st.lists(st.sampled_from(IMAGES).map(b64), min_size=1, max_size=3)
    layer = st.sampled_from(world.layers)
    common = {"id": IDENTITIES, "expect": st.just({"checkpoint_sha256": world.digest})}
    return st.one_of(
        st.fixed_dictionaries({"op": st.just("describe")}, optional=common),
        st.fixed_dictionaries(
            {"op": st.just("features")},
            optional={
                **common,
                "query": st.sampled_from(["P1", "stripes", "blocks", ""]),
                "layer": layer,
                "ids": st.lists(st.sampled_from(world.features), max_size=3),
                "limit": st.integers(1, 20),
            },
        ),
        st.fixed_dictionaries(
            {"op": st.just("vectors"), "layer": layer, "positive": images, "negative": images},
            optional={**common, "top_features": st.integers(1, 8)},
        ),
    )


@st.composite
def right(draw: st.DrawFn, world: World) -> Call:
    """A request that has an answer, in any of the envelopes."""
    if draw(st.integers(0, 5)) == 0:
        document = draw(operations(world))
        if draw(st.booleans()):
            return call("/predictions/tiny", {"body": text(document)})
        kept = draw(st.sampled_from([{}, {"op": document["op"]}]))
        body = {**{k: v for k, v in document.items() if k != "op"}, **kept}
        return call(f"/predictions/tiny/1.0/{document['op']}", {"body": text(body)})
    return draw(enveloped(world, draw(documents(world))))


@st.composite
def enveloped(draw: st.DrawFn, world: World, document: dict[str, Any], kind: str | None = "") -> Call:
    """A prediction request's document on its way: JSON, multipart, raw bytes (where it asks nothing), KServe."""
    image = draw(st.sampled_from(IMAGES))
    envelopes = ["json", "multipart", "v2 bytes"] + (["v1", "v2 numbers"] if kind == "" else [])
    envelope = draw(st.sampled_from(envelopes + ([] if document else ["raw"])))
    path = draw(st.sampled_from(["/predictions/tiny", "/predictions/tiny/1.0", "/explanations/tiny"]))
    if envelope == "json":
        return call(path, {"body": text({"image": b64(image), **document})}, kind=kind)
    if envelope == "multipart":
        return call(path, {"image": image, "request": text(document)}, MULTIPART, kind)
    if envelope == "raw":
        return call(path, {"body": image}, draw(st.sampled_from(["image/png", "application/octet-stream", ""])), kind)
    if envelope == "v1":
        alone = st.sampled_from(IMAGES).map(b64)
        instances = [*draw(st.lists(alone, max_size=2)), {"image": b64(image), **document}]
        path = draw(st.sampled_from(["/v1/models/tiny:predict", "/v1/models/tiny:explain"]))
        return call(path, {"body": text({"instances": instances})}, kind=kind)
    path = draw(st.sampled_from(["/v2/models/tiny/infer", "/v2/models/tiny/explain"]))
    template = draw(st.sampled_from([document, text(document).decode()]))
    count = draw(st.integers(1, 2))
    tensor: dict[str, Any] = {"name": "input", "datatype": "BYTES", "shape": [count]}
    if envelope == "v2 bytes":
        tensor["data"] = [b64(image)["b64"]] * count
    else:
        size = world.input_size
        tensor |= {"datatype": "FP32", "shape": [count, *size]}
        row = [0.25 * (k % 7) for k in range(size[2])]
        tensor["data"] = (
            [[[row] * size[1]] * size[0]] * count if draw(st.booleans()) else row * (count * size[0] * size[1])
        )
    body = {"inputs": [tensor], "parameters": {"elude": template}}
    if draw(st.booleans()):
        body["outputs"] = [{"name": n} for n in draw(st.permutations(["logits", "elude"]))]
    return call(path, {"body": text(body)}, kind=kind)
