"""The wire documents: strict, without coercion, NaN, unknown or duplicate keys; floats as the shortest float32 text."""

from __future__ import annotations

import json
import struct
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from elude_runtime.api.schema.base import shortest_float32
from elude_runtime.api.schema.json_text import MOST_PARTS, JSONError, parse_json
from elude_runtime.api.schema.reply import Prediction
from elude_runtime.api.schema.request import Request

FULL: dict[str, Any] = {
    "id": "my-id:1.0_a",
    "expect": {"checkpoint_sha256": "00"},
    "image": {"b64": "AA=="},
    "top_k": 3,
    "explain": {
        "targets": [
            "top1",
            {"top": 5},
            281,
            {"label": "tabby"},
            {"index": 281, "versus": 282},
            {"direction": [0.5, 1]},
        ],
        "method": "integrated_gradients",
        "steps": 8,
        "layers": ["a"],
        "level": "subunits",
        "top_features": 3,
        "sign": "negative",
        "heatmaps": "values",
    },
    "steer": {
        "edits": [
            {"feature": "a/P1", "mode": "scale", "value": 0, "apply": {"tokens": "all"}},
            {"feature": "a/P2", "mode": "ablate"},
            {
                "feature": "a/P3",
                "mode": "cap",
                "value": 1.5,
                "unit": "std",
                "side": "positive",
                "apply": {"box": [0, 0.25, 0.5, 1]},
                "when": {"feature": "a/C0", "op": ">=", "value": 2.5},
            },
        ],
        "vectors": [
            {"layer": "a", "vector": [1, 2.5], "strength": 4.0, "apply": {"mask": [[0, 1], [1, 0]]}},
            {"layer": "a", "vector": {"b64_f32": "AACAPwAAAEA="}},
            {"name": "stripes", "strength": -1.0},
        ],
        "policies": ["no-watermark"],
        "strength_multiplier": 0.5,
        "conflict": "sum",
    },
    "activations": {"features": ["a/P1", "a/7/p0"], "reduce": "mean"},
}


def changed(path: list[str | int], value: Any) -> dict[str, Any]:
    made = json.loads(json.dumps(FULL))
    place = made
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return made


def test_a_full_document_is_taken() -> None:
    request = Request.model_validate(FULL)
    assert request.explain is not None and len(request.explain.targets) == 6
    assert Request.model_validate({}).top_k == 5


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["top_k"], "5"),
        (["top_k"], 5.0),
        (["top_k"], 0),
        (["top_k"], True),
        (["top_k"], None),
        (["id"], ""),
        (["id"], "a b"),
        (["id"], "x" * 129),
        (["id"], "a\n"),
        (["id"], 7),
        (["image"], "AA=="),
        (["image", "b64"], 3),
        (["image", "url"], "http://a"),
        (["colour"], 1),
        (["expect"], {}),
        (["explain", "targets"], []),
        (["explain", "targets"], "top1"),
        (["explain", "targets", 0], "top2"),
        (["explain", "targets", 0], -1),
        (["explain", "targets", 0], True),
        (["explain", "targets", 0], 1.0),
        (["explain", "targets", 0], {"top": 0}),
        (["explain", "targets", 0], {"index": 1, "label": "a"}),
        (["explain", "targets", 0], {"direction": ["1"]}),
        (["explain", "targets", 0], {"direction": [float("nan")]}),
        (["explain", "method"], "lime"),
        (["explain", "steps"], 0),
        (["explain", "level"], "neurons"),
        (["explain", "sign"], 1),
        (["explain", "layers"], "a"),
        (["explain", "heatmaps"], True),
        (["explain", "top_features"], "10"),
        (["steer", "edits"], {}),
        (["steer", "edits", 0, "mode"], "explode"),
        (["steer", "edits", 0, "mode"], 3),
        (["steer", "edits", 0, "value"], "0"),
        (["steer", "edits", 0, "value"], float("inf")),
        (["steer", "edits", 0, "value"], None),
        (["steer", "edits", 0, "value"], True),
        (["steer", "edits", 1, "value"], 0.0),
        (["steer", "edits", 0, "feature"], 1),
        (["steer", "edits", 0, "apply"], {"tokens": "class"}),
        (["steer", "edits", 0, "apply"], "cls"),
        (["steer", "edits", 0, "apply"], {"box": [0.0, 0.0, 1.0]}),
        (["steer", "edits", 0, "apply"], {"box": [0.5, 0.0, 0.5, 1.0]}),
        (["steer", "edits", 0, "apply"], {"box": [0.0, 0.0, 1.0, 1.5]}),
        (["steer", "edits", 0, "apply"], {"mask": [[0, 1], [1]]}),
        (["steer", "edits", 0, "apply"], {"mask": [[0, 2]]}),
        (["steer", "edits", 0, "apply"], {"mask": [[True]]}),
        (["steer", "edits", 0, "apply"], {"tokens": "all", "box": [0.0, 0.0, 1.0, 1.0]}),
        (["steer", "edits", 0, "unit"], "sigma"),
        (["steer", "edits", 0, "side"], "left"),
        (["steer", "edits", 0, "when"], {"feature": "a/P1", "op": "==", "value": 1.0}),
        (["steer", "vectors"], [{"strength": 1.0}]),
        (["steer", "vectors"], [{"layer": "a", "vector": []}]),
        (["steer", "vectors"], [{"layer": "a", "vector": {"b64_f32": "AAA="}}]),
        (["steer", "vectors"], [{"layer": "a", "vector": {"b64_f32": "AADAfw=="}}]),
        (["steer", "vectors"], [{"name": "a b"}]),
        (["steer", "policies"], "a"),
        (["steer", "conflict"], "first"),
        (["steer", "strength_multiplier"], "1"),
        (["activations"], {"features": []}),
        (["activations"], {"features": ["a/P1"], "reduce": "max"}),
        (["steer", "extra"], 1),
    ],
    ids=str,
)
def test_nothing_is_coerced_or_ignored(path: list[str | int], value: Any) -> None:
    with pytest.raises(ValidationError):
        Request.model_validate(changed(path, value))


@pytest.mark.parametrize(
    "missing", [["steer", "edits", 0, "feature"], ["steer", "edits", 0, "mode"], ["steer", "edits", 0, "value"]]
)
def test_nothing_is_guessed(missing: list[str | int]) -> None:
    made = json.loads(json.dumps(FULL))
    del made["steer"]["edits"][0][missing[-1]]
    with pytest.raises(ValidationError):
        Request.model_validate(made)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b"{'a': 1}", "not JSON"),
        (b'{"a": 1,}', "not JSON"),
        (b"\xff\xfe{}", "UTF-8"),
        (b'{"a": 1} x', "not JSON"),
        (b'{"a": 1, "a": 1}', "'a' stands twice"),
        (b'{"b": [{"a": 1, "c": 2, "a": 3}]}', "'a' stands twice"),
        (b'{"a": 1, "\\u0061": 2}', "twice"),
        (b'{"a": NaN}', "NaN"),
        (b"[Infinity]", "Infinity"),
        (b"[-Infinity]", "Infinity"),
        (b"[1e400]", "too large"),
        (b"[-1e999]", "too large"),
        (b"[" * 9 + b"]" * 9, "deeper than 8"),
        (b'{"a":' * 9 + b"1" + b"}" * 9, "deeper than 8"),
        (b"[" * 200_000, "deeper than 8"),
        (b"[" + b"9" * 5000 + b"]", "not JSON"),
    ],
    ids=lambda v: repr(v[:18]),
)
def test_what_is_no_json_for_us(body: bytes, said: str) -> None:
    with pytest.raises(JSONError, match=said) as caught:
        parse_json(body, 8)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("part", "said"), [(b"{},", "strings, lists"), (b'"",', "strings, lists"), (b"[", "deeper"), (b']"a"', "strings")]
)
def test_millions_of_parts_are_refused_before_they_are_read(part: bytes, said: str) -> None:
    """Reading 16 MB of them to the end takes longer than a server waits for its worker."""
    body = b"[" + part * (16_000_000 // len(part))
    started = time.thread_time()
    with pytest.raises(JSONError, match=said):
        parse_json(body, 8)
    assert time.thread_time() - started < 1.0  # and several times as long without the bound
    assert parse_json(b"[" + b"{}," * (MOST_PARTS - 2) + b"{}]", 8) == [{}] * (MOST_PARTS - 1)


@pytest.mark.parametrize(
    "document",
    [
        {"steer": {"edits": [{"feature": "a/P0", "mode": "ablate", "apply": {"mask": [[2] * 900] * 900}}]}},
        {"steer": {"vectors": [{"layer": "a", "vector": [None] * 60_000}]}},
        {"explain": {"targets": [{"direction": [None] * 60_000}]}},
    ],
    ids=["mask", "vector", "direction"],
)
def test_of_a_long_list_of_wrong_numbers_the_first_is_named(document: dict[str, Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        Request.model_validate(document)
    assert caught.value.error_count() == 1


def test_brackets_in_strings_are_no_nesting() -> None:
    deep = {"a": "[[[[[[[[[[[[[[" + '"\\' * 5 + "{{{{", "b": [["]]]]"]]}
    assert parse_json(json.dumps(deep).encode(), 3) == deep
    assert parse_json(b"[[[[[[[[1]]]]]]]]", 8) == json.loads("[[[[[[[[1]]]]]]]]")


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON)
def test_strict_parsing_reads_what_json_writes(value: Any) -> None:
    assert parse_json(json.dumps(value).encode(), 64) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"), 64) is not ...


@given(st.binary(max_size=60))
def test_any_bytes_give_a_value_or_one_error(body: bytes) -> None:
    try:
        parse_json(body, 8)
    except JSONError as error:
        assert str(error)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_floats_are_the_shortest_text_of_the_same_float32(value: float) -> None:
    text = json.dumps(shortest_float32(value))
    assert np.float32(text) == np.float32(value)
    assert struct.pack("<f", float(text)) == struct.pack("<f", value)
    digits = len(text.replace("-", "").replace(".", "").split("e")[0].strip("0") or "0")
    for precision in range(1, digits):
        assert np.float32(f"{value:.{precision}g}") != np.float32(value)


def test_replies_write_them_so() -> None:
    made = Prediction(index=0, label=None, probability=float(np.float32(0.1)), logit=float(np.float32(-7.3e-12)))
    assert made.model_dump_json() == '{"index":0,"label":null,"probability":0.1,"logit":-7.3e-12}'
    with pytest.raises(ValidationError):
        Prediction(index=0, label=None, probability=float("nan"), logit=0.0)


def test_the_published_schemas_are_json() -> None:
    schema = Request.model_json_schema()
    assert schema["additionalProperties"] is False and "steer" in schema["properties"]
    json.dumps(schema)
