"""Attribution against true effect in an evaluation: one token type, beside a random partition of the same sizes."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import Rewritten
from scipy.stats import spearmanr
from support import SECOND, VIT_DATA, forward_with, input_tensor
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.offline.evaluation import attribution_effects as module
from elude_runtime.offline.evaluation.own_sets import random_state
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource


@pytest.fixture(scope="module")
def images() -> Tensor:
    return input_tensor(VIT_DATA, 5, 900)


@pytest.fixture(scope="module")
def shuffled(vit: Rewritten, images: Tensor) -> SplitState:
    state = vit.model.state(SECOND)
    recording = vit.model.record(images, [SECOND])
    inputs = torch.cat([r for _, r in TokenReader(state, 0).read(recording.x[SECOND].detach())]).flatten(0, 1)
    return random_state(state, 0, inputs, 0)


def test_a_random_partition_of_one_type(vit: Rewritten, shuffled: SplitState) -> None:
    """Sizes stay, edges move, the other type keeps its own, and the parts still add up."""
    own, made = vit.model.state(SECOND).partition, shuffled.partition
    assert not own.edges[0].equal(made.edges[0]) and own.edges[1].equal(made.edges[1])
    for k in range(own.edges.shape[1]):
        sizes = [torch.bincount(p.edges[0, k].long(), minlength=256) for p in (own, made)]
        assert sizes[0].equal(sizes[1])
    x = vit.model.record(vit.images, [SECOND]).x[SECOND]
    torch.testing.assert_close(shuffled.sums(x).sum(-1), vit.model.state(SECOND).sums(x).sum(-1), atol=1e-4, rtol=1e-4)
    assert not made.mean[0].equal(own.mean[0]) and made.mean[1].equal(own.mean[1])


def test_the_models_own_features_stay_as_they_are(vit: Rewritten, images: Tensor, shuffled: SplitState) -> None:
    """The rows of the checkpoint's features are the benchmark's agreement of that token type's features alone."""
    rows = module.measure_agreement(
        vit.model, SECOND, 0, shuffled, ImageSource(images, VIT_DATA, batch_size=5), 4, lambda *_: None
    )
    assert {(r.features, r.method, r.level, r.set) for r in rows} == {
        (f, m, lv, s) for f in (module.OWN, module.RANDOM) for m in module.STEPS for lv in module.LEVELS
        for s in module.EVALUATED
    }  # fmt: skip
    recording = vit.model.record(images, [SECOND])
    targets = [Target(int(i)) for i in recording.logits.argmax(-1)]
    expected = module.layer_agreements(
        vit.model, recording, SECOND, targets, module.TOP, random.Random(4), token_type=0
    )
    for row in rows:
        if row.features == module.OWN:
            summary = module.Summary.of([a.slope for a in expected[row.method, row.level, row.set]])
            assert row.slope == summary
    document = rows[0].document()
    assert document["spearman"].keys() == {"mean", "low", "high", "median", "images"}


def test_the_random_partitions_figure_against_full_passes(vit: Rewritten, images: Tensor, shuffled: SplitState) -> None:
    """Spearman and slope of its ten largest patch concepts in one image, each taken out by a hook."""
    image = images[:1]
    rows = module.measure_agreement(
        vit.model, SECOND, 0, shuffled, ImageSource(image, VIT_DATA, batch_size=1), 0, lambda *_: None
    )
    (row,) = [
        r for r in rows if (r.features, r.method, r.level, r.set) == (module.RANDOM, "gradient", "concepts", "top")
    ]
    recording = vit.model.record(image, [SECOND])
    target = Target(int(recording.logits.argmax()))
    states = {**vit.model.states, SECOND: shuffled}
    (listed,) = module.layer_attributions(vit.model, recording, SECOND, [target], None, states=states)
    best = [(f, a) for f, a in listed["concepts"] if f.token_type == 0][: module.TOP]
    plain = float(target.value(forward_with(vit.base, image, {}).detach()))
    effects = []
    for feature, _ in best:
        out = forward_with(vit.base, image, {SECOND: lambda x, y, f=feature: y - shuffled.write(x, f)})
        effects.append(plain - float(target.value(out.detach())))
    a = np.array([v for _, v in best])
    assert row.spearman and row.slope
    assert row.spearman.mean == pytest.approx(float(spearmanr(a, effects).statistic), abs=0.03)
    assert row.slope.mean == pytest.approx(np.polyfit(a, effects, 1)[0], rel=0.03, abs=0.02)
