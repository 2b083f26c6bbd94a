"""k-means: as good as scikit-learn's on easy data, the same alone and in a batch, and sound on degenerate data."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from elude_runtime.partition.kmeans import _seed, kmeans


def blobs(seed: int, clusters: int = 4, each: int = 15, dimensions: int = 5) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    centres = 20 * torch.randn(clusters, 1, dimensions, generator=g)
    return (centres + torch.randn(clusters, each, dimensions, generator=g)).flatten(0, 1)


def draws(seed: int, batch: int, clusters: int) -> torch.Tensor:
    return torch.rand(batch, clusters, generator=torch.Generator().manual_seed(seed))


def inertia(points: torch.Tensor, labels: torch.Tensor, centres: torch.Tensor) -> float:
    return float((points - centres[labels]).square().sum())


def test_reaches_scikit_learns_inertia_on_blobs() -> None:
    points = torch.stack([blobs(s) for s in range(6)])
    labels, centres = kmeans(points, 4, draws(1, 6, 4))
    for p, l, c in zip(points, labels, centres, strict=True):
        best = KMeans(4, n_init=10, random_state=0).fit(p.numpy()).inertia_
        assert inertia(p, l, c) <= 1.001 * best


def test_labels_are_the_nearest_centres_and_centres_the_means() -> None:
    points = torch.randn(3, 60, 4, generator=torch.Generator().manual_seed(2))
    labels, centres = kmeans(points, 5, draws(3, 3, 5), iterations=200)
    for p, l, c in zip(points, labels, centres, strict=True):
        assert torch.equal(l, torch.cdist(p, c).argmin(1))
        for cluster in l.unique():
            torch.testing.assert_close(c[cluster], p[l == cluster].mean(0), rtol=1e-4, atol=1e-5)


def test_more_iterations_never_make_it_worse() -> None:
    points = torch.randn(1, 80, 6, generator=torch.Generator().manual_seed(4))
    found = [
        inertia(points[0], *(part[0] for part in kmeans(points, 6, draws(5, 1, 6), iterations=i))) for i in range(1, 9)
    ]
    assert all(b <= a * (1 + 1e-5) for a, b in itertools.pairwise(found))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), clusters=st.integers(1, 5))
def test_a_problem_is_solved_the_same_alone_and_in_a_batch(seed: int, clusters: int) -> None:
    points = torch.stack([blobs(seed + i, clusters, 8) for i in range(4)])
    chosen = draws(seed, 4, clusters)
    labels, centres = kmeans(points, clusters, chosen)
    for i in range(4):
        alone_labels, alone_centres = kmeans(points[i : i + 1], clusters, chosen[i : i + 1])
        assert torch.equal(labels[i], alone_labels[0])
        torch.testing.assert_close(centres[i], alone_centres[0], rtol=1e-4, atol=1e-4)


def test_same_draws_give_the_same_bits() -> None:
    points = torch.randn(5, 40, 7, generator=torch.Generator().manual_seed(6))
    first, again = (kmeans(points.clone(), 4, draws(7, 5, 4)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("clusters", [1, 3, 6])
def test_fewer_distinct_points_than_clusters(clusters: int) -> None:
    points = torch.tensor([[0.0, 0.0], [0.0, 0.0], [5.0, 1.0], [5.0, 1.0], [5.0, 1.0], [0.0, 0.0]])[None]
    labels, centres = kmeans(points, clusters, draws(8, 1, clusters))
    assert bool(torch.isfinite(centres).all())
    expected = 0.0 if clusters > 1 else float((points[0] - points[0].mean(0)).square().sum())
    assert inertia(points[0], labels[0], centres[0]) == pytest.approx(expected, abs=1e-6)


def test_all_points_equal() -> None:
    labels, centres = kmeans(torch.full((2, 5, 3), 0.25), 3, draws(9, 2, 3))
    assert bool((centres == 0.25).all()) and labels.unique().numel() == 1


@pytest.mark.parametrize(("clusters", "points"), [(0, 4), (5, 4)])
def test_impossible_numbers_of_clusters_are_refused(clusters: int, points: int) -> None:
    with pytest.raises(ValueError, match="cannot make"):
        kmeans(torch.zeros(1, points, 2), clusters, torch.zeros(1, max(1, clusters)))


def test_seeds_are_drawn_by_squared_distance() -> None:
    """Second seeds after a first one at 0: probabilities 1 : 4 : 9 for points at 1, 2 and 3."""
    points = torch.tensor([0.0, 1.0, 2.0, 3.0])[None, :, None].expand(4000, 4, 1)
    chosen = torch.rand(4000, 2, generator=torch.Generator().manual_seed(10))
    chosen[:, 0] = 0.0  # the first point
    seeds = _seed(points, 2, chosen)
    assert bool((seeds[:, 0] == 0).all())
    share = np.array([float((seeds[:, 1, 0] == v).float().mean()) for v in (0, 1, 2, 3)])
    np.testing.assert_allclose(share, np.array([0, 1, 4, 9]) / 14, atol=0.03)


def test_the_first_seed_is_uniform_and_draws_reach_both_ends() -> None:
    points = torch.arange(4.0)[None, :, None]
    for draw, expected in ((0.0, 0), (0.26, 1), (0.74, 2), (0.999999, 3)):
        assert float(_seed(points, 1, torch.tensor([[draw]]))[0, 0, 0]) == expected
    last = _seed(points, 2, torch.tensor([[0.0, 1.0 - 2**-24]]))[0, 1, 0]
    assert float(last) == 3
