"""The report's folder: what is in it, and what it refuses. How its pages look and act: `tests/browser`."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from report_checkpoint import HOSTILE, LAYER, Made, certificate, checkpoint, evaluation

from elude_runtime.checkpoint.exemplars import EXEMPLARS_TABLE, read_exemplars
from elude_runtime.errors import CheckpointError, StorageError
from elude_runtime.offline.report.data import CHUNK, without_common_folder
from elude_runtime.offline.report.pages import feature_address
from elude_runtime.offline.report.report import write_report

MADE = Made()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = checkpoint(tmp_path_factory.mktemp("report") / "ckpt", MADE)
    certificate(folder)
    evaluation(folder)
    return folder


@pytest.fixture(scope="module")
def report(source: Path) -> Path:
    return write_report(source, source.parent / "report").page.parent


def data(report: Path, name: str) -> Any:
    """What one of the data scripts assigns."""
    text = (report / "data" / f"{name}.js").read_text("ascii")
    return json.loads(text.split("]=", 1)[1].removesuffix(";\n"))


def test_the_index_has_every_feature(source: Path, report: Path) -> None:
    table, index = pq.read_table(source / "features.parquet"), data(report, "features")
    assert [f"{LAYER}/{short}" for short in index["short"]] == table["feature"].to_pylist()
    labels = [index["label"]["values"][code] for code in index["label"]["codes"]]
    assert labels == table["label"].to_pylist()
    assert index["share"] == pytest.approx(table["share"].to_pylist(), rel=1e-3)
    concepts = table["concept"].to_pylist()
    assert [f"{LAYER}/{index['short'][place]}" for place in index["concept"]] == concepts


def test_every_feature_has_its_exemplars(source: Path, report: Path) -> None:
    exemplars, index, images = read_exemplars(source), data(report, "features"), data(report, "images")
    for row, short in enumerate(index["short"]):
        expected = exemplars.of(f"{LAYER}/{short}")
        found = data(report, f"f-{row // CHUNK}")[row % CHUNK]["exemplars"]
        names = {(images["name"][place], token) for _, _, place, token, *_ in found}
        assert names == {(exemplars.images[e.image].name, e.token) for e in expected}
        card = index["cards"][row][0]
        best = [e for e in expected if (e.end, e.role) == ("positive", "top")][:4]
        assert [images["name"][i] for i in card[::2]] == [exemplars.images[e.image].name for e in best]


def test_heat_is_kept_bit_for_bit(source: Path, report: Path) -> None:
    row = data(report, "features")["short"].index("P1")
    expected = {e.heat.tobytes() for e in read_exemplars(source).of(f"{LAYER}/P1") if e.heat is not None}
    found = {base64.b64decode(e[5]) for e in data(report, f"f-{row // CHUNK}")[row % CHUNK]["exemplars"] if e[5]}
    assert found == expected and len(found) > 9


def test_classes_have_their_features_by_effect(source: Path, report: Path) -> None:
    classes, index = data(report, "classes"), data(report, "features")
    table = pq.read_table(source / "features.parquet").to_pylist()
    for side, sign in (("raises", 1), ("lowers", -1)):
        for c, flat in classes[side].items():
            assert all(sign * effect > 0 for effect in flat[1::2])
            assert sorted(map(abs, flat[1::2]), reverse=True) == list(map(abs, flat[1::2]))
            named = {f"{LAYER}/{index['short'][row]}" for row in flat[::2]}
            assert named == {r["feature"] for r in table if any(e["class"] == int(c) for e in r[side] or [])}


def test_only_thumbnails_that_are_shown_are_copied(report: Path) -> None:
    shown = {name for name in data(report, "images")["thumb"] if name}
    assert {f"thumbs/{p.name}" for p in (report / "thumbs").iterdir()} == shown


def test_pages_carry_no_markup_of_others_and_one_nonce_each(report: Path) -> None:
    nonces = set()
    for name in ("index.html", "features.html", "feature.html", "class.html"):
        page = (report / name).read_text("utf-8")
        assert HOSTILE not in page and "style=" not in page and " onclick" not in page
        found = set(re.findall(r'nonce="([^"]+)"', page)) | set(re.findall(r"'nonce-([^']+)'", page))
        assert len(found) == 1
        nonces |= found
        scripts = re.findall(r"<script[^>]*>", page)
        assert scripts and all("src=" in tag and "nonce=" in tag for tag in scripts)
        for file in re.findall(r'(?:src|href)="((?:assets|evaluation)/[^"]+)"', page):
            assert (report / file).is_file(), file
    assert len(nonces) == 4


def test_the_same_report_twice_but_for_its_nonces(source: Path, report: Path, tmp_path: Path) -> None:
    other = write_report(source, tmp_path / "again").page.parent
    files = {p.relative_to(report) for p in report.rglob("*") if p.is_file()}
    assert files == {p.relative_to(other) for p in other.rglob("*") if p.is_file()}
    for file in files:
        one, two = (re.sub(rb"nonce[-=]\"?[\w-]+", b"", (f / file).read_bytes()) for f in (report, other))
        assert one == two, file


def test_the_explorer_s_pages_link_to_it(source: Path, tmp_path: Path, report: Path) -> None:
    page = html.unescape(write_report(source, tmp_path / "explored", explorer=True).page.read_text("utf-8"))
    assert 'href="explore.html"' in page and "connect-src 'self'" in page
    plain = html.unescape((report / "index.html").read_text("utf-8"))
    assert "explore.html" not in plain and "connect-src 'none'" in plain


def test_an_older_report_is_replaced_only_when_told_to(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    write_report(source, out)
    (out / "thumbs" / "old").write_text("")
    with pytest.raises(StorageError, match="already there"):
        write_report(source, out)
    assert (out / "thumbs" / "old").exists()
    write_report(source, out, force=True)
    assert not (out / "thumbs" / "old").exists()
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine").write_text("")
    with pytest.raises(StorageError, match="not a report"):
        write_report(source, other, force=True)
    assert (other / "mine").exists()


def test_a_damaged_catalogue_is_a_state_and_a_damaged_table_an_error(source: Path, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "ckpt")
    table = (made / "exemplars" / EXEMPLARS_TABLE).read_bytes()
    (made / "exemplars" / EXEMPLARS_TABLE).write_bytes(table[: len(table) // 2])
    written = write_report(made, tmp_path / "report")
    assert "elude catalogue ckpt" in written.problem and written.images == 0
    (made / "features.parquet").write_bytes(b"no table")
    with pytest.raises(CheckpointError, match="damaged"):
        write_report(made, tmp_path / "none")
    assert not list(tmp_path.glob("*none*"))


def test_an_evaluation_from_elsewhere(source: Path, tmp_path: Path) -> None:
    made = checkpoint(tmp_path / "ckpt", catalogue=False)
    with pytest.raises(CheckpointError, match=r"holds no evaluation.json"):
        write_report(made, tmp_path / "report", evaluation=tmp_path)
    evaluation(made)
    (tmp_path / "elsewhere").mkdir()
    for name in ("evaluation.json", "evaluation"):
        (made / name).rename(tmp_path / "elsewhere" / name)
    page = write_report(made, tmp_path / "report", evaluation=tmp_path / "elsewhere").page
    assert "concepts are clearer" in page.read_text("utf-8")


def test_images_are_named_from_the_folder_that_tells_them_apart() -> None:
    names = ["/home/somebody/set/cats/1.jpg", "/home/somebody/set/dogs/1.jpg", "/home/somebody/set/2.jpg"]
    assert without_common_folder(names) == ["cats/1.jpg", "dogs/1.jpg", "2.jpg"]
    assert without_common_folder(["a/b.jpg"]) == ["b.jpg"] and without_common_folder([]) == []
    assert without_common_folder(["b.jpg", "a/b.jpg"]) == ["b.jpg", "a/b.jpg"]


def test_a_feature_s_address() -> None:
    assert feature_address("blocks.1.mlp.fc2/12/p3") == "feature.html#blocks.1.mlp.fc2/12/p3"
    assert feature_address("é x/P1") == "feature.html#%C3%A9%20x/P1"


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: [],
        lambda d: {**d, "layers": 3},
        lambda d: {**d, "layers": [{**d["layers"][0], "sets": [{"name": "concepts"}]}]},
        lambda d: {**d, "layers": [{**d["layers"][0], "encoders": {"other": {"img9": {}}}}]},
    ],
    ids=["list", "number", "half a set", "another encoder"],
)
def test_a_damaged_evaluation_is_a_state(tmp_path: Path, damage: Any) -> None:
    made = checkpoint(tmp_path / "ckpt", catalogue=False)
    evaluation(made)
    document = json.loads((made / "evaluation.json").read_text())
    (made / "evaluation.json").write_text(json.dumps(damage(document)))
    page = write_report(made, tmp_path / "report").page.read_text("utf-8")
    assert "evaluation.json is damaged" in page
