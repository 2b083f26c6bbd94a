"""The pages that the explorer serves: the report's, and its own page in the same frame."""

from __future__ import annotations

import secrets
from importlib.resources import files
from pathlib import Path

from elude_runtime.checkpoint.manifest import read_manifest

PAGE = "explore.html"
_PACKAGE = "elude_runtime.explore"


def write_pages(checkpoint: Path, folder: Path) -> None:
    """Renders the report and the explorer's page into a folder that is not there yet.

    EludeError as of `write_report`.
    """
    from elude_runtime.offline.report.pages import Shell, copy_assets, environment

    manifest = read_manifest(checkpoint)
    folder.mkdir()
    copy_assets(folder)
    shell = Shell(
        manifest.model.name,
        manifest.checkpoint_sha256,
        "dev",
        connect="'self'",
        styles=("base.css", "parts.css", "explore/explore.css"),
        scripts=("assets/core.js", "assets/pictures.js", "assets/charts.js"),
    )
    page = environment(_PACKAGE).get_template(f"{PAGE}.jinja")
    text = page.render(shell=shell, page=PAGE, nonce=secrets.token_urlsafe(16))
    (folder / PAGE).write_text(text, encoding="utf-8")
    (folder / "index.html").write_text(text, encoding="utf-8")
    own = folder / "assets" / "explore"
    own.mkdir()
    for item in (files(_PACKAGE) / "assets").iterdir():
        (own / item.name).write_bytes(item.read_bytes())
