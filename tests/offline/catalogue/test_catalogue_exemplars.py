"""Exemplars against a search through all activations, as `elude activations` writes them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Rewritten
from support import LABELS, SECOND, VIT_ARGS, VIT_DATA, input_tensor, tamper, tiny_vit

import elude_runtime as elude
from elude_runtime.analysis.activations import record_layer
from elude_runtime.checkpoint.exemplars import Exemplar, Exemplars, read_exemplars
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.activations import write_activations
from elude_runtime.offline.catalogue import layer_pass
from elude_runtime.offline.catalogue.draws import Draws
from elude_runtime.offline.catalogue.run import CatalogueOptions, make_catalogue
from elude_runtime.offline.feature_table import read_table
from elude_runtime.offline.images import ImageSource

CLOSE = dict(rtol=1e-4, atol=2e-5)


@dataclass(frozen=True, eq=False)
class Case:
    """A network, its catalogue of the pictures, and the activations of all features on all of their tokens."""

    rewritten: Rewritten
    checkpoint: Path
    pictures: Path
    layer: str

    @cached_property
    def found(self) -> Exemplars:
        return read_exemplars(self.checkpoint)

    @cached_property
    def rows(self) -> list[dict]:
        return [r for r in read_table(self.checkpoint).to_pylist() if r["layer"] == self.layer]

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The position of each picture in the folder, by its name."""
        source = ImageSource(self.pictures, self.rewritten.data)
        return {source.name(place): place for place in range(len(source._files))}

    @cached_property
    def activations(self) -> dict[str, np.ndarray]:
        """[N, T_p] of every feature, on the tokens of its type."""
        out, state = {}, self.rewritten.model.state(self.layer)
        for level in ("concepts", "subunits"):
            file = self.checkpoint.parent / f"{self.layer}.{level}.npz"
            write_activations(self.checkpoint, self.pictures, self.layer, file, level=level, per_token=True, force=True)
            with np.load(file) as data:
                values = data["activations"].astype(np.float32)
                names = data["names"].tolist() if level == "concepts" else None
            for row in self.rows:
                span = state.layout.slices[TYPE_NAMES.index(row["token_type"])]
                if names and row["kind"] == "concept":
                    out[row["feature"]] = values[:, span, names.index(row["feature"])]
                if names is None and row["kind"] == "subunit":
                    slot = -1 if row["subunit"] is None else row["subunit"]
                    out[row["feature"]] = values[:, span, row["neuron"], slot]
        return out

    def start(self, row: dict) -> int:
        return self.rewritten.model.state(self.layer).layout.slices[TYPE_NAMES.index(row["token_type"])].start

    def place(self, exemplar: Exemplar) -> int:
        return self.numbers[self.found.images[exemplar.image].name]

    def tolerance(self, row: dict) -> dict[str, float]:
        """Sub-units are written in float16."""
        return CLOSE if row["kind"] == "concept" else {"rtol": 2e-3, "atol": 2e-3 * row["std"] + 1e-6}

    @cached_property
    def predicted(self) -> np.ndarray:
        """[N, 3]: the model's first classes of every picture."""
        source = ImageSource(self.pictures, self.rewritten.data)
        with torch.no_grad():
            logits = torch.cat([self.rewritten.model(batch) for batch in source.batches()])
        return logits.topk(3, dim=1).indices.numpy()


@pytest.fixture(scope="module")
def certain(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Rewritten:
    """The tiny ViT with a head that is sure of its answers, so that features get labels."""
    base = tiny_vit()
    with torch.no_grad():
        base.head.weight *= 20
    out = tmp_path_factory.mktemp("certain") / "ckpt"
    model = elude.rewrite(
        base, pictures, out=out, layers=[SECOND], subunits=4, concepts=6, tokens=24, data_config=VIT_DATA,
        model_args=VIT_ARGS, labels=LABELS,
    )  # fmt: skip
    return Rewritten(out, base, VIT_DATA, model, input_tensor(VIT_DATA, 3), pictures)


@pytest.fixture(scope="module", params=["vit", "vit, first layer", "certain", "registers", "mobilenet", "headless"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Case:
    name, _, first = request.param.partition(",")
    rewritten: Rewritten = request.getfixturevalue(name)
    if name == "vit":
        out = request.getfixturevalue("catalogued")
    else:
        out = tmp_path_factory.mktemp("case") / "ckpt"
        shutil.copytree(rewritten.path, out)
        make_catalogue(out, pictures, batch_size=5)
    return Case(rewritten, out, pictures, rewritten.model.layers[0 if first else -1])


def roles(case: Case, row: dict, role: str, end: str = "") -> list[Exemplar]:
    found = [e for e in case.found.of(row["feature"]) if (e.role, e.end) == (role, end)]
    assert [e.rank for e in found] == list(range(len(found)))
    assert len({e.image for e in found}) == len(found)  # an image once
    return found


@pytest.mark.parametrize("end", ["positive", "negative"])
def test_top_exemplars_are_the_images_with_the_largest_peaks(case: Case, end: str) -> None:
    checked = 0
    for row in case.rows:
        values = case.activations[row["feature"]]
        found = roles(case, row, "top", end)
        if row["std"] == 0:
            assert found == []
            continue
        sign = 1 if end == "positive" else -1
        peaks = (sign * values).max(1)
        expected = np.sort(peaks[peaks > 0])[::-1][:9]
        tolerance = case.tolerance(row)
        # images within rounding of the mean may be on either side of it
        certain = int((np.sort(peaks)[::-1][:9] > 10 * tolerance["atol"]).sum())
        assert certain <= len(found) <= 9
        np.testing.assert_allclose([sign * e.activation for e in found][:certain], expected[:certain], **tolerance)
        for exemplar in found:
            own = values[case.place(exemplar)]
            token = exemplar.token - case.start(row)
            np.testing.assert_allclose(own[token], exemplar.activation, **tolerance)
            np.testing.assert_allclose(sign * own[token], (sign * own).max(), **tolerance)
            checked += 1
    assert checked > 500


def test_heat_is_the_activation_on_every_patch(case: Case) -> None:
    layout = case.rewritten.model.state(case.layer).layout
    carried = 0
    for row in case.rows:
        for exemplar in case.found.of(row["feature"]):
            if exemplar.role != "top" or row["token_type"] != "patches" or layout.grid is None:
                assert exemplar.heat is None and exemplar.heat_scale == 0
                continue
            assert exemplar.heat is not None and exemplar.heat.shape == (layout.grid[0] * layout.grid[1],)
            heat = exemplar.heat.astype(np.float32) / 127 * exemplar.heat_scale
            step = exemplar.heat_scale / 254
            expected = case.activations[row["feature"]][case.place(exemplar)]
            np.testing.assert_allclose(heat, expected, rtol=2e-3, atol=step + 2e-3 * row["std"] + 2e-5)
            carried += 1
    assert carried > 500 or layout.grid is None


def test_quantile_exemplars_are_the_nearest_of_one_drawn_token_an_image(case: Case) -> None:
    for row in case.rows:
        values = case.activations[row["feature"]]
        found = roles(case, row, "quantile")
        if row["std"] == 0:
            assert found == []
            continue
        _, tokens = Draws(0).of(torch.arange(len(values)), values.shape[1])
        drawn = values[np.arange(len(values)), tokens.numpy()]
        assert len(found) == 5
        for number, exemplar in enumerate(found):
            level = row["drift_edges"][2 * number]
            away = np.abs(drawn - level)[number::5]
            assert case.place(exemplar) % 5 == number and exemplar.token == tokens[case.place(exemplar)] + case.start(
                row
            )
            np.testing.assert_allclose(drawn[case.place(exemplar)], exemplar.activation, **case.tolerance(row))
            assert abs(exemplar.activation - level) <= away.min() + 4 * case.tolerance(row)["atol"] + 2e-3 * abs(level)


def test_random_exemplars_are_the_same_images_for_all(case: Case) -> None:
    chosen = set()
    for row in case.rows:
        values, found = case.activations[row["feature"]], roles(case, row, "random")
        if row["std"] == 0:
            assert found == []
            continue
        chosen.add(tuple(e.image for e in found))
        for exemplar in found:
            own = values[case.place(exemplar)]
            assert np.abs(own).max() == pytest.approx(abs(exemplar.activation), rel=5e-3, abs=2e-3 * row["std"] + 2e-5)
            np.testing.assert_allclose(
                own[exemplar.token - case.start(row)], exemplar.activation, **case.tolerance(row)
            )
    assert len(chosen) == 1 and len(next(iter(chosen))) == 4


@pytest.mark.parametrize("end", ["positive", "negative"])
def test_near_misses_are_the_next_images_that_the_label_would_not_name(case: Case, end: str) -> None:
    spoken = 0
    for row in case.rows:
        if row["std"] == 0:
            continue
        sign = 1 if end == "positive" else -1
        text = row["automatic_label"] or ""
        part = text.partition("↔")[0 if end == "positive" else 2]
        named = {LABELS.index(name.strip()) for name in part.split(",") if name.strip()}
        peaks = (sign * case.activations[row["feature"]]).max(1)
        order = [int(i) for i in np.argsort(-peaks, kind="stable")[9:21] if peaks[i] > 0]
        if case.rewritten.model.manifest.output == "logits":
            order = [i for i in order if not named & set(case.predicted[i].tolist())]
            spoken += bool(named)
        found = roles(case, row, "near_miss", end)
        assert len(found) <= 4
        np.testing.assert_allclose(
            [sign * e.activation for e in found], peaks[order][: len(found)], **case.tolerance(row)
        )
        certain = sum(peaks[i] > 10 * case.tolerance(row)["atol"] for i in order[:4])
        assert len(found) >= certain
        for exemplar in found:
            assert not named & set(case.predicted[case.place(exemplar)].tolist()) or not named
    assert spoken > 4 or case.rewritten.path.parent.name[:7] != "certain"


@pytest.mark.parametrize("end", ["positive", "negative"])
def test_neurons_stand_by_the_images_at_their_ends(case: Case, pictures: Path, end: str) -> None:
    """Against the layer's own output around its baseline."""
    model, state = case.rewritten.model, case.rewritten.model.state(case.layer)
    images = torch.cat(list(ImageSource(pictures, case.rewritten.data).batches()))
    y = state.linear.tokens(record_layer(model, images, case.layer).y[case.layer]) - state.baseline()
    sign, checked = (1 if end == "positive" else -1), 0
    for token_type in state.live_types:
        tokens = state.layout.slices[token_type]
        peaks, letter = (sign * y[:, tokens]).amax(1), "c" if token_type else ""
        for neuron in range(state.linear.neurons):
            found = [e for e in case.found.of(f"{case.layer}/y{neuron}{letter}") if e.end == end]
            expected = peaks[:, neuron][peaks[:, neuron] > 0].sort(descending=True).values[:9]
            scale = float(peaks[:, neuron].abs().max())
            assert abs(len(found) - len(expected)) <= int((expected < 1e-4 * scale).sum())
            assert [e.role for e in found] == ["top"] * len(found)
            for exemplar, value in zip(found, expected.tolist(), strict=False):
                assert sign * exemplar.activation == pytest.approx(value, abs=1e-4 * scale + 1e-5)
                own = y[case.place(exemplar), exemplar.token, neuron]
                assert float(own) == pytest.approx(exemplar.activation, abs=1e-4 * scale + 1e-5)
                assert (exemplar.heat is not None) == (token_type == 0 and state.layout.grid is not None)
                checked += 1
    assert checked > 20


def test_inputs_stand_by_the_images_they_are_largest_on(case: Case, pictures: Path) -> None:
    model, state = case.rewritten.model, case.rewritten.model.state(case.layer)
    images = torch.cat(list(ImageSource(pictures, case.rewritten.data).batches()))
    reads = state.linear.patches(record_layer(model, images, case.layer).x[case.layer]).flatten(2, 3).amax(3)
    span = state.layout.slices[state.live_types[0]]
    peaks = reads[:, span].amax(1).numpy()  # [N, channels]
    for channel in range(peaks.shape[1]):
        found = case.found.of(f"{case.layer}/x{channel}")
        expected = np.sort(peaks[:, channel][peaks[:, channel] > 0])[::-1][:9]
        np.testing.assert_allclose([e.activation for e in found], expected, **CLOSE)
        for exemplar in found:
            assert (exemplar.role, exemplar.end) == ("top", "positive")
            own = reads[case.place(exemplar), exemplar.token, channel]
            np.testing.assert_allclose(float(own), exemplar.activation, **CLOSE)


def test_a_layer_is_described(case: Case) -> None:
    (described,) = [one for one in case.found.layers if one.name == case.layer]
    state = case.rewritten.model.state(case.layer)
    assert described.grid == state.layout.grid and described.prefix == state.layout.prefix
    assert described.token_types == [TYPE_NAMES[t] for t in state.live_types]
    assert case.found.read == 24 and case.found.skipped == []


def test_small_blocks_and_batches_find_the_same(
    vit: Rewritten, catalogued: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_pass, "_READOUT_FLOATS", 2000)
    monkeypatch.setattr(layer_pass, "_VALUE_FLOATS", 300)
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    make_catalogue(out, pictures, batch_size=1)
    whole, parts = read_exemplars(catalogued), read_exemplars(out)
    for row in read_table(out).to_pylist():
        for one, other in zip(whole.of(row["feature"]), parts.of(row["feature"]), strict=True):
            assert (one.role, one.end, one.rank) == (other.role, other.end, other.rank)
            one_value, other_value = one.activation, other.activation
            if one.role == "quantile":  # two images may be equally near to it
                level = row["drift_edges"][2 * one.rank]
                one_value, other_value = abs(one_value - level), abs(other_value - level)
            assert one_value == pytest.approx(other_value, rel=1e-4, abs=1e-5)


def test_a_layer_without_a_grid_has_no_heat(vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    out = tamper(vit.path, tmp_path / "ckpt", manifest=lambda m: [one.update(grid=None) for one in m["layers"]])
    make_catalogue(out, pictures, CatalogueOptions(effect_images=0))
    found = read_exemplars(out)
    assert all(layer.grid is None for layer in found.layers)
    feature = f"{vit.layer}/P0"
    assert len(found.of(feature)) > 9 and all(e.heat is None for e in found.of(feature))
