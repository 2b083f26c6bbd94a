"""Descriptions of edits: what they refuse, and what conditions say of one another."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import elude_runtime as elude
from elude_runtime.analysis.edits import Condition, DenseVector, Edit, EditError, Scope, Steering

NAME = "blocks.1.mlp.fc2/P0"


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"mode": "explode"}, "no edit mode 'explode'; use one of scale, set"),
        ({"mode": "scale"}, "'scale' needs a value"),
        ({"mode": "set"}, "'set' needs a value"),
        ({"mode": "cap"}, "needs a value"),
        ({"mode": "floor"}, "needs a value"),
        ({"mode": "add"}, "needs a value"),
        ({"mode": "ablate", "value": 0.0}, "'ablate' takes no value"),
        ({"mode": "zero", "value": 1.0}, "'zero' takes no value"),
        ({"mode": "scale", "value": math.nan}, "finite number, not nan"),
        ({"mode": "add", "value": math.inf}, "finite number, not inf"),
        ({"mode": "set", "value": 1.0, "unit": "kg"}, "no unit 'kg'"),
        ({"mode": "scale", "value": 1.0, "unit": "std"}, "'scale' has no unit"),
        ({"mode": "ablate", "unit": "std"}, "'ablate' has no unit"),
        ({"side": "left"}, "no side 'left'"),
    ],
    ids=str,
)
def test_impossible_edits(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(EditError, match=said):
        Edit(NAME, **fields)


@pytest.mark.parametrize("mode", ["set", "cap", "floor", "add"])
def test_possible_edits(mode: str) -> None:
    edit = Edit(NAME, mode, -2.5, "std", "negative", Scope("patches"), Condition(NAME, ">=", 1.0))
    assert (edit.mode, edit.value, edit.unit) == (mode, -2.5, "std")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tokens": "registers"}, "no token scope 'registers'"),
        ({"box": (0, 0, 1, 1), "mask": ((1,),)}, "a box or a mask, not both"),
        ({"tokens": "cls", "box": (0, 0, 1, 1)}, "leave out the token scope 'cls'"),
        ({"box": (0.5, 0, 0.5, 1)}, "x0 < x1"),
        ({"box": (0, 0.6, 1, 0.5)}, "y0 < y1"),
        ({"box": (-0.1, 0, 1, 1)}, "from 0 to 1"),
        ({"box": (0, 0, 1, 1.1)}, "from 0 to 1"),
        ({"box": (0, 0, math.nan, 1)}, "from 0 to 1"),
        ({"box": (0, 0, 1)}, "four fractions"),
        ({"mask": ()}, "at least one by one"),
        ({"mask": ((),)}, "at least one by one"),
        ({"mask": ((1, 0), (1,))}, "same length"),
        ({"mask": ((1, 2),)}, "only 0 and 1"),
    ],
    ids=str,
)
def test_impossible_scopes(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(EditError, match=said):
        Scope(**fields)


def test_impossible_conditions() -> None:
    with pytest.raises(EditError, match="no comparison '=='"):
        Condition(NAME, "==", 1.0)
    with pytest.raises(EditError, match="value of a condition must be a finite"):
        Condition(NAME, ">", math.nan)


@pytest.mark.parametrize("vector", [[[1.0, 2.0]], [math.nan], [1e39], 3.0], ids=str)
def test_impossible_vectors(vector: Any) -> None:
    with pytest.raises(EditError, match="one row of finite float32 numbers"):
        DenseVector("layer", vector)


def test_a_vector_is_float32_whatever_it_came_as() -> None:
    assert DenseVector("layer", [1, 2.5]).vector.dtype == np.float32  # type: ignore[arg-type]
    with pytest.raises(EditError, match="strength of a vector"):
        DenseVector("layer", np.ones(2, np.float32), math.inf)


def test_impossible_steering() -> None:
    with pytest.raises(EditError, match="no conflict rule 'first'; use one of error, sum, last"):
        Steering(conflict="first")
    with pytest.raises(EditError, match="strength multiplier must be a finite"):
        Steering(strength_multiplier=math.nan)


NUMBERS = st.sampled_from([-1.0, 0.0, 0.5])
CONDITIONS = st.builds(Condition, st.sampled_from(["a/P0", "a/P1"]), st.sampled_from([">", ">=", "<", "<="]), NUMBERS)


@given(CONDITIONS, CONDITIONS)
def test_conditions_exclude_each_other_when_no_peak_meets_both(one: Condition, other: Condition) -> None:
    peaks = [n / 4 for n in range(-8, 9)]
    both = any(one.holds(p) and other.holds(p) for p in peaks)
    assert one.excludes(other) == other.excludes(one) == (one.feature == other.feature and not both)


def test_the_public_names() -> None:
    assert (elude.Edit, elude.Scope, elude.Condition) == (Edit, Scope, Condition)
    assert (elude.DenseVector, elude.Steering) == (DenseVector, Steering)
