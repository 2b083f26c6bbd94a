"""Steering resolved on a model: names to features, scopes to tokens, conflicts found, before any image is looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.edits import ADD, Condition, DenseVector, Edit, EditError, Scope, Steering
from elude_runtime.analysis.features import Feature, parse_feature
from elude_runtime.analysis.scope import WHOLE, Window, scope_mask
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.writes import share_subunit
from elude_runtime.errors import EludeError, FeatureError
from elude_runtime.network.tokens import POSITION, PREFIX

if TYPE_CHECKING:
    from elude_runtime.analysis.model import EludeModel

ConceptStd = Callable[[Feature], float | None]
Place = tuple[str | int, ...]


@dataclass(frozen=True, eq=False)
class PlannedCondition:
    feature: Feature
    condition: Condition


@dataclass(frozen=True, eq=False)
class PlannedEdit:
    """number: place in `SteeredRow.applied`; value: in units of the feature's activation; tokens bool [T_p]: in scope,
    of the feature's own type; strength: times the change; yields_to: numbers of later edits that act alone where both
    would act on one sub-unit at one token; when: all of these conditions have to hold."""

    number: int
    feature: Feature
    edit: Edit
    value: float
    tokens: Tensor
    strength: float
    when: tuple[PlannedCondition, ...]
    yields_to: tuple[int, ...] = ()

    @property
    def layer(self) -> str:
        return self.feature.layer


@dataclass(frozen=True, eq=False)
class PlannedVector:
    """number: place in `SteeredRow.applied`; vector float32 [d] with all strengths; tokens bool [T]: in scope."""

    number: int
    layer: str
    vector: Tensor
    tokens: Tensor
    when: tuple[PlannedCondition, ...]


@dataclass(frozen=True, eq=False)
class SteeringPlan:
    """What `steer_batch` does to one image. edited: the layers changed, in network order; layers: those whose recording
    it needs, the conditions' among them; parts: edits and vectors in the order in which they were given."""

    parts: tuple[PlannedEdit | PlannedVector, ...]
    edited: tuple[str, ...]
    layers: tuple[str, ...]

    def at(self, layer: str) -> tuple[list[PlannedEdit], list[PlannedVector]]:
        """The edits and the vectors of one layer."""
        own = [part for part in self.parts if part.layer == layer]
        return [p for p in own if isinstance(p, PlannedEdit)], [p for p in own if isinstance(p, PlannedVector)]


def plan_steering(
    model: EludeModel,
    steering: Steering | Sequence[Steering],
    window: Window = WHOLE,
    concept_std: ConceptStd | None = None,
) -> SteeringPlan:
    """Steering, or several one after the other, as it acts on an image of which the token grid covers `window`.

    Several: each keeps its own strength multiplier, and the conflict rule of the later of two edits holds between them.
    concept_std: standard deviation of a concept's activation, for unit "std"; by default from the checkpoint.
    FeatureError, LayerError or EditError; its attribute `where` is the place it is about: "edits" or "vectors", index,
    field; before them, where several are given, the number of the steering.
    """
    several = [steering] if isinstance(steering, Steering) else list(steering)
    resolver = _Resolver(model, window, concept_std or model.concept_std)
    parts: list[PlannedEdit | PlannedVector] = []
    yields: dict[int, list[int]] = {}
    for place, one in enumerate(several):
        start = () if isinstance(steering, Steering) else (place,)
        resolver.when = resolver.condition(one.when, start)
        for index, edit in enumerate(one.edits):
            where = (*start, "edits", index)
            planned = resolver.edit(edit, len(parts), one.strength_multiplier, where)
            earlier = [part for part in parts if isinstance(part, PlannedEdit)] if one.conflict != "sum" else []
            for other in earlier:
                if _overlap(model.states, other, planned):
                    if one.conflict == "error":
                        with _placed((*where, "feature")):
                            raise _clash(other.feature, planned.feature)
                    yields.setdefault(other.number, []).append(planned.number)
            parts.append(planned)
        for index, vector in enumerate(one.vectors):
            parts.append(resolver.vector(vector, len(parts), one.strength_multiplier, (*start, "vectors", index)))
    edited = {part.layer for part in parts}
    looked_at = edited | {when.feature.layer for part in parts for when in part.when}
    return SteeringPlan(
        tuple(_yielding(part, yields.get(part.number, ())) for part in parts),
        tuple(name for name in model.layers if name in edited),
        tuple(name for name in model.layers if name in looked_at),
    )


class _Resolver:
    """Finds what names, units and scopes of one plan mean on the model. when: conditions on all that is planned."""

    when: tuple[PlannedCondition, ...] = ()

    def __init__(self, model: EludeModel, window: Window, concept_std: ConceptStd) -> None:
        self._model, self._window, self._concept_std = model, window, concept_std

    def edit(self, edit: Edit, number: int, strength: float, where: Place) -> PlannedEdit:
        feature = self._feature(edit.feature, (*where, "feature"))
        state = self._model.states[feature.layer]
        with _placed((*where, "apply")):
            tokens = self._edit_tokens(edit.apply, state, feature)
        with _placed((*where, "unit")):
            value = self._value(edit, state, feature)
        with _placed((*where, "value")):
            _in_float32(value * strength if edit.mode == ADD else value, f"The value of the edit of {feature}")
            _in_float32(strength, "The strength multiplier")
        when = (*self.when, *self.condition(edit.when, where))
        return PlannedEdit(number, feature, edit, value, tokens, strength, when)

    def vector(self, vector: DenseVector, number: int, strength: float, where: Place) -> PlannedVector:
        with _placed((*where, "layer")):
            state = self._model.state(vector.layer)
        with _placed((*where, "vector")):
            if len(vector.vector) != state.linear.neurons:
                what = f"The vector {vector.name!r}" if vector.name else "A vector"
                raise EditError(
                    f"{what} has {len(vector.vector)} numbers; {state.name} needs {state.linear.neurons}, one a neuron."
                )
        with _placed((*where, "apply")):
            tokens = self._vector_tokens(vector.apply, state)
        device = state.partition.mean.device
        with np.errstate(over="ignore"):
            scaled = (vector.vector.astype(np.float64) * (vector.strength * strength)).astype(np.float32)
        with _placed((*where, "strength")):
            _in_float32(float(np.abs(scaled).max(initial=0)), "A number of the vector times its strength")
        when = (*self.when, *self.condition(vector.when, where))
        return PlannedVector(number, state.name, torch.from_numpy(scaled).to(device), tokens.to(device), when)

    def _feature(self, name: str, where: Place) -> Feature:
        with _placed(where, name):
            feature = parse_feature(name, self._model.layers)
            state = self._model.states[feature.layer]
            if feature.token_type < state.layout.types and feature.token_type not in state.live_types:
                raise EditError(
                    f"{feature} has no effect: no such token of {state.name} can change the output; choose a feature "
                    "of its other tokens."
                )
            return state.check(feature)

    def condition(self, condition: Condition | None, where: Place) -> tuple[PlannedCondition, ...]:
        if condition is None:
            return ()
        return (PlannedCondition(self._feature(condition.feature, (*where, "when", "feature")), condition),)

    def _value(self, edit: Edit, state: SplitState, feature: Feature) -> float:
        """The edit's value in units of the feature's activation."""
        value = 0.0 if edit.value is None else float(edit.value)
        if edit.unit == "raw":
            return value
        if feature.neuron is not None:
            std: float | None = float(state.partition.std[feature.token_type, feature.neuron, state.slot(feature)])
        else:
            std = self._concept_std(feature)
        if std is None:
            raise EditError(
                f"The standard deviation of {feature} is not known, for want of a feature catalogue that can be read; "
                "give the value in unit 'raw'."
            )
        return value * std

    def _edit_tokens(self, scope: Scope, state: SplitState, feature: Feature) -> Tensor:
        """bool [T_p]: the tokens in scope, of the feature's own type."""
        if feature.token_type == POSITION and scope.tokens == "cls":
            raise EditError(f"{feature} is a feature of patches; leave out the scope 'cls', or edit a class-token one.")
        if feature.token_type == PREFIX and (scope.limited or scope.tokens == "patches"):
            raise EditError(
                f"{feature} is a feature of the class token, which has no place in the image; leave out its scope, or "
                "edit a feature of patches."
            )
        tokens = scope_mask(scope, state.layout, self._window)[state.layout.slices[feature.token_type]]
        return tokens.to(state.partition.mean.device)

    def _vector_tokens(self, scope: Scope, state: SplitState) -> Tensor:
        """bool [T]: the tokens in scope that can change the model's output."""
        if scope.tokens == "cls" and state.layout.types > 1 and PREFIX not in state.live_types:
            raise EditError(f"No class token of {state.name} can change the output; choose the scope 'patches'.")
        if (scope.limited or scope.tokens == "patches") and POSITION not in state.live_types:
            raise EditError(f"No patch of {state.name} can change the output; choose the scope 'cls' or 'all'.")
        tokens = scope_mask(scope, state.layout, self._window)
        for token_type, own in enumerate(state.layout.slices):
            if token_type not in state.live_types:
                tokens[own] = False
        return tokens


def _overlap(states: Mapping[str, SplitState], one: PlannedEdit, other: PlannedEdit) -> bool:
    """Whether two edits can act on one sub-unit at one token of one image."""
    if one.layer != other.layer or not share_subunit(states[one.layer], one.feature, other.feature):
        return False
    sides = {one.edit.side, other.edit.side}
    if one.feature == other.feature and sides == {"positive", "negative"}:
        return False
    if any(a.condition.excludes(b.condition) for a in one.when for b in other.when):
        return False
    return bool((one.tokens & other.tokens).any())


def _in_float32(value: float, what: str) -> None:
    if not abs(value) <= torch.finfo(torch.float32).max:
        raise EditError(f"{what} is {value:.3g}, beyond the range of float32; use a smaller one.")


def _clash(one: Feature, other: Feature) -> EditError:
    if one == other:
        return EditError(
            f"Two edits change {one} at the same tokens; keep one of them, or choose conflict 'sum' or 'last'."
        )
    return EditError(
        f"{one} and {other} share a sub-unit, and both are edited at the same tokens; keep one of them, or choose "
        "conflict 'sum' or 'last'."
    )


def _yielding(part: PlannedEdit | PlannedVector, to: Sequence[int]) -> PlannedEdit | PlannedVector:
    return replace(part, yields_to=tuple(to)) if isinstance(part, PlannedEdit) and to else part


@contextmanager
def _placed(where: Place, name: str | None = None) -> Iterator[None]:
    """Errors raised inside say where they belong, and an unknown feature what it was called."""
    try:
        yield
    except EludeError as error:
        if isinstance(error, FeatureError) and name is not None:
            error.name = name
        error.where = where
        raise
