"""The options that say which model: what they build together, what is said on the way, what they refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import CLASSES, LABELS, VIT, VIT_ARGS, Run, manifest_of, refused, tiny_vit
from torch import nn

import elude_runtime as elude
from elude_runtime.cli.model_options import ModelOptions, data_config, read_labels
from elude_runtime.errors import EludeError, ModelError

ARGS = [f"{k}={v}" for k, v in VIT_ARGS.items() if k not in ("num_classes", "img_size")]
MODEL_ARGS = [part for pair in ARGS for part in ("--model-arg", pair)]
QUICK = ["--subunits", "4", "--concepts", "4", "--tokens", "10", "--max-images", "6"]


def saved(model: nn.Module, file: Path) -> Path:
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, file)
    return file


@pytest.fixture
def body(tmp_path: Path) -> Path:
    """A ViT without a head."""
    return saved(tiny_vit(num_classes=0), tmp_path / "body.safetensors")


@pytest.fixture
def probe(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(3)
    draw = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    torch.save({"fc.weight": draw(CLASSES, 32), "fc.bias": draw(CLASSES)}, tmp_path / "probe.pt")
    return tmp_path / "probe.pt"


class TestHead:
    def test_rewrite_and_verify(self, run: Run, tmp_path: Path, pictures: Path, body: Path, probe: Path) -> None:
        (tmp_path / "labels.txt").write_text("\n".join(LABELS))
        source = [*MODEL_ARGS, "--weights", body, "--head", probe, "--input-size", 32]
        made = run("rewrite", VIT, *source, "--images", pictures, "--out", tmp_path / "c", *QUICK, "--labels",
                   tmp_path / "labels.txt")  # fmt: skip
        assert made.code == 0, made.err
        manifest = manifest_of(tmp_path / "c")
        assert manifest.output == "logits" and manifest.labels == LABELS and manifest.model.args["num_classes"] == 7
        checked = run("verify", tmp_path / "c", "--base", VIT, *source, "--images", pictures, "--json")
        assert checked.code == 0 and json.loads(checked.out)["holds"] is True
        model, bare, head = elude.load(tmp_path / "c"), tiny_vit(num_classes=0), torch.load(probe)
        x = torch.randn(5, 3, 32, 32)
        with torch.no_grad():
            expected = bare(x) @ head["fc.weight"].T + head["fc.bias"]
            torch.testing.assert_close(model(x), expected, rtol=1e-6, atol=1e-5)

    def test_another_probe_is_another_base(
        self, run: Run, tmp_path: Path, pictures: Path, body: Path, probe: Path
    ) -> None:
        source = [*MODEL_ARGS, "--weights", body, "--input-size", 32]
        assert (
            run("rewrite", VIT, *source, "--head", probe, "--images", pictures, "--out", tmp_path / "c", *QUICK).code
            == 0
        )
        torch.save({"weight": torch.randn(CLASSES, 32)}, tmp_path / "other.pt")
        ran = run(
            "verify", tmp_path / "c", "--base", VIT, *source, "--head", tmp_path / "other.pt", "--images", pictures
        )
        assert ran.code == 1 and "2 tensors differ" in ran.out.replace("\n", " ")

    def test_without_a_body(self, run: Run, tmp_path: Path, pictures: Path, probe: Path) -> None:
        common = ["--head", probe, "--images", pictures, "--out", tmp_path / "c"]
        refused(run("rewrite", VIT, *MODEL_ARGS, *common), "--head is a probe on a trained body")

    def test_with_a_factory(self, run: Run, tmp_path: Path, pictures: Path, probe: Path) -> None:
        (tmp_path / "build.py").write_text("import timm\ndef make():\n    return timm.create_model('test_vit')\n")
        common = ["--head", probe, "--images", pictures, "--out", tmp_path / "c"]
        refused(
            run("rewrite", "--model-factory", f"{tmp_path / 'build.py'}:make", *common), "--head is for timm models"
        )


class TestLabels:
    def test_a_model_without_classes(self, run: Run, tmp_path: Path, pictures: Path, body: Path) -> None:
        (tmp_path / "labels.txt").write_text("\n".join(LABELS))
        common = ["--images", pictures, "--out", tmp_path / "c", "--labels", tmp_path / "labels.txt"]
        refused(run("rewrite", VIT, *MODEL_ARGS, "--weights", body, "--input-size", 32, *common), "--head")

    def test_a_factorys_model_that_does_not_say_how_many(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        (tmp_path / "build.py").write_text(
            "from torch import nn\n"
            "def make():\n"
            "    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))\n"
        )
        (tmp_path / "labels.txt").write_text("\n".join(LABELS))
        common = ["--images", pictures, "--out", tmp_path / "c", "--labels", tmp_path / "labels.txt"]
        refused(
            run("rewrite", "--model-factory", f"{tmp_path / 'build.py'}:make", *common), "7 classes, the model has 6"
        )

    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("a.txt", "ant\n\n bee \n"),
            ("a.json", '["ant", "bee"]'),
            ("a.json", '[{"index": 1, "label": "bee"}, {"index": 0, "name": "ant"}]'),
        ],
    )
    def test_forms(self, tmp_path: Path, name: str, text: str) -> None:
        (tmp_path / name).write_text(text)
        assert read_labels(tmp_path / name, 2) == ["ant", "bee"]
        with pytest.raises(EludeError, match="names 2 classes, the model has 3"):
            read_labels(tmp_path / name, 3)
        with pytest.raises(EludeError, match="the model has none: leave --labels out"):
            read_labels(tmp_path / name, 0)

    def test_no_file(self) -> None:
        assert read_labels(None, 5) is None


class TestWeights:
    def test_notes_are_shown(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        tensors = tiny_vit(num_classes=3).state_dict()
        ema = {f"module.{n}": t * 0.5 if t.is_floating_point() else t for n, t in tensors.items()}
        torch.save({"state_dict": dict(tensors), "state_dict_ema": ema, "epoch": 7}, tmp_path / "last.pth.tar")
        ran = run("rewrite", VIT, *MODEL_ARGS, "--weights", tmp_path / "last.pth.tar", "--input-size", 32, "--images",
                  pictures, "--out", tmp_path / "c", *QUICK)  # fmt: skip
        assert ran.code == 0 and "holds state_dict_ema and state_dict; state_dict_ema was taken." in ran.err
        model = elude.load(tmp_path / "c")
        assert model.base.num_classes == 3 and torch.equal(model.base.norm.weight, tensors["norm.weight"] * 0.5)

    def test_layers_takes_the_input_size(self, run: Run, body: Path) -> None:
        ran = run("layers", VIT, *MODEL_ARGS, "--weights", body, "--input-size", 32, "--json")
        assert ran.code == 0 and json.loads(ran.out)
        refused(run("layers", VIT, *MODEL_ARGS, "--weights", body, "--input-size", 64), "--input-size 3,32,32")

    def test_types_that_do_not_run_together(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        mixed = tiny_vit().half()
        mixed.head.float()
        file = saved(mixed, tmp_path / "mixed.safetensors")
        common = ["--input-size", 32, "--images", pictures, "--out", tmp_path / "c", *QUICK]
        refused(run("rewrite", VIT, *MODEL_ARGS, "--weights", file, *common), "mixes float16 and float32", "one type")
        assert not (tmp_path / "c").exists()

    @pytest.mark.parametrize("size", ["0", "3,32", "3,32,32,32", "a", "32.5", "3,-32,32", "nan"])
    def test_sizes_that_are_none(self, size: str) -> None:
        with pytest.raises(EludeError, match="input.size"):
            ModelOptions(VIT, args=tuple(ARGS), input_size=size).build()

    def test_one_channel(self, run: Run, tmp_path: Path, pictures: Path) -> None:
        ran = run("rewrite", VIT, *MODEL_ARGS, "--input-size", "1,32,32", "--images", pictures, "--out", tmp_path / "c")
        refused(ran, "3, HEIGHT, WIDTH")

    def test_random_only_without_any_source(self, tmp_path: Path) -> None:
        assert ModelOptions(VIT).random
        assert not ModelOptions(VIT, pretrained=True).random
        assert not ModelOptions(VIT, weights=tmp_path).random
        assert not ModelOptions(None, factory="x.py:f").random

    def test_a_factorys_weights(self, tmp_path: Path) -> None:
        (tmp_path / "build.py").write_text("from torch import nn\ndef make(n):\n    return nn.Linear(3, n)\n")
        torch.save({"module.weight": torch.ones(2, 3), "module.bias": torch.ones(2)}, tmp_path / "w.pt")
        options = ModelOptions(None, factory=f"{tmp_path / 'build.py'}:make", args=("n=2",), weights=tmp_path / "w.pt")
        base = options.build()
        assert torch.equal(base.model.weight, torch.ones(2, 3)) and base.source.args == {"n": 2}
        with pytest.raises(ModelError, match="2 of another shape"):
            ModelOptions(
                None, factory=f"{tmp_path / 'build.py'}:make", args=("n=3",), weights=tmp_path / "w.pt"
            ).build()


class TestDataConfig:
    def test_what_is_assumed_is_told(self) -> None:
        notes: list[str] = []
        made = data_config(nn.Conv2d(3, 3, 1), None, "0.1,0.2,0.3", None, None, 1.0, None, notes)
        assert made.mean == (0.1, 0.2, 0.3) and made.crop_pct == 1.0 and made.input_size == (3, 224, 224)
        assert len(notes) == 1 and "input_size (3, 224, 224), std" in notes[0] and "bicubic" in notes[0]
        assert "mean (" not in notes[0] and "crop_pct" not in notes[0]

    def test_timms_models_say_it(self) -> None:
        notes: list[str] = []
        assert data_config(tiny_vit(), None, None, None, None, None, "squash", notes).crop_mode == "squash"
        assert notes == []

    def test_everything_given(self) -> None:
        notes: list[str] = []
        given: list[Any] = ["3,8,16", "0,0,0", "1,1,1", "nearest", 0.5, "border"]
        made = data_config(nn.Conv2d(3, 3, 1), *given, notes)
        assert made.input_size == (3, 8, 16) and notes == []
