"""Drift: the bins of watched features against numpy, on a real engine that goes on answering the same bits."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from drift_reference import EXPECTED, index, null, peaks
from numpy.typing import NDArray
from PIL import Image
from support import VIT_ARGS, VIT_DATA, input_tensor, tiny_vit

import elude_runtime as elude
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.checkpoint.catalogue import (
    BIN_SHARES,
    PEAK_LEVELS,
    FeatureCatalogue,
    features_json,
    read_catalogue,
)
from elude_runtime.metrics.drift import DriftWatch, Watched, count_bins, watched
from elude_runtime.offline.catalogue.draws import Draws
from elude_runtime.offline.catalogue.layer_pass import PEAK_IMAGES, Block
from elude_runtime.offline.catalogue.run import make_catalogue
from elude_runtime.offline.feature_table import read_table, replace_table

IMAGES = 24


class Counted:
    """What a watch counted, by feature."""

    def __init__(self) -> None:
        self.buckets: dict[str, NDArray[np.int64]] = {}
        self.dropped = 0

    def count(self, feature: Feature, buckets: NDArray[np.int64]) -> None:
        self.buckets[feature.name] = self.buckets.get(feature.name, 0) + buckets

    def drop(self) -> None:
        self.dropped += 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a catalogue of `IMAGES` images."""
    path = tmp_path_factory.mktemp("drift")
    (path / "images").mkdir()
    generator = np.random.default_rng(0)
    for number in range(IMAGES):
        noise = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path / "images" / f"{number:03d}.png")
    elude.rewrite(
        tiny_vit(), path / "images", out=path / "ckpt", subunits=4, concepts=4, tokens=24, data_config=VIT_DATA,
        model_args=VIT_ARGS,
    )  # fmt: skip
    make_catalogue(path / "ckpt", path / "images", workers=0)
    return path / "ckpt"


@pytest.fixture(scope="module")
def model(folder: Path) -> EludeModel:
    loaded = elude.load(folder)
    _ = loaded.tails  # planned before there are answers, as an engine does
    return loaded


@pytest.fixture(scope="module")
def catalogue(folder: Path) -> FeatureCatalogue:
    return read_catalogue(folder)


@pytest.fixture(scope="module")
def known(folder: Path, model: EludeModel) -> torch.Tensor:
    """The catalogue's own images, as the model takes them."""
    transform = model.data_config.transform()
    files = sorted((folder.parent / "images").iterdir())
    return torch.stack([transform(Image.open(file).convert("RGB")) for file in files])


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
        with looks.looking(list(range(len(x))), len(x)), torch.no_grad():
            assert torch.equal(model.record(x, []).logits, expected)
        assert not any(module._forward_pre_hooks for module in model.base.modules())
    looks.close()
    for name in names:
        values = np.concatenate([peaks(activations(model, x, name)) for x in batches])
        expected = np.bincount(np.searchsorted(catalogue.peak_edges(name), values), minlength=12)
        np.testing.assert_array_equal(counted.buckets[name], expected)
    assert counted.dropped == 0 and tuple(EXPECTED) == BIN_SHARES


def test_bins_exactly() -> None:
    edges = torch.linspace(-1, 1, 11).repeat(2, 1)
    values = torch.tensor([[[-5.0, 0.05], [4.0, 0.3]], [[0.1, 0.05], [0.95, -0.3]]])  # [B, T, F]
    expected = np.zeros((2, 12))
    expected[0, [0, 10]] = 1
    expected[1, [7, 4]] = 1
    np.testing.assert_array_equal(count_bins(values, edges), expected)


def test_what_is_not_finite_is_in_no_bin() -> None:
    values = torch.tensor([[[0.5]], [[float("nan")]], [[float("inf")]]])
    assert count_bins(values, torch.linspace(-1, 1, 11)[None]).sum() == 1


def test_the_catalogue_has_the_quantiles_of_peaks(
    folder: Path, model: EludeModel, catalogue: FeatureCatalogue, known: torch.Tensor
) -> None:
    """Of concepts and sub-units, on both token types: numpy's, over the very images."""
    groups, _ = watched(model, catalogue, [f"{model.layers[0]}/0/p0", f"{model.layers[0]}/1/c0"], 100)
    assert catalogue.peak_images == IMAGES
    for feature in (feature for group in groups for feature in group.features):
        found = catalogue.peak_edges(feature.name)
        expected = np.quantile(peaks(activations(model, known, feature.name)), PEAK_LEVELS)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_chance_is_taken_off_the_index() -> None:
    """Nothing moved: the index is on average what its null says, for the traffic's chance and the catalogue's own."""
    generator, found = np.random.default_rng(0), []
    for _ in range(400):
        edges = np.quantile(generator.normal(size=500), PEAK_LEVELS)
        found.append(index(np.bincount(np.searchsorted(edges, generator.normal(size=300)), minlength=12)))
    assert np.mean(found) == pytest.approx(null(300, 500), rel=0.1) and min(found) > 0


def test_a_part_of_many_images_stands_for_all(folder: Path) -> None:
    """The peaks kept are those of images drawn, each as often as any other, by the seed alone."""
    block = Block(torch.eye(2), torch.zeros(2), torch.zeros(2, 5), 1, False)
    draws = Draws(0)
    for start in range(0, 3000, 500):
        places = torch.arange(start, start + 500)
        block.add(places, torch.stack([places.float(), -places.float()], 1)[:, None], draws, 0)
    kept = block.sampled_peaks()
    assert kept.shape == (PEAK_IMAGES, 2) and len(kept[:, 0].unique()) == PEAK_IMAGES
    assert torch.equal(kept[:, 0], -kept[:, 1])
    assert float(kept[:, 0].mean()) == pytest.approx(1500, abs=4 * 3000 / 12**0.5 / PEAK_IMAGES**0.5)
    again = Block(torch.eye(2), torch.zeros(2), torch.zeros(2, 5), 1, False)
    again.restore(block.state())
    assert torch.equal(again.sampled_peaks(), kept)


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
    own = catalogue.peak_edges
    monkeypatch.setattr(catalogue, "peak_edges", lambda name: None if name == first else own(name))
    without, unknown = watched(model, catalogue, [first], 100)
    assert unknown == [first] and first not in {f.name for group in without for f in group.features}


def test_an_archives_table_has_the_same_edges(
    folder: Path, model: EludeModel, catalogue: FeatureCatalogue, tmp_path: Path
) -> None:
    (tmp_path / "features.json").write_bytes(features_json(folder))
    packed = read_catalogue(tmp_path)
    name = f"{model.layers[0]}/P0"
    np.testing.assert_array_equal(packed.peak_edges(name), catalogue.peak_edges(name))
    assert packed.peak_images == IMAGES and packed.peak_edges("nonsense") is None
    facts = packed.facts(name)
    assert facts == catalogue.facts(name) and facts is not None and "peak01" not in facts.quantiles


def test_without_a_catalogue_nothing_is_watched(folder: Path, model: EludeModel, tmp_path: Path) -> None:
    table = read_table(folder)
    fields = [table.schema.field(name) for name in ("peak_edges", "peak_images")]
    for field in fields:
        table = table.set_column(table.schema.get_field_index(field.name), field, pa.nulls(len(table), field.type))
    replace_table(tmp_path, table)
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "features.json").write_bytes(features_json(tmp_path))
    for bare in (read_catalogue(tmp_path), read_catalogue(tmp_path / "packed")):
        assert bare.peak_images == 0 and watched(model, bare, [], 100) == ([], [])
        assert watched(model, bare, [f"{model.layers[0]}/P0"], 100) == ([], [f"{model.layers[0]}/P0"])


def test_only_a_share_of_the_images_is_looked_at(model: EludeModel, catalogue: FeatureCatalogue) -> None:
    groups, _ = watched(model, catalogue, [], 1)
    counted, none = Counted(), Counted()
    looks, off = watch(model, groups, counted, 0.25), watch(model, groups, none, 0.0)
    x = images(8, 3)
    for _ in range(30):
        for one in (looks, off):
            with one.looking(one.sampled(len(x)), len(x)), torch.no_grad():
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
        with looks.looking([0], 1), torch.no_grad():
            model.record(x, [])
        if number == 0:
            assert begun.wait(10)  # one is being looked at, eight may wait
    assert counted.dropped == 3
    gate.set()
    looks.close()
    (buckets,) = counted.buckets.values()
    assert buckets.sum() == 9


def test_a_layer_that_cannot_be_looked_at_costs_no_answer(
    model: EludeModel, catalogue: FeatureCatalogue, caplog: pytest.LogCaptureFixture
) -> None:
    groups, _ = watched(model, catalogue, [], 100)
    counted = Counted()
    looks = watch(model, groups, counted)
    x = images(2, 5)
    with looks.looking([0, 1, 2], 3), torch.no_grad():  # three were announced
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
        with looks.looking([0], 1), torch.no_grad():
            model.record(images(1, 4), [])
    looks.close()
    (buckets,) = counted.buckets.values()
    assert buckets.sum() == 1 and "counting drift failed" in caplog.text
