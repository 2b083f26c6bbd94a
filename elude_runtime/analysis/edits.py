"""What a user may ask of steering: edits of features, dense vectors, where and when they act. Descriptions only."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from elude_runtime.errors import EludeError

SCALE, SET, ABLATE, ZERO, CAP, FLOOR, ADD = "scale", "set", "ablate", "zero", "cap", "floor", "add"
MODES = (SCALE, SET, ABLATE, ZERO, CAP, FLOOR, ADD)
UNITS = ("raw", "std")
SIDES = ("both", "positive", "negative")
TOKENS = ("all", "cls", "patches")
OPERATORS = (">", ">=", "<", "<=")
CONFLICTS = ("error", "sum", "last")


class EditError(EludeError):
    """An edit that cannot be carried out, or two that contradict each other."""


@dataclass(frozen=True)
class Scope:
    """Tokens that an edit or vector may act on.

    tokens: "all" that the feature has (a vector: all that can change the output), "cls" (class and register tokens) or
    "patches" (patch or position tokens). box (x0, y0, x1, y1) in fractions of the upright image, or mask, rows of 0 and
    1 spread over the upright image: only the position tokens whose cell meets the box, or a 1, with positive area.
    """

    tokens: str = "all"
    box: tuple[float, float, float, float] | None = None
    mask: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        _one_of(self.tokens, TOKENS, "token scope")
        if self.box is not None and self.mask is not None:
            raise EditError("A scope has a box or a mask, not both.")
        if self.tokens == "cls" and self.limited:
            raise EditError("A box or mask chooses patches; leave out the token scope 'cls'.")
        if self.box is not None:
            if len(self.box) != 4 or not all(0 <= v <= 1 for v in self.box):
                raise EditError("A box is four fractions x0, y0, x1, y1 of the image, each from 0 to 1.")
            if not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
                raise EditError("A box needs x0 < x1 and y0 < y1.")
        if self.mask is not None:
            if not self.mask or not self.mask[0] or len({len(row) for row in self.mask}) > 1:
                raise EditError("A mask is a list of rows of the same length, at least one by one.")
            if any(cell not in (0, 1) for row in self.mask for cell in row):
                raise EditError("A mask holds only 0 and 1.")

    @property
    def limited(self) -> bool:
        """Whether only a part of the image is meant."""
        return self.box is not None or self.mask is not None


@dataclass(frozen=True)
class Condition:
    """Act only on images whose peak activation of `feature` on the unedited pass compares so: the activation at the
    token where its absolute value is largest, with its sign."""

    feature: str
    op: str
    value: float

    def __post_init__(self) -> None:
        _one_of(self.op, OPERATORS, "comparison")
        _finite(self.value, "The value of a condition")

    def holds(self, peak: float) -> bool:
        return {
            ">": peak > self.value,
            ">=": peak >= self.value,
            "<": peak < self.value,
            "<=": peak <= self.value,
        }[self.op]

    def excludes(self, other: Condition) -> bool:
        """Whether no image can meet both: the same feature, from opposite sides, without a value in common."""
        if self.feature != other.feature or self.op[0] == other.op[0]:
            return False
        low, high = (self, other) if self.op[0] == ">" else (other, self)
        touching = low.op == ">=" and high.op == "<="
        return low.value > high.value or (low.value == high.value and not touching)


@dataclass(frozen=True)
class Edit:
    """A change of one feature, at every token of its type in scope. feature: its name, `LAYER/P17` or `LAYER/12/p3`.

    With t the centred activation of a sub-unit of neuron k, s the uncentred one and v the value, y_k changes by t' - t:

        scale  t' = v t        set   t' = v           add    t' = t + v
        ablate t' = 0          zero  s' = 0           (these two take no value)
        cap    t' = min(t, v)  floor t' = max(t, v)

    On a concept of activation p (mean of sign t / std over its live members) scale, ablate and zero act on every
    member; for set, cap, floor and add p' comes from p in the same way, and every live member moves by sign (p' - p) of
    its own standard deviations. An add does not use the split: it shifts y_k whatever the sub-unit. unit "std": v
    counts calibration standard deviations of the feature's activation. side: only tokens where the unedited activation
    (t or p) is above ("positive") or below ("negative") zero. when: only images that meet the condition.
    """

    feature: str
    mode: str = ABLATE
    value: float | None = None
    unit: str = "raw"
    side: str = "both"
    apply: Scope = field(default_factory=Scope)
    when: Condition | None = None

    def __post_init__(self) -> None:
        _one_of(self.mode, MODES, "edit mode")
        _one_of(self.unit, UNITS, "unit")
        _one_of(self.side, SIDES, "side")
        if self.mode in (ABLATE, ZERO):
            if self.value is not None:
                raise EditError(f"An edit with mode {self.mode!r} takes no value; use 'scale' or 'set' for one.")
        elif self.value is None:
            raise EditError(f"An edit with mode {self.mode!r} needs a value.")
        else:
            _finite(self.value, "The value of an edit")
        if self.mode in (SCALE, ABLATE, ZERO) and self.unit != "raw":
            raise EditError(f"An edit with mode {self.mode!r} has no unit; leave it out.")


@dataclass(frozen=True, eq=False)
class DenseVector:
    """strength * vector, float32 [d], is added to a layer's output at the tokens in scope that can change the model's
    output. name: of a stored vector, for messages."""

    layer: str
    vector: NDArray[np.float32]
    strength: float = 1.0
    apply: Scope = field(default_factory=Scope)
    when: Condition | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        with np.errstate(over="ignore"):
            vector = np.asarray(self.vector, dtype=np.float32)
        if vector.ndim != 1 or not np.isfinite(vector).all():
            raise EditError("A vector is one row of finite float32 numbers.")
        _finite(self.strength, "The strength of a vector")
        object.__setattr__(self, "vector", vector)


@dataclass(frozen=True)
class Steering:
    """Edits and vectors that act together. strength_multiplier: times the change that each of them makes.

    conflict: what happens where two edits act on one sub-unit at one token (a concept acts on all its members): "error"
    refuses them, "sum" adds both changes, each made from the unedited activation, with "last" the later one alone acts
    there. Vectors add to whatever else happens. when: a condition on all of them, beside each one's own.
    """

    edits: tuple[Edit, ...] = ()
    vectors: tuple[DenseVector, ...] = ()
    strength_multiplier: float = 1.0
    conflict: str = "error"
    when: Condition | None = None

    def __post_init__(self) -> None:
        _one_of(self.conflict, CONFLICTS, "conflict rule")
        _finite(self.strength_multiplier, "The strength multiplier")


def _one_of(value: str, known: Iterable[str], what: str) -> None:
    if value not in known:
        raise EditError(f"There is no {what} {value!r}; use one of {', '.join(known)}.")


def _finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise EditError(f"{what} must be a finite number, not {value}.")
