"""What a report costs its reader: size, time until pages can be used, and time of a keystroke in the search.

Measured in a headless Chromium that is driven by Playwright, which only this and the tests need.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from elude_runtime.errors import EludeError
from elude_runtime.offline.report.data import write_data
from elude_runtime.offline.report.pages import CLASSES, FEATURE, FEATURES, OVERVIEW
from elude_runtime.offline.report.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

READY = "html[data-ready]"  # a page that shows what its address asks for
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_QUERIES = ("striped fur", "blocks", "p17", "12/p3", "zzz nothing like it")
# From the event until its changes are on the screen: the frame after the one that was asked for.
_KEYSTROKE = """async (text) => {
  const field = document.querySelector('#q');
  const started = performance.now();
  field.value = text;
  field.dispatchEvent(new Event('input', {bubbles: true}));
  const handled = performance.now() - started;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done, 0)));
  return [handled, performance.now() - started];
}"""


def chromium() -> str | None:
    """The command of a Chromium on this machine; None where there is none."""
    return next((found for name in _BROWSERS if (found := shutil.which(name))), None)


@contextmanager
def browser() -> Iterator[Browser]:
    """A headless Chromium. EludeError where it or Playwright is missing."""
    command = chromium()
    if importlib.util.find_spec("playwright") is None:
        raise EludeError("Driving a browser needs the package playwright: pip install playwright.")
    if command is None:
        raise EludeError("There is no Chromium on this machine; Debian or Ubuntu: sudo apt-get install chromium.")
    from playwright.sync_api import sync_playwright

    # root, as in containers, cannot have the sandbox
    arguments = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=command, args=arguments)
        try:
            yield started
        finally:
            started.close()


def measure_report(
    checkpoint: Path, features: int, rounds: int, progress: Callable[[str, int, int | None], None] = lambda *_: None
) -> dict[str, Any]:
    """Make a report, open its pages, and type into a gallery of at least `features` features (the checkpoint's own,
    repeated under other names and labels). Times in milliseconds, medians and largest."""
    with tempfile.TemporaryDirectory(prefix="elude-bench-") as folder, browser() as chrome:
        report = Path(folder) / "report"
        started = time.perf_counter()
        made = write_report(checkpoint, report, progress=progress)
        found: dict[str, Any] = {
            "seconds_to_write": round(time.perf_counter() - started, 2), "megabytes": round(made.megabytes, 2),
            "features": made.features, "images": made.images, "browser": chrome.version,
        }  # fmt: skip
        index = _data(report / "data" / "features.js")
        first = f"{index['layers'][0]['name']}/{index['short'][0]}"
        pages = {
            OVERVIEW: OVERVIEW,
            FEATURES: FEATURES,
            "feature page": f"{FEATURE}#{first}",
            "class page": f"{CLASSES}#0",
        }
        found["pages_ms"] = {name: _opening(chrome, report, address, rounds) for name, address in pages.items()}
        enlarged = _enlarged(index, features)
        write_data(report, "features", enlarged)
        found["gallery"] = {
            "features": len(enlarged["short"]), "opening_ms": _opening(chrome, report, FEATURES, rounds),
            "keystroke_ms": _typing(chrome, report, rounds),
        }  # fmt: skip
    return found


def _opening(chrome: Browser, report: Path, address: str, rounds: int) -> dict[str, float]:
    """From asking for a page until everything that it shows at first is there, in a fresh browser context."""
    times = []
    for _ in range(rounds):
        with _page(chrome) as page:
            page.goto(f"file://{report / address}", wait_until="commit")
            page.wait_for_selector(READY, state="attached")
            times.append(page.evaluate("performance.getEntriesByName('ready')[0].startTime"))
    return {"median": round(statistics.median(times), 1), "largest": round(max(times), 1)}


def _typing(chrome: Browser, report: Path, rounds: int) -> dict[str, float]:
    with _page(chrome) as page:
        page.goto(f"file://{report / FEATURES}#kind=")
        page.wait_for_selector(READY, state="attached")
        prefixes = [query[:n] for query in _QUERIES for n in range(1, len(query) + 1)]
        times = [page.evaluate(_KEYSTROKE, text) for text in prefixes * rounds]
    handled, shown = ([t[i] for t in times] for i in range(2))
    return {
        "script_median": round(statistics.median(handled), 1), "script_largest": round(max(handled), 1),
        "shown_median": round(statistics.median(shown), 1), "shown_largest": round(max(shown), 1),
        "keystrokes": len(times),
    }  # fmt: skip


@contextmanager
def _page(chrome: Browser) -> Iterator[Page]:
    context = chrome.new_context(viewport={"width": 1360, "height": 900})
    try:
        yield context.new_page()
    finally:
        context.close()


def _data(file: Path) -> dict[str, Any]:
    """What a data script assigns."""
    return json.loads(file.read_text("ascii").split("]=", 1)[1].rstrip(";\n"))


def _enlarged(index: dict[str, Any], count: int) -> dict[str, Any]:
    """The index with its features repeated until there are `count`: other names, labels that are told apart."""
    own = len(index["short"])
    copies = -(-count // own)
    columns = ("layer", "concept", "sign", "size", "share", "std", "density", "stability", "cards", "peaks")
    texts = [index["label"]["values"][code] for code in index["label"]["codes"]]
    labels = [
        f"{text or 'striped fur'} {row} {copy}" if copy else text
        for copy in range(copies)
        for row, text in enumerate(texts)
    ]
    return {
        **index,
        **{name: index[name] * copies for name in columns if index[name] is not None},
        "short": [_renamed(short, copy) for copy in range(copies) for short in index["short"]],
        "label": {"values": labels, "codes": list(range(own * copies))},
        "source": {**index["source"], "codes": index["source"]["codes"] * copies},
    }  # fmt: skip


def _renamed(short: str, copy: int) -> str:
    """`P3` or `12/p3` with a number of its own in each copy."""
    head, slash, tail = short.partition("/")
    return f"{head}{copy or ''}{slash}{tail}"
