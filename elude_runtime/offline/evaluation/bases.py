"""Lossless baselines and controls: other ways to write a layer's output as a sum."""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.offline.evaluation.calibration import (
    CalibrationTokens,
    measure,
    principal_axes,
    reading,
    written_set,
)
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.partition.kmeans import kmeans


def hidden_units(tokens: CalibrationTokens) -> FeatureSet:
    """What the layer reads, value by value: each column of W is the write of one. Of a k x k convolution these are
    the m = n q values under the kernel, not the n channels."""
    mean = tokens.mean
    return written_set(tokens, "hidden units", lambda inputs: inputs - mean, tokens.weight.T, lossless=True)


def output_channels(tokens: CalibrationTokens) -> FeatureSet:
    """The neurons y_k themselves."""
    return _output_basis(tokens, "output channels", torch.eye(len(tokens.weight)))


def principal_directions(tokens: CalibrationTokens) -> FeatureSet:
    """Principal components of y, largest variance first; all d of them."""
    directions, _ = principal_axes(tokens.outputs)
    return _output_basis(tokens, "PCA directions of y", directions.float())


def rotated_channels(tokens: CalibrationTokens, seed: int) -> FeatureSet:
    """Control: y in a random orthonormal basis (uniform over rotations and reflections)."""
    d = len(tokens.weight)
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(random)
    return _output_basis(tokens, "rotated output basis", (q * r.diagonal().sign()).T.float())


def _output_basis(tokens: CalibrationTokens, name: str, basis: Tensor) -> FeatureSet:
    """y along the orthonormal rows of basis [d, d]."""
    return written_set(tokens, name, reading(tokens, basis @ tokens.weight), basis, lossless=True)


def head_parts(tokens: CalibrationTokens, heads: int, neurons: Tensor) -> FeatureSet:
    """Control for attn.proj: the edges of each chosen neuron divided by the head that they read from; `neurons` [A]
    -> A * heads features, neuron by neuron, each neuron the sum of its own."""
    d, m = tokens.weight.shape
    if m % heads:
        raise ValueError(f"{m} inputs cannot be divided among {heads} heads")
    parts = torch.block_diag(*[torch.ones(1, m // heads)] * heads)  # [heads, m]
    readout = (tokens.weight[neurons, None] * parts).flatten(0, 1)
    directions = torch.eye(d)[neurons].repeat_interleave(heads, 0)
    raw = reading(tokens, readout)
    return written_set(tokens, "per-head partition", raw, directions, lossless=True, neurons=neurons.tolist())


def unit_groups(tokens: CalibrationTokens, groups: int, sample: Tensor, seed: int) -> FeatureSet:
    """Groups of hidden units with similar activation profiles, one for the whole layer: all edges of a unit go to its
    group. Clusters the standardised profiles over the tokens `sample`; activation: mean of the standardised members.

    Lossless, but a group has no constant write: u = sum over its units of (x_j - mean x_j) w_j. Units that never
    change in the sample belong to the first group, without part in its activation.
    """
    profiles = tokens.standardised(sample).T.contiguous()  # [m, R]
    live = profiles.var(1, correction=0) > 0
    labels = torch.zeros(len(profiles), dtype=torch.int64)
    number = min(groups, int(live.sum()))
    if number:
        draws = torch.rand(1, number, generator=torch.Generator().manual_seed(seed))
        found = kmeans(profiles[live][None], number, draws)[0][0]
        labels[live] = found.unique(return_inverse=True)[1]  # k-means may leave a cluster without members
    member = torch.nn.functional.one_hot(labels).T.float()  # [groups, m]
    averaged = member * live
    mean, weight = tokens.mean, tokens.weight
    raw = reading(tokens, averaged / averaged.sum(1, keepdim=True).clamp(min=1) / tokens.std)
    activity = measure(tokens, raw)
    std = activity.std

    def activations(inputs: Tensor) -> Tensor:
        return raw(inputs) / std

    def ablation(inputs: Tensor, features: Tensor) -> Tensor:
        return ((inputs - mean) * member[features].sum(0)) @ weight.T

    def attribution(inputs: Tensor, gradient: Tensor) -> Tensor:
        return member @ ((inputs - mean) * (gradient @ weight)).sum(0)

    share = member @ hidden_units(tokens).share
    facts = {"dead": int((~activity.live).sum()), "sizes": member.sum(1).int().tolist()}
    return FeatureSet(
        "groups of hidden units", activations, share, True, None, ablation, attribution=attribution, facts=facts
    )
