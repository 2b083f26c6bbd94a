"""What edits and vectors make of one layer's output for one image: the difference they add, in float32."""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.edits import ABLATE, ADD, CAP, FLOOR, SCALE, ZERO
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.steering_plan import PlannedEdit, SteeringPlan


@dataclass(frozen=True, eq=False)
class LayerChange:
    """change float32 [T, d]: what is added to the layer's output; tokens bool [T]: those that an edit acted on; acted:
    numbers of the edits and vectors that acted on any; relative_norm: norm of the output's realised change over the
    norm of the output, both over `tokens`; output [1, ...]: the changed one, in the layer's layout."""

    change: Tensor
    tokens: Tensor
    acted: frozenset[int]
    relative_norm: float
    output: Tensor


def layer_change(state: SplitState, x: Tensor, y: Tensor, plan: SteeringPlan, wanted: Set[int]) -> LayerChange:
    """The layer's own edits and vectors among those `wanted` (by number), for input x [1, ...] and output y [1, ...].

    Every change is made from the unedited activations of x, whatever the other edits do.
    """
    edits, vectors = plan.at(state.name)
    edits = [edit for edit in edits if edit.number in wanted]
    change = torch.zeros(state.layout.total, state.linear.neurons, device=y.device)
    tokens = torch.zeros(state.layout.total, dtype=torch.bool, device=y.device)
    acted = []
    acts = {edit.number: _Acting(state, x, edit) for edit in edits}
    for number, acting in acts.items():
        where, own = acting.add_to(change, acts), tokens[state.layout.slices[acting.edit.feature.token_type]]
        if bool(where.any()):
            acted.append(number)
            own |= where
    for vector in vectors:
        if vector.number in wanted and bool(vector.tokens.any()):
            change[vector.tokens] += vector.vector
            tokens |= vector.tokens
            acted.append(vector.number)
    output = state.changed(y, change[None])
    norm = _norm(output.float() - y.float()) if acted else 0.0
    if norm != 0:
        before = _norm(state.linear.tokens(y)[0].float()[tokens])
        norm /= max(before, torch.finfo(torch.float32).tiny)
    return LayerChange(change, tokens, frozenset(acted), norm, output)


def _norm(values: Tensor) -> float:
    """The 2-norm; in float64 where squares of large numbers leave float32."""
    found = float(values.norm())
    return found if math.isfinite(found) else float(values.double().norm())


class _Acting:
    """One edit on one image."""

    def __init__(self, state: SplitState, x: Tensor, edit: PlannedEdit) -> None:
        self.edit = edit
        self._state, self._x = state, x
        self._activation: Tensor | None = None
        self.tokens = edit.tokens  # bool [T_p]: those it acts on, before it yields to later edits
        if edit.edit.side == "positive":
            self.tokens = edit.tokens & (self.activation > 0)
        elif edit.edit.side == "negative":
            self.tokens = edit.tokens & (self.activation < 0)

    @property
    def activation(self) -> Tensor:
        """float32 [T_p]: the feature's own, t or p."""
        if self._activation is None:
            self._activation = self._state.activations(self._x, self.edit.feature)[0]
        return self._activation

    def add_to(self, change: Tensor, others: dict[int, _Acting]) -> Tensor:
        """Add what the edit does to change [T, d]; returns bool [T_p], the tokens it acts on. others: all edits of the
        layer by number, to which it may have to yield."""
        tokens = self.tokens
        later = [others[number] for number in self.edit.yields_to if number in others]
        members: dict[Feature, Tensor] = {}  # of this concept, and where a later edit of theirs acts instead
        for other in later:
            if _is_member(other.edit.feature, self.edit.feature):
                feature = other.edit.feature
                members[feature] = members.get(feature, torch.zeros_like(tokens)) | other.tokens
            else:
                tokens = tokens & ~other.tokens
        self._add(change, self.edit.feature, tokens, 1.0)
        for feature, taken in members.items():
            self._add(change, feature, tokens & taken, -1.0)
        return tokens

    def _add(self, change: Tensor, feature: Feature, tokens: Tensor, sign: float) -> None:
        """Add this edit's change of `feature`, itself or a member of it, at some tokens [T_p]."""
        difference = self._difference(feature)
        factor = self.edit.strength * sign
        if factor != 1:
            difference = factor * difference
        # a product with 0 would make NaN of what is infinite
        difference = torch.where(tokens[:, None], difference, 0)
        own = change[self._state.layout.slices[feature.token_type]]
        own.index_add_(1, self._state.feature_write(feature).neurons, difference)

    def _difference(self, feature: Feature) -> Tensor:
        """t' - t of this edit, float32 [T_p, F], at the neurons that the feature writes to."""
        mode, value = self.edit.edit.mode, self.edit.value
        write = self._state.feature_write(feature)
        if mode in (SCALE, ABLATE, ZERO):
            u = self._state.written(self._x, feature)[0]
            if mode == ZERO:
                return -(u + write.mean)
            return -u if mode == ABLATE else (value - 1) * u
        shift = self._shift(mode, value)[:, None]
        return shift if self.edit.feature.neuron is not None else shift * write.rise

    def _shift(self, mode: str, value: float) -> Tensor:
        """[T_p]: by how much the activation of the edited feature moves."""
        if mode == ADD:
            return torch.full(self.tokens.shape, value, device=self.tokens.device)
        away = value - self.activation
        if mode == CAP:
            return away.clamp(max=0)
        return away.clamp(min=0) if mode == FLOOR else away


def _is_member(feature: Feature, concept: Feature) -> bool:
    return concept.neuron is None and feature.neuron is not None
