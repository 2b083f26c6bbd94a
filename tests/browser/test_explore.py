"""The explorer in a real browser, against a live TorchServe with the demo network: looking, steering, every state."""

from __future__ import annotations

import asyncio
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from browser_visits import FAINT, NARROW, UNNAMED, WIDE, Visits
from PIL import Image
from report_checkpoint import HOSTILE
from support import VIT_ARGS, VIT_DATA, input_tensor, tiny_vit

pytest.importorskip("ts", reason="TorchServe is not installed (pip install '.[dev]')")
import elude_runtime as elude
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.checkpoint.policies import read_policies
from elude_runtime.cli.archive import build_archive
from elude_runtime.cli.server_process import require_programs
from elude_runtime.cli.torchserve import Server
from elude_runtime.client import Client
from elude_runtime.demo.images import make_set, write_folder
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo
from elude_runtime.errors import EludeError
from elude_runtime.explore.app import Explorer, new_secret
from elude_runtime.explore.listen import in_background
from elude_runtime.explore.material import Material
from elude_runtime.explore.pages import write_pages
from elude_runtime.explore.served import ServedModel
from elude_runtime.offline.catalogue.run import make_catalogue
from elude_runtime.offline.feature_table import labelled, read_table, replace_table

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

LAYER = "blocks.1.mlp.fc2"
MINUS = "\u2212"
PICTURES = 60
pytestmark = pytest.mark.server


class Wire(httpx.AsyncHTTPTransport):
    """The explorer's way to the server, which a test can cut, slow down, or let answer otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.down = False
        self.delay = 0.0
        self.answers: list[httpx.Response] = []  # given instead, first come, first served
        self.asked = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.asked += 1
        if self.down:
            raise httpx.ConnectError("refused", request=request)
        if self.answers:
            return self.answers.pop(0)
        if self.delay:
            await asyncio.sleep(self.delay)
        return await super().handle_async_request(request)


@dataclass(frozen=True)
class Live:
    """The demo's checkpoint with its catalogue, and one without classes, both served by one TorchServe."""

    folder: Path
    checkpoint: Path
    headless: Path
    server: Server

    @property
    def image(self) -> Path:
        return sorted((self.folder / "images").glob("*.png"))[0]

    def client(self, model: str = "demo") -> Client:
        return Client(self.server.url, model, token=self.server.token(), timeout=60)


@dataclass(frozen=True)
class Opened:
    """An explorer that runs. address: with its secret."""

    address: str
    wire: Wire
    checkpoint: Path

    def page(self, name: str) -> str:
        return self.address.replace("/?", f"/{name}?", 1)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    try:
        require_programs()
    except EludeError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("live")
    model, config = load_demo_model()
    write_folder(folder / "images", make_set(PICTURES, seed=1, split="train"))
    rewrite_demo(model, config, folder / "images", folder / "ckpt")
    make_catalogue(folder / "ckpt", folder / "images", workers=0)
    table = read_table(folder / "ckpt")
    replace_table(folder / "ckpt", labelled(table, {f"{LAYER}/P0": HOSTILE}))
    arguments = {**VIT_ARGS, "num_classes": 0, "depth": 2}
    elude.rewrite(
        tiny_vit(num_classes=0, depth=2), input_tensor(VIT_DATA, 8, 0), out=folder / "headless", subunits=2, concepts=3,
        tokens=12, data_config=VIT_DATA, model_args=arguments,
    )  # fmt: skip
    build_archive(folder / "ckpt", folder / "store", name="demo")
    build_archive(folder / "headless", folder / "store", name="headless")
    with Server(folder / "store", environment={"ELUDE_THREADS": "1", "OMP_NUM_THREADS": "1"}) as server:
        server.wait_ready(180)
        yield Live(folder, folder / "ckpt", folder / "headless", server)


@pytest.fixture
def explore(live: Live, chrome: Browser, tmp_path: Path) -> Iterator[Callable[..., Opened]]:
    """`explore(model="demo", checkpoint=…)`: an explorer of a served model."""
    with ExitStack() as stack:

        def start(model: str = "demo", checkpoint: Path = live.checkpoint) -> Opened:
            pages, wire = tmp_path / f"pages-{model}-{checkpoint.name}", Wire()
            write_pages(checkpoint, pages)
            material = Material(checkpoint)
            served = ServedModel(
                live.server.url, model, material.manifest.checkpoint_sha256, token=live.server.token(), transport=wire
            )
            explorer = Explorer(served, material, pages, new_secret())
            address = stack.enter_context(in_background(explorer.app()))
            return Opened(f"{address}/?key={explorer.secret}", wire, checkpoint)

        yield start
        for context in chrome.contexts:  # a page that outlives its explorer complains that it is refused
            context.close()


@pytest.fixture
def opened(explore: Callable[..., Opened]) -> Opened:
    return explore()


# --- what a user does -------------------------------------------------------------------------------------------------


def choose(page: Page, image: Path) -> None:
    """An image from the disk, and wait for its features."""
    page.set_input_files("#choose", image)
    page.wait_for_selector("#answer li, #answer .headline")
    page.wait_for_selector(".feature")


def transfer(page: Page, image: Path) -> Any:
    """What a drop or the clipboard hands over."""
    return page.evaluate_handle(
        """([bytes, name]) => {
          const transfer = new DataTransfer();
          transfer.items.add(new File([Uint8Array.from(bytes)], name, {type: 'image/png'}));
          return transfer;
        }""",
        [list(image.read_bytes()), image.name],
    )


def answered(page: Page, act: Callable[[], object]) -> dict[str, Any]:
    """The reply to the question that an act asks, when the page shows it."""
    with page.expect_response(lambda response: response.url.endswith("/api/ask")) as waiting:
        act()
    reply: dict[str, Any] = waiting.value.json()
    page.wait_for_function("() => !document.querySelector('#answer.busy')")
    return reply


def slider(page: Page, feature: str) -> Any:
    return page.locator(f'[data-feature="{feature}"] input[type=range]')


def content(reply: dict[str, Any]) -> dict[str, Any]:
    """Without what differs from one request to the next."""
    return {name: value for name, value in reply.items() if name not in ("id", "timing_ms", "batch_size")}


def shares(page: Page, which: str) -> dict[str, str]:
    """{class: percentage} as the page shows them; which: before or after."""
    rows = page.locator("#answer li[data-class]")
    return {
        row.locator(".class-name").inner_text(): row.locator(f".two-values .{which}").inner_text() for row in rows.all()
    }


def percent(probability: float) -> str:
    return "< 0.1 %" if 0 < probability < 0.0005 else f"{100 * probability:.1f} %"


def notice(page: Page) -> str:
    page.wait_for_selector(".notice")
    return page.locator("#notices").inner_text()


class TestLooking:
    def test_a_dropped_image_is_predicted_and_explained(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        assert page.locator(".strip button").count() >= 20  # the catalogue's images
        for event in ("dragenter", "dragover", "drop"):
            page.dispatch_event("#stage", event, {"dataTransfer": transfer(page, live.image)})
        page.wait_for_selector(".feature")
        with live.client() as client:
            reply = client.explain(live.image, top_features=12, heatmaps="values")
        assert shares(page, "before") == {p.label: percent(p.probability) for p in reply.predictions}
        assert reply.explanations is not None
        (layer,) = reply.explanations[0].layers
        rows = page.locator(".feature")
        assert rows.evaluate_all("rows => rows.map(row => row.dataset.feature)") == [f.feature for f in layer.features]
        for row, feature in zip(rows.all(), layer.features, strict=True):
            assert row.locator(".picture.heated canvas").count() == (feature.heatmap is not None)
            assert f"{feature.attribution:+.3g}".replace("-", MINUS)[:4] in row.locator(".share").inner_text()
        assert page.locator("#target-name").inner_text() == reply.predictions[0].label
        assert live.image.name in page.locator("#caption").inner_text()

    def test_a_pasted_image(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        page.evaluate(
            "data => document.dispatchEvent(new ClipboardEvent('paste', {clipboardData: data, bubbles: true}))",
            transfer(page, live.image),
        )
        page.wait_for_selector(".feature")
        assert page.locator("#caption").inner_text().endswith("Pasted.")
        with live.client() as client:
            expected = {str(p.label): percent(p.probability) for p in client.predict(live.image).predictions}
        assert shares(page, "before") == expected

    def test_a_feature_that_is_pointed_at_shows_its_heat_large(
        self, visits: Visits, opened: Opened, live: Live
    ) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        assert page.locator(".area .heat canvas").count() == 0
        row = page.locator(".feature:has(.heated)").first
        row.hover()
        assert page.locator(".area .heat canvas").evaluate("c => [c.width, c.height]") == [8, 8]
        page.mouse.move(0, 0)
        assert page.locator(".area .heat canvas").count() == 0
        row.locator("input[type=range]").focus()  # by keyboard, too
        assert page.locator(".area .heat canvas").count() == 1

    def test_another_class_level_and_method(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        field = page.get_by_label("Explain another class")
        field.fill("cracked")
        page.wait_for_selector("[role=option]")
        reply = answered(page, lambda: field.press("Enter"))
        assert reply["predictions"]  # the prediction is asked again, for the class's own row
        page.wait_for_function("() => document.querySelector('#target-name').textContent === 'cracked toy'")
        assert "cracked toy" in shares(page, "before")
        page.locator("input[name=level][value=subunits]").check()
        page.wait_for_selector(f'[data-feature*="{LAYER}/"][data-feature*="/p"], [data-feature*="/c"]')
        page.locator("#method").select_option("ablation")
        page.wait_for_function("() => document.querySelector('.layer header').textContent.includes('ablation')")
        page.get_by_label("Back to the top class").click()
        page.wait_for_function("() => document.querySelector('#target-name').textContent !== 'cracked toy'")

    def test_labels_are_text(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        field = page.get_by_label("Add a feature")
        field.fill("hacked")
        page.wait_for_selector("[role=option]")
        assert page.locator("[role=option]").first.inner_text().startswith(HOSTILE)
        field.press("Enter")
        row = page.locator(f'[data-feature="{LAYER}/P0"]')
        row.wait_for()
        assert row.locator(".label").inner_text() == HOSTILE
        assert page.evaluate("() => window.hacked") is None

    def test_a_feature_page_leads_here_with_its_own_exemplar(self, visits: Visits, opened: Opened) -> None:
        page = visits.open(opened.address)
        visits.turn(page, opened.page("feature.html").split("?")[0] + f"#{LAYER}/P5")
        page.get_by_role("link", name="Steer this feature").click()
        page.wait_for_selector(f'[data-feature="{LAYER}/P5"]')
        assert page.evaluate("() => document.activeElement.closest('[data-feature]').dataset.feature") == f"{LAYER}/P5"
        assert page.locator("#samples").inner_text().startswith("Images where")
        page.locator(f'[data-feature="{LAYER}/P5"] .title a').click()
        page.wait_for_url(re.compile(r"feature\.html#" + re.escape(LAYER) + "/P5"))

    def test_an_exemplar_is_the_file_itself_or_says_that_it_moved(
        self, visits: Visits, opened: Opened, live: Live
    ) -> None:
        page = visits.open(opened.address)
        page.locator(".strip button").first.click()
        page.wait_for_selector(".feature")
        assert "moved" not in page.locator("#caption").inner_text()
        moved = live.folder / "elsewhere"
        (live.folder / "images").rename(moved)
        try:
            page = visits.open(opened.address)
            page.locator(".strip button").first.click()
            page.wait_for_selector(".feature")
            assert "The image itself has moved" in page.locator("#caption").inner_text()
        finally:
            moved.rename(live.folder / "images")


class TestSteering:
    def test_a_slider_moves_the_steered_bars_to_the_apis_own_answer(
        self, visits: Visits, opened: Opened, live: Live
    ) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        feature = page.locator(".feature").first.get_attribute("data-feature")
        assert feature is not None
        default = shares(page, "before")
        slider(page, feature).focus()
        for factor, key in ((1.1, "ArrowRight"), (-2.0, "Home"), (3.0, "End"), (2.9, "ArrowLeft")):
            shown = answered(page, lambda key=key: page.keyboard.press(key))
            edits = [{"feature": feature, "mode": "scale", "value": factor}]
            with live.client() as client:
                reply = client.steer(live.image, edits=edits, top_k=5)
            assert content(shown) == content(json.loads(reply.model_dump_json()))
            assert reply.steered is not None
            after = shares(page, "after")
            for p in reply.steered.predictions:
                assert after[str(p.label)] == percent(p.probability)
            assert {name: value for name, value in shares(page, "before").items() if name in default} == default
        answered(page, lambda: page.locator(f'[data-feature="{feature}"]').get_by_text("Ablate").click())
        assert "ablated" in page.locator(f'[data-feature="{feature}"] .factor').inner_text()
        with live.client() as client:
            reply = client.steer(live.image, edits=[{"feature": feature, "mode": "ablate"}], top_k=5)
        assert reply.steered is not None and reply.steered.predictions[0].label is not None
        assert shares(page, "after")[reply.steered.predictions[0].label] == percent(
            reply.steered.predictions[0].probability
        )
        page.get_by_role("button", name="Reset (1)").click()
        assert not page.locator("#answer.steered").count() and slider(page, feature).input_value() == "1"

    def test_questions_are_coalesced_and_the_last_one_wins(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        feature = page.locator(".feature").first.get_attribute("data-feature")
        assert feature is not None
        asked: list[dict[str, Any]] = []
        page.on("request", lambda r: asked.append(json.loads(r.post_data)) if r.url.endswith("/api/ask") else None)
        opened.wire.delay = 0.3
        slider(page, feature).evaluate(
            """async (field) => {
              for (let i = 0; i < 40; i++) {
                field.value = 1.2 + i * 0.04;
                field.dispatchEvent(new Event('input', {bubbles: true}));
                await new Promise((done) => setTimeout(done, 10));
              }
            }"""
        )
        page.wait_for_function("() => !document.querySelector('#answer.busy')")
        factors = [edits["request"]["steer"]["edits"][0]["value"] for edits in asked]
        assert 2 <= len(factors) <= 6 and factors == sorted(factors) and factors[-1] == 2.8
        opened.wire.delay = 0.0
        with live.client() as client:
            edits = [{"feature": feature, "mode": "scale", "value": factors[-1]}]
            reply = client.steer(live.image, edits=edits)
        assert reply.steered is not None
        first = reply.steered.predictions[0]
        assert shares(page, "after")[str(first.label)] == percent(first.probability)

    def test_an_answer_about_an_image_that_is_gone_is_dropped(self, visits: Visits, opened: Opened, live: Live) -> None:
        one, two = sorted((live.folder / "images").glob("*.png"))[:2]
        page = visits.open(opened.address)
        opened.wire.delay = 1.0
        page.set_input_files("#choose", one)
        page.wait_for_timeout(300)  # its question is under way
        opened.wire.delay = 0.0
        choose(page, two)
        with live.client() as client:
            expected = {str(p.label): percent(p.probability) for p in client.predict(two).predictions}
        assert shares(page, "before") == expected
        page.wait_for_timeout(1200)  # the first answer has come by now
        assert shares(page, "before") == expected and two.name in page.locator("#caption").inner_text()

    def test_a_box_and_tokens_restrict_the_edits(self, visits: Visits, opened: Opened, live: Live) -> None:
        page = visits.open(opened.address)
        choose(page, live.image)
        feature = page.locator(".feature:has(.heated)").first.get_attribute("data-feature")
        assert feature is not None
        page.locator("input[name=scope][value=box]").check()
        answered(page, lambda: page.locator(f'[data-feature="{feature}"]').get_by_text("Ablate").click())
        assert "Nothing is changed until a box is drawn" in notice(page)
        assert not page.locator("#answer.steered").count() and page.locator("#save").is_disabled()
        area = page.locator(".area").bounding_box()
        assert area is not None
        at = lambda x, y: (area["x"] + x * area["width"], area["y"] + y * area["height"])  # noqa: E731
        page.mouse.move(*at(0.25, 0.25))
        page.mouse.down()
        page.mouse.move(*at(0.5, 0.75), steps=3)
        shown = answered(page, page.mouse.up)
        box = [float(v) / 100 for v in page.locator("#box-fields input").evaluate_all("f => f.map(i => i.value)")]
        assert box == pytest.approx([0.25, 0.25, 0.5, 0.75], abs=0.011)
        for name, value in (("right", "100"), ("top", "50")):
            page.get_by_role("spinbutton", name=name).fill(value)
            shown = answered(page, lambda: page.keyboard.press("Tab"))
        edits = [{"feature": feature, "mode": "ablate", "apply": {"box": [box[0], 0.5, 1.0, box[3]]}}]
        with live.client() as client:
            reply = client.steer(live.image, edits=edits)
        assert content(shown) == content(json.loads(reply.model_dump_json()))
        answered(page, lambda: page.locator("input[name=scope][value=cls]").check())
        assert f"Kept to the class token, {feature} changes nothing" in notice(page)
        assert not page.locator("#answer.steered").count()
        answered(page, lambda: page.locator("input[name=scope][value=patches]").check())
        assert page.locator("#answer.steered").count() and not page.locator(".notice").count()

    def test_a_policy_is_kept_beside_the_checkpoint(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("422")
        page = visits.open(opened.address)
        choose(page, live.image)
        feature = page.locator(".feature").nth(1).get_attribute("data-feature")
        answered(page, lambda: page.locator(".feature").nth(1).get_by_text("Ablate").click())
        page.get_by_role("button", name="Save as policy").click()
        page.get_by_label("Name", exact=True).fill("no such name!")
        page.get_by_role("button", name="Save", exact=True).click()
        assert "1 to 64 letters" in page.locator("#policy .said").inner_text()
        page.get_by_label("Name", exact=True).fill("quiet")
        page.get_by_label("What it is for").fill(HOSTILE)
        page.get_by_role("button", name="Save", exact=True).click()
        page.wait_for_selector("#policy .notice.plain")
        said = page.locator("#policy .said").inner_text()
        assert "after the next archive" in said and f"elude archive {live.checkpoint} --force" in said
        stored = read_policies(live.checkpoint, read_manifest(live.checkpoint).partition_sha256)
        assert stored["quiet"]["edits"] == [{"feature": feature, "mode": "ablate"}]
        assert stored["quiet"]["description"] == HOSTILE

    def test_the_request_runs_as_curl_and_as_python(
        self, visits: Visits, opened: Opened, live: Live, tmp_path: Path
    ) -> None:
        image = tmp_path / 'it\'s a "toy", really.png'
        image.write_bytes(live.image.read_bytes())
        page = visits.open(opened.address)
        page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        choose(page, image)
        shown = answered(page, lambda: page.locator(".feature").first.get_by_text("Ablate").click())
        root = str(Path(elude.__file__).parents[1])
        environment = {**os.environ, "TOKEN": live.server.token() or "", "PYTHONPATH": root}

        def run(*command: str) -> str:
            how: Any = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True, "timeout": 60}
            return subprocess.run(command, check=True, **how).stdout

        page.get_by_role("button", name="Copy").click()
        copied = page.evaluate("() => navigator.clipboard.readText()")
        assert (live.server.token() or "-") not in copied and "$TOKEN" in copied
        assert content(json.loads(run("bash", "-c", copied))) == content(shown)
        page.locator("input[name=copy-kind][value=python]").check()
        program = page.locator("#copy pre").inner_text() + "\nprint(reply.model_dump_json())"
        assert content(json.loads(run(sys.executable, "-c", program).splitlines()[-1])) == content(shown)
        answered(page, lambda: page.get_by_role("button", name="Reset (1)").click())
        said = run(sys.executable, "-c", page.locator("#copy pre").inner_text())
        assert str(page.locator(".feature").first.get_attribute("data-feature")) in said


class TestStates:
    def test_a_server_that_does_not_answer_and_comes_back(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("Failed to load resource")
        opened.wire.down = True
        page = visits.open(opened.address)
        assert "No connection to the server" in notice(page)
        page.set_input_files("#choose", live.image)
        page.wait_for_timeout(300)
        assert page.locator(".area").is_visible() and not page.locator(".feature").count()
        opened.wire.down = False
        page.wait_for_selector(".feature")
        assert not page.locator(".notice").count()
        opened.wire.down = True  # while a slider moves
        slider(page, str(page.locator(".feature").first.get_attribute("data-feature"))).press("End")
        assert "No connection to the server" in notice(page)
        opened.wire.down = False
        page.wait_for_selector("#answer.steered")
        assert not page.locator(".notice").count()

    def test_a_server_with_too_much_to_do_is_asked_again(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("503")
        page = visits.open(opened.address)
        choose(page, live.image)
        problem = {"type": "overloaded", "title": "Too much work at once", "status": 503, "detail": "Later."}
        headers = {"content-type": "application/problem+json", "Retry-After": "1"}
        opened.wire.answers = [httpx.Response(503, json=problem, headers=headers)]
        slider(page, str(page.locator(".feature").first.get_attribute("data-feature"))).press("End")
        assert "asked again in 1 s" in notice(page)
        page.wait_for_selector("#answer.steered")
        assert not page.locator(".notice").count()

    def test_another_checkpoint_and_an_older_server(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("Failed to load resource")
        page = visits.open(opened.address)
        choose(page, live.image)
        with live.client() as client:
            described = json.loads(client.describe().model_dump_json())
        other = {**described, "model": {**described["model"], "checkpoint_sha256": "f" * 64}}
        problem = {"type": "other-checkpoint", "title": "Another checkpoint is served", "status": 412, "detail": "x"}
        kind = {"content-type": "application/problem+json"}
        opened.wire.answers = [httpx.Response(412, json=problem, headers=kind), httpx.Response(200, json=other)]
        slider(page, str(page.locator(".feature").first.get_attribute("data-feature"))).press("End")
        page.wait_for_function("() => document.querySelector('#notices').textContent.includes('ffffffffffff')")
        page.wait_for_selector("#answer.steered")  # the right one is back
        del described["limits"]
        opened.wire.answers = [httpx.Response(200, json=described)] * 2
        page = visits.open(opened.address)
        assert "older version" in notice(page) and "limits" in notice(page)

    def test_images_that_are_refused(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("Failed to load resource")
        page = visits.open(opened.address)
        page.set_input_files("#choose", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})
        assert "notes.png is no image that this browser can show" in notice(page)
        bitmap = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(bitmap, "BMP")  # a browser shows it, the server does not take it
        page.set_input_files("#choose", {"name": "old.bmp", "mimeType": "image/bmp", "buffer": bitmap.getvalue()})
        page.wait_for_function("() => document.querySelector('#notices').textContent.includes('JPEG')")
        noise = io.BytesIO()
        Image.frombytes("RGB", (1400, 1300), os.urandom(1400 * 1300 * 3)).save(noise, "PNG", compress_level=0)
        page.set_input_files("#choose", {"name": "large.png", "mimeType": "image/png", "buffer": noise.getvalue()})
        page.wait_for_function("() => document.querySelector('#notices').textContent.includes('5,000,000 bytes')")
        choose(page, live.image)
        assert not page.locator(".notice").count()

    def test_a_file_that_is_no_image_leaves_the_one_before_its_answer(
        self, visits: Visits, opened: Opened, live: Live
    ) -> None:
        page = visits.open(opened.address)
        page.set_input_files("#choose", live.image)
        page.set_input_files("#choose", {"name": "notes.png", "mimeType": "image/png", "buffer": b"no picture"})
        assert "notes.png is no image" in notice(page)
        page.wait_for_selector(".feature")
        assert page.locator(".feature").count() == 12 and live.image.name in page.locator("#caption").inner_text()

    def test_a_checkpoint_without_a_catalogue(
        self, visits: Visits, explore: Callable[..., Opened], live: Live, tmp_path: Path
    ) -> None:
        bare = tmp_path / "bare"
        bare.mkdir()
        for name in ("elude.json", "features.parquet"):
            (bare / name).write_bytes((live.checkpoint / name).read_bytes())
        opened = explore(checkpoint=bare)
        page = visits.open(opened.address)
        assert f"elude catalogue {bare}" in page.locator("#samples").inner_text()
        choose(page, live.image)
        assert page.locator(".feature").count() == 12 and not page.locator(".faces").count()

    def test_a_model_without_classes(self, visits: Visits, explore: Callable[..., Opened], live: Live) -> None:
        opened = explore("headless", live.headless)
        page = visits.open(opened.address)
        choose(page, live.image)
        assert "an embedding of 32 numbers" in page.locator("#answer").inner_text()
        assert not page.locator("#target").is_visible()
        with live.client("headless") as client:
            embedding = client.predict(live.image).embedding
            assert embedding is not None
            size = sum(v * v for v in embedding) ** 0.5
            direction = [v / size for v in embedding]
            reply = client.explain(live.image, targets=[{"direction": direction}], top_features=1)
        assert reply.explanations is not None
        top = reply.explanations[0].layers[0].features[0].feature
        assert page.locator(".feature").first.get_attribute("data-feature") == top
        answered(page, lambda: page.locator(".feature").first.get_by_text("Ablate").click())
        assert "cosine" in page.locator("#answer").inner_text()

    def test_an_unknown_feature_in_the_address(self, visits: Visits, opened: Opened, live: Live) -> None:
        visits.expected.append("422")
        page = visits.open(opened.address)
        visits.turn(page, opened.page("explore.html").split("?")[0] + f"#feature={LAYER}/P999")
        page.set_input_files("#choose", live.image)
        assert "P999" in notice(page)
        page.wait_for_selector(".feature")  # the others are there

    def test_an_address_of_an_earlier_run(self, visits: Visits, opened: Opened) -> None:
        visits.expected.append("403")
        page = visits.open(opened.address)
        page.context.clear_cookies()
        page.goto(opened.page("explore.html").split("?")[0])
        assert "elude explore" in page.inner_text("body")


@pytest.mark.parametrize("size", [WIDE, NARROW], ids=["wide", "narrow"])
def test_pictures(visits: Visits, opened: Opened, live: Live, size: tuple[int, int]) -> None:
    """Kept in `screenshots/` to be looked at; it fits the screen, text stands out, everything has a name."""
    page = visits.open(opened.address, size=size)
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_selector(f"html[data-theme={theme}]", state="attached")
        visits.keep(page, "explore-empty")
    choose(page, live.image)
    rows = page.locator(".feature")
    answered(page, lambda: rows.nth(0).get_by_text("Ablate").click())
    answered(page, lambda: rows.nth(1).locator("input[type=range]").press("End"))
    for theme in ("light", "dark"):
        page.emulate_media(color_scheme=theme)
        page.wait_for_selector(f"html[data-theme={theme}]", state="attached")
        visits.keep(page, "explore-steered")
        assert page.evaluate(FAINT) == [], theme
    wider = page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
    assert wider <= 0
    assert page.locator("img:not([alt])").count() == 0
    assert page.locator("button, a[href]").evaluate_all(UNNAMED) == []
