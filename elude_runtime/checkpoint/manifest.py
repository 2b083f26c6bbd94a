"""`elude.json`, the identity of a checkpoint: what was rewritten, how, and the digests that bind its parts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elude_runtime.errors import CheckpointError

FORMAT_VERSION = 1
MANIFEST = "elude.json"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ModelSource(_Frozen):
    """How the base model is built: timm.create_model(name, **args), or a factory that travels with the checkpoint.

    Disk alone must be enough: what came from a hub is named by its architecture, with all its arguments in args.
    file and function name the factory (`file` inside the checkpoint's `factory/` folder); files maps every carried
    file to its SHA-256.
    """

    kind: Literal["timm", "factory"]
    name: str
    args: dict[str, Any] = Field(default_factory=dict)
    file: str | None = None
    function: str | None = None
    files: dict[str, str] = Field(default_factory=dict)


class TokenTypeEntry(_Frozen):
    """One token type of a layer. live: any token of it can change the output; concepts: how many it has."""

    name: Literal["patches", "cls"]
    live: bool
    concepts: int
    tokens: int  # calibration tokens seen


class AttributionEntry(_Frozen):
    """Median relative completeness error of each method at this layer, measured when the checkpoint was made; `auto`
    is the cheapest method under 0.1, else the most accurate."""

    auto: Literal["gradient", "integrated_gradients"]
    completeness: dict[str, float]
    images: int


class LayerEntry(_Frozen):
    """One split layer. total, prefix, grid: its token layout (design "Token types")."""

    name: str
    kind: Literal["linear", "conv"]
    neurons: int
    inputs: int
    kernel: list[int]
    groups: int
    subunits: int
    total: int
    prefix: int
    grid: list[int] | None
    token_types: list[TokenTypeEntry]
    follows: str
    attribution: AttributionEntry

    @model_validator(mode="after")
    def _token_layout_fits(self) -> Self:
        if not 0 <= self.prefix < self.total or len(self.token_types) != (2 if self.prefix else 1):
            raise ValueError(
                f"{self.prefix} prefix tokens of {self.total} do not fit {len(self.token_types)} token types"
            )
        if self.grid is not None and (len(self.grid) != 2 or self.grid[0] * self.grid[1] != self.total - self.prefix):
            raise ValueError(f"the grid {self.grid} does not hold {self.total - self.prefix} tokens")
        return self


class Calibration(_Frozen):
    """The images statistics were taken from. sha256: over their content hashes (tensor `elude.calibration_images`,
    the first 16 bytes of each image's SHA-256, sorted)."""

    images: int
    sha256: str
    skipped: int = 0


class Manifest(_Frozen):
    """elude.json, format version 1."""

    format_version: Literal[1]
    elude_version: str
    model: ModelSource
    output: Literal["logits", "embedding"]
    data_config: dict[str, Any]
    labels: list[str]
    layers: list[LayerEntry]
    method: dict[str, Any]
    seed: int
    threads: int
    versions: dict[str, str]
    calibration: Calibration
    base_sha256: str
    partition_sha256: str

    def canonical(self) -> bytes:
        """The bytes that `checkpoint_sha256` is taken over: sorted keys, no white space, UTF-8."""
        return canonical_json(self.model_dump(mode="json"))

    @property
    def checkpoint_sha256(self) -> str:
        return hashlib.sha256(self.canonical()).hexdigest()


def canonical_json(value: Any) -> bytes:
    """What digests are taken of. Half a surrogate pair, which JSON and YAML can spell, has its bytes too."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode("utf-8", "surrogatepass")


def read_manifest(checkpoint: Path) -> Manifest:
    """elude.json of a checkpoint directory. CheckpointError if it is none, damaged, or of a newer format."""
    path = checkpoint / MANIFEST
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint} is not a directory; give the checkpoint that `elude rewrite` made.")
    if not path.is_file():
        raise CheckpointError(
            f"{checkpoint} holds no {MANIFEST}, so it is not an ELUDe checkpoint; make one with `elude rewrite`."
        )
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged (not JSON: {error}); make the checkpoint again.") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format version {version}, this software reads up to {FORMAT_VERSION}; "
            "install a newer elude-serving."
        )
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(p) for p in first["loc"]) or "document"
        raise CheckpointError(
            f"{path} is damaged or foreign ({where}: {first['msg']}); make the checkpoint again."
        ) from error
