"""The feature catalogue as serving reads it: facts by name and search, from `features.json` or `features.parquet`.

An archive carries `features.json` (columns; made by `elude archive`), so that a server needs no pyarrow.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elude_runtime.checkpoint.packed import pack_f32, pack_i32, unpack_f32, unpack_i32
from elude_runtime.errors import CheckpointError

FEATURES_JSON = "features.json"
FEATURES_PARQUET = "features.parquet"
_FORMAT_VERSION = 1
_WORDS = ("kind", "layer", "token_type", "concept", "label", "label_source")
_NUMBERS = ("mean", "std", "density", "share")
_QUANTILE = re.compile(r"q\d\d")
PEAK_LEVELS = (0.01, *(tenth / 10 for tenth in range(1, 10)), 0.99)
"""Quantiles of a feature's peak over the images of `elude catalogue` that bound its bins."""
BIN_SHARES = (0.01, 0.09, *[0.1] * 8, 0.09, 0.01)
"""Of those images, the share in each bin."""
_EDGE_NAMES = tuple(f"peak{round(100 * level):02d}" for level in PEAK_LEVELS)
_PEAK_EDGES, _PEAK_IMAGES = "peak_edges", "peak_images"
_LONGEST_QUERY = 200  # characters that count
_NO_MATCH = 9


@dataclass(frozen=True)
class FeatureFacts:
    """What the calibration found out about one feature, in units of its own activation.

    size: edges of a sub-unit, sub-units of a concept; concept: the one that a sub-unit belongs to, a concept's own
    name; sign: -1 for a sub-unit that falls as its concept's activation rises, else 1; quantiles: by name, `q01` …
    `q99`; density: share of tokens more than two standard deviations from the mean; share: of the layer output's
    variance. label, label_source: None where nobody gave one.
    """

    feature: str
    kind: str
    layer: str
    token_type: str
    label: str | None
    label_source: str | None
    concept: str
    sign: int
    size: int
    mean: float
    std: float
    quantiles: dict[str, float]
    density: float
    share: float


@dataclass(frozen=True, eq=False)
class _Words:
    """A column of strings that repeat: each stands in `values` once; codes int32 [N]."""

    values: list[str]
    codes: NDArray[np.int32]

    def at(self, row: int) -> str:
        return self.values[self.codes[row]]


@dataclass(frozen=True, eq=False)
class _Columns:
    """The table without an object a row. names: UTF-8, [N]; words and numbers by column. ValueError where they do not
    fit together."""

    names: NDArray[np.bytes_]
    size: NDArray[np.int32]
    sign: NDArray[np.int32]
    words: dict[str, _Words]
    numbers: dict[str, NDArray[np.float32]]

    def __post_init__(self) -> None:
        count = len(self.names)
        columns = (self.size, self.sign, *(w.codes for w in self.words.values()), *self.numbers.values())
        if {*map(len, columns)} - {count}:
            raise ValueError("its columns have different lengths")
        if not np.isin(self.sign, (1, -1)).all():
            raise ValueError("its column sign holds a number that is neither 1 nor -1")
        for name, column in self.words.items():
            if count and not 0 <= column.codes.min() <= column.codes.max() < len(column.values):
                raise ValueError(f"its column {name} names a value that is not there")
        for name, numbers in self.numbers.items():
            if not np.isfinite(numbers).all():
                raise ValueError(f"its column {name} holds a number that is not finite")


class FeatureCatalogue:
    """Facts about every feature of a checkpoint, in the table's order: layer by layer, concepts before sub-units.

    Read on first use, as columns; a few megabytes for 100,000 features.
    """

    def __init__(self, read: Callable[[], _Columns]) -> None:
        self._read = read

    def __len__(self) -> int:
        return len(self._columns.names)

    def facts(self, name: str) -> FeatureFacts | None:
        """Of the feature of this name; None where the table has none. CheckpointError where the table is damaged."""
        row = self._row(name)
        return None if row is None else self._facts(row)

    def peak_edges(self, name: str) -> NDArray[np.float32] | None:
        """The quantiles [11] of a feature's peak at `PEAK_LEVELS`. None for an unknown feature, without a catalogue,
        and where some are equal: nearly all of its peaks are the same."""
        row, numbers = self._row(name), self._columns.numbers
        if row is None or _EDGE_NAMES[0] not in numbers:
            return None
        edges = np.array([numbers[edge][row] for edge in _EDGE_NAMES], dtype=np.float32)
        return edges if bool((np.diff(edges) > 0).all()) else None

    @property
    def peak_images(self) -> int:
        """How many images the quantiles of peaks were taken from; 0 without a catalogue."""
        column = self._columns.numbers.get(_PEAK_IMAGES)
        return int(column.max(initial=0)) if column is not None else 0

    def search(
        self,
        query: str | None = None,
        layer: str | None = None,
        ids: Sequence[str] | None = None,
        limit: int = 50,
        offset: int = 0,
    ) -> tuple[list[FeatureFacts], int]:
        """(`limit` features from place `offset` on, how many there are in all).

        query: looked for in labels and names, whatever the case. Best first: labels and names that are it; labels that
        begin with it and names that end in it; labels with a word that begins with it; labels and names that hold it;
        where there is nothing of the kind, concepts whose label or name is much like it. Among equals concepts come
        before sub-units. layer: of this layer only; ids: these names only, in this order unless there is a query.
        CheckpointError where the table is damaged.
        """
        columns = self._columns
        if ids is None:
            rows = np.argsort(self._is_subunit, kind="stable")
        else:
            found = dict.fromkeys(row for row in map(self._row, ids) if row is not None)
            rows = np.fromiter(found, dtype=np.int64, count=len(found))
        if layer is not None:
            column = columns.words["layer"]
            wanted = column.values.index(layer) if layer in column.values else -1
            rows = rows[column.codes[rows] == wanted]
        query = (query or "").strip()[:_LONGEST_QUERY].lower()
        if query:
            rows = self._ranked(rows, query)
        return [self._facts(int(row)) for row in rows[offset : offset + limit]], len(rows)

    @cached_property
    def _columns(self) -> _Columns:
        return self._read()

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self._columns.names, kind="stable")

    @cached_property
    def _is_subunit(self) -> NDArray[np.bool_]:
        kind = self._columns.words["kind"]
        return np.array([value != "concept" for value in kind.values], dtype=bool)[kind.codes]

    def _row(self, name: str) -> int | None:
        names, key = self._columns.names, name.encode("utf-8", "surrogatepass")
        # numpy would widen the whole column for a longer key, and takes trailing zeros for padding
        if len(key) > names.dtype.itemsize or b"\0" in key or not len(names):
            return None
        place = int(np.searchsorted(names, np.bytes_(key), sorter=self._order))
        row = int(self._order[min(place, len(names) - 1)])
        return row if names[row] == key else None

    def _facts(self, row: int) -> FeatureFacts:
        c = self._columns
        numbers = {name: float(str(column[row])) for name, column in c.numbers.items()}  # the shortest text of it
        return FeatureFacts(
            feature=c.names[row].decode(),
            kind=c.words["kind"].at(row),
            layer=c.words["layer"].at(row),
            token_type=c.words["token_type"].at(row),
            label=c.words["label"].at(row) or None,
            label_source=c.words["label_source"].at(row) or None,
            concept=c.words["concept"].at(row),
            sign=int(c.sign[row]),
            size=int(c.size[row]),
            mean=numbers["mean"],
            std=numbers["std"],
            quantiles={name: value for name, value in numbers.items() if _QUANTILE.fullmatch(name)},
            density=numbers["density"],
            share=numbers["share"],
        )

    def _ranked(self, rows: NDArray[np.int64], query: str) -> NDArray[np.int64]:
        """Those of the rows that the query finds, best first."""
        labels = self._columns.words["label"]
        of_label = np.array([_label_rank(value.lower(), query) for value in labels.values], dtype=np.int8)
        rank = np.minimum(of_label[labels.codes[rows]], _name_ranks(self._columns.names[rows], query))
        hit = rank < _NO_MATCH
        if hit.any():
            return rows[hit][np.lexsort((self._is_subunit[rows[hit]], rank[hit]))]
        return self._much_like(rows[~self._is_subunit[rows]], query)

    def _much_like(self, rows: NDArray[np.int64], query: str) -> NDArray[np.int64]:
        """The concepts whose label or name (without its layer) is most like the query, best first."""
        matcher = difflib.SequenceMatcher(b=query)
        closeness = np.zeros(len(rows))
        for place, row in enumerate(rows.tolist()):
            label, name = self._columns.words["label"].at(row), self._columns.names[row].decode()
            for text in (label.lower(), name.lower(), name.rpartition("/")[2].lower()):
                matcher.set_seq1(text)
                if text and matcher.real_quick_ratio() >= 0.6 and matcher.quick_ratio() >= 0.6:
                    closeness[place] = max(closeness[place], matcher.ratio())
        order = np.argsort(-closeness, kind="stable")
        return rows[order[closeness[order] >= 0.6]]


def read_catalogue(directory: Path) -> FeatureCatalogue:
    """The catalogue of a checkpoint: of its `features.json`, else of `features.parquet`.

    CheckpointError where neither is there, or where pyarrow is needed and missing; a damaged file shows on first use.
    """
    path = directory / FEATURES_JSON
    if path.is_file():
        return FeatureCatalogue(lambda: _from_json(path))
    table = directory / FEATURES_PARQUET
    if not table.is_file():
        raise CheckpointError(f"{directory} lacks {FEATURES_PARQUET}; copy the whole checkpoint, or make it again.")
    if find_spec("pyarrow") is None:
        raise CheckpointError(
            f"Reading {table} needs the package pyarrow: install elude-serving[offline], or serve the archive that "
            "`elude archive` makes."
        )
    return FeatureCatalogue(lambda: _from_parquet(table))


def features_json(directory: Path) -> bytes:
    """The content of `features.json` for an archive. CheckpointError as of `read_catalogue`, and for damaged files."""
    columns = read_catalogue(directory)._columns
    document = {
        "format_version": _FORMAT_VERSION,
        "feature": [name.decode() for name in columns.names.tolist()],
        "size": {"b64_i32": pack_i32(columns.size)},
        "sign": {"b64_i32": pack_i32(columns.sign)},
        "words": {n: {"values": w.values, "b64_i32": pack_i32(w.codes)} for n, w in columns.words.items()},
        "numbers": {name: {"b64_f32": pack_f32(column)} for name, column in columns.numbers.items()},
    }
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _label_rank(label: str, query: str) -> int:
    if query not in label:
        return _NO_MATCH
    if label == query:
        return 0
    if label.startswith(query):
        return 1
    return 2 if re.search(rf"\b{re.escape(query)}", label) else 3


def _name_ranks(names: NDArray[np.bytes_], query: str) -> NDArray[np.int8]:
    """0 for the name itself, 1 for its last part, 3 for any part of it."""
    lower, key = np.char.lower(names), query.encode("utf-8", "surrogatepass")
    rank = np.full(len(names), _NO_MATCH, dtype=np.int8)
    if len(key) <= names.dtype.itemsize:
        rank[np.char.find(lower, key) >= 0] = 3
        rank[np.char.endswith(lower, b"/" + key)] = 1
        rank[lower == key] = 0
    return rank


def _from_json(path: Path) -> _Columns:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        version = document["format_version"]
        if isinstance(version, int) and version > _FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this software reads up to {_FORMAT_VERSION}; install a newer "
                "elude-serving, or make the archive again."
            )
        words = {}
        for name in _WORDS:
            column = document["words"][name]
            words[name] = _Words(_texts(column["values"]), unpack_i32(column["b64_i32"]))
        packed = document["numbers"]
        peaks = [name for name in (*_EDGE_NAMES, _PEAK_IMAGES) if _PEAK_IMAGES in packed]
        numbers = {name: unpack_f32(packed[name]["b64_f32"]) for name in (*_numeric(packed), *peaks)}
        size = unpack_i32(document["size"]["b64_i32"])
        # of an archive from before concepts had members that fall
        sign = unpack_i32(document["sign"]["b64_i32"]) if "sign" in document else np.ones_like(size)
        return _Columns(_encoded(_texts(document["feature"])), size, sign, words, numbers)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(path, error) from error


def _from_parquet(path: Path) -> _Columns:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        present = pq.read_schema(path).names
        numeric = _numeric(present)
        signed = ["sign"] if "sign" in present else []  # a table from before concepts had members that fall has none
        table = pq.read_table(path, columns=["feature", "size", *signed, *_WORDS, *numeric]).combine_chunks()
        words = {}
        for name in _WORDS:
            values, codes = np.unique(np.array(_texts(table[name].to_pylist()), dtype=object), return_inverse=True)
            words[name] = _Words(values.tolist(), codes.astype(np.int32))
        numbers = {name: table[name].to_numpy().astype(np.float32) for name in numeric}
        numbers.update(_peaks(path))
        size = table["size"].to_numpy().astype(np.int32)
        sign = table["sign"].to_numpy().astype(np.int32) if signed else np.ones_like(size)
        return _Columns(_encoded(_texts(table["feature"].to_pylist())), size, sign, words, numbers)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise _damaged(path, error) from error


def _peaks(path: Path) -> dict[str, NDArray[np.float32]]:
    """The quantiles of peaks as a column each, 0 where there are none; empty without a catalogue. ValueError for lists
    of another length."""
    import pyarrow.parquet as pq

    if not {_PEAK_EDGES, _PEAK_IMAGES} <= set(pq.read_schema(path).names):
        return {}
    table = pq.read_table(path, columns=[_PEAK_EDGES, _PEAK_IMAGES])
    blank = [0.0] * len(_EDGE_NAMES)
    edges = np.array([own or blank for own in table[_PEAK_EDGES].to_pylist()], dtype=np.float32)
    images = np.array([count or 0 for count in table[_PEAK_IMAGES].to_pylist()], dtype=np.float32)
    if not images.any():
        return {}
    columns = edges.reshape(len(images), len(_EDGE_NAMES))
    return {**{name: columns[:, place].copy() for place, name in enumerate(_EDGE_NAMES)}, _PEAK_IMAGES: images}


def _numeric(columns: Iterable[str]) -> list[str]:
    """The columns of numbers: the quantiles that there are, in order, and what every table has."""
    return [*sorted(name for name in columns if _QUANTILE.fullmatch(name)), *_NUMBERS]


def _encoded(names: list[str]) -> NDArray[np.bytes_]:
    return np.array([name.encode() for name in names], dtype=np.bytes_)


def _texts(values: Any) -> list[str]:
    """Strings; what is missing is an empty one. ValueError for anything else."""
    if not isinstance(values, list) or not all(v is None or isinstance(v, str) for v in values):
        raise ValueError("a column of texts holds something else")
    return [v or "" for v in values]


def _damaged(path: Path, error: Exception) -> CheckpointError:
    reason = " ".join(str(error).split())[:200].rstrip(".")
    return CheckpointError(f"{path} is missing or damaged ({reason}); copy it again, or make the checkpoint again.")
