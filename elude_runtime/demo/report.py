"""The demo's page: what was proven, what carried the decision, and what switching it off did. One file, no network."""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from PIL import Image

from elude_runtime.checkpoint.storage import write_file
from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS
from elude_runtime.demo.run import Story

REPORT = "report.html"


def write_report(story: Story) -> Path:
    """Write `report.html` into the demo's folder; returns its path."""
    environment = Environment(
        loader=PackageLoader("elude_runtime.demo", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["picture"] = _picture
    suspicious = CLASSES[WATERMARK_CLASS]
    groups = [
        (name, marked, story.before[(name, marked)], story.after[(name, marked)])
        for marked in (True, False)
        for name in CLASSES
        if (name, marked) in story.before
    ]
    page = environment.get_template("report.html.jinja").render(story=story, suspicious=suspicious, groups=groups)
    path = story.out / REPORT
    write_file(path, page.encode())
    return path


def _picture(image: Image.Image) -> str:
    """A picture as a data address, enlarged without blurring its 64 pixels away."""
    data = io.BytesIO()
    image.resize((128, 128), Image.Resampling.LANCZOS).save(data, "WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
