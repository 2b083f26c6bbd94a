"""The pages of a report: one template each, in one frame, with one nonce."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined

OVERVIEW, FEATURES, FEATURE, CLASSES = "index.html", "features.html", "feature.html", "class.html"
_PACKAGE = "elude_runtime.offline.report"
_ASSETS = "assets"
_AS_SCRIPTS_ENCODE = "/!~*'()"  # left as they are by encodeURIComponent, and the slash, to be read


@dataclass(frozen=True)
class Shell:
    """What stands around every page, here and in the explorer.

    connect: where scripts may send requests (a source of a content security policy); explorer: whether pages link to
    `explore.html`; pages: file and text of the links at the top; styles and scripts: files in `assets/` that every page
    has; note: at the foot.
    """

    model: str
    checkpoint_sha256: str
    made: str
    connect: str = "'none'"
    explorer: bool = False
    pages: tuple[tuple[str, str], ...] = ((OVERVIEW, "Overview"), (FEATURES, "Features"), (CLASSES, "Classes"))
    styles: tuple[str, ...] = ("base.css", "parts.css", "forms.css", "feature.css", "split.css", "pages.css")
    scripts: tuple[str, ...] = ("core.js", "pictures.js", "charts.js", "features.js")
    note: str = "These pages talk to no network."


def environment(*packages: str) -> Environment:
    """Templates of the report, after those of other packages where these are named."""
    made = Environment(
        loader=ChoiceLoader([PackageLoader(name) for name in (*packages, _PACKAGE)]),
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(percent=percent, figure=figure, count=count, day=day)
    return made


def render(shell: Shell, contents: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(file, text) of every page."""
    templates = environment()
    for file in (OVERVIEW, FEATURES, FEATURE, CLASSES):
        nonce = secrets.token_urlsafe(16)
        page = FEATURES if file == FEATURE else file  # where it stands in the navigation
        yield file, templates.get_template(f"{file}.jinja").render(shell=shell, page=page, nonce=nonce, **contents)


def copy_assets(folder: Path) -> None:
    """Styles and scripts into `assets/`."""
    (folder / _ASSETS).mkdir()
    for item in (files(_PACKAGE) / _ASSETS).iterdir():
        if item.is_file():
            (folder / _ASSETS / item.name).write_bytes(item.read_bytes())


def feature_address(name: str) -> str:
    """The page of a feature, relative to the report's folder; scripts have `"feature.html" + Elude.hash(name)`."""
    return f"{FEATURE}#{quote(name, safe=_AS_SCRIPTS_ENCODE)}"


def percent(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if abs(value) >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def figure(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "\u2212")


def count(value: int) -> str:
    return f"{value:,}"


def day(text: str) -> str:
    """An ISO time as a person writes it; anything else as it stands."""
    try:
        time = datetime.fromisoformat(text)
        return f"{time.day} {time:%B %Y, %H:%M} UTC"
    except ValueError:
        return text
