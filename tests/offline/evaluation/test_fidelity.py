"""Reconstructions in the layer's place: against a hook on the base model, and what the sets give back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import Rewritten
from support import SECOND, VIT_DATA, forward_with, input_tensor
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.offline.evaluation import own_sets
from elude_runtime.offline.evaluation.baselines import BaselineOptions, baseline_sets
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.fidelity import TopKept, measure_fidelity, reconstructed
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource


def silent(*_: object) -> None:
    pass


def made(rewritten: Rewritten, token_type: int) -> tuple[SplitState, Tensor, list[FeatureSet]]:
    """(state, what tokens of 12 other images read [12, T_p, m], own and baseline sets)."""
    state = rewritten.model.state(rewritten.layer)
    images = input_tensor(rewritten.data, 12, 500)
    x = rewritten.model.record(images, [state.name]).x[state.name].float()
    reads = torch.cat([part for _, part in TokenReader(state, token_type).read(x)])
    flat = reads.flatten(0, 1)
    split = own_sets.own_split(state, token_type, flat)
    sets = own_sets.own_sets(split, torch.tensor([1, 4]), flat, 0)
    weight = own_sets.full_width(split.weight, own_sets.neuron_groups(len(split.weight), split.groups), split.groups)
    options = BaselineOptions(("hidden", "ica", "kmeans", "sae", "transcoder"), active=(2,), steps=60)
    sets += baseline_sets(
        flat, weight.flatten(1), concepts=6, subunits=4, neurons=[1, 4], seed=0, options=options, progress=silent
    )
    return state, reads, sets


@pytest.fixture(params=[("vit", 0), ("vit", 1), ("mobilenet", 0)], ids=str)
def case(request: pytest.FixtureRequest) -> tuple[Rewritten, int]:
    name, token_type = request.param
    return request.getfixturevalue(name), token_type


def test_what_sets_give_back(case: tuple[Rewritten, int]) -> None:
    """The checkpoint's own and the random partitions all of the output, to rounding; lossy sets the parts that
    ablations take out, and a constant; and about what their FVU says, where tokens enough were held out for that."""
    state, reads, sets = made(*case)
    weight = state.linear.weight()
    with_bias = state.linear.tokens(state.linear.output(input_of(case), weight))[:, state.layout.slices[case[1]]]
    spread = float((with_bias - with_bias.mean((0, 1))).square().sum())
    whole = [one for one in sets if one.lossless and one.reconstruct]
    assert {one.name for one in whole} == {
        "concepts", "random concepts", "sub-units", "random sub-units", "another neuron's sub-units",
    }  # fmt: skip
    lossy = {one.name: one for one in sets if one.reconstruct and not one.lossless}
    assert len([n for n in lossy if "SAE" in n]) >= 4 and any("transcoder" in n for n in lossy) and "ICA of y" in lossy
    assert not {"hidden units", "k-means directions of x"} & lossy.keys()
    for one in whole:
        torch.testing.assert_close(reconstructed(one, reads), with_bias, rtol=1e-4, atol=1e-4)
    for name, one in lossy.items():
        given = reconstructed(one, reads)
        missed = float((given - with_bias).square().sum()) / spread
        assert missed < 0.95, name  # the mean is there too
        if len(reads.flatten(0, 1)) > 100:
            known = one.facts.get("fvu_output", one.facts.get("fvu"))
            assert missed == pytest.approx(known, rel=0.5, abs=0.08), name
        assert one.ablation is not None
        parts = one.ablation(reads.flatten(0, 1), torch.arange(len(one.share))).view_as(given)
        constant = (given - parts)[:1, :1].expand_as(given)
        torch.testing.assert_close(given - parts, constant, rtol=1e-3, atol=1e-3)


def input_of(case: tuple[Rewritten, int]) -> Tensor:
    rewritten, _ = case
    layer = rewritten.layer
    return rewritten.model.record(input_tensor(rewritten.data, 12, 500), [layer]).x[layer].float()


def test_top_classes_are_those_of_a_hook_on_the_layer(vit: Rewritten) -> None:
    state, _, sets = made(vit, 0)
    images = input_tensor(VIT_DATA, 40, 900)
    nothing = FeatureSet("nothing", lambda x: x, torch.ones(3), False, reconstruct=lambda x: torch.zeros(len(x), 32))
    large = FeatureSet("large", lambda x: x, torch.ones(3), False, reconstruct=lambda x: 9 * x[:, :32])
    without = FeatureSet("without", lambda x: x, torch.ones(3), False)
    asked = [*sets, nothing, large, without]
    source = ImageSource(images, VIT_DATA, batch_size=16)
    found = measure_fidelity(vit.model, TokenReader(state, 0), asked, source, silent)
    top = vit.base(images).argmax(1)
    values = {}
    for one, kept in zip(asked, found, strict=True):
        if one.reconstruct is None:
            assert kept is None
            continue

        def change(x: Tensor, y: Tensor, one: FeatureSet = one) -> Tensor:
            patches = reconstructed(one, x[:, 1:]) + state.linear.bias()
            return torch.cat([y[:, :1], patches], 1)  # the class token keeps its own

        expected = int((forward_with(vit.base, images, {SECOND: change}).argmax(1) == top).sum())
        assert kept is not None and (kept.kept, kept.images) == (expected, 40), one.name
        values[one.name] = kept.value
    assert values["concepts"] == values["sub-units"] == 1
    assert values["large"] < 1 and min(values.values()) < 0.9
    assert found[-1] is None


def test_a_part_left_out_is_noticed(vit: Rewritten) -> None:
    """What is measured of our own sets can fail: without the edges of every neuron's first sub-unit it does."""
    state, reads, _ = made(vit, 0)
    split = own_sets.own_split(state, 0, reads.flatten(0, 1))
    lost = replace(split, weight=split.weight * (split.partition.slots(0) != 0)[..., None])
    source = ImageSource(input_tensor(VIT_DATA, 40, 900), VIT_DATA, batch_size=16)
    sets = [own_sets.concept_set(one, "concepts") for one in (split, lost)]
    whole, broken = measure_fidelity(vit.model, TokenReader(state, 0), sets, source, silent)
    assert whole is not None and broken is not None and whole.value == 1 and broken.value < 1


def test_wilsons_interval() -> None:
    assert TopKept(100, 100).interval == (pytest.approx(0.963, abs=1e-3), pytest.approx(1))
    low, high = TopKept(50, 100).interval
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert TopKept(3, 4).document() == {"value": 0.75, "low": 0.30064, "high": 0.95441, "images": 4}
    assert TopKept().document()["value"] is None
