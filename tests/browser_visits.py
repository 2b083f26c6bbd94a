"""A real browser for tests: Chromium, driven by Playwright. What a page complains of, or asks of the network, fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import report_checkpoint

from elude_runtime.offline.bench_report import READY, browser, chromium
from elude_runtime.offline.report.report import write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Request

SCREENSHOTS = Path(__file__).parent / "browser" / "screenshots"
OURS = ("file:", "data:", "blob:", "http://127.0.0.1:")
WIDE, NARROW = (1360, 900), (360, 740)


# JavaScript that lists the texts with less contrast than WCAG AA asks for, and buttons and links without a name.
FAINT = """() => {
  const channel = (v) => (v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4);
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const read = (colour, under) => {  // any CSS colour, over an opaque one
    canvas.fillStyle = `rgb(${under})`; canvas.fillRect(0, 0, 1, 1);
    canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data.slice(0, 3)];
  };
  const behind = (node) => {
    const chain = [];
    for (let at = node; at; at = at.parentElement) chain.push(getComputedStyle(at).backgroundColor);
    return chain.reverse().reduce((under, colour) => read(colour, under), [255, 255, 255]);
  };
  const faint = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    if (node.closest('svg, script, noscript, :disabled')) continue;
    const under = behind(node);
    const [a, b] = [light(under), light(read(getComputedStyle(node).color, under))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) faint.push(`${walker.currentNode.textContent.trim().slice(0, 40)}: ${ratio.toFixed(2)}`);
  }
  return [...new Set(faint)];
}"""
UNNAMED = """(nodes) => nodes
  .filter((n) => ![n.textContent, n.getAttribute('aria-label'), n.querySelector('img')?.alt].some((t) => t && t.trim()))
  .map((n) => n.outerHTML.slice(0, 200))"""


@dataclass
class Visits:
    """Opens pages and keeps what they complained of. problems: of all pages; expected: texts of complaints that a test
    provokes."""

    browser: Browser
    problems: list[str] = field(default_factory=list)
    expected: list[str] = field(default_factory=list)

    def open(self, address: str, *, size: tuple[int, int] = WIDE, theme: str = "light", **settings: Any) -> Page:
        """A page in a browser context of its own, when it shows what its address asks for."""
        width, height = size
        context = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=theme, reduced_motion="reduce", **settings
        )  # type: ignore[arg-type]
        page = context.new_page()
        page.set_default_timeout(10_000)
        page.on("console", self._said)
        page.on("pageerror", lambda error: self.problems.append(f"error: {error}"))
        page.on("request", self._asked)
        return self.turn(page, address)

    def turn(self, page: Page, address: str) -> Page:
        """Another address in the same page, which is cheaper than a page of its own."""
        if page.url != "about:blank":
            page.goto("about:blank")  # otherwise another part after # would load nothing
        page.goto(address)
        page.wait_for_selector(READY, state="attached")
        return page

    def keep(self, page: Page, name: str) -> None:
        """A picture of the whole page in `screenshots/`, to look at; its name says theme and width."""
        SCREENSHOTS.mkdir(exist_ok=True)
        width = "wide" if page.viewport_size == dict(zip(("width", "height"), WIDE, strict=True)) else "narrow"
        theme = page.get_attribute("html", "data-theme")
        page.screenshot(path=SCREENSHOTS / f"{name}-{theme}-{width}.png", full_page=True)

    def _said(self, message: ConsoleMessage) -> None:
        known = any(text in message.text for text in self.expected)
        if message.type in ("error", "warning") and not known:
            self.problems.append(f"console: {message.text}")

    def _asked(self, request: Request) -> None:
        if not request.url.startswith(OURS):
            self.problems.append(f"a request left the machine: {request.url}")


@pytest.fixture(scope="module")
def chrome() -> Iterator[Browser]:
    """One browser a test module; Playwright's event loop must be gone before other modules use theirs."""
    pytest.importorskip("playwright", reason="playwright is not installed (pip install '.[dev]')")
    if chromium() is None:
        pytest.skip("no Chromium on this machine (Debian or Ubuntu: sudo apt-get install chromium)")
    with browser() as started:
        yield started


@pytest.fixture
def visits(chrome: Browser) -> Iterator[Visits]:
    """Pages of one test. Fails it where a page wrote an error to its console or asked another machine for something."""
    made = Visits(chrome)
    yield made
    for context in chrome.contexts:
        context.close()
    assert not made.problems, made.problems  # spelled out: asserts of this module are not rewritten by pytest


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`reports(name, **changes)`: the address of the folder of a report of a generated checkpoint, made once a name.

    prepare: called with the checkpoint's folder before the report is made; catalogue: False for a checkpoint without.
    """
    made: dict[str, str] = {}

    def address(name: str, *, prepare: Callable[[Path], object] = lambda folder: None, catalogue: bool = True,
                **changes: Any) -> str:  # fmt: skip
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            checkpoint = report_checkpoint.checkpoint(
                folder / "ckpt", report_checkpoint.Made(**changes), catalogue=catalogue
            )
            prepare(checkpoint)
            write_report(checkpoint, folder / "report")
            made[name] = f"file://{folder / 'report'}"
        return made[name]

    return address
