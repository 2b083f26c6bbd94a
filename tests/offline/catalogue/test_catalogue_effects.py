"""Classes raised and lowered, against steering; inputs and duplicates, against numpy."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Rewritten
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.activations import record_layer
from elude_runtime.checkpoint.exemplars import Exemplars, read_exemplars
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.catalogue import moments
from elude_runtime.offline.catalogue.effects import directions
from elude_runtime.offline.catalogue.features import type_features
from elude_runtime.offline.catalogue.layer_pass import LayerPass
from elude_runtime.offline.catalogue.links import feature_links
from elude_runtime.offline.catalogue.run import make_catalogue
from elude_runtime.offline.feature_table import read_table
from elude_runtime.offline.images import ImageSource

EFFECT_IMAGES = [0, 3, 6, 9, 12, 15, 18, 21]  # 8 of 24, spread


@pytest.fixture(scope="module")
def images(vit: Rewritten, pictures: Path) -> Tensor:
    return torch.cat(list(ImageSource(pictures, vit.data).batches()))


@pytest.fixture(scope="module")
def table(catalogued: Path) -> dict[str, dict]:
    return {row["feature"]: row for row in read_table(catalogued).to_pylist()}


@pytest.fixture(scope="module")
def found(catalogued: Path) -> Exemplars:
    return read_exemplars(catalogued)


def steered(vit: Rewritten, images: Tensor, *edits: elude.Edit) -> np.ndarray:
    """[K]: the mean change of the centred logits."""
    change = torch.cat([vit.model.steer(one[None], list(edits)).change for one in images[EFFECT_IMAGES]])
    return (change - change.mean(1, keepdim=True)).mean(0).numpy()


def listed(row: dict) -> dict[int, float]:
    return {e["class"]: e["effect"] for e in (*row["raises"], *row["lowers"])}


def test_a_concept_raises_the_classes_that_adding_to_it_does(
    vit: Rewritten, images: Tensor, table: dict[str, dict]
) -> None:
    concepts = [r for r in table.values() if r["kind"] == "concept" and r["std"] > 0]
    assert len({(r["layer"], r["token_type"]) for r in concepts}) == 4
    for row in concepts:
        expected = steered(vit, images, elude.Edit(row["feature"], mode="add", value=1.0, unit="std"))
        for key, order in (("raises", np.argsort(-expected)), ("lowers", np.argsort(expected))):
            own = [e["class"] for e in row[key]]
            values = [e["effect"] for e in row[key]]
            np.testing.assert_allclose(values, expected[own], rtol=1e-3, atol=2e-5)
            np.testing.assert_allclose(values, expected[order][: len(own)], rtol=1e-3, atol=2e-5)
            assert all(v > 0 if key == "raises" else v < 0 for v in values) and 1 <= len(own) <= 5


def test_subunits_share_the_effect_of_their_neuron(vit: Rewritten, images: Tensor, table: dict[str, dict]) -> None:
    """Each at the step of the neuron's own, in proportion to its standard deviation."""
    linear = []
    for layer in vit.model.layers:
        state = vit.model.state(layer)
        for own in type_features(state, read_table(vit.path)):
            made = directions(state, own)
            for number in range(len(own.features) - 1, 0, -len(own.features) // 6):
                feature, step = own.features[number], float(made.change[made.source[number]].abs().sum())
                if feature.neuron is None:
                    continue
                row = table[feature.name]
                assert step * float(made.factor[number]) == pytest.approx(row["std"], rel=1e-5)
                at_step = steered(vit, images, elude.Edit(feature.name, mode="add", value=step))
                exact = steered(vit, images, elude.Edit(feature.name, mode="add", value=1.0, unit="std"))
                for number_of_class, effect in listed(row).items():
                    scaled = at_step[number_of_class] * float(made.factor[number])
                    assert effect == pytest.approx(scaled, rel=2e-3, abs=2e-5)
                    linear.append((effect, exact[number_of_class]))
    effects, exact = np.array(linear).T
    assert len(effects) > 60 and np.corrcoef(effects, exact)[0, 1] > 0.99  # what the proportion leaves out is little


def test_an_embedding_has_no_classes(headless: Rewritten, pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "ckpt"
    shutil.copytree(headless.path, out)
    result = make_catalogue(out, pictures)
    rows = read_table(out).to_pylist()
    assert all(r["raises"] is None and r["lowers"] is None and r["label"] == "" for r in rows)
    assert all(image.predicted == [] for image in read_exemplars(out).images.values())
    assert result.labels == {"automatic": 0, "user": 0} and result.warnings == []


def activations(vit: Rewritten, images: Tensor, layer: str, token_type: int) -> tuple[list[str], np.ndarray, Tensor]:
    """(names, activations [F, tokens], reads [tokens, C]) of the features that vary."""
    state = vit.model.state(layer)
    (own,) = [t for t in type_features(state, read_table(vit.path)) if t.token_type == token_type]
    x = record_layer(vit.model, images, layer).x[layer]
    values = state.feature_activations(x, own.features).flatten(0, 1).T.double().numpy()
    reads = state.linear.patches(x)[:, state.layout.slices[token_type]].flatten(2).flatten(0, 1)
    return [f.name for f in own.features], values, reads


@pytest.mark.parametrize("token_type", [0, 1])
def test_duplicates_are_the_most_correlated_features(
    vit: Rewritten, images: Tensor, found: Exemplars, table: dict[str, dict], token_type: int
) -> None:
    names, values, _ = activations(vit, images, vit.layer, token_type)
    for kind in ("concept", "subunit"):
        own = [i for i, name in enumerate(names) if table[name]["kind"] == kind]
        correlation = np.corrcoef(values[own])
        np.fill_diagonal(correlation, 0)
        for row, i in enumerate(own):
            listed = found.duplicates(names[i])
            assert len(listed) == min(5, len(own) - 1)
            expected = np.sort(np.abs(correlation[row]))[::-1][: len(listed)]
            np.testing.assert_allclose([abs(value) for _, value in listed], expected, atol=2e-4)
            for other, value in listed:
                assert table[other]["kind"] == kind and table[other]["token_type"] == TYPE_NAMES[token_type]
                assert correlation[row, own.index(names.index(other))] == pytest.approx(value, abs=2e-4)


@pytest.mark.parametrize("token_type", [0, 1])
def test_inputs_are_those_that_carry_the_variance(
    vit: Rewritten, images: Tensor, found: Exemplars, token_type: int
) -> None:
    names, values, reads = activations(vit, images, vit.layer, token_type)
    state = vit.model.state(vit.layer)
    (own,) = [t for t in type_features(state, read_table(vit.path)) if t.token_type == token_type]
    one = LayerPass(state, [own]).types[0]
    readout = torch.cat([b.readout for b in one.blocks]).double().numpy()
    centred = reads.double().numpy() - reads.double().numpy().mean(0)
    whole = 0
    for i, name in enumerate(names):
        contributions = centred * readout[i]  # [tokens, C]
        activation = contributions.sum(1)
        np.testing.assert_allclose(activation, values[i] - values[i].mean(), atol=1e-4)
        share = contributions.T @ activation / (activation @ activation)
        assert share.sum() == pytest.approx(1)
        listed = found.inputs(name)
        expected = np.sort(np.abs(share))[::-1][: len(listed)]
        np.testing.assert_allclose([abs(value) for _, value in listed], expected, atol=2e-4)
        for channel, value in listed:
            assert share[channel] == pytest.approx(value, abs=2e-4)
        whole += len(listed)
    assert whole > 5 * len(names)


def test_kernel_positions_of_a_channel_are_one_input() -> None:
    g = torch.Generator().manual_seed(0)
    reads = torch.randn(500, 3 * 4, generator=g, dtype=torch.float64)
    readout = torch.randn(5, 3 * 4, generator=g)
    covariance = torch.cov(reads.T, correction=0)
    links = feature_links(readout, covariance, 3, 2)
    assert links.inputs.shape == (5, 3)
    np.testing.assert_allclose(links.shares.sum(1), 1, atol=1e-5)
    contributions = (reads * readout[0].double()).unflatten(1, (3, 4)).sum(2)
    total = contributions.sum(1)
    expected = [
        float(torch.cov(torch.stack([contributions[:, j], total]))[0, 1] / total.var()) for j in links.inputs[0]
    ]
    np.testing.assert_allclose(links.shares[0], expected, atol=1e-5)


def test_a_feature_that_does_not_vary_here_has_no_links() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    readout = torch.tensor([[1.0, 2.0, 0.0], [0.0, 1.0, 1.0], [3.0, 0.0, 0.0]])
    links = feature_links(readout, covariance, 3, 0)
    assert links.inputs.tolist() == [[0, -1, -1], [-1, -1, -1], [0, -1, -1]]
    assert links.duplicates[:, :2].tolist() == [[2, -1], [-1, -1], [0, -1]]
    assert links.correlations[0, 0] == 1


def test_too_many_inputs_are_not_compared(
    vit: Rewritten, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    monkeypatch.setattr(moments, "WIDEST", 40)  # blocks.0.attn.proj reads 32 values a token, blocks.1.mlp.fc2 128
    result = make_catalogue(out, pictures)
    found = read_exemplars(out)
    first, second = vit.model.layers
    assert found.inputs(f"{first}/P0") and not found.inputs(f"{second}/P0") and not found.duplicates(f"{second}/P0")
    assert any("reads 128 values" in warning for warning in result.warnings)
