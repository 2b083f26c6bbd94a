"""Steering: what an edit adds to the layer's output, what it leaves alone, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from conftest import Rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steering_reference import Reference
from support import FIRST, SECOND, as_tokens, forward_with
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.attribution import ExplainOptions, ExplainRequest
from elude_runtime.analysis.edits import EditError, Steering
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import LayerTails, Question, held_change
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering import SteeredRow, plan_steering, record_steered, steer_batch
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import FeatureError
from elude_runtime.network.tail import Recording


class TailBatch(NamedTuple):
    """A tail that was run: its layer, its images and what came out."""

    layer: str
    rows: list[int]
    out: Tensor


def edited_by_hook(
    state: SplitState, changes: list[tuple[str, float]], model: elude.EludeModel
) -> Callable[[Tensor, Tensor], Tensor]:
    """(input, output) -> output + sum of (v - 1) u, written apart from the package's own."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        tokens = as_tokens(y, state.linear.is_conv).clone()
        for name, value in changes:
            tokens += (value - 1) * state.write(x, model.feature(name))
        return tokens.transpose(1, 2).reshape(y.shape) if state.linear.is_conv else tokens.reshape(y.shape)

    return change


def first_subunit(state: SplitState, token_type: int = 0) -> Feature:
    """A sub-unit that has edges and belongs to a numbered concept."""
    p = state.partition
    k, m = ((p.concept_slots(token_type) != p.concepts(token_type)) & p.live(token_type)).nonzero()[0].tolist()
    return Feature(state.name, token_type, m, k)


def test_scale_one_returns_the_unedited_row_itself(rewritten: Rewritten) -> None:
    r = rewritten
    expected = r.base(r.images)
    found = r.model.steer(r.images, [elude.Edit(f"{r.layer}/P0", "scale", 1.0)])
    assert torch.equal(found.default, expected) and torch.equal(found.steered, expected)
    assert not found.change.any() and found.relative_norm == {r.layer: [0.0, 0.0, 0.0]}


def test_no_edit_at_all(vit: Rewritten) -> None:
    found = vit.model.steer(vit.images, [])
    assert torch.equal(found.steered, vit.base(vit.images)) and not found.change.any() and found.relative_norm == {}


@pytest.mark.parametrize("value", [0.0, -1.0, 2.5])
@pytest.mark.parametrize("kind", ["concept", "subunit", "rest"])
def test_an_edit_is_that_of_a_full_pass(rewritten: Rewritten, kind: str, value: float) -> None:
    r, state = rewritten, rewritten.model.state(rewritten.layer)
    name = {"concept": f"{r.layer}/P0", "subunit": first_subunit(state).name, "rest": f"{r.layer}/Prest"}[kind]
    found = r.model.steer(r.images, [elude.Edit(name, "scale", value)])
    with torch.no_grad():
        expected = forward_with(r.base, r.images, {r.layer: edited_by_hook(state, [(name, value)], r.model)})
    torch.testing.assert_close(found.steered, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.change, expected - r.base(r.images), rtol=1e-3, atol=1e-5)
    assert torch.equal(found.default, r.base(r.images))


def test_scaling_to_zero_is_ablating(rewritten: Rewritten) -> None:
    for feature in (f"{rewritten.layer}/P0", first_subunit(rewritten.model.state(rewritten.layer)).name):
        scaled = rewritten.model.steer(rewritten.images, [elude.Edit(feature, "scale", 0.0)])
        ablated = rewritten.model.steer(rewritten.images, [elude.Edit(feature)])
        assert torch.equal(scaled.steered, ablated.steered) and scaled.relative_norm == ablated.relative_norm


def test_ablating_is_the_ablation_of_explain(rewritten: Rewritten) -> None:
    r = rewritten
    for f in (
        r.model.explain(r.images[:1], [2], layers=[r.layer], method="ablation", top_features=4)[0][0].layers[0].features
    ):
        change = r.model.steer(r.images[:1], [elude.Edit(f.feature.name)]).change[0]
        assert float(change[2] - change.mean()) == pytest.approx(f.effect, abs=1e-5, rel=1e-5)


def test_a_concepts_edit_is_that_of_all_its_members(rewritten: Rewritten) -> None:
    r, state = rewritten, rewritten.model.state(rewritten.layer)
    members = (state.partition.concept_slots(0) == 0).nonzero().tolist()
    edits = [elude.Edit(Feature(r.layer, 0, m, k).name, "scale", -0.5) for k, m in members]
    whole = r.model.steer(r.images, [elude.Edit(f"{r.layer}/P0", "scale", -0.5)])
    one_by_one = r.model.steer(r.images, edits)
    torch.testing.assert_close(whole.steered, one_by_one.steered, rtol=1e-4, atol=1e-5)
    assert whole.relative_norm[r.layer] == pytest.approx(one_by_one.relative_norm[r.layer], rel=1e-3)


def test_all_concepts_at_their_mean_are_the_baseline(rewritten: Rewritten) -> None:
    r, state = rewritten, rewritten.model.state(rewritten.layer)
    edits = [elude.Edit(f.name) for t in state.live_types for f in state.concept_features(t)]
    found = r.model.steer(r.images[:1], edits).steered[0]
    baseline = r.model.explain(r.images[:1], [3], layers=[r.layer], method="gradient")[0][0].layers[0].baseline
    assert float(found[3] - found.mean()) == pytest.approx(baseline, abs=1e-4)


def seen_outputs(r: Rewritten, edits: list[elude.Edit], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """The layer output that the tail was given."""
    given: list[Tensor] = []
    run = r.model.tails.run

    def spy(recording: object, layer: str, y: Tensor, *rest: object) -> Tensor:
        given.append(y.clone())
        return run(recording, layer, y, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(r.model.tails, "run", spy)
        r.model.steer(r.images, edits)
    return given[0]


def test_the_change_of_the_output_is_linear_in_the_factor(
    rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = rewritten
    y = r.model.record(r.images, [r.layer]).y[r.layer]
    deltas = {
        v: seen_outputs(r, [elude.Edit(f"{r.layer}/P0", "scale", v)], monkeypatch) - y for v in (2.0, 0.0, -3.0, 6.0)
    }
    assert float(deltas[2.0].abs().max()) > 1e-3
    for value, delta in deltas.items():
        torch.testing.assert_close(delta, (value - 1) * deltas[2.0], rtol=1e-3, atol=1e-4)


def test_edits_of_several_features_add_up(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    r = rewritten
    y = r.model.record(r.images, [r.layer]).y[r.layer]
    edits = [elude.Edit(f"{r.layer}/P0", "scale", 3.0), elude.Edit(f"{r.layer}/P1", "ablate")]
    parts = [seen_outputs(r, [e], monkeypatch) - y for e in edits]
    torch.testing.assert_close(seen_outputs(r, edits, monkeypatch) - y, parts[0] + parts[1], rtol=1e-3, atol=1e-4)


def test_only_the_features_own_tokens_change(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    y = vit.model.record(vit.images, [vit.layer]).y[vit.layer]
    patches = seen_outputs(vit, [elude.Edit(f"{vit.layer}/P0", "scale", 3.0)], monkeypatch)
    assert torch.equal(patches[:, :1], y[:, :1]) and not torch.equal(patches[:, 1:], y[:, 1:])
    prefix = seen_outputs(vit, [elude.Edit(f"{vit.layer}/C0", "scale", 3.0)], monkeypatch)
    assert torch.equal(prefix[:, 1:], y[:, 1:]) and not torch.equal(prefix[:, :1], y[:, :1])


def test_two_layers_in_network_order(vit: Rewritten) -> None:
    """The later layer edits the already steered activations, whatever the order of the edits."""
    changes = {FIRST: [(f"{FIRST}/P0", 4.0), (f"{FIRST}/C1", 0.0)], SECOND: [(f"{SECOND}/P1", -2.0)]}
    with torch.no_grad():
        expected = forward_with(
            vit.base, vit.images, {n: edited_by_hook(vit.model.state(n), c, vit.model) for n, c in changes.items()}
        )
    edits = [elude.Edit(name, "scale", value) for n in (SECOND, FIRST) for name, value in changes[n]]
    for order in (edits, edits[::-1]):
        found = vit.model.steer(vit.images, order)
        torch.testing.assert_close(found.steered, expected, rtol=1e-4, atol=1e-5)
        assert set(found.relative_norm) == {FIRST, SECOND}
    alone = vit.model.steer(vit.images, [e for e in edits if e.feature.startswith(SECOND)])
    assert alone.relative_norm[SECOND] != pytest.approx(found.relative_norm[SECOND], rel=1e-6)


def test_a_null_edit_at_the_later_layer_only(vit: Rewritten) -> None:
    one = vit.model.steer(vit.images, [elude.Edit(f"{FIRST}/P0")])
    both = vit.model.steer(vit.images, [elude.Edit(f"{FIRST}/P0"), elude.Edit(f"{SECOND}/P0", "scale", 1.0)])
    torch.testing.assert_close(one.steered, both.steered, rtol=1e-5, atol=1e-6)
    assert both.relative_norm[SECOND] == [0.0, 0.0, 0.0]


def test_relative_norm(rewritten: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    r, state = rewritten, rewritten.model.state(rewritten.layer)
    edit = elude.Edit(f"{r.layer}/P0", "scale", 3.0)
    y = as_tokens(r.model.record(r.images, [r.layer]).y[r.layer], state.linear.is_conv)
    changed = as_tokens(seen_outputs(r, [edit], monkeypatch), state.linear.is_conv)
    tokens = state.layout.slices[0]
    expected = (changed - y)[:, tokens].flatten(1).norm(dim=1) / y[:, tokens].flatten(1).norm(dim=1)
    assert r.model.steer(r.images, [edit]).relative_norm[r.layer] == pytest.approx(expected.tolist(), rel=1e-3)


def steer_rows(r: Rewritten, recording: Recording, rows: list[int], asked: list[Steering]) -> list[SteeredRow]:
    return steer_batch(r.model, recording, rows, [plan_steering(r.model, one) for one in asked])


def tail_batches(r: Rewritten, monkeypatch: pytest.MonkeyPatch, steer: Callable[[], object]) -> list[TailBatch]:
    """The tails that are run meanwhile."""
    seen: list[TailBatch] = []
    run = r.model.tails.run

    def spy(recording: Recording, layer: str, y: Tensor, rows: Tensor, *rest: object) -> Tensor:
        out = run(recording, layer, y, rows, *rest)  # type: ignore[arg-type]
        seen.append(TailBatch(layer, rows.tolist(), out))
        return out

    with monkeypatch.context() as patched:
        patched.setattr(r.model.tails, "run", spy)
        steer()
    return seen


def test_chosen_rows_of_a_recording(rewritten: Rewritten) -> None:
    """Measured against a null edit in the same tail batch, beside rows that are not steered."""
    r = rewritten
    edit = elude.Edit(f"{r.layer}/P0", "scale", 3.0)
    recording = r.model.record(r.images)
    whole = r.model.steer(r.images, [edit])
    for rows in ([1], [2, 0], [1, 1], [0, 1, 2, 2, 1, 0]):
        for row, found in zip(rows, steer_rows(r, recording, rows, [Steering((edit,))] * len(rows)), strict=True):
            torch.testing.assert_close(found.steered, whole.steered[row], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(found.change, whole.change[row], rtol=1e-3, atol=2e-5)
            assert torch.equal(found.default, recording.logits[row]) and found.applied == (True,)
            assert found.relative_norm[r.layer] == pytest.approx(whole.relative_norm[r.layer][row], rel=1e-6)


def test_the_change_is_measured_against_the_null_edit_of_its_own_tail(
    vit: Rewritten, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a tail's shape does to all its rows is in both, here one more in all outputs."""
    recording, asked = vit.model.record(vit.images), [Steering((elude.Edit(f"{SECOND}/P0", "scale", 3.0),))]
    (before,) = steer_rows(vit, recording, [1], asked)
    run = vit.model.tails.run
    monkeypatch.setattr(vit.model.tails, "run", lambda *arguments: run(*arguments) + 1)
    (after,) = steer_rows(vit, recording, [1], asked)
    torch.testing.assert_close(after.change, before.change, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after.steered, before.steered + 1)


def test_which_rows_share_a_tail(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    """Null edits stand beside the edits of their image; a tail of all recorded images needs none."""
    images = torch.cat([vit.images] * 7)[:20]
    recording = vit.model.record(images)
    first, second = (Steering((elude.Edit(f"{layer}/P0", "scale", 3.0),)) for layer in (FIRST, SECOND))
    still = Steering((elude.Edit(f"{FIRST}/P0", "scale", 1.0),))

    def rows(chosen: list[int], asked: list[Steering]) -> list[tuple[str, list[int]]]:
        found = tail_batches(vit, monkeypatch, lambda: steer_rows(vit, recording, chosen, asked))
        return [(batch.layer, batch.rows) for batch in found]

    assert rows([4], [first]) == [(FIRST, [4, 4])]
    assert rows([4, 2, 4], [first, second, first]) == [(FIRST, [4, 4, 4]), (SECOND, [2, 2])]
    assert rows([4, 2], [still, first]) == [(FIRST, [2, 2])]
    assert rows([4], [still]) == rows([3], [Steering()]) == []
    assert rows(list(range(20)), [first] * 20) == [(FIRST, list(range(20)))]
    # null edits would cost no less than the images that are not steered
    assert rows(list(range(10)), [second] * 10) == [(SECOND, list(range(20)))]
    parts = rows(list(range(9)), [first] * 9)
    assert [len(part) for _, part in parts] == [16, 2]
    parts = rows([0] * 40, [first] * 40)
    assert [part for _, part in parts] == [[0] * 16, [0] * 16, [0] * 11]
    parts = rows([0] * 14 + [1], [first] * 15)
    assert [part for _, part in parts] == [[0] * 15, [1, 1]]
    together = Steering((elude.Edit(f"{SECOND}/P0"), elude.Edit(f"{FIRST}/P0", "scale", 1.0)))
    assert rows([7], [together]) == [(SECOND, [7, 7])], "the tail begins where something changes"


def mixed(layers: tuple[str, str]) -> list[Steering]:
    """Steering of every kind, that of two layers among it."""
    first, second = layers
    vector = elude.DenseVector(first, np.linspace(-0.3, 0.3, 32, dtype=np.float32), 2.0, elude.Scope("patches"))
    return [
        Steering(),
        Steering((elude.Edit(f"{first}/P0", "scale", 3.0),)),
        Steering((elude.Edit(f"{second}/C0", "zero"), elude.Edit(f"{first}/P2", "cap", -0.5)), strength_multiplier=0.5),
        Steering((elude.Edit(f"{first}/P1", "scale", 1.0), elude.Edit(f"{second}/P0", "set", 1.0, side="negative"))),
        Steering(vectors=(vector,)),
        Steering((elude.Edit(f"{second}/P0", "floor", 0.5, apply=elude.Scope(box=(0, 0, 0.5, 0.5))),), (vector,)),
        Steering((elude.Edit(f"{second}/P0", when=elude.Condition(f"{first}/P0", ">", 1e9)),)),
    ]


JOBS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6)), min_size=1, max_size=9)


@given(JOBS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_row_depends_on_its_neighbours_only_through_the_shape(vit: Rewritten, jobs: list[tuple[int, int]]) -> None:
    recording, asked = vit.model.record(vit.images), mixed((FIRST, SECOND))
    found = steer_rows(vit, recording, [row for row, _ in jobs], [asked[i] for _, i in jobs])
    for (row, i), together in zip(jobs, found, strict=True):
        (alone,) = steer_rows(vit, vit.model.record(vit.images[row : row + 1]), [0], [asked[i]])
        torch.testing.assert_close(together.steered, alone.steered, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(together.change, alone.change, rtol=1e-3, atol=2e-5)
        assert together.applied == alone.applied
        assert together.relative_norm == pytest.approx(alone.relative_norm, rel=1e-3, abs=1e-6)
        assert torch.equal(together.default, recording.logits[row])
        if not any(together.relative_norm.values()):
            assert torch.equal(together.steered, recording.logits[row]) and not together.change.any()


@pytest.mark.parametrize("number", range(7))
def test_steering_is_that_of_a_full_pass(vit: Rewritten, number: int) -> None:
    """Against a full pass in which hooks change the layers' outputs as the float64 reference has it."""
    asked = mixed((FIRST, SECOND))[number]
    for row in range(3):
        x = vit.images[row : row + 1]
        with torch.no_grad():
            hooks = {layer: reference_hook(vit.model.state(layer), asked) for layer in (FIRST, SECOND)}
            expected = forward_with(vit.base, x, hooks)
            (found,) = steer_rows(vit, vit.model.record(x), [0], [asked])
        torch.testing.assert_close(found.steered[None], expected, rtol=1e-4, atol=2e-5)


def reference_hook(state: SplitState, asked: Steering) -> Callable[[Tensor, Tensor], Tensor]:
    """(input, output) -> output with one layer's part of the steering, edits with conditions left out."""
    edits = tuple(e for e in asked.edits if e.feature.startswith(state.name) and e.when is None)
    own = replace(asked, edits=edits, vectors=tuple(v for v in asked.vectors if v.layer == state.name))
    return lambda x, y: y + Reference(state, x).change([own]).to(y)[None]


def peak_of(r: Rewritten, row: int, feature: str) -> float:
    layer = r.model.feature(feature).layer
    column = r.model.concept_names(layer).index(feature)
    values = r.model.concepts(r.images[row : row + 1], layer)[0, :, column]
    return float(values[values.abs().argmax()])


@pytest.mark.parametrize("op", [">", ">=", "<", "<="])
def test_conditions_look_at_the_peak_of_the_unedited_pass(vit: Rewritten, op: str) -> None:
    feature = f"{SECOND}/P1"
    peaks = [peak_of(vit, row, feature) for row in range(3)]
    middle = sorted(peaks)[1] * (1 + (1e-4 if ">" in op else -1e-4))
    # the first edit changes what the condition would see in the steered pass
    when = elude.Condition(feature, op, middle)
    found = vit.model.steer(
        vit.images, [elude.Edit(f"{FIRST}/P0", "scale", 30.0), elude.Edit(f"{SECOND}/P0", when=when)]
    )
    expected = [(p > middle) if ">" in op else (p < middle) for p in peaks]
    assert [row[1] for row in found.applied] == expected and any(expected) and not all(expected)
    assert [norm > 0 for norm in found.relative_norm[SECOND]] == expected
    vectors = [elude.DenseVector(SECOND, np.ones(32, np.float32), when=when)]
    assert [row[0] for row in vit.model.steer(vit.images, vectors=vectors).applied] == expected


def test_a_condition_on_another_layer_only(vit: Rewritten) -> None:
    """The condition's layer is recorded, but not changed."""
    peak = peak_of(vit, 0, f"{SECOND}/P0")
    for value, acts in ((peak - 1e-3, True), (peak + 1e-3, False)):
        edit = elude.Edit(f"{FIRST}/P0", when=elude.Condition(f"{SECOND}/P0", ">", value))
        found = vit.model.steer(vit.images[:1], [edit])
        assert found.applied == [(acts,)] and list(found.relative_norm) == [FIRST]
        assert torch.equal(found.steered, found.default) != acts


def test_what_counts_as_applied(vit: Rewritten) -> None:
    edits = [
        elude.Edit(f"{SECOND}/P0", apply=elude.Scope(mask=((0,),))),
        elude.Edit(f"{SECOND}/P1", "scale", 1.0),
        elude.Edit(f"{SECOND}/P2", "floor", -1e6),
    ]
    vector = elude.DenseVector(SECOND, np.zeros(32, np.float32))
    found = vit.model.steer(vit.images[:1], edits, vectors=[vector])
    assert found.applied == [(False, True, True, True)]
    assert torch.equal(found.steered, vit.base(vit.images[:1])) and not found.change.any()


def test_strengths_multiply(vit: Rewritten) -> None:
    vector = np.linspace(-1, 1, 32, dtype=np.float32)
    half = [elude.DenseVector(SECOND, vector, 0.5)]
    double = vit.model.steer(vit.images, [elude.Edit(f"{SECOND}/P0")], vectors=half, strength_multiplier=2.0)
    scaled = vit.model.steer(
        vit.images, [elude.Edit(f"{SECOND}/P0", "scale", -1.0)], vectors=[elude.DenseVector(SECOND, vector)]
    )
    torch.testing.assert_close(double.steered, scaled.steered, rtol=1e-5, atol=1e-6)
    none = vit.model.steer(vit.images, [elude.Edit(f"{SECOND}/P0")], strength_multiplier=0.0)
    assert torch.equal(none.steered, none.default) and none.relative_norm == {SECOND: [0.0] * 3}


def test_a_conflict_that_is_allowed(vit: Rewritten) -> None:
    pair = [elude.Edit(f"{SECOND}/P0", "scale", 3.0), elude.Edit(f"{SECOND}/P0", "scale", -1.0)]
    last = vit.model.steer(vit.images, pair, conflict="last")
    assert torch.equal(last.steered, vit.model.steer(vit.images, pair[1:]).steered)
    assert last.applied == [(False, True)] * 3
    added = vit.model.steer(vit.images, pair, conflict="sum")
    torch.testing.assert_close(added.steered, vit.base(vit.images), rtol=1e-4, atol=1e-5)  # 2 t - 2 t
    with pytest.raises(EditError, match="Two edits change"):
        vit.model.steer(vit.images, pair)


@pytest.mark.parametrize("kind", ["concept", "subunit", "other type"])
def test_ablation_in_explain_and_in_steer_bit_for_bit(
    rewritten: Rewritten, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At equal tail batch: the same null edits and the same ablated rows, so the same outputs."""
    r, layer = rewritten, rewritten.layer
    state = r.model.state(layer)
    other = f"{layer}/C1" if state.layout.types > 1 else f"{layer}/P1"
    names = {"concept": f"{layer}/P0", "subunit": first_subunit(state).name, "other type": other}
    feature, recording = r.model.feature(names[kind]), r.model.record(r.images)
    tails = LayerTails(r.model.tails, recording, r.model.states, layer, [Question(1, [Target(2)])])
    effects: list[float] = []

    def explain() -> None:
        x = tails.x(0)
        effects.extend(tails.effects([[lambda: -state.write(x, feature)]])[0][0].tolist())

    (explained,) = tail_batches(r, monkeypatch, explain)
    found: list[SteeredRow] = []
    asked = [Steering((elude.Edit(feature.name),))]
    (steered,) = tail_batches(r, monkeypatch, lambda: found.extend(steer_rows(r, recording, [1], asked)))
    assert explained.rows == steered.rows == [1, 1]
    assert torch.equal(explained.out, steered.out)
    assert float(Target(2).value(found[0].change[None])) == pytest.approx(effects[0], abs=1e-5)


@pytest.mark.parametrize("layers", [[FIRST], [SECOND], [FIRST, SECOND]], ids=["first", "second", "both"])
def test_a_recorded_steered_pass(vit: Rewritten, layers: list[str]) -> None:
    """It is the pass with the edits in place, and its tails are that pass, bit for bit."""
    recording, asked = vit.model.record(vit.images), mixed((FIRST, SECOND))
    rows, plans = [2, 0, 1, 1], [plan_steering(vit.model, asked[i]) for i in (2, 5, 0, 6)]
    found, added = record_steered(vit.model, recording, rows, plans, layers)
    assert list(added) == [FIRST, SECOND] and list(found.x) == list(found.y) == layers
    assert torch.equal(found.images, vit.images[rows])
    for row, steered in enumerate(steer_batch(vit.model, recording, rows, plans)):
        torch.testing.assert_close(found.logits[row], steered.steered, rtol=1e-4, atol=1e-5)
    order = torch.arange(4)
    for layer in layers:
        state = vit.model.state(layer)
        with torch.no_grad():
            y = state.linear.module(found.x[layer])
        torch.testing.assert_close(found.y[layer], y + added[layer], rtol=1e-4, atol=1e-5)
        later = {n: held_change(vit.model.state(n), list(added[n])) for n in (SECOND,) if layer == FIRST}
        again = vit.model.tails.run(found, layer, found.y[layer], order, later)
        assert torch.equal(again, found.logits)
    assert not added[FIRST][2:].any() and not added[SECOND][2:].any(), "no edits, and a condition that does not hold"
    assert added[FIRST][0].any() and added[SECOND][0].any()
    assert torch.equal(vit.model(vit.images), recording.logits)


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients"])
def test_a_steered_answer_can_be_explained(vit: Rewritten, method: str) -> None:
    """All attributions of a layer and the edits' own share out the steered target, up to the path's error."""
    recording = vit.model.record(vit.images)
    asked = Steering((elude.Edit(f"{FIRST}/P0", "scale", 3.0), elude.Edit(f"{SECOND}/P0", "ablate")))
    plan = plan_steering(vit.model, asked)
    found, added = record_steered(vit.model, recording, [1], [plan], vit.model.layers)
    (steered,) = steer_batch(vit.model, recording, [1], [plan])
    options = ExplainOptions(method, steps=32)
    change = {layer: own[0] for layer, own in added.items()}
    ((explanation,),) = explain_batch(
        vit.model, found, [ExplainRequest(0, [Target(3)], vit.model.layers, options, change)]
    )
    value = float(Target(3).value(steered.steered[None]))
    assert explanation.value == pytest.approx(value, abs=1e-4)
    for layer in explanation.layers:
        assert layer.edit_attribution is not None
        if method == "integrated_gradients":
            assert abs(layer.completeness_error or 0.0) < 0.01 * max(1.0, abs(layer.baseline - value))


def test_unknown_features(vit: Rewritten) -> None:
    with pytest.raises(FeatureError):
        vit.model.steer(vit.images, [elude.Edit(f"{vit.layer}/P999")])


def test_the_model_answers_as_before_afterwards(rewritten: Rewritten) -> None:
    r = rewritten
    expected = r.base(r.images)
    r.model.steer(r.images, [elude.Edit(f"{r.layer}/P0", "scale", 9.0)])
    assert torch.equal(r.model(r.images), expected)
