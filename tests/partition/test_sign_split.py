"""The sign split: edges by the sign of their weight, ties to the background, planted structure found again."""

from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from elude_runtime.partition import REST_EDGE, SplitConfig
from elude_runtime.partition.kmeans import _seed
from elude_runtime.partition.sign_split import (
    CHUNK_FLOATS,
    assign_edges,
    compact,
    end_clusters,
    neuron_chunks,
    sign_split,
    split_neurons,
)


def split(
    weight: torch.Tensor, tokens: torch.Tensor, config: SplitConfig, ends: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [d, n, q], tokens [N, n, q]: the sign split on the `ends` most extreme tokens of each end."""
    y = torch.einsum("knq,tnq->kt", weight, tokens)
    positive = y.argsort(1, descending=True)[:, :ends]
    negative = y.argsort(1)[:, :ends]
    return sign_split(weight, lambda _, ids: tokens[ids], positive, negative, config)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), q=st.sampled_from([1, 4]), subunits=st.sampled_from([2, 4, 8]))
def test_signs_numbers_and_background(seed: int, q: int, subunits: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, 11, q, generator=g)
    weight[:, 3] = 0
    edges, counts = split(weight, torch.randn(60, 11, q, generator=g), SplitConfig(subunits=subunits), 20)
    assert edges.dtype == counts.dtype == torch.uint8
    assert int(counts.max()) <= subunits
    sign = weight.sum(-1).sign()
    assert bool((edges[sign == 0] == REST_EDGE).all())
    for k in range(6):
        used = sorted(set(edges[k].tolist()) - {REST_EDGE})
        assert used == list(range(int(counts[k])))  # no number without an edge
        for m in used:
            assert sign[k][edges[k] == m].unique().numel() == 1  # a sub-unit serves one end
    up = {(k, int(m)) for k in range(6) for m in edges[k][sign[k] > 0].tolist() if m != REST_EDGE}
    down = {(k, int(m)) for k in range(6) for m in edges[k][sign[k] < 0].tolist() if m != REST_EDGE}
    assert not up & down
    for k in range(6):  # the positive end's sub-units come first
        first = [m for kk, m in up if kk == k]
        second = [m for kk, m in down if kk == k]
        assert not first or not second or max(first) < min(second)


def test_edges_follow_the_cluster_they_serve() -> None:
    weight = torch.tensor([[1.0, 2.0, -1.0, -3.0, 1.0]])[..., None]
    positive = torch.tensor([[[0.9, 0.1, 0.0, 0.0, 0.2], [0.1, 0.8, 0.9, 0.9, 0.1]]])
    negative = torch.tensor([[[-0.9, -0.9, -0.1, -0.8, -0.9], [0.0, 0.0, -0.7, -0.2, 0.0]]])
    assert assign_edges(weight, positive, negative).tolist() == [[0, 1, 3, 2, 0]]


def test_ties_and_zero_weights_go_to_the_background() -> None:
    weight = torch.tensor([[1.0, -1.0, 0.0, 1.0]])[..., None]
    same = torch.tensor([[[0.5, 0.5, 0.1, 0.7], [0.5, 0.5, 0.9, 0.1]]])
    assert assign_edges(weight, same, same).tolist() == [[REST_EDGE, REST_EDGE, REST_EDGE, 0]]


def test_a_kernels_sign_is_that_of_its_sum() -> None:
    weight = torch.tensor([[[3.0, -1.0], [-3.0, 1.0], [2.0, -2.0]]])
    clusters = torch.tensor([[[1.0, -1.0, 1.0], [0.0, 0.0, 0.0]]])
    assert assign_edges(weight, clusters, clusters).tolist() == [[0, 2, REST_EDGE]]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), slots=st.sampled_from([2, 5, 254]))
def test_compact_keeps_the_groups_and_leaves_no_gap(seed: int, slots: int) -> None:
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, slots, (4, 9), generator=g).to(torch.uint8)
    edges[torch.rand(4, 9, generator=g) < 0.3] = REST_EDGE
    made, counts = compact(edges, slots)
    for before, after, count in zip(edges.tolist(), made.tolist(), counts.tolist(), strict=True):
        named = sorted(set(before) - {REST_EDGE})
        assert count == len(named)
        assert after == [REST_EDGE if e == REST_EDGE else named.index(e) for e in before]


def test_fewer_tokens_than_clusters() -> None:
    g = torch.Generator().manual_seed(3)
    edges, counts = split(
        torch.randn(5, 7, 1, generator=g), torch.randn(4, 7, 1, generator=g), SplitConfig(subunits=16), 2
    )
    assert int(counts.max()) <= 4  # two tokens at each end: at most two clusters each
    assert bool((edges != REST_EDGE).any())


def test_constant_tokens_tell_nothing() -> None:
    tokens = torch.ones(30, 6, 1)
    edges, counts = split(
        torch.randn(4, 6, 1, generator=torch.Generator().manual_seed(4)), tokens, SplitConfig(subunits=4), 10
    )
    assert bool((edges == REST_EDGE).all()) and int(counts.sum()) == 0


def test_the_background_of_a_dead_input() -> None:
    """An input that is constant contributes to no cluster more than to another."""
    g = torch.Generator().manual_seed(5)
    tokens = torch.randn(80, 8, 1, generator=g)
    tokens[:, 2] = 0.7
    edges, _ = split(torch.randn(5, 8, 1, generator=g), tokens, SplitConfig(subunits=4), 30)
    assert bool((edges[:, 2] == REST_EDGE).all())


def test_planted_groups_end_up_apart() -> None:
    """Inputs 0-4 are active on the first half of the tokens, 5-9 on the second, 10-11 on none."""
    g = torch.Generator().manual_seed(6)
    tokens = 0.02 * torch.randn(200, 12, 1, generator=g)
    tokens[:100, 0:5] += 1 + 0.1 * torch.rand(100, 5, 1, generator=g)
    tokens[100:, 5:10] += 1 + 0.1 * torch.rand(100, 5, 1, generator=g)
    weight = torch.rand(7, 12, 1, generator=g) + 0.5
    edges, _ = split(weight, tokens, SplitConfig(subunits=4), 200)
    for k in range(7):
        first, second = set(edges[k, 0:5].tolist()), set(edges[k, 5:10].tolist())
        assert len(first) == len(second) == 1 and first != second
        assert REST_EDGE not in first | second


def test_clusters_are_of_centred_normalised_contributions() -> None:
    """Scaling a token's deviation changes nothing; the centre of one cluster is the mean direction."""
    g = torch.Generator().manual_seed(7)
    inputs, weight = torch.randn(1, 20, 6, 1, generator=g), torch.randn(1, 6, 1, generator=g)
    contributions = (inputs * weight[:, None])[..., 0][0]
    centred = contributions - contributions.mean(0)
    unit = centred / centred.norm(dim=1, keepdim=True)
    found = end_clusters(inputs, weight, 1, torch.rand(1, 1, generator=g))
    torch.testing.assert_close(found[0, 0], unit.mean(0), rtol=1e-4, atol=1e-6)


def test_a_neurons_partition_does_not_depend_on_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(8)
    weight, tokens = torch.randn(9, 10, 1, generator=g), torch.randn(70, 10, 1, generator=g)
    whole = split(weight, tokens, SplitConfig(subunits=4), 25)
    monkeypatch.setattr("elude_runtime.partition.sign_split.CHUNK_FLOATS", 600)
    chunked = split(weight, tokens, SplitConfig(subunits=4), 25)
    assert all(torch.equal(a, b) for a, b in zip(whole, chunked, strict=True))


def test_chunks_hold_every_neuron_once() -> None:
    for neurons, tokens, inputs in ((1, 1, 1), (192, 400, 768), (1536, 400, 9 * 4096), (7, 10**6, 10**6)):
        chunks = neuron_chunks(neurons, tokens, inputs)
        assert [k for chunk in chunks for k in chunk] == list(range(neurons))
        assert len(chunks) == 1 or max(map(len, chunks)) * tokens * inputs <= max(CHUNK_FLOATS, tokens * inputs)


@pytest.mark.parametrize(
    "changes", [{"subunits": 3}, {"subunits": 0}, {"subunits": 256}, {"tokens": 1}, {"per_image": 0}]
)
def test_impossible_parameters_are_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be"):
        SplitConfig(**changes)


def test_ids_on_the_cpu_and_weights_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU: tensors without data tell which operations would mix devices. k-means' loop asks for values; its seeds
    do not."""
    module = sys.modules[split_neurons.__module__]
    monkeypatch.setattr(module, "kmeans", lambda points, count, draws: (None, _seed(points, count, draws)))

    def read(neurons: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        assert neurons.device.type == ids.device.type == "cpu"
        return torch.empty(*ids.shape, 8, 3, device="cuda")

    with FakeTensorMode():
        weight, ends = torch.empty(12, 8, 3, device="cuda"), torch.zeros(12, 10, dtype=torch.int64)
        edges = split_neurons(weight, read, ends, ends, SplitConfig(4, 10), range(2, 7))
        assert edges.device.type == "cuda" and edges.shape == (5, 8) and edges.dtype == torch.uint8
