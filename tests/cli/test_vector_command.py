"""`elude vector`: what sets two folders apart, kept with a checkpoint, and steered by afterwards."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from PIL import Image, ImageDraw
from support import (
    FIRST,
    SECOND,
    VIT_ARGS,
    VIT_DATA,
    Run,
    encoded,
    manifest_of,
    picture,
    refused,
    tiny_vit,
    write_pictures,
)
from torch import Tensor

import elude_runtime as elude
from elude_runtime.analysis.edits import DenseVector
from elude_runtime.api.config import ServingConfig
from elude_runtime.api.engine import Engine
from elude_runtime.api.intake import Row
from elude_runtime.checkpoint.vectors import StoredVector, read_vectors
from elude_runtime.cli.vector import vector
from elude_runtime.errors import CheckpointError
from elude_runtime.network.preprocessing import decode_image, to_input

COUNT = 8


@pytest.fixture(scope="module")
def sides(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pictures with a bright square in the middle, and the same without."""
    folder = tmp_path_factory.mktemp("sides")
    without = write_pictures(folder / "without", COUNT, first=700)
    for file in sorted(without.iterdir()):
        image = Image.open(file).convert("RGB")
        ImageDraw.Draw(image).rectangle((14, 10, 34, 30), fill=(255, 240, 0))
        (folder / "with").mkdir(exist_ok=True)
        image.save(folder / "with" / file.name)
    return folder / "with", without


@pytest.fixture
def checkpoint(vit: Rewritten, tmp_path: Path) -> Path:
    """A copy of the tiny ViT's checkpoint, to put vectors beside it."""
    return Path(shutil.copytree(vit.path, tmp_path / "ckpt"))


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    """The same network, rewritten with another seed."""
    out = tmp_path_factory.mktemp("again") / "ckpt"
    elude.rewrite(
        tiny_vit(), pictures, out=out, layers=[SECOND, FIRST], subunits=4, concepts=6, tokens=24, seed=9,
        data_config=VIT_DATA, model_args=VIT_ARGS,
    )  # fmt: skip
    return out


@pytest.fixture
def run(run: Run) -> Run:
    """`elude vector ARGUMENTS` in this process, or `steer` or `policy` where that comes first."""
    return lambda *arguments: run(*(arguments if arguments[0] in ("steer", "policy") else ("vector", *arguments)))


def compared(checkpoint: Path, sides: tuple[Path, Path], *options: object) -> tuple[object, ...]:
    return (checkpoint, "--positive", sides[0], "--negative", sides[1], "--layer", SECOND, *options)


def kept(checkpoint: Path, name: str) -> StoredVector:
    return read_vectors(checkpoint, manifest_of(checkpoint).partition_sha256)[name]


def input_of(image: bytes) -> Tensor:
    return to_input(decode_image(image), VIT_DATA.transform())[None]


def inputs(folder: Path) -> Tensor:
    return torch.cat([input_of(file.read_bytes()) for file in sorted(folder.iterdir())])


def output(vit: Rewritten, folder: Path) -> np.ndarray:
    """The second layer's output [N, T, d] in a plain pass, in float64."""
    seen: list[np.ndarray] = []
    handle = vit.base.get_submodule(SECOND).register_forward_hook(lambda _, args, out: seen.append(out.numpy()))
    with torch.no_grad():
        vit.base(inputs(folder))
    handle.remove()
    return seen[0].astype(np.float64)


def concept_peaks(vit: Rewritten, folder: Path) -> dict[str, np.ndarray]:
    """By concept, the activation at the token where it is largest [N]."""
    tokens = vit.model.concepts(inputs(folder), SECOND).numpy().astype(np.float64)
    where = np.abs(tokens).argmax(1)[:, None]  # zero on tokens of the other type
    found = np.take_along_axis(tokens, where, 1)[:, 0]
    return dict(zip(vit.model.concept_names(SECOND), found.T, strict=True))


def test_the_numbers(run: Run, vit: Rewritten, sides: tuple[Path, Path]) -> None:
    ran = run(*compared(vit.path, sides, "--json", "--top", 3))
    assert ran.code == 0, ran.err
    found = ran.document
    assert (found["layer"], found["positive"], found["negative"], found["saved"]) == (SECOND, COUNT, COUNT, None)
    outputs = [output(vit, side).mean((0, 1)) for side in sides]
    np.testing.assert_allclose(found["direction"], outputs[0] - outputs[1], rtol=1e-4, atol=1e-5)
    weights = {f["feature"]: f["weight"] for f in found["features"]}
    ours, theirs = (concept_peaks(vit, side) for side in sides)
    for name in vit.model.concept_names(SECOND):
        difference, pooled = (
            ours[name].mean() - theirs[name].mean(),
            np.sqrt((ours[name].var() + theirs[name].var()) / 2),
        )
        assert weights[name] == pytest.approx(difference / pooled if pooled else 0, rel=1e-3, abs=1e-4)
    assert set(weights) == set(vit.model.concept_names(SECOND))
    sizes = [abs(f["weight"]) for f in found["features"]]
    assert sizes == sorted(sizes, reverse=True)
    squares = sum(size**2 for size in sizes)
    for f in found["features"]:
        assert f["share"] == pytest.approx(f["weight"] ** 2 / squares)
    named = [f["feature"] for f in found["features"] if not f["feature"].endswith("rest")]
    assert [e["feature"] for e in found["edits"]] == named[:3]
    means = [vit.model.concepts(inputs(side), SECOND).numpy() for side in sides]
    for edit in found["edits"]:
        column = vit.model.concept_names(SECOND).index(edit["feature"])
        tokens = slice(0, 1) if "/C" in edit["feature"] else slice(1, None)
        shift = means[0][:, tokens, column].mean() - means[1][:, tokens, column].mean()
        assert edit["mode"] == "add" and edit["value"] == pytest.approx(shift, rel=1e-3, abs=1e-5)
    assert found["auc"] is not None and 0.6 < found["auc"] <= 1


def test_what_is_printed(run: Run, vit: Rewritten, sides: tuple[Path, Path]) -> None:
    found = run(*compared(vit.path, sides, "--json", "--top", 4)).document
    shown = run(*compared(vit.path, sides, "--top", 4)).out
    assert f"{SECOND}  {COUNT} positive, {COUNT} negative images; AUC {found['auc']:.3f}" in shown
    norm = float(np.linalg.norm(np.float32(found["direction"])))
    assert f"direction: 32 numbers, norm {norm:.4g}" in shown and "--save NAME" in shown
    shifts = {e["feature"]: e["value"] for e in found["edits"]}
    lines = [line.split() for line in shown.splitlines() if line.split()[:1] and f"{SECOND}/" in line]
    for f, words in zip(found["features"][:4], lines, strict=True):
        edit = ["add", f"{shifts[f['feature']]:+.3f}"] if f["feature"] in shifts else ["-"]
        assert words == [f["feature"], f"{f['weight']:+.2f}", f"{f['share']:.1%}", *edit]


def test_a_narrow_terminal_cuts_nothing(
    vit: Rewritten, sides: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    vector(vit.path, str(sides[0]), str(sides[1]), layer=SECOND)
    shown = capsys.readouterr().out
    assert "…" not in shown and f"{SECOND}/C" in shown


def test_one_layer_needs_no_name(run: Run, mobilenet: Rewritten, sides: tuple[Path, Path]) -> None:
    ran = run(mobilenet.path, "--positive", sides[0], "--negative", sides[1], "--json", "--max-images", 3)
    assert ran.code == 0 and ran.document["layer"] == mobilenet.layer and ran.document["positive"] == 3
    assert len(ran.document["direction"]) == 112


def test_too_few_images_to_hold_some_out(run: Run, vit: Rewritten, sides: tuple[Path, Path]) -> None:
    ran = run(*compared(vit.path, sides, "--max-images", 1))
    assert ran.code == 0 and "1 positive, 1 negative images; too few images to hold some out" in ran.out
    assert run(*compared(vit.path, sides, "--max-images", 1, "--json")).document["auc"] is None


def test_images_that_cannot_be_read(run: Run, vit: Rewritten, sides: tuple[Path, Path], tmp_path: Path) -> None:
    both = [Path(shutil.copytree(side, tmp_path / side.name)) for side in sides]
    (both[0] / "700.png").write_bytes(b"not an image")
    (both[0] / "701 [b].png").write_bytes(b"")
    ran = run(*compared(vit.path, (both[0], both[1])))
    assert ran.code == 0 and f"{COUNT - 1} positive, {COUNT} negative images" in ran.out
    assert "2 positive images could not be read, the first: " in ran.err and "700.png" in ran.err


class TestKept:
    def test_saved_with_what_was_printed(
        self, run: Run, vit: Rewritten, checkpoint: Path, sides: tuple[Path, Path]
    ) -> None:
        ran = run(*compared(checkpoint, sides, "--save", "square", "--top", 2, "--json"))
        assert ran.code == 0 and ran.document["saved"] == str(checkpoint / "vectors" / "square.json")
        assert [p.name for p in (checkpoint / "vectors").iterdir()] == ["square.json"]
        stored, said = kept(checkpoint, "square"), ran.document
        assert stored.layer == SECOND and stored.partition_sha256 == vit.model.manifest.partition_sha256
        assert (stored.positive, stored.negative, stored.auc) == (COUNT, COUNT, said["auc"])
        assert stored.direction.tolist() == np.float32(said["direction"]).tolist()
        assert stored.edits == said["edits"] and len(stored.edits) == 2
        assert [w.model_dump() for w in stored.weights] == said["features"]
        shown = run(*compared(checkpoint, sides, "--save", "second")).out
        assert f"Kept in {checkpoint / 'vectors' / 'second.json'}" in shown and '{"name": "second"}' in shown

    def test_a_name_that_is_taken(self, run: Run, checkpoint: Path, sides: tuple[Path, Path]) -> None:
        assert run(*compared(checkpoint, sides, "--save", "square")).code == 0
        before = kept(checkpoint, "square").direction
        turned = (sides[1], sides[0])
        refused(run(*compared(checkpoint, turned, "--save", "square")), "square", "already there", "--force")
        assert np.array_equal(kept(checkpoint, "square").direction, before)
        assert run(*compared(checkpoint, turned, "--save", "square", "--force")).code == 0
        np.testing.assert_allclose(kept(checkpoint, "square").direction, -before, rtol=1e-4, atol=1e-6)

    def test_steered_by_its_direction(
        self, run: Run, vit: Rewritten, checkpoint: Path, sides: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert run(*compared(checkpoint, sides, "--save", "square")).code == 0
        file, data = tmp_path / "a.png", encoded(picture(800))
        file.write_bytes(data)
        ran = run("steer", file, "--ckpt", checkpoint, "--vector", "square=-3", "--json")
        assert ran.code == 0, ran.err
        direction = kept(checkpoint, "square").direction
        out = vit.model.steer(input_of(data), vectors=[DenseVector(SECOND, direction, -3.0)])
        assert not torch.allclose(out.steered, out.default, atol=1e-2)
        for change in ran.document["steered"]["changes"]:
            assert change["steered"] == pytest.approx(float(out.steered[0, change["index"]]), abs=1e-4)
        refused(run("steer", file, "--ckpt", checkpoint, "--vector", "circle"), "no vector 'circle'")

    def test_served_under_its_name(self, run: Run, checkpoint: Path, sides: tuple[Path, Path]) -> None:
        assert run(*compared(checkpoint, sides, "--save", "square")).code == 0
        engine = Engine.open(checkpoint, ServingConfig(), name="tiny", version="1.0")
        stored = kept(checkpoint, "square")
        plain = {"layer": SECOND, "vector": [float(str(v)) for v in stored.direction], "strength": 2.0}
        by_name = asked(engine, {"vectors": [{"name": "square", "strength": 2.0}]})
        assert by_name == asked(engine, {"vectors": [plain]}) and by_name["relative_norm"][SECOND] > 0
        edited = asked(engine, {"edits": stored.edits})  # can be sent back as they are
        assert edited["edits_applied"] == len(stored.edits) > 0

    def test_bound_to_its_partition(
        self, run: Run, checkpoint: Path, again: Path, sides: tuple[Path, Path], tmp_path: Path
    ) -> None:
        assert run(*compared(checkpoint, sides, "--save", "square")).code == 0
        other = Path(shutil.copytree(again, tmp_path / "other"))
        shutil.copytree(checkpoint / "vectors", other / "vectors")
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture(800)))
        steer = ("steer", file, "--ckpt", other, "--vector", "square")
        refused(run(*steer), "square", "was made for the partition", "make it again")
        with pytest.raises(CheckpointError, match="partition"):
            Engine.open(other, ServingConfig(), name="tiny", version="1.0")
        refused(run("policy", "set", other, "p", "--vector", "square"), "square", "partition")
        refused(run(*compared(other, sides, "--save", "square")), "--force")
        assert run(*compared(other, sides, "--save", "square", "--force")).code == 0
        assert run(*steer).code == 0

    def test_a_policy_can_name_it(self, run: Run, checkpoint: Path, sides: tuple[Path, Path], tmp_path: Path) -> None:
        assert run(*compared(checkpoint, sides, "--save", "square")).code == 0
        assert run("policy", "set", checkpoint, "no-square", "--vector", "square=-1").code == 0
        file = tmp_path / "a.png"
        file.write_bytes(encoded(picture(800)))
        found = [
            run("steer", file, "--ckpt", checkpoint, *options, "--json").document["steered"]["changes"]
            for options in (("--policy", "no-square"), ("--vector", "square=-1"))
        ]
        assert found[0] == found[1]


def asked(engine: Engine, steer: dict[str, Any]) -> dict[str, Any]:
    """`steered` of the reply to one request."""
    parts = {"image": encoded(picture(801)), "request": json.dumps({"steer": steer}).encode()}
    (answered,) = engine.answer([Row(parts, "multipart/form-data", False, "", "r")])
    assert answered.status == 200, answered.body
    return json.loads(answered.body)["steered"]


class TestRefused:
    @pytest.mark.parametrize("name", ["", "a b", "a/b", "../up", "ä", "x" * 65, "a\n"], ids=repr)
    def test_a_name_that_is_none(self, run: Run, tmp_path: Path, name: str) -> None:
        """Before the work: no checkpoint and no images are there."""
        missing = (tmp_path / "ckpt", "--positive", tmp_path / "a", "--negative", tmp_path / "b", "--save", name)
        refused(run(*missing), "A vector cannot be named", "64 letters")

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            (["--layer", "blocks.1.mlp.fc3"], ["no split layer", "Did you mean", SECOND]),
            (["--positive", "/nowhere/at/all"], ["/nowhere/at/all", "is not there"]),
            (["--negative", "/nowhere/at/all"], ["/nowhere/at/all", "is not there"]),
            (["--device", "warp"], ["warp"]),
        ],
        ids=str,
    )
    def test_bad_options(
        self, run: Run, vit: Rewritten, sides: tuple[Path, Path], options: list[str], said: list[str]
    ) -> None:
        refused(run(*compared(vit.path, sides, *options)), *said)

    def test_no_layer_of_several(self, run: Run, vit: Rewritten, sides: tuple[Path, Path]) -> None:
        refused(run(vit.path, "--positive", sides[0], "--negative", sides[1]), "--layer", FIRST, SECOND)

    @pytest.mark.parametrize("side", [0, 1])
    def test_folders_without_images(
        self, run: Run, checkpoint: Path, sides: tuple[Path, Path], tmp_path: Path, side: int
    ) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        both = (empty, sides[1]) if side == 0 else (sides[0], empty)
        refused(run(*compared(checkpoint, both, "--save", "a")), str(empty))
        (empty / "a.png").write_bytes(b"not an image")
        refused(run(*compared(checkpoint, both, "--save", "a")), "could be read", "a.png")
        assert not (checkpoint / "vectors").exists()

    def test_no_checkpoint(self, run: Run, sides: tuple[Path, Path], tmp_path: Path) -> None:
        refused(run(*compared(tmp_path / "none", sides)), "is not a directory")
