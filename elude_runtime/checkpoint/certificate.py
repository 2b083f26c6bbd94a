"""`verification.json`, the certificate beside a checkpoint, as others than `elude verify` read it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

VERIFICATION = "verification.json"


@dataclass(frozen=True)
class Certificate:
    """state: what is known; document: the certificate's own content, where it is of this checkpoint."""

    state: Literal["holds", "fails", "missing", "foreign", "damaged"]
    document: dict[str, Any] = field(default_factory=dict)

    @property
    def undone(self) -> int:
        """How many checks could not be made."""
        return sum(check["holds"] is None for check in self.document.get("checks", ()))

    @property
    def sentence(self) -> str:
        """In a few words, for a line about the checkpoint."""
        if self.state == "holds":
            return f"verified {self.document['made'][:10]} on {self.document['images']} images"
        return {
            "fails": f"verification FAILED {str(self.document.get('made'))[:10]}",
            "missing": "not verified yet (elude verify)",
            "foreign": f"{VERIFICATION} belongs to another checkpoint",
            "damaged": f"{VERIFICATION} is damaged",
        }[self.state]


def read_certificate(checkpoint: Path, checkpoint_sha256: str) -> Certificate:
    """The certificate of the checkpoint with this digest, whatever state it is in."""
    try:
        document = json.loads((checkpoint / VERIFICATION).read_text(encoding="utf-8"))
        if document["checkpoint_sha256"] != checkpoint_sha256:
            return Certificate("foreign")
        sound = isinstance(document["made"], str) and isinstance(document["images"], int)
        if not sound or not all(_is_check(c) for c in document["checks"]):
            return Certificate("damaged")
        return Certificate("holds" if document["holds"] else "fails", document)
    except FileNotFoundError:
        return Certificate("missing")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return Certificate("damaged")


def _is_check(check: Any) -> bool:
    return check["holds"] in (True, False, None) and isinstance(check["name"], str) and isinstance(check["detail"], str)
