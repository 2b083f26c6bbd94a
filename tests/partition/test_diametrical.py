"""Clusters up to sign, and what seeds mean; pivoted QR against SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch

from elude_runtime.partition.diametrical import diametrical, distinct_rows, farthest


def lines(seed: int, per_line: int = 30, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(points [L, S], which line [L], at which end [L])"""
    g = torch.Generator().manual_seed(seed)
    directions = torch.linalg.qr(torch.randn(12, 4, generator=g))[0].T
    which = torch.arange(4).repeat(per_line)
    end = torch.randn(len(which), generator=g).sign()
    return end[:, None] * directions[which] + noise * torch.randn(len(which), 12, generator=g), which, end


@pytest.mark.parametrize("seed", range(5))
def test_points_at_both_ends_of_a_line_are_one_cluster(seed: int) -> None:
    points, which, end = lines(seed)
    labels, signs = diametrical(points, points[:4], 4)  # a point of each line
    assert torch.equal(labels, which)
    assert torch.equal(signs, end * end[:4][which])  # the positive end is the seed's


def test_a_fixed_point_is_one_of_lloyds_on_points_and_their_mirror_images() -> None:
    """k-means of the points at their own ends keeps the clusters: each centre is the nearest of all, and of all
    mirrored ones, to its members (unit lengths, so that nearest is most parallel)."""
    points, _, _ = lines(7, noise=0.4)
    points = points / points.norm(dim=1, keepdim=True)
    labels, signs = diametrical(points, points[:4], 4, iterations=200)
    centres = torch.stack([(points * signs[:, None])[labels == c].mean(0) for c in range(4)])
    centres = centres / centres.norm(dim=1, keepdim=True)
    distance = torch.cdist(points, torch.cat([centres, -centres]))
    assert torch.equal(distance.argmin(1) % 4, labels)
    assert torch.equal(torch.where(distance.argmin(1) < 4, 1.0, -1.0), signs)


def test_seeds_beyond_the_number_of_clusters_are_given_up() -> None:
    points, which, _ = lines(3, noise=0.05)
    seeds = torch.cat([torch.randn(3, 12, generator=torch.Generator().manual_seed(1)), points[:4]])
    labels, _ = diametrical(points, seeds, 4)
    assert torch.equal(labels.unique(), torch.arange(4))
    assert len(set(zip(labels.tolist(), which.tolist(), strict=True))) == 4
    assert len(diametrical(points, seeds, 2)[0].unique()) == 2


def test_of_clusters_along_one_line_one_is_left() -> None:
    points, which, _ = lines(5, noise=0.02)
    labels, _ = diametrical(points, torch.cat([points[:4], points[4:8], points[8:12]]), 12)
    assert len(labels.unique()) == 4
    assert len(set(zip(labels.tolist(), which.tolist(), strict=True))) == 4


def test_distinct_rows_are_those_of_pivoted_qr() -> None:
    weight = torch.randn(30, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = scipy.linalg.qr(weight.T.numpy(), pivoting=True, mode="economic")[2]
    assert distinct_rows(weight.float(), 12) == expected[:12].tolist()
    assert distinct_rows(weight, 30) == expected[:12].tolist()  # the rank
    assert distinct_rows(torch.zeros(3, 4), 2) == []


def test_farthest_points_follow_the_seeds() -> None:
    points = torch.eye(4)[[0, 0, 1, 2]] * torch.tensor([1.0, -2.0, 3.0, 0.5])[:, None]
    found = farthest(points, torch.eye(4)[:1], 3)
    np.testing.assert_array_equal(found, np.array([[1, 0, 0, 0], [0, 3, 0, 0], [0, 0, 0.5, 0]]))
    assert torch.equal(farthest(points, points, 2), points[:2])
