"""Concepts: sub-units of one layer and token type, grouped by co-activation, and the statistics of both.

Source: design "Concepts". One token sample serves everything here, so that memory is bounded by the layer's size.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from elude_runtime.partition.diametrical import diametrical, distinct_rows, farthest, signed_sums
from elude_runtime.partition.partition import REST_CONCEPT

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
DRIFT_EDGES = tuple(i / 10 for i in range(1, 10))
_STILL = 1e-5  # of its sub-units' spread: a neuron that varies less has none of its own to begin a concept at
_CHUNK_FLOATS = 4_000_000  # values worked on at once, so that no second copy of a layer's sample is made


@dataclass(frozen=True)
class FeatureStatistics:
    """Calibration statistics of F features, each in units of its own activation.

    mean, std, density float32 [F]; quantiles [F, 7] at `QUANTILES`; drift_edges [F, 9], the calibration's deciles;
    share [F]: covariance of the feature's write with the layer's output over that output's variance, summed over
    neurons; the shares of a layer and token type add up to 1, and one that works against the rest is negative.
    density: share of tokens more than two standard deviations from the mean.
    """

    mean: Tensor
    std: Tensor
    quantiles: Tensor
    density: Tensor
    drift_edges: Tensor
    share: Tensor

    def take(self, chosen: Tensor) -> FeatureStatistics:
        """Those of the features chosen, bool [F]."""
        return FeatureStatistics(*(getattr(self, f.name)[chosen] for f in fields(self)))


def describe(values: Tensor, share: Tensor) -> FeatureStatistics:
    """Statistics of activations [S, F] over S sampled tokens; `share` [F] is passed through."""
    probes = torch.tensor(QUANTILES + DRIFT_EDGES, dtype=values.dtype)
    levels, mean, std, density = [], [], [], []
    for part in values.split(max(1, _CHUNK_FLOATS // values.shape[0]), dim=1):
        levels.append(torch.quantile(part, probes, dim=0).T)
        mean.append(part.mean(0))
        std.append(part.std(0, correction=0))
        density.append(((part - mean[-1]).abs() > 2 * std[-1]).float().mean(0))
    at = torch.cat(levels)
    return FeatureStatistics(
        torch.cat(mean), torch.cat(std), at[:, : len(QUANTILES)], torch.cat(density), at[:, len(QUANTILES) :], share
    )


def group_concepts(
    centred: Tensor, std: Tensor, counts: Tensor, weight: Tensor, concepts: int
) -> tuple[Tensor, Tensor]:
    """Cluster the z-scored activation profiles of the sub-units of a layer, up to their sign: the concept of each, and
    whether it rises or falls with it.

    centred [S, d, M + 1]: t_km at S sampled tokens; std [d, M + 1]; counts [d]; weight [d, m]: rows of the layer.
    Clusters begin at neurons, those whose rows are the most distinct, so that the same weights begin at the same places
    whatever the images are; at twice as many as there are to be concepts, so that what few sub-units follow can be
    given up. Where fewer neurons vary, the profiles least alike come after them. What one sub-unit does and another
    undoes is one concept, not two. There may be fewer concepts than asked for, since no two may be nearly the same. A
    concept's positive end is that of the longer tail, where the tokens are that move it most.

    Sub-units that never vary and the background ones go to the background concept. Returns int32 [d, M + 1] and int8
    [d, M + 1] (1 or -1); concepts are numbered by their share of the output's variance, largest first.
    """
    width = centred.shape[2]
    named = torch.arange(width) < counts.long()[:, None]  # [d, M + 1]; `rest` (slot M) is never below the count
    member = (named & (std > 0)).flatten()
    out = torch.full((member.numel(),), REST_CONCEPT, dtype=torch.int32)
    sign = torch.ones(member.numel(), dtype=torch.int8)
    live = member.nonzero()[:, 0]
    if live.numel():
        profiles = centred.flatten(1).T[live].contiguous()  # [L, S]
        profiles /= std.flatten()[live, None]
        asked = min(concepts, live.numel())
        begin = min(2 * asked, live.numel())
        outputs = centred.sum(2)  # [S, d]
        moving = (outputs.std(0, correction=0) > _STILL * std.norm(dim=1)).nonzero()[:, 0]
        anchors = outputs[:, moving[distinct_rows(weight[moving], begin)]].T  # [at most 2 K, S]
        labels, signs = diametrical(profiles, farthest(profiles, anchors, begin), asked)
        number = int(labels.max()) + 1
        activations = signed_sums(profiles, labels, signs, number)
        activations -= activations.mean(1, keepdim=True)
        signs = torch.where(activations.pow(3).mean(1) < 0, -1, 1)[labels] * signs
        out[live], sign[live] = labels.to(torch.int32), signs.to(torch.int8)
        order = concept_share(centred, out.view(std.shape), number)[:number].argsort(descending=True, stable=True)
        rank = torch.empty_like(order)
        rank[order] = torch.arange(number)
        out[live] = rank[labels].to(torch.int32)
    return out.view(std.shape), sign.view(std.shape)


def concept_share(centred: Tensor, concept: Tensor, concepts: int) -> Tensor:
    """Share of the layer output's variance in each concept: centred [S, d, M + 1] -> float32 [K + 1], `rest` last.

    sum over neurons of Cov(u_concept, y) / sum over neurons of Var(y): the shares add up to 1.
    """
    shares = subunit_share(centred)
    slots = torch.where(concept == REST_CONCEPT, concepts, concept.long())
    return torch.zeros(concepts + 1).index_add_(0, slots.flatten(), shares.flatten())


def subunit_share(centred: Tensor) -> Tensor:
    """The same of every sub-unit: centred [S, d, M + 1] -> float32 [d, M + 1]. 0 where the layer never varies."""
    output = centred.sum(2)
    output -= output.mean(0)
    total = float(output.square().sum(dtype=torch.float64))
    covariance = torch.zeros(centred.shape[1:], dtype=torch.float64)
    for part, rows in zip(_tokens(centred), _tokens(output), strict=True):
        covariance += torch.einsum("skm,sk->km", part, rows)
    return (covariance / total).float() if total > 0 else torch.zeros(centred.shape[1:])


def concept_activation(centred: Tensor, std: Tensor, concept: Tensor, sign: Tensor, concepts: int) -> Tensor:
    """Activations of all concepts: the mean over live members of sign t / std; [S, d, M + 1] -> [S, K + 1], `rest`
    last."""
    slots = torch.where(concept == REST_CONCEPT, concepts, concept.long()).flatten()
    live = (std > 0).flatten()
    size = torch.bincount(slots[live], minlength=concepts + 1).clamp(min=1)
    scale = torch.where(live, sign.flatten() / std.flatten(), 0) / size[slots]
    out = centred.new_zeros(len(centred), concepts + 1)
    for part, rows in zip(_tokens(centred), _tokens(out), strict=True):
        rows.index_add_(1, slots, part.flatten(1) * scale)
    return out


def _tokens(values: Tensor) -> tuple[Tensor, ...]:
    """Views of a sample [S, ...], a thousand tokens each."""
    return values.split(1000)
