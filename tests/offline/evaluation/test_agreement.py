"""Agreement against scikit-learn, and on features whose relation is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, roc_auc_score
from torch import Tensor

from elude_runtime.offline.evaluation import agreement


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_ari_is_that_of_scikit_learn(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    one, other = (torch.randint(0, n, (60,), generator=generator) for n in (3, 5))
    other[:30] = one[:30] + 7
    assert agreement.adjusted_rand_index(one, other) == pytest.approx(adjusted_rand_score(one, other))


def test_ari_of_the_same_partition_under_other_names() -> None:
    labels = torch.tensor([0, 0, 1, 2, 2])
    assert agreement.adjusted_rand_index(labels, 9 - labels) == 1.0
    assert agreement.adjusted_rand_index(torch.zeros(4), torch.zeros(4)) == 1.0


def test_auc_is_that_of_scikit_learn() -> None:
    values, truth = random(50, 4).round(decimals=1), random(50, seed=1) > 0.3  # with ties
    found = agreement.auc(values, truth).tolist()
    assert found == pytest.approx([roc_auc_score(truth, values[:, f]) for f in range(4)], abs=1e-6)
    assert math.isnan(float(agreement.auc(values, torch.ones(50, dtype=torch.bool))[0]))


def test_concept_auc_chooses_on_one_split_and_reports_on_the_other() -> None:
    truth = torch.arange(80) % 4 == 0
    choosing = torch.arange(80) < 40
    high, low = random(80, 6), random(80, 6, seed=1)
    low[:, 4] = -truth.float() * 5 + 0.1 * random(80, seed=2)  # its negative end tells
    best = agreement.concept_auc(high, low, truth[None], choosing)[0]
    assert (best.feature, best.sign) == (4, -1) and best.chosen == best.reported == 1.0
    high[:, 2] = torch.where(choosing, truth * 9.0, random(80, seed=3))  # tells on the first split only
    low[:, 4] = random(80, seed=4)
    lucky = agreement.concept_auc(high, low, truth[None], choosing)[0]
    assert (lucky.feature, lucky.sign, lucky.chosen) == (2, 1, 1.0) and lucky.reported < 0.8


def test_near_duplicates() -> None:
    a, b = random(400), random(400, seed=1)
    features = torch.stack([a, -2 * a + 0.01 * b, b, torch.ones(400)], 1)
    assert agreement.near_duplicates(features).tolist() == [True, True, False, False]
    many = random(50, 1500, seed=2)
    many[:, 1400] = many[:, 3]
    expected = (np.abs(np.corrcoef(many.T.numpy()) - np.eye(1500)) > 0.95).any(1)
    assert agreement.near_duplicates(many).tolist() == expected.tolist()


def test_distinct_sets_do_not_heed_order() -> None:
    assert agreement.distinct_sets(torch.tensor([[1, 2, 3], [3, 2, 1], [1, 2, 4]])) == 2


class TestMatching:
    def test_a_permutation_is_found_and_noise_is_not(self) -> None:
        one = random(500, 8)
        other = one[:, torch.randperm(8, generator=torch.Generator().manual_seed(1))]
        match = agreement.matched_correlation(one, other)
        assert match.mean == pytest.approx(1, abs=1e-5) and abs(match.random) < 0.15

    def test_partners_are_taken_once(self) -> None:
        one = random(500, 2)
        other = torch.stack([one[:, 0], one[:, 0] + 0.01 * random(500, seed=3)], 1)
        assert agreement.matched_correlation(one, other).mean < 0.6

    def test_signs(self) -> None:
        one = random(500, 3)
        assert agreement.matched_correlation(one, -one, signed=False).mean == pytest.approx(1, abs=1e-5)
        assert agreement.matched_correlation(one, -one).mean < 0.2

    def test_beside_a_random_set(self) -> None:
        one = random(300, 4)
        match = agreement.matched_to_random(one, one.flip(1), random(300, 4, seed=5))
        assert match.mean == pytest.approx(1, abs=1e-5) and match.random < 0.2
