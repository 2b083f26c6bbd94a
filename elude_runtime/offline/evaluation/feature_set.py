"""A set of features that are scored together: the boundary between who makes features and who measures them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of one layer and token type that are scored together.

    `name`: what they are, e.g. "concepts", "hidden units".
    `activations`: inputs of tokens, float32 [S, G*n*q] (`LinearMap.patches` flattened, as read at a token) -> [S, F].
    `share` [F]: part of the layer output's variance that each carries; of a feature without a write of its own, what
    is linearly explained, |Cov(a, y)|^2 / (var(a) * sum var(y)).
    `write`: float32 [F, d], what a feature at activation 1 (one standard deviation above the mean for linear
    readouts) writes to the layer's output y, where it has one constant direction.
    `ablation`: (inputs, feature numbers) -> [S, d], what ablating these features takes from y, for features that have
    parts of y of their own.
    `attribution`: (inputs, gradient [S, d]) -> [F], gradient x what ablating each feature alone takes from y, summed
    over tokens, for features with an `ablation` and no `write`: all at once, since one by one it is slow.
    `reconstruct`: inputs -> [S, d], the layer's output without its bias as all features (with a named remainder) give
    it back, for sets that give back the whole of it.
    `lossless`: the features (with a named remainder) add up to y exactly.
    `facts`: what else is to be reported: FVU, active count, seconds, epochs, ...
    """

    name: str
    activations: Callable[[Tensor], Tensor]
    share: Tensor
    lossless: bool
    write: Tensor | None = None
    ablation: Callable[[Tensor, Tensor], Tensor] | None = None
    reconstruct: Callable[[Tensor], Tensor] | None = None
    attribution: Callable[[Tensor, Tensor], Tensor] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
