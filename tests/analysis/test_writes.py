"""A feature's write: only its own neurons' rows, and the same as its sub-units' sums."""

from __future__ import annotations

import pytest
import torch
from support import naive_sums, random_partition, state_of
from torch import nn

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.writes import feature_write, share_subunit
from elude_runtime.network.tokens import TokenLayout


@pytest.fixture(params=["linear", "grouped"])
def split(request: pytest.FixtureRequest) -> tuple[SplitState, torch.Tensor]:
    torch.manual_seed(31)
    module: nn.Module
    if request.param == "linear":
        module, layout, x = nn.Linear(7, 6), TokenLayout(5, 1, (2, 2)), torch.randn(2, 5, 7)
    else:
        module, layout, x = nn.Conv2d(8, 6, 3, groups=2), TokenLayout(4, 0, (2, 2)), torch.randn(2, 8, 4, 4)
    partition = random_partition(32, 6, module.weight.shape[1], layout.types)
    return state_of(module.requires_grad_(False), layout, partition), x


def members_of(state: SplitState, feature: Feature) -> torch.Tensor:
    if feature.neuron is None:
        return state.partition.concept_slots(feature.token_type) == state.slot(feature)
    found = torch.zeros(state.partition.mean.shape[1:], dtype=torch.bool)
    found[feature.neuron, state.slot(feature)] = True
    return found


def every_feature(state: SplitState) -> list[Feature]:
    concepts = [f for t in state.live_types for f in state.concept_features(t)]
    subunits = [
        Feature(state.name, t, m, k)
        for t in state.live_types
        for k in range(state.linear.neurons)
        for m in [None, *range(int(state.partition.counts[t, k]))]
    ]
    return concepts + subunits


def test_a_write_is_the_sum_of_its_members(split: tuple[SplitState, torch.Tensor]) -> None:
    state, x = split
    sums = naive_sums(state.linear.module, state.layout, state.partition, x)
    for feature in every_feature(state):
        members, tokens = members_of(state, feature), state.layout.slices[feature.token_type]
        expected = torch.zeros(sums.shape[:3])
        centred = sums[:, tokens] - state.partition.mean[feature.token_type]
        expected[:, tokens] = (centred * members).sum(-1)
        torch.testing.assert_close(state.write(x, feature), expected, rtol=1e-4, atol=1e-5)
        write = state.feature_write(feature)
        assert write.neurons.tolist() == members.any(1).nonzero()[:, 0].tolist()
        assert write.rows.shape[0] == len(write.neurons)
        signed = state.partition.std[feature.token_type] * state.partition.sign[feature.token_type]
        torch.testing.assert_close(write.rise, (signed * members).sum(1)[write.neurons])


def test_writes_are_kept_but_not_without_end(split: tuple[SplitState, torch.Tensor]) -> None:
    state, _ = split
    features = every_feature(state)
    kept = [state.feature_write(f) for f in features]
    assert state.feature_write(features[-1]) is kept[-1]
    assert len(state._writes) == min(32, len(features))
    state._buffers["mean"] = state._buffers["mean"] + 1  # as `.to` replaces it
    assert state.feature_write(features[-1]) is not kept[-1]
    torch.testing.assert_close(state.feature_write(features[-1]).mean, feature_write(state, features[-1]).mean)


def test_features_that_share_a_sub_unit(split: tuple[SplitState, torch.Tensor]) -> None:
    state, _ = split
    for one in every_feature(state):
        for other in every_feature(state):
            same_type = one.token_type == other.token_type
            shared = same_type and bool((members_of(state, one) & members_of(state, other)).any())
            # a concept without members shares none, but two edits of it are still two of the same
            assert share_subunit(state, one, other) == (shared or one == other)
