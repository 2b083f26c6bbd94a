"""Token statistics: the ends of every neuron, the uniform sample, the exact mean, and reading tokens back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import VIT_DATA, hook_count, input_tensor, tiny_vit

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.split_layers import find_split_layers
from elude_runtime.offline.collect import EndTokens, LayerStatistics, TokenSample, TokenStore, run_layers
from elude_runtime.offline.images import ImageSource
from elude_runtime.partition import SplitConfig


def ends_of(y: torch.Tensor, norms: torch.Tensor, config: SplitConfig, batch: int) -> list[torch.Tensor]:
    kept = EndTokens(config, y.shape[1])
    for first in range(0, len(y), batch):
        kept.add(first, y[first : first + batch], norms[first : first + batch])
    return kept.ends()


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), tokens=st.sampled_from([1, 5]), wanted=st.integers(2, 12), per_image=st.integers(1, 3)
)
def test_the_most_extreme_tokens_a_few_an_image(seed: int, tokens: int, wanted: int, per_image: int) -> None:
    y = torch.randn(10, tokens, 3, generator=torch.Generator().manual_seed(seed))
    config = SplitConfig(tokens=wanted, per_image=per_image)
    ends = ends_of(y, torch.ones(10, tokens), config, 10)
    for sign, found in zip((1, -1), ends, strict=True):
        for k in range(3):
            candidates = []
            for image in range(10):
                best = sorted(range(tokens), key=lambda t: -sign * float(y[image, t, k]))[:per_image]
                candidates += [(-sign * float(y[image, t, k]), image * tokens + t) for t in best]
            expected = [i for _, i in sorted(candidates)][: min(wanted, 10 * tokens // 2)]
            assert found[k].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 12))
def test_the_ends_do_not_depend_on_the_batch_size(seed: int, batch: int) -> None:
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(-3, 4, (12, 4, 3), generator=g).float()  # many equal values
    norms = torch.rand(12, 4, generator=g)
    config = SplitConfig(tokens=6, per_image=2)
    whole, parts = ends_of(y, norms, config, 12), ends_of(y, norms, config, batch)
    assert all(torch.equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_outliers_stand_back() -> None:
    """Tokens whose input norm is far above the median are used only where there are not enough others."""
    y = torch.arange(40.0).reshape(20, 2, 1)
    norms = torch.ones(20, 2)
    norms[19, 1] = 100  # the very largest output belongs to an artefact
    config = SplitConfig(tokens=5, per_image=2, outlier=4.0)
    assert 39 not in ends_of(y, norms, config, 20)[0][0].tolist()
    assert ends_of(y, torch.ones(20, 2), config, 20)[0][0].tolist()[0] == 39


def test_the_two_ends_share_no_token() -> None:
    y = torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1))
    positive, negative = ends_of(y, torch.ones(3, 2), SplitConfig(tokens=400, per_image=4), 3)
    for k in range(4):
        assert not set(positive[k].tolist()) & set(negative[k].tolist())


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), batch=st.integers(1, 9), size=st.integers(1, 40))
def test_the_sample_does_not_depend_on_the_batch_size(seed: int, batch: int, size: int) -> None:
    reads = torch.arange(9 * 7.0).reshape(9, 7, 1)
    found = []
    for step in (9, batch):
        sample = TokenSample(size, seed)
        for first in range(0, 9, step):
            sample.add(first, reads[first : first + step])
        found.append(sample.take())
    assert torch.equal(*found) and len(found[0]) == min(size, 63)
    assert found[0].unique().numel() == len(found[0])


def test_the_sample_is_uniform() -> None:
    counts = torch.zeros(40)
    for seed in range(300):
        sample = TokenSample(10, seed)
        sample.add(0, torch.arange(40.0).reshape(8, 5, 1))
        counts[sample.take()[:, 0].long()] += 1
    assert float(counts.min()) > 40 and float(counts.max()) < 115  # 75 expected


def test_the_mean_is_exact(vit_statistics: tuple) -> None:
    one, x = vit_statistics
    for t, span in enumerate(one.layer.layout.slices):
        expected = x[:, span].double().mean((0, 1))
        torch.testing.assert_close(one.mean(t)[0, :, 0], expected, rtol=1e-10, atol=1e-12)
        assert one.counts[t] == x[:, span].shape[0] * x[:, span].shape[1]


@pytest.fixture
def vit_statistics() -> tuple:
    """(statistics of a layer over 8 images in batches of 3, that layer's input on all of them)"""
    model, name = tiny_vit(), "blocks.1.mlp.fc2"
    images = input_tensor(VIT_DATA, 8)
    layer = next(one for one in find_split_layers(model, VIT_DATA.input_size) if one.name == name)
    one = LayerStatistics(layer, LinearMap(model.get_submodule(name)), SplitConfig(tokens=6))
    for first, seen in run_layers(model, [layer], ImageSource(images, VIT_DATA, batch_size=3)):
        one.add(first, *seen[name])
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
    batches = list(run_layers(model, layers, ImageSource(input_tensor(VIT_DATA, 5), VIT_DATA, batch_size=2)))
    assert [first for first, _ in batches] == [0, 2, 4] and ran == []


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), batch=st.integers(1, 6))
def test_tokens_are_read_back_by_id(tmp_path_factory: pytest.TempPathFactory, seed: int, batch: int) -> None:
    g = torch.Generator().manual_seed(seed)
    reads = torch.randn(6, 5, 2, 3, generator=g)
    ids = torch.randint(0, 30, (4, 3), generator=g)
    store = TokenStore(Path(tmp_path_factory.mktemp("tokens")) / "a.npy", ids.flatten(), (2, 3))
    for first in range(0, 6, batch):
        store.add(first, reads[first : first + batch])
    assert torch.equal(store.read(ids, torch.zeros(len(ids), dtype=torch.int64)), reads.flatten(0, 1)[ids][:, :, 0])
