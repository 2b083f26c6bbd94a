"""Policies: `policies.json`, named interventions beside a checkpoint, bound to its partition."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elude_runtime.checkpoint.manifest import canonical_json
from elude_runtime.checkpoint.packed import pack_f32
from elude_runtime.checkpoint.storage import write_json
from elude_runtime.checkpoint.vectors import StoredVector, check_partition, checked_name
from elude_runtime.errors import CheckpointError, EludeError, did_you_mean

POLICIES = "policies.json"
_FORMAT_VERSION = 1
Document = dict[str, Any]
"""{partition_sha256, description?, edits, vectors, when?, conflict?, strength_multiplier?}: the API's `Policy`."""


def policy_sha256(document: Mapping[str, Any], vectors: Mapping[str, StoredVector]) -> str:
    """SHA-256 over all that a policy does, in canonical form: its document, and layer and numbers of the vectors that
    it names (one that is not there counts for nothing). The identity that an audit line names."""
    named = {vector["name"] for vector in document.get("vectors") or () if "name" in vector}
    contents = {name: [vectors[name].layer, pack_f32(vectors[name].direction)] for name in named if name in vectors}
    return hashlib.sha256(canonical_json({"policy": dict(document), "vectors": contents})).hexdigest()


def read_policies(directory: Path, partition_sha256: str) -> dict[str, Document]:
    """The policies of a checkpoint by name, sorted; none where there is no file. What they do is not looked into.

    CheckpointError for a damaged file, or a policy that was made for another partition.
    """
    stored = _read(directory / POLICIES)
    for name, document in stored.items():
        check_partition(document["partition_sha256"], partition_sha256, f"The policy {name} ({directory / POLICIES})")
    return {name: stored[name] for name in sorted(stored)}


def save_policy(directory: Path, name: str, document: Document) -> bool:
    """Put a policy beside the checkpoint, in the place of one of its name if there is one (then True); the file is
    written whole or not at all.

    EludeError for an impossible name or a document that JSON cannot hold, CheckpointError for a damaged file,
    StorageError for a disk that refuses.
    """
    checked_name(name, "policy")
    _checked(name, document)
    try:
        canonical_json(document)
    except (ValueError, TypeError, RecursionError) as error:
        raise EludeError(f"The policy {name} cannot be stored as JSON: {error}.") from error
    path = directory / POLICIES
    stored = _read(path)
    _write(path, {**stored, name: document})
    return name in stored


def remove_policy(directory: Path, name: str) -> None:
    """Take a policy out of the file. EludeError with the closest names when there is none of that name."""
    path = directory / POLICIES
    stored = _read(path)
    if name not in stored:
        raise unknown_policy(name, stored)
    del stored[name]
    _write(path, stored)


def unknown_policy(name: str, known: Mapping[str, Any]) -> EludeError:
    names = f" There are {', '.join(sorted(known))}." if known else " None is stored; `elude policy set` makes one."
    return EludeError(f"There is no policy {name[:80]!r}.{did_you_mean(name, known) or names}")


def _write(path: Path, policies: dict[str, Document]) -> None:
    write_json(path, {"format_version": _FORMAT_VERSION, "policies": {n: policies[n] for n in sorted(policies)}})


def _read(path: Path) -> dict[str, Document]:
    """The documents by name, whatever partition they were made for."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    try:
        values = json.loads(text, parse_constant=_not_a_number, object_pairs_hook=_unique)
        version, policies = values["format_version"], values["policies"]
        if isinstance(version, int) and version > _FORMAT_VERSION:
            raise CheckpointError(
                f"{path} has format version {version}, this software reads up to {_FORMAT_VERSION}; "
                "install a newer elude-serving."
            )
        if version != _FORMAT_VERSION or not isinstance(policies, dict):
            raise ValueError(f"no policies of format version {_FORMAT_VERSION}")
        for name, document in policies.items():
            checked_name(name, "policy")
            _checked(name, document)
    except CheckpointError:
        raise
    except (ValueError, KeyError, TypeError, RecursionError, EludeError) as error:
        raise _damaged(path, f"lacks {error}" if isinstance(error, KeyError) else str(error)) from error
    return policies


def _checked(name: str, document: Any) -> None:
    if not isinstance(document, dict) or not isinstance(document.get("partition_sha256"), str):
        raise EludeError(f"The policy {name} does not say which partition it was made for (partition_sha256).")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object; of two policies of one name, JSON would silently drop the first."""
    made = dict(pairs)
    if len(made) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)[:60]!r} stands twice in one object")
    return made


def _not_a_number(text: str) -> None:
    raise ValueError(f"{text} is not a number in JSON")


def _damaged(path: Path, reason: str) -> CheckpointError:
    reason = " ".join(reason.split())[:200].rstrip(".")
    return CheckpointError(f"{path} is damaged ({reason}); correct it, or set the policies again with `elude policy`.")
