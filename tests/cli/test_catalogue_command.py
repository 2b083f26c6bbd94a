"""`elude catalogue`, `label`, `search` and what `inspect` says of a feature; labels on their way into an archive."""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pytest
from conftest import Rewritten
from support import LABELS, SECOND, Run, refused, write_pictures

from elude_runtime.checkpoint.catalogue import read_catalogue
from elude_runtime.checkpoint.exemplars import read_exemplars
from elude_runtime.cli.archive import build_archive

FEATURE = f"{SECOND}/P0"


@pytest.fixture
def checkpoint(catalogued: Path, tmp_path: Path) -> Path:
    out = tmp_path / "ckpt"
    shutil.copytree(catalogued, out)
    return out


def test_a_catalogue_and_what_it_says(vit: Rewritten, tmp_path: Path, run: Run) -> None:
    out, folder = tmp_path / "ckpt", write_pictures(tmp_path / "set", 8)
    shutil.copytree(vit.path, out)
    (folder / "003.png").write_bytes(b"x")
    arguments = ("catalogue", out, "--images", folder, "--effect-images", 2, "--thumbnail-budget", "0.1")
    ran = run(*arguments)
    assert ran.code == 0 and f"{out / 'exemplars'}: 7 of 7 images are exemplars" in ran.out
    assert f"{SECOND}: " in ran.out and "thumbnails: 7" in ran.out and "elude inspect" in ran.out
    assert "skipped" in ran.err and "003.png" in ran.err
    ran = run(*arguments, "--layers", SECOND, "--json")
    document = json.loads(ran.out)
    assert document["images"] == 7 and document["skipped_count"] == 1 and list(document["features"]) == [SECOND]
    assert document["skipped"][0]["file"].endswith("003.png") and document["missing"] == []
    assert [layer.name for layer in read_exemplars(out).layers] == [SECOND]


def test_what_a_catalogue_refuses(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    refused(run("catalogue", tmp_path, "--images", tmp_path), "not an ELUDe checkpoint")
    refused(run("catalogue", checkpoint, "--images", tmp_path / "nowhere"), "is not there")
    refused(run("catalogue", checkpoint, "--images", tmp_path, "--device", "nowhere"), "device")


def test_inspect_shows_what_a_catalogue_found(checkpoint: Path, run: Run) -> None:
    run("label", checkpoint, FEATURE, "[bold]stripes & <i>fur</i>")
    ran = run("inspect", checkpoint, FEATURE)
    assert ran.code == 0 and "[bold]stripes & <i>fur</i>  (user)" in ran.out
    for heading in ("raises", "lowers", "inputs", "alike", "positive top", "negative top", "near miss"):
        assert f"  {heading}" in ran.out or heading in ran.out, heading
    assert any(name in ran.out for name in LABELS) and ".png, seen as" in ran.out
    document = json.loads(run("inspect", checkpoint, FEATURE, "--json").out)
    found = read_exemplars(checkpoint)
    assert document["label_source"] == "user" and document["note"] is None
    assert len(document["exemplars"]) == len(found.of(FEATURE)) > 9
    assert [i["input"] for i in document["inputs"]] == [channel for channel, _ in found.inputs(FEATURE)]
    assert len(document["duplicates"]) == 5 and document["raises"] and document["lowers"]
    subunit = run("inspect", checkpoint, f"{SECOND}/3/p1").out
    assert "concept " in subunit and "inputs" in subunit and "siblings   p0" in subunit
    siblings = json.loads(run("inspect", checkpoint, f"{SECOND}/3/p1", "--json").out)["siblings"]
    assert f"{SECOND}/3/p0" in siblings and f"{SECOND}/3/p1" not in siblings
    assert all(name.startswith(f"{SECOND}/3/p") for name in siblings)


def test_inspect_without_a_catalogue(vit: Rewritten, checkpoint: Path, run: Run) -> None:
    ran = run("inspect", vit.path, FEATURE)
    assert ran.code == 0 and "label      -" in ran.out and "note: " in ran.err and "has no exemplars" in ran.err
    (checkpoint / "exemplars" / "catalogue.json").write_text("{")
    ran = run("inspect", checkpoint, FEATURE)
    assert ran.code == 0 and "damaged or incomplete" in ran.err
    document = json.loads(run("inspect", checkpoint, FEATURE, "--json").out)
    assert document["exemplars"] == [] and "damaged" in document["note"]


def test_inspect_of_a_feature_that_never_varied(checkpoint: Path, run: Run) -> None:
    ran = run("inspect", checkpoint, f"{SECOND}/Prest")
    assert ran.code == 0 and "exemplars  none: it never varied" in ran.out


def test_search(checkpoint: Path, run: Run) -> None:
    run("label", checkpoint, f"{SECOND}/2/p1", "striped fur")
    run("label", checkpoint, FEATURE, "stripes [red]")
    ran = run("search", checkpoint, "Stripe")
    assert ran.code == 0 and ran.out.index("stripes [red]") < ran.out.index("striped fur") and "user" in ran.out
    found = json.loads(run("search", checkpoint, "strip", "--json").out)
    assert found["total"] == 2 and [f["feature"] for f in found["features"]] == [FEATURE, f"{SECOND}/2/p1"]
    assert "1 of 2" in run("search", checkpoint, "strip", "--limit", 1).out
    other = json.loads(run("search", checkpoint, "strip", "--layer", "blocks.0.attn.proj", "--json").out)
    assert all(f["layer"] == "blocks.0.attn.proj" for f in other["features"])
    assert "No feature is called" in run("search", checkpoint, "qqqqqqqq").out
    refused(run("search", checkpoint, "x", "--layer", "blocks.7"), "no split layer 'blocks.7'")


def test_labels_one_by_one_and_from_a_file(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    ran = run("label", checkpoint, FEATURE, "stripes")
    assert ran.code == 0 and ran.out.startswith(f"{FEATURE}: stripes\n") and "elude archive" in ran.out
    file = tmp_path / "given.csv"
    file.write_text(f'feature,label\n{SECOND}/P1,"fur, white"\n{SECOND}/P2,sky\n')
    assert run("label", checkpoint, "--csv", file).out.startswith("2 features labelled.")
    assert json.loads(run("label", checkpoint, FEATURE, "--clear", "--json").out) == {FEATURE: ""}
    facts = read_catalogue(checkpoint).facts(f"{SECOND}/P1")
    assert facts is not None and (facts.label, facts.label_source) == ("fur, white", "user")


def test_what_label_refuses(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    file = ("--csv", "labels.csv")
    for arguments in ((), (FEATURE,), (FEATURE, "x", "--clear"), ("--clear",), (FEATURE, *file), (*file, "--clear")):
        refused(run("label", checkpoint, *arguments), "Give FEATURE and TEXT, or FEATURE and --clear, or --csv FILE.")
    refused(run("label", checkpoint, FEATURE, "a\tb"), "control character U+0009")
    refused(run("label", checkpoint, FEATURE, "y" * 300), "limit is 200")
    refused(run("label", checkpoint, f"{SECOND}/P77", "x"), "Did you mean")
    refused(run("label", tmp_path, FEATURE, "x"), "not an ELUDe checkpoint")
    given = tmp_path / "given.csv"
    given.write_text("feature,label\nnothing,x\n")
    refused(run("label", checkpoint, "--csv", given), f"{given}, line 2: there is no feature 'nothing'")


def test_an_archive_carries_labels_and_no_pictures(checkpoint: Path, tmp_path: Path, run: Run) -> None:
    run("label", checkpoint, FEATURE, "<stripes>")
    archive = build_archive(checkpoint, tmp_path / "store", name="m")
    with zipfile.ZipFile(archive) as file:
        names = file.namelist()
        file.extract("checkpoint/features.json", tmp_path)
    assert not [n for n in names if "exemplars" in n and n.startswith("checkpoint/")]
    facts = read_catalogue(tmp_path / "checkpoint").facts(FEATURE)
    assert facts is not None and (facts.label, facts.label_source) == ("<stripes>", "user")
