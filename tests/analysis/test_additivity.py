"""Losslessness as a property: random layers of every kind, random partitions, token types and dtypes.

The expected values come from the layer itself, run with most of its edges set to zero (`support.naive_sums`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import as_tokens, naive_sums, random_partition, state_of
from timm.layers import Conv2dSame
from torch import Tensor, nn

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.explicit import ExplicitLayer
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import concept_mean, concept_weight

Case = tuple[Callable[[], nn.Module], tuple[int, ...], int]  # layer, input shape, prefix tokens
CASES: dict[str, Case] = {
    "linear [B, n]": (lambda: nn.Linear(7, 6), (2, 7), 0),
    "linear [B, T, n]": (lambda: nn.Linear(7, 6), (2, 5, 7), 0),
    "linear, class token": (lambda: nn.Linear(7, 6), (2, 5, 7), 1),
    "linear, three prefix tokens, no bias": (lambda: nn.Linear(7, 6, bias=False), (2, 7, 7), 3),
    "linear [B, H, W, n]": (lambda: nn.Linear(7, 6), (2, 3, 4, 7), 0),
    "conv 1x1": (lambda: nn.Conv2d(7, 6, 1, bias=False), (2, 7, 3, 4), 0),
    "conv 3x3 stride 2": (lambda: nn.Conv2d(5, 6, 3, stride=2, padding=1), (2, 5, 7, 6), 0),
    "conv grouped": (lambda: nn.Conv2d(8, 6, 3, padding=1, groups=2), (2, 8, 4, 4), 0),
    "conv dilated": (lambda: nn.Conv2d(5, 6, 3, padding=2, dilation=2), (2, 5, 6, 6), 0),
    "conv same": (lambda: Conv2dSame(5, 6, 3, stride=2), (2, 5, 7, 6), 0),
}
EXAMPLE = {"case": st.sampled_from(sorted(CASES)), "seed": st.integers(0, 10**6), "double": st.booleans()}


def build(case: str, seed: int, double: bool) -> tuple[nn.Module, TokenLayout, Partition, SplitState, Tensor, Tensor]:
    """(layer, token layout, partition, state, input, output as tokens)"""
    make, shape, prefix = CASES[case]
    torch.manual_seed(seed)
    module, x = make().requires_grad_(False), torch.randn(shape)
    dtype = torch.float64 if double else torch.float32
    module, x = module.to(dtype), x.to(dtype)
    raw = module(x)
    conv = isinstance(module, nn.Conv2d)
    y = as_tokens(raw, conv)
    grid = tuple(raw.shape[2:]) if conv else tuple(raw.shape[1:3]) if raw.dim() == 4 else None
    layout = TokenLayout(y.shape[1], prefix, grid)
    partition = random_partition(seed, module.weight.shape[0], module.weight.shape[1], layout.types, dtype=dtype)
    return module, layout, partition, state_of(module, layout, partition), x, y


def close(found: Tensor, expected: Tensor, double: bool) -> None:
    bound = 1e-12 if double else 2e-6
    assert found.shape == expected.shape
    scale = max(1.0, float(expected.abs().max()))
    assert float((found.detach().double() - expected.double()).abs().max()) <= bound * scale * (1 if double else 10)


@settings(max_examples=60, deadline=None)
@given(**EXAMPLE)
def test_subunits_are_the_layers_own_edges_and_add_up(case: str, seed: int, double: bool) -> None:
    module, layout, partition, state, x, y = build(case, seed, double)
    sums = state.sums(x, x.dtype)
    close(sums, naive_sums(module, layout, partition, x), double)
    bias = 0 if module.bias is None else module.bias
    close(sums.sum(-1) + bias, y, double)


@settings(max_examples=40, deadline=None)
@given(**EXAMPLE)
def test_centred_subunits_and_the_baseline_add_up(case: str, seed: int, double: bool) -> None:
    module, layout, partition, state, x, y = build(case, seed, double)
    bias = torch.zeros(y.shape[-1], dtype=x.dtype) if module.bias is None else module.bias
    centred, c = state.sums(x, x.dtype).clone(), torch.zeros_like(y[0])
    for t, tokens in enumerate(layout.slices):
        centred[:, tokens] -= partition.mean[t]
        c[tokens] = bias + partition.mean[t].sum(-1)
    close(centred.sum(-1) + c, y, double)
    close(state.baseline(), c, False)  # stored and served in float32


@settings(max_examples=40, deadline=None)
@given(**EXAMPLE)
def test_concepts_and_the_baseline_add_up(case: str, seed: int, double: bool) -> None:
    module, layout, partition, state, x, y = build(case, seed, double)
    total = torch.zeros_like(y)
    for t, tokens in enumerate(layout.slices):
        inputs = x[:, tokens] if layout.types > 1 else x
        parts = torch.zeros_like(y[:, tokens])
        for concept in range(partition.concepts(t) + 1):
            weight = concept_weight(state.linear.weight(x.dtype), partition, t, concept)
            parts += state.linear.apply(inputs, weight) - concept_mean(partition, t, concept)
        c = partition.mean[t].sum(-1) + (0 if module.bias is None else module.bias)
        total[:, tokens] = parts + c
    close(total, y, double)


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6))
def test_what_a_feature_writes_is_the_sum_of_its_members(case: str, seed: int) -> None:
    module, layout, partition, state, x, y = build(case, seed, False)
    sums = naive_sums(module, layout, partition, x)
    total = state.baseline()[None].expand_as(y).clone()
    for t, tokens in enumerate(layout.slices):
        centred = sums[:, tokens] - partition.mean[t]
        for feature in state.concept_features(t):
            members = partition.concept_slots(t) == state.slot(feature)
            written = state.write(x, feature)
            close(written[:, tokens], (centred * members).sum(-1), False)
            outside = torch.ones(layout.total, dtype=torch.bool)
            outside[tokens] = False
            assert bool((written[:, outside] == 0).all())
            total += written
        for k in range(0, module.weight.shape[0], 3):
            for slot in [*range(int(partition.counts[t, k])), None]:
                one = Feature("layer", t, slot, k)
                m = partition.subunits if slot is None else slot
                close(state.activations(x, one), centred[..., k, m], False)
                expected = torch.zeros_like(y)
                expected[:, tokens, k] = centred[..., k, m]
                close(state.write(x, one), expected, False)
    close(total, y, False)


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6))
def test_a_concepts_activation_is_the_mean_z_score_of_its_live_members(case: str, seed: int) -> None:
    module, layout, partition, state, x, _ = build(case, seed, False)
    sums = naive_sums(module, layout, partition, x)
    for t, tokens in enumerate(layout.slices):
        found = state.concept_activations(x, t)
        for feature in state.concept_features(t):
            slot = state.slot(feature)
            z = [
                partition.sign[t, k, m] * (sums[:, tokens, k, m] - partition.mean[t, k, m]) / partition.std[t, k, m]
                for k, m in (partition.concept_slots(t) == slot).nonzero().tolist()
                if float(partition.std[t, k, m]) > 0
            ]
            expected = torch.stack(z).mean(0) if z else torch.zeros_like(found[..., slot])
            close(found[..., slot], expected, False)
            close(state.activations(x, feature), expected, False)


@settings(max_examples=40, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6))
def test_attributions_are_gradient_times_centred_activation(case: str, seed: int) -> None:
    module, layout, partition, state, x, y = build(case, seed, False)
    one = x[:1]
    sums = naive_sums(module, layout, partition, one)[0]
    gradient = torch.randn(1, *y.shape[1:], generator=torch.Generator().manual_seed(seed))
    found = state.attributions(one, gradient)
    for t, tokens in enumerate(layout.slices):
        expected = torch.zeros(y.shape[-1], partition.subunits + 1)
        for token in range(layout.total)[tokens]:
            expected += gradient[0, token][:, None] * (sums[token] - partition.mean[t])
        close(found[t], expected, False)
        concepts = state.by_concept(found[t], t)
        for c in range(partition.concepts(t) + 1):
            close(concepts[c], expected[partition.concept_slots(t) == c].sum(), False)


@settings(max_examples=60, deadline=None)
@given(**EXAMPLE)
def test_the_explicit_layer_takes_the_place_of_the_layer(case: str, seed: int, double: bool) -> None:
    module, layout, partition, state, x, y = build(case, seed, double)
    before = copy.deepcopy(module.state_dict())
    wide = ExplicitLayer(state.linear, partition, layout)
    found = wide(x)
    assert found.shape == module(x).shape and found.dtype == x.dtype
    close(as_tokens(found, isinstance(module, nn.Conv2d)), y, double)
    close(wide.subunits(x).unflatten(-1, (y.shape[-1], -1)), naive_sums(module, layout, partition, x), double)
    assert all(torch.equal(before[n], t) for n, t in module.state_dict().items())


@settings(max_examples=20, deadline=None)
@given(case=st.sampled_from(sorted(CASES)), seed=st.integers(0, 10**6), factor=st.floats(-3, 3))
def test_everything_is_linear_in_the_input(case: str, seed: int, factor: float) -> None:
    _, _, _, state, x, _ = build(case, seed, True)
    other = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed + 1))
    left = state.sums(x + factor * other, x.dtype)
    close(left, state.sums(x, x.dtype) + factor * state.sums(other, x.dtype), True)
