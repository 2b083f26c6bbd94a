"""Known properties: chosen on one half, reported on the other, and the differences with their errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import Tensor

from elude_runtime.offline.evaluation import known_properties as module
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, RANDOM_CONCEPTS, RANDOM_SUBUNITS, SUBUNITS
from elude_runtime.offline.evaluation.tokens import Peaks

IMAGES, PROPERTIES = 400, 12


def noise(*size: int, seed: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def truth() -> dict[str, Tensor]:
    return {f"p{i}": noise(IMAGES, seed=100 + i) > 0 for i in range(PROPERTIES)}


def peaks(truth: dict[str, Tensor], features: int, strength: float, seed: int) -> Peaks:
    """Feature i carries property i, at its negative end where i is odd; the others are noise."""
    high, low = noise(IMAGES, features, seed=seed), noise(IMAGES, features, seed=seed + 1)
    for i, has in enumerate(truth.values()):
        if i < features:
            end = low if i % 2 else high
            end[:, i] += (-1 if i % 2 else 1) * strength * has.float()
    nothing = torch.zeros(IMAGES, features, dtype=torch.int32)
    return Peaks(high, low, nothing, nothing)


def named(name: str, features: int, **facts: Any) -> FeatureSet:
    return FeatureSet(name, lambda x: x, torch.ones(features), True, facts=facts)


def measured(truth: dict[str, Tensor], **made: tuple[FeatureSet, Peaks]) -> module.KnownProperties:
    choosing = module.choosing_half(IMAGES, 0)
    sets, values = [s for s, _ in made.values()], [p for _, p in made.values()]
    aucs = [module.property_auc(p, truth, choosing) for p in values]
    return module.known_properties(sets, values, aucs, truth, choosing, 200, 0)


@pytest.fixture(scope="module")
def found(truth: dict[str, Tensor]) -> module.KnownProperties:
    return measured(
        truth,
        concepts=(named(CONCEPTS, 14), peaks(truth, 14, 2.0, 1)),
        subunits=(named(SUBUNITS, 30), peaks(truth, 30, 0.0, 3)),
        random=(named(RANDOM_CONCEPTS, 14), peaks(truth, 14, 0.0, 5)),
        random_subunits=(named(RANDOM_SUBUNITS, 27), peaks(truth, 27, 0.0, 7)),
        hidden=(named("hidden units", 20), peaks(truth, 20, 2.0, 9)),
        sae=(named("TopK SAE on y", 20, baseline="sae"), peaks(truth, 20, 4.0, 11)),
        weak=(named("TopK SAE on x", 90, baseline="sae"), peaks(truth, 90, 0.5, 13)),
    )


def test_halves_are_drawn_at_random() -> None:
    half = module.choosing_half(101, 3)
    assert int(half.sum()) == 51 and half.tolist() != (torch.arange(101) % 2 == 0).tolist()
    assert module.choosing_half(101, 3).equal(half) and not module.choosing_half(101, 4).equal(half)


def test_each_property_is_told_by_its_feature(truth: dict[str, Tensor]) -> None:
    choosing, made = module.choosing_half(IMAGES, 0), peaks(truth, 14, 2.0, 1)
    for i, (name, one) in enumerate(module.property_auc(made, truth, choosing).items()):
        assert (one.feature, one.sign) == (i, -1 if i % 2 else 1)
        values = (-made.low if i % 2 else made.high)[~choosing, i]
        assert one.reported == pytest.approx(roc_auc_score(truth[name][~choosing], values), abs=1e-6)


def test_as_many_random_ones_are_chosen_from(found: module.KnownProperties) -> None:
    """Three of the thirty random sub-units never vary: both sides then choose from 14 + 27."""
    ours, random = found.contenders[module.OURS], found.contenders[module.RANDOM]
    assert ours.features == random.features == 41
    assert found.contenders[SUBUNITS].features == 30
    assert ours.sets == (CONCEPTS, SUBUNITS) and random.sets == (RANDOM_CONCEPTS, RANDOM_SUBUNITS)


def test_means_and_the_sae_that_does_best(found: module.KnownProperties) -> None:
    assert found.contenders[module.SPARSE].sets == ("TopK SAE on y",)
    assert found.means[CONCEPTS] == pytest.approx(found.contenders[CONCEPTS].mean)
    assert 0.85 < found.means[CONCEPTS] < 0.97 and 0.4 < found.means[RANDOM_CONCEPTS] < 0.6


def test_verdicts(found: module.KnownProperties) -> None:
    said = {(d.one, d.other): d for d in found.differences}
    assert said[module.OURS, module.RANDOM].verdict == module.ABOVE
    assert said[module.OURS, module.HIDDEN].verdict == module.EVEN  # made equally strong
    assert said[module.OURS, module.SPARSE].verdict == module.BELOW
    d = said[module.OURS, module.RANDOM]
    a, b = (np.array(list(found.contenders[n].reported.values())) for n in (module.OURS, module.RANDOM))
    assert d.mean == pytest.approx((a - b).mean())
    # over properties alone the error is that of a mean of twelve; images add theirs
    alone = (a - b).std(ddof=1) / PROPERTIES**0.5
    assert 0.9 * alone < d.standard_error < 2 * alone


def test_the_errors_draws_are_auc_of_resampled_images(truth: dict[str, Tensor]) -> None:
    marks = {"p": truth["p0"].numpy()}
    values = noise(IMAGES, seed=40).numpy().round(1)  # with ties
    drawn = module._Draws(marks, 5, 0)
    for counts, auc in zip(drawn.counts.astype(int), drawn.auc({"p": values})[:, 0], strict=True):
        rows = np.repeat(np.arange(IMAGES), counts)
        assert auc == pytest.approx(roc_auc_score(marks["p"][rows], values[rows]), abs=1e-6)


def test_document(found: module.KnownProperties) -> None:
    document: dict[str, Any] = found.document()
    assert document["best"][module.RANDOM]["features"] == 41
    assert {d["verdict"] for d in document["differences"]} <= {module.ABOVE, module.BELOW, module.EVEN}
