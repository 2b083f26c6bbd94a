"""How much two things agree: features with each other, two feature sets, two partitions, a feature with the truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

DUPLICATE = 0.95
_BLOCK = 1024  # features whose correlations are held at once


def standardised(activations: Tensor) -> Tensor:
    """[S, F] with mean 0 and length 1 in every column, 0 where a feature never varies: products are correlations."""
    centred = activations.double() - activations.double().mean(0)
    return torch.nn.functional.normalize(centred, dim=0).float()


def near_duplicates(activations: Tensor, limit: float = DUPLICATE) -> Tensor:
    """bool [F]: features of a token sample [S, F] whose correlation with another one is above `limit` in size."""
    columns = standardised(activations)
    found = torch.zeros(columns.shape[1], dtype=torch.bool)
    for start in range(0, len(found), _BLOCK):
        part = (columns[:, start : start + _BLOCK].T @ columns).abs_()
        part[torch.arange(len(part)), torch.arange(len(part)) + start] = 0
        found[start : start + _BLOCK] = part.amax(1) > limit
    return found


def distinct_sets(exemplars: Tensor) -> int:
    """The number of different sets of exemplars, int64 [F, k]; their order does not matter."""
    return len(exemplars.sort(dim=1).values.unique(dim=0)) if len(exemplars) else 0


@dataclass(frozen=True)
class Match:
    """Matched activation correlation of two feature sets. mean: over the features of the smaller set, each with a
    partner of its own; random: the same with every feature of the second set read at shuffled tokens."""

    mean: float
    random: float


def matched_correlation(one: Tensor, other: Tensor, *, signed: bool = True, seed: int = 0) -> Match:
    """Stability: the mean correlation of one-to-one partners, chosen for the largest sum (Kuhn 1955).

    one [S, F], other [S, G]: activations on the same tokens. signed: a feature and its negative are different ones.
    """
    a, b = standardised(one), standardised(other)
    shuffled = b[torch.randperm(len(b), generator=torch.Generator().manual_seed(seed))]
    return Match(*(_best_sum(a.T @ x, signed) for x in (b, shuffled)))


def _best_sum(correlations: Tensor, signed: bool) -> float:
    values = correlations.numpy() if signed else correlations.abs().numpy()
    rows, columns = linear_sum_assignment(values, maximize=True)
    return float(values[rows, columns].mean()) if len(rows) else float("nan")


def matched_to_random(one: Tensor, other: Tensor, random: Tensor, *, signed: bool = True) -> Match:
    """The same with the features of a size-matched random set, [S, G], as what chance comes to."""
    a = standardised(one)
    return Match(*(_best_sum(a.T @ standardised(x), signed) for x in (other, random)))


def adjusted_rand_index(one: Tensor, other: Tensor) -> float:
    """ARI of two labelings int64 [n] (Hubert & Arabie 1985): 1 for the same partition, 0 on average by chance."""
    _, a = one.unique(return_inverse=True)
    _, b = other.unique(return_inverse=True)
    width = int(b.max()) + 1
    table = torch.bincount(a * width + b, minlength=(int(a.max()) + 1) * width).view(-1, width).double()

    def pairs(counts: Tensor) -> float:
        return float((counts * (counts - 1) / 2).sum())

    together, rows, columns = pairs(table), pairs(table.sum(1)), pairs(table.sum(0))
    every = pairs(torch.tensor([float(len(one))]))
    expected = rows * columns / every if every else 0.0
    largest = (rows + columns) / 2
    return 1.0 if largest == expected else (together - expected) / (largest - expected)


def auc(values: Tensor, truth: Tensor) -> Tensor:
    """[F], or [P, F] for P properties: the chance that an image with the property has the larger value than one without
    (Mann & Whitney 1947), equal ones half. values [N, F], truth bool [N] or [P, N]; NaN unless there are both kinds."""
    from scipy.stats import rankdata

    having = torch.atleast_2d(truth).double()
    positive = having.sum(1, keepdim=True)
    negative = having.shape[1] - positive
    ranks = torch.from_numpy(np.asarray(rankdata(values.numpy(), axis=0)))
    above = having @ ranks - positive * (positive + 1) / 2
    found = torch.where((positive > 0) & (negative > 0), above / (positive * negative), torch.nan).float()
    return found if truth.dim() > 1 else found[0]


@dataclass(frozen=True)
class ConceptAuc:
    """The feature that tells a known property best. sign: of its activation; chosen: AUC on the split that chose it;
    reported: on the other."""

    feature: int
    sign: int
    chosen: float
    reported: float


def concept_auc(high: Tensor, low: Tensor, truth: Tensor, choosing: Tensor) -> list[ConceptAuc]:
    """The best feature and end for each of P properties: chosen on the images of one split, reported on the others.

    high, low [N, F]: every image's maximum and minimum; truth bool [P, N], choosing bool [N]. At the negative end an
    image's value is minus its minimum.
    """
    ends = (high, -low)
    on_split = torch.stack([auc(end[choosing], truth[:, choosing]) for end in ends], 1)  # [P, 2, F]
    found = []
    for own, having in zip(on_split, truth, strict=True):
        end, feature = divmod(int(own.nan_to_num(-1).flatten().argmax()), high.shape[1])
        reported = auc(ends[end][~choosing][:, feature : feature + 1], having[~choosing])
        found.append(ConceptAuc(feature, 1 if end == 0 else -1, float(own[end, feature]), float(reported[0])))
    return found
