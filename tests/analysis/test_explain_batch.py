"""Several explanations at once: equal to each alone, sharing tails, on plain and on steered passes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations

import pytest
import torch
from captum.attr import LayerGradientXActivation
from conftest import Rewritten
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support import FIRST, SECOND, as_tokens, forward_with
from torch import Tensor

from elude_runtime.analysis.ablation import PairEffect, pair_effects
from elude_runtime.analysis.attribution import ExplainOptions, ExplainRequest, Explanation
from elude_runtime.analysis.edits import DenseVector, Edit, Steering
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import TAIL_ROWS
from elude_runtime.analysis.steering import plan_steering, record_steered, steer_batch
from elude_runtime.analysis.targets import Target, TargetError
from elude_runtime.errors import FeatureError, LayerError
from elude_runtime.network.tail import Recording, TailRunner

ALL = 10**6
Change = Callable[[Tensor, Tensor], Tensor]


def alike(found: list[Explanation], expected: list[Explanation]) -> None:
    """The same explanations but for rounding: those of a sub-unit that hardly matters may stand elsewhere."""
    assert [e.target for e in found] == [e.target for e in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.value == b.value
        assert [e.layer for e in a.layers] == [e.layer for e in b.layers]
        for one, other in zip(a.layers, b.layers, strict=True):
            assert one.method == other.method
            assert one.baseline == pytest.approx(other.baseline, rel=1e-4, abs=1e-5)
            assert (one.completeness_error is None) == (other.completeness_error is None)
            if other.completeness_error is not None:
                assert one.completeness_error == pytest.approx(other.completeness_error, rel=1e-3, abs=1e-4)
            ours, theirs = ({f.feature: f for f in e.features} for e in (one, other))
            scale = max((abs(f.attribution) for f in theirs.values()), default=1.0)
            for feature in ours.keys() ^ theirs.keys():
                assert abs((ours.get(feature) or theirs[feature]).attribution) < 1e-4 * scale
            for feature in ours.keys() & theirs.keys():
                f, g = ours[feature], theirs[feature]
                assert f.attribution == pytest.approx(g.attribution, rel=1e-3, abs=1e-4 * scale)
                assert (f.activation, f.token) == (g.activation, g.token)
                assert (f.effect is None, f.heatmap is None) == (g.effect is None, g.heatmap is None)


@contextmanager
def tail_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int, bool]]]:
    """(layer, rows, with gradients) of the tails run in the block."""
    seen: list[tuple[str, int, bool]] = []
    run = TailRunner.run

    def look(self: TailRunner, recording: Recording, layer: str, y: Tensor, *rest: object) -> Tensor:
        seen.append((layer, len(y), y.requires_grad))
        return run(self, recording, layer, y, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(TailRunner, "run", look)
        yield seen


def requests() -> st.SearchStrategy[ExplainRequest]:
    targets = st.one_of(st.builds(Target, st.integers(0, 6)), st.builds(Target, st.integers(0, 2), st.integers(3, 6)))
    options = st.builds(
        ExplainOptions,
        st.sampled_from(["auto", "gradient", "integrated_gradients", "ablation"]),
        st.integers(1, 9),
        st.sampled_from(["concepts", "subunits"]),
        st.integers(1, 20),
        st.sampled_from(["both", "positive", "negative"]),
        st.booleans(),
    )
    layers = st.sampled_from([[FIRST], [SECOND], [FIRST, SECOND], [SECOND, FIRST]])
    return st.builds(ExplainRequest, st.integers(0, 2), st.lists(targets, max_size=3), layers, options)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=st.lists(requests(), max_size=6))
def test_together_as_alone(vit: Rewritten, asked: list[ExplainRequest]) -> None:
    recording = vit.model.record(vit.images)
    for request, found in zip(asked, explain_batch(vit.model, recording, asked), strict=True):
        alike(found, explain_batch(vit.model, recording, [request])[0])


@pytest.mark.parametrize("method", ["gradient", "integrated_gradients", "ablation"])
def test_together_as_alone_in_every_network(rewritten: Rewritten, method: str) -> None:
    r = rewritten
    recording = r.model.record(r.images)
    asked = [
        ExplainRequest(row, [Target(row), Target(3, 4)][: 1 + row % 2], r.model.layers, ExplainOptions(method, level=s))
        for row in (2, 0, 1)
        for s in ("concepts", "subunits")
    ]
    for request, found in zip(asked, explain_batch(r.model, recording, asked), strict=True):
        alike(found, explain_batch(r.model, recording, [request])[0])


def test_a_batch_is_captums_on_the_explicit_layer(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    state, wide = r.model.state(layer), r.model.explicit()

    def target(logits: Tensor) -> Tensor:
        return logits[:, 2] - logits[:, 5]

    captum = LayerGradientXActivation(lambda x: target(wide(x)), wide.get_submodule(f"{layer}.subunits"))
    per_token = (
        captum.attribute(r.images).detach().unflatten(-1, (state.linear.neurons, -1))
    )  # [B, T, d, M + 1], of uncentred sums
    options = ExplainOptions("gradient", level="subunits", top_features=ALL)
    asked = [ExplainRequest(row, [Target(2, versus=5)], [layer], options) for row in range(3)]
    leaf: list[Tensor] = []
    logits = forward_with(r.base, r.images, {layer: lambda _, y: leaf.append(y.detach().requires_grad_()) or leaf[0]})
    (gradient,) = torch.autograd.grad(target(logits).sum(), leaf[0])
    gradient = as_tokens(gradient, state.linear.is_conv)
    for row, found in enumerate(explain_batch(r.model, r.model.record(r.images), asked)):
        for f in found[0].layers[0].features:
            t, k, slot = f.feature.token_type, f.feature.neuron, state.slot(f.feature)
            tokens = state.layout.slices[t]
            centre = gradient[row, tokens, k].sum() * state.partition.mean[t, k, slot]
            expected = float(per_token[row, tokens, k, slot].sum() - centre)
            assert f.attribution == pytest.approx(expected, rel=2e-3, abs=2e-4 * float(per_token.abs().max()))


def test_images_share_tails(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = vit.model.record(vit.images)
    gradient = [ExplainRequest(row, [Target(1), Target(2)], [SECOND], ExplainOptions("gradient")) for row in range(3)]
    with tail_sizes(monkeypatch) as seen:
        explain_batch(vit.model, recording, gradient)
    assert seen == [(SECOND, 3, True), (SECOND, 3, False)]  # whatever the number of targets
    path = [ExplainRequest(row, [Target(1)], [FIRST], ExplainOptions("integrated_gradients", 7)) for row in range(3)]
    with tail_sizes(monkeypatch) as seen:
        explain_batch(vit.model, recording, path)
    assert seen == [(FIRST, TAIL_ROWS, True), (FIRST, 21 - TAIL_ROWS, True), (FIRST, 3, False)]
    with tail_sizes(monkeypatch) as seen:
        explain_batch(vit.model, recording, [*gradient, *path, *gradient[:1] * 15])
    assert max(rows for _, rows, _ in seen) == TAIL_ROWS
    assert [rows for layer, rows, graph in seen if layer == SECOND and graph] == [TAIL_ROWS, 2]


def test_ablations_share_tails_and_null_edits(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    """A null edit of each image beside its own features, and a feature listed for two targets ablated once."""
    recording = vit.model.record(vit.images)
    options = ExplainOptions("ablation", top_features=5)
    asked = [ExplainRequest(row, [Target(0), Target(0, 1)], [SECOND], options) for row in range(3)]
    with tail_sizes(monkeypatch) as seen:
        found = explain_batch(vit.model, recording, asked)
    ablated = [len({f.feature for e in own for f in e.layers[0].features}) for own in found]
    rows = [rows for _, rows, graph in seen if not graph][1:]  # after the baselines
    assert max(rows) <= TAIL_ROWS
    # a question whose features fall into two passes has a null edit in both
    assert sum(ablated) + 3 <= sum(rows) <= sum(ablated) + 3 + len(rows) - 1


@pytest.mark.parametrize("rows", [[0], [0, 1, 2]])
def test_many_ablations_in_several_passes(mobilenet: Rewritten, rows: list[int]) -> None:
    r, layer = mobilenet, mobilenet.layer
    state = r.model.state(layer)
    options = ExplainOptions("ablation", level="subunits", top_features=40)
    found = explain_batch(
        r.model, r.model.record(r.images), [ExplainRequest(row, [Target(1)], [layer], options) for row in rows]
    )
    for row, own in zip(rows, found, strict=True):
        assert len(own[0].layers[0].features) == 40
        for f in own[0].layers[0].features[::7]:
            with torch.no_grad():
                changed = forward_with(r.base, r.images, {layer: ablating(state, [f.feature])})[row : row + 1]
                effect = target_value(changed) - target_value(r.base(r.images)[row : row + 1])
            assert f.effect == pytest.approx(effect, rel=2e-3, abs=1e-5)


def target_value(logits: Tensor, index: int = 1) -> float:
    return float((logits[:, index] - logits.mean(1)).detach()[0])


def ablating(state: object, features: list[Feature]) -> Change:
    """A hook that takes the features' centred part away, from the sub-unit sums."""

    def change(x: Tensor, y: Tensor) -> Tensor:
        sums, p = state.sums(x.float()), state.partition  # type: ignore[attr-defined]
        tokens = as_tokens(y, state.linear.is_conv).clone()  # type: ignore[attr-defined]
        for f in features:
            at, slot = state.layout.slices[f.token_type], state.slot(f)  # type: ignore[attr-defined]
            centred = sums[:, at] - p.mean[f.token_type]
            if f.neuron is None:
                tokens[:, at] -= (centred * (p.concept_slots(f.token_type) == slot)).sum(-1)
            else:
                tokens[:, at, f.neuron] -= centred[:, :, f.neuron, slot]
        return tokens.transpose(1, 2).reshape(y.shape) if y.dim() == 4 else tokens.reshape(y.shape)

    return change


@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_ablation_is_what_steering_does_bit_for_bit(
    rewritten: Rewritten, level: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In tails of equal shape, a null edit and the ablated feature, the model answers the same to the last bit."""
    r, outputs = rewritten, []
    recording, run = r.model.record(r.images), TailRunner.run

    def look(self: TailRunner, *args: object) -> Tensor:
        outputs.append(run(self, *args))  # type: ignore[arg-type]
        return outputs[-1]

    monkeypatch.setattr(TailRunner, "run", look)
    for layer in r.model.layers:
        asked = ExplainRequest(1, [Target(1)], [layer], ExplainOptions("ablation", level=level, top_features=1))
        (f,) = explain_batch(r.model, recording, [asked])[0][0].layers[0].features
        ablated = outputs[-1]
        plan = plan_steering(r.model, Steering((Edit(f.feature.name, "ablate"),)))
        (steered,) = steer_batch(r.model, recording, [1], [plan])
        assert len(ablated) == 2 and torch.equal(outputs[-1], ablated)
        assert f.effect == pytest.approx(float(Target(1).value(steered.change[None])), abs=1e-5)
        assert f.effect == float(Target(1).value(ablated[1:]) - Target(1).value(ablated[:1]))


def test_layers_come_in_network_order_and_once(vit: Rewritten) -> None:
    recording = vit.model.record(vit.images)
    found = explain_batch(vit.model, recording, [ExplainRequest(0, [Target(1)], [SECOND, FIRST, SECOND])])
    assert [e.layer for e in found[0][0].layers] == [FIRST, SECOND]
    assert [e.layer for e in vit.model.explain(vit.images[:1], [1], layers=[SECOND, FIRST])[0][0].layers] == [
        FIRST,
        SECOND,
    ]


def test_nothing_asked(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = vit.model.record(vit.images)
    with tail_sizes(monkeypatch) as seen:
        assert explain_batch(vit.model, recording, []) == []
        assert explain_batch(vit.model, recording, [ExplainRequest(0, [], [SECOND])]) == [[]]
        (only,) = explain_batch(vit.model, recording, [ExplainRequest(1, [Target(2)], [])])[0]
    assert only.layers == [] and only.value == pytest.approx(target_value(vit.base(vit.images[1:2]), 2), abs=1e-5)
    assert seen == []


def test_what_is_not_there(vit: Rewritten) -> None:
    recording = vit.model.record(vit.images)
    with pytest.raises(LayerError, match="no split layer"):
        explain_batch(vit.model, recording, [ExplainRequest(0, [Target(1)], ["blocks.1.mlp.fc1"])])
    with pytest.raises(TargetError, match="classes 0 to 6"):
        asked = [ExplainRequest(0, [Target(1)], [FIRST]), ExplainRequest(1, [Target(7)], [FIRST])]
        explain_batch(vit.model, recording, asked)


def test_in_inference_mode_from_a_recording_made_in_it(vit: Rewritten) -> None:
    asked = [ExplainRequest(0, [Target(1)], [SECOND], ExplainOptions(m, pixels=True)) for m in ("gradient", "ablation")]
    expected = explain_batch(vit.model, vit.model.record(vit.images), asked)
    with torch.inference_mode():
        found = explain_batch(vit.model, vit.model.record(vit.images), asked)
    for a, b in zip(found, expected, strict=True):
        alike(a, b)


# Explanations of steered passes


def steered_recording(r: Rewritten, changes: dict[str, Tensor]) -> Recording:
    """A recorded pass with fixed changes [B, T, d] added to some layers' outputs."""
    modules = dict(r.model.base.named_modules())
    handles = [
        modules[n].register_forward_hook(lambda _, __, y, change=change: y + change) for n, change in changes.items()
    ]
    try:
        return r.model.record(r.images)
    finally:
        for handle in handles:
            handle.remove()


@pytest.fixture
def changes(vit: Rewritten) -> dict[str, Tensor]:
    """What edits of both layers might have done, different for every image."""
    generator = torch.Generator().manual_seed(3)
    return {n: 0.4 * torch.randn(vit.model.record(vit.images).y[n].shape, generator=generator) for n in (FIRST, SECOND)}


def steered_request(changes: dict[str, Tensor], row: int, method: str, level: str = "concepts") -> ExplainRequest:
    options = ExplainOptions(method, 40, level, top_features=ALL if method != "ablation" else 6)
    return ExplainRequest(row, [Target(1)], [FIRST, SECOND], options, {n: c[row] for n, c in changes.items()})


@pytest.mark.parametrize("row", [0, 2])
def test_a_steered_pass_by_gradient(vit: Rewritten, changes: dict[str, Tensor], row: int) -> None:
    """Features share out what the layer's weights give, the edit has an attribution of its own; later edits stay."""
    recording = steered_recording(vit, changes)
    found = explain_batch(vit.model, recording, [steered_request(changes, row, "gradient")])[0][0]
    image, own = vit.images[row : row + 1], {n: c[row : row + 1] for n, c in changes.items()}
    with torch.no_grad():
        steered = forward_with(vit.base, image, {n: lambda _, y, c=c: y + c for n, c in own.items()})
    assert found.value == pytest.approx(target_value(steered), rel=1e-5, abs=1e-5)
    for explained in found.layers:
        state, kept = vit.model.state(explained.layer), {}

        def keep(x: Tensor, y: Tensor, kept: dict[str, Tensor] = kept, name: str = explained.layer) -> Tensor:
            kept["plain"], kept["y"] = y.detach(), (y + own[name]).detach().requires_grad_()
            return kept["y"]

        hooks: dict[str, Change] = {n: lambda _, y, c=c: y + c for n, c in own.items()}
        logits = forward_with(vit.base, image, {**hooks, explained.layer: keep})
        (gradient,) = torch.autograd.grad((logits[:, 1] - logits.mean(1)).sum(), kept["y"])
        edit = float((gradient * own[explained.layer]).sum())
        features = float((gradient * (kept["plain"] - state.baseline())).sum())
        assert explained.edit_attribution == pytest.approx(edit, rel=1e-3, abs=1e-4)
        assert math.fsum(f.attribution for f in explained.features) == pytest.approx(features, rel=1e-3, abs=1e-4)
        with torch.no_grad():
            at_c = {**hooks, explained.layer: lambda _, y, state=state: state.baseline()[None].expand_as(y)}
            baseline = target_value(forward_with(vit.base, image, at_c))
        assert explained.baseline == pytest.approx(baseline, rel=1e-4, abs=1e-5)
        expected = features + edit - (found.value - baseline)
        assert explained.completeness_error == pytest.approx(expected, rel=1e-3, abs=2e-4)


@pytest.mark.parametrize("level", ["concepts", "subunits"])
def test_a_steered_passs_integrated_gradients_add_up(vit: Rewritten, changes: dict[str, Tensor], level: str) -> None:
    recording = steered_recording(vit, changes)
    asked = [steered_request(changes, row, "integrated_gradients", level) for row in range(3)]
    for (found,) in explain_batch(vit.model, recording, asked):
        for explained in found.layers:
            assert explained.completeness_error is not None and explained.edit_attribution is not None
            assert abs(explained.completeness_error) < 0.01 * max(0.1, abs(found.value - explained.baseline))
            assert abs(explained.edit_attribution) > 10 * abs(explained.completeness_error)


def test_ablations_in_a_steered_pass(vit: Rewritten, changes: dict[str, Tensor]) -> None:
    recording = steered_recording(vit, changes)
    found = explain_batch(vit.model, recording, [steered_request(changes, 1, "ablation")])[0][0]
    image, own = vit.images[1:2], {n: c[1:2] for n, c in changes.items()}
    hooks: dict[str, Change] = {n: lambda _, y, c=c: y + c for n, c in own.items()}
    for explained in found.layers:
        name, state = explained.layer, vit.model.state(explained.layer)
        with torch.no_grad():
            without = forward_with(vit.base, image, {n: h for n, h in hooks.items() if n != name})
            assert explained.edit_attribution == pytest.approx(found.value - target_value(without), rel=1e-3, abs=1e-5)
            for f in explained.features:
                take = ablating(state, [f.feature])
                both = {**hooks, name: lambda x, y, take=take, c=own[name]: take(x, y) + c}
                effect = target_value(forward_with(vit.base, image, both)) - found.value
                assert f.effect == pytest.approx(effect, rel=1e-3, abs=1e-5)


def test_plain_and_steered_rows_of_one_recording(vit: Rewritten, changes: dict[str, Tensor]) -> None:
    """A row without edits beside an edited one is explained as it is alone."""
    half = {n: c * torch.tensor([0.0, 1.0, 0.0])[:, None, None] for n, c in changes.items()}
    recording = steered_recording(vit, half)
    plain = ExplainRequest(0, [Target(1)], [FIRST, SECOND], ExplainOptions("integrated_gradients", 5))
    found = explain_batch(vit.model, recording, [steered_request(changes, 1, "gradient"), plain])
    alike(found[1], explain_batch(vit.model, vit.model.record(vit.images), [plain])[0])
    assert all(e.edit_attribution is None for e in found[1][0].layers)


def test_what_steering_recorded(vit: Rewritten) -> None:
    """Edits and a vector at both layers, which act again on what they see in the steered pass."""
    recording = vit.model.record(vit.images)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(5)).numpy()
    plans = [
        plan_steering(vit.model, Steering((Edit(f"{FIRST}/P0", "scale", 3.0), Edit(f"{SECOND}/P1", "ablate")))),
        plan_steering(vit.model, Steering((), (DenseVector(SECOND, vector, 0.5),))),
    ]
    rows = [2, 0]
    steered, added = record_steered(vit.model, recording, rows, plans, vit.model.layers)
    asked = [
        ExplainRequest(
            place, [Target(1)], [FIRST, SECOND], ExplainOptions("integrated_gradients", 40, pixels=True),
            {layer: change[place] for layer, change in added.items() if layer in plan.edited},
        )
        for place, plan in enumerate(plans)
    ]  # fmt: skip
    answers = steer_batch(vit.model, recording, rows, plans)
    for (found,), answer, plan in zip(explain_batch(vit.model, steered, asked), answers, plans, strict=True):
        assert found.value == pytest.approx(float(Target(1).value(answer.steered[None])), rel=1e-4, abs=1e-5)
        for e in found.layers:
            assert e.completeness_error is not None
            assert abs(e.completeness_error) < 0.01 * max(0.1, abs(found.value - e.baseline))
            assert (e.edit_attribution is not None) == (e.layer in plan.edited)


# Pairs


def test_pairs_are_full_passes_with_both_taken_away(rewritten: Rewritten) -> None:
    r, layer = rewritten, rewritten.layer
    state = r.model.state(layer)
    named = [f for t in state.live_types for f in state.concept_features(t)[:4]]
    chosen = [*named, *(Feature(layer, 0, 0, k) for k in (1, 5) if not shares(r, named, Feature(layer, 0, 0, k)))]
    found = pair_effects(r.model, r.model.record(r.images), 1, Target(1), chosen)
    assert [p.features for p in found] == list(combinations(chosen, 2))
    with torch.no_grad():
        before = target_value(r.base(r.images)[1:2])

        def effect(*features: Feature) -> float:
            ablated = forward_with(r.base, r.images, {layer: ablating(state, list(features))})
            return target_value(ablated[1:2]) - before

        for pair in found[::5]:
            alone = [effect(f) for f in pair.features]
            both = effect(*pair.features)
            assert pair.effect == pytest.approx(both, rel=2e-3, abs=1e-5)
            assert pair.alone == pytest.approx(alone, rel=2e-3, abs=1e-5)
            assert pair.interaction == pytest.approx(both - sum(alone), rel=1e-2, abs=3e-5)
    assert any(abs(p.interaction) > 1e-4 for p in found)  # the networks are not linear


def shares(r: Rewritten, concepts: list[Feature], subunit: Feature) -> bool:
    partition = r.model.state(subunit.layer).partition
    slot = int(partition.concept_slots(subunit.token_type)[subunit.neuron, subunit.index])
    return any((f.token_type, f.index) == (subunit.token_type, slot) for f in concepts)


def test_a_pair_by_hand() -> None:
    one, other = Feature("a", 0, 1), Feature("a", 0, 2)
    assert PairEffect((one, other), -3.0, (-1.0, -0.5)).interaction == -1.5


def test_no_pairs(vit: Rewritten) -> None:
    recording = vit.model.record(vit.images)
    assert pair_effects(vit.model, recording, 0, Target(1), []) == []
    assert pair_effects(vit.model, recording, 0, Target(1), [Feature(SECOND, 0, 0)]) == []


def test_pairs_that_are_none(vit: Rewritten) -> None:
    recording, state = vit.model.record(vit.images), vit.model.state(SECOND)
    concept = Feature(SECOND, 0, 0)
    neuron, slot = (state.partition.concept_slots(0) == 0).nonzero()[0].tolist()
    member = Feature(SECOND, 0, slot, neuron)
    for pair in ([concept, concept], [concept, member], [member, concept], [member, member]):
        with pytest.raises(FeatureError, match="share a sub-unit"):
            pair_effects(vit.model, recording, 0, Target(1), pair)
    with pytest.raises(FeatureError, match="of one layer"):
        pair_effects(vit.model, recording, 0, Target(1), [concept, Feature(FIRST, 0, 0)])
