"""The report's pages in a real browser, opened from files: what they show, say and do."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser_visits import FAINT, NARROW, UNNAMED, WIDE, Visits
from report_checkpoint import HOSTILE, LAYER, certificate, evaluation, relabelled

from elude_runtime.checkpoint.catalogue import read_catalogue

if TYPE_CHECKING:
    from playwright.sync_api import Page

MINUS = "\u2212"
Reports = Callable[..., str]
SUBUNIT = f"{LAYER}/2/p1"
ADDRESSES = {
    "overview": "index.html",
    "gallery": "features.html",
    "concept": f"feature.html#{LAYER}/P1",
    "subunit": f"feature.html#{SUBUNIT}",
    "neuron": f"feature.html#{LAYER}/y2",
    "dead": f"feature.html#{LAYER}/Prest",
    "class": "class.html#1",
}


def prepared(folder: Path) -> None:
    """Everything there is beside a checkpoint, and names that try to be more than text."""
    certificate(folder)
    evaluation(folder)
    relabelled(folder, {f"{LAYER}/P0": HOSTILE, f"{LAYER}/P1": "Streifen, quer", f"{LAYER}/2/p1": "a user's own"})


@pytest.fixture
def full(reports: Reports) -> str:
    return reports("full", prepare=prepared)


def texts(page: Page, selector: str) -> list[str]:
    return [text.strip() for text in page.locator(selector).all_inner_texts()]


def names_shown(page: Page) -> list[str]:
    """The features of the gallery's page, by the addresses of their cards."""
    links = page.locator("#cards a.feature").evaluate_all("links => links.map(a => a.getAttribute('href'))")
    return [link.split("#", 1)[1] for link in links]


@pytest.mark.parametrize("name", ADDRESSES)
@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_every_page_can_be_read(visits: Visits, full: str, name: str, size: tuple[int, int]) -> None:
    """It fits the screen, everything has a name, and text stands out. Leaves pictures of it in `screenshots/`."""
    page = visits.open(f"{full}/{ADDRESSES[name]}", size=size)
    page.evaluate("() => { for (const img of document.images) img.loading = 'eager'; }")
    page.wait_for_function("() => [...document.images].every((img) => img.complete)")
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_selector(f"html[data-theme={theme}]", state="attached")
        visits.keep(page, name)
        assert page.evaluate(FAINT) == [], theme  # less than 4.5 to 1 against what is behind it (WCAG AA)
    wider = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0
    assert page.locator("h1").count() == 1 and page.title()
    assert page.locator("main, header, footer, nav").count() >= 4
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("button, a[href]").evaluate_all(UNNAMED) == []


def test_the_certificate(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/index.html")
    assert "No check failed, 1 could not be made" in page.inner_text(".certificate")
    assert "not one prediction of 24 images changed" in page.inner_text(".lead")
    marks = page.locator(".checks svg").evaluate_all("marks => marks.map(m => m.getAttribute('aria-label'))")
    assert marks == ["holds", "holds", "not checked"]
    assert "b" * 64 in page.inner_text(".digests")


def test_the_evaluation(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/index.html")
    assert "concepts are clearer" in page.inner_text(".statement")
    assert texts(page, "tr.own th") == ["concepts"]
    assert page.locator(".plots img").evaluate("img => img.naturalWidth") > 0


def test_the_gallery_shows_live_concepts_by_share(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html")
    shown = names_shown(page)
    assert len(shown) == 12 and f"{LAYER}/Prest" not in shown and all(re.search(r"/[PC]\d+$", n) for n in shown)
    shares = [float(t.replace(" %", "")) for t in texts(page, "#cards .share")]
    assert shares == sorted(shares, reverse=True)
    assert page.locator("#cards img").first.evaluate("img => img.naturalWidth") > 0


def test_filters_and_order_are_kept_in_the_address(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html")
    page.get_by_role("radio", name="Sub-units").check()
    page.select_option("select[name=tokens]", "cls")
    page.select_option("select[name=alive]", "dead")
    page.select_option("select[name=sort]", "name")
    dead = [f"{LAYER}/{k}/crest" for k in range(8)]
    assert names_shown(page) == dead
    page.wait_for_function("() => location.hash.includes('sort=name')")
    assert names_shown(visits.turn(page, page.url)) == dead  # a link to the same view
    page.select_option("select[name=alive]", "live")
    page.select_option("select[name=labelled]", "no")
    assert page.locator("#cards a").count() > 0 and page.locator("#cards .meta .mono").count() == 0
    page.get_by_role("radio", name="Both").check()
    page.select_option("select[name=tokens]", "")
    page.select_option("select[name=labelled]", "user")
    assert set(names_shown(page)) == {f"{LAYER}/P0", f"{LAYER}/P1", f"{LAYER}/2/p1"}


def test_pages_of_the_gallery(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html#kind=")
    first = names_shown(page)
    page.wait_for_function("() => document.querySelectorAll('#cards li').length === 48")
    page.get_by_role("button", name="Next").click()
    page.wait_for_function("() => location.hash.includes('page=2')")
    assert not set(names_shown(page)) & set(first)
    assert page.evaluate("() => document.activeElement.matches('#cards a')")


def test_nothing_found_offers_a_way_back(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html#q=zzzzzzzz&labelled=no")
    assert "Nothing fits" in page.inner_text("#cards")
    page.get_by_role("button", name="Clear the filters").click()
    assert len(names_shown(page)) == 12


def test_search_is_the_services_search(visits: Visits, reports: Reports) -> None:
    """The same features in the same order as `FeatureCatalogue.search`, whatever is asked for."""

    def odd(folder: Path) -> None:
        names = ("fur", "fur, striped", "striped fur", "unfurred", "Straße (nass)", "ÄRMEL", "a.b*c", "x_fur")
        labels = {f"{LAYER}/{k}/p{k % 4}": name for k, name in enumerate(names)}
        relabelled(folder, {**labels, f"{LAYER}/C2": "👍 thumb"})

    report = reports("search", prepare=odd)
    page = visits.open(f"{report}/features.html")
    catalogue = read_catalogue(Path(report.removeprefix("file://")).parent / "ckpt")
    known = [f.feature for f in catalogue.search(limit=10**6)[0]]
    labels = sorted({f.label for f in catalogue.search(limit=10**6)[0] if f.label})
    rng = random.Random(0)
    pieces = [t[a : a + rng.randint(1, 9)] for t in rng.choices(labels + known, k=60) for a in [rng.randrange(len(t))]]
    wrong = [
        "stripd fur",
        "wheals",
        "p1l",
        "fethers gras",
        "zzz",
        "blocks",
        "  FUR ",
        "p1",
        "2/p1",
        "b*",
        "(",
        "_fur",
        "👍",
        "",
    ]
    queries = pieces + wrong + known[:20] + labels
    script = """(queries) => {
      const { features, search } = Elude.gallery;
      const rows = Array.from({ length: features.count }, (_, row) => row);
      return queries.map((query) => search.find(query, rows).map((row) => features.names[row]));
    }"""
    for query, found in zip(queries, page.evaluate(script, queries), strict=True):
        expected = [f.feature for f in catalogue.search(query, limit=10**6)[0]]
        if query.strip():
            assert found == expected, query


def test_typing_searches(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html")
    page.keyboard.press("/")
    page.keyboard.type("streifen")
    assert names_shown(page) == [f"{LAYER}/P1"]
    assert "1 features" in page.inner_text("#summary")


def test_an_older_address_does_not_undo_what_is_typed(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html#q=qu")
    typed = """() => {
      Elude.gallery.change();
      Elude.gallery.keep();
      const field = document.querySelector('#q');
      for (const text of ['quer', 'streifen']) {
        field.value = text;
        field.dispatchEvent(new Event('input', {bubbles: true}));
        if (text === 'quer') Elude.gallery.keep();
      }
    }"""
    page.evaluate(typed)
    page.wait_for_function("() => location.hash === '#q=streifen'")
    assert page.input_value("#q") == "streifen"
    page.evaluate("() => { location.hash = '#q=quer'; }")  # as by a link, or a step back
    page.wait_for_function("() => document.querySelector('#q').value === 'quer'")


def test_jumping_from_another_page_searches(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/index.html")
    page.keyboard.press("/")
    page.keyboard.type("quer")
    page.keyboard.press("Enter")
    page.wait_for_selector("#cards a")
    assert names_shown(page) == [f"{LAYER}/P1"]


def test_keys_walk_through_the_gallery(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html")
    cards = page.locator("#cards a.feature")
    cards.first.focus()
    focused = "() => [...document.querySelectorAll('#cards a')].indexOf(document.activeElement)"
    page.keyboard.press("ArrowRight")
    assert page.evaluate(focused) == 1
    page.keyboard.press("ArrowDown")
    assert page.evaluate(focused) == 1 + 4
    page.keyboard.press("Home")
    assert page.evaluate(focused) == 0
    page.keyboard.press("Enter")
    page.wait_for_selector("html[data-ready] .feature-head")


def test_the_first_key_skips_to_the_content(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/index.html")
    page.keyboard.press("Tab")
    link = page.locator(":focus")
    assert link.inner_text() == "Skip to the content" and (link.bounding_box() or {})["y"] >= 0
    page.keyboard.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"


def test_every_control_is_reached_by_tab_and_shows_it(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/features.html")
    seen = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        style = page.evaluate(
            "() => { const e = document.activeElement; const s = getComputedStyle(e.matches('[type=radio]') ? "
            "e.nextElementSibling : e); return [e.id || e.name || e.className, s.outlineStyle]; }"
        )
        assert style[1] != "none", style
        seen.add(style[0])
    assert {"theme", "q", "kind", "tokens", "alive", "labelled", "sort"} <= seen


def test_a_concept_s_page(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/feature.html#{LAYER}/P1")
    assert page.inner_text("h1") == "Streifen, quer"
    assert page.locator(".end.positive-end .tile").count() == 9 == page.locator(".end.negative-end .tile").count()
    headings = texts(page, "h2")
    assert (
        headings[0] == "Exemplars" and "What it is made of" in headings and "Classes it raises and lowers" in headings
    )
    assert page.locator(".end canvas").count() == 18  # a heatmap each
    for view, canvases, spots in (("Whole", 0, True), ("Part", 0, False), ("Heat", 18, True)):
        page.get_by_role("radio", name=view).check()
        assert page.locator(".end canvas").count() == canvases
        assert (page.locator(".end .spot").count() > 0) is spots


def test_heat_has_the_sign_s_colours(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/feature.html#{LAYER}/P1")
    strongest = """(canvas) => {
      const { data } = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height);
      let best = 0;
      for (let i = 0; i < data.length; i += 4) if (data[i + 3] > data[best + 3]) best = i;
      return [...data.slice(best, best + 4), canvas.width, canvas.height];
    }"""
    for end, red in (("positive", True), ("negative", False)):
        *colour, width, height = page.locator(f".end.{end}-end canvas").first.evaluate(strongest)
        assert (colour[0] > colour[2]) is red and colour[3] > 60 and (width, height) == (4, 4)


def test_a_sub_unit_beside_its_neuron_and_concepts(visits: Visits, full: str) -> None:
    """The picture of the method: one neuron, all its live sub-units, the concept of each, and curves between them."""
    page = visits.open(f"{full}/feature.html#{SUBUNIT}")
    assert page.inner_text("h1") == "a user's own"
    assert page.locator(".split-neuron .picture").count() == 18
    assert page.locator("[data-subunit]").count() == 4
    joined = page.locator("[data-joined]").count()
    assert 1 <= joined <= 4
    assert page.locator(".split-lines path").count() == 8
    page.locator("[data-subunit]").first.hover()
    marked = page.locator(".split-neuron .pointed .mark")
    row = page.locator("[data-subunit]").first.get_attribute("data-subunit")
    assert {mark.get_attribute("data-of") for mark in marked.all()} <= {row}
    assert page.locator(".split-neuron .mark").count() > 4  # some of 24 images are among each sub-unit's nine
    assert page.locator(".split-box.current").count() == 1
    page.locator("[data-joined]").first.click()
    page.wait_for_function(f"() => document.documentElement.dataset.ready !== {json.dumps(SUBUNIT)}")
    assert re.search(r"/P\d+$", page.url)
    assert page.locator(".split-box.current[data-joined]").count() == 1


def test_inputs_have_faces(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/feature.html#{SUBUNIT}")
    assert page.locator(".input").count() == 8 and page.locator(".input .picture img").count() == 32


def test_an_exemplar_opens_large(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/feature.html#{LAYER}/P1")
    page.locator(".end .tile").first.click()
    dialog = page.locator("dialog.large")
    first = dialog.locator("h3").inner_text()
    assert dialog.locator(".picture").count() == 2 and dialog.locator(".bars a").count() == 3
    page.keyboard.press("ArrowRight")
    assert dialog.locator("h3").inner_text() != first
    page.keyboard.press("Escape")
    assert page.locator("dialog").count() == 0
    assert page.evaluate("() => document.activeElement.matches('.tile')")  # focus is where it was


def test_a_class_s_page(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/class.html#1")
    assert page.inner_text("h1") == "tiger shark"
    for heading, sign in (("Raised by", "+"), ("Lowered by", MINUS)):
        section = page.locator("section", has=page.get_by_role("heading", name=heading))
        values = [t[0] for t in section.locator(".value").all_inner_texts()]
        assert len(values) > 2 and set(values) == {sign}
    assert page.locator("figure.tile img").count() > 0
    page.fill("#class-search", "tabb")
    assert texts(page, "#class-list li:visible") == ["tabby\n0"]
    page.locator("#class-list a:visible").click()
    page.wait_for_selector("html[data-ready='0']")
    assert page.inner_text("h1") == "tabby"


def test_text_stays_text(visits: Visits, full: str) -> None:
    """Labels, file names and class names that look like markup are shown as they are, on every page."""
    page = visits.open(f"{full}/index.html")
    for address in ("features.html#kind=", "class.html#2", f"feature.html#{LAYER}/P0"):
        assert page.evaluate("() => window.hacked") is None
        assert page.locator("img[src='x'], main script").count() == 0
        visits.turn(page, f"{full}/{address}")
        assert HOSTILE in page.inner_text("main")
    assert page.inner_text("h1") == HOSTILE and page.evaluate("() => window.hacked") is None


def test_the_policy_allows_no_script_of_others(visits: Visits, full: str) -> None:
    visits.expected += ["Content Security Policy"]
    page = visits.open(f"{full}/index.html")
    page.evaluate(
        """() => {
          const script = document.createElement('script');
          script.textContent = 'window.hacked = 1';
          document.body.append(script);
          document.body.insertAdjacentHTML('beforeend', '<b onclick="window.hacked = 1">x</b>');
          document.querySelector('b[onclick]').click();
        }"""
    )
    asked = "() => fetch('http://127.0.0.1:9/').then(() => 'sent', () => 'refused')"
    assert page.evaluate("() => window.hacked") is None and page.evaluate(asked) == "refused"


def test_the_theme_is_kept_between_pages(visits: Visits, full: str) -> None:
    page = visits.open(f"{full}/index.html", theme="light")
    assert page.get_attribute("html", "data-theme") == "light"
    page.click("#theme")
    page.get_by_role("link", name="Features", exact=True).click()
    page.wait_for_selector("#cards a")
    assert page.get_attribute("html", "data-theme") == "dark"


def test_the_theme_is_kept_without_storage(visits: Visits, full: str) -> None:
    context = visits.browser.new_context(color_scheme="light")
    context.add_init_script("Object.defineProperty(window, 'localStorage', {get() { throw new Error('none'); }})")
    page = context.new_page()
    page.goto(f"{full}/index.html")
    page.click("#theme")
    page.get_by_role("link", name="Features", exact=True).click()
    page.wait_for_selector("#cards a")
    assert page.get_attribute("html", "data-theme") == "dark"
    page.locator("#cards a").first.click()
    page.wait_for_selector("html[data-ready] .feature-head")
    assert page.get_attribute("html", "data-theme") == "dark" and "#" in page.url
