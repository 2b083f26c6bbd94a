"""The checkpoint's own features and the control partitions: as the model itself computes them, and lossless."""

from __future__ import annotations

import pytest
import torch
from conftest import Rewritten
from support import VIT_DATA, input_tensor
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.offline.evaluation import own_sets as module
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.tokens import Peaks, PeakStream, TokenReader, TokenSample


def read(rewritten: Rewritten, layer: str, token_type: int, images: Tensor) -> tuple[SplitState, Tensor, Tensor]:
    """(state, the layer's input, what the tokens of a type read [B, T_p, m])."""
    state = rewritten.model.state(layer)
    x = rewritten.model.record(images, [layer]).x[layer].float()
    return state, x, torch.cat([part for _, part in TokenReader(state, token_type).read(x)])


@pytest.fixture(params=[("vit", 0), ("vit", 1), ("mobilenet", 0)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Rewritten, int]:
    name, token_type = request.param
    return request.getfixturevalue(name), token_type


@pytest.fixture
def parts(case: tuple[Rewritten, int]) -> tuple[SplitState, Tensor, Tensor, int, module.Split]:
    rewritten, t = case
    images = input_tensor(rewritten.data, 12, 500)
    state, x, reads = read(rewritten, rewritten.layer, t, images)
    return state, x, reads, t, module.own_split(state, t, reads.flatten(0, 1))


def test_concepts_are_the_models(parts: tuple[SplitState, Tensor, Tensor, int, module.Split]) -> None:
    state, x, reads, t, split = parts
    made = module.concept_set(split, "concepts")
    expected = state.concept_activations(x, t)[..., :-1]
    torch.testing.assert_close(made.activations(reads.flatten(0, 1)).view_as(expected), expected, rtol=1e-4, atol=1e-4)
    for chosen in ([0], [1, 3]):
        taken = made.ablation(reads.flatten(0, 1), torch.tensor(chosen)).view(*reads.shape[:2], -1)  # type: ignore[misc]
        wanted = sum(state.write(x, Feature(state.name, t, c))[:, state.layout.slices[t]] for c in chosen)
        torch.testing.assert_close(taken, wanted, rtol=1e-3, atol=1e-4)


def test_subunits_are_the_models(parts: tuple[SplitState, Tensor, Tensor, int, module.Split]) -> None:
    state, x, reads, t, split = parts
    neurons = torch.tensor([1, 4, 7])
    made = module.subunit_set(split, "sub-units", neurons)
    of, slot = made.facts[module.NEURON_OF], 0
    for number, neuron in enumerate(of):
        slot = slot + 1 if number and of[number - 1] == neuron else 0
        feature = Feature(state.name, t, slot, neuron)
        expected = state.activations(x, feature) / state.partition.std[t, neuron, slot]
        found = made.activations(reads.flatten(0, 1))[:, number].view_as(expected)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
        taken = made.ablation(reads.flatten(0, 1), torch.tensor([number])).view(*reads.shape[:2], -1)  # type: ignore[misc]
        wanted = state.write(x, feature)[:, state.layout.slices[t]]
        torch.testing.assert_close(taken, wanted, rtol=1e-3, atol=1e-4)
    assert module.siblings(made) is not None and set(of) <= {1, 4, 7}


@pytest.mark.parametrize("control", ["random", "other neuron"])
def test_controls_are_lossless_and_as_large(
    parts: tuple[SplitState, Tensor, Tensor, int, module.Split], control: str
) -> None:
    state, x, reads, t, split = parts
    flat = reads.flatten(0, 1)
    own = split.partition.slots(0)
    if control == "random":
        made = module.random_split(split, flat, 3)
        other = made.partition.slots(0)
        assert torch.equal(own.sort(1).values, other.sort(1).values) and not torch.equal(own, other)
    else:
        made = module.other_neurons_split(split, flat, 3)
        other = made.partition.slots(0)
        assert sorted(own.tolist()) == sorted(other.tolist()) and not bool((own == other).all(1).all())
    assert not made.partition.problems() and float(made.share.sum()) == pytest.approx(1, abs=1e-3)
    whole = module.concept_set(made, "all")
    assert whole.ablation is not None
    total = whole.ablation(flat, torch.arange(made.partition.concepts(0) + 1))  # `rest` too
    y = state.linear.tokens(state.linear.output(x, state.linear.weight()))[:, state.layout.slices[t]].flatten(0, 1)
    torch.testing.assert_close(total, y - y.mean(0), rtol=1e-3, atol=1e-3)


def test_shares_add_up_to_one(parts: tuple[SplitState, Tensor, Tensor, int, module.Split]) -> None:
    *_, split = parts
    assert float(split.share.sum()) == pytest.approx(1, abs=1e-4)
    made = module.concept_set(split, "concepts")
    assert float(made.share.sum()) + split.rest_share == pytest.approx(1, abs=1e-4)


def test_the_random_partition_depends_on_the_seed(parts: tuple[SplitState, Tensor, Tensor, int, module.Split]) -> None:
    _, _, reads, _, split = parts
    one, same, other = (module.random_split(split, reads.flatten(0, 1), seed).partition.edges for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_siblings() -> None:
    def made(features: int, **facts: object) -> FeatureSet:
        return FeatureSet("s", lambda x: x, torch.ones(features), True, facts=facts)

    assert module.siblings(made(4)) is None and module.siblings(made(4, neurons=3)) is None
    assert module.siblings(made(4, neurons=[7, 9])).tolist() == [7, 7, 9, 9]  # type: ignore[union-attr]
    assert module.siblings(made(3, neurons=[7, 9])) is None


class TestStreaming:
    def test_equals_all_at_once(self, vit: Rewritten) -> None:
        images = input_tensor(VIT_DATA, 20, 700)
        state, x, reads = read(vit, vit.layer, 0, images)
        sets = module.own_sets(module.own_split(state, 0, reads.flatten(0, 1)), torch.arange(5), reads.flatten(0, 1), 0)
        stream = PeakStream(TokenReader(state, 0), sets, 20)
        for start, stop in ((0, 7), (7, 8), (8, 20)):
            stream.add(x[start:stop])
        for one, peaks in zip(sets, stream.peaks, strict=True):
            values = one.activations(reads.flatten(0, 1)).view(20, reads.shape[1], -1)
            torch.testing.assert_close(peaks.high, values.amax(1))
            torch.testing.assert_close(peaks.low, values.amin(1))
            at = values.gather(1, peaks.high_token.long()[:, None])[:, 0]
            torch.testing.assert_close(at, peaks.high)
            ends, tokens = peaks.ends()
            torch.testing.assert_close(ends[1], -values.amin(1))
            torch.testing.assert_close(values.gather(1, tokens[1][:, None])[:, 0], peaks.low)

    def test_small_chunks_change_nothing(self, vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
        from elude_runtime.offline.evaluation import tokens as streaming

        state, x, reads = read(vit, vit.layer, 0, input_tensor(VIT_DATA, 9, 700))
        made = module.concept_set(module.own_split(state, 0, reads.flatten(0, 1)), "concepts")
        found: list[Peaks] = []
        for floats in (16_000_000, 200):
            monkeypatch.setattr(streaming, "_FLOATS", floats)
            stream = PeakStream(TokenReader(state, 0), [made], 9)
            stream.add(x)
            found.append(stream.peaks[0])
        torch.testing.assert_close(found[0].high, found[1].high)
        assert torch.equal(found[0].high_token, found[1].high_token)

    def test_a_sample_does_not_depend_on_the_batches(self, vit: Rewritten) -> None:
        state, x, reads = read(vit, vit.layer, 0, input_tensor(VIT_DATA, 10, 700))
        samples = []
        for parts in ([10], [3, 7]):
            sample = TokenSample(TokenReader(state, 0), 10, seed=4, size=50)
            for part in x.split(parts):
                sample.add(part)
            samples.append(sample.inputs())
        assert torch.equal(*samples) and samples[0].shape == (50, reads.shape[2])
        rows = {tuple(r) for r in reads.flatten(0, 1).tolist()}
        assert all(tuple(r) in rows for r in samples[0].tolist())

    def test_fewer_tokens_than_images(self, vit: Rewritten) -> None:
        state, x, _ = read(vit, vit.layer, 0, input_tensor(VIT_DATA, 10, 700))
        sample = TokenSample(TokenReader(state, 0), 10, seed=4, size=4)
        sample.add(x)
        assert len(sample.inputs()) == 4
