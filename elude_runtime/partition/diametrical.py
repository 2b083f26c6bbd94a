"""Diametrical clustering: points that lie along one line are one cluster, at whichever end of it."""

from __future__ import annotations

import torch
from torch import Tensor

ALIKE = 0.95  # |correlation| of two clusters' lines beyond which one of them says nothing that the other does not
_PARALLEL = 1e-9  # of a row's squared length: what is left of it when it lies in the span of the others


def diametrical(points: Tensor, seeds: Tensor, clusters: int, iterations: int = 25) -> tuple[Tensor, Tensor]:
    """At most `clusters` clusters of points [L, S] up to their sign: labels int64 [L], none of them unused, and signs
    [L], 1 or -1, along the cluster's line. seeds [K, S]: directions to begin at.

    As Dhillon, Marcotte & Roshan (Bioinformatics 2003) have it, with the signed mean of the members as a cluster's line
    in place of their leading singular vector. Each seed is first replaced by its pattern, the points weighted by their
    product with it, which is clearer than the seed itself (RESEARCH.md). Once all have settled, those are given up that
    lie along a larger one (`ALIKE`), and of more than there are to be the ones with the fewest members; the rest settle
    again. Ties go to the lower index.
    """
    lines = _unit((_unit(seeds) @ points.T) @ points)
    while True:
        labels, signs, lines = _settle(points, lines, iterations)
        sizes = torch.bincount(labels, minlength=len(lines))
        chosen = _distinct(lines, sizes)[:clusters].sort().values
        if len(chosen) == int((sizes > 0).sum()):
            return labels.unique(return_inverse=True)[1], signs
        lines = lines[chosen]


def _distinct(lines: Tensor, sizes: Tensor) -> Tensor:
    """Numbers of the lines with members, the largest first, without those that lie along a larger one."""
    alike = (lines @ lines.T).abs() > ALIKE
    chosen: list[int] = []
    for line in sizes.argsort(descending=True, stable=True).tolist():
        if sizes[line] and not bool(alike[line, chosen].any()):
            chosen.append(line)
    return torch.tensor(chosen, dtype=torch.int64)


def _settle(points: Tensor, lines: Tensor, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lloyd's steps until no point changes its line: (labels [L], signs [L], lines [K, S])."""
    labels, signs = _nearest(points, lines)
    for _ in range(iterations):
        lines = _unit(signed_sums(points, labels, signs, len(lines)))
        before = labels
        labels, signs = _nearest(points, lines)
        if torch.equal(labels, before):
            break
    return labels, signs, lines


def signed_sums(points: Tensor, labels: Tensor, signs: Tensor, clusters: int) -> Tensor:
    """[K, S]: the sum of each cluster's points [L, S], by their signs."""
    return points.new_zeros(clusters, len(points)).scatter_(0, labels[None], signs[None]) @ points


def _nearest(points: Tensor, lines: Tensor) -> tuple[Tensor, Tensor]:
    """The line of every point, that of the largest product, and the product's sign."""
    products = points @ lines.T
    labels = products.abs().argmax(1)
    along = products.gather(1, labels[:, None])[:, 0]
    return labels, torch.where(along < 0, -1, 1).to(points.dtype)


def distinct_rows(weight: Tensor, number: int) -> list[int]:
    """At most `number` rows of weight [d, m], each the one that those before explain least: QR with column pivoting
    (Golub 1965), up to the matrix's rank."""
    chosen: list[int] = []
    weight = weight.double()
    lengths = weight.square().sum(1)
    left = lengths.clone()
    basis = weight.new_zeros(min(number, len(weight)), weight.shape[1])
    while len(chosen) < len(basis):
        best = int(left.argmax())
        if not left[best] > _PARALLEL * lengths[best]:
            break
        row = weight[best]
        for _ in range(2):  # once more, for what rounding left
            row = row - (basis @ row) @ basis
        row = row / row.norm()
        basis[len(chosen)] = row
        left = (left - (weight @ row).square()).clamp(min=0)
        left[best] = 0
        chosen.append(best)
    return chosen


def farthest(points: Tensor, seeds: Tensor, number: int) -> Tensor:
    """seeds [K, S] and after them points [L, S], each the one least along any of those before: [number, S].

    number: no more than K + L."""
    if len(seeds) >= number:
        return seeds[:number]
    units = _unit(points)
    along = (units @ _unit(seeds).T).abs().amax(1) if len(seeds) else points.new_zeros(len(points))
    chosen: list[int] = []
    while len(seeds) + len(chosen) < number:
        chosen.append(int(along.argmin()))
        along = torch.maximum(along, (units @ units[chosen[-1]]).abs())
        along[chosen] = torch.inf
    return torch.cat([seeds, points[chosen]])


def _unit(rows: Tensor) -> Tensor:
    """Rows at unit length; zero ones stay zero."""
    return rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
