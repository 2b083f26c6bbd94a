"""`exemplars/` of a checkpoint: the images that stand for each feature, as `elude catalogue` left them there.

Every reader of a catalogue comes through here: reports, the explorer, `elude inspect`. Layout: `catalogue.json` says
what it belongs to, three tables hold exemplars, images and links, `thumbs/` the pictures.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elude_runtime.checkpoint.manifest import Manifest, read_manifest
from elude_runtime.errors import CheckpointError

EXEMPLARS = "exemplars"
CATALOGUE_JSON = "catalogue.json"
EXEMPLARS_TABLE = "exemplars.parquet"
IMAGES_TABLE = "images.parquet"
LINKS_TABLE = "links.parquet"
THUMBS = "thumbs"
FORMAT_VERSION = 1
POSITIVE, NEGATIVE, NEITHER = "positive", "negative", ""  # ends
TOP, QUANTILE, RANDOM, NEAR_MISS = "top", "quantile", "random", "near_miss"  # roles
INPUT, DUPLICATE = "input", "duplicate"  # kinds of links


@dataclass(frozen=True)
class CatalogueImage:
    """An image that is an exemplar of something. sha256: the first 16 bytes of its content's, as hexadecimal digits;
    width, height: upright, 0 where the image could not be read again; window: what the model saw of it, in its pixels;
    thumbnail: None where there is none; predicted: (class, probability) of the model's first classes."""

    id: int
    name: str
    sha256: str
    width: int
    height: int
    window: tuple[float, float, float, float]
    thumbnail: Path | None
    predicted: list[tuple[int, float]]


@dataclass(frozen=True, eq=False)
class Exemplar:
    """One image of one feature. token: on the layer's axis T; activation: there; heat int8 [rows * columns]: of the
    feature on every patch of the image, heat / 127 * heat_scale, None where there is none."""

    end: str
    role: str
    rank: int
    image: int
    token: int
    activation: float
    heat: NDArray[np.int8] | None
    heat_scale: float


@dataclass(frozen=True)
class CatalogueLayer:
    """A layer that the catalogue describes. grid: (rows, columns) of its position tokens; prefix: class and register
    tokens, which come first; token_types: those that can change the output."""

    name: str
    grid: tuple[int, int] | None
    prefix: int
    token_types: list[str]


class Exemplars:
    """A catalogue's tables in memory; exemplars of a feature become objects when they are asked for.

    made: when, in UTC; settings: what it was made with; read: images that were read; skipped: (file, reason), the first
    of those that were not.
    """

    def __init__(self, folder: Path, facts: dict[str, Any], tables: dict[str, Any]) -> None:
        self.made = str(facts["made"])
        self.settings: dict[str, Any] = dict(facts["settings"])
        self.read = int(facts["images"]["read"])
        self.skipped = [(str(s["file"]), str(s["reason"])) for s in facts["images"]["skipped"]]
        self.layers = [
            CatalogueLayer(
                str(one["name"]),
                None if one["grid"] is None else (int(one["grid"][0]), int(one["grid"][1])),
                int(one["prefix"]),
                [str(t) for t in one["token_types"]],
            )
            for one in facts["layers"]
        ]
        self.images = {image.id: image for image in _images(folder, tables[IMAGES_TABLE])}
        self._exemplars = _Groups(tables[EXEMPLARS_TABLE], ("end", "role", "rank", "image", "token", "activation"))
        self._heat = tables[EXEMPLARS_TABLE]["heat"]  # in chunks: together they may be more than a column can hold
        self._heat_scale = tables[EXEMPLARS_TABLE]["heat_scale"].to_numpy()
        self._links = _Groups(tables[LINKS_TABLE], ("kind", "other", "value"))
        unknown = set(self._exemplars.columns["image"].tolist()) - set(self.images)
        if unknown:
            raise ValueError(f"{IMAGES_TABLE} lacks the image {min(unknown)}")

    def of(self, feature: str) -> list[Exemplar]:
        """The exemplars of a feature, of a neuron around its calibration mean (`LAYER/y17`, on prefix tokens
        `LAYER/y17c`), or of an input channel (`LAYER/x17`); none for one that has none, such as a feature that never
        varied."""
        columns = self._exemplars.columns
        return [
            Exemplar(
                str(columns["end"][row]), str(columns["role"][row]), int(columns["rank"][row]),
                int(columns["image"][row]), int(columns["token"][row]), float(columns["activation"][row]),
                self._heat_of(row), float(self._heat_scale[row]),
            )
            for row in self._exemplars.rows(feature)
        ]  # fmt: skip

    def inputs(self, feature: str) -> list[tuple[int, float]]:
        """(input channel, its share of the feature's variance), the largest share first."""
        return [(int(other), value) for other, value in self._linked(feature, INPUT)]

    def duplicates(self, feature: str) -> list[tuple[str, float]]:
        """(other feature of its kind, correlation of their activations), the nearest first."""
        return self._linked(feature, DUPLICATE)

    def _linked(self, feature: str, kind: str) -> list[tuple[str, float]]:
        columns = self._links.columns
        return [
            (str(columns["other"][row]), float(columns["value"][row]))
            for row in self._links.rows(feature)
            if columns["kind"][row] == kind
        ]

    def _heat_of(self, row: int) -> NDArray[np.int8] | None:
        data = self._heat[row].as_py()
        return None if data is None else np.frombuffer(data, np.int8)


class _Groups:
    """Columns of a table in which the rows of a feature stand together, and where each feature's are."""

    def __init__(self, table: Any, columns: tuple[str, ...]) -> None:
        self.columns = {name: table[name].to_numpy() for name in columns}
        encoded = table["feature"].combine_chunks().dictionary_encode()
        codes, names = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
        starts = np.flatnonzero(np.diff(codes, prepend=-1))
        if len(starts) != len(names):
            raise ValueError("the rows of a feature do not stand together")
        ends = np.append(starts, len(codes))[1:]
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        self._spans = dict(zip((names[code] for code in codes[starts]), spans, strict=True))

    def rows(self, feature: str) -> range:
        return range(*self._spans.get(feature, (0, 0)))


def read_exemplars(checkpoint: Path) -> Exemplars:
    """The catalogue beside a checkpoint. CheckpointError, saying what to do, where there is none, where it is damaged,
    of another partition or a newer format, or where pyarrow is missing."""
    folder = checkpoint / EXEMPLARS
    manifest = read_manifest(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{checkpoint} has no exemplars; make them with `elude catalogue {checkpoint}`.")
    if find_spec("pyarrow") is None:
        raise CheckpointError(f"Reading {folder} needs the package pyarrow: install elude-serving[offline].")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        facts = json.loads((folder / CATALOGUE_JSON).read_text(encoding="utf-8"))
        _check_identity(folder, facts, manifest)
        tables = {name: pq.read_table(folder / name) for name in (EXEMPLARS_TABLE, IMAGES_TABLE, LINKS_TABLE)}
        return Exemplars(folder, facts, tables)
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError, pa.ArrowException) as error:
        reason = " ".join(f"{'lacks ' if isinstance(error, KeyError) else ''}{error}".split())[:200].rstrip(".")
        raise CheckpointError(
            f"{folder} is damaged or incomplete ({reason}); make it again with `elude catalogue {checkpoint}`."
        ) from error


def _check_identity(folder: Path, facts: dict[str, Any], manifest: Manifest) -> None:
    """CheckpointError for a catalogue of a newer format or of another partition."""
    version = facts["format_version"]
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{folder} has format version {version}, this software reads up to {FORMAT_VERSION}; install a newer "
            "elude-serving, or make it again with `elude catalogue`."
        )
    if facts["partition_sha256"] != manifest.partition_sha256:
        raise CheckpointError(
            f"{folder} was made for another partition than the checkpoint's; make it again with "
            f"`elude catalogue {folder.parent}`."
        )


def _images(folder: Path, table: Any) -> list[CatalogueImage]:
    return [
        CatalogueImage(
            int(row["image"]), str(row["name"]), str(row["sha256"]), int(row["width"]), int(row["height"]),
            (float(row["window"][0]), float(row["window"][1]), float(row["window"][2]), float(row["window"][3])),
            None if row["thumbnail"] is None else folder / THUMBS / Path(row["thumbnail"]).name,
            [(int(p["class"]), float(p["probability"])) for p in row["predicted"]],
        )
        for row in table.to_pylist()
    ]  # fmt: skip
