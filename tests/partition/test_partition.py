"""The partition's own views of itself, and what it says is wrong with stored indices."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from support import random_partition

from elude_runtime.partition import REST_CONCEPT, REST_EDGE, Partition


def changed(part: str, place: tuple[int, ...], value: float) -> Partition:
    made = random_partition(1, 5, 9, types=2)
    tensor = getattr(made, part).clone()
    tensor[place] = value
    return replace(made, **{part: tensor})


def test_a_well_formed_partition_has_no_problems() -> None:
    for seed in range(10):
        assert random_partition(seed, 5, 9, types=2).problems() == []


@pytest.mark.parametrize(
    ("part", "place", "value", "said"),
    [
        ("edges", (1, 2, 3), 200, "1 edges name a sub-unit out of range, the first at token type 1, neuron 2, input 3"),
        ("counts", (0, 1), 9, "claims 9 sub-units"),
        ("counts", (0, 1), 0, "out of range"),
        ("concept", (0, 0, 0), 40, "have no member"),
        ("mean", (1, 0, 0), float("nan"), "not finite"),
        ("std", (1, 0, 0), float("inf"), "not finite"),
        ("std", (0, 4, 1), -0.5, "negative"),
        ("sign", (0, 4, 1), 0, "neither 1 nor -1"),
    ],
)
def test_each_fault_is_named(part: str, place: tuple[int, ...], value: float, said: str) -> None:
    problems = changed(part, place, value).problems()
    assert any(said in p for p in problems), problems


def test_slots_and_concepts_name_the_background_last() -> None:
    p = random_partition(2, 6, 8, types=2, subunits=4)
    for t in range(2):
        slots, names = p.slots(t), p.concept_slots(t)
        assert torch.equal(slots == 4, p.edges[t] == REST_EDGE)
        assert torch.equal(names == p.concepts(t), p.concept[t] == REST_CONCEPT)
        for k in range(6):
            for j in range(8):
                assert int(p.edge_concepts(t)[k, j]) == int(names[k, slots[k, j]])


def test_a_dead_subunit_has_standard_deviation_one_for_division() -> None:
    p = random_partition(3, 6, 8)
    assert torch.equal(p.live(0), p.std[0] > 0)
    assert bool((p.member_std(0)[~p.live(0)] == 1).all())
    assert torch.equal(p.member_std(0)[p.live(0)], p.std[0][p.live(0)])


def test_no_concept_at_all() -> None:
    p = replace(random_partition(4, 3, 5), concept=torch.full((1, 3, 5), REST_CONCEPT, dtype=torch.int32))
    assert p.concepts(0) == 0 and p.problems() == [] and bool((p.concept_slots(0) == 0).all())
