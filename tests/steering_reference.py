"""Steering written down a second time, cell by cell in float64: what layer outputs edits come to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
from support import naive_sums
from torch import Tensor

from elude_runtime.analysis.edits import DenseVector, Edit, Scope, Steering
from elude_runtime.analysis.features import Feature, parse_feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import REST_CONCEPT

Window = tuple[float, float, float, float]
WHOLE: Window = (0.0, 0.0, 1.0, 1.0)
MOVES: dict[str, Callable[[float, float], float]] = {
    "set": lambda a, v: v,
    "add": lambda a, v: a + v,
    "cap": lambda a, v: min(a, v),
    "floor": lambda a, v: max(a, v),
}


def in_scope(scope: Scope, layout: TokenLayout, window: Window = WHOLE) -> list[bool]:
    """Whether each token is meant, with exact fractions."""
    found = []
    for token in range(layout.total):
        patch = token >= layout.prefix
        if scope.box is None and scope.mask is None:
            found.append({"all": True, "cls": not patch, "patches": patch}[scope.tokens])
            continue
        if not patch:
            found.append(False)
            continue
        rows, columns = layout.grid  # type: ignore[misc]
        row, column = divmod(token - layout.prefix, columns)
        left, top, right, bottom = map(Fraction, window)
        cell = (
            left + (right - left) * Fraction(column, columns),
            top + (bottom - top) * Fraction(row, rows),
            left + (right - left) * Fraction(column + 1, columns),
            top + (bottom - top) * Fraction(row + 1, rows),
        )
        found.append(any(_meet(cell, area) for area in _areas(scope)))
    return found


def _areas(scope: Scope) -> Iterable[tuple[Fraction, ...]]:
    if scope.box is not None:
        yield tuple(map(Fraction, scope.box))
    else:
        for i, row in enumerate(scope.mask or ()):
            for j, cell in enumerate(row):
                if cell:
                    high, wide = len(scope.mask or ()), len(row)
                    yield Fraction(j, wide), Fraction(i, high), Fraction(j + 1, wide), Fraction(i + 1, high)


def _meet(one: Sequence[Fraction], other: Sequence[Fraction]) -> bool:
    across = min(one[2], other[2]) - max(one[0], other[0])
    down = min(one[3], other[3]) - max(one[1], other[1])
    return across > Fraction(1, 10**12) and down > Fraction(1, 10**12)


class Reference:
    """One layer on one image, float64. t, s [T, d, M + 1]: centred and uncentred activations of all sub-units."""

    def __init__(self, state: SplitState, x: Tensor) -> None:
        self.state = state
        partition, layout = state.partition, state.layout
        module = copy.deepcopy(state.linear.module).double()
        self.s = naive_sums(module, layout, partition, x.double())[0].detach()
        self.types = [0 if token >= layout.prefix else 1 for token in range(layout.total)]
        self.t = torch.stack([self.s[i] - partition.mean[p].double() for i, p in enumerate(self.types)])

    def members(self, feature: Feature) -> Tensor:
        """bool [d, M + 1]"""
        partition = self.state.partition
        found = torch.zeros(partition.mean.shape[1:], dtype=torch.bool)
        if feature.neuron is not None:
            found[feature.neuron, partition.subunits if feature.index is None else feature.index] = True
            return found
        concept = partition.concept[feature.token_type]
        return concept == (REST_CONCEPT if feature.index is None else feature.index)

    def activation(self, feature: Feature, token: int) -> float:
        members = self.members(feature)
        if feature.neuron is not None:
            return float(self.t[token][members])
        std = self.state.partition.std[feature.token_type].double()
        live = members & (std > 0)
        sign = self.state.partition.sign[feature.token_type]
        return float((sign[live] * self.t[token][live] / std[live]).mean()) if live.any() else 0.0

    def acts(self, edit: Edit, token: int, window: Window = WHOLE) -> bool:
        feature = parse_feature(edit.feature, [self.state.name])
        if self.types[token] != feature.token_type or not in_scope(edit.apply, self.state.layout, window)[token]:
            return False
        a = self.activation(feature, token)
        return {"both": True, "positive": a > 0, "negative": a < 0}[edit.side]

    def moves(self, edit: Edit, token: int, concept_std: Callable[[Feature], float]) -> Tensor:
        """float64 [d, M + 1]: t' - t of every sub-unit."""
        feature = parse_feature(edit.feature, [self.state.name])
        members, std = self.members(feature), self.state.partition.std[feature.token_type].double()
        t, s = self.t[token], self.s[token]
        if edit.mode in ("scale", "ablate"):
            return torch.where(members, ((edit.value if edit.mode == "scale" else 0.0) - 1) * t, 0)  # type: ignore[operator]
        if edit.mode == "zero":
            return torch.where(members, -s, 0)
        value = float(edit.value)  # type: ignore[arg-type]
        if edit.unit == "std":
            value *= float(std[members]) if feature.neuron is not None else concept_std(feature)
        a = self.activation(feature, token)
        move = MOVES[edit.mode](a, value) - a
        if feature.neuron is not None:
            return torch.where(members, move, 0.0).double()
        return torch.where(members & (std > 0), move * std * self.state.partition.sign[feature.token_type], 0)

    def change(
        self,
        steerings: Sequence[Steering],
        window: Window = WHOLE,
        concept_std: Callable[[Feature], Any] = lambda _: 1.0,
    ) -> Tensor:
        """float64 [T, d]: what is added to the output; conflicts between any two edits by the later one's rule."""
        out = torch.zeros(self.t.shape[:2], dtype=torch.float64)
        for token in range(len(out)):
            cells: list[tuple[Tensor, Tensor]] = []  # of each edit so far: members it still acts on, and its changes
            for steering in steerings:
                for edit in steering.edits:
                    if not self.acts(edit, token, window):
                        continue
                    members = self.members(parse_feature(edit.feature, [self.state.name]))
                    if steering.conflict == "last":
                        cells = [(own & ~members, moves) for own, moves in cells]
                    cells.append((members, steering.strength_multiplier * self.moves(edit, token, concept_std)))
                for vector in steering.vectors:
                    if self.vector_acts(vector, token, window):
                        strength = vector.strength * steering.strength_multiplier
                        out[token] += strength * torch.from_numpy(vector.vector.astype("float64"))
            out[token] += sum((torch.where(own, moves, 0).sum(1) for own, moves in cells), torch.zeros(out.shape[1]))
        return out

    def vector_acts(self, vector: DenseVector, token: int, window: Window = WHOLE) -> bool:
        live = self.types[token] in self.state.live_types
        return live and in_scope(vector.apply, self.state.layout, window)[token]
