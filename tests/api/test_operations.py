"""Operations beside predictions: the catalogue page by page, contrasts of images, and what is served."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_rows import (
    PNG,
    ask,
    b64,
    body,
    document,
    engine_of,
    inputs,
    opened,
    raw,
    read,
    refused,
    reply,
    steer,
    text32,
)
from conftest import Rewritten
from support import CLASSES, FIRST, LABELS, SECOND, VIT_ARGS, as_tokens, encoded, picture

import elude_runtime
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import OPERATIONS, Row
from elude_runtime.api.openapi import openapi
from elude_runtime.api.problems import PROBLEMS
from elude_runtime.api.schema.operations import Description, FeaturesReply, VectorsReply
from elude_runtime.checkpoint.catalogue import FEATURES_JSON, features_json, read_catalogue
from elude_runtime.checkpoint.packed import pack_i32, unpack_i32

P0, C1 = f"{SECOND}/P0", f"{SECOND}/C1"
POSITIVE = [encoded(picture(1000 + n)) for n in range(5)]
NEGATIVE = [encoded(picture(1100 + n)) for n in range(6)]
Document = dict[str, Any]


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return opened(vit)


def operation(engine: Engine, op: str, **asked: Any) -> Document:
    (answered,) = engine.answer([body({"op": op, **asked})])
    made = read(answered)
    {"features": FeaturesReply, "vectors": VectorsReply, "describe": Description}[op].model_validate(made)
    return made


def names(made: Document) -> list[str]:
    return [f["feature"] for f in made["features"]]


class TestRoutes:
    @pytest.mark.parametrize(
        ("op", "asked"),
        [
            ("features", {"layer": SECOND, "limit": 3, "id": "x"}),
            ("vectors", {"layer": FIRST, "positive": [b64(PNG)], "negative": [b64(NEGATIVE[0])], "id": "x"}),
            ("describe", {"id": "x"}),
        ],
    )
    def test_the_path_and_the_body_say_the_same(self, engine: Engine, op: str, asked: Document) -> None:
        rows = [
            body({"op": op, **asked}),
            body(asked, route=op),
            body({"op": op, **asked}, route=op),
            body({"op": op, **asked}, explain=True),
            Row({"body": json.dumps({"op": op, **asked}).encode()}, "application/octet-stream", False, "", "r"),
        ]
        found = [read(a) for a in engine.answer(rows)]
        assert all(made == found[0] for made in found)

    def test_they_all_are_there(self, engine: Engine) -> None:
        assert set(OPERATIONS) == {"features", "vectors", "describe"}
        for op in ("features", "describe"):  # these can be asked without a word
            read(engine.answer([Row({"body": b""}, "", False, op, "r")])[0])

    @pytest.mark.parametrize("row", [body({}, route="feature"), body({"op": "feature"}), body({"op": None})])
    def test_another(self, engine: Engine, row: Row) -> None:
        found = refused(engine, row, "unknown-route")
        assert found["status"] == 404 and "features, vectors, describe" in found["detail"]

    def test_path_and_body_that_disagree(self, engine: Engine) -> None:
        found = refused(engine, body({"op": "describe"}, route="features"), "invalid-document")
        assert found["errors"][0]["loc"] == ["op"]

    @pytest.mark.parametrize("op", ["features", "vectors", "describe"])
    def test_what_else_is_asked_of_every_one(self, engine: Engine, op: str) -> None:
        """Strict documents, no images beside them, and `expect`."""
        asked: Document = {"op": op}
        if op == "vectors":
            asked |= {"layer": SECOND, "positive": [b64(PNG)], "negative": [b64(PNG)]}
        found = refused(engine, body({**asked, "colour": 1}), "invalid-document")
        assert found["errors"][0]["loc"] == ["colour"]
        refused(engine, body({**asked, "expect": {"checkpoint_sha256": "0" * 64}}), "other-checkpoint")
        read(engine.answer([body({**asked, "expect": {"checkpoint_sha256": engine.info.checkpoint_sha256}})])[0])
        refused(engine, body({**asked, "id": "two words"}), "invalid-document")
        parts = Row({"image": PNG, "request": json.dumps(asked).encode()}, "multipart/form-data", False, op, "r")
        refused(engine, parts, "invalid-document")

    def test_beside_predictions(self, engine: Engine) -> None:
        """They take no part in the forward pass."""
        rows = [raw(), body({"op": "features"}), body({"op": "describe"}), body({"op": "features", "limit": 0})]
        found = engine.answer(rows)
        assert [a.status for a in found] == [200, 200, 200, 422] and reply(found[0])["batch_size"] == 1


class TestFeatures:
    def test_all_of_a_checkpoint_page_by_page(self, vit: Rewritten, engine: Engine) -> None:
        """Every feature once, concepts before sub-units; the pages are the one long list."""
        whole: list[str] = []
        cursor, pages = None, 0
        while True:
            made = operation(engine, "features", limit=97, **({"cursor": cursor} if cursor else {}))
            assert made["total"] == sum(len(vit.model.concept_names(n)) for n in (FIRST, SECOND)) + _subunits(vit)
            whole += names(made)
            pages += 1
            cursor = made["next_cursor"]
            if cursor is None:
                break
            assert len(made["features"]) == 97
        assert len(whole) == len(set(whole)) == made["total"] and pages == -(-made["total"] // 97)
        concepts = [n for n in whole if n.count("/") == 1]
        assert set(concepts) == {*vit.model.concept_names(FIRST), *vit.model.concept_names(SECOND)}
        assert whole[: len(concepts)] == concepts
        assert whole[:500] == names(operation(engine, "features", limit=500))
        for name in whole[:: len(whole) // 20]:
            vit.model.feature(name)

    def test_facts(self, vit: Rewritten, engine: Engine) -> None:
        subunit = next(n for n in names(operation(engine, "features", limit=200, layer=SECOND)) if "/p" in n)
        for name in (P0, C1, subunit):
            (found,) = operation(engine, "features", ids=[name])["features"]
            assert (found["feature"], found["layer"], found["label"]) == (name, SECOND, None)
            assert found["kind"] == ("subunit" if "/p" in name else "concept")
            assert found["token_type"] == ("cls" if name == C1 else "patches") and found["std"] > 0
            values = list(found["quantiles"].values())
            assert values == sorted(values) and len(values) >= 3 and 0 <= found["density"] <= 1
        feature, state = vit.model.feature(subunit), vit.model.state(SECOND)
        assert found["std"] == text32(state.partition.std[0, feature.neuron, state.slot(feature)])

    def test_which_members_of_a_concept_fall(self, vit: Rewritten, engine: Engine) -> None:
        listed = operation(engine, "features", layer=SECOND, limit=500)["features"]
        catalogue = read_catalogue(vit.path)
        assert all((facts := catalogue.facts(one["feature"])) and one["sign"] == facts.sign for one in listed)
        assert {one["sign"] for one in listed} == {1, -1}

    def test_of_a_layer(self, engine: Engine) -> None:
        made = operation(engine, "features", layer=FIRST, limit=1000)
        assert {f["layer"] for f in made["features"]} == {FIRST} and made["total"] == len(made["features"])
        found = refused(engine, body({"op": "features", "layer": "blocks.1.mlp.fc1"}), "unknown-layer")
        assert found["errors"][0]["loc"] == ["layer"] and found["errors"][0]["suggestions"][0] == SECOND

    def test_by_name(self, engine: Engine) -> None:
        """Names that there are not are left out, others come in the order asked for."""
        asked = [C1, f"{FIRST}/P0", "nonsense", f"{SECOND}/P999", P0, C1]
        made = operation(engine, "features", ids=asked)
        assert names(made) == [C1, f"{FIRST}/P0", P0] and (made["total"], made["next_cursor"]) == (3, None)
        assert names(operation(engine, "features", ids=asked, layer=SECOND)) == [C1, P0]
        first = operation(engine, "features", ids=asked, limit=2)
        rest = operation(engine, "features", ids=asked, limit=2, cursor=first["next_cursor"])
        assert names(first) + names(rest) == names(made)

    def test_by_query(self, vit: Rewritten, tmp_path: Path) -> None:
        """In labels and names, best first: a label itself, one that begins with it, one with such a word."""
        checkpoint = _labelled(
            vit, tmp_path, {P0: "striped wing", C1: "Stripes", f"{FIRST}/P0": "a stripe", f"{FIRST}/C0": "x stripeless"}
        )
        engine = Engine.open(checkpoint, ServingConfig(), name="tiny", version="1.0")
        made = operation(engine, "features", query="stripe")
        assert set(names(made)) == {P0, C1, f"{FIRST}/P0", f"{FIRST}/C0"} and made["total"] == 4
        assert set(names(made)[:2]) == {P0, C1}
        assert names(operation(engine, "features", query="STRIPES")) == [C1]
        assert names(operation(engine, "features", query="stripe", layer=FIRST, limit=1)) == names(made)[2:3]
        assert names(operation(engine, "features", query="no such thing at all")) == []
        assert names(operation(engine, "features", query="C1"))[0] in (f"{FIRST}/C1", C1)
        label = {f["feature"]: (f["label"], f["label_source"]) for f in made["features"]}[C1]
        assert label == ("Stripes", "person")
        explained = ask(engine, document({"explain": {"layers": [SECOND], "top_features": 30}}))
        listed = {f["feature"]: f["label"] for f in explained["explanations"][0]["layers"][0]["features"]}
        assert listed[C1] == "Stripes" and listed[P0] == "striped wing"  # explanations call them so too

    def test_a_cursor_of_another_checkpoint(self, engine: Engine, mobilenet: Rewritten) -> None:
        foreign = operation(opened(mobilenet), "features", limit=1)["next_cursor"]
        own = operation(engine, "features", limit=1)["next_cursor"]
        for cursor in (foreign, "nonsense", own.split(".")[0], own + "x", own.split(".")[0] + ".-1", "", own + "0" * 9):
            found = refused(engine, body({"op": "features", "cursor": cursor}), "invalid-document")
            assert found["errors"][0]["loc"] == ["cursor"] and "begin again" in found["detail"]
        past = operation(engine, "features", cursor=own.split(".")[0] + ".99999")
        assert past["features"] == [] and past["next_cursor"] is None

    @pytest.mark.parametrize(
        "asked", [{"limit": 0}, {"limit": 1001}, {"limit": "5"}, {"query": "x" * 201}, {"ids": "P0"}]
    )
    def test_what_does_not_validate(self, engine: Engine, asked: Document) -> None:
        found = refused(engine, body({"op": "features", **asked}), "invalid-document")
        assert found["errors"][0]["loc"] == [next(iter(asked))]


def _subunits(vit: Rewritten) -> int:
    """Sub-units with edges, `rest` too, of the live token types."""
    count = 0
    for layer in vit.model.layers:
        state = vit.model.state(layer)
        for token_type in state.live_types:
            edges, m = state.partition.edges[token_type], state.partition.subunits
            count += sum(len(set(row.tolist())) for row in edges)
            assert m == 4
    return count


def _labelled(vit: Rewritten, folder: Path, labels: dict[str, str]) -> Path:
    """A copy of the checkpoint whose catalogue has these labels."""
    checkpoint = Path(shutil.copytree(vit.path, folder / "ckpt"))
    made = json.loads(features_json(checkpoint))
    for column, text in (("label", lambda name: labels[name]), ("label_source", lambda _: "person")):
        words = made["words"][column]
        codes = unpack_i32(words["b64_i32"]).copy()
        for name in labels:
            words["values"].append(text(name))
            codes[made["feature"].index(name)] = len(words["values"]) - 1
        words["b64_i32"] = pack_i32(codes)
    (checkpoint / FEATURES_JSON).write_text(json.dumps(made))
    return checkpoint


def contrasted(engine: Engine, layer: str = SECOND, **more: Any) -> Document:
    sides = {"positive": [b64(i) for i in POSITIVE], "negative": [b64(i) for i in NEGATIVE]}
    return operation(engine, "vectors", layer=layer, **{**sides, **more})


@pytest.fixture(scope="module")
def found(engine: Engine) -> Document:
    """What sets the two groups of images apart."""
    return contrasted(engine)


class TestVectors:
    def test_weights_and_shares(self, engine: Engine, found: Document) -> None:
        """Difference of the mean peaks over the pooled standard deviation, from activations that predictions tell."""
        assert len(found["features"]) == 10 and found["layer"] == SECOND and found["api_version"] == 1
        weights = [f["weight"] for f in found["features"]]
        assert [abs(w) for w in weights] == sorted(map(abs, weights), reverse=True)
        every = contrasted(engine, top_features=30)["features"]
        assert sum(f["share"] for f in every) == pytest.approx(1, abs=1e-4)
        asked = {"activations": {"features": [f["feature"] for f in found["features"]]}}
        peaks = [
            np.array([[a["value"] for a in ask(engine, document(asked, i))["activations"]] for i in side])
            for side in (POSITIVE, NEGATIVE)
        ]
        spread = np.sqrt((5 * peaks[0].var(0) + 6 * peaks[1].var(0)) / 11)
        assert weights == pytest.approx((peaks[0].mean(0) - peaks[1].mean(0)) / spread, rel=1e-3, abs=1e-4)
        squares = np.square([f["weight"] for f in every])
        assert [f["share"] for f in every] == pytest.approx(squares / squares.sum(), rel=1e-3, abs=1e-6)

    def test_the_direction(self, engine: Engine, found: Document) -> None:
        """Mean output of the layer over images and tokens, positive minus negative."""
        means = []
        for side in (POSITIVE, NEGATIVE):
            recording = engine.model.record(inputs(engine.model, *side), [SECOND])
            means.append(as_tokens(recording.y[SECOND], False).double().mean((0, 1)))
        assert len(found["direction"]) == VIT_ARGS["embed_dim"]
        assert found["direction"] == pytest.approx((means[0] - means[1]).tolist(), abs=1e-5)

    def test_edits_can_be_sent_back_as_they_are(self, engine: Engine, found: Document) -> None:
        """And move images: the steered ones' activations go towards the positive images' by what the edits say."""
        assert 0 < len(found["edits"]) <= 10 and {e["mode"] for e in found["edits"]} == {"add"}
        assert [e["feature"] for e in found["edits"]] == [
            f["feature"] for f in found["features"] if not f["feature"].endswith("rest")
        ]
        rows = [document({"steer": {"edits": found["edits"]}}, image) for image in NEGATIVE]
        for answered in engine.answer(rows):
            made = reply(answered)
            assert made["steered"]["edits_applied"] == len(found["edits"])
            assert any(c["change"] for c in made["steered"]["changes"])
        for edit in found["edits"][:4]:
            asked = {"activations": {"features": [edit["feature"]], "reduce": "mean"}}
            ours, theirs = (
                np.mean([ask(engine, document(asked, i))["activations"][0]["value"] for i in side])
                for side in (POSITIVE, NEGATIVE)
            )
            assert edit["value"] == pytest.approx(ours - theirs, rel=1e-3, abs=1e-4)

    def test_so_can_the_direction(self, engine: Engine, found: Document) -> None:
        vectors = [{"layer": SECOND, "vector": found["direction"], "strength": 2.0}]
        packed = base64.b64encode(np.array(found["direction"], "<f4").tobytes()).decode()
        same = [{"layer": SECOND, "vector": {"b64_f32": packed}, "strength": 2.0}]
        one, other = (ask(engine, document({"steer": {"vectors": v}}, NEGATIVE[0]))["steered"] for v in (vectors, same))
        assert one == other and one["edits_applied"] == 1 and one["relative_norm"][SECOND] > 0

    def test_sides_that_change_places(self, engine: Engine, found: Document) -> None:
        sides = {"positive": [b64(i) for i in NEGATIVE], "negative": [b64(i) for i in POSITIVE]}
        turned = contrasted(engine, **sides)
        assert names(turned) == names(found)
        assert [f["weight"] for f in turned["features"]] == pytest.approx([-f["weight"] for f in found["features"]])
        assert turned["direction"] == pytest.approx([-v for v in found["direction"]], abs=1e-6)

    def test_how_well_they_are_told_apart(self, engine: Engine) -> None:
        """auc is measured on held-out images: 1 for groups that differ, none with a single image on a side."""
        dark, light = ([b64(encoded(picture(s).point(lambda v, f=f: int(v * f) + 100 * (f < 1)))) for s in range(6)]
                       for f in (0.1, 1.0))  # fmt: skip
        assert contrasted(engine, positive=dark, negative=light, layer=FIRST)["auc"] > 0.9
        assert contrasted(engine, positive=dark[:1])["auc"] is None

    @pytest.mark.parametrize(
        ("asked", "kind", "loc"),
        [
            ({"layer": "blocks.1.mlp.fc3"}, "unknown-layer", ["layer"]),
            ({"positive": []}, "invalid-document", ["positive"]),
            ({"negative": [{"b64": "%"}]}, "invalid-image", ["negative", 0, "b64"]),
            ({"positive": [b64(PNG), b64(b"junk")]}, "invalid-image", ["positive", 1, "b64"]),
            ({"positive": [b64(PNG)] * 59}, "limit-exceeded", None),
            ({"top_features": 201}, "limit-exceeded", None),
            ({"top_features": 0}, "invalid-document", ["top_features"]),
            ({"positive": [{"url": "http://x"}]}, "invalid-document", ["positive", 0, "b64"]),
        ],
    )
    def test_what_cannot_be_done(self, engine: Engine, asked: Document, kind: str, loc: list[Any] | None) -> None:
        sides = {"positive": [b64(PNG)], "negative": [b64(i) for i in NEGATIVE]}
        found = refused(engine, body({"op": "vectors", "layer": SECOND, **sides, **asked}), kind)
        assert loc is None or loc in [e["loc"] for e in found["errors"]], found


class TestDescribe:
    def test_what_is_served(self, vit: Rewritten, engine: Engine) -> None:
        made, manifest = operation(engine, "describe"), vit.model.manifest
        assert made == json.loads(json.dumps(engine.describe()))  # the management port's metadata
        assert made["model"] == {
            "name": "tiny", "version": "1.0", "base_sha256": manifest.base_sha256,
            "checkpoint_sha256": manifest.checkpoint_sha256,
        }  # fmt: skip
        assert made["partition_sha256"] == manifest.partition_sha256
        assert made["elude_version"] == elude_runtime.__version__
        assert (made["output"], made["classes"]) == ("logits", CLASSES) and len(LABELS) == CLASSES
        assert made["data_config"] == vit.data.as_dict() and made["problems"] == list(PROBLEMS)

    def test_layers(self, vit: Rewritten, engine: Engine) -> None:
        found = {layer["name"]: layer for layer in operation(engine, "describe")["layers"]}
        assert list(found) == [FIRST, SECOND]
        for name, layer in found.items():
            state = vit.model.state(name)
            assert (layer["neurons"], layer["subunits"], layer["grid"]) == (VIT_ARGS["embed_dim"], 4, [4, 4])
            assert layer["inputs"] == state.linear.module.in_features
            assert [t["name"] for t in layer["token_types"]] == ["patches", "cls"]
            for token_type, told in enumerate(layer["token_types"]):
                assert told["concepts"] == state.partition.concepts(token_type)
            assert layer["attribution"]["auto"] in ("gradient", "integrated_gradients", "ablation")
            assert layer["tail_share"] == engine.shares[name] and layer["tail"] == "replay"
        auto = {e["layer"]: e["method"] for e in ask(engine, document({"explain": {}}))["explanations"][0]["layers"]}
        assert auto == {name: layer["attribution"]["auto"] for name, layer in found.items()}

    def test_limits_are_those_that_hold(self, vit: Rewritten) -> None:
        engine = engine_of(vit.model, max_edits=1, max_top_features=3, max_image_bytes=100_000)
        made = operation(engine, "describe")["limits"]
        assert (made["max_edits"], made["max_top_features"], made["max_image_bytes"]) == (1, 3, 100_000)
        assert made == {**ServingConfig().limits(), "max_edits": 1, "max_top_features": 3, "max_image_bytes": 100_000}
        edits = [{"feature": P0, "mode": "ablate"}, {"feature": C1, "mode": "ablate"}]
        ask(engine, document(steer(*edits[: made["max_edits"]])))
        refused(engine, document(steer(*edits)), "limit-exceeded")
        ask(engine, document({"explain": {"top_features": made["max_top_features"]}}))
        refused(engine, document({"explain": {"top_features": made["max_top_features"] + 1}}), "limit-exceeded")

    def test_the_number_of_threads_is_the_workers(self, engine: Engine) -> None:
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(2)
            assert operation(engine, "describe")["threads"] == 2
        finally:
            torch.set_num_threads(before)
        assert operation(engine, "describe")["threads"] == before

    def test_the_schema_is_the_published_one(self, engine: Engine) -> None:
        made = operation(engine, "describe")["openapi"]
        assert made == openapi() and {"Request", "Reply", "ProblemDocument"} <= set(made["components"]["schemas"])

    def test_an_embedding_has_no_classes(self, headless: Rewritten) -> None:
        made = operation(engine_of(headless.model), "describe")
        assert (made["output"], made["classes"]) == ("embedding", None)
