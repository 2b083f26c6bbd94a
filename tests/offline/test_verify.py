"""The certificate: it holds for what is right, and each planted fault is caught by its own check."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Rewritten
from PIL import Image
from support import SECOND, encoded, needs_compiler, picture, tamper, tiny_vit
from torch import Tensor

from elude_runtime.errors import CheckpointError, SettingsError
from elude_runtime.network.explicit import explicit_model
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.offline import verify_outputs
from elude_runtime.offline.images import ImageSource
from elude_runtime.offline.verify import (
    VERIFICATION,
    Verification,
    check_additivity,
    check_explicit,
    check_preprocessing,
    verify,
)
from elude_runtime.offline.verify_outputs import check_compiled

CHECKS = {"tensors", "partition", "logits", "additivity", "means", "explicit", "preprocessing", "top1_agreement"}


def run(r: Rewritten, checkpoint: Path, images: Path | Tensor | None = None, **options: Any) -> Verification:
    source = images if images is not None else r.folder if r.folder is not None else r.images
    return verify(checkpoint, r.base, options.pop("data", r.data), source, write=False, **options)


def failing(result: Verification) -> set[str]:
    return {c.name for c in result.checks if c.holds is False}


def change(name: str, place: tuple[int, ...], value: float) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name][place] = value

    return apply


def flip(name: str, bit: int, element: int = 11) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(torch.int32).view(-1)[element] ^= 1 << bit if bit < 31 else -(1 << 31)

    return apply


class TestHolds:
    def test_for_a_vit_on_its_calibration_folder(self, vit: Rewritten) -> None:
        result = run(vit, vit.path, batch_sizes=(1, 5))
        assert result.holds and {c.name for c in result.checks} == CHECKS and result.images == 24
        figures = {c.name: c.figures for c in result.checks}
        assert figures["means"]["recomputed"] is True
        assert figures["explicit"]["float64"] <= 1e-12 < figures["explicit"]["bfloat16"] < 0.5
        assert figures["top1_agreement"]["agreement"] == 1
        for layer in vit.model.layers:
            assert max(figures["additivity"][layer].values()) <= 1e-12

    @pytest.mark.parametrize("name", ["registers", "mobilenet", "headless"])
    def test_for_other_networks_on_other_images(self, name: str, request: pytest.FixtureRequest) -> None:
        r: Rewritten = request.getfixturevalue(name)
        result = run(r, r.path, batch_sizes=(1, 2))
        assert result.holds, [c for c in result.checks if not c.holds]
        assert {c.name for c in result.checks} == CHECKS - {"preprocessing"}

    @needs_compiler
    def test_compiled_too(self, vit: Rewritten) -> None:
        result = run(vit, vit.path, batch_sizes=(1, 3), limit=6, compiled=True)
        check = next(c for c in result.checks if c.name == "compiled")
        assert result.holds and check.holds and check.figures["unequal_rows"] == 0 and check.figures["images"] == 6
        assert 0 < check.figures["difference_to_plain"] < 1e-4

    def test_and_is_written(self, vit: Rewritten, tmp_path: Path) -> None:
        path = tamper(vit.path, tmp_path / "c", seal=False)
        result = verify(path, vit.base, vit.data, vit.folder, limit=4)  # type: ignore[arg-type]
        document = json.loads((path / VERIFICATION).read_text())
        assert document["holds"] is True and document["images"] == 4
        assert document["checkpoint_sha256"] == result.checkpoint_sha256 == vit.model.manifest.checkpoint_sha256
        assert [c["name"] for c in document["checks"]] == [c.name for c in result.checks]
        assert not next(c for c in result.checks if c.name == "means").figures["recomputed"]

    def test_with_pictures_of_every_kind_in_the_folder(self, vit: Rewritten, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 6
        (tmp_path / "turned.jpg").write_bytes(encoded(picture(1), "JPEG", exif=exif))
        (tmp_path / "palette.png").write_bytes(encoded(picture(2).quantize(8)))
        (tmp_path / "cmyk.jpg").write_bytes(encoded(picture(3).convert("CMYK"), "JPEG"))
        (tmp_path / "alpha.png").write_bytes(encoded(picture(4).convert("RGBA")))
        (tmp_path / "broken.png").write_bytes(b"x")
        deep = np.linspace(0, 65535, 40 * 48, dtype=np.uint16).reshape(40, 48)
        (tmp_path / "deep.png").write_bytes(encoded(Image.fromarray(deep)))
        result = run(vit, vit.path, tmp_path)
        assert result.holds, [c for c in result.checks if not c.holds]


class TestExplicit:
    """What the check makes of forms and models that do not run."""

    def test_an_explicit_form_that_does_not_run(self, vit: Rewritten) -> None:
        def broken(dtype: torch.dtype) -> torch.nn.Module:
            raise AttributeError("there is\nno such thing")

        found = check_explicit(vit.base, broken, vit.images)
        assert found.holds is False
        assert found.detail == "The explicit form does not run in float64 (there is no such thing)."

    @pytest.mark.parametrize(("refused", "holds"), [(torch.float64, None), (torch.bfloat16, True)])
    def test_a_base_model_that_does_not_run_in_every_type(
        self, vit: Rewritten, refused: torch.dtype, holds: bool | None
    ) -> None:
        class Picky(torch.nn.Module):
            def __init__(self, inner: torch.nn.Module) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor) -> Tensor:
                if x.dtype == refused:
                    raise RuntimeError("expected another type")
                return self.inner(x)

        layers = {n: (state.partition, state.layout) for n, state in vit.model.states.items()}
        found = check_explicit(Picky(vit.base), lambda dtype: explicit_model(vit.base, layers, dtype), vit.images)
        assert found.holds is holds
        if holds is None:
            assert found.detail == "Not checked: the base model does not run in float64 (expected another type)."
        else:
            assert set(found.figures) == {"float64", "float32"} and "bfloat16" not in found.detail


class TestPlantedFaults:
    """Digests are made to fit, so that each fault has to be found for what it is."""

    @pytest.mark.parametrize("bit", [0, 12, 22, 30, 31])
    def test_a_flipped_weight_bit(self, vit: Rewritten, tmp_path: Path, bit: int) -> None:
        result = run(vit, tamper(vit.path, tmp_path / "c", flip("blocks.2.mlp.fc1.weight", bit)), limit=4)
        assert "tensors" in failing(result)
        assert "blocks.2.mlp.fc1.weight" in next(c for c in result.checks if c.name == "tensors").detail
        result.document()

    @needs_compiler
    def test_another_network_compiled(self, vit: Rewritten, tmp_path: Path) -> None:
        other = copy.deepcopy(vit.base)
        with torch.no_grad():
            other.get_submodule(SECOND).weight[0, 0] += 1  # type: ignore[index, operator]
        source = ImageSource(vit.images, vit.data, batch_size=3)
        check = check_compiled(other, vit.base, source, (1, 3), lambda *_: None)
        assert check.holds is False and check.figures["unequal_rows"] == 6
        tampered = tamper(vit.path, tmp_path / "c", flip(f"{SECOND}.weight", 22))
        result = run(vit, tampered, limit=4, compiled=True)
        assert result.checks[-1].name == "compiled" and result.checks[-1].holds is None and not result.holds

    @pytest.mark.parametrize(
        ("error", "words"),
        [(SettingsError("no compiler"), "no compiler"), (RuntimeError("no program"), "did not run: no")],
    )
    def test_what_cannot_be_compiled_is_not_checked(
        self, vit: Rewritten, monkeypatch: pytest.MonkeyPatch, error: Exception, words: str
    ) -> None:
        def fails(*_: object) -> None:
            raise error

        monkeypatch.setattr(verify_outputs, "CompiledNetwork", fails)
        result = run(vit, vit.path, limit=4, compiled=True)
        check = result.checks[-1]
        assert check.name == "compiled" and check.holds is None and words in check.detail
        assert result.holds and {c.name for c in result.checks} == {*CHECKS, "compiled"}

    def test_a_flipped_weight_bit_of_the_split_layer(self, vit: Rewritten, tmp_path: Path) -> None:
        result = run(vit, tamper(vit.path, tmp_path / "c", flip(f"{SECOND}.weight", 22)), limit=4)
        assert {"tensors", "additivity", "logits"} <= failing(result)

    def test_a_weight_that_is_not_a_number(self, vit: Rewritten, tmp_path: Path) -> None:
        path = tamper(vit.path, tmp_path / "c", change(f"{SECOND}.weight", (2, 3), float("nan")))
        result = verify(path, vit.base, vit.data, vit.folder, limit=4)  # type: ignore[arg-type]
        assert {"tensors", "additivity", "explicit", "logits"} <= failing(result)
        assert json.loads((path / VERIFICATION).read_text())["holds"] is False

    def test_an_index_out_of_range(self, vit: Rewritten, tmp_path: Path) -> None:
        result = run(
            vit, tamper(vit.path, tmp_path / "c", change(f"elude.{SECOND}.partition", (0, 3, 5), 200)), limit=4
        )
        assert failing(result) == {"partition"}
        assert "sub-unit 200" in next(c for c in result.checks if c.name == "partition").detail

    def test_a_concept_without_members(self, vit: Rewritten, tmp_path: Path) -> None:
        result = run(vit, tamper(vit.path, tmp_path / "c", change(f"elude.{SECOND}.concept", (0, 3, 0), 500)), limit=4)
        assert failing(result) == {"partition"}

    @pytest.mark.parametrize(("place", "by"), [((0, 3, 1), 0.1), ((1, 7, 0), -0.02), ((0, 20, 4), 0.02)])
    def test_a_wrong_mean(self, vit: Rewritten, tmp_path: Path, place: tuple[int, int, int], by: float) -> None:
        def move(tensors: dict[str, Tensor]) -> None:
            tensors[f"elude.{SECOND}.mean"][place] += by

        result = run(vit, tamper(vit.path, tmp_path / "c", move))
        assert failing(result) == {"means"}

    def test_an_overlapping_explicit_mask(self, vit: Rewritten) -> None:
        layers = {n: (state.partition, state.layout) for n, state in vit.model.states.items()}

        def overlapping(dtype: torch.dtype) -> torch.nn.Module:
            wide = explicit_model(vit.base, layers, dtype)
            weights = wide.get_submodule(f"{SECOND}.subunits").weights[0]
            width = vit.model.state(SECOND).partition.subunits + 1
            edge = int(weights[:width, :, 0].abs().sum(0).argmax())
            owner = int(weights[:width, edge, 0].abs().argmax())
            with torch.no_grad():  # one edge in two sub-units
                weights[(owner + 1) % width, edge, 0] = weights[owner, edge, 0]
            return wide

        assert check_explicit(vit.base, lambda dtype: explicit_model(vit.base, layers, dtype), vit.images).holds
        found = check_explicit(vit.base, overlapping, vit.images)
        assert found.name == "explicit" and not found.holds

    def test_an_effective_weight_that_is_not_the_layers(self, vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
        """Additivity is against the base model's own layer, not against our view of its weight."""
        assert check_additivity(vit.model, vit.base, vit.images).holds
        own = LinearMap.weight
        monkeypatch.setattr(LinearMap, "weight", lambda self, *dtype: own(self, *dtype) * (1 + 1e-9))
        assert not check_additivity(vit.model, vit.base, vit.images).holds

    @pytest.mark.parametrize(
        "config",
        [
            {"crop_pct": 0.85},
            {"interpolation": "bilinear"},
            {"mean": [0.5, 0.5, 0.49]},
            {"crop_mode": "squash"},
            {"std": [0.4, 0.5, 0.5]},
        ],
        ids=str,
    )
    def test_changed_preprocessing(self, vit: Rewritten, tmp_path: Path, config: dict[str, Any]) -> None:
        result = run(vit, tamper(vit.path, tmp_path / "c", manifest=lambda m: m["data_config"].update(config)), limit=6)
        assert failing(result) == {"preprocessing"}
        assert next(iter(config)) in next(c for c in result.checks if c.name == "preprocessing").detail

    def test_preprocessing_that_differs_in_name_only_on_these_images(self, vit: Rewritten, tmp_path: Path) -> None:
        """A configuration that happens to give the same tensors here is still another one."""
        square = tmp_path / "square"
        square.mkdir()
        picture(1, 36, 36).save(square / "a.png")
        manifest = vit.model.manifest.model_copy(update={"data_config": {**vit.data.as_dict(), "crop_mode": "border"}})
        assert not check_preprocessing(manifest, vit.data, ImageSource(square, vit.data).encoded()).holds

    def test_another_base_model(self, vit: Rewritten) -> None:
        other = tiny_vit()
        with torch.no_grad():
            other.head.bias[2] += 1e-3
        result = verify(vit.path, other, vit.data, vit.images, write=False)
        assert {"tensors", "logits"} <= failing(result)

    @pytest.mark.parametrize(
        ("name", "digest"), [(f"{SECOND}.bias", "base_sha256"), (f"elude.{SECOND}.std", "partition_sha256")]
    )
    def test_a_digest_that_does_not_fit(self, vit: Rewritten, tmp_path: Path, name: str, digest: str) -> None:
        path = tamper(vit.path, tmp_path / "c", manifest=lambda m: m.update({digest: "0" * 64}), seal=False)
        result = run(vit, path, limit=4)
        assert failing(result) == {"tensors"}
        assert next(c for c in result.checks if c.name == "tensors").figures[digest] is False

    def test_a_model_that_answers_differently(self, vit: Rewritten) -> None:
        """A base model whose forward pass is another, with the same tensors."""
        other = copy.deepcopy(vit.base)
        other.blocks[0].norm1.eps = 1e-2
        result = verify(vit.path, other, vit.data, vit.images, write=False)
        assert "logits" in failing(result) and "tensors" not in failing(result)


def test_what_cannot_be_read_is_an_error_and_no_check(vit: Rewritten, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        run(vit, tmp_path)
    path = tamper(vit.path, tmp_path / "c", lambda t: t.pop(f"elude.{SECOND}.mean"))  # type: ignore[arg-type,return-value]
    with pytest.raises(CheckpointError, match="lacks the tensor"):
        run(vit, path)


def test_a_model_whose_output_is_zero(vit: Rewritten, tmp_path: Path) -> None:
    """A freshly made head of zeros: nothing is relative to the largest output, and everything holds."""

    def zero(tensors: dict[str, Tensor]) -> None:
        tensors["head.weight"].zero_()
        tensors["head.bias"].zero_()

    base = copy.deepcopy(vit.base)
    with torch.no_grad():
        base.head.weight.zero_()
        base.head.bias.zero_()
    path = tamper(vit.path, tmp_path / "c", zero)
    result = verify(path, base, vit.data, vit.images)
    assert result.holds, [c for c in result.checks if not c.holds]


def test_the_base_model_needs_no_loader_of_ours(vit: Rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    """Expected outputs are those of the given model: a loader that forgets a weight is caught."""
    from elude_runtime.offline import verify as module

    load = module.load_weights

    def forgetful(model: torch.nn.Module, tensors: dict[str, Tensor], source: str) -> None:
        load(model, tensors, source)
        with torch.no_grad():
            model.get_parameter("head.bias").zero_()

    monkeypatch.setattr(module, "load_weights", forgetful)
    assert "logits" in failing(run(vit, vit.path, limit=4))
