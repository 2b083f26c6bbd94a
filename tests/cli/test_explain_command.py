"""`elude explain`: the engine's own reply, every option of it, a table of it and a picture of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Rewritten
from PIL import Image
from support import FIRST, LABELS, SECOND, Run, encoded, picture, refused

from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine, Row
from elude_runtime.api.schema.reply import Reply
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.cli.explain import parse_target
from elude_runtime.errors import EludeError

P0 = f"{SECOND}/P0"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("explain") / "picture.png"
    file.write_bytes(encoded(picture(500)))
    return file


@pytest.fixture(scope="module")
def engine(vit: Rewritten) -> Engine:
    return Engine.open(vit.path, ServingConfig(max_top_features=5000), name=vit.path.name, version="local")


def answered(engine: Engine, image: Path, document: dict[str, Any]) -> dict[str, Any]:
    parts = {"image": image.read_bytes(), "request": json.dumps(document).encode()}
    (found,) = engine.answer([Row(parts, "multipart/form-data", False, "", "r")])
    assert found.status == 200, found.body
    return without_time(json.loads(found.body))


def without_time(reply: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in reply.items() if k not in ("id", "timing_ms")}


def one_line(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("options", "wish"),
    [
        ([], {}),
        (["--target", "top:2", "--target", "3"], {"targets": [{"top": 2}, 3]}),
        (["--target", "elk"], {"targets": [{"label": "elk"}]}),
        (["--target", "1:5"], {"targets": [{"index": 1, "versus": 5}]}),
        (["--method", "integrated_gradients", "--steps", "3"], {"method": "integrated_gradients", "steps": 3}),
        (["--method", "ablation", "--top", "4"], {"method": "ablation", "top_features": 4}),
        (["--layer", SECOND], {"layers": [SECOND]}),
        (["--level", "subunits", "--sign", "negative"], {"level": "subunits", "sign": "negative"}),
        (["--level", "subunits", "--top", "300"], {"level": "subunits", "top_features": 300}),
        (["--pixels", "--layer", FIRST], {"pixels": True, "layers": [FIRST]}),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else "",
)
def test_json_is_the_engines_reply(
    run: Run, vit: Rewritten, engine: Engine, image: Path, options: list[str], wish: dict[str, Any]
) -> None:
    ran = run("explain", image, "--ckpt", vit.path, "--json", *options)
    assert ran.code == 0, ran.err
    Reply.model_validate_json(ran.out)
    assert without_time(ran.document) == answered(engine, image, {"explain": wish})


def test_the_table_holds_what_the_reply_does(run: Run, vit: Rewritten, engine: Engine, image: Path) -> None:
    options = ["--target", "top1", "--target", "bee", "--method", "ablation", "--top", "3"]
    ran = run("explain", image, "--ckpt", vit.path, *options)
    assert ran.code == 0, ran.err
    wish = {"targets": ["top1", {"label": "bee"}], "method": "ablation", "top_features": 3}
    expected = answered(engine, image, {"explain": wish})
    assert "picture.png" in ran.out and "48 x 40" in ran.out
    for p in expected["predictions"]:
        assert f"{p['probability']:.1%} {p['label']} ({p['index']})" in one_line(ran.out)
    assert ran.out.count("ablation, baseline") == 4 and "bee (1): " in ran.out
    for e in expected["explanations"]:
        for layer in e["layers"]:
            assert layer["layer"] in ran.out
            for f in layer["features"]:
                numbers = f"{f['attribution']:+.4f} {f['activation']:.3g} {f['token']} {f['effect']:+.4f}"
                assert f"{f['feature']} {numbers}" in one_line(ran.out)


def test_a_steered_answer_is_explained_beside_the_default(
    run: Run, vit: Rewritten, engine: Engine, image: Path
) -> None:
    ran = run("explain", image, "--ckpt", vit.path, "--edit", f"{P0}:scale=-3", "--json")
    steer = {"edits": [{"feature": P0, "mode": "scale", "value": -3.0}]}
    expected = answered(engine, image, {"explain": {}, "steer": steer})
    assert without_time(ran.document) == expected
    assert expected["steered"]["explanations"] and expected["answer"]["source"] == "steered"
    shown = run("explain", image, "--ckpt", vit.path, "--edit", f"{P0}:scale=-3").out
    assert shown.count("baseline") == 4 and "steered: " in shown and "edits that acted: 1" in shown


def test_a_drawing(run: Run, vit: Rewritten, engine: Engine, image: Path, tmp_path: Path) -> None:
    """All layers are drawn, and the reply that is printed has the heatmaps that were."""
    file = tmp_path / "out.png"
    ran = run("explain", image, "--ckpt", vit.path, "--png", file, "--json")
    assert ran.code == 0, ran.err
    expected = answered(engine, image, {"explain": {"heatmaps": "values"}})
    assert without_time(ran.document) == expected
    drawn = Image.open(file)
    drawn.load()
    assert drawn.format == "PNG" and drawn.width > 1000
    pixels = np.asarray(drawn.convert("RGB"), dtype=int)
    values = [f["heatmap"]["values"] for e in expected["explanations"][0]["layers"] for f in e["features"]
              if f["heatmap"]]  # fmt: skip
    strong = sum(int((np.abs(v) > 0.9 * np.abs(v).max()).sum()) for v in values)
    coloured = (np.abs(pixels[..., 0] - pixels[..., 2]) > 110).sum()
    assert coloured > 0.5 * strong * 49 * 49  # every tile of 196 pixels has 4 x 4 cells
    one = tmp_path / "one.png"
    assert f"Drawn to {one}" in run("explain", image, "--ckpt", vit.path, "--layer", SECOND, "--png", one).out
    assert Image.open(one).height < drawn.height


def test_pixels_are_drawn(run: Run, vit: Rewritten, image: Path, tmp_path: Path) -> None:
    heights = []
    for options in ([], ["--pixels"]):
        assert run("explain", image, "--ckpt", vit.path, "--png", tmp_path / "o.png", *options).code == 0
        heights.append(Image.open(tmp_path / "o.png").height)
    assert heights[1] > heights[0] + 200


def test_a_model_without_classes(run: Run, headless: Rewritten, image: Path, tmp_path: Path) -> None:
    """Its targets are directions, from a file."""
    refused(run("explain", image, "--ckpt", headless.path), "direction")
    direction = np.linspace(-1, 1, 32).astype(np.float32)
    np.save(tmp_path / "d.npy", direction)
    (tmp_path / "d.json").write_text(json.dumps(direction.tolist()))
    found = [
        run("explain", image, "--ckpt", headless.path, "--target", f"direction:{tmp_path / name}", "--json").document
        for name in ("d.npy", "d.json")
    ]
    assert found[0]["explanations"] == found[1]["explanations"] and found[0]["explanations"][0]["target"]["direction"]
    value = found[0]["explanations"][0]["value"]
    assert value == pytest.approx(float(np.dot(found[0]["embedding"], direction)), abs=1e-4)
    out = tmp_path / "o.png"
    shown = run("explain", image, "--ckpt", headless.path, "--target", f"direction:{tmp_path / 'd.npy'}", "--png", out)
    assert "an embedding of 32 numbers" in shown.out and out.exists()


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("top1", "top1"),
        ("top:3", {"top": 3}),
        ("0", 0),
        ("12:7", {"index": 12, "versus": 7}),
        ("tabby", {"label": "tabby"}),
        ("tabby, tabby cat", {"label": "tabby, tabby cat"}),
        ("label:top1", {"label": "top1"}),
        ("label:7", {"label": "7"}),
        ("top:x", {"label": "top:x"}),
        ("a:b", {"label": "a:b"}),
        ("-1", {"label": "-1"}),
    ],
)
def test_targets(text: str, target: Any) -> None:
    assert parse_target(text) == target


@pytest.mark.parametrize("content", ["[1, NaN]", "[]", "{", "[[1.0]]", '["a"]', "7", '{"a": 1}'])
def test_a_direction_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "d.json").write_text(content)
    with pytest.raises(EludeError, match="direction"):
        parse_target(f"direction:{tmp_path / 'd.json'}")
    with pytest.raises(EludeError, match="direction"):
        parse_target(f"direction:{tmp_path / 'nowhere.npy'}")


def test_labels_are_not_read_as_markup(run: Run, vit: Rewritten, image: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(vit.path, tmp_path / "ckpt")
    manifest = json.loads((copied / "elude.json").read_text())
    manifest["labels"] = [f"[red]{name}[/]" for name in LABELS]
    (copied / "elude.json").write_text(json.dumps(manifest))
    assert read_manifest(copied).labels[0] == "[red]ant[/]"
    ran = run("explain", image, "--ckpt", copied)
    assert ran.code == 0 and "[red]ant[/] (0)" in ran.out


class TestBadInput:
    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--target", "bea"], "bee"),
            (["--target", "7"], "classes 0 to 6"),
            (["--layer", "blocks.1.mlp.fc1"], SECOND),
            (["--method", "magic"], "method"),
            (["--level", "neurons"], "level"),
            (["--sign", "odd"], "sign"),
            (["--top", "0"], "top_features"),
            (["--steps", "0"], "steps"),
            (["--edit", "P0"], "FEATURE:MODE"),
            (["--edit", f"{SECOND}/P99:ablate"], "P99"),
            (["--vector", "stripes"], "stripes"),
            (["--policy", "none"], "none"),
            (["--png", "/nowhere/at/all.png"], "/nowhere/at/all.png"),
            (["--device", "cuda:99"], "cuda:99"),
        ],
        ids=str,
    )
    def test_options(self, run: Run, vit: Rewritten, image: Path, options: list[str], said: str) -> None:
        refused(run("explain", image, "--ckpt", vit.path, *options), said)

    def test_images(self, run: Run, vit: Rewritten, image: Path, tmp_path: Path) -> None:
        refused(run("explain", tmp_path / "none.jpg", "--ckpt", vit.path), "none.jpg", "cannot be read")
        refused(run("explain", tmp_path, "--ckpt", vit.path), "cannot be read")
        (tmp_path / "a.jpg").write_bytes(b"hello")
        refused(run("explain", tmp_path / "a.jpg", "--ckpt", vit.path), "JPEG, PNG or WebP")

    def test_checkpoints(self, run: Run, image: Path, tmp_path: Path) -> None:
        refused(run("explain", image, "--ckpt", tmp_path / "none"), "not a directory")
        assert run("explain", image).code == 2

    def test_a_drawing_of_an_unknown_kind(self, run: Run, vit: Rewritten, image: Path, tmp_path: Path) -> None:
        refused(run("explain", image, "--ckpt", vit.path, "--png", tmp_path / "a.xyz"), ".png")
