"""A catalogue's files, as `checkpoint.exemplars` reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from elude_runtime.checkpoint.exemplars import CATALOGUE_JSON, EXEMPLARS_TABLE, IMAGES_TABLE, LINKS_TABLE, THUMBS
from elude_runtime.checkpoint.storage import write_json
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.findings import Findings, link_tables
from elude_runtime.offline.catalogue.pictures import Pictures
from elude_runtime.offline.catalogue.selection import PREDICTED
from elude_runtime.offline.catalogue.tables import (
    EXEMPLARS_SCHEMA,
    IMAGES_SCHEMA,
    LINKS_SCHEMA,
    exemplar_table,
    write_parquet,
)
from elude_runtime.offline.images import ImageSource


@dataclass(frozen=True, eq=False)
class ExemplarImages:
    """The images that are an exemplar of anything, each under its number. places int64 [N], ascending; predicted: the
    first classes of each with their probabilities."""

    places: NDArray[np.int64]
    names: list[str]
    hashes: list[bytes]
    predicted: list[list[tuple[int, float]]]

    @classmethod
    def of(cls, findings: Findings, answers: Answers, source: ImageSource) -> ExemplarImages:
        places = np.unique(np.concatenate([role.place for group in findings.groups for role in group.roles]))
        rows = answers.rows(torch.from_numpy(places))
        classes, probabilities = answers.classes[rows, :PREDICTED].tolist(), answers.probabilities[rows].tolist()
        return cls(
            places,
            [source.name(place) for place in places.tolist()],
            [bytes(digest) for digest in answers.hashes[rows].tolist()],
            [list(zip(own, first, strict=False)) for own, first in zip(classes, probabilities, strict=True)],
        )


def write_catalogue(
    folder: Path, findings: Findings, images: ExemplarImages, pictures: Pictures, facts: dict[str, Any]
) -> None:
    """Everything but the feature table. facts: `catalogue.json`. StorageError for a disk that refuses."""
    (folder / THUMBS).mkdir()
    thumbnails = pictures.unpack(folder / THUMBS)
    exemplars = (exemplar_table(group.names, group.roles, images.places) for group in findings.groups)
    write_parquet(folder / EXEMPLARS_TABLE, exemplars, EXEMPLARS_SCHEMA)
    write_parquet(folder / LINKS_TABLE, link_tables(findings.types), LINKS_SCHEMA)
    write_parquet(folder / IMAGES_TABLE, [_image_table(images, pictures, thumbnails)], IMAGES_SCHEMA)
    write_json(folder / CATALOGUE_JSON, facts)


def _image_table(images: ExemplarImages, pictures: Pictures, thumbnails: Sequence[str | None]) -> pa.Table:
    columns = {
        "image": list(range(len(images.places))),
        "name": images.names,
        "sha256": [digest.hex() for digest in images.hashes],
        "width": [width for width, _ in pictures.sizes],
        "height": [height for _, height in pictures.sizes],
        "window": [list(window) for window in pictures.windows],
        "thumbnail": list(thumbnails),
        "predicted": [[{"class": c, "probability": p} for c, p in own] for own in images.predicted],
    }
    return pa.table(columns, schema=IMAGES_SCHEMA)
