"""The pages that the explorer serves: the report's, and its own page in the same frame."""

from __future__ import annotations

import secrets
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.offline.report.pages import environment
from elude_runtime.offline.report.report import shell_of, write_report

PAGE = "explore.html"
_PACKAGE, _ASSETS = "elude_runtime.explore", "assets/explore"


def write_pages(checkpoint: Path, folder: Path) -> None:
    """Renders the report and the explorer's page into a folder that is not there yet. EludeError as of
    `write_report`."""
    write_report(checkpoint, folder, explorer=True)
    shell = shell_of(read_manifest(checkpoint), explorer=True)
    shell = replace(shell, styles=("base.css", "parts.css", "forms.css", "explore/explore.css", "explore/steer.css"))
    page = environment(_PACKAGE).get_template(f"{PAGE}.jinja")
    text = page.render(shell=shell, page=PAGE, nonce=secrets.token_urlsafe(16), checkpoint=str(checkpoint))
    (folder / PAGE).write_text(text, encoding="utf-8")
    (folder / _ASSETS).mkdir()
    for item in (files(_PACKAGE) / "assets").iterdir():
        (folder / _ASSETS / item.name).write_bytes(item.read_bytes())
