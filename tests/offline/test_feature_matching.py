"""Streamed moments against numpy, matching against brute force, random versions of the same sizes."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import random_partition, state_of
from torch import Tensor, nn

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.offline.feature_matching import (
    LayerMoments,
    Moments,
    agreeing_signs,
    inverse,
    made_of,
    match,
    runner_up,
    shuffle_concepts,
    shuffle_edges,
)
from elude_runtime.partition import REST_CONCEPT


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("groups", [1, 2])
def test_agreeing_signs_are_those_of_the_covariance_with_the_plain_mean(groups: int) -> None:
    partition = random_partition(5, 6, 9, types=1)
    weight = torch.randn(6, 9, 2, generator=generator(1), dtype=torch.float64)
    inputs = torch.randn(70, groups, 9, 2, generator=generator(2), dtype=torch.float64) + 3
    found = agreeing_signs(weight, groups, partition, 0, inputs.flatten(1))
    slots, width = partition.slots(0), partition.subunits + 1
    t = torch.zeros(70, 6, width, dtype=torch.float64)
    for k in range(6):
        for j in range(9):
            t[:, k, slots[k, j]] += inputs[:, k * groups // 6, j] @ weight[k, j]
    t -= t.mean(0)
    for concept in partition.concept_slots(0).unique():
        members = (partition.concept_slots(0) == concept) & partition.live(0)
        mean = (t[:, members] / partition.std[0][members]).mean(1) if members.any() else torch.zeros(70)
        covariance = (t[:, members] * mean[:, None]).mean(0)
        assert torch.equal(found[members], torch.where(covariance < 0, -1, 1).to(torch.int8))


class TestMoments:
    @settings(max_examples=20)
    @given(seed=st.integers(0, 999), step=st.integers(1, 40), offset=st.sampled_from([0.0, 3.0, 1e5]))
    def test_covariances_are_numpys(self, seed: int, step: int, offset: float) -> None:
        old = torch.randn(40, 2, 3, generator=generator(seed)).double() + offset
        new = torch.randn(40, 2, 4, generator=generator(seed + 1)).double() - offset + old[..., :1]
        moments = Moments()
        for a, b in zip(old.split(step), new.split(step), strict=True):
            moments.add(a, b)
        for block in range(2):
            expected = np.cov(torch.cat([old, new], -1)[:, block].T.numpy(), bias=True)
            oo, on, nn_ = (c[block].numpy() for c in moments.covariances())
            np.testing.assert_allclose(oo, expected[:3, :3], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(on, expected[:3, 3:], rtol=1e-8, atol=1e-8)
            np.testing.assert_allclose(nn_, expected[3:, 3:], rtol=1e-8, atol=1e-8)

    def test_one_set_is_its_own_counterpart(self) -> None:
        x = torch.randn(30, 1, 5, generator=generator(1))
        moments = Moments()
        for part in x.split(7):
            moments.add(part)
        for found in moments.covariances():
            np.testing.assert_allclose(found[0].numpy(), np.cov(x[:, 0].T.double().numpy(), bias=True), rtol=1e-10)


def conv_state(seed: int, **partition: int) -> SplitState:
    """A 3 x 3 convolution in two groups, 4 x 4 positions."""
    torch.manual_seed(3)
    conv = nn.Conv2d(6, 8, 3, padding=1, groups=2)
    return state_of(conv, TokenLayout(16, 0, (4, 4)), random_partition(seed, 8, 3, **partition))


def linear_state(seed: int, **partition: int) -> SplitState:
    """A linear layer on two prefix tokens and six others."""
    torch.manual_seed(4)
    return state_of(nn.Linear(9, 5), TokenLayout(8, 2, None), random_partition(seed, 5, 9, types=2, **partition))


def inputs(state: SplitState, seed: int) -> Tensor:
    """30 images' inputs of the layer, whose channels are correlated and not centred."""
    shape = (30, 6, 4, 4) if state.linear.is_conv else (30, 8, 9)
    x = torch.randn(shape, generator=generator(seed))
    return x + 0.7 * x.roll(1, 1) + 2


CASES = [("conv", 0), ("linear", 0), ("linear", 1)]


@pytest.mark.parametrize(("kind", "token_type"), CASES)
@pytest.mark.parametrize("shared", [True, False])
class TestCorrelations:
    """Against numpy.corrcoef of activations that the split layer itself gives."""

    def both(self, kind: str, token_type: int, shared: bool) -> tuple[LayerMoments, list[SplitState], list[Tensor]]:
        make = conv_state if kind == "conv" else linear_state
        states = [make(1), make(2, subunits=3, concepts=4)]
        x = [inputs(states[0], 5)]
        x.append(x[0] if shared else x[0] + 0.5 * inputs(states[0], 6))
        moments = LayerMoments(states[0], states[1], token_type, shared=shared, subunits=True)
        for start in range(0, 30, 7):
            reads = [
                s.linear.patches(v[start : start + 7])[:, s.layout.slices[token_type]].flatten(0, 1)
                for s, v in zip(states, x, strict=True)
            ]
            moments.add(reads[0], reads[1])
        return moments, states, x

    def test_concepts(self, kind: str, token_type: int, shared: bool) -> None:
        moments, states, x = self.both(kind, token_type, shared)
        acts = [
            s.concept_activations(v, token_type).flatten(0, 1)[:, :-1].double().detach().numpy()
            for s, v in zip(states, x, strict=True)
        ]
        found = moments.concept_correlations()
        sizes = acts[0].shape[1], acts[1].shape[1]
        assert found.values.shape == (1, *sizes) and found.random.shape == (1, *sizes)
        expected = np.corrcoef(acts[0].T, acts[1].T)
        assert found.live_old.all() and found.live_new.all()
        np.testing.assert_allclose(found.values[0], expected[: sizes[0], sizes[0] :], atol=2e-5)
        np.testing.assert_allclose(found.among_old, expected[: sizes[0], : sizes[0]], atol=2e-5)
        np.testing.assert_allclose(found.among_new, expected[sizes[0] :, sizes[0] :], atol=2e-5)

    def test_subunits(self, kind: str, token_type: int, shared: bool) -> None:
        moments, states, x = self.both(kind, token_type, shared)
        sums = [
            s.sums(v)[:, s.layout.slices[token_type], :, :-1].flatten(0, 1).double().detach().numpy()
            for s, v in zip(states, x, strict=True)
        ]
        parts = list(moments.subunit_correlations())
        assert [n for p in parts for n in range(p.first, p.first + len(p.values))] == list(
            range(states[0].linear.neurons)
        )
        checked = 0
        for part in parts:
            for block, values in enumerate(part.values):
                neuron = part.first + block
                counts = [int(s.partition.counts[token_type, neuron]) for s in states]
                assert part.live_old[block].sum() == counts[0] and part.live_new[block].sum() == counts[1]
                expected = np.corrcoef(sums[0][:, neuron, : counts[0]].T, sums[1][:, neuron, : counts[1]].T)
                np.testing.assert_allclose(
                    values[: counts[0], : counts[1]], expected[: counts[0], counts[0] :], atol=2e-5
                )
                assert not values[counts[0] :].any() and not values[:, counts[1] :].any()
                checked += counts[0] * counts[1]
        assert checked > 20


def test_subunits_of_a_neuron_come_in_chunks_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    states = [conv_state(1), conv_state(2)]
    moments = LayerMoments(states[0], states[1], 0, shared=True, subunits=True)
    reads = states[0].linear.patches(inputs(states[0], 5)).flatten(0, 1)
    moments.add(reads, reads)
    whole = list(moments.subunit_correlations())
    monkeypatch.setattr("elude_runtime.offline.feature_matching._CHUNK_FLOATS", 1)
    single = list(moments.subunit_correlations())
    assert len(single) == 8 and len(whole) == 2  # a chunk a neuron; a chunk a group
    for name in ("values", "random", "live_old", "live_new"):
        together = [np.concatenate([getattr(p, name) for p in parts]) for parts in (whole, single)]
        np.testing.assert_allclose(together[0], together[1], atol=1e-12)


def test_a_feature_that_does_not_vary_is_dead() -> None:
    """A constant input varies by rounding only, which must not look like a correlation."""
    state = linear_state(1)
    x = inputs(state, 5)
    used = state.partition.edges[0, 0] == 0
    x[..., used] = torch.tensor(1234.567)
    x[3:9, :, used] *= 1 + 2e-7  # what another batch shape does to a constant
    moments = LayerMoments(state, state, 0, shared=True, subunits=True)
    reads = state.linear.patches(x)[:, state.layout.slices[0]].flatten(0, 1)
    moments.add(reads, reads)
    (found,) = moments.subunit_correlations()
    assert not found.live_old[0, 0] and not found.live_new[0, 0]
    assert not found.values[0, 0].any() and not found.values[0, :, 0].any()
    assert found.live_old[1:].sum() > 5


class TestRandomVersions:
    def test_edges_keep_sizes_and_signs(self) -> None:
        slots = torch.randint(0, 5, (6, 50), generator=generator(1))
        sign = torch.randint(-1, 2, (6, 50), generator=generator(2))
        dealt = shuffle_edges(slots, sign, generator(3))
        assert not torch.equal(dealt, slots)
        for neuron in range(6):
            for s in (-1, 0, 1):
                of = sign[neuron] == s
                assert torch.equal(
                    torch.bincount(dealt[neuron][of], minlength=5), torch.bincount(slots[neuron][of], minlength=5)
                )

    def test_every_edge_of_a_sign_has_the_same_chance(self) -> None:
        slots = torch.tensor([[0, 1, 1, 1]]).expand(2000, -1)
        dealt = shuffle_edges(slots, torch.ones(2000, 4), generator(1))
        share = (dealt == 0).double().mean(0)
        assert float((share - 0.25).abs().max()) < 0.05

    def test_concepts_keep_sizes_and_rest(self) -> None:
        concept = random_partition(1, 30, 9, concepts=5).concept[0]
        dealt = shuffle_concepts(concept, generator(1))
        assert torch.equal(dealt == REST_CONCEPT, concept == REST_CONCEPT) and not torch.equal(dealt, concept)
        named = concept != REST_CONCEPT
        assert torch.equal(torch.bincount(dealt[named]), torch.bincount(concept[named]))


def best_sum(values: np.ndarray, live_old: np.ndarray, live_new: np.ndarray) -> float:
    """The largest sum of positive correlations over all one-to-one assignments, tried one by one."""
    weights = np.where(live_old[:, None] & live_new, values, 0).clip(min=0)
    if weights.shape[0] > weights.shape[1]:
        weights = weights.T
    rows, columns = weights.shape
    return max(
        (float(sum(weights[i, p[i]] for i in range(rows))) for p in permutations(range(columns), rows)), default=0.0
    )


@st.composite
def correlations(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, columns, seed = draw(st.integers(1, 5)), draw(st.integers(1, 5)), draw(st.integers(0, 10**6))
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (rows, columns))
    live = rng.random(rows) > 0.2, rng.random(columns) > 0.2
    values[~live[0]] = 0
    values[:, ~live[1]] = 0
    return values, *live


class TestMatching:
    @settings(max_examples=100)
    @given(case=correlations())
    def test_the_sum_is_that_of_brute_force(self, case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        values, live_old, live_new = case
        partner = match(values, live_old, live_new)
        taken = partner[partner >= 0]
        assert len(set(taken.tolist())) == len(taken)
        pairs = [(i, j) for i, j in enumerate(partner) if j >= 0]
        assert all(live_old[i] and live_new[j] and values[i, j] > 0 for i, j in pairs)
        assert sum(values[i, j] for i, j in pairs) == pytest.approx(best_sum(values, live_old, live_new), abs=1e-7)

    @settings(max_examples=100)
    @given(case=correlations())
    def test_the_runner_up_is_the_best_of_the_others(self, case: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
        values, live_old, live_new = case
        partner = match(values, live_old, live_new)
        for i, found in enumerate(runner_up(values, partner, live_old, live_new)):
            others = [j for j in range(len(live_new)) if live_new[j] and j != partner[i]] if live_old[i] else []
            assert found == (max(others, key=lambda j: values[i, j]) if others else -1)

    def test_equal_correlations_go_to_equal_numbers(self) -> None:
        live = np.ones(4, dtype=bool)
        assert match(np.ones((4, 4)), live, live).tolist() == [0, 1, 2, 3]

    @pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
    def test_nothing_to_match(self, shape: tuple[int, int]) -> None:
        values, live = np.zeros(shape), (np.ones(shape[0], dtype=bool), np.ones(shape[1], dtype=bool))
        partner = match(values, *live)
        assert partner.tolist() == [-1] * shape[0]
        assert runner_up(values, partner, *live).tolist() == [-1] * shape[0]

    def test_inverse(self) -> None:
        assert inverse(np.array([2, -1, 0]), 4).tolist() == [2, -1, 0, -1]


class TestMadeOf:
    """What a feature is a sum of, with known answers."""

    def parts(self, whole: Tensor, candidates: Tensor, gain: float = 0.2) -> tuple[list[int], float]:
        c = np.corrcoef(whole.numpy(), candidates.T.numpy())
        return made_of(c[0, 1:], c[1:, 1:], gain)

    def test_a_sum_of_two_is_found_and_their_multiple_correlation(self) -> None:
        x = torch.randn(500, 5, generator=generator(1)).double()
        noise = torch.randn(500, generator=generator(2)).double()
        whole = 2 * x[:, 3] + 1.6 * x[:, 1] + 0.5 * noise
        parts, together = self.parts(whole, x)
        assert parts == [3, 1]
        fit = np.linalg.lstsq(np.c_[x[:, [3, 1]], np.ones(500)], whole.numpy(), rcond=None)[0]
        fitted = np.c_[x[:, [3, 1]], np.ones(500)] @ fit
        assert together == pytest.approx(np.corrcoef(fitted, whole)[0, 1], abs=1e-9)

    def test_a_near_duplicate_of_a_part_is_none(self) -> None:
        x = torch.randn(500, 3, generator=generator(1)).double()
        whole = x[:, 0] + 0.3 * x[:, 1]
        candidates = torch.stack([x[:, 0], x[:, 0] + 0.05 * x[:, 2], x[:, 2]], 1)
        assert len(self.parts(whole, candidates)[0]) == 1

    def test_a_part_with_a_negative_weight_is_none(self) -> None:
        x = torch.randn(500, 2, generator=generator(1)).double()
        assert self.parts(x[:, 0] - x[:, 1], x)[0] == [0]

    def test_dead_candidates_and_none_at_all(self) -> None:
        assert made_of(np.zeros(3), np.zeros((3, 3)), 0.2) == ([], 0.0)
        assert made_of(np.zeros(0), np.zeros((0, 0)), 0.2) == ([], 0.0)
