"""Steering: what an edit adds to the layer's output, what it leaves alone, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Rewritten
from support import FIRST, SECOND, as_tokens, forward_with
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering import EditError, steer_rows
from elude_runtime.errors import EludeError, FeatureError


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


def test_chosen_rows_of_a_recording(rewritten: Rewritten) -> None:
    """Measured against a null edit in the same tail batch, beside rows that are not steered."""
    r = rewritten
    edit = elude.Edit(f"{r.layer}/P0", "scale", 3.0)
    recording = r.model.record(r.images)
    whole = r.model.steer(r.images, [edit])
    for rows in ([1], [2, 0], [1, 1]):
        found = steer_rows(r.model.tails, recording, rows, r.model.states, [(r.model.feature(edit.feature), edit)])
        torch.testing.assert_close(found.steered, whole.steered[rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.change, whole.change[rows], rtol=1e-3, atol=2e-5)
        assert torch.equal(found.default, recording.logits[rows])


def test_overlapping_edits_are_refused(vit: Rewritten) -> None:
    state = vit.model.state(vit.layer)
    member = first_subunit(state)
    concept = Feature(vit.layer, 0, int(state.partition.concept[0, member.neuron, member.index])).name
    for pair in ((concept, concept), (member.name, member.name), (concept, member.name), (member.name, concept)):
        with pytest.raises(EditError):
            vit.model.steer(vit.images, [elude.Edit(name) for name in pair])
    background = (state.partition.concept_slots(0) == state.partition.concepts(0)).nonzero()[0].tolist()
    slot = None if background[1] == state.partition.subunits else background[1]
    with pytest.raises(EditError, match="both are edited"):
        vit.model.steer(
            vit.images, [elude.Edit(f"{vit.layer}/Prest"), elude.Edit(Feature(vit.layer, 0, slot, background[0]).name)]
        )
    other = [elude.Edit(f"{vit.layer}/P0"), elude.Edit(f"{vit.layer}/C0"), elude.Edit(f"{FIRST}/P0")]
    assert set(vit.model.steer(vit.images, other).relative_norm) == {FIRST, vit.layer}  # these do not overlap


@pytest.mark.parametrize(
    "edit",
    [
        {"mode": "explode"},
        {"mode": "scale"},
        {"mode": "ablate", "value": 0.0},
        {"mode": "scale", "value": float("nan")},
    ],
    ids=str,
)
def test_impossible_edits(edit: dict[str, object]) -> None:
    with pytest.raises(EludeError):
        elude.Edit("blocks.1.mlp.fc2/P0", **edit)  # type: ignore[arg-type]


def test_unknown_features(vit: Rewritten) -> None:
    with pytest.raises(FeatureError):
        vit.model.steer(vit.images, [elude.Edit(f"{vit.layer}/P999")])


def test_the_model_answers_as_before_afterwards(rewritten: Rewritten) -> None:
    r = rewritten
    expected = r.base(r.images)
    r.model.steer(r.images, [elude.Edit(f"{r.layer}/P0", "scale", 9.0)])
    assert torch.equal(r.model(r.images), expected)
