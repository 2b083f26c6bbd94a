"""Every edge in one place: the pieces of a weight matrix that a partition makes add up to it again, exactly."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_partition

from elude_runtime.partition.sums import (
    concept_mean,
    concept_weight,
    full_width,
    neuron_groups,
    subunit_weight,
    sum_edges,
    sum_subunits,
    wide_weight,
)

SIZES = {"seed": st.integers(0, 10**6), "q": st.sampled_from([1, 4]), "types": st.sampled_from([1, 2])}


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_wide_rows_are_disjoint_and_add_up_exactly(seed: int, q: int, types: int) -> None:
    p = random_partition(seed, 5, 8, types)
    weight = torch.randn(5, 8, q, generator=torch.Generator().manual_seed(seed))
    for t in range(types):
        wide = wide_weight(weight, p.slots(t), p.subunits + 1)
        assert torch.equal(wide.sum(1), weight)
        assert bool(((wide != 0).sum(1) <= 1).all())


@settings(max_examples=20, deadline=None)
@given(**SIZES)
def test_concept_weights_are_disjoint_and_add_up_exactly(seed: int, q: int, types: int) -> None:
    p = random_partition(seed, 5, 8, types)
    weight = torch.randn(5, 8, q, generator=torch.Generator().manual_seed(seed))
    for t in range(types):
        parts = torch.stack([concept_weight(weight, p, t, c) for c in range(p.concepts(t) + 1)])
        assert torch.equal(parts.sum(0), weight)
        assert bool(((parts != 0).sum(0) <= 1).all())
        means = torch.stack([concept_mean(p, t, c) for c in range(p.concepts(t) + 1)]).sum(0)
        torch.testing.assert_close(means, p.mean[t].sum(-1), rtol=1e-5, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([1, 2, 3]))
def test_a_subunits_readout_is_its_own_rows_in_its_groups_columns(seed: int, groups: int) -> None:
    p = random_partition(seed, 6, 4)
    weight = torch.randn(6, 4, 2, generator=torch.Generator().manual_seed(seed))
    for k in range(6):
        for slot in range(p.subunits + 1):
            found = subunit_weight(weight, p, 0, torch.tensor([k]), torch.tensor([slot]), groups)[0]
            expected = torch.zeros(groups, 4, 2)
            expected[k // (6 // groups)] = weight[k] * (p.slots(0)[k] == slot)[:, None]
            assert torch.equal(found, expected.flatten(0, 1))


def test_group_of_every_neuron() -> None:
    assert neuron_groups(6, 3).tolist() == [0, 0, 1, 1, 2, 2]
    rows = torch.ones(2, 1, 1)
    assert full_width(rows, torch.tensor([0, 2]), 3)[..., 0].tolist() == [[1, 0, 0], [0, 0, 1]]


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_sums_by_subunit_and_by_concept(seed: int) -> None:
    p = random_partition(seed, 5, 8)
    values = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    slots, names, total = p.slots(0), p.concept_slots(0), p.concepts(0) + 1
    subunits, expected = (
        sum_edges(values, slots, p.subunits + 1),
        torch.zeros(2, 5, p.subunits + 1, dtype=torch.float64),
    )
    concepts = torch.zeros(2, total, dtype=torch.float64)
    for k in range(5):
        for j in range(8):
            expected[:, k, slots[k, j]] += values[:, k, j]
            concepts[:, names[k, slots[k, j]]] += values[:, k, j]
    torch.testing.assert_close(subunits, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(sum_subunits(subunits, names, total), concepts, rtol=1e-12, atol=1e-12)
