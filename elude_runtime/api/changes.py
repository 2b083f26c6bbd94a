"""Edits and vectors as requests and policies say them, as steering of the analysis."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from elude_runtime.analysis.edits import Condition, DenseVector, Edit, EditError, Scope, Steering
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.steering import SteeringPlan, plan_steering
from elude_runtime.api.problems import Problem, at
from elude_runtime.api.schema import request as wire
from elude_runtime.checkpoint.vectors import StoredVector
from elude_runtime.errors import FeatureError, LayerError, closest

if TYPE_CHECKING:
    from elude_runtime.api.policies import Rule


def steering_of(change: wire.Change, vectors: Mapping[str, StoredVector], when: wire.When | None = None) -> Steering:
    """The analysis' view of edits and vectors. when: a condition on all of them, beside each one's own. Problem for a
    vector that the checkpoint does not have."""
    return Steering(
        tuple(map(_edit, change.edits)),
        tuple(_vector(vector, vectors, number) for number, vector in enumerate(change.vectors)),
        change.strength_multiplier,
        change.conflict,
        _condition(when),
    )


def plan(
    model: EludeModel,
    steerings: Sequence[Steering],
    window: tuple[float, float, float, float] = (0, 0, 1, 1),
    *,
    own: bool = False,
) -> SteeringPlan:
    """What steerings, one after the other, come to on one image. own: the last is the request's, in which a place can
    be named. Problem where one of their parts cannot be done."""
    try:
        return plan_steering(model, steerings, window)
    except (FeatureError, LayerError, EditError) as error:
        raise _problem(error, model, len(steerings) - 1 if own else None) from error


def _problem(error: FeatureError | LayerError | EditError, model: EludeModel, own: int | None) -> Problem:
    place, *where = error.where or (None,)
    loc = ["steer", *where] if where and place == own else []
    if isinstance(error, FeatureError):
        known = near_features(model, error.name or "")
        return Problem("unknown-feature", str(error), at(loc, "unknown feature", known))
    if isinstance(error, LayerError):
        return Problem("unknown-layer", str(error), at(loc, "unknown layer", model.layers))
    return Problem("invalid-edit", str(error), at(loc, "cannot be carried out") if loc else None)


def places(rules: Sequence[Rule], steer: wire.Steer | None) -> list[str]:
    """What the edits and vectors of a plan are called, in the order of its parts."""
    found = [f"policy {rule.name}" for rule in rules for _ in (*rule.policy.edits, *rule.policy.vectors)]
    if steer is not None:
        found += [f"steer.edits.{number}" for number in range(len(steer.edits))]
        found += [f"steer.vectors.{number}" for number in range(len(steer.vectors))]
    return found


def near_features(model: EludeModel, name: str) -> list[str]:
    """The concepts whose names are most like this one."""
    return closest(name, [n for layer in model.layers for n in model.concept_names(layer)])


def _edit(edit: wire.Edit) -> Edit:
    return Edit(
        edit.feature,
        edit.mode,
        getattr(edit, "value", None),
        getattr(edit, "unit", "raw"),
        edit.side,
        _scope(edit.apply),
        _condition(edit.when),
    )


def _vector(vector: wire.Vector, stored: Mapping[str, StoredVector], number: int) -> DenseVector:
    if isinstance(vector, wire.NamedVector):
        if vector.name not in stored:
            known = closest(vector.name, stored)
            detail = f"The checkpoint has no vector {vector.name!r}; `describe` lists those it has."
            raise Problem("unknown-vector", detail, at(["steer", "vectors", number, "name"], "unknown vector", known))
        found = stored[vector.name]
        layer, numbers = found.layer, found.direction
    else:
        layer = vector.layer
        if isinstance(vector.vector, wire.VectorBytes):
            numbers = np.frombuffer(base64.b64decode(vector.vector.b64_f32), "<f4").astype(np.float32)
        else:
            with np.errstate(over="ignore"):
                numbers = np.asarray(vector.vector, dtype=np.float32)
        if not np.isfinite(numbers).all():
            loc: list[str | int] = ["steer", "vectors", number, "vector"]
            detail = "A number of the vector is beyond the range of float32; use a smaller one."
            raise Problem("invalid-edit", detail, at(loc, "beyond float32"))
    name = vector.name if isinstance(vector, wire.NamedVector) else None
    return DenseVector(layer, numbers, vector.strength, _scope(vector.apply), _condition(vector.when), name)


def _scope(apply: wire.Apply) -> Scope:
    if isinstance(apply, wire.BoxScope):
        return Scope(box=tuple(apply.box))  # type: ignore[arg-type]
    if isinstance(apply, wire.MaskScope):
        return Scope(mask=tuple(map(tuple, apply.mask)))
    return Scope(apply.tokens)


def _condition(when: wire.When | None) -> Condition | None:
    return Condition(when.feature, when.op, when.value) if when else None
