"""Calibration tokens of one layer and token type, and feature sets made of activations measured on them.

Every activation is given in units of its standard deviation over these tokens, so that a feature's `write` is both what
one standard deviation and what activation 1 writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elude_runtime.offline.evaluation.feature_set import FeatureSet

Activations = Callable[[Tensor], Tensor]

_CHUNK = 2048  # tokens worked on at once
_DEPENDENT = 1e-5  # directions are told apart down to this part of the largest variance
_STILL = 1e-10  # a variance below this part of the mean square is rounding


@dataclass(frozen=True, eq=False)
class CalibrationTokens:
    """inputs [S, m] and weight [d, m] of the layer; mean and std [m] of the inputs (std 1 where one never changes);
    outputs [S, d], centred; variance: of the outputs, summed over neurons."""

    inputs: Tensor
    weight: Tensor
    mean: Tensor
    std: Tensor
    outputs: Tensor
    variance: float

    @classmethod
    def of(cls, inputs: Tensor, weight: Tensor) -> CalibrationTokens:
        mean = inputs.mean(0)
        squares, power = torch.zeros_like(mean, dtype=torch.float64), torch.zeros_like(mean, dtype=torch.float64)
        outputs = torch.empty(len(inputs), len(weight))
        for part, rows in zip(inputs.split(_CHUNK), outputs.split(_CHUNK), strict=True):
            centred = part - mean
            torch.matmul(centred, weight.T, out=rows)
            squares += centred.square().sum(0)
            power += part.square().sum(0)
        outputs -= outputs.mean(0)
        variance = float(outputs.square().sum(dtype=torch.float64)) / len(inputs)
        return cls(inputs, weight, mean, _spread(squares / len(inputs), power / len(inputs)), outputs, variance)

    def sample(self, count: int, seed: int) -> Tensor:
        """int64 [min(count, S)]: numbers of tokens drawn at random, in order."""
        generator = torch.Generator().manual_seed(seed)
        return torch.randperm(len(self.inputs), generator=generator)[:count].sort().values

    def standardised(self, rows: Tensor) -> Tensor:
        """[R, m]: inputs of the tokens `rows`, each in units of its standard deviation."""
        return (self.inputs[rows] - self.mean) / self.std

    def chunks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, centred outputs), some tokens at a time"""
        return zip(self.inputs.split(_CHUNK), self.outputs.split(_CHUNK), strict=True)


@dataclass(frozen=True, eq=False)
class Activity:
    """Of F activations a: mean and std float32 [F] (std 1 where a never changes); with_output float64 [F, d], their
    covariance with y; among float64 [F, F], with each other, where asked for."""

    mean: Tensor
    std: Tensor
    live: Tensor
    with_output: Tensor
    among: Tensor | None


def measure(tokens: CalibrationTokens, activations: Activations, among: bool = False) -> Activity:
    """One pass over the tokens, sums in float64 about the first chunk's mean."""
    shift = activations(tokens.inputs[:_CHUNK]).mean(0)
    features, count = len(shift), len(tokens.inputs)
    total = torch.zeros(features, dtype=torch.float64)
    squares, power = torch.zeros_like(total), torch.zeros_like(total)
    with_output = torch.zeros(features, len(tokens.weight), dtype=torch.float64)
    products = torch.zeros(features, features, dtype=torch.float64) if among else None
    for inputs, outputs in tokens.chunks():
        values = activations(inputs)
        power += values.square().sum(0)
        values = values - shift
        total += values.sum(0)
        squares += values.square().sum(0)
        with_output += values.T @ outputs
        if products is not None:
            products += values.T @ values
    offset = total / count
    variance = (squares / count - offset.square()).clamp(min=0)
    std = _spread(variance, power / count)
    covariance = None if products is None else products / count - offset[:, None] * offset
    live = variance > _STILL * power / count
    return Activity((shift + offset).float(), std, live, with_output / count, covariance)


def _spread(variance: Tensor, power: Tensor) -> Tensor:
    """float32: standard deviations, and 1 where a variance is rounding beside the mean square `power`."""
    return torch.where(variance > _STILL * power, variance.clamp(min=0).sqrt(), 1).float()


def principal_axes(values: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal axes float64 [n, n] (rows) and variances [n] along them, largest first, of tokens [S, n]."""
    mean = values.mean(0)
    covariance = torch.zeros(values.shape[1], values.shape[1], dtype=torch.float64)
    for part in values.split(_CHUNK):
        centred = part - mean
        covariance += centred.T @ centred
    variances, axes = torch.linalg.eigh(covariance / len(values))
    return axes.flip(1).T, variances.flip(0).clamp(min=0)


def reading(tokens: CalibrationTokens, readout: Tensor) -> Activations:
    """Linear activations (x - mean x) R^T for a read-out R [F, m]."""
    mean = tokens.mean
    return lambda inputs: (inputs - mean) @ readout.T


def written_set(
    tokens: CalibrationTokens,
    name: str,
    raw: Activations,
    directions: Tensor,
    *,
    lossless: bool = False,
    reconstruct: Activations | None = None,
    **facts: Any,
) -> FeatureSet:
    """Features with a constant write: `raw` activations [S, F], each of which adds directions [F, d] to y at 1.

    Ablating features takes (a - mean a) * write from y; a share is Cov(that, y) / Var(y), summed over neurons.
    facts: `dead`, the features that never change over the calibration tokens, is added.
    """
    activity = measure(tokens, raw)
    std, mean = activity.std, activity.mean / activity.std
    write = std[:, None] * directions

    def activations(inputs: Tensor) -> Tensor:
        return raw(inputs) / std

    def ablation(inputs: Tensor, features: Tensor) -> Tensor:
        return (activations(inputs)[:, features] - mean[features]) @ write[features]

    share = (activity.with_output * directions).sum(1) / (tokens.variance or 1)
    facts = {"dead": int((~activity.live).sum()), **facts}
    return FeatureSet(name, activations, share.float(), lossless, write, ablation, reconstruct, facts=facts)


def read_set(tokens: CalibrationTokens, name: str, raw: Activations, **facts: Any) -> FeatureSet:
    """Features that only read: `raw` activations [S, F], no decomposition of y and no write.

    Ablating features takes from y what is linearly explained by all of them together (least squares); a share is what
    is explained by one alone, so that shares overlap.
    """
    activity = measure(tokens, raw, among=True)
    std, mean = activity.std, activity.mean / activity.std
    assert activity.among is not None
    among = activity.among / torch.outer(std, std)
    with_output = activity.with_output / std[:, None]

    def activations(inputs: Tensor) -> Tensor:
        return raw(inputs) / std

    def ablation(inputs: Tensor, features: Tensor) -> Tensor:
        write = torch.linalg.pinv(among[features][:, features], rtol=_DEPENDENT, hermitian=True) @ with_output[features]
        return (activations(inputs)[:, features] - mean[features]) @ write.float()

    alone = (torch.where(activity.live, among.diagonal(), torch.inf).reciprocal()[:, None] * with_output).float()

    def attribution(inputs: Tensor, gradient: Tensor) -> Tensor:
        return ((activations(inputs) - mean) * (gradient @ alone.T)).sum(0)

    share = with_output.square().sum(1) / (tokens.variance or 1)
    facts = {"dead": int((~activity.live).sum()), **facts}
    return FeatureSet(name, activations, share.float(), False, None, ablation, attribution=attribution, facts=facts)
