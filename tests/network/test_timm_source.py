"""A timm model from name, folder, weights, probe and input size, and that disk alone builds it again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import VIT, VIT_ARGS, tiny_vit
from timm.models import save_for_hf
from torch import nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import build_timm, load_weights
from elude_runtime.network.conditions import output_size
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.network.timm_source import TimmModel, timm_model

ARGS = {k: v for k, v in VIT_ARGS.items() if k not in ("num_classes", "img_size")}

NAMES = ["ant", "bee", "cat"]
DATA: dict[str, Any] = {
    "mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "crop_pct": 0.8,
    "crop_mode": "border",
}  # fmt: skip


def saved(model: nn.Module, folder: Path) -> Path:
    file = folder / "weights.safetensors"
    save_file({n: t.contiguous().clone() for n, t in model.state_dict().items()}, file)
    return file


def answers_alike(made: TimmModel, other: nn.Module, size: tuple[int, int]) -> bool:
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(made.model(x), other(x))


def built_again(made: TimmModel) -> nn.Module:
    """As a checkpoint is loaded: from name, arguments in JSON, and tensors."""
    again = build_timm(made.name, json.loads(json.dumps(made.args)))
    load_weights(again, made.model.state_dict(), "the checkpoint")
    return again


class TestInputSize:
    @pytest.mark.parametrize("size", [(32, 32), (32, 48), (64, 16)])
    def test_a_transformer_is_built_for_it(self, tmp_path: Path, size: tuple[int, int]) -> None:
        source = tiny_vit(img_size=size)
        made = timm_model(VIT, ARGS, weights=saved(source, tmp_path), input_size=size)
        assert made.args["img_size"] == list(size) and answers_alike(made, source, size)
        assert DataConfig.of_model(made.model).input_size == (3, *size)
        assert answers_alike(made, built_again(made), size)

    @pytest.mark.parametrize(
        ("name", "size"),
        [("test_vit4", (64, 96)), ("swin_tiny_patch4_window7_224", (64, 64)), ("mixer_s32_224", (96, 96))],
    )
    def test_other_architectures_that_are_built_for_one(self, name: str, size: tuple[int, int]) -> None:
        made = timm_model(name, {"num_classes": 3}, input_size=size)
        assert made.args["img_size"] == list(size) and output_size(made.model, (3, *size)) == 3
        assert answers_alike(made, built_again(made), size)

    def test_a_convolutional_network_takes_any(self) -> None:
        made = timm_model("test_resnet", {"num_classes": 3}, input_size=(50, 70))
        assert "img_size" not in made.args and output_size(made.model, (3, 50, 70)) == 3

    def test_a_model_that_resamples_in_its_own_forward_pass(self, tmp_path: Path) -> None:
        args = {**ARGS, "img_size": 32, "dynamic_img_size": True}
        source = tiny_vit(dynamic_img_size=True)
        made = timm_model(VIT, args, weights=saved(source, tmp_path), input_size=(48, 64))
        assert made.args["img_size"] == 32 and answers_alike(made, source, (48, 64))

    def test_its_own_size_changes_nothing(self) -> None:
        assert "img_size" not in timm_model("test_vit4", input_size=(160, 160)).args

    def test_no_multiple_of_the_patch(self) -> None:
        with pytest.raises(ModelError, match="patches of 14 x 14 pixels, and 520 x 530 .* --input-size 3,518,518"):
            timm_model("vit_small_patch14_dinov2", {"depth": 1}, input_size=(520, 530))

    def test_a_contradiction(self) -> None:
        with pytest.raises(ModelError, match="img_size=32 and the input size 48 x 48 contradict"):
            timm_model(VIT, {**ARGS, "img_size": 32}, input_size=(48, 48))
        assert timm_model(VIT, {**ARGS, "img_size": 48}, input_size=(48, 48)).args["img_size"] == 48

    def test_weights_of_another_size(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="for 16 patches and are not resampled: .* --input-size 3,32,32"):
            timm_model(VIT, ARGS, weights=saved(tiny_vit(), tmp_path), input_size=(64, 64))


class TestTogether:
    def test_weights_and_probe(self, tmp_path: Path) -> None:
        """The body may have had another head; the probe takes its place."""
        torch.save({"fc.weight": torch.randn(4, 32), "fc.bias": torch.randn(4)}, tmp_path / "probe.pt")
        for classes in (0, 9):
            body = saved(tiny_vit(num_classes=classes), tmp_path)
            made = timm_model(VIT, ARGS, weights=body, head=tmp_path / "probe.pt", input_size=(32, 32))
            assert made.args["num_classes"] == made.model.num_classes == 4
            assert answers_alike(made, built_again(made), (32, 32))

    def test_a_classifier_that_is_not_wanted(self, tmp_path: Path) -> None:
        source = tiny_vit(num_classes=9)
        made = timm_model(VIT, {**ARGS, "num_classes": 0}, weights=saved(source, tmp_path), input_size=(32, 32))
        source.reset_classifier(0)
        assert made.args["num_classes"] == 0 and answers_alike(made, source, (32, 32))

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ({"pretrained": True, "weights": Path("w.pt")}, "--pretrained and --weights both"),
            ({"head": Path("h.pt")}, "--head is a probe on a trained body"),
            ({"weights": Path("/nowhere/w.pt")}, "w.pt is not there"),
            ({"head": Path("/nowhere/h.pt"), "weights": Path("w.pt")}, "h.pt is not there"),
        ],
        ids=str,
    )
    def test_contradictions(self, options: dict[str, Any], said: str) -> None:
        with pytest.raises(ModelError, match=said):
            timm_model(VIT, VIT_ARGS, **options)

    def test_a_probe_with_another_number_of_classes(self, tmp_path: Path) -> None:
        torch.save({"weight": torch.randn(4, 32)}, tmp_path / "probe.pt")
        body = saved(tiny_vit(num_classes=0), tmp_path)
        with pytest.raises(ModelError, match="has 4 classes and num_classes=7 contradicts"):
            timm_model(VIT, VIT_ARGS, weights=body, head=tmp_path / "probe.pt")

    @pytest.mark.parametrize("name", ["http://example.org/model", "hf-hub:", "nonsense:vit"])
    def test_sources_that_timm_does_not_have(self, name: str) -> None:
        with pytest.raises(ModelError, match="hf-hub:ORG/NAME or local-dir:FOLDER"):
            timm_model(name)


class TestFolder:
    """A folder as timm's own save_for_hf writes it; the hub's files are the same, from elsewhere."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = tiny_vit(num_classes=3, img_size=(48, 32), global_pool="avg")
        config = {"label_names": NAMES, "pretrained_cfg": DATA}
        save_for_hf(model, str(tmp_path / "birds"), model_config=config, safe_serialization=True)
        return tmp_path / "birds"

    def test_everything_in_its_configuration_comes_through(self, folder: Path) -> None:
        made = timm_model(f"local-dir:{folder}", pretrained=True)
        assert answers_alike(made, tiny_vit(num_classes=3, img_size=(48, 32), global_pool="avg"), (48, 32))
        assert made.name == VIT and made.labels == NAMES and not made.notes
        assert DataConfig.of_model(made.model) == DataConfig((3, 48, 32), **DATA)

    def test_the_folder_is_not_needed_again(self, folder: Path) -> None:
        made = timm_model(f"local-dir:{folder}", pretrained=True)
        folder.rename(folder.with_name("gone"))
        assert answers_alike(made, built_again(made), (48, 32))

    def test_a_configuration_without_arguments(self, tmp_path: Path) -> None:
        """As timm wrote it for years: the size is in the data configuration alone."""
        torch.manual_seed(0)
        model = timm.create_model("test_vit4", img_size=48, num_classes=2)
        (tmp_path / "old").mkdir()
        save_file(model.state_dict(), tmp_path / "old" / "model.safetensors")
        data = {"input_size": [3, 48, 48], "fixed_input_size": True, "num_classes": 2, "classifier": "head"}
        config = {"architecture": "test_vit4", "num_classes": 2, "labels": ["no", "yes"], "pretrained_cfg": data}
        (tmp_path / "old" / "config.json").write_text(json.dumps(config))
        made = timm_model(f"local-dir:{tmp_path / 'old'}", pretrained=True)
        assert made.args == {"num_classes": 2, "img_size": [48, 48]}
        assert answers_alike(made, model.eval(), (48, 48)) and answers_alike(made, built_again(made), (48, 48))

    def test_a_probe_in_place_of_its_head(self, folder: Path, tmp_path: Path) -> None:
        torch.save({"weight": torch.randn(6, 32)}, tmp_path / "probe.pt")
        made = timm_model(f"local-dir:{folder}", pretrained=True, head=tmp_path / "probe.pt")
        assert made.model.num_classes == 6 and made.labels == [] and answers_alike(made, built_again(made), (48, 32))

    def test_without_its_head(self, folder: Path) -> None:
        made = timm_model(f"local-dir:{folder}", {"num_classes": 0}, pretrained=True)
        assert made.model.num_classes == 0 and made.labels == []

    def test_a_head_that_would_be_random(self, folder: Path) -> None:
        with pytest.raises(ModelError, match="comes with 3 classes, so a head for num_classes=10 would be random"):
            timm_model(f"local-dir:{folder}", {"num_classes": 10}, pretrained=True)

    def test_resampled_position_embeddings_are_told(self, folder: Path) -> None:
        made = timm_model(f"local-dir:{folder}", pretrained=True, input_size=(96, 64))
        assert len(made.notes) == 1 and "resampled the position embeddings" in made.notes[0]
        assert answers_alike(made, built_again(made), (96, 64))

    def test_without_its_weights(self, folder: Path) -> None:
        made = timm_model(f"local-dir:{folder}")
        assert made.labels == [] and answers_alike(made, built_again(made), (48, 32))

    @pytest.mark.parametrize("text", [None, "{", "[]", '{"architecture": "vit_tiny_patch16_224", "model_args": 3}'])
    def test_folders_that_timm_did_not_write(self, tmp_path: Path, text: str | None) -> None:
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match="holds no config.json"):
            timm_model(f"local-dir:{tmp_path}", pretrained=True)

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"architecture": "vit_of_tomorrow"}, "could not be"),
            ({"model_args": {"checkpoint_path": "/etc/passwd"}}, "checkpoint_path cannot be an argument"),
            ({"model_args": {**ARGS, "embed_dim": 64}}, "weights could not be loaded .*size mismatch"),
        ],
        ids=str,
    )
    def test_configurations_that_do_not_fit(self, folder: Path, change: dict[str, Any], said: str) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        with pytest.raises(ModelError, match=said) as caught:
            timm_model(f"local-dir:{folder}", pretrained=True)
        assert "\n" not in str(caught.value)

    def test_no_weights_beside_it(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(ModelError, match="weights could not be loaded"):
            timm_model(f"local-dir:{folder}", pretrained=True)
