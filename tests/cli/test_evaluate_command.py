"""`elude evaluate`: the table, JSON, the files, and one sentence for what a user can put right."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from conftest import Rewritten
from safetensors.torch import save_file
from support import SECOND, Run, refused, tiny_mobilenet, write_pictures


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """54 pictures that no checkpoint saw."""
    return write_pictures(tmp_path_factory.mktemp("scored") / "set", 54, 2000)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "conv.safetensors"
    save_file(tiny_mobilenet().state_dict(), path)
    return path


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    out = tmp_path / "ckpt"
    shutil.copytree(vit.path, out)
    return out


@pytest.fixture
def run(run: Run, scored: Path, pictures: Path) -> Run:
    """`elude evaluate CKPT ...` with few of everything, in this process."""
    return lambda checkpoint, *arguments: run(
        "evaluate", checkpoint, "--images", scored, "--calibration", pictures, "--layers", SECOND, "--neurons", 4,
        "--draws", 20, "--effect-images", 2, *arguments,
    )  # fmt: skip


def test_the_screen_and_the_files(run: Run, checkpoint: Path, weights: Path) -> None:
    ran = run(
        checkpoint, "--encoder", "mobilenetv2_035", "--encoder-weights", weights, "--baselines", "hidden,kmeans",
    )  # fmt: skip
    assert ran.code == 0, ran
    assert "54 images scored, 24 for the baselines" in ran.out
    for part in (
        f"{SECOND}, patches",
        f"{SECOND}, cls",
        "mobilenetv2_035",
        "pixels",
        "img9",
        "tok9",
        "intruder",
        "kept",
        "stability of concepts",
    ):
        assert part in ran.out, part
    for name in (
        "concepts", "sub-units", "random concepts", "concepts, random weights", "sub-units, random weights",
        "hidden units", "k-means directions of x",
    ):  # fmt: skip
        assert any(line.startswith(name) for line in ran.out.splitlines()), name
    assert ran.out.rstrip().endswith("not yet meaningful to people.")
    assert "note:" in ran.err and "evaluation.json" in ran.err
    document = json.loads((checkpoint / "evaluation.json").read_text())
    seconds = document["seconds"]
    assert seconds.keys() >= {"encoders", "baseline kmeans", "stability", "random network", "fidelity", "effects"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"] + 1
    longest = max((name for name in seconds if name != "total"), key=seconds.__getitem__)
    assert f"{seconds['total']:.0f} seconds: {longest} {seconds[longest]:.0f}, " in ran.err
    assert document["settings"]["baselines"]["baselines"] == ["hidden", "kmeans"]
    own = next(line for line in ran.out.splitlines() if line.startswith("concepts  "))
    assert own.split()[2:4] == ["yes", "100%"] and "layer's place, 54 images" in ran.out
    assert (checkpoint / "evaluation" / f"{SECOND}.patches.clarity.png").is_file()


def test_json(run: Run, checkpoint: Path) -> None:
    ran = run(
        checkpoint, "--encoder", "pixels", "--baselines", "none", "--no-stability", "--no-random-network",
        "--fidelity-images", 0, "--json",
    )  # fmt: skip
    assert ran.code == 0 and ran.document == json.loads((checkpoint / "evaluation.json").read_text())
    sets = ran.document["layers"][0]["sets"]
    assert not [s for s in sets if "random weights" in s["name"] or s["top1_kept"]]
    assert [e["name"] for e in ran.document["encoders"]] == ["pixels"]


def test_a_factory_as_encoder(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "judge.py"
    file.write_text("import timm\n\ndef judge():\n    return timm.create_model('mobilenetv2_035', num_classes=3)\n")
    ran = run(checkpoint, "--encoder-factory", f"{file}:judge", "--baselines", "none", "--no-stability", "--json")
    assert ran.code == 0 and [e["name"] for e in ran.document["encoders"]] == ["judge", "pixels"]


def test_what_a_user_can_put_right(run: Run, checkpoint: Path, weights: Path, vit: Rewritten, tmp_path: Path) -> None:
    refused(run(tmp_path / "none"), "not a directory")
    refused(run(checkpoint, "--images", vit.folder), "calibrated on", "50")
    refused(run(checkpoint, "--baselines", "hidde"), "Did you mean hidden")
    refused(run(checkpoint, "--encoder", "pixels", "--encoder-weights", weights), "--encoder-weights")
    refused(run(checkpoint, "--encoder", "no_such_model", "--encoder-weights", weights), "no_such_model")
    own = tmp_path / "own.py"
    own.write_text(
        "import timm\nfrom support import tiny_vit\n\ndef renamed():\n    return tiny_vit()\n", encoding="utf-8"
    )
    refused(run(checkpoint, "--encoder-factory", f"{own}:renamed"), "the evaluated model itself")
    assert not (checkpoint / "evaluation.json").exists()


def test_known_properties(run: Run, checkpoint: Path, scored: Path, tmp_path: Path) -> None:
    file = tmp_path / "truth.json"
    file.write_text(json.dumps({"early": [p.name for p in sorted(scored.iterdir())[:30]]}))
    few = ("--baselines", "none", "--no-stability", "--effect-images", 0)
    ran = run(checkpoint, *few, "--truth", file)
    assert ran.code == 0 and "AUC of early, chosen on half of the images and reported on the others: " in ran.out
    assert "best concept or sub-unit less best random concept or sub-unit: " in ran.out
    refused(run(checkpoint, *few, "--truth", tmp_path / "none.json"), "none.json")
    file.write_text('["a.png"]')
    refused(run(checkpoint, *few, "--truth", file), "does not name files by property")


def test_class_groups(run: Run, checkpoint: Path, vit: Rewritten, tmp_path: Path) -> None:
    file = tmp_path / "groups.json"
    file.write_text(json.dumps({"some": [0, 1, "cat", 4], "others": [3, 5, 6]}))
    few = ("--baselines", "hidden", "--no-stability", "--no-random-network", "--fidelity-images", 0)
    ran = run(checkpoint, *few, "--class-groups", file, "--effect-images", 4)
    assert ran.code == 0, ran
    assert "attribution against true effect" in ran.out and "side effect of steering class groups" in ran.out
    document = json.loads((checkpoint / "evaluation.json").read_text())
    (layer, *_) = document["layers"]
    groups, rows = layer["class_groups"], layer["attribution_against_effect"]
    assert groups["groups"] and {s["name"] for s in groups["sets"]} == {"concepts", "random concepts", "hidden units"}
    for one in groups["comparisons"]:
        kind = one["figure"].split("_")[-1]
        said = f"at equal {kind}, concepts' side effect over that of {one['against']}: "
        assert said in " ".join(ran.out.split())
    assert {r["features"] for r in rows} == {"own", "random partition"}
    for content, said in (
        ({"some": ["cta"]}, "Did you mean cat"), ({"some": [7]}, "classes 0 to 6"), ({"some": [True]}, "by group"),
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        refused(run(checkpoint, *few, "--class-groups", file), said)


def test_without_matplotlib_it_says_so_before_the_work(
    run: Run, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else found(name, *a))
    refused(run(checkpoint), "elude-serving[evaluate]")
