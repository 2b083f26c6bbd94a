"""Bootstrap figures: calibrated where the truth is known, paired where sets share images and neurons."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from elude_runtime.offline.evaluation.estimates import Estimate, FeatureDraws, image_halves, number


def test_halves() -> None:
    halves = image_halves(31, 20, 0)
    assert halves.shape == (31, 21) and halves[:, 0].all()
    assert (halves[:, 1:].sum(0) == 16).all() and len(halves[:, 1:].T.unique(dim=0)) == 20
    assert torch.equal(halves, image_halves(31, 20, 0)) and not torch.equal(halves, image_halves(31, 20, 1))


def test_halves_vary_as_the_mean_of_all_images_does() -> None:
    values = torch.randn(400, generator=torch.Generator().manual_seed(0))
    halves = image_halves(400, 2000, 0)[:, 1:].float()
    spread = float(((values @ halves) / halves.sum(0)).std())
    assert spread == pytest.approx(float(values.std()) / 20, rel=0.08)


def test_the_interval_of_a_mean_over_features() -> None:
    scores = torch.randn(300, 2, generator=torch.Generator().manual_seed(1))
    figure = FeatureDraws.of("set", 300, 2000, 0).average(scores, torch.ones(300, 2))
    low, high = figure.interval
    assert figure.value == pytest.approx(float(scores.mean()), abs=1e-6)
    width = 2 * 1.96 * float(scores.mean(1).std()) / 300**0.5
    assert high - low == pytest.approx(width, rel=0.1) and low < figure.value < high


def test_siblings_are_drawn_together() -> None:
    neurons = torch.arange(60) // 6
    one = FeatureDraws.of("sub-units", 60, 500, 0, neurons)
    assert (one.counts.view(501, 10, 6) == one.counts.view(501, 10, 6)[..., :1]).all()
    other = FeatureDraws.of("random sub-units", 30, 500, 0, torch.arange(30) // 3)
    assert torch.equal(one.counts[:, ::6], other.counts[:, ::3])  # of the same neurons: compared in pairs
    alone = FeatureDraws.of("concepts", 10, 500, 0)
    assert not torch.equal(alone.counts, one.counts[:, ::6])
    same = torch.randn(10, generator=torch.Generator().manual_seed(0)).repeat_interleave(6)[:, None]
    assert np.ptp(one.average(same, torch.ones(60, 1)).interval) > 0


def test_scores_that_are_none_take_no_part() -> None:
    scores = torch.tensor([[1.0, torch.nan], [3.0, 5.0]])
    weights = torch.tensor([[1.0, 9.0], [1.0, 2.0]])
    assert FeatureDraws.of("set", 2, 10, 0).average(scores, weights).value == pytest.approx((1 + 3 + 10) / 4)


def test_differences_are_paired() -> None:
    draws = np.random.default_rng(0).normal(size=1000)
    one, other = Estimate(1.0, draws + 1), Estimate(0.5, draws)
    low, high = (one - other).interval
    assert (low, high) == pytest.approx((0.5, 0.5))
    assert one.interval[0] < 0 < one.interval[1]  # each alone is wide


def test_the_draws_own_offset_is_taken_off() -> None:
    draws = np.random.default_rng(0).normal(size=5000)
    assert Estimate(2.0, draws - 7).interval == pytest.approx((0.04, 3.96), abs=0.1)


def test_what_json_holds() -> None:
    assert number(float("nan")) is None and number(1.234567) == 1.23457
    assert Estimate(float("nan"), np.full(5, np.nan)).document() == {"value": None, "low": None, "high": None}
