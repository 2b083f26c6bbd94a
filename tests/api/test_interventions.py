"""Steering through the JSON API: against a second account of it in float64, and against explanations."""

from __future__ import annotations

import base64
import copy
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from api_rows import (
    PNG,
    ask,
    body,
    counted,
    document,
    engine_of,
    inputs,
    opened,
    raw,
    refused,
    reply,
    steer,
    text32,
)
from conftest import Rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from steering_reference import WHOLE, Reference, Window
from support import CLASSES, FIRST, LABELS, SECOND, VIT_ARGS, as_tokens, encoded, forward_with, picture
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.edits import DenseVector, Scope, Steering
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.checkpoint.vectors import StoredVector

P0, P1, P2, C0 = f"{SECOND}/P0", f"{SECOND}/P1", f"{SECOND}/P2", f"{SECOND}/C0"
WIDTH = VIT_ARGS["embed_dim"]
NEXT = {SECOND: encoded(picture(1201)), FIRST: encoded(picture(1202))}
# Not of one number: a normalisation takes away what all neurons have in common.
TILT = np.linspace(-0.8, 0.6, WIDTH, dtype=np.float32).tolist()
Document = dict[str, Any]


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return opened(vit)


def edit(feature: str, mode: str = "ablate", value: float | None = None, **more: Any) -> Document:
    return {"feature": feature, "mode": mode, **({} if value is None else {"value": value}), **more}


def steered(engine: Engine, *edits: Mapping[str, Any], image: bytes = PNG, **more: Any) -> Document:
    """The reply to these edits, with all classes among its changes."""
    return ask(engine, document({"top_k": CLASSES, **steer(*edits, **more)}, image))


def logits(made: Mapping[str, Any], which: str = "steered") -> Tensor:
    """[K]: steered, default or change of every class."""
    found = {c["index"]: c[which] for c in made["steered"]["changes"]}
    return torch.tensor([found[i] for i in range(CLASSES)], dtype=torch.float32)


# --- the same steering, written down a second time --------------------------------------------------------------------


def scope_of(apply: Mapping[str, Any]) -> Scope:
    box, mask = apply.get("box"), apply.get("mask")
    return Scope(apply.get("tokens", "all"), tuple(box) if box else None, tuple(map(tuple, mask)) if mask else None)


def referred(
    model: elude.EludeModel, layer: str, steering: Steering, window: Window = WHOLE
) -> Callable[[Tensor, Tensor], Tensor]:
    """(input, output) -> output with the reference's change."""
    state = copy.deepcopy(model.state(layer))  # before the layer is hooked: the reference runs a copy of it

    def change(x: Tensor, y: Tensor) -> Tensor:
        return y + Reference(state, x).change([steering], window, model.concept_std).to(y).reshape(y.shape)

    return change


def by_hand(model: elude.EludeModel, steer_: Mapping[str, Any], image: bytes, window: Window = WHOLE) -> Tensor:
    """Logits [K] of a full pass in which the layers put out what `steering_reference` says."""
    changes = {}
    for layer in model.layers:
        edits = tuple(
            elude.Edit(
                e["feature"], e["mode"], e.get("value"), e.get("unit", "raw"), e.get("side", "both"),
                scope_of(e.get("apply", {})),
            )
            for e in steer_.get("edits", [])
            if e["feature"].startswith(f"{layer}/")
        )  # fmt: skip
        vectors = tuple(
            DenseVector(layer, np.float32(v["vector"]), v.get("strength", 1.0), scope_of(v.get("apply", {})))
            for v in steer_.get("vectors", [])
            if v["layer"] == layer
        )
        if edits or vectors:
            own = Steering(edits, vectors, steer_.get("strength_multiplier", 1.0), steer_.get("conflict", "error"))
            changes[layer] = referred(model, layer, own, window)
    with torch.no_grad():
        return forward_with(model.base, inputs(model, image), changes)[0]


def agree(engine: Engine, steer_: Document, image: bytes = PNG, window: Window = WHOLE) -> Document:
    """The API's answer, which has to be the account's."""
    made = ask(engine, document({"top_k": CLASSES, "steer": steer_}, image))
    expected = by_hand(engine.model, steer_, image, window)
    torch.testing.assert_close(logits(made), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        default = engine.model.base(inputs(engine.model, image))[0]
    assert torch.equal(logits(made, "default"), default)
    torch.testing.assert_close(logits(made, "change"), expected - default, rtol=1e-3, atol=1e-4)
    assert [p["logit"] for p in made["predictions"]] == [text32(v) for v in default.sort(descending=True).values]
    assert made["answer"]["index"] == int(expected.argmax()) == made["steered"]["predictions"][0]["index"]
    return made


def first_subunit(engine: Engine, layer: str, token_type: int = 0) -> str:
    partition = engine.model.state(layer).partition
    neuron, slot = partition.live(token_type).nonzero()[0].tolist()
    return f"{layer}/{neuron}/{'pc'[token_type]}{slot}"


VALUES = {"scale": -1.5, "set": 1.2, "cap": -0.1, "floor": 0.4, "add": 1.5, "ablate": None, "zero": None}


class TestEdits:
    @pytest.mark.parametrize("mode", VALUES)
    @pytest.mark.parametrize("kind", ["concept", "cls", "subunit", "cls subunit"])
    def test_modes(self, engine: Engine, kind: str, mode: str) -> None:
        feature = {
            "concept": P0,
            "cls": C0,
            "subunit": first_subunit(engine, FIRST),
            "cls subunit": first_subunit(engine, SECOND, 1),
        }[kind]
        made = agree(engine, {"edits": [edit(feature, mode, VALUES[mode])]})
        assert made["steered"]["edits_applied"] == 1 and logits(made, "change").abs().max() > 1e-4
        assert made["answer"]["source"] == "steered" and made["warnings"] == []

    @pytest.mark.parametrize("mode", ["set", "cap", "floor", "add"])
    @pytest.mark.parametrize("kind", ["concept", "subunit"])
    def test_units(self, engine: Engine, kind: str, mode: str) -> None:
        """ "std" counts the feature's standard deviations, which the catalogue tells."""
        feature = P0 if kind == "concept" else first_subunit(engine, SECOND)
        made = agree(engine, {"edits": [edit(feature, mode, VALUES[mode], unit="std")]})
        (row,) = engine.answer([body({"op": "features", "ids": [feature]})])
        std = json.loads(row.body)["features"][0]["std"]
        plain = steered(engine, edit(feature, mode, VALUES[mode] * std))
        torch.testing.assert_close(logits(made), logits(plain), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(logits(made), logits(steered(engine, edit(feature, mode, VALUES[mode]))), atol=1e-5)

    @pytest.mark.parametrize("mode", ["scale", "set", "ablate"])
    @pytest.mark.parametrize("feature", [P0, f"{FIRST}/P1"])
    def test_sides(self, engine: Engine, feature: str, mode: str) -> None:
        outs = [
            logits(agree(engine, {"edits": [edit(feature, mode, VALUES[mode], side=side)]}))
            for side in ("positive", "negative", "both")
        ]
        assert not torch.allclose(outs[0], outs[1], atol=1e-4) and not torch.allclose(outs[0], outs[2], atol=1e-4)

    def test_two_sides_of_a_feature_are_two_edits(self, engine: Engine) -> None:
        both = [edit(P0, "scale", 3.0, side="positive"), edit(P0, "ablate", side="negative")]
        assert agree(engine, {"edits": both})["steered"]["edits_applied"] == 2

    @pytest.mark.parametrize("multiplier", [0.0, -1.0, 0.5, 3.0])
    def test_the_strength_multiplier(self, engine: Engine, multiplier: float) -> None:
        """Times the change of each edit and vector."""
        asked = {"edits": [edit(P0, "scale", 2.0)], "strength_multiplier": multiplier}
        made = agree(engine, asked)
        scaled = steered(engine, edit(P0, "scale", 1 + multiplier))
        torch.testing.assert_close(logits(made), logits(scaled), rtol=1e-4, atol=1e-4)
        vectors = [{"layer": FIRST, "vector": TILT, "strength": 2.0}]
        agree(engine, {**asked, "vectors": vectors})

    def test_several_layers_in_network_order(self, engine: Engine) -> None:
        """A later layer edits the already steered activations, in whatever order the edits are given."""
        early, late = edit(f"{FIRST}/P0", "scale", 4.0), edit(P0, "cap", 0.1)
        made = agree(engine, {"edits": [early, late]})
        assert steered(engine, late, early)["steered"] == made["steered"]
        assert list(made["steered"]["relative_norm"]) == [FIRST, SECOND]
        alone = [logits(steered(engine, one), "change") for one in (early, late)]
        assert not torch.allclose(logits(made, "change"), sum(alone), atol=1e-3)

    def test_the_relative_norm(self, engine: Engine) -> None:
        """The realised change over the output, on the edited tokens."""
        made = steered(engine, edit(P0, "scale", 3.0))
        recording = engine.model.record(inputs(engine.model, PNG), [SECOND])
        state = engine.model.state(SECOND)
        change = Reference(state, recording.x[SECOND]).change([Steering((elude.Edit(P0, "scale", 3.0),))])
        patches = as_tokens(recording.y[SECOND], False)[0, 1:].double()
        expected = float(change[1:].norm() / patches.norm())
        assert made["steered"]["relative_norm"] == {SECOND: pytest.approx(expected, rel=1e-4)} and expected > 0.01

    def test_changes_list_both_answers_classes(self, engine: Engine) -> None:
        made = ask(engine, document({"top_k": 2, **steer(edit(C0, "scale", 40.0))}))
        shown = [c["index"] for c in made["steered"]["changes"]]
        wanted = [p["index"] for p in (*made["predictions"], *made["steered"]["predictions"])]
        assert shown == list(dict.fromkeys(wanted)) and len(made["steered"]["predictions"]) == 2
        assert all(c["label"] == LABELS[c["index"]] for c in made["steered"]["changes"])


FEATURES = [P0, P1, C0, f"{SECOND}/Crest", f"{SECOND}/3/p0", f"{FIRST}/P0", f"{FIRST}/C1", f"{FIRST}/7/c0"]
scopes = st.sampled_from([{"tokens": "all"}, {"box": [0.1, 0.2, 0.6, 0.5]}, {"mask": [[0, 1], [1, 1], [0, 0]]}])


@st.composite
def edits(draw: st.DrawFn) -> Document:
    mode = draw(st.sampled_from(list(VALUES)))
    made = edit(draw(st.sampled_from(FEATURES)), mode, side=draw(st.sampled_from(["both", "positive", "negative"])))
    if VALUES[mode] is not None:
        made["value"] = draw(st.sampled_from([-1.5, -0.2, 0.0, 0.4, 2.0]))
        if mode != "scale":
            made["unit"] = draw(st.sampled_from(["raw", "std"]))
    if "/P" in made["feature"] or "/p" in made["feature"]:
        made["apply"] = draw(scopes)
    return made


vectors = st.fixed_dictionaries(
    {
        "layer": st.sampled_from([FIRST, SECOND]),
        "vector": st.sampled_from([TILT, [-0.5, 0.3] * (WIDTH // 2)]),
        "strength": st.sampled_from([-1.0, 0.5, 2.0]),
        "apply": st.one_of(scopes, st.sampled_from([{"tokens": "cls"}, {"tokens": "patches"}])),
    }
)


@settings(max_examples=60)
@given(
    chosen=st.lists(edits(), max_size=4),
    added=st.lists(vectors, max_size=2),
    multiplier=st.sampled_from([1.0, 0.5, -1.0]),
    conflict=st.sampled_from(["sum", "last"]),
)
def test_any_steering_is_the_references(
    engine: Engine, chosen: list[Document], added: list[Document], multiplier: float, conflict: str
) -> None:
    steer_ = {"edits": chosen, "vectors": added, "strength_multiplier": multiplier, "conflict": conflict}
    agree(engine, steer_, encoded(picture(1203, 60, 40)), seen(60, 40))


# --- where and when ---------------------------------------------------------------------------------------------------


def seen(width: int, height: int) -> Window:
    """What the tiny ViT sees of an image, as fractions: the shorter side to 35 pixels, the middle 32 x 32 cut out."""
    wide, high = (35, int(35 * height / width)) if width <= height else (int(35 * width / height), 35)
    left, top = round((wide - 32) / 2), round((high - 32) / 2)
    return left / wide, top / high, (left + 32) / wide, (top + 32) / high


class TestScopes:
    @pytest.mark.parametrize("size", [(40, 40), (60, 40), (33, 80)])
    @pytest.mark.parametrize(
        "scope",
        [{"box": [0.0, 0.0, 0.5, 0.5]}, {"box": [0.4, 0.55, 0.41, 0.56]}, {"mask": [[1, 0, 0], [0, 0, 1]]}],
        ids=["quarter", "point", "mask"],
    )
    def test_boxes_and_masks(self, engine: Engine, size: tuple[int, int], scope: Document) -> None:
        """Fractions of the image, whatever of it the model sees."""
        image = encoded(picture(1204, *size))
        made = agree(engine, {"edits": [edit(P0, "add", 3.0, apply=scope)]}, image, seen(*size))
        assert made["steered"]["edits_applied"] == 1
        vector = {"layer": SECOND, "vector": TILT, "apply": scope}
        agree(engine, {"vectors": [vector]}, image, seen(*size))

    @pytest.mark.parametrize("orientation", [3, 6, 8])
    @pytest.mark.parametrize("scope", [{"box": [0.05, 0.3, 0.45, 0.6]}, {"mask": [[0, 0, 0], [1, 0, 0]]}])
    def test_a_box_is_one_of_the_upright_image(self, engine: Engine, orientation: int, scope: Document) -> None:
        """However its pixels are stored: EXIF says how to turn them."""
        upright = picture(1205, 60, 44)
        turn = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        exif = Image.Exif()
        exif[0x0112] = orientation
        stored = encoded(upright.transpose(turn[orientation]), exif=exif)
        one, other = (steered(engine, edit(P0, "add", 3.0, apply=scope), image=i) for i in (encoded(upright), stored))
        assert one["steered"] == other["steered"] and one["input"] == other["input"]
        assert one["predictions"] == other["predictions"] and logits(one, "change").abs().max() > 1e-3
        agree(engine, {"edits": [edit(P0, "add", 3.0, apply=scope)]}, stored, seen(60, 44))
        unturned = encoded(upright.transpose(turn[orientation]))  # the same pixels without a word about them
        assert steered(engine, edit(P0, "add", 3.0, apply=scope), image=unturned)["steered"] != one["steered"]

    def test_token_types(self, engine: Engine) -> None:
        vector = {"layer": SECOND, "vector": TILT}
        outs = {
            tokens: logits(agree(engine, {"vectors": [{**vector, "apply": {"tokens": tokens}}]}))
            for tokens in ("all", "cls", "patches")
        }
        assert torch.equal(outs["all"], logits(steered(engine, vectors=[vector])))
        assert not torch.allclose(outs["cls"], outs["patches"], atol=1e-3)
        assert steered(engine, edit(C0, apply={"tokens": "cls"}))["steered"] == steered(engine, edit(C0))["steered"]


class TestConditions:
    @pytest.mark.parametrize("op", [">", ">=", "<", "<="])
    def test_they_compare_the_peak(self, engine: Engine, op: str) -> None:
        peak = ask(engine, document({"activations": {"features": [P1]}}))["activations"][0]["value"]
        for offset in (-0.01, 0.0, 0.01):
            value = float(np.float32(peak)) + offset
            holds = {">": offset < 0, ">=": offset <= 0, "<": offset > 0, "<=": offset >= 0}[op]
            made = steered(engine, edit(P0, when={"feature": P1, "op": op, "value": value}))
            assert made["steered"]["edits_applied"] == int(holds), (op, offset)
            plain = steered(engine, edit(P0))
            assert (made["steered"] == plain["steered"]) == holds
            assert [w["code"] for w in made["warnings"]] == ([] if holds else ["condition-not-met"])

    def test_they_look_at_the_unedited_pass(self, engine: Engine) -> None:
        """Not at what an earlier edit made of the activation."""
        early = edit(f"{FIRST}/P0", "scale", 20.0)
        peak = ask(engine, document({"activations": {"features": [P1]}}))["activations"][0]["value"]
        for op in (">", "<"):
            when = {"feature": P1, "op": op, "value": peak + (0.001 if op == "<" else -0.001)}
            made = steered(engine, early, edit(P0, when=when))
            assert made["steered"]["edits_applied"] == 2
            assert made["steered"] == steered(engine, early, edit(P0))["steered"]

    def test_of_vectors_and_of_other_layers(self, engine: Engine) -> None:
        vector = {"layer": SECOND, "vector": TILT}
        never = {"feature": f"{FIRST}/C0", "op": ">", "value": 1e30}
        made = steered(engine, vectors=[{**vector, "when": never}, vector])
        assert made["steered"] == {**steered(engine, vectors=[vector])["steered"], "edits_applied": 1}
        (warning,) = made["warnings"]
        assert warning["code"] == "condition-not-met" and "steer.vectors.0" in warning["detail"]

    def test_an_unknown_feature_in_one(self, engine: Engine) -> None:
        asked = edit(P0, when={"feature": f"{SECOND}/P99", "op": ">", "value": 0.0})
        found = refused(engine, document(steer(edit(P1), asked)), "unknown-feature")
        assert found["errors"][0]["loc"] == ["steer", "edits", 1, "when", "feature"]


class TestConflicts:
    def test_an_error_names_the_later_edit(self, engine: Engine) -> None:
        asked = [edit(f"{FIRST}/P0"), edit(P0), edit(P1), edit(P0, "scale", 2.0)]
        found = refused(engine, document(steer(*asked)), "invalid-edit")
        assert found["status"] == 422 and found["errors"][0]["loc"] == ["steer", "edits", 3, "feature"]
        assert "'sum' or 'last'" in found["detail"] and P0 in found["detail"]

    def test_a_concept_and_its_member(self, engine: Engine) -> None:
        member = _member(engine, P0)
        found = refused(engine, document(steer(edit(member), edit(P0))), "invalid-edit")
        assert "share a sub-unit" in found["detail"] and found["errors"][0]["loc"] == ["steer", "edits", 1, "feature"]
        agree(engine, {"edits": [edit(member, "scale", 3.0), edit(P0)], "conflict": "sum"})
        agree(engine, {"edits": [edit(P0), edit(member, "scale", 3.0)], "conflict": "last"})

    @pytest.mark.parametrize("conflict", ["sum", "last"])
    def test_rules(self, engine: Engine, conflict: str) -> None:
        pair = [edit(P0, "scale", 3.0), edit(P0, "add", 0.5)]
        made = agree(engine, {"edits": pair, "conflict": conflict})
        turned = agree(engine, {"edits": pair[::-1], "conflict": conflict})
        if conflict == "last":
            assert made["steered"]["predictions"] == steered(engine, pair[1])["steered"]["predictions"]
            assert turned["steered"]["predictions"] == steered(engine, pair[0])["steered"]["predictions"]
        else:
            torch.testing.assert_close(logits(made), logits(turned), rtol=1e-5, atol=1e-5)

    def test_apart_in_place_or_layer_is_no_conflict(self, engine: Engine) -> None:
        halves = [edit(P0, apply={"box": [0, 0, 0.4, 1]}), edit(P0, "scale", 2.0, apply={"box": [0.8, 0, 1, 1]})]
        made = steered(engine, *halves, edit(f"{FIRST}/P0"))
        assert made["steered"]["edits_applied"] == 3

    @pytest.mark.parametrize(
        ("asked", "kind", "loc"),
        [
            (steer(edit(P0), edit(f"{SECOND}/P99")), "unknown-feature", ["edits", 1, "feature"]),
            (steer(edit(P0, apply={"tokens": "cls"})), "invalid-edit", ["edits", 0, "apply"]),
            (steer(vectors=[{"layer": SECOND, "vector": [1.0]}]), "invalid-edit", ["vectors", 0, "vector"]),
            (steer(vectors=[{"layer": "x", "vector": [1.0]}]), "unknown-layer", ["vectors", 0, "layer"]),
            (steer(vectors=[{"name": "none"}]), "unknown-vector", ["vectors", 0, "name"]),
        ],
    )
    def test_the_place_of_other_problems(self, engine: Engine, asked: Document, kind: str, loc: list[Any]) -> None:
        assert refused(engine, document(asked), kind)["errors"][0]["loc"] == ["steer", *loc]


def _member(engine: Engine, concept: str) -> str:
    """A sub-unit of a patch concept of the second layer."""
    partition = engine.model.state(SECOND).partition
    neuron, slot = (partition.concept[0] == int(concept.rpartition("P")[2])).nonzero()[0].tolist()
    return f"{SECOND}/{neuron}/p{slot}"


class TestVectors:
    def test_numbers_bytes_and_names_say_the_same(self, vit: Rewritten) -> None:
        numbers = np.linspace(-0.6, 0.4, WIDTH, dtype=np.float32)
        partition = vit.model.manifest.partition_sha256
        stored = StoredVector("tilt", SECOND, partition, "2026-01-01", numbers, [], [], 0.9, 3, 3)
        engine = Engine(vit.model, ServingConfig(), name="tiny", version="1.0", vectors={"tilt": stored})
        packed = {"b64_f32": base64.b64encode(numbers.astype("<f4").tobytes()).decode()}
        given = [
            {"layer": SECOND, "vector": numbers.tolist(), "strength": 2.5},
            {"layer": SECOND, "vector": packed, "strength": 2.5},
            {"name": "tilt", "strength": 2.5},
        ]
        made = [steered(engine, vectors=[v])["steered"] for v in given]
        assert made[0] == made[1] == made[2]
        agree(engine, {"vectors": given[:1]})
        found = refused(engine, document(steer(vectors=[{"name": "tlit"}])), "unknown-vector")
        assert found["errors"][0]["suggestions"] == ["tilt"]

    def test_they_add_up_with_edits(self, engine: Engine) -> None:
        vector = {"layer": SECOND, "vector": [0.5, -0.5] * (WIDTH // 2)}
        made = agree(
            engine, {"edits": [edit(P0), edit(P1, "set", 1.0)], "vectors": [vector, {**vector, "strength": 2}]}
        )
        assert made["steered"]["edits_applied"] == 4


# --- edits without effect ---------------------------------------------------------------------------------------------

NOTHING: dict[str, tuple[Document, str | None]] = {
    "a factor of one": (steer(edit(P0, "scale", 1.0)), None),
    "nothing added": (steer(edit(C0, "add", 0.0)), None),
    "a cap above all": (steer(edit(P0, "cap", 1e30)), None),
    "no strength": (steer(edit(P0), strength_multiplier=0.0), None),
    "a vector without strength": (steer(vectors=[{"layer": FIRST, "vector": TILT, "strength": 0.0}]),
                                  None),
    "a vector of zeros": (steer(vectors=[{"layer": FIRST, "vector": [0.0] * WIDTH}]), None),
    "a condition that does not hold": (steer(edit(P0, when={"feature": P1, "op": "<", "value": -1e9})),
                                       "condition-not-met"),
    "a box beside the crop": (steer(edit(P0, apply={"box": [0.0, 0.0, 0.02, 1.0]})), "no-token-in-scope"),
    "a mask of zeros": (steer(edit(P0, apply={"mask": [[0, 0]]})), "no-token-in-scope"),
}  # fmt: skip


class TestWithoutEffect:
    @pytest.mark.parametrize("name", NOTHING)
    @pytest.mark.parametrize("beside", [0, 2])
    def test_the_unedited_row_itself_comes_back(self, engine: Engine, name: str, beside: int) -> None:
        """Bit for bit, whatever the others of the batch are asked. A warning says why, where the edit did not act at
        all; one that acted and happened to change nothing is counted."""
        image = encoded(picture(1206, 80, 40))
        asked, code = NOTHING[name]
        others = [document(steer(edit(P0, "scale", 5.0)), i) for i in NEXT.values()][:beside]
        with counted(engine.model) as passes:
            made = reply(engine.answer([document({"top_k": 7, **asked}, image), *others])[0])
        assert all(0 not in rows for _, rows in passes.tails) or beside
        assert made["steered"]["predictions"] == made["predictions"]
        assert not logits(made, "change").any() and torch.equal(logits(made), logits(made, "default"))
        assert set(made["steered"]["relative_norm"].values()) == {0.0}
        assert [w["code"] for w in made["warnings"]] == ([code] if code else [])
        assert made["steered"]["edits_applied"] == (0 if code else 1)
        assert all(w["detail"].startswith("steer.edits.0") for w in made["warnings"])

    def test_a_side_on_which_nothing_is(self, engine: Engine) -> None:
        """The class token is one token, and on one side."""
        value = ask(engine, document({"activations": {"features": [C0]}}))["activations"][0]["value"]
        sides = ("positive", "negative") if value > 0 else ("negative", "positive")
        made = [steered(engine, edit(C0, "scale", 9.0, side=side)) for side in sides]
        assert [m["steered"]["edits_applied"] for m in made] == [1, 0]
        assert [[w["code"] for w in m["warnings"]] for m in made] == [[], ["no-effect"]]
        assert made[1]["steered"]["predictions"] == made[1]["predictions"] != made[0]["steered"]["predictions"]

    def test_no_edits_at_all(self, engine: Engine) -> None:
        made = ask(engine, document({"steer": {}}))
        assert made["steered"]["predictions"] == made["predictions"] and made["steered"]["edits_applied"] == 0
        assert made["steered"]["relative_norm"] == {} and made["answer"]["source"] == "default"


# --- ablation, explained and steered ----------------------------------------------------------------------------------


def against_mean(values: Tensor, index: int) -> float:
    return float(values[index] - values.mean())


class TestAblation:
    @pytest.mark.parametrize("level", ["concepts", "subunits"])
    @pytest.mark.parametrize("layer", [FIRST, SECOND])
    def test_explain_and_steer_agree(self, engine: Engine, layer: str, level: str) -> None:
        asked = {"method": "ablation", "targets": [2], "layers": [layer], "level": level, "top_features": 8}
        (found,) = ask(engine, document({"explain": asked}))["explanations"][0]["layers"]
        assert len(found["features"]) == 8
        for feature in found["features"]:
            change = logits(steered(engine, edit(feature["feature"])), "change")
            assert against_mean(change, 2) == pytest.approx(feature["effect"], abs=1e-5)
            assert feature["effect"] == -feature["attribution"] and feature["ablation_error"] == 0
        assert max(abs(f["effect"]) for f in found["features"]) > 1e-3

    @pytest.mark.parametrize("layer", [FIRST, SECOND])
    def test_bit_for_bit_at_equal_tail_batch(self, engine: Engine, layer: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Both are a null edit and the edit in one tail of two rows, here of the same recorded batch of three."""
        seen_: list[tuple[Tensor, Tensor]] = []
        run = engine.model.tails.run

        def spy(recording: Any, name: str, y: Tensor, rows: Tensor, *rest: Any) -> Tensor:
            out = run(recording, name, y, rows, *rest)
            if len(rows) == 2:
                seen_.append((y.detach().clone(), out.detach().clone()))
            return out

        monkeypatch.setattr(engine.model.tails, "run", spy)
        asked = {"method": "ablation", "targets": [4], "layers": [layer], "top_features": 1}
        others = [raw(image) for image in NEXT.values()]
        explained = reply(engine.answer([document({"explain": asked}), *others])[0])
        (feature,) = explained["explanations"][0]["layers"][0]["features"]
        made = reply(engine.answer([document({"top_k": 7, **steer(edit(feature["feature"]))}), *others])[0])
        (one, by_explain), (other, by_steer) = seen_
        assert torch.equal(one, other) and torch.equal(by_explain, by_steer)
        values = by_steer[:, 4] - by_steer.mean(1)
        assert feature["effect"] == text32(values[1] - values[0]) != 0
        assert torch.equal(logits(made), by_steer[1])
        assert torch.equal(logits(made, "change"), by_steer[1] - by_steer[0])


def test_a_change_is_measured_against_a_null_edit_of_the_same_tail(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tail's shape does to the numbers is no effect of the edit: here all that tails put out is off by one."""
    rows = [document({"top_k": 7, **steer(edit(P0, "scale", 3.0))}), *map(raw, NEXT.values())]
    before = reply(engine.answer(rows)[0])
    run = engine.model.tails.run
    monkeypatch.setattr(engine.model.tails, "run", lambda *given: run(*given) + 1.0)
    after = reply(engine.answer(rows)[0])
    torch.testing.assert_close(logits(after), logits(before) + 1, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(after, "change"), logits(before, "change"), rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(after, "default"), logits(before, "default"))


class TestSteeredExplanations:
    ALL: Document = {"method": "gradient", "top_features": 30, "targets": [3]}  # noqa: RUF012

    def explained(self, engine: Engine, steer_: Document, **options: Any) -> tuple[Document, Document]:
        """The reply, and the steered answer's explanation by layer."""
        made = ask(engine, document({"top_k": 7, "explain": {**self.ALL, **options}, **steer_}))
        (found,) = made["steered"]["explanations"]
        return made, {layer["layer"]: layer for layer in found["layers"]}

    def test_its_value_is_the_steered_one(self, engine: Engine) -> None:
        made, _ = self.explained(engine, steer(edit(P0, "scale", 4.0), edit(f"{FIRST}/C0")))
        before, after = made["explanations"][0]["value"], made["steered"]["explanations"][0]["value"]
        assert after == pytest.approx(against_mean(logits(made), 3), abs=1e-4)
        assert before == pytest.approx(against_mean(logits(made, "default"), 3), abs=1e-4)
        assert abs(after - before) > 1e-3

    @pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
    def test_features_and_edits_add_up(self, engine: Engine, method: str) -> None:
        """To value - baseline, up to the completeness error that is told."""
        made, layers = self.explained(engine, steer(edit(f"{FIRST}/P0", "scale", 3.0), edit(C0)), method=method)
        value = made["steered"]["explanations"][0]["value"]
        for layer in layers.values():
            total = sum(f["attribution"] for f in layer["features"]) + layer["edit_attribution"]
            assert total == pytest.approx(value - layer["baseline"] + layer["completeness_error"], abs=2e-4)
        for layer in made["explanations"][0]["layers"]:
            assert layer["edit_attribution"] is None

    def test_a_layer_without_edits_has_no_share_of_them(self, engine: Engine) -> None:
        _, layers = self.explained(engine, steer(edit(f"{FIRST}/P0", "scale", 3.0)))
        assert layers[FIRST]["edit_attribution"] not in (None, 0.0) and layers[SECOND]["edit_attribution"] is None

    def test_an_ablation_takes_its_features_share_back(self, engine: Engine) -> None:
        _, layers = self.explained(engine, steer(edit(P0)))
        (own,) = [f for f in layers[SECOND]["features"] if f["feature"] == P0]
        assert layers[SECOND]["edit_attribution"] == pytest.approx(-own["attribution"], abs=1e-5)
        assert abs(own["attribution"]) > 1e-4

    def test_later_layers_are_explained_as_they_were_steered(self, engine: Engine) -> None:
        """The activations are those of the steered pass."""
        made, layers = self.explained(engine, steer(edit(f"{FIRST}/P0", "scale", 8.0)))
        before = {f["feature"]: f for f in made["explanations"][0]["layers"][1]["features"]}
        after = {f["feature"]: f for f in layers[SECOND]["features"]}
        assert before.keys() == after.keys()
        assert any(abs(before[n]["activation"] - after[n]["activation"]) > 1e-2 for n in before)
        reference = {}

        def keep(x: Tensor, y: Tensor) -> Tensor:
            reference["x"] = x.clone()
            return y

        change = referred(engine.model, FIRST, Steering((elude.Edit(f"{FIRST}/P0", "scale", 8.0),)))
        with torch.no_grad():
            forward_with(
                engine.model.base,
                inputs(engine.model, PNG),
                {FIRST: change, SECOND: keep},
            )
        seen_ = Reference(engine.model.state(SECOND), reference["x"])
        for name, feature in list(after.items())[:5]:
            expected = seen_.activation(engine.model.feature(name), feature["token"])
            assert feature["activation"] == pytest.approx(expected, rel=1e-3, abs=1e-3)

    def test_top_targets_are_the_steered_answers(self, engine: Engine) -> None:
        strong = steer(vectors=[{"layer": SECOND, "vector": TILT, "strength": 12.0}])
        targets = {"targets": ["top1", {"top": 2}], "method": "gradient"}
        made = ask(engine, document({"explain": targets, **strong}))
        assert made["predictions"][0]["index"] != made["steered"]["predictions"][0]["index"]
        for reply_ in (made, made["steered"]):
            top = [p["index"] for p in reply_["predictions"][:2]]
            assert [e["target"]["index"] for e in reply_["explanations"]] == [top[0], *top]


class TestEmbeddings:
    @pytest.fixture(scope="class")
    @classmethod
    def bare(cls, headless: Rewritten) -> Engine:
        return engine_of(headless.model)

    def test_a_direction_is_explained(self, bare: Engine) -> None:
        direction = np.linspace(-1, 1, WIDTH).tolist()
        asked = {"targets": [{"direction": direction}], "method": "gradient", "top_features": 30}
        layer = bare.model.layers[0]
        made = ask(bare, document({"explain": asked, **steer(edit(f"{layer}/P0", "scale", 3.0))}))
        found, again = made["explanations"][0], made["steered"]["explanations"][0]
        assert found["target"] == {"index": None, "label": None, "versus": None, "direction": True}
        for explained, embedding in ((found, made["embedding"]), (again, made["steered"]["embedding"])):
            assert explained["value"] == pytest.approx(float(np.dot(embedding, direction)), abs=1e-4)
            (only,) = explained["layers"]
            total = sum(f["attribution"] for f in only["features"]) + (only["edit_attribution"] or 0.0)
            assert total == pytest.approx(explained["value"] - only["baseline"] + only["completeness_error"], abs=2e-4)
        assert found["value"] != again["value"] and made["predictions"] == made["steered"]["predictions"] == []
        assert made["answer"]["index"] is None and made["answer"]["source"] == "steered"

    def test_ablation_of_a_direction(self, bare: Engine) -> None:
        direction = np.linspace(1, -1, WIDTH).tolist()
        asked = {"targets": [{"direction": direction}], "method": "ablation", "top_features": 3}
        for feature in ask(bare, document({"explain": asked}))["explanations"][0]["layers"][0]["features"]:
            made = ask(bare, document(steer(edit(feature["feature"]))))
            change = np.subtract(made["steered"]["embedding"], made["embedding"])
            assert float(change @ direction) == pytest.approx(feature["effect"], abs=1e-4)

    @pytest.mark.parametrize("targets", [["top1"], [0], [{"top": 2}], [{"label": "ant"}], [{"direction": [1.0] * 31}]])
    def test_other_targets(self, bare: Engine, targets: Sequence[Any]) -> None:
        found = refused(bare, document({"explain": {"targets": targets}}), "invalid-target")
        assert found["errors"][0]["loc"][:3] == ["explain", "targets", 0]
        assert "direction" in found["detail"].lower()


def test_a_direction_of_logits(engine: Engine) -> None:
    """A model with classes takes one too: a one-hot direction is a logit."""
    one = [1.0 if k == 3 else 0.0 for k in range(CLASSES)]
    asked = {"targets": [{"direction": one}, 3], "layers": [SECOND]}
    made = ask(engine, document({"top_k": 7, "explain": asked}))
    found, relative = made["explanations"]
    logit = {p["index"]: p["logit"] for p in made["predictions"]}
    assert found["value"] == pytest.approx(logit[3], abs=1e-5)
    assert relative["value"] == pytest.approx(logit[3] - np.mean(list(logit.values())), abs=1e-5)


def test_steered_and_explained_requests_share_a_batch(engine: Engine) -> None:
    """Each with edits of its own: nobody is steered by another's."""
    asked = [
        {"top_k": 7, **steer(edit(P0, "scale", 4.0)), "explain": {"layers": [SECOND]}},
        {"top_k": 7, **steer(edit(f"{FIRST}/C0", "set", 2.0)), "explain": {"layers": [FIRST]}},
        {"top_k": 7, **steer(vectors=[{"layer": SECOND, "vector": TILT}])},
    ]
    images = [PNG, *NEXT.values()]
    found = [reply(a) for a in engine.answer([document(d, i) for d, i in zip(asked, images, strict=True)])]
    for made, values, image in zip(found, asked, images, strict=True):
        torch.testing.assert_close(logits(made), by_hand(engine.model, values["steer"], image), rtol=1e-4, atol=1e-4)
    assert [list(m["steered"]["relative_norm"]) for m in found] == [[SECOND], [FIRST], [SECOND]]
