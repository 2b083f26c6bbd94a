"""`elude steer`: the engine's own reply to edits, vectors and policies, a table of it and a picture of it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import Rewritten
from PIL import Image
from support import FIRST, SECOND, Run, encoded, picture, refused

import elude_runtime as elude
from elude_runtime.checkpoint.policies import save_policy
from elude_runtime.checkpoint.vectors import StoredVector, save_vector
from elude_runtime.cli import drawing
from elude_runtime.cli.one_image import steer_document, words
from elude_runtime.errors import EludeError
from elude_runtime.network.preprocessing import decode_image, to_input

P0, P1, C0 = f"{SECOND}/P0", f"{SECOND}/P1", f"{SECOND}/C0"


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("steer") / "picture.png"
    file.write_bytes(encoded(picture(501)))
    return file


@pytest.fixture(scope="module")
def stored(vit: Rewritten, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint with a stored vector and a stored policy."""
    path = Path(shutil.copytree(vit.path, tmp_path_factory.mktemp("stored") / "ckpt"))
    digest = vit.model.manifest.partition_sha256
    direction = np.linspace(-1, 1, 32).astype(np.float32)
    save_vector(path, StoredVector("stripes", SECOND, digest, "2026-01-01", direction, [], [], None, 3, 3))
    edits = [{"feature": P0, "mode": "scale", "value": -2.0, "apply": {"box": [0.0, 0.0, 0.5, 1.0]}}]
    save_policy(path, "no-watermark", {"partition_sha256": digest, "edits": edits, "vectors": []})
    return path


def steered(run: Run, image: Path, checkpoint: Path, *options: str) -> dict[str, Any]:
    ran = run("steer", image, "--ckpt", checkpoint, "--json", *options)
    assert ran.code == 0, ran.err
    return ran.document


def test_edits_are_the_models(run: Run, vit: Rewritten, image: Path) -> None:
    found = steered(run, image, vit.path, "--edit", f"{P0}:scale=4", "--edit", f"{FIRST}/C0:ablate")
    tensor = to_input(decode_image(image.read_bytes()), vit.data.transform())[None]
    expected = vit.model.steer(tensor, [elude.Edit(P0, "scale", 4.0), elude.Edit(f"{FIRST}/C0")])
    assert found["answer"]["source"] == "steered" and found["steered"]["edits_applied"] == 2
    assert found["predictions"][0]["logit"] == pytest.approx(float(expected.default.max()), abs=1e-5)
    for change in found["steered"]["changes"]:
        assert change["steered"] == pytest.approx(float(expected.steered[0, change["index"]]), abs=1e-5)


def test_the_table(run: Run, vit: Rewritten, image: Path) -> None:
    options = ["--edit", f"{P0}:scale=4", "--top-k", "3"]
    found, shown = steered(run, image, vit.path, *options), run("steer", image, "--ckpt", vit.path, *options).out
    assert len(found["predictions"]) == 3 and "picture.png" in shown
    for c in found["steered"]["changes"]:
        numbers = f"{c['default']:.4f} {c['steered']:.4f} {c['change']:+.4f}"
        assert f"{c['label']} ({c['index']}) {numbers}" in " ".join(shown.split())
    before, after = found["predictions"][0], found["steered"]["predictions"][0]
    assert f"{before['label']} ({before['index']}) {before['probability']:.1%} -> {after['label']}" in shown
    assert "edits that acted: 1" in shown and f"{SECOND} " in shown


def test_a_stored_vector(run: Run, vit: Rewritten, stored: Path, image: Path) -> None:
    once, twice = (steered(run, image, stored, "--vector", v) for v in ("stripes", "stripes=2"))
    again = steered(run, image, stored, "--vector", "stripes", "--multiplier", "2")
    assert once["steered"]["relative_norm"][SECOND] > 0
    assert twice["steered"]["relative_norm"][SECOND] == pytest.approx(
        2 * once["steered"]["relative_norm"][SECOND], rel=1e-3
    )
    assert twice["steered"]["changes"] == again["steered"]["changes"]
    refused(run("steer", image, "--ckpt", stored, "--vector", "stripe"), "stripe")


def test_a_stored_policy_is_its_edits(run: Run, stored: Path, image: Path) -> None:
    by_name = steered(run, image, stored, "--policy", "no-watermark")
    by_hand = steered(run, image, stored, "--edit", f"{P0}:scale=-2@box=0,0,0.5,1")
    assert by_name["answer"]["policies"] == ["no-watermark"] and by_hand["answer"]["policies"] == []
    assert by_name["steered"]["changes"] == by_hand["steered"]["changes"]
    refused(run("steer", image, "--ckpt", stored, "--policy", "no-watermarks"), "no-watermark")


def test_conflicts(run: Run, vit: Rewritten, image: Path) -> None:
    both = ["--edit", f"{P0}:scale=2", "--edit", f"{P0}:ablate"]
    refused(run("steer", image, "--ckpt", vit.path, *both), P0)
    last = steered(run, image, vit.path, *both, "--conflict", "last")
    alone = steered(run, image, vit.path, "--edit", f"{P0}:ablate")
    assert last["steered"]["changes"] == alone["steered"]["changes"]
    refused(run("steer", image, "--ckpt", vit.path, *both, "--conflict", "first"), "conflict")


class TestDrawing:
    @pytest.fixture
    def drawn(self, monkeypatch: pytest.MonkeyPatch) -> list[Sequence[drawing.Edited]]:
        """What drawings are told of the edits."""
        seen: list[Sequence[drawing.Edited]] = []
        draw = drawing.draw_reply

        def spy(
            image: Image.Image, reply: Any, name: str, edited: Sequence[drawing.Edited], faces: drawing.Faces
        ) -> Image.Image:
            seen.append(edited)
            return draw(image, reply, name, edited, faces)

        monkeypatch.setattr(drawing, "draw_reply", spy)
        return seen

    def test_regions_are_the_cells_that_are_edited(
        self, run: Run, vit: Rewritten, stored: Path, image: Path, tmp_path: Path, drawn: list[Sequence[drawing.Edited]]
    ) -> None:
        """Of the picture, 48 x 40, the model sees 36.6 x 36.6 from (5.7, 2.3), as 4 x 4 cells of 9.14 pixels."""
        options = [
            *["--edit", f"{P0}:scale=3@box=0,0,0.3095,1"],  # to x = 14.856, the first column ends at 14.857
            *["--edit", f"{P1}:ablate@box=0.32,0.52,0.9,0.6"],  # x 15.4 to 43.2, y 20.8 to 24; the row begins at 20.6
            *["--edit", f"{C0}:ablate", "--edit", f"{SECOND}/P2:add=1"],
            *["--vector", "stripes=0.5", "--policy", "no-watermark", "--conflict", "sum"],
        ]
        ran = run("steer", image, "--ckpt", stored, *options, "--png", tmp_path / "o.png")
        assert ran.code == 0, ran.err
        ((policy, left, box, prefix, everywhere, vector),) = drawn
        columns = lambda *names: [[c in names for c in range(4)]] * 4  # noqa: E731
        assert policy.cells == columns(0, 1) and policy.text.startswith("no-watermark: ") and P0 in policy.text
        assert left.cells == columns(0)
        assert box.cells == [[False] * 4, [False] * 4, [False, True, True, True], [False] * 4]
        assert prefix.cells is None
        assert everywhere.cells == vector.cells == [[True] * 4] * 4
        tensor = to_input(decode_image(image.read_bytes()), vit.data.transform())[None]
        column = vit.model.concept_names(SECOND).index(P0)
        activations = vit.model.concepts(tensor, layer=SECOND)[0, 1:, column].reshape(4, 4)
        assert left.feature is not None and left.feature.feature == P0 and left.feature.values is not None
        np.testing.assert_allclose(left.feature.values, activations, atol=1e-5)
        assert abs(left.feature.activation) == np.abs(left.feature.values).max()
        assert prefix.feature is not None and prefix.feature.values is None and vector.feature is None
        pixels = np.asarray(Image.open(tmp_path / "o.png").convert("RGB"))
        assert ((pixels == (225, 112, 0)).all(-1)).sum() > 1000

    def test_an_embedding(self, run: Run, headless: Rewritten, image: Path, tmp_path: Path) -> None:
        feature = f"{headless.layer}/P0"
        options = ["--edit", f"{feature}:scale=5", "--png", str(tmp_path / "o.png")]
        ran = run("steer", image, "--ckpt", headless.path, *options)
        assert ran.code == 0, ran.err
        assert "an embedding of 32 numbers" in ran.out and (tmp_path / "o.png").exists()

    def test_a_layer_of_positions(self, run: Run, mobilenet: Rewritten, image: Path, tmp_path: Path) -> None:
        options = ["--edit", f"{mobilenet.layer}/P0:scale=-5@box=0,0,0.4,0.4", "--png", str(tmp_path / "o.png")]
        assert run("steer", image, "--ckpt", mobilenet.path, *options).code == 0


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"feature": P0, "mode": "ablate"}, f"{P0} ablate"),
        ({"feature": P0, "mode": "set", "value": 2.5, "unit": "std"}, f"{P0} set 2.5 std"),
        ({"feature": P0, "mode": "cap", "value": 0, "side": "positive"}, f"{P0} cap 0, positive side"),
        ({"feature": P0, "mode": "zero", "apply": {"box": [0, 0, 0.5, 1]}}, f"{P0} zero, box 0, 0, 0.5, 1"),
        ({"feature": P0, "mode": "zero", "apply": {"mask": [[1]]}}, f"{P0} zero, mask"),
        ({"feature": P0, "mode": "zero", "apply": {"tokens": "cls"}}, f"{P0} zero, cls"),
        (
            {"feature": P0, "mode": "ablate", "when": {"feature": P1, "op": ">", "value": 2.5}},
            f"{P0} ablate, when {P1} > 2.5",
        ),
        ({"name": "stripes", "strength": 0.5}, "vector stripes times 0.5"),
        ({"layer": SECOND}, f"vector of {SECOND} times 1"),
    ],
)
def test_edits_in_words(document: dict[str, Any], said: str) -> None:
    defaults: dict[str, Any] = {"side": "both", "apply": {"tokens": "all"}, "when": None, "strength": 1.0}
    assert words(defaults | document) == said


def test_the_document() -> None:
    assert steer_document([], None, [], 1.0, "error") is None
    made = steer_document([f"{P0}:ablate"], ["a=-2"], ["b"], 0.5, "sum")
    assert made == {
        "edits": [{"feature": P0, "mode": "ablate"}],
        "vectors": [{"name": "a", "strength": -2.0}],
        "policies": ["b"],
        "strength_multiplier": 0.5,
        "conflict": "sum",
    }
    with pytest.raises(EludeError, match="number"):
        steer_document(None, ["a=much"], None, 1.0, "error")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "--edit"),
        (["--edit", f"{P0}:paint"], "mode"),
        (["--edit", f"{P0}:set"], "value"),
        (["--edit", f"{P0}:ablate@box=0.5,0,0.2,1"], "box"),
        (["--edit", f"{P0}:ablate@cls"], "class"),
        (["--edit", f"{SECOND}/P99:ablate"], "P99"),
        (["--edit", f"{P0}:ablate", "--multiplier", "nan"], ""),
        (["--edit", f"{P0}:ablate", "--top-k", "0"], "top_k"),
        (["--edit", f"{P0}:ablate", "--png", "/nowhere/at/all.png"], "/nowhere"),
    ],
    ids=str,
)
def test_bad_options(run: Run, vit: Rewritten, image: Path, options: list[str], said: str) -> None:
    refused(run("steer", image, "--ckpt", vit.path, *options), said)


def test_a_name_within_the_wrong_one_is_still_suggested(run: Run, image: Path, stored: Path) -> None:
    """`stripes` stands in `stripes2`, and is not what was said."""
    refused(run("steer", image, "--ckpt", stored, "--vector", "stripes2"), "stripes2", "Did you mean stripes?")
