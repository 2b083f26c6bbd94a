"""The tables of `exemplars/`: whole columns from arrays over features, in the order of the feature table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elude_runtime.checkpoint.storage import storage_error

EXEMPLARS_SCHEMA = pa.schema(
    [
        ("feature", pa.string()),
        ("end", pa.string()),
        ("role", pa.string()),
        ("rank", pa.int16()),
        ("image", pa.int32()),
        ("token", pa.int32()),
        ("activation", pa.float32()),
        ("heat", pa.binary()),
        ("heat_scale", pa.float32()),
    ]
)
LINKS_SCHEMA = pa.schema(
    [
        ("feature", pa.string()),
        ("kind", pa.string()),
        ("rank", pa.int16()),
        ("other", pa.string()),
        ("value", pa.float32()),
    ]
)
IMAGES_SCHEMA = pa.schema(
    [
        ("image", pa.int32()),
        ("name", pa.string()),
        ("sha256", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("window", pa.list_(pa.float32(), 4)),
        ("thumbnail", pa.string()),
        ("predicted", pa.list_(pa.struct([("class", pa.int32()), ("probability", pa.float32())]))),
    ]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RoleColumns:
    """Exemplars of one role and end. feature: number of each row's feature; heat int8 [N, T] or None; heat_scale [N] is
    0 where there is none. All [N], features ascending, ranks within."""

    role: str
    end: str
    feature: NDArray[np.int64]
    rank: NDArray[np.int64]
    place: NDArray[np.int64]
    token: NDArray[np.int64]
    activation: NDArray[np.float32]
    heat: NDArray[np.int8] | None = None
    heat_scale: NDArray[np.float32] | None = None


def exemplar_table(names: Sequence[str], parts: Sequence[RoleColumns], places: NDArray[np.int64]) -> pa.Table:
    """Rows of all roles, feature by feature, and in each in the order of the parts. names: of the features that the
    parts number; places: of the catalogue's images, ascending, whose positions are their ids."""
    feature = np.concatenate([p.feature for p in parts])
    order = np.argsort(feature, kind="stable")

    def column(values: Iterable[NDArray]) -> NDArray:
        return np.concatenate(list(values))[order]

    rows = [len(p.feature) for p in parts]
    part = np.repeat(np.arange(len(parts)), rows)[order]
    scale = column(
        p.heat_scale if p.heat_scale is not None else np.zeros(n, np.float32) for p, n in zip(parts, rows, strict=True)
    )
    columns = {
        "feature": texts(feature[order], names),
        "end": texts(part, [p.end for p in parts]),
        "role": texts(part, [p.role for p in parts]),
        "rank": column(p.rank for p in parts).astype(np.int16),
        "image": np.searchsorted(places, column(p.place for p in parts)).astype(np.int32),
        "token": column(p.token for p in parts).astype(np.int32),
        "activation": column(p.activation for p in parts).astype(np.float32),
        "heat": _heat([p.heat for p in parts], rows, order),
        "heat_scale": scale,
    }
    return pa.table(columns, schema=EXEMPLARS_SCHEMA)


def write_parquet(path: Path, tables: Iterable[pa.Table], schema: pa.Schema) -> None:
    """One table after another into a file. StorageError for a disk that refuses."""
    try:
        with pq.ParquetWriter(path, schema, compression="zstd") as writer:
            for table in tables:
                writer.write_table(table)
    except OSError as error:
        raise storage_error(error, path) from error


def texts(numbers: NDArray, values: Sequence[str]) -> pa.Array:
    """A column of the values with these numbers."""
    return pa.DictionaryArray.from_arrays(numbers.astype(np.int32), pa.array(values, pa.string())).cast(pa.string())


def _heat(parts: Sequence[NDArray[np.int8] | None], rows: Sequence[int], order: NDArray[np.int64]) -> pa.Array:
    """A binary column, without an object a row."""
    length = next((p.shape[1] for p in parts if p is not None), 0)
    there = np.repeat([p is not None for p in parts], rows)
    if not length or not there.any():
        return pa.nulls(len(order), pa.binary())
    where = np.full(len(order), -1, dtype=np.int64)  # row of the stacked heats of every exemplar
    where[there] = np.arange(int(there.sum()))
    where = where[order]
    stacked = np.concatenate([p for p in parts if p is not None])[where[where >= 0]]
    offsets = np.concatenate([[0], np.cumsum(np.where(where >= 0, length, 0))]).astype(np.int32)
    valid = pa.array(where >= 0).buffers()[1]
    return pa.Array.from_buffers(pa.binary(), len(order), [valid, pa.py_buffer(offsets), pa.py_buffer(stacked)])
