"""Names of features: there and back, and what is none."""

from __future__ import annotations

import pytest
from conftest import Rewritten
from hypothesis import given
from hypothesis import strategies as st

from elude_runtime.analysis.features import Feature, parse_feature
from elude_runtime.errors import FeatureError

LAYERS = ["blocks.10.mlp.fc2", "blocks.1.mlp.fc2", "a/b"]


@given(st.sampled_from(LAYERS), st.integers(0, 1), st.none() | st.integers(0, 10**6), st.none() | st.integers(0, 10**6))
def test_a_name_reads_back_as_its_feature(layer: str, token_type: int, index: int | None, neuron: int | None) -> None:
    feature = Feature(layer, token_type, index, neuron)
    assert parse_feature(feature.name, LAYERS) == feature
    assert feature.kind == ("concept" if neuron is None else "subunit")


def test_names_are_those_of_the_interface() -> None:
    assert Feature("L", 0, 17).name == "L/P17" and Feature("L", 1, 4).name == "L/C4"
    assert Feature("L", 0, None).name == "L/Prest" and Feature("L", 1, None).name == "L/Crest"
    assert Feature("L", 0, 3, 12).name == "L/12/p3" and Feature("L", 1, None, 12).name == "L/12/crest"


@pytest.mark.parametrize(
    "name", ["", "P1", "a/b", "a/b/X1", "a/b/P", "a/b/P-1", "a/b/p1", "a/b/1/P1", "a/b/P1 ", "a/b/Prest2", "a/b/P1\n"]
)
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(FeatureError, match="is not a feature's name|no split layer"):
        parse_feature(name, LAYERS)


def test_an_unknown_layer_gets_the_closest() -> None:
    with pytest.raises(FeatureError, match=r"Did you mean blocks\.10\.mlp\.fc2"):
        parse_feature("blocks.10.mlp.fc1/P0", LAYERS)


def test_features_that_the_checkpoint_does_not_have(vit: Rewritten, mobilenet: Rewritten) -> None:
    layer, model = vit.layer, vit.model
    known = model.state(layer).partition.concepts(0)
    model.feature(f"{layer}/P{known - 1}")
    with pytest.raises(FeatureError, match=f"P0 to P{known - 1}"):
        model.feature(f"{layer}/P{known}")
    with pytest.raises(FeatureError, match="neurons 0 to 31"):
        model.feature(f"{layer}/32/p0")
    with pytest.raises(FeatureError, match="sub-units and prest"):
        model.feature(f"{layer}/0/p200")
    with pytest.raises(FeatureError, match="no class token"):
        mobilenet.model.feature(f"{mobilenet.layer}/C0")
    assert set(model.concept_names(layer)) >= {f"{layer}/P0", f"{layer}/Prest", f"{layer}/C0", f"{layer}/Crest"}
    for name in model.concept_names(layer):
        assert model.feature(name).name == name
