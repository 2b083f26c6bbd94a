"""`features.parquet`: one row a concept or sub-unit, with its calibration statistics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elude_runtime.analysis.features import Feature
from elude_runtime.checkpoint.labels import AUTOMATIC, USER
from elude_runtime.checkpoint.storage import storage_error, write_file
from elude_runtime.errors import CheckpointError
from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.partition.concepts import QUANTILES, FeatureStatistics

TABLE = "features.parquet"
_QUANTILE_NAMES = [f"q{round(q * 100):02d}" for q in QUANTILES]
_CLASS_EFFECTS = pa.list_(pa.struct([("class", pa.int32()), ("effect", pa.float32())]))
# What a catalogue adds; null until there is one, and in tables of older versions not there at all.
CATALOGUE_FIELDS = (
    pa.field("automatic_label", pa.string()),
    pa.field("stability", pa.float32()),
    pa.field("raises", _CLASS_EFFECTS),  # mean change of the centred logits when the feature rises by one std
    pa.field("lowers", _CLASS_EFFECTS),
    pa.field("peak_edges", pa.list_(pa.float32())),  # quantiles of the peak over images, at `PEAK_LEVELS`
    pa.field("peak_images", pa.int32()),  # that they were taken from
)
SCHEMA = pa.schema(
    [
        ("feature", pa.string()),
        ("kind", pa.string()),
        ("layer", pa.string()),
        ("token_type", pa.string()),
        ("neuron", pa.int32()),  # null for a concept
        ("subunit", pa.int32()),  # null for a concept and for `rest`
        ("concept", pa.string()),  # the concept that a sub-unit belongs to; a concept's own name
        ("sign", pa.int8()),  # -1 for a sub-unit that falls as its concept's activation rises
        ("size", pa.int32()),  # edges of a sub-unit, sub-units of a concept
        ("label", pa.string()),
        ("label_source", pa.string()),
        ("mean", pa.float32()),
        ("std", pa.float32()),
        *((name, pa.float32()) for name in _QUANTILE_NAMES),
        ("density", pa.float32()),
        ("drift_edges", pa.list_(pa.float32())),
        ("share", pa.float32()),  # of the layer output's variance; adds up to 1 over concepts, and over sub-units
        *CATALOGUE_FIELDS,
    ]
)


def table_rows(
    features: list[Feature], concepts: list[str], signs: list[int], sizes: list[int], statistics: FeatureStatistics
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
        "sign": signs,
        "size": sizes,
        "label": [""] * count,
        "label_source": [""] * count,
        "mean": statistics.mean.numpy(),
        "std": statistics.std.numpy(),
        **{name: statistics.quantiles[:, i].numpy() for i, name in enumerate(_QUANTILE_NAMES)},
        "density": statistics.density.numpy(),
        "drift_edges": list(np.asarray(statistics.drift_edges)),
        "share": statistics.share.numpy(),
        **{field.name: pa.nulls(count, field.type) for field in CATALOGUE_FIELDS},
    }
    return pa.table(columns, schema=SCHEMA)


def write_table(directory: Path, parts: list[pa.Table]) -> None:
    try:
        pq.write_table(pa.concat_tables(parts), directory / TABLE, compression="zstd")
    except OSError as error:
        raise storage_error(error, directory / TABLE) from error


def replace_table(directory: Path, table: pa.Table) -> None:
    """Put a table in the place of a checkpoint's, whole or not at all."""
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, compression="zstd")
    write_file(directory / TABLE, buffer.getvalue().to_pybytes())


def labelled(table: pa.Table, labels: Mapping[str, str]) -> pa.Table:
    """The table with the labels that people gave, by feature, and automatic ones where they gave none."""
    names, automatic = table["feature"].to_pylist(), table["automatic_label"].to_pylist()
    texts = [labels.get(name) or own or "" for name, own in zip(names, automatic, strict=True)]
    sources = [USER if name in labels else AUTOMATIC if text else "" for name, text in zip(names, texts, strict=True)]
    return with_columns(table, {"label": texts, "label_source": sources})


def with_columns(table: pa.Table, columns: Mapping[str, Any]) -> pa.Table:
    """The table with other values in columns that it has."""
    for name, values in columns.items():
        field = table.schema.field(name)
        table = table.set_column(
            table.schema.get_field_index(name),
            field,
            pa.array(values, field.type) if isinstance(values, list) else values,
        )
    return table


def class_effects(classes: NDArray[np.int64], effects: NDArray[np.float32], known: NDArray[np.bool_]) -> pa.Array:
    """A column of `raises` or `lowers`: classes and effects [N, n] of each feature, the largest first; an effect of 0
    is none, and a row that is not known is null."""
    there = (effects != 0) & known[:, None]
    offsets = np.concatenate([[0], there.sum(1).cumsum()]).astype(np.int32)
    of_class = pa.array(classes[there].astype(np.int32))
    structs = pa.StructArray.from_arrays([of_class, pa.array(effects[there])], fields=list(_CLASS_EFFECTS.value_type))
    return pa.ListArray.from_arrays(pa.array(offsets), structs, mask=pa.array(~known)).cast(_CLASS_EFFECTS)


def read_table(directory: Path) -> pa.Table:
    """The feature table of a checkpoint. CheckpointError if it is missing or damaged."""
    path = directory / TABLE
    try:
        table = pq.read_table(path)
        for field in CATALOGUE_FIELDS:
            if field.name not in table.column_names:
                table = table.append_column(field, pa.nulls(len(table), field.type))
        if "sign" not in table.column_names:  # from before concepts had members that fall
            table = table.append_column(SCHEMA.field("sign"), pa.repeat(pa.scalar(1, pa.int8()), len(table)))
        return table
    except (OSError, pa.ArrowException) as error:
        raise CheckpointError(f"{path} is missing or damaged; copy it again, or make the checkpoint again.") from error
