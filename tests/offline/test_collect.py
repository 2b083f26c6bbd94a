"""Token statistics: the ends of every neuron, the uniform sample, the mean, whatever the order of the images."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import CONV_DATA, VIT_DATA, hook_count, input_tensor, tiny_mobilenet, tiny_vit

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.split_layers import find_split_layers
from elude_runtime.offline import collect
from elude_runtime.offline.collect import (
    EndTokens,
    ExactSum,
    LayerStatistics,
    TokenSample,
    float_ranks,
    run_layers,
    token_inputs,
)
from elude_runtime.offline.images import ImageSource
from elude_runtime.partition import SplitConfig


def ends_of(y: torch.Tensor, outlier: torch.Tensor | None, config: SplitConfig, batch: int) -> list[torch.Tensor]:
    kept = EndTokens(config, y.shape[1])
    outlier = torch.zeros(y.shape[:2], dtype=torch.bool) if outlier is None else outlier
    for first in range(0, len(y), batch):
        span = slice(first, min(first + batch, len(y)))
        kept.add(torch.arange(span.start, span.stop), y[span], outlier[span])
    return kept.ends()


def expected_ends(y: torch.Tensor, outlier: torch.Tensor, config: SplitConfig) -> list[list[list[int]]]:
    """By sorting everything: outliers last, then by value, image and token; a few an image."""
    images, tokens, neurons = y.shape
    found = []
    for sign in (1, -1):
        per_neuron = []
        for k in range(neurons):
            candidates = []
            for i in range(images):
                keyed = [(bool(outlier[i, t]), -sign * float(y[i, t, k]), i * tokens + t) for t in range(tokens)]
                candidates += sorted((o, 0.0 if o else v, n) for o, v, n in keyed)[: config.per_image]
            per_neuron.append([n for _, _, n in sorted(candidates)][: min(config.tokens, images * tokens // 2)])
        found.append(per_neuron)
    return found


@settings(max_examples=40)
@given(
    seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 5]), wanted=st.integers(2, 12), per_image=st.integers(1, 3),
    batch=st.integers(1, 12), share=st.sampled_from([0.0, 0.2, 1.0]),
)  # fmt: skip
def test_the_ends_in_batches_are_those_of_a_sort(
    seed: int, tokens: int, wanted: int, per_image: int, batch: int, share: float
) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-3, 4, (12, tokens, 3), generator=g).float()  # many equal values, and both zeros
    y = torch.where(torch.rand(y.shape, generator=g) < 0.5, -y, y)
    outlier = torch.rand(12, tokens, generator=g) < share
    config = SplitConfig(tokens=wanted, per_image=per_image)
    found = [end.tolist() for end in ends_of(y, outlier, config, batch)]
    assert found == expected_ends(y, outlier, config)


@settings(max_examples=25)
@given(seed=st.integers(0, 10**6), world=st.integers(1, 4), tokens=st.sampled_from([1, 4]))
def test_the_ends_do_not_depend_on_who_saw_what(seed: int, world: int, tokens: int) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-2, 3, (11, tokens, 3), generator=g).float()
    config = SplitConfig(tokens=6, per_image=2)
    shares = [EndTokens(config, tokens) for _ in range(world)]
    for number, first in enumerate(range(0, 11, 2)):
        places = torch.arange(first, min(first + 2, 11))
        shares[number % world].add(places, y[places], torch.zeros(len(places), tokens, dtype=torch.bool))
    merged = EndTokens(config, tokens)
    for share in shares:  # as processes exchange them
        other = EndTokens(config, tokens)
        other.restore(share.state(), y.device)
        merged.merge(other)
    assert all(torch.equal(a, b) for a, b in zip(merged.ends(), ends_of(y, None, config, 11), strict=True))


def test_outliers_stand_back() -> None:
    """Tokens whose input norm is far above the median are used only where there are not enough others."""
    y = torch.arange(40.0).reshape(20, 2, 1)
    outlier = torch.zeros(20, 2, dtype=torch.bool)
    outlier[19, 1] = True  # the very largest output belongs to an artefact
    config = SplitConfig(tokens=5, per_image=2)
    assert 39 not in ends_of(y, outlier, config, 20)[0][0].tolist()
    assert ends_of(y, None, config, 20)[0][0].tolist()[0] == 39
    assert ends_of(y, torch.ones_like(outlier), config, 20)[0].shape == (1, 5)


def test_the_two_ends_share_no_token() -> None:
    y = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    positive, negative = ends_of(y, None, SplitConfig(tokens=400, per_image=4), 3)
    for k in range(4):
        assert not set(positive[k].tolist()) & set(negative[k].tolist())


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=20))
def test_ranks_are_in_the_order_of_the_floats(values: list[float]) -> None:
    x = torch.tensor(values)
    ranks = float_ranks(x)
    for i in range(len(values)):
        assert torch.equal(x[i] < x, ranks[i] < ranks) and torch.equal(x[i] == x, ranks[i] == ranks)


@given(st.lists(st.floats(-1e12, 1e12), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_a_sum_does_not_depend_on_the_order(values: list[float], random: object) -> None:
    """Against exact fractions, and bit for bit between two orders."""
    found = []
    for _ in range(2):
        total = ExactSum()
        for v in values:
            total.add(torch.tensor([v], dtype=torch.float64))
        found.append(float(total.value))
        random.shuffle(values)  # type: ignore[attr-defined]
    assert found[0] == found[1]
    exact = sum(map(Fraction, values), Fraction(0))
    assert math.isclose(found[0], float(exact), rel_tol=1e-15, abs_tol=1e-13)


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 9), size=st.integers(1, 40), world=st.integers(1, 3))
def test_the_sample_does_not_depend_on_the_batches(seed: int, batch: int, size: int, world: int) -> None:
    whole, merged = TokenSample(size, seed, 7), TokenSample(size, seed, 7)
    whole.add(torch.arange(9))
    shares = [TokenSample(size, seed, 7) for _ in range(world)]
    for number, first in enumerate(range(0, 9, batch)):
        shares[number % world].add(torch.arange(first, min(first + batch, 9)))
    for share in shares:
        merged.merge(share)
    assert torch.equal(whole.take(), merged.take()) and len(whole.take()) == min(size, 63)
    assert whole.take().unique().numel() == len(whole.take())


def test_the_sample_is_uniform() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        sample = TokenSample(10, seed, 5)
        sample.add(torch.arange(8))
        counts[sample.take()] += 1
    assert float(counts.min()) > 40 and float(counts.max()) < 115  # 75 expected


def test_the_mean(vit_statistics: tuple) -> None:
    one, x = vit_statistics
    for t, span in enumerate(one.layer.layout.slices):
        expected = x[:, span].double().mean((0, 1))
        torch.testing.assert_close(one.mean(t)[0, :, 0], expected, rtol=1e-6, atol=1e-8)
        assert one.counts[t] == x[:, span].shape[0] * x[:, span].shape[1]


@pytest.fixture
def vit_statistics() -> tuple:
    """(statistics of a layer over 8 images in batches of 3, that layer's input on all of them)"""
    model, name = tiny_vit(), "blocks.1.mlp.fc2"
    images = input_tensor(VIT_DATA, 8)
    layer = next(one for one in find_split_layers(model, VIT_DATA.input_size) if one.name == name)
    one = LayerStatistics(layer, LinearMap(model.get_submodule(name)), SplitConfig(tokens=6))
    for batch, seen in run_layers(model, [layer], ImageSource(images, VIT_DATA, batch_size=3).numbered()):
        one.add(batch.places, *seen[name])
    assert hook_count(model) == 0
    kept: list[torch.Tensor] = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, a: kept.append(a[0].detach()))
    model(images)
    hook.remove()
    return one, kept[0]


def test_a_pass_stops_after_the_deepest_layer() -> None:
    model = tiny_vit()
    layers = [one for one in find_split_layers(model, VIT_DATA.input_size) if one.name == "blocks.0.attn.proj"]
    ran: list[str] = []
    model.blocks[2].register_forward_hook(lambda *_: ran.append("block 2"))
    source = ImageSource(input_tensor(VIT_DATA, 5), VIT_DATA, batch_size=2)
    batches = [batch.places.tolist() for batch, _ in run_layers(model, layers, source.numbered())]
    assert batches == [[0, 1], [2, 3], [4]] and ran == []


def test_unfolding_a_few_images_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_mobilenet()
    linear = LinearMap(model.conv_stem, "conv_stem")
    x = input_tensor(CONV_DATA, 5)
    whole = list(token_inputs(linear, x))
    monkeypatch.setattr(collect, "_PATCH_FLOATS", 2 * x[0].numel() * linear.positions)
    parts = list(token_inputs(linear, x))
    assert [images for images, _ in parts] == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert torch.equal(torch.cat([reads for _, reads in parts]), whole[0][1])


def test_norm_limits_are_a_multiple_of_the_median(vit_statistics: tuple) -> None:
    one, x = vit_statistics
    one.set_limits(x)
    for limit, span in zip(one.limits, one.layer.layout.slices, strict=True):
        assert limit == pytest.approx(4 * float(x[:, span].norm(dim=2).median()), rel=1e-6)
    one.set_limits(torch.zeros_like(x))  # nothing is an outlier where most tokens are zero
    assert one.limits == [math.inf, math.inf]


def test_statistics_go_on_from_a_saved_state(vit_statistics: tuple) -> None:
    one, x = vit_statistics
    one.set_limits(x * 0.2)  # so that some tokens are outliers
    y = torch.nn.functional.linear(x, one.linear.module.weight, one.linear.module.bias).detach()
    other = LayerStatistics(one.layer, one.linear, one.config)
    other.restore(one.state())
    for statistics in (one, other):
        statistics.add(torch.arange(8, 16), x, y)
    for t in one.types:
        assert all(torch.equal(a, b) for a, b in zip(one.ends[t].ends(), other.ends[t].ends(), strict=True))
        assert torch.equal(one.samples[t].take(), other.samples[t].take())
        assert torch.equal(one.mean(t), other.mean(t))
    assert one.limits == other.limits and max(one.limits) < math.inf


def test_means_of_several_processes_keep_what_rounding_left(vit_statistics: tuple) -> None:
    """A sum's second part is merged too: 1 beside 2^60 is lost in the first alone."""
    one, _ = vit_statistics
    shares = [LayerStatistics(one.layer, one.linear, one.config) for _ in range(2)]
    for share, terms in zip(shares, ([-(2.0**60)], [2.0**60, 1.0]), strict=True):
        for term in terms:
            share.sums[0].add(torch.tensor([term], dtype=torch.float64))
    shares[0].merge(shares[1])
    assert shares[0].sums[0].value.tolist() == [1.0]
