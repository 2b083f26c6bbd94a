"""Baselines: against scikit-learn, lossless where they say so, shares as defined, the same for the same seed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torch import Tensor

from elude_runtime.errors import SettingsError
from elude_runtime.offline.evaluation import directions
from elude_runtime.offline.evaluation.baselines import BASELINES, BaselineOptions, baseline_sets
from elude_runtime.offline.evaluation.calibration import CalibrationTokens
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.gating import _Routes

D, M = 10, 24
FAST = BaselineOptions(tokens=1000, end_tokens=50, active=(2, 4), steps=60, batch=128)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int = 1200, dead: bool = True) -> Tensor:
    """[count, M]: a few rectified sources mixed, as after GELU; the input 5 never changes."""
    g = generator()
    sources = torch.randn(count, 16, generator=g).relu()
    inputs = sources @ torch.randn(16, M, generator=g) + 0.3 * torch.randn(count, M, generator=g) + 2
    if dead:
        inputs[:, 5] = 3.0
    return inputs


WEIGHT = torch.randn(D, M, generator=generator(1))
NEURONS = [1, 4, 7]


def make(
    inputs: Tensor, *names: str, options: BaselineOptions = FAST, seed: int = 0, weight: Tensor = WEIGHT
) -> list[FeatureSet]:
    made = baseline_sets(
        inputs,
        weight,
        concepts=8,
        subunits=4,
        neurons=NEURONS,
        logits=inputs @ torch.randn(M, 12, generator=generator(2)),
        heads=4,
        seed=seed,
        options=replace(options, baselines=names or BASELINES),
        progress=lambda stage, done, total: None,
    )
    return list(made)


@pytest.fixture(scope="module")
def everything() -> dict[str, FeatureSet]:
    return {one.name: one for one in make(tokens())}


def centred_output(inputs: Tensor, weight: Tensor = WEIGHT) -> Tensor:
    return (inputs - tokens().mean(0)) @ weight.T


def all_of(one: FeatureSet) -> Tensor:
    return torch.arange(len(one.share))


def test_every_baseline_is_there(everything: dict[str, FeatureSet]) -> None:
    assert {one.facts["baseline"] for one in everything.values()} == set(BASELINES)
    for one in everything.values():
        assert one.facts["seconds"] >= 0


def test_shapes_units_and_shares(everything: dict[str, FeatureSet]) -> None:
    """Activations in units of their standard deviation; a share is Cov(part, y) / Var(y) of a feature with a part of y,
    and the part that is linearly explained of one without."""
    inputs = tokens()
    output = centred_output(inputs)
    variance = output.square().sum()
    for one in everything.values():
        values = one.activations(inputs)
        assert values.shape == (1200, len(one.share)) and values.dtype == torch.float32
        live = values.std(0, correction=0) > 1e-3
        assert int((~live).sum()) == one.facts["dead"], one.name
        torch.testing.assert_close(values[:, live].std(0, correction=0), torch.ones(int(live.sum())), rtol=1e-3, atol=0)
        assert one.ablation is not None and (one.write is None) == (one.attribution is not None)
        gradient = torch.randn(len(inputs), D, generator=generator(4))
        attribution = one.attribution(inputs, gradient) if one.attribution else None
        for f in range(len(one.share)):
            part = one.ablation(inputs, torch.tensor([f]))
            if attribution is not None:
                assert float(attribution[f]) == pytest.approx(float((part * gradient).sum()), rel=1e-3, abs=1e-2)
            share = float((part * output).sum() / variance)
            assert float(one.share[f]) == pytest.approx(share, rel=1e-3, abs=1e-5), one.name
            if one.write is not None:
                expected = torch.outer(values[:, f] - values[:, f].mean(), one.write[f])
                torch.testing.assert_close(part, expected, rtol=1e-3, atol=1e-3)


def test_lossless_sets_add_up_to_the_centred_output(everything: dict[str, FeatureSet]) -> None:
    """At tokens that were never seen too; of gating and heads the chosen neurons."""
    unseen = tokens()[:300] * 1.1 + torch.randn(300, M, generator=generator(3))
    output = centred_output(unseen)
    lossless = [one for one in everything.values() if one.lossless]
    assert {one.facts["baseline"] for one in lossless} == set(BASELINES) - {
        "ica",
        "kmeans",
        "logits",
        "sae",
        "transcoder",
    }
    for one in lossless:
        assert one.ablation is not None
        rows = one.facts.get("neurons", list(range(D)))
        total = one.ablation(unseen, all_of(one))[:, rows]
        torch.testing.assert_close(total, output[:, rows], rtol=1e-3, atol=1e-2)
        if "neurons" not in one.facts:
            assert float(one.share.sum()) == pytest.approx(1, abs=1e-4)


def test_sums_of_ablations_are_additive(everything: dict[str, FeatureSet]) -> None:
    inputs = tokens()[:50]
    for one in everything.values():
        if one.facts["baseline"] not in ("kmeans", "logits"):  # their parts overlap
            assert one.ablation is not None
            both, first, second = (one.ablation(inputs, torch.tensor(f)) for f in ([0, 3], [0], [3]))
            torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-4)


def test_directions_that_only_read_take_what_they_explain_together(everything: dict[str, FeatureSet]) -> None:
    inputs = tokens()
    for name in ("k-means directions of x", "directions read for the logits"):
        one = everything[name]
        assert one.write is None and one.ablation is not None
        values = one.activations(inputs).double()
        design = torch.cat([values, torch.ones(len(values), 1, dtype=torch.float64)], 1)
        output = centred_output(inputs).double()
        fitted = design @ torch.linalg.lstsq(design, output, rcond=1e-4, driver="gelsd").solution
        torch.testing.assert_close(one.ablation(inputs, all_of(one)).double(), fitted, rtol=1e-3, atol=1e-3)


def test_pca_agrees_with_scikit_learn(everything: dict[str, FeatureSet]) -> None:
    inputs = tokens()
    theirs = PCA().fit((inputs @ WEIGHT.T).double().numpy())
    one = everything["PCA directions of y"]
    np.testing.assert_allclose(one.share, theirs.explained_variance_ratio_, rtol=1e-3)
    assert one.write is not None
    ours = torch.nn.functional.normalize(one.write, dim=1).double().numpy()
    np.testing.assert_allclose(np.abs((ours * theirs.components_).sum(1)), 1, atol=1e-4)


@pytest.mark.parametrize("of", ["x", "y"])
def test_ica_recovers_planted_sources(of: str) -> None:
    g = generator(4)
    sources = _laplace((5000, 6), g)
    mixing = torch.randn(6, M, generator=g)
    calibration = CalibrationTokens.of(sources @ mixing, WEIGHT)
    one = directions.independent_components(calibration, 8, torch.arange(5000), 0, of)
    assert len(one.share) == 6  # no more components than the tokens have dimensions
    found = one.activations(calibration.inputs)
    correlation = np.abs(np.corrcoef(sources.T, found.T)[:6, 6:])
    rows, columns = linear_sum_assignment(-correlation)
    assert correlation[rows, columns].min() > 0.98
    assert one.facts["converged"] and one.facts["fvu"] == pytest.approx(0, abs=1e-3)
    assert one.write is not None
    cosine = torch.nn.functional.cosine_similarity(one.write[columns], mixing @ WEIGHT.T)
    assert float(cosine.abs().min()) > 0.98


def _laplace(shape: tuple[int, int], g: torch.Generator) -> Tensor:
    uniform = torch.rand(shape, generator=g) - 0.5
    return -uniform.sign() * (1 - 2 * uniform.abs()).clamp(min=1e-7).log()


def test_kmeans_directions_agree_with_scikit_learn() -> None:
    """Tokens around eight well separated centres: the same clusters, read by centroid minus mean."""
    g = generator(5)
    centres = 3 * torch.randn(8, M, generator=g)
    inputs = (centres[:, None] + 0.1 * torch.randn(8, 100, M, generator=g)).flatten(0, 1)
    scaled = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
    unit = scaled / scaled.norm(dim=1, keepdim=True)
    theirs = KMeans(8, n_init=10, random_state=0).fit(unit.numpy())
    readout = torch.from_numpy(theirs.cluster_centers_) - unit.mean(0)
    expected = scaled @ readout.T
    (one,) = make(inputs, "kmeans", seed=1)
    correlation = np.corrcoef(one.activations(inputs).T, expected.T)[:8, 8:]
    rows, columns = linear_sum_assignment(-correlation)
    assert correlation[rows, columns].min() > 0.9999
    assert sorted(one.facts["sizes"]) == [100] * 8


def test_groups_are_the_units_that_work_together() -> None:
    g = generator(6)
    sources = torch.randn(1000, 8, generator=g)
    inputs = sources.repeat_interleave(3, 1) * torch.rand(M, generator=g).add(0.5) + 0.05 * torch.randn(
        1000, M, generator=g
    )
    (one,) = make(inputs, "groups", seed=1)
    assert one.facts["sizes"] == [3] * 8
    correlation = np.abs(np.corrcoef(sources.T, one.activations(inputs).T)[:8, 8:])
    assert correlation.max(1).min() > 0.99


def test_a_head_part_reads_its_head_only(everything: dict[str, FeatureSet]) -> None:
    one = everything["per-head partition"]
    inputs = tokens()
    assert len(one.share) == len(NEURONS) * 4 and one.facts["neurons"] == NEURONS
    changed = inputs.clone()
    changed[:, 6:12] += 1  # the second of four heads
    moved = (one.activations(changed) - one.activations(inputs)).abs().amax(0) > 1e-4
    assert moved.tolist() == [False, True, False, False] * 3


def test_the_rotated_basis_is_orthonormal(everything: dict[str, FeatureSet]) -> None:
    write = everything["rotated output basis"].write
    assert write is not None
    unit = torch.nn.functional.normalize(write, dim=1)
    torch.testing.assert_close(unit @ unit.T, torch.eye(D), atol=1e-5, rtol=0)
    assert float(unit.abs().max()) < 0.999


def test_gating_gives_each_token_to_one_subunit_of_its_end(everything: dict[str, FeatureSet]) -> None:
    inputs = tokens()
    one = everything["gating"]
    values = one.activations(inputs).unflatten(1, (3, 4))
    output = centred_output(inputs)[:, NEURONS]
    assert bool(((values != 0).sum(2) == 1).all())
    assert bool(((values[..., :2].sum(2) > 0) == (output > 0)).all())
    assert bool((values[..., :2] >= 0).all()) and bool((values[..., 2:] <= 0).all())


def test_tokens_are_routed_to_the_nearest_cluster() -> None:
    g = generator(7)
    weight, middle = torch.randn(3, M, generator=g), torch.randn(3, M, generator=g)
    centres, inputs = torch.randn(3, 5, M, generator=g) / M**0.5, tokens(60)
    points = torch.nn.functional.normalize(inputs[:, None] * weight - middle, dim=2)
    expected = (points[:, :, None] - centres).square().sum(3).argmin(2)
    assert torch.equal(_Routes(weight, middle, centres).nearest(inputs), expected)


def test_sparse_sets_cover_counts_sizes_and_sides(everything: dict[str, FeatureSet]) -> None:
    sparse = [one for one in everything.values() if one.facts["baseline"] in ("sae", "transcoder")]
    grid = {tuple(one.facts[name] for name in ("reads", "writes", "kind", "latents", "k")) for one in sparse}
    sides = [
        ("x", "x", "TopK"),
        ("x", "x", "BatchTopK"),
        ("y", "y", "TopK"),
        ("y", "y", "BatchTopK"),
        ("x", "y", "TopK"),
    ]
    assert grid == {(*side, latents, k) for side in sides for latents in (8, 40) for k in (2, 4)}
    for one in sparse:
        assert len(one.share) == one.facts["latents"]
        assert 0 < one.facts["fvu"] < 1 and 0 < one.facts["fvu_output"] < 1.2
        assert 0 < one.facts["active"] < 2 * one.facts["k"]
        assert [step for step, _ in one.facts["curve"]] == list(range(6, 61, 6))
        assert bool((one.activations(tokens()) >= 0).all())


def test_ablating_all_latents_takes_the_reconstruction(everything: dict[str, FeatureSet]) -> None:
    """So that the FVU of the layer's output can be measured on any tokens."""
    inputs = tokens()
    for one in everything.values():
        if one.facts["baseline"] in ("sae", "transcoder"):
            assert one.ablation is not None
            output = centred_output(inputs)
            missed = (one.ablation(inputs, all_of(one)) - output).square().sum() / output.square().sum()
            assert float(missed) == pytest.approx(one.facts["fvu_output"], abs=0.12)


def test_the_best_learning_rate_is_kept() -> None:
    options = replace(FAST, rates=(1e-6, 1e-2), active=(2,))
    for one in make(tokens(), "transcoder", options=options):
        rates = one.facts["rates"]
        assert one.facts["rate"] == min(rates, key=rates.get) == 1e-2 and one.facts["fvu"] == rates[1e-2]


@pytest.mark.parametrize("name", BASELINES)
def test_the_same_seed_gives_the_same_features(name: str) -> None:
    inputs = tokens(400)
    options = replace(FAST, steps=10, active=(2,))
    before = torch.random.get_rng_state(), np.random.get_state()[1].tolist()
    first, again = (make(inputs, name, options=options, seed=3) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before[0]) and np.random.get_state()[1].tolist() == before[1]
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.activations(inputs), b.activations(inputs)) and torch.equal(a.share, b.share)


@pytest.mark.parametrize("name", ["rotation", "ica", "kmeans", "groups", "sae"])
def test_another_seed_gives_others(name: str) -> None:
    inputs = tokens(400)
    first, other = (make(inputs, name, options=replace(FAST, steps=10, active=(2,)), seed=s)[0] for s in (3, 4))
    assert not torch.equal(first.activations(inputs)[:, :8], other.activations(inputs)[:, :8])


@pytest.mark.parametrize("count", [2, 5, 40])
def test_few_tokens(count: int) -> None:
    """As a class token may have: fewer of everything, nothing that is not a number."""
    inputs = tokens(count)
    made = make(inputs, options=replace(FAST, steps=3))
    assert {"hidden", "pca", "ica", "kmeans", "groups", "gating"} <= {one.facts["baseline"] for one in made}
    for one in made:
        assert bool(torch.isfinite(one.activations(tokens(100))).all()) and bool(torch.isfinite(one.share).all())


def test_a_layer_that_never_varies() -> None:
    for one in make(torch.ones(30, M), options=replace(FAST, steps=3, active=(2,))):
        assert bool(torch.isfinite(one.activations(tokens(20))).all()), one.name
        assert float(one.share.abs().sum()) < 1e-3, one.name


def test_without_heads_logits_and_neurons_these_are_left_out() -> None:
    options = replace(FAST, baselines=("hidden", "heads", "logits", "gating"))
    made = baseline_sets(
        tokens(50), WEIGHT, concepts=4, subunits=4, neurons=[], seed=0, options=options, progress=lambda *_: None
    )
    assert [one.facts["baseline"] for one in made] == ["hidden"]


def test_progress_is_reported() -> None:
    seen: Counter[str] = Counter()
    options = replace(FAST, baselines=("pca", "transcoder"), active=(2,))

    def progress(stage: str, done: int, total: int | None) -> None:
        seen[stage] += done

    made = baseline_sets(
        tokens(200), WEIGHT, concepts=8, subunits=4, neurons=[], seed=0, options=options, progress=progress
    )
    assert [one.name for one in made] == [stage.removeprefix("baseline: ") for stage in seen if "baseline" in stage]
    assert seen["TopK transcoder, k = 2, 8 latents"] == 60


@pytest.mark.parametrize("change", [{"baselines": ("pcs",)}, {"active": (0,)}, {"steps": 0}, {"rates": ()}])
def test_impossible_options_are_refused(change: dict[str, object]) -> None:
    with pytest.raises(SettingsError):
        replace(FAST, **change)


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(SettingsError, match="at least 2"):
        make(tokens(1))
