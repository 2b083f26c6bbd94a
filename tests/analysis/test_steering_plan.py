"""Planning: what cannot be done is said before any image is looked at, with the place it is about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS

import elude_runtime as elude
from elude_runtime.analysis.edits import Condition, DenseVector, Edit, EditError, Scope, Steering
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering_plan import PlannedEdit, plan_steering
from elude_runtime.errors import EludeError, FeatureError, LayerError

BOX = Scope(box=(0.0, 0.0, 0.5, 0.5))
P0, P1, C0 = (f"{SECOND}/{name}" for name in ("P0", "P1", "C0"))


def ones(width: int) -> np.ndarray:
    return np.ones(width, np.float32)


@pytest.fixture(scope="module")
def last_block(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten) -> elude.EludeModel:
    """Split in its last block, where patches have no effect."""
    return elude.rewrite(
        vit.base,
        vit.images,
        out=tmp_path_factory.mktemp("last") / "ckpt",
        layers=["blocks.2.mlp.fc2"],
        subunits=2,
        concepts=2,
        tokens=4,
        data_config=vit.data,
        model_args=VIT_ARGS,
    )


def refused(model: elude.EludeModel, kind: type[EludeError], said: str, where: tuple[Any, ...], asked: Any) -> None:
    with pytest.raises(kind, match=said) as raised:
        plan_steering(model, asked)
    assert type(raised.value) is kind and raised.value.where == where
    sentence = str(raised.value)
    assert sentence.endswith(".") or sentence.endswith("?")


@pytest.mark.parametrize(
    ("edit", "kind", "said", "field"),
    [
        (Edit(f"{SECOND}/P99"), FeatureError, "does not exist", ("feature",)),
        (Edit("blocks.1.mlp.fc3/P0"), FeatureError, "no split layer", ("feature",)),
        (Edit("nonsense"), FeatureError, "not a feature's name", ("feature",)),
        (Edit(P0, apply=Scope("cls")), EditError, "feature of patches; leave out the scope", ("apply",)),
        (Edit(C0, apply=Scope("patches")), EditError, "feature of the class token", ("apply",)),
        (Edit(C0, apply=BOX), EditError, "no place in the image", ("apply",)),
        (Edit(C0, apply=Scope(mask=((1,),))), EditError, "no place in the image", ("apply",)),
        (Edit(P0, when=Condition(f"{FIRST}/P99", ">", 0)), FeatureError, "does not exist", ("when", "feature")),
    ],
    ids=str,
)
def test_edits_that_cannot_be_done(
    vit: Rewritten, edit: Edit, kind: type[EludeError], said: str, field: tuple[str, ...]
) -> None:
    refused(vit.model, kind, said, ("edits", 1, *field), Steering((Edit(f"{FIRST}/P0"), edit)))
    # the same in the second of two steerings: its number comes first
    refused(vit.model, kind, said, (1, "edits", 0, *field), [Steering((Edit(f"{FIRST}/P0"),)), Steering((edit,))])
    with pytest.raises(kind):
        vit.model.steer(vit.images, [edit])


def test_an_unknown_feature_is_named_in_the_error(vit: Rewritten) -> None:
    with pytest.raises(FeatureError) as raised:
        plan_steering(vit.model, Steering((Edit(f"{SECOND}/P99"),)))
    assert raised.value.name == f"{SECOND}/P99"


@pytest.mark.parametrize(
    ("vector", "kind", "said", "field"),
    [
        (DenseVector("blocks.7", ones(32)), LayerError, "no split layer", "layer"),
        (DenseVector(SECOND, ones(31)), EditError, "A vector has 31 numbers; blocks.1.mlp.fc2 needs 32", "vector"),
        (DenseVector(SECOND, ones(3), name="stripes"), EditError, "The vector 'stripes' has 3 numbers", "vector"),
    ],
    ids=str,
)
def test_vectors_that_cannot_be_done(
    vit: Rewritten, vector: DenseVector, kind: type[EludeError], said: str, field: str
) -> None:
    refused(vit.model, kind, said, ("vectors", 0, field), Steering(vectors=(vector,)))


def test_scopes_that_a_convolution_does_not_have(mobilenet: Rewritten) -> None:
    layer, width = mobilenet.layer, mobilenet.model.state(mobilenet.layer).linear.neurons
    asked = Steering((Edit(f"{layer}/P0", apply=Scope("cls")),))
    refused(mobilenet.model, EditError, "leave out the scope 'cls'", ("edits", 0, "apply"), asked)
    asked = Steering(vectors=(DenseVector(layer, ones(width), apply=Scope("cls")),))
    refused(mobilenet.model, EditError, "no class token", ("vectors", 0, "apply"), asked)


def test_a_layer_without_a_grid(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    from elude_runtime.network.tokens import TokenLayout

    monkeypatch.setattr(vit.model.state(SECOND), "layout", TokenLayout(17, 1, None))
    asked = Steering((Edit(P0, apply=BOX),))
    refused(vit.model, EditError, "have no place in the image; leave out the box", ("edits", 0, "apply"), asked)


def test_tokens_without_effect(last_block: elude.EludeModel) -> None:
    layer = last_block.layers[0]
    for name in (f"{layer}/P0", f"{layer}/3/p0", f"{layer}/Prest"):
        where = ("edits", 0, "feature")
        refused(last_block, EditError, "no such token of .* can change the output", where, Steering((Edit(name),)))
    for scope in (Scope("patches"), BOX):
        asked = Steering(vectors=(DenseVector(layer, ones(32), apply=scope),))
        refused(last_block, EditError, "No patch of .* can change the output", ("vectors", 0, "apply"), asked)
    (planned,) = plan_steering(last_block, Steering(vectors=(DenseVector(layer, ones(32)),))).parts
    assert planned.tokens.tolist() == [True] + [False] * 16, "all tokens are those that can change the output"


def planned_edit(model: elude.EludeModel, edit: Edit, **options: Any) -> PlannedEdit:
    (found,) = plan_steering(model, Steering((edit,)), **options).parts
    assert isinstance(found, PlannedEdit)
    return found


def test_standard_deviations(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    state = vit.model.state(SECOND)
    subunit = Feature(SECOND, 0, 0, 3)
    edit = Edit(subunit.name, "set", 2.0, "std")
    assert planned_edit(vit.model, edit).value == pytest.approx(2 * float(state.partition.std[0, 3, 0]), rel=1e-6)
    edit = Edit(P0, "add", -1.5, "std")
    assert planned_edit(vit.model, edit, concept_std=lambda f: 4.0 if f.name == P0 else None).value == -6.0
    refused_std = Steering((edit,))
    with pytest.raises(EditError, match="not known, .* give the value in unit 'raw'") as raised:
        plan_steering(vit.model, refused_std, concept_std=lambda _: None)
    assert raised.value.where == ("edits", 0, "unit")


def test_a_concepts_standard_deviation_comes_from_the_checkpoint(vit: Rewritten, tmp_path: Path) -> None:
    import pyarrow.parquet as parquet

    rows = parquet.read_table(vit.path / "features.parquet").to_pylist()
    expected = {row["feature"]: row["std"] for row in rows if row["kind"] == "concept"}
    model = elude.load(vit.path)
    for name in (P0, C0, f"{FIRST}/P1"):
        assert planned_edit(model, Edit(name, "set", 1.0, "std")).value == pytest.approx(expected[name], rel=1e-6)
    model._catalogue, model.directory = None, tmp_path  # a checkpoint without one
    with pytest.raises(EditError, match="give the value in unit 'raw'"):
        plan_steering(model, Steering((Edit(P0, "set", 1.0, "std"),)))
    assert isinstance(elude.load(vit.path).concept_std(model.feature(P0)), float)


def member_of(state: SplitState, concept: int, token_type: int = 0) -> Feature:
    p = state.partition
    neuron, slot = ((p.concept[token_type] == concept) & p.live(token_type)).nonzero()[0].tolist()
    return Feature(state.name, token_type, slot, neuron)


def test_conflicts(vit: Rewritten) -> None:
    state = vit.model.state(SECOND)
    member, background = member_of(state, 0).name, f"{SECOND}/Prest"
    rest = (state.partition.concept_slots(0) == state.partition.concepts(0)).nonzero()[0].tolist()
    loose = Feature(SECOND, 0, None if rest[1] == state.partition.subunits else rest[1], rest[0]).name
    for one, other in ((P0, P0), (member, member), (P0, member), (member, P0), (background, loose)):
        asked = Steering((Edit(C0), Edit(one), Edit(other)))
        refused(vit.model, EditError, "conflict 'sum' or 'last'", ("edits", 2, "feature"), asked)
        for rule in ("sum", "last"):
            parts = plan_steering(vit.model, Steering((Edit(one), Edit(other)), conflict=rule)).parts
            assert [p.yields_to for p in parts] == ([(), ()] if rule == "sum" else [(1,), ()])  # type: ignore[union-attr]


LEFT, RIGHT = Scope(box=(0.0, 0.0, 0.5, 1.0)), Scope(box=(0.5, 0.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "pair",
    [
        (Edit(P0), Edit(P1)),
        (Edit(P0), Edit(C0)),
        (Edit(P0), Edit(f"{FIRST}/P0")),
        (Edit(P0, apply=LEFT), Edit(P0, apply=RIGHT)),
        (Edit(P0, side="positive"), Edit(P0, side="negative")),
        (Edit(P0, when=Condition(P1, ">", 1.0)), Edit(P0, when=Condition(P1, "<=", 1.0))),
    ],
    ids=["two", "types", "layers", "boxes", "sides", "conditions"],
)
def test_edits_that_never_meet_do_not_conflict(vit: Rewritten, pair: tuple[Edit, Edit]) -> None:
    assert len(plan_steering(vit.model, Steering(pair)).parts) == 2


def test_vectors_never_conflict(vit: Rewritten) -> None:
    vector = DenseVector(SECOND, ones(32))
    assert len(plan_steering(vit.model, Steering((Edit(P0),), (vector, vector))).parts) == 3


def test_the_later_steerings_rule_holds_between_two(vit: Rewritten) -> None:
    policy, request = Steering((Edit(P0),)), Steering((Edit(P0, "scale", 2.0),))
    refused(vit.model, EditError, "Two edits change", (1, "edits", 0, "feature"), [policy, request])
    later = Steering(request.edits, conflict="last")
    first, second = plan_steering(vit.model, [policy, later]).parts
    assert isinstance(first, PlannedEdit) and first.yields_to == (1,) and second.number == 1
    refused(vit.model, EditError, "Two edits change", (1, "edits", 0, "feature"), [later, policy])


def test_layers_in_network_order(vit: Rewritten) -> None:
    plan = plan_steering(vit.model, Steering((Edit(P0, when=Condition(f"{FIRST}/P0", ">", 0)),)))
    assert (plan.edited, plan.layers) == ((SECOND,), (FIRST, SECOND))
    plan = plan_steering(vit.model, Steering((Edit(P0),), (DenseVector(FIRST, ones(32)),)))
    assert plan.edited == plan.layers == (FIRST, SECOND)
    nothing = plan_steering(vit.model, Steering())
    assert (nothing.parts, nothing.edited, nothing.layers) == ((), (), ())
