"""The catalogue's columns, from a checkpoint's table and from what an archive has in its place."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import Rewritten
from support import SECOND

from elude_runtime.checkpoint.catalogue import FEATURES_JSON, features_json, read_catalogue
from elude_runtime.checkpoint.packed import pack_i32
from elude_runtime.errors import CheckpointError


def test_which_members_of_a_concept_fall(vit: Rewritten, tmp_path: Path) -> None:
    """From the table and from an archive's; 1 in one made before concepts had such members."""
    archived = json.loads(features_json(vit.path))
    older = {name: part for name, part in archived.items() if name != "sign"}
    catalogues = [read_catalogue(vit.path)]
    for name, document in (("archived", archived), ("older", older)):
        (tmp_path / name).mkdir()
        (tmp_path / name / FEATURES_JSON).write_text(json.dumps(document))
        catalogues.append(read_catalogue(tmp_path / name))
    state, seen = vit.model.state(SECOND), set()
    for name in archived["feature"]:
        if not name.startswith(f"{SECOND}/"):
            continue
        feature, expected = vit.model.feature(name), 1
        if feature.neuron is not None:
            expected = int(state.partition.sign[feature.token_type, feature.neuron, state.slot(feature)])
        found = [facts.sign for catalogue in catalogues if (facts := catalogue.facts(name))]
        assert found == [expected, expected, 1]
        seen.add(expected)
    assert seen == {1, -1}


def test_a_damaged_column_of_signs(vit: Rewritten, tmp_path: Path) -> None:
    made = json.loads(features_json(vit.path))
    count = len(made["feature"])
    for column, said in ((np.ones(count - 1), "different lengths"), (np.zeros(count), "neither 1 nor -1")):
        packed = pack_i32(column.astype(np.int32))
        (tmp_path / FEATURES_JSON).write_text(json.dumps({**made, "sign": {"b64_i32": packed}}))
        with pytest.raises(CheckpointError, match=said):
            len(read_catalogue(tmp_path))
