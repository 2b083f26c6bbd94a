"""Clarity metrics against direct loops, and on planted clusters where the answer is known."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from elude_runtime.offline.evaluation import metrics


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def clusters(images: int, count: int, noise: float = 0.05) -> tuple[Tensor, Tensor]:
    """(embeddings [N, D], cluster of each image): directions of their own, and little besides."""
    label = torch.arange(images) % count
    return metrics.centred_units(torch.eye(count)[label] + noise * random(images, count)), label


class TestMonosemanticity:
    def test_equals_the_double_loop(self) -> None:
        activations, embeddings = random(17, 5).square(), metrics.centred_units(random(17, 6, seed=1))
        found = metrics.monosemanticity(activations, embeddings)
        for f in range(5):
            a = activations[:, f]
            a = (a - a.min()) / (a.max() - a.min())
            over = under = 0.0
            for i in range(17):
                for j in range(17):
                    if i != j:
                        over += float(a[i] * a[j] * (embeddings[i] @ embeddings[j]))
                        under += float(a[i] * a[j])
            assert float(found[f]) == pytest.approx(over / under, abs=1e-5)

    def test_a_feature_of_one_cluster_scores_high_and_a_constant_or_lonely_one_not_at_all(self) -> None:
        embeddings, label = clusters(120, 6)
        lonely = torch.zeros(120)
        lonely[3] = 1
        activations = torch.stack([(label == 2).float(), torch.ones(120), lonely, random(120).abs()], 1)
        one, constant, alone, noise = metrics.monosemanticity(activations, embeddings).tolist()
        assert one > 0.9 and math.isnan(constant) and math.isnan(alone) and abs(noise) < 0.1

    def test_the_upper_part_is_what_lies_above_the_quantile(self) -> None:
        activations = random(200, 3)
        upper = metrics.upper_part(activations)
        assert torch.equal((upper > 0).sum(0), torch.full((3,), 4))
        torch.testing.assert_close(upper, (activations - activations.quantile(0.98, dim=0)).clamp(min=0))


class TestExemplars:
    def test_ranking_is_stable(self) -> None:
        activations = torch.tensor([[1.0, 0.0], [3.0, 2.0], [3.0, 2.0], [0.0, 2.0]])
        assert metrics.ranked_images(activations, 3).tolist() == [[1, 2, 0], [1, 2, 3]]

    def test_mean_pairwise_cosine_equals_the_loop(self) -> None:
        vectors = torch.nn.functional.normalize(random(4, 5, 7), dim=-1)
        for own, found in zip(vectors, metrics.mean_pairwise_cosine(vectors).tolist(), strict=True):
            assert found == pytest.approx(sum(float(a @ b) for a, b in combinations(own, 2)) / 10, abs=1e-6)

    def test_subsets_equal_the_loop(self) -> None:
        vectors = torch.nn.functional.normalize(random(3, 6, 4), dim=-1)
        chosen = torch.rand(3, 6, 8, generator=torch.Generator().manual_seed(2)) < 0.5
        found = metrics.subset_cosines(metrics.pairwise_cosines(vectors), chosen)
        for f in range(3):
            for r in range(8):
                own = vectors[f][chosen[f, :, r]]
                if len(own) < 2:
                    assert math.isnan(float(found[f, r]))
                else:
                    pairs = [float(a @ b) for a, b in combinations(own, 2)]
                    assert float(found[f, r]) == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)


class TestChanceAndCeiling:
    def test_a_perfect_feature_reaches_the_ceiling_and_a_random_one_chance(self) -> None:
        embeddings, label = clusters(180, 6)
        activations = torch.stack([(label == c) + 0.01 * random(180, seed=c) for c in range(6)], 1)
        noise = random(180, 400, seed=9)
        chance, ceiling = metrics.image_chance(embeddings), metrics.image_ceiling(embeddings)

        def score(values: Tensor) -> float:
            exemplars = embeddings[metrics.ranked_images(values, metrics.EXEMPLARS)]
            return metrics.normalised(float(metrics.mean_pairwise_cosine(exemplars).mean()), chance, ceiling)

        assert score(activations) == pytest.approx(1, abs=0.02)
        assert score(noise) == pytest.approx(0, abs=0.02)

    def test_chance_is_the_mean_over_all_pairs(self) -> None:
        embeddings = metrics.centred_units(random(11, 4))
        pairs = [float(a @ b) for a, b in combinations(embeddings, 2)]
        assert metrics.image_chance(embeddings) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)

    def test_the_ceiling_is_that_of_nearest_neighbours(self) -> None:
        embeddings = metrics.centred_units(random(30, 4))
        sets = [sorted(range(30), key=lambda j, i=i: -float(embeddings[i] @ embeddings[j]))[:9] for i in range(30)]  # type: ignore[misc]
        values = [sum(float(embeddings[a] @ embeddings[b]) for a, b in combinations(s, 2)) / 36 for s in sets]
        assert metrics.image_ceiling(embeddings) == pytest.approx(sum(values) / 30, abs=1e-5)

    def test_of_patches_one_an_image_counts(self) -> None:
        """Every image has one patch of a common kind, at another place; all else is noise."""
        tokens = torch.nn.functional.normalize(random(40, 6, 32), dim=-1)
        tokens[torch.arange(40), torch.arange(40) % 6] = torch.nn.functional.one_hot(torch.tensor(0), 32).float()

        def vectors(images: Tensor, places: Tensor) -> Tensor:
            return tokens[images, places]

        ceiling = metrics.token_ceiling(vectors, 40, 6, anchors=400)
        assert 1 / 6 < ceiling < 0.5  # an anchor in six is of the common kind and finds eight more
        exemplars = (torch.arange(40) % 6)[None, :9]
        null = metrics.same_position_null(vectors, exemplars.expand(200, -1), 40)
        assert float(null.mean()) < 0.1

    def test_nothing_to_scale_by(self) -> None:
        assert math.isnan(metrics.normalised(0.2, 0.3, 0.3))


class TestEnds:
    def test_flat_ends_are_none(self) -> None:
        sparse = random(500).clamp(min=0)
        clipped = random(500, seed=1).clamp(max=0.5)
        activations = torch.stack([random(500, seed=2), sparse, clipped, torch.zeros(500)], 1)
        expected = [[False, False], [False, True], [True, False], [True, True]]
        assert metrics.flat_ends(activations).tolist() == expected

    def test_few_tokens_do_not_make_an_end_flat(self) -> None:
        assert not metrics.flat_ends(random(20, 3)).any()

    @pytest.mark.parametrize(("images", "needed"), [(1000, 10), (500, 10), (250, 5), (60, 2)])
    def test_live_needs_ten_of_five_hundred(self, images: int, needed: int) -> None:
        high, low = torch.zeros(images, 3), torch.zeros(images, 3)
        high[:needed, 0] = 2
        high[: needed - 1, 1] = 2
        low[:needed, 2] = -2
        edges = torch.tensor([[1.0, -1.0]]).expand(3, -1)
        assert metrics.live_features(high, low, edges).tolist() == [True, False, True]

    def test_thresholds_are_quantiles(self) -> None:
        sample = random(300, 200)
        expected = torch.stack([sample.quantile(0.98, dim=0), sample.quantile(0.02, dim=0)], 1)
        torch.testing.assert_close(metrics.thresholds(sample), expected)
