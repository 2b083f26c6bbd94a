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
    labels = torch.zeros(points.shape[:2], dtype=torch.int64, device=points.device)
    # Problems converge at different times: those that still move are gathered anew whenever half of them have stopped.
    active = torch.arange(len(points), device=points.device)
    current, middle = points, centres
    nearest = _nearest(current, middle)
    for _ in range(iterations):
        member = torch.nn.functional.one_hot(nearest, clusters).to(points.dtype)  # [b, N, clusters]
        sizes = member.sum(1)
        means = member.transpose(1, 2) @ current / sizes.clamp(min=1)[..., None]
        middle = torch.where(sizes[..., None] > 0, means, middle)
        moved = _nearest(current, middle)
        moving = (moved != nearest).any(1)
        nearest = moved
        if int(moving.sum()) <= len(active) // 2:
            labels[active], centres[active] = nearest, middle
            active, current, middle, nearest = active[moving], current[moving], middle[moving], nearest[moving]
            if not len(active):
                return labels, centres
    labels[active], centres[active] = nearest, middle
    return labels, centres


def _nearest(points: Tensor, centres: Tensor) -> Tensor:
    """int64 [B, N]: index of the closest centre; |x|^2 is the same for all centres and left out."""
    return (centres.square().sum(-1)[:, None] - points @ (2 * centres).transpose(1, 2)).argmin(-1)


def _seed(points: Tensor, clusters: int, draws: Tensor) -> Tensor:
    """k-means++: each next seed is drawn with probability proportional to its squared distance to the seeds so far."""
    batch = torch.arange(points.shape[0], device=points.device)
    norms = points.norm(dim=-1).square()
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
