"""What edits add to a layer's output, against a float64 reference: every mode, unit, side, scope and conflict rule."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from steering_reference import WHOLE, Reference
from support import random_partition, state_of
from torch import Tensor, nn

from elude_runtime.analysis.edits import DenseVector, Edit, EditError, Scope, Steering
from elude_runtime.analysis.features import Feature, parse_feature
from elude_runtime.analysis.layer_change import layer_change
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering_plan import plan_steering
from elude_runtime.network.tokens import TokenLayout

KINDS = ("linear", "conv", "grouped")
STDS = {"concept": 0.75}


@lru_cache
def layer(kind: str) -> tuple[SplitState, Tensor]:
    """A split layer with a random partition, and an input of one image."""
    torch.manual_seed(21)
    module: nn.Module
    if kind == "linear":
        module, layout, x = nn.Linear(9, 5), TokenLayout(8, 2, (2, 3)), torch.randn(1, 8, 9)
    elif kind == "conv":
        module, layout, x = nn.Conv2d(6, 4, 3, padding=1, stride=2), TokenLayout(6, 0, (2, 3)), torch.randn(1, 6, 4, 6)
    else:
        module, layout, x = nn.Conv2d(8, 4, 1, groups=2, bias=False), TokenLayout(6, 0, (2, 3)), torch.randn(1, 8, 2, 3)
    module.requires_grad_(False)
    inputs = module.weight.shape[1]
    partition = random_partition(22, module.weight.shape[0], inputs, layout.types, subunits=3, concepts=2)
    return state_of(module, layout, partition), x


def model_of(state: SplitState) -> Any:
    """As much of a model as planning needs."""
    return SimpleNamespace(
        layers=[state.name], states={state.name: state}, state=lambda _: state, concept_std=lambda _: STDS["concept"]
    )


def features_of(state: SplitState) -> list[Feature]:
    found = [f for t in state.live_types for f in state.concept_features(t)]
    p = state.partition
    for t in state.live_types:
        for k in range(state.linear.neurons):
            found += [Feature(state.name, t, m, k) for m in range(int(p.counts[t, k]))]
            found.append(Feature(state.name, t, None, k))
    return found


VALUES = st.integers(-6, 6).map(lambda n: n / 2)
BOXES = st.sampled_from([(0.0, 0.0, 0.5, 0.5), (0.4, 0.0, 1.0, 1.0), (0.0, 0.5, 1.0, 1.0), (0.7, 0.6, 0.9, 0.9)])
PLACES = st.one_of(
    st.just(Scope()),
    st.just(Scope("patches")),
    BOXES.map(lambda b: Scope(box=b)),
    st.just(Scope(mask=((1, 0), (0, 1)))),
)


@st.composite
def edits(draw: st.DrawFn, state: SplitState) -> Edit:
    # few features, so that edits of one sub-unit meet
    chosen = features_of(state)
    feature = draw(st.sampled_from(chosen if draw(st.booleans()) else [f for f in chosen if f.neuron in (None, 0)]))
    mode = draw(st.sampled_from(["scale", "set", "ablate", "zero", "cap", "floor", "add"]))
    value = None if mode in ("ablate", "zero") else draw(VALUES)
    unit = draw(st.sampled_from(["raw", "std"])) if mode in ("set", "cap", "floor", "add") else "raw"
    scope = draw(PLACES) if feature.token_type == 0 else draw(st.sampled_from([Scope(), Scope("cls")]))
    side = draw(st.sampled_from(["both", "both", "positive", "negative"]))
    return Edit(feature.name, mode, value, unit, side, scope)


@st.composite
def steerings(draw: st.DrawFn, state: SplitState, conflicts: tuple[str, ...] = ("sum", "last")) -> Steering:
    vectors = draw(
        st.lists(
            st.builds(
                lambda values, strength, scope: DenseVector(state.name, np.array(values, np.float32), strength, scope),
                st.lists(VALUES, min_size=state.linear.neurons, max_size=state.linear.neurons),
                VALUES,
                PLACES,
            ),
            max_size=1,
        )
    )
    own = draw(st.lists(edits(state), min_size=1, max_size=4))
    return Steering(
        tuple(own), tuple(vectors), draw(st.sampled_from([1.0, -0.5, 2.0])), draw(st.sampled_from(conflicts))
    )


def found_change(state: SplitState, x: Tensor, asked: Any, window: Any = WHOLE) -> tuple[Tensor, Any]:
    with torch.no_grad():
        plan = plan_steering(model_of(state), asked, window)
        wanted = {part.number for part in plan.parts}
        y = state.linear.module(x)
        found = layer_change(state, x, y, plan, wanted)
        realised = state.linear.tokens(found.output - y)[0]
    torch.testing.assert_close(realised, found.change, rtol=1e-4, atol=1e-4)
    return found.change, found


def check(state: SplitState, x: Tensor, asked: list[Steering], window: Any = WHOLE) -> None:
    change, found = found_change(state, x, asked, window)
    reference = Reference(state, x)
    expected = reference.change(asked, window, lambda _: STDS["concept"])
    torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-4)
    y = state.linear.tokens(state.linear.module(x))[0].double()
    tokens = found.tokens
    assert bool((expected[~tokens] == 0).all())
    if bool(tokens.any()):
        norm = float(expected.norm() / y[tokens].norm())
        assert found.relative_norm == pytest.approx(norm, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60)
def test_edits_are_those_of_the_reference(kind: str, data: st.DataObject) -> None:
    state, x = layer(kind)
    asked = [data.draw(steerings(state))]
    window = data.draw(st.sampled_from([WHOLE, (0.25, 0.0, 1.0, 0.75), (-0.5, 0.0, 1.5, 1.0)]))
    check(state, x, asked, window)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=30)
def test_several_steerings_keep_their_own_strengths_and_rules(kind: str, data: st.DataObject) -> None:
    state, x = layer(kind)
    check(state, x, data.draw(st.lists(steerings(state), min_size=2, max_size=3)))


@pytest.mark.parametrize("mode", ["scale", "set", "ablate", "zero", "cap", "floor", "add"])
@pytest.mark.parametrize("side", ["both", "positive", "negative"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_mode_on_every_kind_of_feature(kind: str, side: str, mode: str) -> None:
    state, x = layer(kind)
    value = None if mode in ("ablate", "zero") else 0.25
    for feature in features_of(state):
        for unit in ("raw", "std") if mode in ("set", "cap", "floor", "add") else ("raw",):
            check(state, x, [Steering((Edit(feature.name, mode, value, unit, side),))])


@given(data=st.data())
@settings(max_examples=60)
def test_edits_conflict_when_they_share_a_sub_unit_at_a_token(data: st.DataObject) -> None:
    state, _ = layer("linear")
    one, other = data.draw(edits(state)), data.draw(edits(state))
    reference = Reference(state, layer("linear")[1])
    features = [parse_feature(e.feature, [state.name]) for e in (one, other)]
    sides = {one.side, other.side}
    assume(not (features[0] != features[1] and sides == {"positive", "negative"}))
    both = [Edit(e.feature, e.mode, e.value, e.unit, "both", e.apply) for e in (one, other)]
    meet = any(reference.acts(both[0], t) and reference.acts(both[1], t) for t in range(state.layout.total))
    shared = bool((reference.members(features[0]) & reference.members(features[1])).any())
    exclusive = features[0] == features[1] and sides == {"positive", "negative"}
    same_type = features[0].token_type == features[1].token_type
    asked = Steering((one, other))
    if meet and shared and same_type and not exclusive:
        with pytest.raises(EditError) as raised:
            plan_steering(model_of(state), asked)
        assert one.feature in str(raised.value) and other.feature in str(raised.value)
    else:
        check(state, layer("linear")[1], [asked])


def concept_and_member(state: SplitState) -> tuple[Feature, Feature]:
    p = state.partition
    neuron, slot = ((p.concept[0] == 0) & p.live(0)).nonzero()[0].tolist()
    return Feature(state.name, 0, 0), Feature(state.name, 0, slot, neuron)


@pytest.mark.parametrize("mode", ["ablate", "zero", "set"])
@pytest.mark.parametrize("member_first", [False, True])
@pytest.mark.parametrize("conflict", ["sum", "last"])
def test_a_concept_and_a_member_of_it(conflict: str, member_first: bool, mode: str) -> None:
    state, x = layer("linear")
    concept, member = concept_and_member(state)
    pair = [
        Edit(concept.name, mode, 1.5 if mode == "set" else None),
        Edit(member.name, "set", 4.0, apply=Scope(box=(0, 0, 0.5, 1))),
    ]
    order = tuple(pair[::-1] if member_first else pair)
    check(state, x, [Steering(order, conflict=conflict)])
    # the two rules differ, so that the reference has something to tell apart
    changes = [found_change(state, x, Steering(order, conflict=rule))[0] for rule in ("sum", "last")]
    assert not torch.allclose(*changes, atol=1e-3)
    if member_first:
        assert torch.equal(changes[1], found_change(state, x, Steering(order[1:]))[0])


@pytest.mark.parametrize(
    "boxes",
    [((0, 0, 1, 1), (0, 0, 1, 1)), ((0, 0, 0.5, 1), (0, 0, 0.5, 0.5)), ((0, 0, 0.5, 1), (0.5, 0, 1, 1))],
    ids=["the same", "one inside", "side by side"],
)
def test_a_member_that_two_later_edits_take_is_taken_once(boxes: tuple[Any, Any]) -> None:
    state, x = layer("linear")
    concept, member = concept_and_member(state)
    edits = [Edit(member.name, "set", v, apply=Scope(box=b)) for v, b in zip((4.0, -4.0), boxes, strict=True)]
    check(state, x, [Steering((Edit(concept.name, "ablate"), *edits), conflict="last")])


def test_what_does_not_act() -> None:
    state, x = layer("linear")
    concept, member = concept_and_member(state)
    asked = Steering(
        (
            Edit(concept.name, "ablate", apply=Scope(mask=((0,),))),
            Edit(member.name, "floor", -100.0),
            Edit(f"{state.name}/C0", "ablate"),
        ),
        (DenseVector(state.name, np.zeros(5, np.float32), apply=Scope("cls")),),
    )
    plan = plan_steering(model_of(state), asked)
    y = state.linear.module(x)
    found = layer_change(state, x, y, plan, {0, 1, 3})  # the condition of edit 2 does not hold, say
    assert found.acted == {1, 3}, "edit 0 has no token; the floor and the vector act, though they change nothing"
    assert found.relative_norm == 0 and torch.equal(found.output, y) and not found.change.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_change_is_made_in_float32_and_cast_once(dtype: torch.dtype) -> None:
    state, x = layer("linear")
    y = state.linear.module(x).to(dtype)
    plan = plan_steering(model_of(state), Steering((Edit(f"{state.name}/P0", "set", 2.0),)))
    with torch.no_grad():
        found = layer_change(state, x, y, plan, {0})
    assert found.output.dtype == dtype and found.change.dtype == torch.float32
    assert torch.equal(found.output, (y.float() + found.change[None]).to(dtype))


def test_a_value_that_is_too_large_is_left_to_the_caller_to_refuse() -> None:
    state, x = layer("linear")
    change, found = found_infinite(state, x)
    assert not torch.isfinite(change).all() and found.relative_norm != 0
    assert bool((change[:2] == 0).all()), "tokens out of scope are not touched"


def found_infinite(state: SplitState, x: Tensor) -> tuple[Tensor, Any]:
    plan = plan_steering(
        model_of(state), Steering((Edit(f"{state.name}/P0", "scale", 1e38),), strength_multiplier=1e38)
    )
    with torch.no_grad():
        found = layer_change(state, x, state.linear.module(x), plan, {0})
    return found.change, found
