"""Hypothesis strategies for requests that are wrong: with a single fault of a known kind, or damaged anyhow."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from api_strategies import (
    IMAGES,
    JSON,
    MULTIPART,
    Call,
    Token,
    Twice,
    World,
    b64,
    call,
    documents,
    enveloped,
    right,
    text,
)
from hypothesis import strategies as st
from support import encoded, picture

from elude_runtime.api.intake import Row

NOT_IMAGES = [b"", b"GIF89a", b"<svg/>", IMAGES[0][:90], IMAGES[1][: len(IMAGES[1]) // 2]]
LONG_IMAGE = encoded(picture(503).resize((2000, 10)))  # its sides' ratio is beyond the limit


# --- documents with one fault -----------------------------------------------------------------------------------------


def _steered(edit: Mapping[str, Any]) -> dict[str, Any]:
    return {"steer": {"edits": [dict(edit)]}}


def faults(world: World) -> dict[str, list[dict[str, Any]]]:
    """By the problem's type: what is put over a right document to make it wrong in just this way."""
    feature, layer = world.patch[0], world.layers[0]
    ablate = {"feature": feature, "mode": "ablate"}
    return {
        "other-checkpoint": [{"expect": {"checkpoint_sha256": "0" * 64}}],
        "invalid-document": [
            {"top_k": "5"},
            {"top_k": 0},
            {"top_k": True},
            {"colour": 1},
            {"id": "two words"},
            {"explain": {"methods": "gradient"}},
            {"explain": {"targets": []}},
            _steered({"feature": feature, "mode": "scale"}),
            _steered({**ablate, "value": 1.0}),
            _steered({**ablate, "apply": {"box": [0.5, 0.0, 0.1, 1.0]}}),
            {"activations": {"features": []}},
        ],
        "unknown-feature": [
            _steered({"feature": f"{layer}/P999", "mode": "ablate"}),
            _steered({**ablate, "when": {"feature": f"{layer}/999/p0", "op": ">", "value": 0}}),
            {"activations": {"features": [feature, "blocks.7/P0"]}},
        ],
        "unknown-layer": [
            {"explain": {"layers": [layer, "blocks.7"]}},
            {"steer": {"vectors": [{"layer": "blocks.7", "vector": [1.0]}]}},
        ],
        "unknown-label": [{"explain": {"targets": [{"label": "unicorn"}]}}],
        "unknown-vector": [{"steer": {"vectors": [{"name": "no-such-vector"}]}}],
        "unknown-policy": [{"steer": {"policies": ["no-such-policy"]}}],
        "invalid-target": [
            {"explain": {"targets": [len(world.labels)]}},
            {"explain": {"targets": [{"index": 0, "versus": 10**20}]}},
            {"explain": {"targets": [{"direction": [1.0]}]}},
        ],
        "invalid-edit": [
            _steered({**ablate, "apply": {"tokens": "cls"}}),
            {"steer": {"edits": [ablate, {**ablate, "mode": "zero"}]}},
            {"steer": {"vectors": [{"layer": layer, "vector": [1.0]}]}},
        ],
        "limit-exceeded": [
            {"explain": {"steps": 65}},
            {"explain": {"targets": [{"top": 11}]}},
            {"explain": {"method": "ablation", "top_features": 100}},
            {"steer": {"edits": [ablate] * 65}},
            {"activations": {"features": [feature] * 201}},
        ],
    }


@st.composite
def wrong(draw: st.DrawFn, world: World) -> Call:
    """A request with one fault, and the type of the problem that it has to get."""
    found = faults(world)
    kind = draw(st.sampled_from([*found, *OTHER_FAULTS]))
    if kind in found:
        document = draw(documents(world))
        return draw(enveloped(world, {**document, **draw(st.sampled_from(found[kind]))}, kind))
    return draw(OTHER_FAULTS[kind])


_BAD_B64 = st.sampled_from(["%", "AAAA", "A", *(b64(data)["b64"] for data in NOT_IMAGES)])
OTHER_FAULTS: dict[str, st.SearchStrategy[Call]] = {
    "not-json": st.binary(max_size=40).map(
        lambda junk: call("/predictions/tiny", {"body": b'{"top_k": 1' + junk.replace(b"}", b"")}, JSON, "not-json")
    ),
    "unknown-route": st.text(max_size=12)
    .filter(lambda op: op not in ("features", "vectors", "describe"))
    .map(lambda op: call("/predictions/tiny", {"body": text({"op": op})}, kind="unknown-route")),
    "unsupported-content-type": st.sampled_from(["text/html", "application/xml", "video/mp4", "a", "\xe9/x"]).map(
        lambda kind: call("/predictions/tiny", {"body": IMAGES[0]}, kind, "unsupported-content-type")
    ),
    "invalid-image": st.one_of(
        st.sampled_from(NOT_IMAGES).map(
            lambda data: call("/predictions/tiny", {"body": data}, "image/png", "invalid-image")
        ),
        st.sampled_from(NOT_IMAGES).map(
            lambda data: call("/explanations/tiny", {"image": data, "request": b"{}"}, MULTIPART, "invalid-image")
        ),
        _BAD_B64.map(
            lambda data: call("/predictions/tiny", {"body": text({"image": {"b64": data}})}, kind="invalid-image")
        ),
    ),
    "image-too-large": st.sampled_from([LONG_IMAGE, IMAGES[0] + b"\0" * 100_000]).map(
        lambda data: call("/predictions/tiny", {"body": data}, "image/png", "image-too-large")
    ),
}


# --- damaged documents ------------------------------------------------------------------------------------------------


NOT_JSON = [Token(t) for t in ("NaN", "Infinity", "-Infinity", "1e400", "-1e999", "'a'", "01", "[" * 40 + "]" * 40)]
JUNK: list[Any] = [
    None, True, False, 0, -1, 1.5, 10**30, -0.0, 5e-324, "", "x", "\ud800", "\x00", "x" * 3000, [], {}, [[]], [None],
    {"": {}}, {"b64": "AAAA"}, "../../etc/passwd", Token("1E0", json=True),
]  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """(container, key) of everything in a document; of long lists the first items."""
    items = value.items() if isinstance(value, dict) else enumerate(value[:4]) if isinstance(value, list) else ()
    for key, part in list(items):
        found.append((value, key))
        _places(part, found)
    return found


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    return [_copied(v) for v in value] if isinstance(value, list) else value


@st.composite
def damaged(draw: st.DrawFn, world: World) -> Call:
    """A right request's document with one to three places broken. Its kind is `not-json` where it surely is none."""
    sent = draw(right(world).filter(lambda c: "image" not in c.row.parts and c.row.parts["body"][:1] == b"{"))
    document = json.loads(sent.row.parts["body"])
    kind: str | None = None
    for _ in range(draw(st.integers(1, 3))):
        places = _places(document, [])
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        breaks = draw(st.sampled_from(["junk", "junk", "drop", "add", "swap", "not JSON", "twice"]))
        if breaks == "junk":
            container[key] = _copied(draw(st.sampled_from(JUNK)))
        elif breaks == "drop":
            del container[key]
        elif breaks == "add" and isinstance(container, dict):
            container[draw(st.sampled_from(["x", "op", "image", "explain", "instances", "inputs", "value"]))] = _copied(
                draw(st.sampled_from(JUNK))
            )
        elif breaks == "swap":
            other, place = draw(st.sampled_from(places))
            if place in other if isinstance(other, dict) else place < len(other):
                container[key] = _copied(other[place])
        elif breaks == "not JSON":
            container[key] = draw(st.sampled_from(NOT_JSON))
        elif isinstance(container[key], dict) and container[key]:
            container[key] = Twice(container[key])
    body = text(document)
    if _broken(document):
        kind = "not-json"
    return Call(sent.path, Row({"body": body}, JSON, sent.row.explain, sent.row.route, "r"), kind)


def _broken(value: Any) -> bool:
    if isinstance(value, Token):
        return not value.json
    if isinstance(value, Twice) and value:
        return True
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_broken, parts))
