"""Policies: none in force unless named or set as a default; audited, tried in shadow, bound to a partition, and off at
the operator's word."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from api_rows import (
    PNG,
    ask,
    b64,
    body,
    content,
    document,
    engine_of,
    inputs,
    problem,
    raw,
    read,
    refused,
    reply,
    steer,
)
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS, encoded, picture

import elude_runtime as elude
from elude_runtime.api.config import ConfigError, ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.checkpoint.manifest import canonical_json
from elude_runtime.checkpoint.policies import policy_sha256, save_policy
from elude_runtime.checkpoint.storage import read_checkpoint
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS, make_set
from elude_runtime.demo.model import MODEL_ARGS, WATERMARK_LAYER, load_demo_model
from elude_runtime.errors import CheckpointError
from elude_runtime.network.preprocessing import DataConfig

P0, P1, C0 = f"{SECOND}/P0", f"{SECOND}/P1", f"{SECOND}/C0"
AUDIT = "elude_runtime.audit"
ABLATE = {"feature": P0, "mode": "ablate"}
LOUD = {"feature": P0, "mode": "scale", "value": 6.0}
Document = dict[str, Any]


@pytest.fixture
def policy(vit: Rewritten) -> Callable[..., Document]:
    """A policy of some edits, made for the tiny ViT's partition."""

    def make(*edits: Mapping[str, Any], **more: Any) -> Document:
        found = {"edits": list(edits)} if edits else {}
        return {"partition_sha256": vit.model.manifest.partition_sha256, **found, **more}

    return make


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    """A copy of the tiny ViT's checkpoint, to put policies beside it."""
    return Path(shutil.copytree(vit.path, tmp_path / "ckpt"))


def open_(checkpoint: Path, **config: Any) -> Engine:
    return Engine.open(checkpoint, ServingConfig(**config), name="tiny", version="1.0")


def by_policy(engine: Engine, *names: str, image: bytes = PNG, **more: Any) -> Document:
    return ask(engine, document({"steer": {"policies": list(names), **more}}, image))


def steered(made: Document) -> Document:
    """What is in force on an answer, and what came of it."""
    return {"answer": {**made["answer"], "policies": None}, "steered": made["steered"]}


def stored_vector(partition: str, direction: np.ndarray) -> StoredVector:
    return StoredVector("tilt", FIRST, partition, "2026-01-01", direction, [], [], None, 1, 1)


class TestInForce:
    def test_none_unless_named(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        """A policy that is only there changes no answer, of plain rows and of steered ones."""
        with_it, without = engine_of(vit.model, policies={"loud": policy(LOUD)}), engine_of(vit.model)
        for row in (raw(), document(steer({"feature": P1, "mode": "ablate"})), document({"explain": {}})):
            found = ask(with_it, row)
            assert content(found) == content(ask(without, row)) and found["answer"]["policies"] == []

    def test_a_named_one_is_the_edits_it_holds(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        edits = [ABLATE, {"feature": f"{FIRST}/C0", "mode": "floor", "value": 1.0, "unit": "std"}]
        engine = Engine.open(
            vit.path, ServingConfig(policies={"two": policy(*edits)}), name="tiny", version="1.0"
        )  # from the folder, for the catalogue's standard deviations
        found = by_policy(engine, "two")
        assert found["answer"] == {**ask(engine, document(steer(*edits)))["answer"], "policies": ["two"]}
        assert steered(found) == steered(ask(engine, document(steer(*edits))))
        assert found["answer"]["source"] == "steered" and any(c["change"] for c in found["steered"]["changes"])
        assert found["predictions"] == ask(engine, raw())["predictions"]

    def test_beside_the_requests_own_edits(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        """Policies come first, each under its own strength multiplier; the request's says nothing about theirs."""
        engine = engine_of(
            vit.model, policies={"one": policy(LOUD), "two": policy(ABLATE, strength_multiplier=0.5, conflict="sum")}
        )
        own = {"feature": P1, "mode": "scale", "value": 3.0}
        found = by_policy(engine, "one", edits=[own], strength_multiplier=2.0)
        expected = ask(engine, document(steer(LOUD, {**own, "value": 5.0})))  # 1 + 2 * (3 - 1)
        for a, b in zip(found["steered"]["changes"], expected["steered"]["changes"], strict=True):
            assert a["change"] == pytest.approx(b["change"], rel=1e-4, abs=1e-5)
        half = ask(engine, document(steer({**LOUD, "value": 0.5})))
        assert by_policy(engine, "two")["steered"]["changes"][0]["change"] == pytest.approx(
            half["steered"]["changes"][0]["change"], rel=1e-4
        )
        both = by_policy(engine, "one", "two", "one", conflict="sum")
        assert both["answer"]["policies"] == ["one", "two"] and both["steered"]["edits_applied"] == 2

    def test_policies_that_contradict_the_request(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)})
        found = refused(engine, document({"steer": {"policies": ["loud"], "edits": [ABLATE]}}), "invalid-edit")
        assert found["errors"][0]["loc"] == ["steer", "edits", 0, "feature"]
        last = by_policy(engine, "loud", edits=[ABLATE], conflict="last")
        assert (
            last["steered"]["predictions"] == ask(engine, document(steer(ABLATE)))["steered"]["predictions"]
        )  # the later one alone acts

    def test_policies_that_contradict_each_other(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        """The fault is no edit's of the request, and none of these is named."""
        engine = engine_of(vit.model, policies={"loud": policy(LOUD), "quiet": policy(ABLATE)})
        asked = {"steer": {"policies": ["loud", "quiet"], "edits": [{"feature": P1, "mode": "ablate"}]}}
        found = refused(engine, document(asked), "invalid-edit")
        assert P0 in found["detail"] and not found.get("errors")

    def test_an_unknown_name(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        engine = engine_of(vit.model, policies={"no-watermark": policy(ABLATE), "calm": policy(LOUD)})
        asked = document({"steer": {"policies": ["calm", "no-watermarks"]}})
        found = refused(engine, asked, "unknown-policy")
        assert found["status"] == 422 and found["errors"] == [
            {"loc": ["steer", "policies", 1], "msg": "unknown policy", "suggestions": ["no-watermark"]}
        ]
        assert "'no-watermarks'" in found["detail"]

    def test_describe_lists_them(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        vectors = [{"layer": FIRST, "vector": [0.0] * VIT_ARGS["embed_dim"]}]
        made = {
            "a": policy(ABLATE, LOUD, conflict="sum", description="why"),
            "b": policy(vectors=vectors),
            "c": policy(ABLATE),
        }
        engine = engine_of(vit.model, policies=made, default_policies=["a"], shadow_policies=["b"])
        before = datetime.now(UTC) - timedelta(minutes=10)
        listed = {p["name"]: p for p in read(engine.answer([body({"op": "describe"})])[0])["policies"]}
        assert {n: (p["mode"], p["edits"], p["vectors"], p["description"]) for n, p in listed.items()} == {
            "a": ("default", 2, 0, "why"), "b": ("shadow", 0, 1, None), "c": ("on request", 1, 0, None),
        }  # fmt: skip
        for name, document_ in made.items():
            whole = canonical_json({"policy": document_, "vectors": {}})
            assert listed[name]["sha256"] == hashlib.sha256(whole).hexdigest()
            assert before < datetime.fromisoformat(listed[name]["since"]) <= datetime.now(UTC)


class TestDefaults:
    def test_every_reply_says_so(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        """Raw bytes, documents, explanations and both of KServe's protocols; predictions stay the unchanged model's."""
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)}, default_policies=["loud"])
        expected = ask(engine_of(vit.model), document(steer(LOUD)))
        v2 = {"inputs": [{"name": "x", "datatype": "BYTES", "shape": [1], "data": [b64(PNG)["b64"]]}]}
        found = [ask(engine, row) for row in (raw(), raw(explain=True), document({"top_k": 5}))]
        found.append(read(engine.answer([body({"instances": [b64(PNG)]})])[0])["predictions"][0])
        found.append(json.loads(read(engine.answer([body(v2)])[0])["outputs"][1]["data"][0]))
        for made in found:
            assert made["answer"]["policies"] == ["loud"]
            assert steered(made)["answer"] == steered(expected)["answer"]
            assert made["steered"]["changes"] == expected["steered"]["changes"]
            assert made["predictions"] == expected["predictions"]
            assert made["answer"]["source"] == "steered"
        assert found[1]["steered"]["explanations"] and found[0]["steered"]["explanations"] is None

    def test_a_request_adds_to_them(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        made = {"loud": policy(LOUD), "other": policy({"feature": P1, "mode": "ablate"})}
        engine = engine_of(vit.model, policies=made, default_policies=["loud"])
        assert by_policy(engine, "other")["answer"]["policies"] == ["loud", "other"]
        assert by_policy(engine, "loud")["answer"]["policies"] == ["loud"]

    def test_mixed_batches(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)}, default_policies=["loud"])
        rows = [raw(), document(steer({"feature": C0, "mode": "ablate"})), raw(b"nothing"), raw(encoded(picture(9)))]
        found = engine.answer(rows)
        assert [a.status for a in found] == [200, 200, 422, 200]
        assert [reply(found[n])["steered"]["edits_applied"] for n in (0, 1, 3)] == [1, 2, 1]

    @pytest.mark.parametrize(
        ("config", "said"),
        [
            ({"default_policies": ["gone"]}, "'gone'"),
            ({"shadow_policies": ["gone"]}, "'gone'"),
        ],
    )
    def test_one_that_is_not_there(
        self, vit: Rewritten, policy: Callable[..., Document], config: Document, said: str
    ) -> None:
        with pytest.raises(ConfigError, match=f"{said}.*there are here"):
            engine_of(vit.model, policies={"here": policy(LOUD)}, **config)

    def test_not_both_default_and_shadow(self) -> None:
        with pytest.raises(ConfigError, match="'a' is both"):
            ServingConfig.resolve({"default_policies": ["a", "b"], "shadow_policies": ["a"]}, {})


class TestAudit:
    def test_a_line_names_policy_digest_and_since_when(
        self, vit: Rewritten, policy: Callable[..., Document], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, AUDIT)
        made = {
            "loud": policy(LOUD),
            "other": policy({"feature": P1, "mode": "ablate"}),
            "calm": policy({"feature": C0, "mode": "ablate"}),
        }
        engine = engine_of(vit.model, policies=made, default_policies=["loud"], shadow_policies=["other"])
        rules = engine.policies.rules
        assert all(r.name == AUDIT and r.levelno == logging.INFO for r in caplog.records)
        assert [r.getMessage() for r in caplog.records] == [
            f"policy {n} sha256 {rules[n].sha256} in force ({mode}) since {rules[n].since}"
            for n, mode in (("loud", "default"), ("other", "shadow"))
        ]
        caplog.clear()
        engine.answer([document({"id": "order.7"}), raw(b"no image"), document({"steer": {"policies": ["nope"]}})])
        lines = [r.getMessage() for r in caplog.records]
        assert lines == [
            f"answer order.7 under policy {n} sha256 {rules[n].sha256} ({mode}) since {rules[n].since}"
            for n, mode in (("loud", "default"), ("other", "shadow"))
        ]
        caplog.clear()
        by_policy(engine, "calm")
        assert any("policy calm" in r.getMessage() and "(on request)" in r.getMessage() for r in caplog.records)

    def test_nothing_without_a_policy(
        self, vit: Rewritten, policy: Callable[..., Document], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, AUDIT)
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)})
        engine.answer([raw(), document(steer(ABLATE))])
        assert not caplog.records

    def test_the_digest_is_that_of_the_stored_document(self, checkpoint: Path, policy: Callable[..., Document]) -> None:
        """What `elude policy` shows and what the log names are the same, however its keys stand."""
        stored = policy(LOUD, description="ä", strength_multiplier=2.0)
        save_policy(checkpoint, "loud", dict(reversed(stored.items())))
        assert open_(checkpoint).policies.rules["loud"].sha256 == policy_sha256(stored, {})
        other = policy(LOUD, strength_multiplier=3.0, description="ä")
        assert policy_sha256(stored, {}) != policy_sha256(other, {})

    def test_a_description_that_no_utf8_can_spell_has_a_digest(
        self, checkpoint: Path, policy: Callable[..., Document]
    ) -> None:
        """JSON and YAML can write half a surrogate pair."""
        save_policy(checkpoint, "loud", policy(LOUD, description="\ud800"))
        rule = open_(checkpoint).policies.rules["loud"]
        assert rule.sha256 != policy_sha256(policy(LOUD, description="\ud801"), {})

    def test_the_digest_covers_the_vectors_that_are_named(
        self, vit: Rewritten, policy: Callable[..., Document]
    ) -> None:
        """Another vector under the same name is another policy."""
        digests = []
        for scale in (1.0, 1.0, 2.0):
            direction = np.full(VIT_ARGS["embed_dim"], scale, np.float32)
            vector = stored_vector(vit.model.manifest.partition_sha256, direction)
            engine = Engine(
                vit.model,
                ServingConfig(policies={"tilted": policy(vectors=[{"name": "tilt"}])}),
                name="tiny",
                version="1.0",
                vectors={"tilt": vector},
            )
            digests.append(engine.policies.rules["tilted"].sha256)
        assert digests[0] == digests[1] != digests[2]


class TestShadow:
    def test_it_is_computed_and_not_answered_by(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        made = {"loud": policy(LOUD), "floor": policy({"feature": C0, "mode": "set", "value": 3.0})}
        engine = engine_of(vit.model, policies=made, shadow_policies=["loud", "floor"])
        found = ask(engine, raw())
        plain = ask(engine_of(vit.model), raw())
        assert content(found) == {**content(plain), "shadow": found["shadow"]}
        assert found["answer"]["source"] == "default" and found["steered"] is None
        expected = by_policy(engine, "loud", "floor")["steered"]
        shadow = found["shadow"]
        assert shadow.pop("policies") == ["loud", "floor"] and shadow["edits_applied"] == 2
        assert shadow == {k: v for k, v in expected.items() if k != "explanations"}
        assert any(c["change"] for c in shadow["changes"])

    def test_beside_default_policies_and_the_requests_edits(
        self, vit: Rewritten, policy: Callable[..., Document]
    ) -> None:
        made = {"on": policy({"feature": P1, "mode": "ablate"}), "tried": policy(LOUD)}
        engine = engine_of(vit.model, policies=made, default_policies=["on"], shadow_policies=["tried"])
        found = ask(engine, document(steer({"feature": C0, "mode": "ablate"})))
        without = engine_of(vit.model, policies=made, default_policies=["on"])
        assert found["steered"] == ask(without, document(steer({"feature": C0, "mode": "ablate"})))["steered"]
        assert found["answer"]["policies"] == ["on"]
        alone = by_policy(engine_of(vit.model, policies=made), "tried")["steered"]
        assert found["shadow"]["changes"] == alone["changes"]

    def test_a_shadow_that_fails_is_no_problem_of_the_answer(
        self, vit: Rewritten, policy: Callable[..., Document]
    ) -> None:
        wild = policy({"feature": P0, "mode": "scale", "value": 1e38}, strength_multiplier=1e38)
        engine = engine_of(vit.model, policies={"wild": wild}, shadow_policies=["wild"])
        found = ask(engine, raw())
        assert found["shadow"] is None and content(found) == content(ask(engine_of(vit.model), raw()))


class TestOff:
    @pytest.mark.parametrize("text", ["1", "true", "TRUE", "yes"])
    def test_the_environment_turns_all_off(
        self, checkpoint: Path, policy: Callable[..., Document], monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        """Defaults, shadows and named ones, of the checkpoint and of the configuration."""
        save_policy(checkpoint, "loud", policy(LOUD))
        yaml = {"policies": {"own": policy(ABLATE)}, "default_policies": ["loud"], "shadow_policies": ["own"]}
        on = Engine.open(checkpoint, ServingConfig.resolve(yaml), name="tiny", version="1.0")
        assert ask(on, raw())["answer"]["policies"] == ["loud"]
        monkeypatch.setenv("ELUDE_POLICIES_OFF", text)
        off = Engine.open(checkpoint, ServingConfig.resolve(yaml), name="tiny", version="1.0")
        plain = engine_of(off.model)
        assert content(ask(off, raw())) == content(ask(plain, raw()))
        assert {p["mode"] for p in off.describe()["policies"]} == {"off"}

    def test_clients_that_name_one_get_the_default_answer_and_a_warning(
        self, vit: Rewritten, policy: Callable[..., Document]
    ) -> None:
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)}, policies_off=True)
        found = by_policy(engine, "loud", "gone")  # a name that is none is no problem now: nothing is looked up
        assert [w["code"] for w in found["warnings"]] == ["policies-off"]
        plain = ask(engine, raw())
        assert found["predictions"] == plain["predictions"]
        assert found["answer"] == plain["answer"] and found["answer"]["source"] == "default"
        assert plain["warnings"] == [] and found["answer"]["policies"] == []

    def test_own_edits_still_act(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        engine = engine_of(vit.model, policies={"loud": policy(LOUD)}, policies_off=True)
        found = by_policy(engine, "loud", edits=[ABLATE])
        assert found["steered"] == ask(engine, document(steer(ABLATE)))["steered"]
        assert found["answer"]["source"] == "steered"

    def test_the_log_says_so(
        self, vit: Rewritten, policy: Callable[..., Document], caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO, AUDIT)
        engine = engine_of(vit.model, policies={"a": policy(LOUD)}, default_policies=["a"], policies_off=True)
        ask(engine, raw())
        (line,) = [r.getMessage() for r in caplog.records]
        assert line.startswith("all policies are off since ")

    def test_it_works_when_a_policy_is_at_fault(
        self, checkpoint: Path, policy: Callable[..., Document], caplog: pytest.LogCaptureFixture
    ) -> None:
        broken = policy({"feature": f"{SECOND}/P999", "mode": "ablate"})
        other = {**policy(LOUD), "partition_sha256": "0" * 64}
        save_policy(checkpoint, "other", other)
        config = {"policies": {"broken": broken}, "default_policies": ["broken", "gone"]}
        with pytest.raises(CheckpointError):
            open_(checkpoint, **config)
        engine = open_(checkpoint, **config, policies_off=True)
        assert ask(engine, raw())["answer"]["source"] == "default"
        assert "broken" in caplog.text and "other" in caplog.text


class TestStored:
    def test_beside_the_checkpoint_and_in_the_configuration(
        self, checkpoint: Path, policy: Callable[..., Document]
    ) -> None:
        """Of two of one name the configuration's holds."""
        save_policy(checkpoint, "stored", policy(LOUD))
        save_policy(checkpoint, "both", policy(LOUD))
        engine = open_(checkpoint, policies={"own": policy(ABLATE), "both": policy(ABLATE)})
        assert set(engine.policies.rules) == {"stored", "own", "both"}
        loud, quiet = (ask(engine, document(steer(e)))["steered"] for e in (LOUD, ABLATE))
        assert by_policy(engine, "stored")["steered"] == loud
        assert by_policy(engine, "own")["steered"] == by_policy(engine, "both")["steered"] == quiet

    @pytest.mark.parametrize("where", ["checkpoint", "configuration"])
    def test_one_made_for_another_partition_is_refused(
        self, checkpoint: Path, vit: Rewritten, policy: Callable[..., Document], where: str
    ) -> None:
        other = {**policy(LOUD), "partition_sha256": "ab" * 32}
        if where == "checkpoint":
            save_policy(checkpoint, "foreign", other)
        config = {"policies": {"foreign": other}} if where == "configuration" else {}
        with pytest.raises((ConfigError, CheckpointError), match="foreign.*partition ababab") as caught:
            open_(checkpoint, **config)
        assert vit.model.manifest.partition_sha256[:12] in str(caught.value)

    @pytest.mark.parametrize(
        ("made", "said"),
        [
            ({"edits": [{"feature": f"{SECOND}/P999", "mode": "ablate"}]}, "P999"),
            ({"edits": [ABLATE, LOUD]}, "Two edits"),
            ({"vectors": [{"name": "none"}]}, "no vector 'none'"),
            ({"vectors": [{"layer": FIRST, "vector": [1.0]}]}, "has 1 numbers"),
            ({"edits": [{**ABLATE, "apply": {"tokens": "cls"}}]}, "patches"),
            ({"edits": [ABLATE], "when": {"feature": f"{SECOND}/P88", "op": ">", "value": 0.0}}, "P88"),
        ],
    )
    def test_one_that_cannot_be_carried_out_stops_the_start(
        self, vit: Rewritten, policy: Callable[..., Document], made: Document, said: str
    ) -> None:
        """No request is the first to meet a policy's mistakes."""
        with pytest.raises(ConfigError, match=f"'bad'.*{said}"):
            engine_of(vit.model, policies={"bad": policy(**made)})

    @pytest.mark.parametrize(
        "made", [{}, {"edits": []}, {"edits": [LOUD], "colour": 1}, {"edits": [{**LOUD, "value": float("nan")}]}]
    )
    def test_one_that_does_not_validate(
        self, checkpoint: Path, policy: Callable[..., Document], made: Document
    ) -> None:
        yaml = {"policies": {"bad": {**policy(), **made}}}
        with pytest.raises(ConfigError, match="policies.bad.*cannot be used"):
            ServingConfig.resolve(yaml, {})

    def test_one_in_the_checkpoint_that_does_not_validate(
        self, checkpoint: Path, policy: Callable[..., Document]
    ) -> None:
        save_policy(checkpoint, "bad", policy({"feature": P0, "mode": "paint"}))
        with pytest.raises(ConfigError, match="'bad' cannot be used"):
            open_(checkpoint)

    def test_named_vectors(self, checkpoint: Path, policy: Callable[..., Document]) -> None:
        manifest = read_checkpoint(checkpoint)[0]
        direction = np.linspace(-1, 1, VIT_ARGS["embed_dim"], dtype=np.float32)
        save_vector(checkpoint, stored_vector(manifest.partition_sha256, direction))
        save_policy(checkpoint, "tilted", policy(vectors=[{"name": "tilt", "strength": 2.0}]))
        engine = open_(checkpoint)
        dense = {"layer": FIRST, "vector": (2 * direction).tolist()}
        assert by_policy(engine, "tilted")["steered"] == ask(engine, document(steer(vectors=[dense])))["steered"]


class TestConditions:
    def test_of_the_whole_policy(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        """It holds for all its edits and vectors, beside the condition that one of them has of its own."""
        engine = engine_of(vit.model)
        peak = ask(engine, document({"activations": {"features": [C0]}}))["activations"][0]["value"]
        met = {"feature": C0, "op": ">", "value": peak - 0.01}
        unmet = {**met, "op": "<"}
        vector = {"layer": FIRST, "vector": [0.5, -0.3] * (VIT_ARGS["embed_dim"] // 2)}
        own = {"feature": P1, "mode": "ablate", "when": met}
        engine = engine_of(
            vit.model,
            policies={
                "met": policy(LOUD, vectors=[vector], when=met),
                "unmet": policy(LOUD, vectors=[vector], when=unmet),
                "mixed": policy(LOUD, own, when=unmet),
                "both": policy(own, when=met),
                "own-unmet": policy({**own, "when": unmet}, when=met),
            },
        )
        expected = ask(engine, document(steer(LOUD, vectors=[vector])))
        found = by_policy(engine, "met")
        assert found["steered"] == expected["steered"] and found["warnings"] == []
        found = by_policy(engine, "unmet")
        assert found["steered"]["edits_applied"] == 0 and found["steered"]["predictions"] == found["predictions"]
        assert [w["code"] for w in found["warnings"]] == ["condition-not-met"] * 2
        assert all("policy unmet" in w["detail"] and C0 in w["detail"] for w in found["warnings"])
        alone = ask(engine, document(steer({k: v for k, v in own.items() if k != "when"})))
        assert by_policy(engine, "both")["steered"] == alone["steered"]
        assert by_policy(engine, "mixed")["steered"]["edits_applied"] == 0
        assert by_policy(engine, "own-unmet")["steered"]["edits_applied"] == 0

    def test_it_is_looked_at_image_by_image(self, vit: Rewritten, policy: Callable[..., Document]) -> None:
        engine = engine_of(vit.model)
        images = [encoded(picture(800 + n)) for n in range(6)]
        asked = {"activations": {"features": [P0]}}
        peaks = [reply(a)["activations"][0]["value"] for a in engine.answer([document(asked, i) for i in images])]
        bar = sorted(peaks)[2] + 1e-4
        when = {"feature": P0, "op": ">", "value": bar}
        engine = engine_of(vit.model, policies={"if": policy(LOUD, when=when)}, default_policies=["if"])
        found = [reply(a) for a in engine.answer([raw(image) for image in images])]
        assert [f["steered"]["edits_applied"] == 1 for f in found] == [p > bar for p in peaks]
        assert 0 < sum(p > bar for p in peaks) < len(peaks)


# --- what policies are for --------------------------------------------------------------------------------------------


def test_a_default_policy_removes_a_spurious_feature(tmp_path: Path) -> None:
    """The demo network calls any toy with a watermark a cracked one. Explanations name the features that carry it, a
    policy ablates them, and all plain requests are answered without: no weight is changed, no client either."""
    model, config = load_demo_model()
    data = DataConfig.parse({k: config[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")})
    pictures = [encoded(s.image) for s in make_set(60, seed=1)]
    rewritten = elude.rewrite(
        model, _inputs(data, pictures), out=tmp_path / "ckpt", layers=[WATERMARK_LAYER], subunits=4, concepts=16,
        tokens=24, data_config=data, model_args=MODEL_ARGS, labels=list(CLASSES),
    )  # fmt: skip
    engine = open_(tmp_path / "ckpt")
    stream = [encoded(s.image) for s in make_set(96, seed=2)]
    asked = {"explain": {"targets": [WATERMARK_CLASS], "top_features": 12}}
    totals: dict[str, float] = defaultdict(float)
    for picture_ in stream:
        (row,) = engine.answer([document(asked, picture_)])
        made = reply(row)
        if made["answer"]["index"] == WATERMARK_CLASS:
            for feature in made["explanations"][0]["layers"][0]["features"]:
                totals[feature["feature"]] += feature["attribution"]
    strongest = max(totals.values())
    edits = [{"feature": n, "mode": "ablate"} for n, v in totals.items() if v > 0.5 * strongest]
    assert 1 <= len(edits) <= 4
    policy_ = {"partition_sha256": rewritten.manifest.partition_sha256, "edits": edits}
    save_policy(tmp_path / "ckpt", "no-watermark", policy_)
    guarded = open_(tmp_path / "ckpt", default_policies=["no-watermark"])

    groups = make_set(96, seed=3, split="groups")
    right: dict[str, list[bool]] = defaultdict(list)
    for start in range(0, len(groups), 16):
        part = groups[start : start + 16]
        rows = [raw(encoded(s.image)) for s in part]
        for sample, before, after in zip(part, engine.answer(rows), guarded.answer(rows), strict=True):
            assert reply(after)["answer"]["policies"] == ["no-watermark"]
            assert reply(after)["predictions"] == reply(before)["predictions"]
            if sample.label != WATERMARK_CLASS:
                group = "marked" if "watermark" in sample.concepts else "unmarked"
                right[f"{group} before"].append(reply(before)["answer"]["index"] == sample.label)
                right[f"{group} after"].append(reply(after)["answer"]["index"] == sample.label)
    accuracy = {group: float(np.mean(hits)) for group, hits in right.items()}
    assert accuracy["marked before"] < 0.2 and accuracy["marked after"] > 0.6, accuracy
    assert accuracy["unmarked after"] > accuracy["unmarked before"] - 0.06, accuracy


def _inputs(data: DataConfig, images: list[bytes]) -> Any:
    class Configured:
        data_config = data

    return inputs(Configured(), *images)  # type: ignore[arg-type]


class TestInForceTogether:
    """What no request may have to pay for."""

    @pytest.mark.parametrize("key", ["default_policies", "shadow_policies"])
    def test_policies_that_clash_stop_the_start(
        self, vit: Rewritten, policy: Callable[..., Document], key: str
    ) -> None:
        both = {"a": policy(ABLATE), "b": policy({"feature": ABLATE["feature"], "mode": "scale", "value": 2})}
        with pytest.raises(ConfigError, match=f"`{key}` cannot be in force together"):
            engine_of(vit.model, policies=both, **{key: ["a", "b"]})
        assert ask(engine_of(vit.model, policies=both, **{key: ["a"]}), raw())["predictions"]

    def test_a_shadow_that_raises_leaves_the_answer(
        self, vit: Rewritten, policy: Callable[..., Document], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_of(vit.model, policies={"s": policy(ABLATE)}, shadow_policies=["s"])

        def broken(*_: Any) -> None:
            raise RuntimeError("planted")

        monkeypatch.setattr("elude_runtime.api.batch._shadow", broken)
        for answered in engine.answer([raw(), document({"explain": {}})]):
            assert reply(answered)["shadow"] is None

    def test_the_switch_passes_over_a_broken_configuration(self) -> None:
        broken = {
            "policies": {"a": {"partition_sha256": "x"}, "b": 7},
            "default_policies": ["a", "b"],
            "shadow_policies": ["a"],
        }
        with pytest.raises(ConfigError):
            ServingConfig.resolve(broken, {})
        for off in ({**broken, "policies_off": True}, broken):
            config = ServingConfig.resolve(off, {} if "policies_off" in off else {"ELUDE_POLICIES_OFF": "true"})
            assert config.policies_off and not config.policies and not config.default_policies

    def test_the_switch_passes_over_a_damaged_vector(self, checkpoint: Path) -> None:
        (checkpoint / "vectors").mkdir()
        (checkpoint / "vectors" / "stripes.json").write_text("{")
        with pytest.raises(CheckpointError):
            Engine.open(checkpoint, ServingConfig(), name="tiny", version="1.0")
        off = Engine.open(checkpoint, ServingConfig(policies_off=True), name="tiny", version="1.0")
        assert ask(off, raw())["predictions"]

    def test_no_audit_line_for_an_answer_that_does_not_go_out(
        self, vit: Rewritten, policy: Callable[..., Document], caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = engine_of(vit.model, policies={"p": policy(ABLATE)}, default_policies=["p"], max_response_bytes=10_000)
        much = {"explain": {"targets": [{"top": 5}], "level": "subunits", "top_features": 60, "method": "gradient"}}
        with caplog.at_level("INFO", "elude_runtime.audit"):
            (answered,) = engine.answer([document(much)])
            assert problem(answered)["type"] == "response-too-large" and not caplog.records
            ask(engine, raw())
        assert [r.getMessage().split()[0] for r in caplog.records] == ["answer"]
