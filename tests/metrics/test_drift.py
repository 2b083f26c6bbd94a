"""Drift: the bins of watched features against numpy, on a real engine that goes on answering the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from drift_reference import EXPECTED, bucket_shares, index, null
from numpy.typing import NDArray
from support import VIT_ARGS, VIT_DATA, input_tensor, tiny_vit

import elude_runtime as elude
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.catalogue import BIN_SHARES, FeatureCatalogue, features_json, read_catalogue
from elude_runtime.metrics.drift import DriftWatch, Watched, count_bins, watched

IMAGES = 24


class Counted:
    """What a watch counted, by feature."""

    def __init__(self) -> None:
        self.buckets: dict[str, NDArray[np.float64]] = {}
        self.squares: dict[str, float] = {}
        self.dropped = 0

    def count(self, feature: Feature, buckets: NDArray[np.float64], squares: float) -> None:
        self.buckets[feature.name] = self.buckets.get(feature.name, 0) + buckets
        self.squares[feature.name] = self.squares.get(feature.name, 0.0) + squares

    def drop(self) -> None:
        self.dropped += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("drift") / "ckpt"
    elude.rewrite(
        tiny_vit(), input_tensor(VIT_DATA, IMAGES, 0), out=path, subunits=4, concepts=4, tokens=24,
        data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> EludeModel:
    loaded = elude.load(folder)
    _ = loaded.tails  # planned before there are answers, as an engine does
    return loaded


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> FeatureCatalogue:
    return read_catalogue(folder)


def images(count: int, seed: int) -> torch.Tensor:
    return input_tensor(VIT_DATA, count, seed)


def activations(model: EludeModel, x: torch.Tensor, name: str) -> NDArray[np.float32]:
    """[N, T_p] of a feature, by the public interface: the recorded input of its layer."""
    feature = model.feature(name)
    state = model.state(feature.layer)
    return state.activations(model.record(x).x[feature.layer], feature).detach().numpy()


def watch(model: EludeModel, groups: list[Watched], counted: Counted, sample: float = 1.0) -> DriftWatch:
    return DriftWatch(model, groups, sample, counted.count, counted.drop, seed=0)


def test_the_counts_are_numpys_and_the_answers_the_same_bits(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    subunit = f"{model.layers[0]}/0/p0"
    groups, unknown = watched(model, catalogue, [subunit], 100)
    assert not unknown
    names = [feature.name for group in groups for feature in group.features]
    assert subunit in names and any("/C" in name for name in names) and any("/P" in name for name in names)
    counted, batches = Counted(), [images(5, 1), images(3, 2)]
    looks = watch(model, groups, counted)
    for x in batches:
        expected = model.base(x)
        with looks.looking(len(x)), torch.no_grad():
            assert torch.equal(model.record(x, []).logits, expected)
        assert not any(module._forward_pre_hooks for module in model.base.modules())
    looks.close()
    for name in names:
        shares = np.concatenate(
            [bucket_shares(activations(model, x, name), catalogue.bin_edges(name)) for x in batches]
        )
        np.testing.assert_allclose(counted.buckets[name], shares.sum(0), atol=1e-9)
        assert counted.buckets[name].sum() == pytest.approx(8)
        assert counted.squares[name] == pytest.approx((shares**2 / EXPECTED).sum(), rel=1e-9)
    assert counted.dropped == 0 and tuple(EXPECTED) == BIN_SHARES


def test_bins_exactly() -> None:
    edges = torch.linspace(-1, 1, 11).repeat(2, 1)
    values = torch.tensor([[[-5.0, 0.05], [-0.95, 0.05]], [[5.0, 0.3], [0.95, 0.3]]])  # [B, T, F]
    found = count_bins(values, edges)
    expected = np.zeros((2, 12))
    expected[0, [0, 1]] += 0.5
    expected[0, [11, 10]] += 0.5
    expected[1, [6, 7]] += 1
    np.testing.assert_array_equal(found.buckets, expected)
    np.testing.assert_allclose(found.squares, [2 * (0.25 / 0.01 + 0.25 / 0.09), 2 / 0.1])


def test_the_calibration_itself_has_the_expected_shares(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    groups, _ = watched(model, catalogue, [], 100)
    counted = Counted()
    looks = watch(model, groups, counted)
    x = images(IMAGES, 0)
    with looks.looking(len(x)), torch.no_grad():
        model.record(x, [])
    looks.close()
    for name, buckets in counted.buckets.items():
        if "/P" in name:  # class tokens are too few for a percentile
            np.testing.assert_allclose(buckets / IMAGES, EXPECTED, atol=0.015)


def test_chance_is_taken_off_the_index(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    """Images drawn from the calibration itself: the index is as large as its null says, and would be 0 by no draw."""
    groups, _ = watched(model, catalogue, [], 100)
    names = [feature.name for group in groups for feature in group.features if "/P" in feature.name]
    x, generator = images(IMAGES, 0), np.random.default_rng(0)
    ratios = []
    for name in names:
        shares = bucket_shares(activations(model, x, name), catalogue.bin_edges(name))
        for _ in range(40):
            drawn = shares[generator.integers(IMAGES, size=60)]
            buckets, squares = drawn.sum(0), float((drawn**2 / EXPECTED).sum())
            # drawn from the calibration's own images: nothing is added for their own chance
            ratios.append((index(buckets)[0], null(buckets, squares, 10**9)))
    found, expected = np.mean(ratios, 0)
    assert found / expected == pytest.approx(1, abs=0.15) and found > 0.001


def test_what_is_watched(model: EludeModel, catalogue: FeatureCatalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    every, _ = watched(model, catalogue, [], 100)
    shares: dict[str, float] = {}
    for group in every:
        shares |= {f.name: catalogue.facts(f.name).share for f in group.features}  # type: ignore[union-attr]
    assert not any(name.endswith("rest") for name in shares)
    few, unknown = watched(model, catalogue, ["nonsense", f"{model.layers[0]}/P99"], 3)
    names = {f.name for group in few for f in group.features}
    assert names == set(sorted(shares, key=shares.__getitem__, reverse=True)[:3])
    assert unknown == ["nonsense", f"{model.layers[0]}/P99"]
    first = next(iter(shares))
    own = catalogue.bin_edges
    monkeypatch.setattr(catalogue, "bin_edges", lambda name: None if name == first else own(name))
    without, unknown = watched(model, catalogue, [first], 100)
    assert unknown == [first] and first not in {f.name for group in without for f in group.features}


def test_an_archives_table_has_the_same_edges(folder: Path, catalogue: FeatureCatalogue, tmp_path: Path) -> None:
    (tmp_path / "features.json").write_bytes(features_json(folder))
    packed = read_catalogue(tmp_path)
    name = f"{elude.load(folder).layers[0]}/P0"
    edges = catalogue.bin_edges(name)
    assert edges is not None and len(edges) == 11
    np.testing.assert_array_equal(packed.bin_edges(name), edges)
    assert packed.facts(name).quantiles.keys() == catalogue.facts(name).quantiles.keys()  # type: ignore[union-attr]
    assert "d10" not in catalogue.facts(name).quantiles and catalogue.bin_edges("nonsense") is None  # type: ignore[union-attr]


def test_only_a_share_of_the_images_is_looked_at(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    groups, _ = watched(model, catalogue, [], 1)
    counted, none = Counted(), Counted()
    looks, off = watch(model, groups, counted, 0.25), watch(model, groups, none, 0.0)
    x = images(8, 3)
    for _ in range(30):
        for one in (looks, off):
            with one.looking(len(x)), torch.no_grad():
                model.record(x, [])
        while looks._queue.qsize():
            time.sleep(0.001)
    looks.close()
    off.close()
    (buckets,) = counted.buckets.values()
    assert 40 < buckets.sum() < 80 and not counted.dropped and not none.buckets  # 240 images


def test_a_slow_count_drops_and_never_waits(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    groups, _ = watched(model, catalogue, [], 1)
    counted, gate, begun = Counted(), threading.Event(), threading.Event()
    looks = watch(model, groups, counted)
    own: Callable[..., Any] = looks._look

    def held(inputs: Any) -> None:
        begun.set()
        gate.wait(30)
        own(inputs)

    looks._look = held  # type: ignore[method-assign]
    x = images(1, 4)
    for number in range(12):
        with looks.looking(1), torch.no_grad():
            model.record(x, [])
        if number == 0:
            assert begun.wait(10)  # one is being looked at, eight may wait
    assert counted.dropped == 3
    gate.set()
    looks.close()
    (buckets,) = counted.buckets.values()
    assert buckets.sum() == pytest.approx(9)


def test_a_layer_that_cannot_be_looked_at_costs_no_answer(
    model: EludeModel, catalogue: FeatureCatalogue, caplog: pytest.LogCaptureFixture
) -> None:
    groups, _ = watched(model, catalogue, [], 100)
    counted = Counted()
    looks = watch(model, groups, counted)
    x = images(2, 5)
    with looks.looking(3), torch.no_grad():  # three were announced
        assert torch.equal(model.record(x, []).logits, model.base(x))
    looks.close()
    assert not counted.buckets and "drift cannot look at" in caplog.text


def test_a_failed_count_does_not_end_the_thread(
    model: EludeModel, catalogue: FeatureCatalogue, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    groups, _ = watched(model, catalogue, [], 1)
    counted, calls = Counted(), []
    looks = watch(model, groups, counted)
    own = looks._look

    def once(inputs: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("planted")
        own(inputs)

    looks._look = once  # type: ignore[method-assign]
    for _ in range(2):
        with looks.looking(1), torch.no_grad():
            model.record(images(1, 4), [])
    looks.close()
    (buckets,) = counted.buckets.values()
    assert buckets.sum() == pytest.approx(1) and "counting drift failed" in caplog.text
