"""The engine: a batch of requests in, a document or problem each out; predictions digit for digit the base model's."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from PIL import Image
from support import FIRST, LABELS, SECOND, encoded, picture

import elude_runtime as elude
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Answered, Engine
from elude_runtime.api.intake import Row
from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.reply import ProblemDocument, Reply
from elude_runtime.errors import CheckpointError
from elude_runtime.network.preprocessing import decode_image, to_input

P0, P1 = f"{SECOND}/P0", f"{SECOND}/P1"


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


PNG = encoded(picture(200))
IMAGE = b64(PNG)


def raw(data: bytes = PNG, content_type: str = "image/png", *, explain: bool = False, route: str = "") -> Row:
    return Row({"body": data}, content_type, explain, route, "r")


def document(values: dict[str, Any] | None = None, *, image: Any = IMAGE, explain: bool = False) -> Row:
    body = {**({} if image is None else {"image": image}), **(values or {})}
    return Row({"body": json.dumps(body).encode()}, "application/json", explain, "", "r")


def multipart(request: dict[str, Any] | None = None, **parts: bytes) -> Row:
    made = {"image": PNG, **parts}
    if request is not None:
        made["request"] = json.dumps(request).encode()
    return Row(made, "multipart/form-data", False, "", "r")


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return Engine(vit.model, ServingConfig(), name="tiny", version="1.0")


def limited(vit: Rewritten, **limits: Any) -> Engine:
    return Engine(vit.model, ServingConfig(**limits), name="tiny", version="1.0")


def reply(answered: Answered) -> dict[str, Any]:
    assert answered.status == 200, answered.body
    assert answered.content_type == "application/json"
    Reply.model_validate_json(answered.body)
    return json.loads(answered.body)


def problem(answered: Answered) -> dict[str, Any]:
    assert answered.status >= 400 and answered.content_type == "application/problem+json", answered.body
    made = ProblemDocument.model_validate_json(answered.body)
    assert made.status == answered.status == PROBLEMS[made.type][0] and made.title == PROBLEMS[made.type][1]
    assert made.detail and "Traceback" not in answered.body
    return json.loads(answered.body)


def answer(engine: Engine, row: Row) -> Answered:
    (found,) = engine.answer([row])
    return found


@dataclass(frozen=True)
class Bad:
    """A request that ends in a problem. setup: makes the engine it needs."""

    kind: str
    row: Row
    said: str = ""
    limits: dict[str, Any] = field(default_factory=dict)


DEEP = b"[" * 50 + b"]" * 50
BAD = [
    Bad("not-json", raw(b"{", "application/json"), "not JSON"),
    Bad("not-json", raw(b'{"top_k": NaN}', "application/json"), "NaN"),
    Bad("not-json", raw(b'{"top_k": 1e400}', "application/json"), "too large"),
    Bad("not-json", raw(b'{"id": "a", "id": "b"}', "application/json"), "twice"),
    Bad("not-json", raw(b'{"image": ' + DEEP + b"}", "application/json"), "deeper"),
    Bad("not-json", Row({"image": PNG, "request": b"{"}, "multipart/form-data", False, "", "r"), "not JSON"),
    Bad("unknown-route", raw(route="nonsense"), "nonsense"),
    Bad("unknown-route", document({"op": "nonsense"}), "nonsense"),
    Bad("other-checkpoint", document({"expect": {"checkpoint_sha256": "00"}}), "checkpoint"),
    Bad("image-too-large", raw(), "bytes", {"max_image_bytes": 100}),
    Bad("image-too-large", raw(), "pixels", {"max_image_pixels": 100}),
    Bad("unsupported-content-type", raw(content_type="text/html"), "text/html"),
    Bad("invalid-document", document(image=None), "no image"),
    Bad("invalid-document", document({"colour": 1}), "colour"),
    Bad("invalid-document", document({"top_k": "5"}), "top_k"),
    Bad("invalid-document", raw(b"[]", "application/json")),
    Bad("invalid-document", multipart(extra=b"x"), "multipart"),
    Bad("invalid-document", multipart({"image": IMAGE}), "part of its own"),
    Bad("invalid-document", document({"steer": {"edits": [{"feature": P0, "mode": "scale"}]}}), "value"),
    Bad("invalid-image", raw(b"hello"), "known format"),
    Bad("invalid-image", raw(PNG[:200]), "damaged or cut off"),
    Bad("invalid-image", raw(b""), "empty"),
    Bad("invalid-image", document(image={"b64": "%%%"}), "base64"),
    Bad("invalid-image", document(image={"b64": "AAAA"})),
    Bad(
        "unknown-feature",
        document({"steer": {"edits": [{"feature": f"{SECOND}/P999", "mode": "ablate"}]}}),
        "does not exist",
    ),
    Bad(
        "unknown-feature", document({"steer": {"edits": [{"feature": "blocks.1.mlp.fc1/P0", "mode": "ablate"}]}}), "fc2"
    ),
    Bad("unknown-layer", document({"explain": {"layers": ["blocks.1.mlp.fc3"]}}), "fc2"),
    Bad("unknown-label", document({"explain": {"targets": [{"label": "bea"}]}}), "bea"),
    Bad("invalid-target", document({"explain": {"targets": [7]}}), "classes 0 to 6"),
    Bad("invalid-target", document({"explain": {"targets": [{"index": 0, "versus": 10**30}]}}), "classes 0 to 6"),
    Bad("invalid-target", document({"explain": {"targets": [{"direction": [1.0]}]}}), "7 numbers"),
    Bad("invalid-edit", document({"steer": {"edits": [{"feature": P0, "mode": "ablate"}] * 2}}), "Two edits"),
    Bad("limit-exceeded", document({"explain": {"targets": [{"top": 11}]}}), "max_targets|explain.targets"),
    Bad("limit-exceeded", document({"explain": {"top_features": 201}}), "top_features"),
    Bad("limit-exceeded", document({"explain": {"steps": 65}}), "steps"),
    Bad("limit-exceeded", document({"explain": {}}), "layers", {"max_layers": 1}),
    Bad("limit-exceeded", document({"explain": {"method": "ablation", "top_features": 100}}), "ablation"),
    Bad("limit-exceeded", document({"explain": {"heatmaps": "png", "top_features": 101}}), "heatmaps"),
    Bad(
        "limit-exceeded", document({"explain": {"heatmaps": "values", "pixels": True, "top_features": 51}}), "heatmaps"
    ),
    Bad(
        "limit-exceeded",
        document({"explain": {"method": "ablation", "top_features": 33}}),
        "ablation",
        {"max_ablations": 64},
    ),
    Bad(
        "limit-exceeded",
        document({"steer": {"edits": [{"feature": f"{SECOND}/{k}/p0", "mode": "ablate"} for k in range(3)]}}),
        "edits",
        {"max_edits": 2},
    ),
    Bad(
        "response-too-large",
        document({"explain": {"targets": [{"top": 7}], "level": "subunits", "top_features": 200}}),
        "ask for fewer",
        {"max_response_bytes": 10_000, "max_work": 10_000, "max_batch_work": 10_000},
    ),
    Bad(
        "non-finite-output",
        document({"steer": {"edits": [{"feature": P0, "mode": "scale", "value": 1e38}], "strength_multiplier": 1e38}}),
        "smaller values",
    ),
    Bad("limit-exceeded", document({"explain": {"method": "ablation"}}), "the limit is 1", {"max_work": 1}),
    Bad("unknown-vector", document({"steer": {"vectors": [{"name": "stripes", "strength": 1.0}]}}), "stripes"),
    Bad("unknown-policy", document({"steer": {"policies": ["a"], "edits": []}}), "policy"),
    Bad("unknown-feature", document({"activations": {"features": [P0, f"{SECOND}/P88"]}}), "does not exist"),
    Bad("invalid-document", document({"op": "vectors"}, image=None), "layer"),
    Bad("invalid-document", document({"instances": []}, image=None), "instances"),
    Bad("invalid-document", document({"inputs": []}, image=None), "inputs"),
    Bad("invalid-document", document({"steer": {"edits": [{"feature": P0, "mode": "ablate", "when": {}}]}}), "when"),
]


@pytest.mark.parametrize("bad", BAD, ids=lambda b: f"{b.kind}: {b.said}")
def test_problems(vit: Rewritten, engine: Engine, bad: Bad) -> None:
    found = problem(answer(limited(vit, **bad.limits) if bad.limits else engine, bad.row))
    assert found["type"] == bad.kind, found
    text = json.dumps(found)
    assert any(part in text for part in bad.said.split("|")), found


def test_every_problem_is_reached() -> None:
    elsewhere = {"internal-error", "overloaded"}  # below, and tests/api/test_batch.py
    assert {b.kind for b in BAD} | elsewhere == set(PROBLEMS)


def test_an_internal_error_hides_its_reason(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("secret of the house")

    monkeypatch.setattr("elude_runtime.api.batch.explain_batch", fail)
    bad, good = engine.answer([document({"explain": {}}), raw()])
    assert problem(bad)["type"] == "internal-error" and "secret" not in bad.body
    assert reply(good)["explanations"] is None


def test_closest_names_are_suggested(engine: Engine) -> None:
    found = problem(answer(engine, document({"steer": {"edits": [{"feature": f"{SECOND}/P77", "mode": "ablate"}]}})))
    assert found["errors"][0]["loc"] == ["steer", "edits", 0, "feature"]
    assert any(s.startswith(f"{SECOND}/P") for s in found["errors"][0]["suggestions"])
    found = problem(answer(engine, document({"explain": {"targets": ["top1", {"label": "bea"}]}})))
    assert found["errors"][0]["loc"] == ["explain", "targets", 1] and found["errors"][0]["suggestions"] == ["bee"]
    # a union's branches are called like the keys by which they are told apart
    for vector in ({"name": "stripes", "strength": "1"}, {"layer": SECOND, "vector": [0.0], "strength": "1"}):
        found = problem(answer(engine, document({"steer": {"vectors": [vector]}})))
        assert found["errors"][0]["loc"] == ["steer", "vectors", 0, "strength"]
    found = problem(answer(engine, document({"explain": {"layers": ["blocks.1.mlp.fc1"]}})))
    assert found["errors"][0]["suggestions"][0] == SECOND


@pytest.mark.parametrize(
    "body",
    [
        b'{"\\ud800": 1}',
        b'{"image": {"\\udfff": 1}}',
        b'{"image": {"b64": "\\ud800"}}',
        b'{"id": "\\ud800"}',
        b'{"op": "\\ud800"}',
        b'{"image": {"b64": "AAAA"}, "explain": {"layers": ["\\ud800"]}}',
        b'{"image": {"b64": "AAAA"}, "explain": {"targets": [{"label": "\\ud800"}]}}',
        b'{"image": {"b64": "AAAA"}, "steer": {"edits": [{"feature": "\\ud800", "mode": "ablate"}]}}',
        b'{"steer": {"edits": [{"mode": "\\ud800"}]}}',
        b'{"op": ["describe"]}',
        b'{"op": {}}',
        b'{"image": null}',
        b'{"explain": 3, "steer": [1]}',
        b'{"steer": {"edits": [{"mode": ["set"]}]}}',
        b"3",
        b"null",
        b'"text"',
    ],
)
@pytest.mark.parametrize("explain", [False, True])
def test_strange_documents_are_one_rows_problem(engine: Engine, body: bytes, explain: bool) -> None:
    strange, good = engine.answer([Row({"body": body}, "application/json", explain, "", "r"), raw()])
    assert 400 <= problem(strange)["status"] < 500, strange.body
    reply(good)


def test_long_things_are_not_echoed(engine: Engine) -> None:
    long = "x" * 100_000
    for values in (
        {long: 1},
        {"explain": {"layers": [long]}},
        {"explain": {"targets": [{"label": long}]}},
        {"op": long},
        {"steer": {"edits": [{"feature": long, "mode": "ablate"}]}},
        {"steer": {"edits": [{"feature": P0, "mode": long}]}},
    ):
        assert len(answer(engine, document(values)).body) < 5000, list(values)


class TestPredictions:
    def test_a_batch_has_the_base_models_logits_digit_for_digit(self, vit: Rewritten, engine: Engine) -> None:
        data = [encoded(picture(s, 30 + s, 50)) for s in range(6)]
        rows = [raw(d) for d in data[:2]] + [document(image=b64(data[2])), multipart(image=data[3])]
        rows += [
            document({"explain": {}}, image=b64(data[4])),
            document({"steer": {"edits": [{"feature": P0, "mode": "ablate"}]}}, image=b64(data[5])),
        ]
        transform = vit.data.transform()
        batch = torch.stack([to_input(decode_image(d), transform) for d in data])
        with torch.no_grad():
            expected = vit.base(batch)
        for found, logits in zip(engine.answer(rows), expected, strict=True):
            made = reply(found)
            assert made["batch_size"] == 6 and made["answer"]["index"] is not None
            listed = [(p["index"], np.float32(p["logit"])) for p in made["predictions"]]
            order = logits.topk(5).indices.tolist()
            assert listed == [(i, np.float32(logits[i].item())) for i in order]
            probabilities = logits.double().softmax(-1)
            assert [np.float32(p["probability"]) for p in made["predictions"]] == [
                np.float32(probabilities[i].item()) for i in order
            ]
            assert [p["label"] for p in made["predictions"]] == [LABELS[i] for i in order]

    def test_a_row_does_not_notice_bad_neighbours(self, vit: Rewritten, engine: Engine) -> None:
        good = [raw(encoded(picture(s))) for s in (1, 2, 3)]
        alone = [reply(a) for a in engine.answer(good)]
        bad = [b.row for b in BAD if not b.limits]
        mixed = [bad[0], good[0], *bad[1:20], good[1], *bad[20:], good[2]]
        found = engine.answer(mixed)
        assert len(found) == len(mixed)
        # rows that fail only after the forward pass share the batch; the others leave it before
        for row, answered in zip(mixed, found, strict=True):
            if row not in good:
                problem(answered)
        transform = vit.data.transform()
        for row, before in zip(good, alone, strict=True):
            after = reply(found[mixed.index(row)])
            assert [p["index"] for p in after["predictions"]] == [p["index"] for p in before["predictions"]]
            tensor = to_input(decode_image(row.parts["body"]), transform)[None]
            with torch.no_grad():
                logits = vit.base(tensor)[0]
            for p in after["predictions"]:
                assert p["logit"] == pytest.approx(float(logits[p["index"]]), abs=1e-5)

    def test_only_rows_that_reach_the_model_share_its_batch(self, engine: Engine) -> None:
        rows = [raw(b"hello"), raw(), raw(b"{", "application/json"), raw(), raw(b"", route="describe")]
        found = engine.answer(rows)
        assert [a.status for a in found] == [422, 200, 400, 200, 200]
        assert reply(found[1])["batch_size"] == reply(found[3])["batch_size"] == 2

    def test_nothing_but_bad_rows(self, engine: Engine) -> None:
        assert [a.status for a in engine.answer([raw(b"x"), raw(b"")])] == [422, 422]
        assert engine.answer([]) == []

    def test_top_k(self, engine: Engine) -> None:
        assert len(reply(answer(engine, document({"top_k": 2})))["predictions"]) == 2
        assert len(reply(answer(engine, document({"top_k": 100})))["predictions"]) == 7

    def test_identity(self, vit: Rewritten, engine: Engine) -> None:
        made = reply(
            answer(
                engine, document({"id": "my-id", "expect": {"checkpoint_sha256": vit.model.manifest.checkpoint_sha256}})
            )
        )
        assert made["id"] == "my-id" and made["api_version"] == 1
        assert made["model"] == {
            "name": "tiny", "version": "1.0", "base_sha256": vit.model.manifest.base_sha256,
            "checkpoint_sha256": vit.model.manifest.checkpoint_sha256,
        }  # fmt: skip
        assert len({reply(a)["id"] for a in engine.answer([raw(), raw()])}) == 2

    def test_an_embedding(self, headless: Rewritten) -> None:
        engine = Engine(headless.model, ServingConfig(), name="bare", version="1")
        made = reply(answer(engine, raw()))
        batch = to_input(decode_image(PNG), headless.data.transform())[None]
        with torch.no_grad():
            expected = headless.base(batch)[0]
        assert [np.float32(v) for v in made["embedding"]] == [np.float32(v) for v in expected.tolist()]
        assert made["predictions"] == [] and made["answer"]["index"] is None and made["answer"]["probability"] is None
        assert problem(answer(engine, document({"explain": {}})))["type"] == "invalid-target"
        found = reply(answer(engine, document({"explain": {"targets": [{"direction": list(range(32))}]}})))
        assert found["explanations"][0]["value"] == pytest.approx(float(expected @ torch.arange(32.0)), rel=1e-4)
        edits = [{"feature": f"{headless.layer}/P0", "mode": "ablate"}]
        steered = reply(answer(engine, document({"steer": {"edits": edits}})))["steered"]
        reference = headless.model.steer(batch, [elude.Edit(f"{headless.layer}/P0")])
        assert steered["embedding"] == pytest.approx(reference.steered[0].tolist(), abs=1e-5)
        assert steered["predictions"] == [] and steered["changes"] == []


class TestImages:
    def test_an_upright_image_is_what_counts(self, engine: Engine) -> None:
        stored = picture(5, 60, 20)
        exif = Image.Exif()
        exif[0x0112] = 6
        made = reply(answer(engine, raw(encoded(stored, "JPEG", exif=exif), "image/jpeg")))
        assert (made["input"]["width"], made["input"]["height"]) == (20, 60)
        x0, y0, x1, y1 = made["input"]["crop"]
        assert 0 <= x0 < x1 <= 20 and 0 < y0 < y1 < 60

    @pytest.mark.parametrize(
        "data",
        [
            encoded(picture(6).quantize(8)),
            encoded(picture(6).convert("CMYK"), "JPEG"),
            encoded(picture(6).convert("LA")),
            encoded(picture(6), "WEBP"),
            encoded(Image.fromarray(np.arange(1200, dtype=np.uint16).reshape(30, 40) * 50)),
            encoded(picture(6), "WEBP", save_all=True, append_images=[picture(7)]),
            encoded(Image.new("RGB", (1, 1))),
        ],
        ids=["palette", "cmyk", "grey with alpha", "webp", "16 bit", "animated", "one pixel"],
    )
    def test_pictures_of_every_kind(self, engine: Engine, data: bytes) -> None:
        reply(answer(engine, raw(data, "application/octet-stream")))

    @pytest.mark.parametrize("size", [(1, 40_000), (40_000, 1)])
    def test_a_thread_of_an_image_is_refused_and_not_blown_up(self, engine: Engine, size: tuple[int, int]) -> None:
        """Scaling its short side to the model's would take 200 MB here, and gigabytes for one ten times as long."""
        found = answer(engine, raw(encoded(Image.new("L", size))))
        assert 400 <= found.status < 500

    def test_content_types(self, engine: Engine) -> None:
        for kind in ("image/png", "image/whatever", "application/octet-stream", ""):
            reply(answer(engine, raw(content_type=kind)))
        for kind in ("", "application/octet-stream", "application/json"):
            reply(answer(engine, Row(document().parts, kind, False, "", "r")))


class TestExplanations:
    def test_they_are_the_models(self, vit: Rewritten, engine: Engine) -> None:
        request = {
            "explain": {
                "targets": ["top1", {"top": 2}, 3, {"label": "fox"}, {"index": 1, "versus": 0}],
                "method": "gradient",
                "top_features": 4,
            }
        }
        made = reply(answer(engine, document(request)))
        tensor = to_input(decode_image(PNG), vit.data.transform())[None]
        with torch.no_grad():
            top = vit.base(tensor)[0].topk(2).indices.tolist()
        assert [e["target"]["index"] for e in made["explanations"]] == [top[0], *top, 3, 5, 1]
        assert [e["target"]["versus"] for e in made["explanations"]][-1] == 0
        assert made["explanations"][4]["target"]["label"] == "fox"
        expected = vit.model.explain(tensor, [3], method="gradient", top_features=4)[0][0]
        found = made["explanations"][3]
        assert found["value"] == pytest.approx(expected.value, abs=1e-5)
        for layer, other in zip(found["layers"], expected.layers, strict=True):
            assert (layer["layer"], layer["method"]) == (other.layer, "gradient")
            assert layer["baseline"] == pytest.approx(other.baseline, abs=1e-5)
            assert layer["completeness_error"] == pytest.approx(other.completeness_error, abs=1e-4)
            assert [f["feature"] for f in layer["features"]] == [f.feature.name for f in other.features]
            for f, g in zip(layer["features"], other.features, strict=True):
                assert f["attribution"] == pytest.approx(g.attribution, rel=1e-3, abs=1e-5)
                assert f["activation"] == pytest.approx(g.activation, rel=1e-3, abs=1e-5)
                assert f["token"] == g.token and f["effect"] is None

    def test_options(self, engine: Engine) -> None:
        request = {
            "explain": {
                "layers": [SECOND],
                "level": "subunits",
                "sign": "negative",
                "heatmaps": "values",
                "top_features": 6,
                "method": "integrated_gradients",
                "steps": 2,
            }
        }
        layers = reply(answer(engine, document(request)))["explanations"][0]["layers"]
        assert [e["layer"] for e in layers] == [SECOND] and layers[0]["method"] == "integrated_gradients"
        for f in layers[0]["features"]:
            assert f["attribution"] < 0 and f["feature"].count("/") == 2
            if "/p" in f["feature"]:
                assert f["heatmap"]["shape"] == [4, 4] and len(f["heatmap"]["values"]) == 4

    def test_ablation_has_effects(self, engine: Engine) -> None:
        layers = reply(answer(engine, document({"explain": {"method": "ablation", "top_features": 3}})))[
            "explanations"
        ][0]["layers"]
        assert [e["layer"] for e in layers] == [FIRST, SECOND]
        for layer in layers:
            assert layer["completeness_error"] is None and len(layer["features"]) == 3
            for f in layer["features"]:
                assert f["effect"] == -f["attribution"] and f["ablation_error"] == 0

    def test_the_explanations_route_explains_by_default(self, engine: Engine) -> None:
        for row in (raw(explain=True), document(explain=True)):
            assert len(reply(answer(engine, row))["explanations"]) == 1
        assert reply(answer(engine, raw()))["explanations"] is None
        assert len(reply(answer(engine, document({"explain": {"targets": [1, 2]}}, explain=True)))["explanations"]) == 2

    def test_rows_with_different_wishes_share_a_batch(self, vit: Rewritten, engine: Engine) -> None:
        rows = [
            document({"explain": {"layers": [SECOND], "method": "gradient"}}),
            raw(),
            document({"explain": {"layers": [FIRST], "method": "gradient"}}),
        ]
        found = [reply(a) for a in engine.answer(rows)]
        assert [e["layer"] for e in found[0]["explanations"][0]["layers"]] == [SECOND]
        assert [e["layer"] for e in found[2]["explanations"][0]["layers"]] == [FIRST]
        assert found[0]["predictions"] == found[2]["predictions"]

    def test_a_layer_named_twice_is_explained_once(self, engine: Engine) -> None:
        assert (
            len(reply(answer(engine, document({"explain": {"layers": [SECOND, SECOND]}})))["explanations"][0]["layers"])
            == 1
        )

    def test_the_ablation_limit_counts_all_layers(self, vit: Rewritten) -> None:
        """Without `layers` every split layer is explained: two here."""
        engine = limited(vit, max_ablations=10)
        reply(answer(engine, document({"explain": {"method": "ablation", "top_features": 5}})))
        assert (
            problem(answer(engine, document({"explain": {"method": "ablation", "top_features": 6}})))["type"]
            == "limit-exceeded"
        )


class TestSteering:
    def test_it_is_the_models(self, vit: Rewritten, engine: Engine) -> None:
        edits = [{"feature": P0, "mode": "scale", "value": 4.0}, {"feature": f"{FIRST}/C0", "mode": "ablate"}]
        made = reply(answer(engine, document({"steer": {"edits": edits}})))
        tensor = to_input(decode_image(PNG), vit.data.transform())[None]
        expected = vit.model.steer(tensor, [elude.Edit(P0, "scale", 4.0), elude.Edit(f"{FIRST}/C0")])
        steered = made["steered"]
        assert steered["edits_applied"] == 2 and made["answer"]["source"] == "steered"
        assert made["answer"]["index"] == steered["predictions"][0]["index"]
        for change in steered["changes"]:
            i = change["index"]
            assert np.float32(change["default"]) == np.float32(expected.default[0, i].item())
            assert change["steered"] == pytest.approx(float(expected.steered[0, i]), abs=1e-5)
            assert change["change"] == pytest.approx(float(expected.change[0, i]), abs=2e-5)
        for layer, norm in steered["relative_norm"].items():
            assert norm == pytest.approx(expected.relative_norm[layer][0], rel=1e-3)
        default = reply(answer(engine, raw()))
        assert (
            made["predictions"] == default["predictions"]
            and default["answer"]["source"] == "default"
            and default["steered"] is None
        )

    def test_an_edit_that_changes_nothing(self, engine: Engine) -> None:
        rows = [
            document({"steer": {"edits": [{"feature": P0, "mode": "scale", "value": 1}]}}),
            raw(encoded(picture(9))),
        ]
        made = reply(engine.answer(rows)[0])
        assert made["steered"]["predictions"] == made["predictions"]
        assert all(c["change"] == 0 and c["default"] == c["steered"] for c in made["steered"]["changes"])

    def test_other_rows_are_untouched(self, engine: Engine) -> None:
        plain = [reply(a) for a in engine.answer([raw(), raw(encoded(picture(9)))])]
        mixed = engine.answer(
            [
                document({"steer": {"edits": [{"feature": P0, "mode": "scale", "value": 30.0}]}}),
                raw(encoded(picture(9))),
            ]
        )
        assert reply(mixed[1])["predictions"] == plain[1]["predictions"]
        assert reply(mixed[0])["predictions"] == plain[0]["predictions"]


def test_describe(vit: Rewritten, engine: Engine) -> None:
    for row in (raw(b"", route="describe"), raw(b'{"op": "describe"}', "application/json")):
        made = reply_of_describe(answer(engine, row))
        assert [e["name"] for e in made["layers"]] == [FIRST, SECOND]
        assert all(e["tail"] == "replay" for e in made["layers"])
        assert made["data_config"] == vit.data.as_dict() and made["limits"]["max_edits"] == 64 and made["classes"] == 7
        schemas = made["openapi"]["components"]["schemas"]
        assert {"Request", "Reply", "ProblemDocument"} <= set(schemas) and made["problems"] == list(PROBLEMS)
        assert made["policies"] == made["vectors"] == []
        assert made["partition_sha256"] == vit.model.manifest.partition_sha256
        assert (
            made["threads"] == torch.get_num_threads()
            and made["model"]["checkpoint_sha256"] == vit.model.manifest.checkpoint_sha256
        )


def reply_of_describe(answered: Answered) -> dict[str, Any]:
    assert answered.status == 200 and answered.content_type == "application/json"
    return json.loads(answered.body)


def test_a_model_whose_output_is_not_finite(vit: Rewritten) -> None:
    broken = copy.deepcopy(vit.model)
    with torch.no_grad():
        broken.base.head.bias[2] = float("nan")
    engine = Engine(broken, ServingConfig(), name="tiny", version="1.0")
    assert problem(answer(engine, raw()))["type"] == "non-finite-output"


class TestOpening:
    def test_the_expected_checkpoint_only(self, vit: Rewritten) -> None:
        digest = vit.model.manifest.checkpoint_sha256
        assert (
            Engine.open(
                vit.path, ServingConfig(expected_checkpoint_sha256=digest), name="a", version="1"
            ).info.checkpoint_sha256
            == digest
        )
        with pytest.raises(CheckpointError, match="expects checkpoint 0000"):
            Engine.open(vit.path, ServingConfig(expected_checkpoint_sha256="0" * 64), name="a", version="1")

    def test_a_folder_that_is_none(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError):
            Engine.open(tmp_path, ServingConfig(), name="a", version="1")

    def test_threads(self, vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[int] = []
        setter: Callable[[int], None] = seen.append
        monkeypatch.setattr(torch, "set_num_threads", setter)
        Engine.open(vit.path, ServingConfig(threads=3), name="a", version="1")
        assert seen == [3]
