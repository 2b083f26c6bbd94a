"""`features.parquet`: one row a concept or sub-unit, with its calibration statistics."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from elude_runtime.analysis.features import Feature
from elude_runtime.checkpoint.storage import storage_error
from elude_runtime.errors import CheckpointError
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.partition.concepts import QUANTILES, FeatureStatistics

TABLE = "features.parquet"
_QUANTILE_NAMES = [f"q{round(q * 100):02d}" for q in QUANTILES]
SCHEMA = pa.schema(
    [
        ("feature", pa.string()),
        ("kind", pa.string()),
        ("layer", pa.string()),
        ("token_type", pa.string()),
        ("neuron", pa.int32()),  # null for a concept
        ("subunit", pa.int32()),  # null for a concept and for `rest`
        ("concept", pa.string()),  # the concept that a sub-unit belongs to; a concept's own name
        ("size", pa.int32()),  # edges of a sub-unit, sub-units of a concept
        ("label", pa.string()),
        ("label_source", pa.string()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
        *((name, pa.float32()) for name in _QUANTILE_NAMES),
        ("density", pa.float32()),
        ("drift_edges", pa.list_(pa.float32())),
        ("share", pa.float32()),  # of the layer output's variance; adds up to 1 over concepts, and over sub-units
    ]
)


def table_rows(
    features: list[Feature], concepts: list[str], sizes: list[int], statistics: FeatureStatistics
) -> pa.Table:
    """Rows of features that share a layer and token type, in the order of their statistics."""
    count = len(features)
    columns = {
        "feature": [f.name for f in features],
        "kind": [f.kind for f in features],
        "layer": [f.layer for f in features],
        "token_type": [TYPE_NAMES[f.token_type] for f in features],
        "neuron": [f.neuron for f in features],
        "subunit": [f.index if f.neuron is not None else None for f in features],
        "concept": concepts,
        "size": sizes,
        "label": [""] * count,
        "label_source": [""] * count,
        "mean": statistics.mean.numpy(),
        "std": statistics.std.numpy(),
        **{name: statistics.quantiles[:, i].numpy() for i, name in enumerate(_QUANTILE_NAMES)},
        "density": statistics.density.numpy(),
        "drift_edges": list(np.asarray(statistics.drift_edges)),
        "share": statistics.share.numpy(),
    }
    return pa.table(columns, schema=SCHEMA)


def write_table(directory: Path, parts: list[pa.Table]) -> None:
    try:
        pq.write_table(pa.concat_tables(parts), directory / TABLE, compression="zstd")
    except OSError as error:
        raise storage_error(error, directory / TABLE) from error


def read_table(directory: Path) -> pa.Table:
    """The feature table of a checkpoint. CheckpointError if it is missing or damaged."""
    path = directory / TABLE
    try:
        return pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} is missing or damaged; copy it again, or make the checkpoint again.") from error
