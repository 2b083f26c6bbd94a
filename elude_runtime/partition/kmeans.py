"""k-means as one batched tensor computation, deterministic for given random numbers."""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(points: Tensor, clusters: int, draws: Tensor, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """Lloyd's algorithm from k-means++ seeds (Arthur & Vassilvitskii 2007), for a batch of independent problems.

    points [B, N, n]; draws [B, clusters] uniform random numbers in [0, 1) that choose the seeds, so that a problem's
    result does not depend on which others stand in the batch. Returns labels int64 [B, N] and centres
    [B, clusters, n]. A cluster that loses its last point keeps its centre; ties go to the lower index.
    """
    if clusters < 1 or points.shape[1] < clusters:
        raise ValueError(f"cannot make {clusters} clusters of {points.shape[1]} points")
    centres = _seed(points, clusters, draws)
    labels = _nearest(points, centres)
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(labels, clusters).to(points.dtype)  # [B, N, clusters]
        sizes = member.sum(1)
        means = member.transpose(1, 2) @ points / sizes.clamp(min=1)[..., None]
        centres = torch.where(sizes[..., None] > 0, means, centres)
        moved = _nearest(points, centres)
        if torch.equal(moved, labels):
            break
        labels = moved
    return labels, centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 [B, N]: index of the closest centre; |x|^2 is the same for all centres and left out."""
    return (centres.square().sum(-1)[:, None] - 2 * points @ centres.transpose(1, 2)).argmin(-1)


def _seed(points: Tensor, clusters: int, draws: Tensor) -> Tensor:
    """k-means++: each next seed is drawn with probability proportional to its squared distance to the seeds so far."""
    batch = torch.arange(points.shape[0], device=points.device)
    norms = points.square().sum(-1)
    count = points.shape[1]
    chosen = (draws[:, 0] * count).long().clamp(max=count - 1)
    seeds = [points[batch, chosen]]
    distance = torch.full_like(norms, torch.inf)
    for c in range(1, clusters):
        last = seeds[-1]
        to_last = norms + last.square().sum(-1)[:, None] - 2 * (points @ last[..., None])[..., 0]
        distance = torch.minimum(distance, to_last.clamp(min=0))
        cumulative = distance.double().cumsum(1)
        threshold = draws[:, c : c + 1].double() * cumulative[:, -1:]
        chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0].clamp(max=count - 1)
        seeds.append(points[batch, chosen])
    return torch.stack(seeds, 1)
