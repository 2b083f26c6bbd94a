"""The offline commands: layers, rewrite, verify, inspect; exit codes; one sentence for what a user can put right."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Rewritten
from safetensors.torch import load_file, save_file
from support import FIRST, LABELS, SECOND, VIT, VIT_ARGS, Run, refused, tamper, write_pictures
from torch import Tensor

import elude_runtime as elude

MODEL_ARGS = [part for name, value in VIT_ARGS.items() for part in ("--model-arg", f"{name}={value}")]
CONFIG = [
    "--input-size",
    "3,32,32",
    "--mean",
    "0.5,0.5,0.5",
    "--std",
    "0.5,0.5,0.5",
    "--crop-pct",
    "0.9",
    "--interpolation",
    "bicubic",
]
QUICK = ["--subunits", "4", "--concepts", "4", "--tokens", "10", "--batch-size", "8"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten) -> Path:
    file = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(vit.base.state_dict(), file)
    return file


class TestLayers:
    def test_offered_layers_with_the_default_marked(self, run: Run) -> None:
        ran = run("layers", VIT, *MODEL_ARGS)
        assert ran.code == 0
        (line,) = [line for line in ran.out.splitlines() if "default" in line]
        assert SECOND in line and "4x4" in line and "added to the stream" in line
        assert "blocks.1.mlp.fc1" not in ran.out and "--all" in ran.out

    def test_all_with_reasons(self, run: Run) -> None:
        ran = run("layers", VIT, *MODEL_ARGS, "--all")
        assert ran.code == 0 and "blocks.1.mlp.fc1" in ran.out and "nonlinearity" in ran.out

    def test_json(self, run: Run) -> None:
        found = run("layers", VIT, *MODEL_ARGS, "--json").document
        assert [e["name"] for e in found if e["default"]] == [SECOND]
        assert all(e["offered"] for e in found)

    def test_an_unknown_model(self, run: Run) -> None:
        refused(run("layers", "vit_tiny_patch16_225"), "Did you mean", VIT)

    def test_no_model(self, run: Run) -> None:
        refused(run("layers"), "--model-factory")

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--model-arg", "depth"], "NAME=VALUE"),
            (["--model-arg", "colour=red"], "could not be built"),
            (["--model-arg", "depth=three"], "could not be built"),
            (["--input-size", "a"], "--input-size"),
            (["--input-size", "3,32"], "--input-size"),
            (["--input-size", "nan"], "input"),
            (["--input-size", "0"], "input size"),
            (["--input-size", "3,1e400,5"], "input"),
            (["--input-size", "33"], "33"),
            (["--model-factory", "x.py:f"], "--model-factory"),
            (["--weights", "/nowhere.pth"], "is not there"),
        ],
        ids=str,
    )
    def test_bad_options(self, run: Run, arguments: list[str], said: str) -> None:
        refused(run("layers", VIT, *MODEL_ARGS, *arguments), said)


class TestRewrite:
    def test_a_checkpoint_is_made_verified_and_looked_at(
        self, run: Run, tmp_path: Path, pictures: Path, weights: Path, vit: Rewritten
    ) -> None:
        out, labels = tmp_path / "ckpt", tmp_path / "labels.txt"
        labels.write_text("\n".join(LABELS) + "\n")
        made = run(
            "rewrite",
            VIT,
            *MODEL_ARGS,
            "--weights",
            weights,
            "--images",
            pictures,
            "--out",
            out,
            "--labels",
            labels,
            "--layers",
            SECOND,
            *QUICK,
        )
        assert made.code == 0, made.err
        assert "24 images" in made.out and "4 concepts on patches" in made.out and "random" not in made.err
        model = elude.load(out)
        assert model.layers == [SECOND] and model.manifest.labels == LABELS
        assert torch.equal(model(vit.images), vit.base(vit.images))

        checked = run("verify", out, "--base", VIT, *MODEL_ARGS, "--weights", weights, "--images", pictures)
        assert checked.code == 0 and "Every check holds" in checked.out and "FAILS" not in checked.out
        assert json.loads((out / "verification.json").read_text())["holds"] is True

        shown = run("inspect", out)
        assert shown.code == 0 and f"{SECOND}/P0" in shown.out and "verified" in shown.out
        one = run("inspect", out, f"{SECOND}/P0", "--json").document
        assert one["feature"] == f"{SECOND}/P0" and len(one["members"]) == one["size"]
        assert "member" in run("inspect", out, f"{SECOND}/P0").out
        assert run("inspect", out, one["members"][0]).code == 0

    def test_json_and_random_weights(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        made = run(
            "rewrite",
            VIT,
            *MODEL_ARGS,
            "--images",
            pictures,
            "--out",
            tmp_path / "c",
            "--max-images",
            6,
            "--seed",
            4,
            "--json",
            *QUICK,
            *CONFIG,
        )
        assert made.code == 0 and "random" in made.err
        assert made.document["skipped"] == [] and made.document["layers"][0]["name"] == SECOND
        model = elude.load(tmp_path / "c")
        assert made.document["checkpoint_sha256"] == model.manifest.checkpoint_sha256
        assert model.manifest.calibration.images == 6 and model.manifest.seed == 4

    def test_unreadable_images_are_skipped_counted_and_named(self, run: Run, tmp_path: Path) -> None:
        folder = write_pictures(tmp_path / "pictures", 6)
        (folder / "bad.png").write_bytes(b"not an image")
        ran = run("rewrite", VIT, *MODEL_ARGS, "--images", folder, "--out", tmp_path / "c", *QUICK)
        assert (
            ran.code == 0 and "bad.png" in ran.err.replace("\n", "") and "skipped" in ran.err and "6 images" in ran.out
        )
        ran = run("rewrite", VIT, *MODEL_ARGS, "--images", folder, "--out", tmp_path / "d", "--json", *QUICK)
        assert [Path(s["file"]).name for s in ran.document["skipped"]] == ["bad.png"]

    def test_existing_output(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        out = tmp_path / "c"
        out.mkdir()
        (out / "precious").write_text("x")
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--images", pictures, "--out", out, *QUICK), "already there", "--force"
        )
        assert [p.name for p in out.iterdir()] == ["precious"]
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--images", pictures, "--out", out, "--force", *QUICK), "not a checkpoint"
        )
        (out / "precious").rename(out / "elude.json")
        assert (
            run(
                "rewrite", VIT, *MODEL_ARGS, "--images", pictures, "--out", out, "--force", "--max-images", 4, *QUICK
            ).code
            == 0
        )
        assert (out / "elude.json").is_file() and not (out / "precious").exists()

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--layers", "blocks.1.mlp.fc3"], "Did you mean"),
            (["--layers", "blocks.1.mlp.fc1"], "not offered"),
            (["--subunits", "3"], "even"),
            (["--subunits", "1000"], "254"),
            (["--tokens", "1"], "at least 2"),
            (["--images", "/nowhere"], "is not there"),
            (["--mean", "1,2"], "--mean"),
            (["--mean", "nan,0,0"], ""),
            (["--std", "0,1,1"], "std above zero"),
            (["--crop-pct", "0"], "crop_pct"),
            (["--crop-pct", "nan"], "crop_pct"),
            (["--crop-mode", "left"], "crop_mode"),
            (["--interpolation", "nonsense"], "interpolation"),
            (["--input-size", "33"], "33"),
            (["--device", "warp"], "warp"),
            (["--seed", str(10**30)], "seed"),
            (["--labels", "/nowhere.txt"], "labels"),
            (["--weights", "/nowhere.pt"], "is not there"),
        ],
        ids=str,
    )
    def test_bad_input(self, run: Run, tmp_path: Path, pictures: Path, arguments: list[str], said: str) -> None:
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--images", pictures, "--out", tmp_path / "c", *QUICK, *arguments), said
        )
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--concepts", "0"],
            ["--concepts", "70000"],
            ["--batch-size", "0"],
            ["--max-images", "0"],
            ["--subunits", "x"],
            ["--workers", "-1"],
        ],
        ids=str,
    )
    def test_numbers_out_of_range(self, run: Run, tmp_path: Path, pictures: Path, arguments: list[str]) -> None:
        ran = run("rewrite", VIT, *MODEL_ARGS, "--images", pictures, "--out", tmp_path / "c", *QUICK, *arguments)
        assert ran.code == 2 and "Traceback" not in ran.err and arguments[0] in ran.err

    def test_folders_without_images(self, run: Run, tmp_path: Path) -> None:
        empty = tmp_path / "empty"
        empty.mkdir()
        refused(run("rewrite", VIT, *MODEL_ARGS, "--images", empty, "--out", tmp_path / "c", *QUICK), "holds no images")
        (empty / "notes.txt").write_text("x")
        refused(run("rewrite", VIT, *MODEL_ARGS, "--images", empty, "--out", tmp_path / "c", *QUICK), "holds no images")
        (empty / "bad.png").write_text("x")
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--images", empty, "--out", tmp_path / "c", *QUICK),
            "None of the 1 images",
            "bad.png",
        )
        assert not (tmp_path / "c").exists()

    def test_weights_that_do_not_fit(self, run: Run, tmp_path: Path, pictures: Path, weights: Path) -> None:
        tensors = load_file(weights)
        tensors.pop("norm.bias")
        save_file(tensors, tmp_path / "less.safetensors")
        common = ["--images", pictures, "--out", tmp_path / "c", *QUICK]
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--weights", tmp_path / "less.safetensors", *common),
            "1 missing (norm.bias)",
        )
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--model-arg", "num_classes=9", "--weights", weights, *common),
            "of another shape (head",
        )
        (tmp_path / "junk.safetensors").write_bytes(b"junk")
        refused(
            run("rewrite", VIT, *MODEL_ARGS, "--weights", tmp_path / "junk.safetensors", *common),
            "cannot be read as weights",
        )

    def test_labels_that_do_not_fit(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        labels = tmp_path / "labels.json"
        for text, said in (
            ('["a", "b"]', "names 2 classes, the model has 7"),
            ("{", "cannot be read"),
            ('[{"index": 1, "label": "a"}]', "do not number"),
        ):
            labels.write_text(text)
            refused(
                run(
                    "rewrite",
                    VIT,
                    *MODEL_ARGS,
                    "--images",
                    pictures,
                    "--out",
                    tmp_path / "c",
                    "--labels",
                    labels,
                    *QUICK,
                ),
                said,
            )
        labels.write_text(json.dumps([{"index": i, "name": n} for i, n in reversed(list(enumerate(LABELS)))]))
        ran = run(
            "rewrite",
            VIT,
            *MODEL_ARGS,
            "--images",
            pictures,
            "--out",
            tmp_path / "c",
            "--labels",
            labels,
            "--max-images",
            4,
            *QUICK,
        )
        assert ran.code == 0 and elude.load(tmp_path / "c").manifest.labels == LABELS


class TestFactory:
    @pytest.fixture
    def factory(self, tmp_path: Path) -> str:
        (tmp_path / "code").mkdir()
        (tmp_path / "code" / "build.py").write_text(
            f"import timm\n\nARGS = {VIT_ARGS!r}\n\n"
            f"def make(**changes):\n    return timm.create_model({VIT!r}, **{{**ARGS, **changes}})\n"
        )
        return f"{tmp_path / 'code' / 'build.py'}:make"

    def test_rewrite_and_verify(self, run: Run, tmp_path: Path, pictures: Path, factory: str, weights: Path) -> None:
        made = run(
            "rewrite",
            "--model-factory",
            factory,
            "--weights",
            weights,
            "--images",
            pictures,
            "--out",
            tmp_path / "c",
            "--max-images",
            8,
            *QUICK,
        )
        assert made.code == 0, made.err
        base = ["--model-factory", factory, "--weights", weights, "--images", pictures, "--max-images", 8]
        refused(run("verify", tmp_path / "c", *base), "carries code", "--trust-factory")
        checked = run("verify", tmp_path / "c", *base, "--trust-factory", "--json")
        assert checked.code == 0 and checked.document["holds"] is True

    @pytest.mark.parametrize("text", ["build.py", "/nowhere.py:make", "{}:mak", "{}x"])
    def test_bad_factories(self, run: Run, tmp_path: Path, pictures: Path, factory: str, text: str) -> None:
        named = text.format(factory.removesuffix(":make")) if "{}" in text and text != "{}x" else text.format(factory)
        refused(run("rewrite", "--model-factory", named, "--images", pictures, "--out", tmp_path / "c", *QUICK))

    def test_both_a_model_and_a_factory(self, run: Run, tmp_path: Path, pictures: Path, factory: str) -> None:
        refused(
            run("rewrite", VIT, "--model-factory", factory, "--images", pictures, "--out", tmp_path / "c"),
            "one or the other",
        )


def _bit(tensors: dict[str, Tensor]) -> None:
    tensors["norm.weight"].view(torch.int32)[4] ^= 1 << 10


def _edge(tensors: dict[str, Tensor]) -> None:
    tensors[f"elude.{SECOND}.partition"][1, 2, 3] = 99


def _mean(tensors: dict[str, Tensor]) -> None:
    tensors[f"elude.{SECOND}.mean"][0, 5, 1] += 0.05


def _crop(manifest: dict[str, Any]) -> None:
    manifest["data_config"]["crop_pct"] = 0.8


class TestVerify:
    @pytest.mark.parametrize(
        ("tensors", "manifest", "check"),
        [(_bit, None, "tensors"), (_edge, None, "partition"), (_mean, None, "means"), (None, _crop, "preprocessing")],
        ids=["flipped bit", "index out of range", "wrong mean", "crop_pct"],
    )
    def test_planted_faults_end_with_one(
        self, run: Run, vit: Rewritten, weights: Path, tmp_path: Path, tensors: Any, manifest: Any, check: str
    ) -> None:
        path = tamper(vit.path, tmp_path / "c", tensors, manifest)
        arguments = ["--base", VIT, *MODEL_ARGS, "--weights", weights, "--images", vit.folder]
        ran = run("verify", path, *arguments, "--json")
        assert ran.code == 1, ran.err
        failed = {c["name"] for c in ran.document["checks"] if not c["holds"]}
        assert check in failed and (check == "tensors" or failed == {check})
        shown = run("verify", path, *arguments)
        assert shown.code == 1 and any("FAILS" in line and check in line for line in shown.out.splitlines())
        assert "verification FAILED" in run("inspect", path).out

    def test_bad_input(self, run: Run, vit: Rewritten, weights: Path, tmp_path: Path) -> None:
        arguments = ["--base", VIT, *MODEL_ARGS, "--weights", weights, "--images", vit.folder]
        refused(run("verify", tmp_path / "none", *arguments), "is not a directory")
        refused(run("verify", tmp_path, *arguments), "not an ELUDe checkpoint")
        refused(run("verify", vit.path, *arguments, "--batch-sizes", "0"), "--batch-sizes")
        refused(run("verify", vit.path, *arguments, "--batch-sizes", "1,x"), "--batch-sizes")
        refused(run("verify", vit.path, "--images", vit.folder), "--model-factory")
        refused(run("verify", vit.path, *arguments[:-1], tmp_path), "holds no images")

    def test_damaged_and_newer_checkpoints(self, run: Run, vit: Rewritten, weights: Path, tmp_path: Path) -> None:
        arguments = ["--base", VIT, *MODEL_ARGS, "--weights", weights, "--images", vit.folder]
        newer = tamper(vit.path, tmp_path / "newer", manifest=lambda m: m.update(format_version=7))
        refused(run("verify", newer, *arguments), "format version 7")
        shutil.copytree(vit.path, tmp_path / "cut")
        file = tmp_path / "cut" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:5000])
        refused(run("verify", tmp_path / "cut", *arguments), "damaged or cut off")

    def test_the_base_model_of_another_shape(self, run: Run, vit: Rewritten, tmp_path: Path) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        ran = run(
            "verify", tmp_path / "c", "--base", VIT, *MODEL_ARGS, "--model-arg", "depth=2", "--images", vit.folder
        )
        assert ran.code in (1, 2) and "Traceback" not in ran.err


class TestInspect:
    def test_both_layers_are_shown(self, run: Run, vit: Rewritten) -> None:
        ran = run("inspect", vit.path)
        assert ran.code == 0 and FIRST in ran.out and SECOND in ran.out and "6 concepts on patches" in ran.out
        found = run("inspect", vit.path, "--json", "--top", 3).document
        assert len(found["concepts"]) == 3 and found["checkpoint_sha256"] == vit.model.manifest.checkpoint_sha256
        assert "not verified" in found["certificate"]

    def test_unknown_features(self, run: Run, vit: Rewritten) -> None:
        refused(run("inspect", vit.path, f"{SECOND}/P99"), "Did you mean")

    def test_no_checkpoint(self, run: Run, tmp_path: Path) -> None:
        refused(run("inspect", tmp_path), "not an ELUDe checkpoint")
        refused(run("inspect", tmp_path / "none"), "is not a directory")

    @pytest.mark.parametrize("data", [None, b"", b"junk"])
    def test_a_damaged_feature_table(self, run: Run, vit: Rewritten, tmp_path: Path, data: bytes | None) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        table = tmp_path / "c" / "features.parquet"
        table.unlink() if data is None else table.write_bytes(data)
        refused(run("inspect", tmp_path / "c"), "features.parquet")

    def test_a_damaged_certificate(self, run: Run, vit: Rewritten, tmp_path: Path) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        (tmp_path / "c" / "verification.json").write_text("{")
        assert "damaged" in run("inspect", tmp_path / "c").out
        (tmp_path / "c" / "verification.json").write_text('{"checkpoint_sha256": "00"}')
        assert "another checkpoint" in run("inspect", tmp_path / "c").out


def test_help_names_commands_and_exit_codes(run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0 and "Exit codes" in ran.out
    for command in ("layers", "rewrite", "verify", "inspect", "archive", "serve", "health", "demo"):
        assert command in ran.out


def test_version(run: Run) -> None:
    assert run("--version").out.strip() == elude.__version__


def test_an_unknown_command(run: Run) -> None:
    ran = run("rewritte")
    assert ran.code == 2 and "Traceback" not in ran.err
