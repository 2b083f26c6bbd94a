"""Intruder detection against a loop over images, on planted clusters, and at chance."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from elude_runtime.offline.evaluation import intruder, metrics
from elude_runtime.offline.evaluation.estimates import image_halves


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scored(activations: Tensor, vectors: Tensor, draws: int = 6, seed: int = 0) -> Tensor:
    """activations [N, F]: both ends."""
    ends = (activations, -activations)
    ranked = torch.stack([metrics.ranked_images(v, 32) for v in ends], 1)
    far = torch.stack([intruder.far_images(v, 32, seed + e) for e, v in enumerate(ends)], 1)
    there = torch.ones(activations.shape[1], 2, dtype=torch.bool)
    halves = image_halves(len(vectors), draws, seed)
    return intruder.intruder_scores(vectors, ranked, far, halves, there, seed)


def test_the_lowest_mean_cosine_is_named() -> None:
    """Against the definition, image by image, the intruder at each place."""
    vectors = torch.nn.functional.normalize(random(300, 5, 3), dim=-1)
    among = torch.stack([(vectors[:, i] * vectors[:, j]).sum(-1) for i, j in combinations(range(4), 2)])
    apart = torch.stack([(vectors[:, i] * vectors[:, 4]).sum(-1) for i in range(4)])
    found = intruder.named(among, apart)
    for five, said in zip(vectors, found.tolist(), strict=True):
        means = [sum(float(five[i] @ five[j]) for j in range(5) if j != i) / 4 for i in range(5)]
        assert said == (means.index(min(means)) == 4)
    assert 0.1 < float(found.float().mean()) < 0.3
    alike = torch.ones(4, 7)
    assert not intruder.named(torch.ones(6, 7), alike).any()  # five copies: nobody is the odd one


def test_accuracy_is_that_of_the_definition() -> None:
    """The share of all (4 of 9, intruder) tasks, which the draws are of; with all images and in a half."""
    vectors, activations = metrics.centred_units(random(60, 4)), random(60, 3, seed=1)
    vectors = metrics.centred_units(vectors + 0.6 * activations @ random(3, 4, seed=2))
    ranked = torch.stack([metrics.ranked_images(a, 32) for a in (activations, -activations)], 1)
    far = torch.stack([intruder.far_images(a, 32, e) for e, a in enumerate((activations, -activations))], 1)
    half = image_halves(60, 1, 3)[:, 1]
    columns = torch.stack([torch.ones(60, dtype=torch.bool), *[half] * 400], 1)
    found = intruder.intruder_scores(vectors, ranked, far, columns, torch.ones(3, 2, dtype=torch.bool), 0)
    gram = (vectors @ vectors.T).tolist()
    for f in range(3):
        for e in range(2):
            for kept, value, bound in (
                (torch.ones(60, dtype=torch.bool), found[f, e, 0], 0.25),  # 40 draws
                (half, found[f, e, 1:].mean(), 0.03),  # 6,400 draws
            ):
                top = [i for i in ranked[f, e].tolist() if kept[i]][:9]
                right = []
                for other in (i for i in far[f, e].tolist() if kept[i]):
                    for four in combinations(top, 4):
                        five = (*four, other)
                        means = [sum(gram[i][j] for j in five if j != i) for i in five]
                        right.append(means[4] < min(means[:4]))
                assert float(value) == pytest.approx(sum(right) / len(right), abs=bound), (f, e)


def test_planted_features_are_told_and_noise_is_at_chance() -> None:
    label = torch.arange(180) % 6
    vectors = metrics.centred_units(torch.eye(6)[label] + 0.05 * random(180, 6))
    planted = torch.stack([(label == c) + 0.01 * random(180, seed=c) for c in range(6)], 1)
    assert float(scored(planted, vectors)[:, 0].mean()) > 0.99  # the other end: five clusters, no odd one
    noise = scored(random(180, 400, seed=9), metrics.centred_units(random(180, 40, seed=3)))
    assert float(noise[..., 0].mean()) == pytest.approx(intruder.CHANCE, abs=0.01)
    assert float(noise[..., 1:].nanmean()) == pytest.approx(intruder.CHANCE, abs=0.01)


def test_intruders_are_from_the_lower_half_and_no_exemplars() -> None:
    activations = random(100, 5)
    activations[:, 0] = torch.cat([torch.tensor([1.0]), torch.zeros(99)])  # of equal ones the later rank lower
    far = intruder.far_images(activations, 32, 0)
    assert far.shape == (5, intruder.CANDIDATES) and (far[0] >= 50).all()
    median = activations.median(0).values
    for f in range(1, 5):
        assert (activations[far[f], f] <= median[f]).all()
    few = intruder.far_images(activations[:40], 32, 0)
    ranked = metrics.ranked_images(activations[:40], 32)
    assert not any(set(a.tolist()) & set(b.tolist()) for a, b in zip(few, ranked, strict=True))


def test_the_same_seed_gives_the_same_draws() -> None:
    activations, vectors = random(80, 7), metrics.centred_units(random(80, 5, seed=1))
    one, same, other = (scored(activations, vectors, seed=s) for s in (1, 1, 2))
    assert torch.equal(one.nan_to_num(9), same.nan_to_num(9)) and not torch.equal(
        one.nan_to_num(9), other.nan_to_num(9)
    )


def test_ends_that_are_none_and_halves_with_too_few() -> None:
    activations, vectors = random(60, 3), metrics.centred_units(random(60, 5, seed=1))
    ranked = metrics.ranked_images(activations, 32)[:, None].expand(-1, 2, -1)
    far = intruder.far_images(activations, 32, 0)[:, None].expand(-1, 2, -1)
    kept = torch.ones(60, 3, dtype=torch.bool)
    kept[ranked[0, 0, 8:], 1] = False  # eight of its best are left
    kept[far[1, 0], 2] = False
    ends = torch.tensor([[True, False], [True, True], [False, False]])
    found = intruder.intruder_scores(vectors, ranked, far, kept, ends, 0)
    assert found[..., 0].isnan().tolist() == (~ends).tolist()
    assert found[0, 0, 1].isnan() and found[1, :, 2].isnan().all()
    nobody = intruder.intruder_scores(vectors, ranked, far, kept, torch.zeros(3, 2, dtype=torch.bool), 0)
    assert nobody.shape == (3, 2, 3) and nobody.isnan().all()
