"""`elude diff`: the table, JSON, the files, and one sentence for what a user can put right."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Rewritten
from support import FIRST, SECOND, VIT_ARGS, VIT_DATA, Run, input_tensor, refused, tiny_vit

import elude_runtime as elude
from elude_runtime.cli.diff import _print
from elude_runtime.offline.diff import diff


@pytest.fixture
def run(run: Run) -> Run:
    """`elude diff ARGUMENTS`, in this process."""
    return lambda *arguments: run("diff", *arguments)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The tiny ViT's second layer again, with another seed."""
    out = tmp_path_factory.mktemp("other") / "ckpt"
    elude.rewrite(
        tiny_vit(), pictures, out=out, layers=[SECOND], subunits=4, concepts=8, tokens=24, seed=2,
        data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    return out


@pytest.fixture
def labelled(vit: Rewritten, tmp_path: Path) -> Path:
    out = tmp_path / "labelled"
    shutil.copytree(vit.path, out)
    names = [f"{SECOND}/P{i}" for i in range(6)]
    (out / "labels.csv").write_text("feature,label\n" + "".join(f"{n},label {n[-1]}\n" for n in names))
    return out


def test_the_screen(run: Run, vit: Rewritten, other: Path, pictures: Path) -> None:
    ran = run(vit.path, other, "--images", pictures, "--top", 3)
    assert ran.code == 0
    assert "24 images, the same base model" in ran.out and f"only the old one splits {FIRST}" in ran.out
    assert "seed 0" in ran.out and "seed 2" in ran.out and "24 calibration images" in ran.out
    assert "24 tokens of type cls" in ran.err and "note:" in ran.err
    document = run(vit.path, other, "--images", pictures, "--json").document
    lines = ran.out.splitlines()
    for a in document["agreement"]:
        (line,) = [x for x in lines if f"{a['token_type']} {a['tokens']}" in x and f"{a['kind']}s" in x]
        assert (
            f"{a['mean']:.2f}" in line and f"{a['random_mean']:.2f}" in line and f"{a['matched_fraction']:.0%}" in line
        )
    for token_type, letter in (("patches", "P"), ("cls", "C")):
        start = next(i for i, x in enumerate(lines) if x.startswith(f"{SECOND}, {token_type} (the 3 with"))
        shown = [x.split() for x in lines[start + 3 : start + 6]]
        rows = [r for r in document["mapping"] if r["kind"] == "concept" and r["token_type"] == token_type and r["old"]]
        rows.sort(key=lambda r: -r["old_share"])
        for cells, row in zip(shown, rows, strict=False):
            assert cells[0] == row["old"].rpartition("/")[2] and cells[0][0] == letter
            assert row["new"] is None or cells[1:3] == [row["new"].rpartition("/")[2], f"{row['correlation']:.2f}"]
        assert not lines[start + 6].strip()


def test_eighty_columns_are_enough_and_nothing_is_cut(
    vit: Rewritten, other: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The width of a pipe or a log: only long labels go beyond it."""
    result = diff(vit.path, other, input_tensor(VIT_DATA, 30, 300), threshold=0.25)
    label = "a name [of a kind] " + "that is long " * 9 + "indeed"
    labelled = [replace(r, label=label if r.old == f"{SECOND}/P1" else "") for r in result.mapping]
    monkeypatch.setenv("COLUMNS", "80")
    for found, wide in ((result, 80), (replace(result, mapping=labelled), 80 + len(label))):
        _print(found, None)
        lines = capsys.readouterr().out.splitlines()
        tables = [x for x in lines if x.startswith(("tokens", "old  new", "patches", "cls", "P", "C", "-"))]
        assert len(tables) > 20 and max(map(len, tables)) <= wide and "…" not in "".join(tables)
        for heading in ("mean r", "r ≥ .25", "share", "mutual", "random r", "runner-up", "rival", "label"):
            assert any(heading in x for x in tables), heading
    assert [x.split()[0] for x in tables if label in x] == ["P1"]
    (line,) = [x for x in tables if x.startswith("patches") and "concepts" in x]
    (a,) = [a for a in result.agreement if (a.token_type, a.kind) == ("patches", "concept")]
    parts = [f"{v:.0%}" if v >= 0.1 else f"{v:.1%}" for v in (a.matched / a.old, a.matched_share, a.mutual / a.old)]
    expected = ["patches", a.tokens, "concepts", a.old, a.new, f"{a.mean:.2f}", *parts, f"{a.random_mean:.2f}"]
    assert line.split() == list(map(str, expected))


def test_all_shows_every_concept(run: Run, vit: Rewritten, other: Path, pictures: Path) -> None:
    few, whole = (
        run(vit.path, other, "--images", pictures, "--top", 2),
        run(vit.path, other, "--images", pictures, "--all"),
    )
    assert whole.code == 0 and "with the largest share" in few.out and "with the largest share" not in whole.out
    words = whole.out.split()
    assert {f"{t}{i}" for t in "PC" for i in range(6)} <= set(words)
    assert "only new" in whole.out  # eight new ones cannot all have one of six old ones


def test_json_says_everything(run: Run, vit: Rewritten, other: Path, pictures: Path) -> None:
    ran = run(vit.path, other, "--images", pictures, "--json", "--max-images", 10, "--batch-size", 3)
    document = ran.document
    assert ran.code == 0 and document["images"] == 10 and document["same_base"] is True
    assert document["threshold"] == 0.7 and document["only_old"] == [FIRST] and document["only_new"] == []
    assert document["old"]["checkpoint_sha256"] == vit.model.manifest.checkpoint_sha256
    assert {(a["token_type"], a["kind"]) for a in document["agreement"]} == {
        (t, k) for t in ("patches", "cls") for k in ("concept", "subunit")
    }
    assert len(document["mapping"]) > 100


def test_concepts_only_and_threshold(run: Run, vit: Rewritten, other: Path, pictures: Path) -> None:
    found = [
        run(vit.path, other, "--images", pictures, "--json", "--concepts-only", "--threshold", t).document
        for t in (0.2, 0.9)
    ]
    assert all(r["kind"] == "concept" for d in found for r in d["mapping"])
    loose, strict = (sum(r["status"] == "matched" for r in d["mapping"]) for d in found)
    assert loose > strict
    assert all(r["correlation"] >= 0.9 for r in found[1]["mapping"] if r["status"] == "matched")


def test_files(run: Run, labelled: Path, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    mapping, labels = tmp_path / "mapping.parquet", tmp_path / "carried.csv"
    ran = run(labelled, vit.path, "--images", pictures, "--out", mapping, "--labels", labels, "--concepts-only")
    assert ran.code == 0 and ran.err.strip().endswith("6 labels carried") and f"{mapping}: 24 rows" in ran.err
    assert "label 3" in ran.out
    rows = pq.read_table(mapping).to_pylist()
    assert {r["old"]: r["label"] for r in rows if r["label"]} == {f"{SECOND}/P{i}": f"label {i}" for i in range(6)}
    assert all(r["old"] == r["new"] and r["correlation"] == 1.0 for r in rows)
    with labels.open(newline="") as file:
        carried = list(csv.DictReader(file))
    assert carried == [{"feature": f"{SECOND}/P{i}", "label": f"label {i}"} for i in range(6)]


def test_labels_that_stay_behind(run: Run, labelled: Path, other: Path, pictures: Path, tmp_path: Path) -> None:
    common = (labelled, other, "--images", pictures, "--concepts-only", "--labels", tmp_path / "carried.csv")
    ran = run(*common, "--threshold", 1)
    assert "0 labels carried, 6 left behind" in ran.err
    assert (tmp_path / "carried.csv").read_text() == "feature,label\n"


def test_bad_input(run: Run, vit: Rewritten, mobilenet: Rewritten, pictures: Path, tmp_path: Path) -> None:
    refused(run(vit.path, tmp_path / "nowhere", "--images", pictures), "is not a directory")
    refused(run(vit.path, vit.path, "--images", tmp_path / "nowhere"), "is not there")
    refused(run(vit.path, vit.path, "--images", pictures, "--threshold", 1.5), "threshold")
    refused(run(vit.path, vit.path, "--images", pictures, "--device", "warp"), "warp")
    refused(run(vit.path, mobilenet.path, "--images", pictures), "no split layer in common")


def test_files_that_cannot_be_written_are_refused_before_the_work(run: Run, tmp_path: Path) -> None:
    common = (tmp_path / "a", tmp_path / "b", "--images", tmp_path)  # none of them there: nothing else was looked at
    refused(run(*common, "--out", tmp_path / "x.txt"), ".csv, .parquet or .json", "x.txt")
    refused(run(*common, "--out", tmp_path / "no" / "x.csv"), "There is no folder", "x.csv")
    refused(run(*common, "--labels", tmp_path / "no" / "x.csv"), "There is no folder", "x.csv")


def test_code_that_is_not_trusted(run: Run, vit: Rewritten, pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "build.py").write_text(
        "import timm\ndef build(**args):\n    return timm.create_model('vit_tiny_patch16_224', **args)\n"
    )
    elude.rewrite(
        vit.base, pictures, out=tmp_path / "c", layers=[SECOND], subunits=4, concepts=4, tokens=12, max_images=6,
        data_config=VIT_DATA, factory=f"{tmp_path / 'build.py'}:build", model_args=VIT_ARGS,
    )  # fmt: skip
    common = (vit.path, tmp_path / "c", "--images", pictures, "--concepts-only", "--json")
    refused(run(*common), "--trust-factory")
    ran = run(*common, "--trust-factory")
    assert ran.code == 0 and ran.document["same_base"] is True
