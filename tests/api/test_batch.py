"""Batches: one forward pass for all rows, tails for those that need them, rows that fail or cost too much alone."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from api_rows import (
    PNG,
    ask,
    b64,
    body,
    content,
    counted,
    document,
    engine_of,
    inputs,
    opened,
    problem,
    raw,
    reply,
    steer,
    text32,
)
from conftest import Rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CLASSES, FIRST, SECOND, VIT_ARGS, encoded, picture

from elude_runtime.api import batch
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.api.schema.request import Explain
from elude_runtime.api.work import admitted, explain_work, steer_work

P0, P1 = f"{SECOND}/P0", f"{SECOND}/P1"
IMAGES = [encoded(picture(700 + n, 40 + n, 60 - n)) for n in range(8)]
ABLATE = {"feature": P0, "mode": "ablate"}
EARLY = {"feature": f"{FIRST}/P0", "mode": "scale", "value": 3.0}


def explain(layer: str | None = None, **options: Any) -> dict[str, Any]:
    layers = {} if layer is None else {"layers": [layer]}
    return {"explain": {"method": "gradient", **layers, **options}}


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return opened(vit)


@pytest.fixture(scope="module")
def generous(vit: Rewritten) -> Engine:
    """Without a budget that a batch of this file could use up."""
    return opened(vit, max_work=10_000, max_batch_work=10_000)


@pytest.fixture(scope="module")
def tight(vit: Rewritten) -> Engine:
    """A batch may cost 10 predictions beside its own."""
    return engine_of(vit.model, max_batch_work=10, max_work=8, max_vector_images=8)


class TestPasses:
    def test_plain_rows_need_no_tails(self, vit: Rewritten, engine: Engine) -> None:
        with counted(engine.model) as passes:
            found = engine.answer([raw(image) for image in IMAGES])
        assert passes.forward == [len(IMAGES)] and passes.tails == []
        assert all(reply(a)["batch_size"] == len(IMAGES) for a in found)

    def test_a_mixed_batch_is_one_forward_pass(self, engine: Engine) -> None:
        """Rows of one layer go through its tails together; plain rows and activations through none."""
        documents: list[dict[str, Any]] = [
            {},
            explain(FIRST),
            explain(SECOND),
            explain(FIRST, targets=["top1"]),
            steer(ABLATE),
            steer(EARLY),
            {"activations": {"features": [P0, f"{FIRST}/C0"]}},
            {},
            explain(SECOND),
            steer({**ABLATE, "mode": "zero"}),
        ]
        images = [*IMAGES, *IMAGES[:2]]
        with counted(engine.model) as passes:
            found = [reply(a) for a in engine.answer([document(d, i) for d, i in zip(documents, images, strict=True)])]
        assert passes.forward == [len(documents)]
        expected = Counter(
            {
                (FIRST, (1, 3)): 2,  # gradients, and baselines
                (SECOND, (2, 8)): 2,
                (FIRST, (5, 5)): 1,  # a null edit and the edit
                (SECOND, (4, 4, 9, 9)): 1,
            }
        )
        assert Counter((layer, tuple(rows)) for layer, rows in passes.tails) == expected
        for asked, made in zip(documents, found, strict=True):
            assert made["batch_size"] == len(documents)
            assert (made["explanations"] is not None) == ("explain" in asked)
            assert (made["steered"] is not None) == ("steer" in asked)
            assert (made["activations"] is not None) == ("activations" in asked)
        for row, layer in ((1, FIRST), (2, SECOND), (3, FIRST), (8, SECOND)):
            assert [e["layer"] for e in found[row]["explanations"][0]["layers"]] == [layer]
        assert list(found[4]["steered"]["relative_norm"]) == [SECOND]
        assert list(found[5]["steered"]["relative_norm"]) == [FIRST]

    def test_steered_rows_that_are_explained_share_one_pass_more(self, engine: Engine) -> None:
        both = {**explain(SECOND), **steer(EARLY)}
        with counted(engine.model) as passes:
            found = engine.answer([raw(), document(both, IMAGES[1]), document(both, IMAGES[2])])
        assert passes.forward == [3, 2]
        assert all(reply(a)["steered"]["explanations"] for a in found[1:])

    def test_integration_nodes_and_ablations_of_a_row_share_a_tail(self, engine: Engine) -> None:
        with counted(engine.model) as passes:
            ask(engine, document(explain(SECOND, method="integrated_gradients", steps=4)))
        assert sorted(passes.tails) == [(SECOND, [0]), (SECOND, [0] * 4)]
        with counted(engine.model) as passes:
            ask(engine, document(explain(SECOND, method="ablation", top_features=5)))
        assert sorted(passes.tails) == [(SECOND, [0]), (SECOND, [0]), (SECOND, [0] * 6)]

    def test_an_edit_without_effect_needs_no_tail(self, engine: Engine) -> None:
        with counted(engine.model) as passes:
            ask(engine, document(steer({"feature": P0, "mode": "scale", "value": 1.0})))
        assert passes.tails == []

    def test_layers_that_nobody_asks_for_are_not_recorded(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[str]] = []
        record = engine.model.tails.record
        monkeypatch.setattr(
            engine.model.tails, "record", lambda images, layers, *rest: seen.append(layers) or record(images, layers)
        )
        engine.answer([raw(), document(explain(SECOND))])
        engine.answer([raw()])
        condition = {**ABLATE, "when": {"feature": f"{FIRST}/P0", "op": ">", "value": 1e9}}
        engine.answer([document(steer(condition))])
        assert seen == [[SECOND], [], [FIRST, SECOND]]


# --- a row beside others ----------------------------------------------------------------------------------------------

# All concepts are listed: which of two that are almost equal comes last is a matter of rounding.
ALL = {"top_features": 30}
QUESTIONS: list[dict[str, Any]] = [
    {},
    {"top_k": 7},
    explain(FIRST, **ALL),
    explain(**ALL, targets=["top1", {"index": 2, "versus": 5}], heatmaps="values"),
    explain(SECOND, **ALL, method="integrated_gradients", steps=3, targets=[4]),
    explain(SECOND, **ALL, method="ablation", targets=[1]),
    {"explain": {**ALL, "layers": [SECOND], "pixels": True, "targets": [0]}},
    steer(ABLATE),
    steer(EARLY, {"feature": f"{SECOND}/C1", "mode": "floor", "value": 0.5}),
    steer(vectors=[{"layer": FIRST, "vector": [0.5, -0.3] * (VIT_ARGS["embed_dim"] // 2), "apply": {"tokens": "cls"}}]),
    {**steer({"feature": f"{SECOND}/Crest", "mode": "ablate"}), **explain(FIRST, **ALL)},
    {**steer(EARLY), **explain(**ALL)},
    {"activations": {"features": [P0, f"{FIRST}/3/p0", f"{SECOND}/C0"], "reduce": "tokens"}},
    {"activations": {"features": [f"{FIRST}/P1"]}, **steer(ABLATE)},
]
UNANSWERABLE = [
    raw(b"no image"),
    raw(PNG[:120]),
    body({"image": b64(PNG), "colour": 1}),
    document(explain("blocks.9.mlp.fc2")),
    document(steer({"feature": f"{SECOND}/P999", "mode": "ablate"})),
    document(steer({"feature": P0, "mode": "scale", "value": 1e38}, strength_multiplier=1e38)),  # only when it was run
    document({**steer({"feature": P1, "mode": "scale", "value": 1e38}, strength_multiplier=1e38), **explain()}),
    body({"op": "features", "layer": "nowhere"}),
]
# Numbers, so that a failing example is short to read.
question, image = st.sampled_from(range(len(QUESTIONS))), st.sampled_from(range(len(IMAGES)))
questions = st.tuples(question, image)
bad = st.sampled_from(range(len(UNANSWERABLE)))


def made_row(asked: tuple[int, int], **more: Any) -> Row:
    return document({**QUESTIONS[asked[0]], **more}, IMAGES[asked[1]])


def assert_close(found: Any, expected: Any, place: str = "") -> None:
    """The same document, floats up to the rounding of another batch shape."""
    assert type(found) is type(expected), place
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_close(found[key], value, f"{place}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_close(found[number], value, f"{place}.{number}")
    elif isinstance(expected, float):
        assert math.isclose(found, expected, rel_tol=2e-4, abs_tol=2e-5), (place, found, expected)
    else:
        assert found == expected, place


def comparable(made: dict[str, Any]) -> dict[str, Any]:
    """A reply without its size of batch, features by name."""
    found = {k: v for k, v in content(made).items() if k != "batch_size"}
    for explanations in (found["explanations"], (found["steered"] or {}).get("explanations")):
        for e in explanations or []:
            for layer in e["layers"]:
                layer["features"] = {f["feature"]: f for f in layer["features"]}
    return found


class TestNeighbours:
    @settings(max_examples=200)
    @given(asked=questions, others=st.lists(st.one_of(questions, bad), min_size=1, max_size=5), place=st.integers(0, 5))
    def test_a_row_is_answered_as_if_alone(
        self, generous: Engine, asked: tuple[int, int], others: list[tuple[int, int] | int], place: int
    ) -> None:
        """others: questions about images, and numbers of rows that cannot be answered."""
        row, place = made_row(asked), min(place, len(others))
        rows = [UNANSWERABLE[other] if isinstance(other, int) else made_row(other) for other in others]
        found = generous.answer([*rows[:place], row, *rows[place:]])
        assert_close(comparable(reply(found[place])), comparable(ask(generous, row)))
        for other, answered in zip(others, [*found[:place], *found[place + 1 :]], strict=True):
            (problem if isinstance(other, int) else reply)(answered)

    @settings(max_examples=100)
    @given(
        question=question,
        images=st.lists(image, min_size=3, max_size=3),
        others=st.lists(image, min_size=2, max_size=2),
    )
    def test_in_batches_of_one_shape_it_is_the_same_bit_for_bit(
        self, generous: Engine, question: int, images: list[int], others: list[int]
    ) -> None:
        """Other images beside it, of which the same is asked, so that tails have the same shape too."""
        first, second = (
            reply(generous.answer([made_row((question, image)) for image in (images[0], *beside)])[0])
            for beside in (images[1:], others)
        )
        assert content(first) == content(second)

    @settings(max_examples=100)
    @given(rows=st.lists(questions, min_size=2, max_size=6))
    def test_predictions_do_not_depend_on_what_is_asked(self, generous: Engine, rows: list[tuple[int, int]]) -> None:
        """Bit for bit the base model's on the same batch of images, whatever else the rows want."""
        with torch.no_grad():
            logits = generous.model.base(inputs(generous.model, *(IMAGES[image] for _, image in rows)))
        for answered, expected in zip(generous.answer([made_row(row, top_k=7) for row in rows]), logits, strict=True):
            found = {p["index"]: p["logit"] for p in reply(answered)["predictions"]}
            assert found == {i: text32(v) for i, v in enumerate(expected)}

    @pytest.mark.parametrize("apart", [False, True])
    def test_steered_explanations_know_nothing_of_their_neighbours_edits(self, generous: Engine, apart: bool) -> None:
        """Rows that edit and explain different layers, on one image and on several."""
        late = {"feature": f"{SECOND}/Crest", "mode": "zero"}
        asked = [{**steer(e), **explain(**ALL)} for e in (EARLY, late, ABLATE, {**EARLY, "value": -2.0})]
        rows = [document(a, IMAGES[n if apart else 0]) for n, a in enumerate(asked)]
        for row, answered in zip(rows, generous.answer(rows), strict=True):
            assert_close(comparable(reply(answered)), comparable(ask(generous, row)))


class TestFailures:
    def test_rows_fail_one_by_one(self, engine: Engine) -> None:
        good = [document(explain(SECOND), IMAGES[1]), document(steer(ABLATE), IMAGES[2]), raw(IMAGES[3])]
        found = engine.answer([*UNANSWERABLE[:4], good[0], *UNANSWERABLE[4:], *good[1:]])
        kinds = [problem(a)["type"] for a in (*found[:4], *found[5:9])]
        assert kinds == [
            "invalid-image", "invalid-image", "invalid-document", "unknown-layer", "unknown-feature",
            "non-finite-output", "non-finite-output", "unknown-layer",
        ]  # fmt: skip
        for answered, row in zip((found[4], *found[9:]), good, strict=True):
            made = reply(answered)
            assert made["batch_size"] == 5  # those that reached the model
            assert_close(comparable(made), comparable(ask(engine, row)))

    def test_an_image_whose_output_is_not_finite(self, engine: Engine) -> None:
        """Numbers that overflow inside the model are the problem of the image that has them."""
        model = engine.model
        wild = torch.full((1, 3, 32, 32), 3e38)
        v2 = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": wild.flatten().tolist()}]}
        found = engine.answer([document(explain(), IMAGES[0]), body(v2), document(steer(ABLATE), IMAGES[1])])
        assert not torch.isfinite(model.base(wild)).all()
        assert problem(found[1])["type"] == "non-finite-output"
        assert_close(comparable(reply(found[0])), comparable(ask(engine, document(explain(), IMAGES[0]))))
        assert_close(comparable(reply(found[2])), comparable(ask(engine, document(steer(ABLATE), IMAGES[1]))))

    def test_what_fails_for_all_is_tried_one_by_one(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A fault that only one row's numbers set off does not take the rows with it that shared its tails."""
        run = batch.explain_batch

        def fragile(model: Any, recording: Any, requests: Any) -> Any:
            if any(r.targets[0].index == 6 for r in requests):
                raise RuntimeError("secret of the house")
            return run(model, recording, requests)

        monkeypatch.setattr(batch, "explain_batch", fragile)
        rows = [document(explain(SECOND, targets=[t]), IMAGES[t]) for t in (0, 6, 2)]
        found = engine.answer(rows)
        assert problem(found[1])["type"] == "internal-error" and "secret" not in found[1].body
        assert "secret of the house" in caplog.text
        for answered, row in zip((found[0], found[2]), (rows[0], rows[2]), strict=True):
            assert_close(comparable(reply(answered)), comparable(ask(engine, row)))


# --- the work budget --------------------------------------------------------------------------------------------------


class TestWork:
    def test_a_tails_share_is_that_of_its_operations(self, engine: Engine) -> None:
        """Multiplications of the layers after the split layer, counted by hand, over those of all."""
        d, tokens = VIT_ARGS["embed_dim"], 17
        products, mlp, head = 2 * tokens * tokens * d, 2 * tokens * d * 4 * d, d * CLASSES
        block = tokens * 4 * d * d + products + mlp
        whole = 16 * d * 3 * 64 + 3 * block + head
        # the attention's products are no module's: a tail in the middle of an attention runs them again
        assert engine.shares[FIRST] == pytest.approx((products + mlp + 2 * block + head) / whole, abs=1e-4)
        assert engine.shares[SECOND] == pytest.approx((block + head) / whole, abs=1e-4)

    @pytest.mark.parametrize(
        ("asked", "per_layer", "images"),
        [
            ({}, 1 + 4 * 3, 0),  # auto: as dear as integrated gradients, whatever it comes to be
            ({"method": "gradient"}, 1 + 1 * 3, 0),
            ({"method": "gradient", "targets": [1, {"top": 2}]}, 1 + 1 * 7, 0),
            ({"method": "integrated_gradients", "steps": 6, "targets": [1, 2]}, 1 + 6 * 5, 0),
            ({"method": "ablation", "top_features": 7}, 1 + 3 + 8, 0),
            ({"method": "gradient", "top_features": 7, "effects": True}, 1 + 3 + 8, 0),
            ({"method": "gradient", "pixels": True, "top_features": 5}, 1 + 3, 2 * (1 + 2 * 5)),
        ],
    )
    def test_the_price_of_an_explanation(self, asked: dict[str, Any], per_layer: float, images: float) -> None:
        """Forward rows count one, backward rows two, tails by their share, passes to the image whole."""
        shares = {FIRST: 0.75, SECOND: 0.25, "other": 99.0}
        request = Explain.model_validate(asked)
        assert explain_work(request, [FIRST, SECOND], shares) == pytest.approx(per_layer + images)
        assert explain_work(request, [SECOND], shares) == pytest.approx(per_layer / 4 + images / 2)
        assert steer_work([FIRST, SECOND], shares) == 1.5 and steer_work([SECOND], shares) == 0.5
        assert steer_work([], shares) == 0

    @pytest.mark.parametrize(
        ("options", "backward"),
        [
            ({"method": "gradient"}, 1),
            ({"method": "integrated_gradients", "steps": 5, "targets": [0, 1]}, 10),
            ({"method": "ablation", "top_features": 6}, 1),
        ],
    )
    def test_what_is_counted_is_what_is_run(self, engine: Engine, options: dict[str, Any], backward: int) -> None:
        """The price is that of the tail rows that go through the model."""
        asked = explain(SECOND, **options)
        with counted(engine.model) as passes:
            ask(engine, document(asked))
        rows = sum(len(rows) for _, rows in passes.tails)
        price = explain_work(Explain.model_validate(asked["explain"]), [SECOND], engine.shares)
        assert price == pytest.approx((rows + 2 * backward) * engine.shares[SECOND])

    def test_the_price_of_steering_is_what_is_run(self, engine: Engine) -> None:
        with counted(engine.model) as passes:
            engine.answer([document(steer(EARLY, ABLATE)), raw(), raw()])
        ((layer, rows),) = passes.tails
        assert len(rows) * engine.shares[layer] == pytest.approx(steer_work([FIRST, SECOND], engine.shares))

    @given(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.5, 7.0]), max_size=8), st.sampled_from([1.0, 4.0, 20.0]))
    def test_who_is_let_in(self, work: list[float], budget: float) -> None:
        found = admitted(work, budget)
        assert sum(w for w, ok in zip(work, found, strict=True) if ok) <= budget
        assert all(ok for w, ok in zip(work, found, strict=True) if w == 0)
        if sum(work) <= budget:
            assert all(found)
        left = budget - sum(w for w, ok in zip(work, found, strict=True) if ok)
        for i, dear in enumerate(work):
            if not found[i]:
                assert dear > left  # nobody is sent away who would have fitted
                # nor has a dearer one been let in before it, or of equals a later one
                assert not any(found[j] and (work[j], j) > (dear, i) for j in range(len(work)))


PIXELS = {"explain": {"method": "gradient", "layers": [SECOND], "top_features": 1, "pixels": True}}


class TestBudget:
    """An explanation with pixels costs 3 + 4 t."""

    def test_rows_that_cost_too_much_are_asked_to_come_again(self, tight: Engine) -> None:
        fit = int(10 // (3 + 4 * tight.shares[SECOND]))
        assert fit == 2
        rows = [document(PIXELS, IMAGES[0]), raw(), document(PIXELS, IMAGES[1]), document(PIXELS, IMAGES[2]), raw()]
        with counted(tight.model) as passes:
            found = tight.answer([*rows, document({"activations": {"features": [P0]}}), *rows[2:4]])
        assert [a.status for a in found] == [200, 200, 200, 503, 200, 200, 503, 503]
        assert passes.forward[0] == 5  # those put off do not even take their prediction
        for answered in found:
            if answered.status == 503:
                assert problem(answered)["type"] == "overloaded"
                assert int(answered.headers["Retry-After"]) >= 1
            else:
                assert reply(answered)["batch_size"] == 5 and "Retry-After" not in answered.headers
        assert len(ask(tight, rows[3])["explanations"]) == 1  # and when it comes again it is answered

    def test_the_cheap_go_before_the_dear(self, tight: Engine) -> None:
        cheap = document(explain(SECOND, top_features=1))
        found = tight.answer([document(PIXELS), document(PIXELS), document(steer(ABLATE)), cheap, cheap, cheap])
        assert 2 * tight.shares[SECOND] + 12 * tight.shares[SECOND] + 3 + 4 * tight.shares[SECOND] < 10
        assert [a.status for a in found] == [200, 503, 200, 200, 200, 200]

    def test_a_batch_of_plain_rows_is_never_too_much(self, tight: Engine) -> None:
        for answered in tight.answer([raw()] * 40):
            reply(answered)

    def test_the_steered_answers_explanation_is_counted(self, tight: Engine) -> None:
        """Explaining the steered answer too costs as much again, and the pass of its own."""
        t = tight.shares[SECOND]
        both = {**explain(SECOND), **steer(ABLATE)}
        price = 2 * t + 4 * t + 4 * t + 1
        count = int(10 // price)
        found = tight.answer([document(both)] * (count + 1))
        assert [a.status for a in found] == [200] * count + [503] and count > 1

    def test_looking_for_vectors_costs_a_prediction_an_image(self, tight: Engine) -> None:
        asked = body({"op": "vectors", "layer": SECOND, "positive": [b64(PNG)] * 2, "negative": [b64(IMAGES[0])] * 3})
        found = tight.answer([asked, raw(), asked, asked, body({"op": "features"}), body({"op": "describe"})])
        assert [a.status for a in found[:4]] == [200, 200, 200, 503]
        assert found[3].headers["Retry-After"] == "1"
        assert found[5].status == 200

    def test_the_operators_own_policies_cost_a_plain_row_nothing(self, vit: Rewritten) -> None:
        policy = {"partition_sha256": vit.model.manifest.partition_sha256, "edits": [EARLY]}
        more = {"max_batch_work": 1, "max_work": 1, "max_vector_images": 1, "policies": {"p": policy}}
        free = engine_of(vit.model, **more, default_policies=["p"])
        assert [reply(a)["answer"]["policies"] for a in free.answer([raw()] * 6)] == [["p"]] * 6
        named = engine_of(vit.model, **{**more, "max_work": 2, "max_batch_work": 2})
        found = named.answer([document({"steer": {"policies": ["p"]}})] * 3 + [raw()])
        assert [a.status for a in found] == [200, 503, 503, 200]

    def test_in_an_envelope(self, tight: Engine) -> None:
        """A request that could never run is refused for good; one whose neighbours cost too much comes again, whole."""
        one = {"image": b64(PNG), **PIXELS}

        def v2(images: int) -> dict[str, Any]:
            tensor = {"name": "x", "datatype": "BYTES", "shape": [images], "data": [b64(PNG)["b64"]] * images}
            return {"inputs": [tensor], "parameters": {"elude": PIXELS}}

        for many in ({"instances": [one, b64(PNG), one, one]}, v2(3)):
            found, plain = tight.answer([body(many), raw()])
            assert problem(found)["type"] == "limit-exceeded" and "Retry-After" not in found.headers
            reply(plain)
        for fits in ({"instances": [one, b64(PNG)]}, v2(1)):
            assert [a.status for a in tight.answer([body(fits)])] == [200]
            first, second, third, plain = tight.answer([body(fits), body(fits), body(fits), raw()])
            assert (first.status, second.status) == (200, 200)
            assert problem(third)["type"] == "overloaded" and third.headers["Retry-After"] == "1"
            reply(plain)


def test_the_time_of_each_stage_is_told(engine: Engine) -> None:
    made = ask(engine, document({**explain(SECOND), **steer(ABLATE), "activations": {"features": [P0]}}))
    stages = {"decode", "forward", "explain", "steer", "explain_steered", "activations", "total"}
    assert set(made["timing_ms"]) == stages
    assert all(np.isfinite(v) and v >= 0 for v in made["timing_ms"].values())
    assert made["timing_ms"]["total"] >= made["timing_ms"]["forward"]
    assert set(ask(engine, raw())["timing_ms"]) == {"decode", "forward", "total"}
