"""Attribution against true effect: the figures themselves, from hand-made numbers and naive re-computation."""

from __future__ import annotations

import math
import random
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from scipy.stats import linregress
from scipy.stats import spearmanr as reference_spearman
from support import SECOND, Run, forward_with, refused, write_pictures
from torch import Tensor

from elude_runtime.analysis.attribution import GRADIENT, INTEGRATED, ExplainOptions, ExplainRequest
from elude_runtime.analysis.explain_batch import explain_batch
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError, LayerError
from elude_runtime.offline.bench_attribution import measure_attribution, pair_figures
from elude_runtime.offline.evaluation.attribution_effects import (
    SETS,
    STEPS,
    Agreement,
    Summary,
    layer_agreements,
    layer_attributions,
    true_effects,
)


class TestAgreement:
    def test_an_exact_attribution(self) -> None:
        assert Agreement.of([3.0, -1.0, 0.5], [3.0, -1.0, 0.5]) == Agreement(1.0, pytest.approx(1.0))

    def test_one_that_overstates_twice_has_slope_one_half(self) -> None:
        found = Agreement.of([2.0, 4.0, -6.0], [1.0, 2.0, -3.0])
        assert found.slope == pytest.approx(0.5) and found.spearman == pytest.approx(1)

    def test_ranks_and_sizes_are_told_apart(self) -> None:
        a, e = np.random.default_rng(0).normal(size=(2, 12))
        found = Agreement.of(a.tolist(), e.tolist())
        assert found.spearman == pytest.approx(reference_spearman(a, e).statistic)
        assert found.slope == pytest.approx(linregress(a, e).slope)  # true effect on attribution, not the reverse

    @pytest.mark.parametrize(("a", "e"), [([1.0], [2.0]), ([1.0, 1.0], [0.0, 2.0]), ([0.0, 2.0], [1.0, 1.0]), ([], [])])
    def test_what_does_not_vary_has_no_figure(self, a: list[float], e: list[float]) -> None:
        found = Agreement.of(a, e)
        assert math.isnan(found.spearman) and math.isnan(found.slope)


class TestSummary:
    def test_images_without_a_figure_are_left_out(self) -> None:
        found = Summary.of([1.0, math.nan, 2.0, 6.0])
        assert found is not None and (found.mean, found.median, found.images) == (3.0, 2.0, 3)
        assert 1.0 <= found.low < 3.0 < found.high <= 6.0

    def test_none_without_any(self) -> None:
        assert Summary.of([math.nan]) is None

    def test_the_interval_shrinks_with_the_images(self) -> None:
        values = np.random.default_rng(1).normal(0.5, 1, 900).tolist()
        few, many = Summary.of(values[:30]), Summary.of(values)
        assert few and many and many.high - many.low < (few.high - few.low) / 3
        assert many.low < 0.5 < many.high


class TestPairFigures:
    def test_by_hand(self) -> None:
        found = pair_figures([[(3.0, 2.0), (1.0, 2.0), (2.0, 2.0)], [(-4.0, -2.0)]])
        assert found is not None
        assert found["pairs"] == 4 and found["median"] == 0.5  # of 0.5, 0.5, 0, 1
        assert found["over_images"]["mean"] == 0.75 and found["over_images"]["images"] == 2
        assert found["redundant"] == 0.5  # 3 > 2 and |-4| > |-2|

    def test_pairs_whose_sum_is_nothing_count_nowhere(self) -> None:
        assert pair_figures([[(1.0, 0.0)], []]) is None


def naive_effect(rewritten: Rewritten, row: int, target: Target, features: list[Feature]) -> float:
    """What one image of a full pass loses when the layer's output is short of the features' writes. The others stay
    in the batch: the tiny networks amplify rounding so much that another shape gives other numbers."""
    state = rewritten.model.states[rewritten.layer]

    def without(inputs: Tensor, y: Tensor) -> Tensor:
        tokens = state.linear.tokens(y).clone()
        tokens[row] -= sum(state.write(inputs[row : row + 1], f)[0] for f in features)
        return state.linear.untokens(tokens, y)

    with torch.no_grad():
        outputs = (forward_with(rewritten.model.base, rewritten.images, c) for c in ({}, {rewritten.layer: without}))
        plain, edited = (float(target.value(out)[row]) for out in outputs)
    return plain - edited


@pytest.fixture
def targets(rewritten: Rewritten) -> list[Target]:
    with torch.no_grad():
        return [Target(int(i)) for i in rewritten.model(rewritten.images).argmax(-1)]


class TestLayers:
    @pytest.mark.parametrize("method", list(STEPS))
    @pytest.mark.parametrize("level", ["concepts", "subunits"])
    def test_attributions_are_those_of_an_explanation(
        self, rewritten: Rewritten, targets: list[Target], method: str, level: str
    ) -> None:
        model, layer = rewritten.model, rewritten.layer
        recording = model.record(rewritten.images, [layer])
        found = layer_attributions(model, recording, layer, targets, STEPS[method])
        for row, target in enumerate(targets):
            options = ExplainOptions(method, level=level, top_features=5)
            ((explained,),) = explain_batch(model, recording, [ExplainRequest(row, [target], [layer], options)])
            listed = found[row][level]
            sizes = [abs(a) for _, a in listed]
            assert sizes == sorted(sizes, reverse=True) and len(listed) > 5
            own = dict(listed)
            for feature in explained.layers[0].features:
                assert own[feature.feature] == pytest.approx(feature.attribution, rel=1e-3, abs=1e-5)

    def test_true_effects_are_those_of_full_passes(self, rewritten: Rewritten, targets: list[Target]) -> None:
        model, layer = rewritten.model, rewritten.layer
        recording = model.record(rewritten.images, [layer])
        features = [
            [f for f, _ in [*of_row["concepts"][: 3 + row], *of_row["subunits"][:3]]]
            for row, of_row in enumerate(layer_attributions(model, recording, layer, targets, None))
        ]
        found = true_effects(model, recording, layer, targets, features)
        assert [list(own) for own in found] == features
        for row, own in enumerate(found):
            for feature, effect in own.items():
                assert effect == pytest.approx(
                    naive_effect(rewritten, row, targets[row], [feature]), rel=1e-2, abs=1e-3
                )

    def test_sets(self, vit: Rewritten) -> None:
        """What stands under each set is the agreement of just those features."""
        model, target = vit.model, Target(2)
        recording = model.record(vit.images, [SECOND])
        found = layer_agreements(model, recording, SECOND, [target], 4, random.Random(3))
        assert set(found) == {(m, lv, s) for m in STEPS for lv in ("concepts", "subunits") for s in SETS}
        (by_level,) = layer_attributions(model, recording, SECOND, [target], STEPS[INTEGRATED])
        for level, listed in by_level.items():
            chosen = {
                "top": listed[:4],
                "top positive": [fa for fa in listed if fa[1] > 0][:4],
                "top negative": [fa for fa in listed if fa[1] < 0][:4],
            }
            for name, features in chosen.items():
                effects = [naive_effect(vit, 0, target, [f]) for f, _ in features]
                expected = Agreement.of([a for _, a in features], effects)
                (got,) = found[INTEGRATED, level, name]
                assert got.slope == pytest.approx(expected.slope, rel=0.02, abs=0.02), (level, name)

    def test_random_features_come_from_all(self, vit: Rewritten) -> None:
        recording = vit.model.record(vit.images[:1], [SECOND])
        drawn = [
            layer_agreements(vit.model, recording, SECOND, [Target(0)], 4, random.Random(seed))[
                GRADIENT, "subunits", "random"
            ][0]
            for seed in (1, 1, 2)
        ]
        assert drawn[0] == drawn[1] != drawn[2]


class TestMeasure:
    def test_the_whole(self, vit: Rewritten) -> None:
        found = measure_attribution(vit.model, vit.images.split(2), top=4, paired=3)
        assert found["images"] == 3 and [e["layer"] for e in found["layers"]] == vit.model.layers
        for entry in found["layers"]:
            assert len(entry["agreement"]) == 2 * 2 * 4
            for row in entry["agreement"]:
                if row["spearman"]:
                    assert -1 <= row["spearman"]["low"] <= row["spearman"]["mean"] <= row["spearman"]["high"] <= 1
        tops = {(r["method"], r["set"]): r for r in found["layers"][-1]["agreement"] if r["level"] == "concepts"}
        assert tops[INTEGRATED, "top"]["spearman"]["images"] == 3

    def test_pairs(self, vit: Rewritten) -> None:
        """Of the three best concepts of each image, against full passes."""
        images, found = [], measure_attribution(vit.model, [vit.images], [vit.layer], top=2, paired=3)
        recording = vit.model.record(vit.images, [vit.layer])
        targets = [Target(int(i)) for i in recording.logits.argmax(-1)]
        listed = layer_attributions(vit.model, recording, vit.layer, targets, STEPS[INTEGRATED])
        for row, target in enumerate(targets):
            best = [f for f, _ in listed[row]["concepts"][:3]]
            images.append(
                [
                    (naive_effect(vit, row, target, [a, b]), sum(naive_effect(vit, row, target, [f]) for f in (a, b)))
                    for a, b in combinations(best, 2)
                ]
            )
        expected, got = pair_figures(images), found["layers"][0]["pairs"]
        assert expected is not None and got["pairs"] == expected["pairs"] == 9
        assert got["median"] == pytest.approx(expected["median"], rel=0.02, abs=1e-3)

    def test_what_cannot_be_measured(self, vit: Rewritten, headless: Rewritten) -> None:
        with pytest.raises(LayerError, match=r"blocks\.9"):
            measure_attribution(vit.model, [vit.images], ["blocks.9"])
        with pytest.raises(EludeError, match="no classes"):
            measure_attribution(headless.model, [headless.images])


def test_the_command(vit: Rewritten, run: Run, tmp_path: Any) -> None:
    images = write_pictures(tmp_path / "few", 3)
    asked = ("bench", "attribution", vit.path, "--images", images, "--layers", SECOND, "--top", 3)
    found = run(*asked, "--json").document
    assert found["images"] == 3 and found["checkpoint_sha256"] == vit.model.manifest.checkpoint_sha256
    shown = run(*asked)
    assert shown.code == 0 and SECOND in shown.out and "integrated_gradients" in shown.out and "pairs" in shown.out
    refused(run("bench", "attribution", tmp_path / "none", "--images", images))
