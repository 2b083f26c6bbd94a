"""`verification.json` as it is read beside a checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_checkpoint import certificate, checkpoint

from elude_runtime.checkpoint.certificate import read_certificate
from elude_runtime.checkpoint.manifest import read_manifest


@pytest.mark.parametrize(
    ("content", "state", "sentence"),
    [
        ({}, "holds", "verified 2026-01-02 on 24 images"),
        ({"holds": False}, "fails", "verification FAILED 2026-01-02"),
        ({"sha256": "0" * 64}, "foreign", "belongs to another checkpoint"),
        (None, "missing", "not verified yet"),
        ("{", "damaged", "is damaged"),
        (
            '{"checkpoint_sha256": "SHA", "holds": true, "made": "2026", "images": 1, "checks": [3]}',
            "damaged",
            "damaged",
        ),
        ('{"checkpoint_sha256": "SHA", "holds": true, "made": 3, "images": 1, "checks": []}', "damaged", "is damaged"),
    ],
)
def test_every_state(tmp_path: Path, content: dict[str, object] | str | None, state: str, sentence: str) -> None:
    folder = checkpoint(tmp_path / "ckpt", catalogue=False)
    digest = read_manifest(folder).checkpoint_sha256
    if isinstance(content, dict):
        certificate(folder, **content)  # type: ignore[arg-type]
    elif content is not None:
        (folder / "verification.json").write_text(content.replace("SHA", digest))
    found = read_certificate(folder, digest)
    assert found.state == state and sentence in found.sentence
