"""Gating: the other reading of "sub-units", in which a token's whole neuron goes to one of them."""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.offline.evaluation.calibration import CalibrationTokens, written_set
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.partition.sign_split import end_clusters

_OUTLIER = 4.0  # tokens whose input norm exceeds this multiple of the median are not clustered, as in the sign split


def gated_neurons(tokens: CalibrationTokens, neurons: Tensor, subunits: int, per_end: int, seed: int) -> FeatureSet:
    """Sub-units of the chosen neurons [A] by routing: A * 2C features, neuron by neuron, C = subunits / 2 of each end.

    The contributions w_k * x of the `per_end` tokens at each end of neuron k are clustered as in the sign split. A
    token above the neuron's mean goes to the nearest cluster of the positive end, one below it to one of the negative
    end, with the whole of the centred y_k: the sub-units of a neuron add up to it, but are no longer linear in x.
    """
    inputs, weight = tokens.inputs, tokens.weight[neurons]
    norms = inputs.norm(dim=1)
    usable = (norms <= _OUTLIER * norms.median()).nonzero()[:, 0]
    count = min(per_end, len(usable))
    clusters = max(1, min(subunits // 2, count))
    generator = torch.Generator().manual_seed(seed)
    routes = []
    for sign in (1, -1):
        ends = (sign * tokens.outputs[usable][:, neurons]).topk(count, dim=0).indices.T  # [A, count]
        draws = torch.rand(len(neurons), clusters, generator=generator)
        middles, centres = [], []
        for row, ids, draw in zip(weight, usable[ends], draws, strict=True):
            reads = inputs[ids]
            middles.append(row * reads.mean(0))
            centres.append(end_clusters(reads[None, :, :, None], row[None, :, None], clusters, draw[None])[0])
        routes.append(_Routes(weight, torch.stack(middles), torch.stack(centres)))
    mean = tokens.mean

    def raw(inputs: Tensor) -> Tensor:
        value = (inputs - mean) @ weight.T  # [S, A]
        parts = []
        for sign, route in zip((1, -1), routes, strict=True):
            here = torch.where(sign * value > 0, value, 0)[..., None]
            parts.append(here * torch.nn.functional.one_hot(route.nearest(inputs), clusters))
        return torch.cat(parts, 2).flatten(1)

    directions = torch.eye(len(tokens.weight))[neurons].repeat_interleave(2 * clusters, 0)
    return written_set(tokens, "gating", raw, directions, lossless=True, neurons=neurons.tolist())


class _Routes:
    """Nearest cluster of a token at one end of each neuron: weight and middle [A, m], the mean contribution; centres
    [A, C, m] of contributions less the middle, of unit length."""

    def __init__(self, weight: Tensor, middle: Tensor, centres: Tensor) -> None:
        self.clusters = centres.shape[1]
        self.readout = (weight[:, None] * centres).flatten(0, 1)  # [A C, m]
        self.offset = (middle[:, None] * centres).sum(2).flatten()
        self.lengths = centres.square().sum(2)  # [A, C]
        self.squared, self.crossed, self.constant = weight.square(), weight * middle, middle.square().sum(1)

    def nearest(self, inputs: Tensor) -> Tensor:
        """int64 [S, A]. |p - c|^2 is smallest where |c|^2 - 2 p c is; nothing of size S x A x m is made."""
        along = (inputs @ self.readout.T - self.offset).unflatten(1, (-1, self.clusters))
        length = inputs.square() @ self.squared.T - 2 * (inputs @ self.crossed.T) + self.constant
        return (self.lengths - 2 * along / length.clamp(min=1e-30).sqrt()[..., None]).argmin(2)
