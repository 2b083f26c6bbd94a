"""What the report's pages say where something is missing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser_visits import Visits
from report_checkpoint import LAYER, certificate, evaluation

from elude_runtime.offline.feature_table import TABLE

Reports = Callable[..., str]


@pytest.fixture
def bare(reports: Reports) -> str:
    """A checkpoint as `elude rewrite` leaves it: no catalogue, no certificate, no evaluation."""
    return reports("bare", catalogue=False, prepare=without_catalogue_columns)


def without_catalogue_columns(folder: Path) -> None:
    table = pq.read_table(folder / TABLE)
    labels = pa.array([""] * table.num_rows)
    table = table.drop_columns(["stability", "raises", "lowers"])
    for column in ("label", "label_source"):
        table = table.set_column(table.schema.get_field_index(column), column, labels)
    pq.write_table(table, folder / TABLE)


def test_a_checkpoint_without_anything_beside_it(visits: Visits, bare: str) -> None:
    text = visits.open(f"{bare}/index.html").inner_text("main")
    assert "was not verified yet" in text and "elude verify ckpt --base MODEL --images DIR" in text
    assert "elude catalogue ckpt --images DIR" in text
    assert "Nobody has evaluated" in text and "elude evaluate ckpt" in text
    assert "/" + "ckpt" not in text  # pages do not tell where the checkpoint lay


def test_features_without_a_catalogue(visits: Visits, bare: str) -> None:
    page = visits.open(f"{bare}/features.html")
    assert "elude catalogue ckpt --images DIR" in page.inner_text("main")
    assert page.locator("#cards a").count() == 12
    visits.turn(page, f"{bare}/feature.html#{LAYER}/P0")
    assert "no catalogue yet" in page.inner_text("main") and page.locator(".facts dd").count() > 3
    assert "holds no exemplars of neurons" in page.inner_text(".split-neuron")
    visits.turn(page, f"{bare}/class.html#0")
    assert "no class effects yet" in page.inner_text("main")


@pytest.mark.parametrize(
    ("prepare", "said"),
    [
        (lambda f: certificate(f, holds=False), "A check does not hold"),
        (lambda f: certificate(f, sha256="0" * 64), "belongs to another one"),
        (lambda f: (f / "verification.json").write_text("{"), "is damaged"),
        (lambda f: evaluation(f, sha256="0" * 64), "evaluation.json belongs to another checkpoint"),
    ],
    ids=["fails", "foreign", "damaged", "foreign-evaluation"],
)
def test_certificates_and_evaluations_in_every_state(
    visits: Visits, reports: Reports, request: pytest.FixtureRequest, prepare: Callable[[Path], object], said: str
) -> None:
    name = request.node.callspec.id
    page = visits.open(f"{reports(name, prepare=prepare, catalogue=False)}/index.html")
    assert said in page.inner_text("main")


def test_a_dead_feature(visits: Visits, reports: Reports) -> None:
    page = visits.open(f"{reports('plain')}/feature.html#{LAYER}/Prest")
    assert "this feature is dead" in page.inner_text("main") and "dead: never varied" in page.inner_text(
        ".feature-head"
    )
    assert page.locator(".tile, .split").count() == 0


def test_a_feature_that_does_not_exist(visits: Visits, reports: Reports) -> None:
    page = visits.open(f"{reports('plain')}/class.html#77")
    assert "no class 77" in page.inner_text("main")
    for name in (f"{LAYER}/P99", f"{LAYER}/y99", "%", ""):
        visits.turn(page, f"{reports('plain')}/feature.html#{name}")
        assert page.inner_text("h1") == "No such feature"


def test_thumbnails_that_are_missing(visits: Visits, reports: Reports) -> None:
    """Both those that the catalogue lacks and those that were deleted from the report later."""

    def some(folder: Path) -> None:
        for path in sorted((folder / "exemplars" / "thumbs").iterdir())[::2]:
            path.unlink()

    report = reports("thumbs", prepare=some)
    for path in sorted(Path(report.removeprefix("file://"), "thumbs").iterdir())[::2]:
        path.unlink()
    visits.expected += ["ERR_FILE_NOT_FOUND"]
    page = visits.open(f"{report}/feature.html#{LAYER}/P1")
    page.wait_for_function("() => document.querySelectorAll('.tile .picture.missing').length > 0")
    assert (
        page.locator(".tile .picture.missing").first.get_attribute("aria-label").endswith("(its thumbnail is missing)")
    )
    assert page.locator(".tile img").count() > 0


def test_data_that_are_missing(visits: Visits, reports: Reports) -> None:
    report = reports("data")
    Path(report.removeprefix("file://"), "data", "f-0.js").unlink()
    visits.expected += ["ERR_FILE_NOT_FOUND"]
    page = visits.open(f"{report}/features.html")
    page.goto(f"{report}/feature.html#{LAYER}/P1")
    page.wait_for_selector(".state")
    assert "data/f-0.js is missing or damaged" in page.inner_text("main")
    assert visits.problems == ["error: data/f-0.js is missing or damaged; make the report again."]
    visits.problems.clear()


def test_neurons_without_exemplars(visits: Visits, reports: Reports) -> None:
    page = visits.open(f"{reports('neurons', neuron_exemplars=False)}/feature.html#{LAYER}/y1")
    assert "holds no exemplars of neurons" in page.inner_text("main")
    assert page.locator("[data-subunit]").count() == 4


def test_a_layer_without_a_grid(visits: Visits, reports: Reports) -> None:
    page = visits.open(f"{reports('flat', grid=None, prefix=0)}/feature.html#{LAYER}/P1")
    assert page.locator(".tile").count() > 18 and page.locator("canvas, .spot, .segments").count() == 0


def test_without_scripts_the_overview_can_still_be_read(visits: Visits, reports: Reports) -> None:
    context = visits.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(f"{reports('plain')}/index.html")
    assert "scripts, which are switched off" in page.inner_text("main") and page.locator("table").count() >= 1
