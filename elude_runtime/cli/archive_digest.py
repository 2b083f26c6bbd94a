"""Digests of whole model archives: what a checkpoint's own digests leave out, the code above all, is in these."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from elude_runtime.errors import EludeError

_EXPECTED = re.compile(r"([^/=]+\.mar)=([0-9a-f]{64})")


def archive_sha256(path: Path) -> str:
    """SHA-256 of the file, as `sha256sum` gives it."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_expected(texts: Iterable[str]) -> dict[str, str]:
    """`FILE.mar=SHA256` texts as digests by file name. EludeError for what is not that."""
    found = {}
    for text in texts:
        parts = _EXPECTED.fullmatch(text)
        if parts is None:
            raise EludeError(f"--expect takes FILE.mar=SHA256 as `elude archive` prints it, not {text[:120]!r}.")
        found[parts[1]] = parts[2]
    return found


def check_archives(store: Path, files: Iterable[str], expected: dict[str, str]) -> None:
    """EludeError where an archive that is to be served is not the expected one, or nothing is expected of it though
    something is expected of others. Nothing is checked where `expected` is empty."""
    if not expected:
        return
    for name in files:
        if name not in expected:
            raise EludeError(f"Nothing was said of {name}; add --expect {name}=SHA256, or leave it out.")
        found = archive_sha256(store / name)
        if found != expected[name]:
            raise EludeError(
                f"{store / name} has the digest {found[:12]}…, expected was {expected[name][:12]}…; "
                "it was changed or is another one: put the right archive there."
            )
