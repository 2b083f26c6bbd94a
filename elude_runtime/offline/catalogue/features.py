"""Which features of a checkpoint a catalogue describes: those of the table that vary."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import torch

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.catalogue.layer_pass import LEVELS, TypeFeatures
from elude_runtime.partition.concepts import DRIFT_EDGES

_DECILES = [DRIFT_EDGES.index(level) for level in LEVELS]


def type_features(state: SplitState, table: pa.Table) -> list[TypeFeatures]:
    """Of each live token type of a layer the features of the table whose standard deviation is not 0."""
    return [_of_type(state, table, token_type) for token_type in state.live_types]


def _of_type(state: SplitState, table: pa.Table, token_type: int) -> TypeFeatures:
    layer, kind = table["layer"].to_numpy(zero_copy_only=False), table["token_type"].to_numpy(zero_copy_only=False)
    std = table["std"].to_numpy()
    ours = (layer == state.name) & (kind == TYPE_NAMES[token_type])
    rows = np.flatnonzero(ours & (std > 0))
    own = table.take(rows)
    features = []
    for name, neuron, subunit in zip(*(own[c].to_pylist() for c in ("feature", "neuron", "subunit")), strict=True):
        if neuron is not None:
            features.append(Feature(state.name, token_type, subunit, neuron))
        else:
            number = name.rpartition("/")[2][1:]
            features.append(Feature(state.name, token_type, None if number == "rest" else int(number)))
    deciles = np.array(own["drift_edges"].to_pylist(), dtype=np.float32).reshape(len(rows), len(DRIFT_EDGES))
    return TypeFeatures(
        token_type, features, torch.from_numpy(rows), torch.from_numpy(std[rows]),
        torch.from_numpy(deciles[:, _DECILES]), int(ours.sum()) - len(rows),
    )  # fmt: skip
