"""Concepts: every sub-unit in one of them, none empty, co-active ones together; statistics as numpy has them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elude_runtime.partition import REST_CONCEPT
from elude_runtime.partition.concepts import (
    DRIFT_EDGES,
    QUANTILES,
    concept_activation,
    concept_share,
    describe,
    group_concepts,
    subunit_share,
)


def example(
    seed: int, tokens: int = 50, neurons: int = 6, subunits: int = 4
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(centred [S, d, M + 1], std, counts, weight) with unused numbers and one dead sub-unit."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, subunits + 1, (neurons,), generator=g).to(torch.uint8)
    centred = torch.randn(tokens, neurons, subunits + 1, generator=g)
    centred[:, :, :subunits] *= torch.arange(subunits) < counts.long()[:, None]
    centred[:, 0, 0] = 0
    return centred, centred.std(0, correction=0), counts, torch.randn(neurons, 12, generator=g)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), concepts=st.integers(1, 30))
def test_every_live_subunit_is_in_one_concept_and_none_is_empty(seed: int, concepts: int) -> None:
    centred, std, counts, weight = example(seed)
    found, sign = group_concepts(centred, std, counts, weight, concepts)
    assert found.shape == sign.shape == std.shape
    assert set(sign.flatten().tolist()) <= {1, -1}
    assert bool((found[:, -1] == REST_CONCEPT).all())
    named = (torch.arange(std.shape[1]) < counts.long()[:, None]) & (std > 0)
    assert bool((found[~named] == REST_CONCEPT).all())
    assert bool((found[named] != REST_CONCEPT).all())
    numbers = sorted(set(found[named].tolist()))
    assert numbers == list(range(len(numbers))) and len(numbers) <= concepts


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_concepts_are_numbered_by_their_share_of_variance(seed: int) -> None:
    centred, std, counts, weight = example(seed)
    found, _ = group_concepts(centred, std, counts, weight, 5)
    total = len(set(found[found != REST_CONCEPT].tolist()))
    share = concept_share(centred, found, total)[:total].tolist()
    assert share == sorted(share, reverse=True)


def test_coactive_subunits_are_grouped_whatever_their_size_and_sign() -> None:
    g = torch.Generator().manual_seed(3)
    sources = torch.randn(80, 3, generator=g)
    which = torch.randint(0, 3, (10, 4), generator=g)
    factor = torch.randn(10, 4, generator=g).sign() * 10 ** torch.randn(10, 4, generator=g)
    centred = torch.zeros(80, 10, 5)
    centred[..., :4] = sources[:, which] * factor + 1e-4 * torch.randn(80, 10, 4, generator=g)
    counts = torch.full((10,), 4, dtype=torch.uint8)
    std = centred.std(0, correction=0)
    found, sign = group_concepts(centred, std, counts, torch.randn(10, 20, generator=g), 3)
    assert found[:, :4].unique().numel() == 3
    members = zip(which.flatten(), found[:, :4].flatten(), strict=True)
    assert len({(int(a), int(b)) for a, b in members}) == 3
    relative = sign[:, :4] * factor.sign()
    assert all(relative[which == source].unique().numel() == 1 for source in range(3))


@pytest.mark.parametrize("tail", [1, -1])
def test_the_positive_end_is_that_of_the_longer_tail(tail: int) -> None:
    source = tail * torch.rand(60, generator=torch.Generator().manual_seed(8)).pow(4)
    source -= source.mean()
    centred = torch.zeros(60, 2, 3)
    centred[:, 0, 0], centred[:, 0, 1], centred[:, 1, 0] = 3 * source, source, -source
    std, counts = centred.std(0, correction=0), torch.tensor([2, 1], dtype=torch.uint8)
    found, sign = group_concepts(centred, std, counts, torch.randn(2, 2), 1)
    assert found[:, :2].tolist() == [[0, 0], [0, REST_CONCEPT]]
    assert (tail * sign[found == 0]).tolist() == [1, 1, -1]
    assert bool((sign[found == REST_CONCEPT] == 1).all())


def test_more_concepts_than_distinct_neurons() -> None:
    g = torch.Generator().manual_seed(9)
    sources = torch.randn(200, 4, generator=g)
    centred = torch.zeros(200, 1, 5)
    centred[:, 0, :4] = sources
    std, counts = centred.std(0, correction=0), torch.tensor([4], dtype=torch.uint8)
    found, _ = group_concepts(centred, std, counts, torch.ones(1, 6), 4)
    assert found[0, :4].unique().numel() > 1


def test_neurons_that_never_vary_take_no_concept() -> None:
    """Their rows may be the longest of all; eight clear concepts among the other neurons are found all the same."""
    g = torch.Generator().manual_seed(6)
    sources, weight = torch.randn(300, 8, generator=g), torch.randn(40, 60, generator=g)
    centred = 0.1 * torch.randn(300, 40, 5, generator=g)
    which = torch.randint(0, 8, (40, 4), generator=g)
    centred[..., :4] += sources[:, which]
    centred[..., 4] = 0
    centred[:, :16] = 0
    weight[:16] *= 3
    counts = torch.full((40,), 4, dtype=torch.uint8)
    found, _ = group_concepts(centred, centred.std(0, correction=0), counts, weight, 8)
    assert found[16:, :4].unique().numel() == 8
    assert len(set(zip(which[16:].flatten().tolist(), found[16:, :4].flatten().tolist(), strict=True))) == 8


def test_twice_the_same() -> None:
    first, again = (group_concepts(*example(4), 4) for _ in range(2))
    assert all(map(torch.equal, first, again))


def test_a_layer_that_never_varies() -> None:
    centred = torch.zeros(10, 3, 4)
    counts = torch.full((3,), 3, dtype=torch.uint8)
    found, _ = group_concepts(centred, torch.zeros(3, 4), counts, torch.randn(3, 5), 4)
    assert bool((found == REST_CONCEPT).all())
    assert concept_share(centred, found, 0).tolist() == [0.0]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_shares_are_covariances_with_the_output_and_add_up(seed: int) -> None:
    centred, std, counts, weight = example(seed)
    concept, _ = group_concepts(centred, std, counts, weight, 4)
    total = len(set(concept[concept != REST_CONCEPT].tolist()))
    values = centred.double().numpy()
    y = values.sum(2)
    variance = y.var(0).sum()
    expected = np.zeros(total + 1)
    own = np.zeros(std.shape)
    for k in range(values.shape[1]):
        for m in range(values.shape[2]):
            own[k, m] = np.cov(values[:, k, m], y[:, k], bias=True)[0, 1] / variance
            c = int(concept[k, m])
            expected[total if c == REST_CONCEPT else c] += own[k, m]
    np.testing.assert_allclose(subunit_share(centred), own, atol=1e-5)
    np.testing.assert_allclose(concept_share(centred, concept, total), expected, atol=1e-5)
    assert float(concept_share(centred, concept, total).sum()) == pytest.approx(1, abs=1e-5)


def test_activation_is_the_mean_signed_z_score_of_live_members() -> None:
    centred, std, counts, weight = example(5)
    concept, sign = group_concepts(centred, std, counts, weight, 4)
    assert -1 in sign
    total = len(set(concept[concept != REST_CONCEPT].tolist()))
    found = concept_activation(centred, std, concept, sign, total)
    for c in [*range(total), REST_CONCEPT]:
        members = [(k, m) for k in range(6) for m in range(5) if int(concept[k, m]) == c and float(std[k, m]) > 0]
        expected = sum(sign[k, m] * centred[:, k, m] / std[k, m] for k, m in members) / len(members)
        torch.testing.assert_close(found[:, total if c == REST_CONCEPT else c], expected, rtol=1e-4, atol=1e-5)


def test_statistics_are_numpys(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(400, 9, generator=torch.Generator().manual_seed(6)) ** 3
    share = torch.arange(9.0)
    found = describe(values, share)
    x = values.double().numpy()
    np.testing.assert_allclose(found.mean, x.mean(0), atol=1e-5)
    np.testing.assert_allclose(found.std, x.std(0), rtol=1e-5)
    np.testing.assert_allclose(found.quantiles, np.quantile(x, QUANTILES, axis=0).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.drift_edges, np.quantile(x, DRIFT_EDGES, axis=0).T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.density, (np.abs(x - x.mean(0)) > 2 * x.std(0)).mean(0), atol=1e-6)
    assert found.share is share
    monkeypatch.setattr("elude_runtime.partition.concepts._CHUNK_FLOATS", 800)
    assert torch.equal(describe(values, share).quantiles, found.quantiles)


def test_a_feature_that_never_varies_is_described() -> None:
    found = describe(torch.zeros(30, 2), torch.zeros(2))
    assert found.std.tolist() == found.density.tolist() == [0, 0]
    assert bool(torch.isfinite(found.quantiles).all())
