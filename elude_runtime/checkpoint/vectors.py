"""Named vectors: `vectors/NAME.json`, each what sets two groups of images apart at one layer, bound to a partition."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from elude_runtime.checkpoint.packed import pack_f32, unpack_f32
from elude_runtime.checkpoint.storage import storage_error, write_json
from elude_runtime.errors import CheckpointError, EludeError, StorageError

VECTORS = "vectors"
_NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class FeatureShare(_Strict):
    """weight: difference of the two groups' mean peaks over the pooled standard deviation; share: its square over the
    sum of the squares of all the layer's concepts."""

    feature: str
    weight: float
    share: float


class _VectorFile(_Strict):
    format_version: Literal[1]
    name: str
    layer: str
    partition_sha256: str
    made: str
    direction_b64_f32: str
    edits: list[dict[str, Any]]
    weights: list[FeatureShare]
    auc: float | None
    positive: int
    negative: int


@dataclass(frozen=True, eq=False)
class StoredVector:
    """direction float32 [d]: positive minus negative mean output of the layer; edits: the same as edit documents of
    features; auc: how well the weighted peaks tell held-out images apart, None where there were too few; positive,
    negative: images on each side; made: when, ISO 8601."""

    name: str
    layer: str
    partition_sha256: str
    made: str
    direction: NDArray[np.float32]
    edits: list[dict[str, Any]]
    weights: list[FeatureShare]
    auc: float | None
    positive: int
    negative: int


def checked_name(name: str, what: str) -> str:
    """The name itself. EludeError where a vector or policy (`what`) cannot have it."""
    if not _NAME.fullmatch(name):
        raise EludeError(
            f"A {what} cannot be named {name[:80]!r}; use 1 to 64 letters, digits, dots, dashes and underscores."
        )
    return name


def check_partition(made_for: str, partition_sha256: str, what: str) -> None:
    """CheckpointError unless `what` was made for the partition that there is."""
    if made_for != partition_sha256:
        raise CheckpointError(
            f"{what} was made for the partition {made_for[:12]}…, this checkpoint has {partition_sha256[:12]}…, whose "
            "features mean something else; make it again for this checkpoint, or remove it."
        )


def vector_file(directory: Path, name: str, *, force: bool = False) -> Path:
    """Where a vector of this name is to be written. EludeError for an impossible name, StorageError for one that is
    taken, unless force."""
    path = directory / VECTORS / f"{checked_name(name, 'vector')}.json"
    if path.exists() and not force:
        raise StorageError(f"The vector {name} is already there ({path}); give --force to replace it.")
    return path


def save_vector(directory: Path, vector: StoredVector, *, force: bool = False) -> Path:
    """Write it beside the checkpoint, whole or not at all; gives the file. Errors as of `vector_file`, and
    StorageError for a disk that refuses."""
    path = vector_file(directory, vector.name, force=force)
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise storage_error(error, path) from error
    stored = _VectorFile(
        format_version=1,
        name=vector.name,
        layer=vector.layer,
        partition_sha256=vector.partition_sha256,
        made=vector.made,
        direction_b64_f32=pack_f32(vector.direction),
        edits=vector.edits,
        weights=vector.weights,
        auc=vector.auc,
        positive=vector.positive,
        negative=vector.negative,
    )
    write_json(path, stored.model_dump(mode="json"))
    return path


def read_vectors(directory: Path, partition_sha256: str) -> dict[str, StoredVector]:
    """The stored vectors of a checkpoint by name, sorted. CheckpointError for one that is damaged or was made for
    another partition."""
    return {
        path.stem: _read(path, partition_sha256)
        for path in sorted((directory / VECTORS).glob("*.json"))
        if _NAME.fullmatch(path.stem)
    }


def _read(path: Path, partition_sha256: str) -> StoredVector:
    try:
        found = _VectorFile.model_validate_json(path.read_bytes())
        direction = unpack_f32(found.direction_b64_f32)
        if not len(direction) or not np.isfinite(direction).all():
            raise ValueError("its direction is empty or not finite")
        if found.name != path.stem:
            raise ValueError(f"it names itself {found.name[:64]}")
    except ValidationError as error:
        first = error.errors()[0]
        raise _damaged(path, f"{'.'.join(map(str, first['loc'])) or 'document'}: {first['msg']}") from error
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    check_partition(found.partition_sha256, partition_sha256, f"The vector {found.name} ({path})")
    return StoredVector(
        name=found.name,
        layer=found.layer,
        partition_sha256=found.partition_sha256,
        made=found.made,
        direction=direction,
        edits=found.edits,
        weights=found.weights,
        auc=found.auc,
        positive=found.positive,
        negative=found.negative,
    )


def _damaged(path: Path, reason: str) -> CheckpointError:
    reason = " ".join(reason.split())[:200].rstrip(".")
    return CheckpointError(f"{path} is damaged ({reason}); make the vector again with `elude vector`, or remove it.")
