"""Weights files as people have them: wrappers, prefixes, other numbers of classes, published names, other sizes."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import VIT, VIT_ARGS, tiny_vit
from torch import Tensor, nn

from elude_runtime.errors import ModelError
from elude_runtime.network.build import build_timm
from elude_runtime.network.weights import fit_weights, read_weights

DINO = "vit_small_patch14_dinov2"
DINO_ARGS = {"embed_dim": 32, "depth": 2, "num_heads": 2, "img_size": 56}


class TestReading:
    def test_safetensors_and_pytorch_files(self, tmp_path: Path) -> None:
        tensors = {"a": torch.arange(3.0)}
        save_file(tensors, tmp_path / "a.safetensors")
        torch.save(tensors, tmp_path / "a.pth")
        torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "b.pth")
        for name in ("a.safetensors", "a.pth", "b.pth"):
            assert torch.equal(read_weights(tmp_path / name)["a"], tensors["a"])

    def test_a_pickle_that_runs_code_is_not_run(self, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple:
                return (Path(tmp_path / "ran").touch, ())

        torch.save({"a": Trap()}, tmp_path / "a.pth")
        with pytest.raises(ModelError, match="not unpickled"):
            read_weights(tmp_path / "a.pth")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(("name", "data"), [("a.safetensors", b"\x00" * 20), ("a.pth", b"hello"), ("b.pth", b"")])
    def test_damaged_files(self, tmp_path: Path, name: str, data: bytes) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError) as caught:
            read_weights(tmp_path / name)
        assert "\n" not in str(caught.value)

    def test_no_file_and_no_state_dict(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError, match="is not there"):
            read_weights(tmp_path / "none.pth")
        torch.save([1, 2], tmp_path / "list.pth")
        with pytest.raises(ModelError, match="no state dict"):
            read_weights(tmp_path / "list.pth")
        torch.save({"teacher": {"a": torch.zeros(1)}, "epoch": 3}, tmp_path / "dino.pth")
        with pytest.raises(ModelError, match="under state_dict_ema, .* but teacher, epoch; save"):
            read_weights(tmp_path / "dino.pth")
        torch.save({}, tmp_path / "empty.pth")
        with pytest.raises(ModelError, match="nothing"):
            read_weights(tmp_path / "empty.pth")

    def test_wrappers_with_averaged_weights_first(self, tmp_path: Path) -> None:
        by_key = {k: {"a": torch.tensor([float(i)])} for i, k in enumerate(("model", "state_dict", "model_ema"))}
        notes: list[str] = []
        torch.save({**by_key, "epoch": 3, "optimizer": {"lr": 0.1}}, tmp_path / "a.pth")
        assert read_weights(tmp_path / "a.pth", notes)["a"].item() == 2.0
        assert notes == [f"{tmp_path / 'a.pth'} holds model_ema and state_dict and model; model_ema was taken."]
        torch.save({k: by_key[k] for k in ("model", "state_dict")}, tmp_path / "b.pth")
        assert read_weights(tmp_path / "b.pth")["a"].item() == 1.0
        torch.save({"model": by_key["model"], "model_ema": None}, tmp_path / "c.pth")
        notes.clear()
        assert read_weights(tmp_path / "c.pth", notes)["a"].item() == 0.0 and not notes

    def test_names_of_distributed_and_compiled_training(self, tmp_path: Path) -> None:
        names = ("module.a", "_orig_mod.b", "module._orig_mod.c", "_orig_mod.module.d", "submodule.e")
        torch.save({"state_dict": {n: torch.zeros(1) for n in names}}, tmp_path / "a.pth")
        assert list(read_weights(tmp_path / "a.pth")) == ["a", "b", "c", "d", "submodule.e"]

    def test_timms_training_checkpoint_with_its_arguments(self, tmp_path: Path) -> None:
        args = argparse.Namespace(model=VIT, lr=0.1, opt_betas=[0.9, 0.99])
        torch.save({"state_dict": {"a": torch.ones(1)}, "args": args, "arch": VIT}, tmp_path / "last.pth.tar")
        assert read_weights(tmp_path / "last.pth.tar")["a"].item() == 1.0


def builder(name: str, args: dict) -> Callable[[int | None], nn.Module]:
    plain = {k: v for k, v in args.items() if k != "num_classes"}
    return lambda k: build_timm(name, plain if k is None else {**plain, "num_classes": k})


def fitted(
    tensors: dict[str, Tensor],
    classes: int | None = None,
    headless: bool = False,
    name: str = VIT,
    args: dict = VIT_ARGS,
) -> tuple[nn.Module, list[str]]:
    notes: list[str] = []
    return fit_weights(builder(name, args), tensors, "w.pt", notes, classes, headless=headless), notes


def same(model: nn.Module, source: nn.Module, size: int = 32) -> bool:
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return torch.equal(model(x), source.eval()(x))


def dino(**changes: object) -> nn.Module:
    torch.manual_seed(3)
    return timm.create_model(DINO, **{**DINO_ARGS, **changes}).eval()


class TestFitting:
    @pytest.mark.parametrize("classes", [1, 7, 1000])
    def test_the_file_says_the_number_of_classes(self, classes: int) -> None:
        source = tiny_vit(num_classes=classes)
        model, notes = fitted(source.state_dict())
        assert model.num_classes == classes and same(model, source) and not notes

    def test_a_file_without_a_classifier_gives_an_embedding_and_says_so(self) -> None:
        source = tiny_vit(num_classes=0)
        model, notes = fitted(source.state_dict())
        assert model.num_classes == 0 and same(model, source)
        assert notes == ["w.pt has no classifier, so the model's output is its embedding."]

    def test_an_architecture_without_a_head_gets_the_files(self) -> None:
        source = dino(num_classes=4)
        model, _ = fitted(source.state_dict(), name=DINO, args=DINO_ARGS)
        assert model.num_classes == 4 and same(model, source, 56)

    def test_a_convolutional_network(self) -> None:
        torch.manual_seed(0)
        source = timm.create_model("test_resnet", num_classes=3).eval()
        model, _ = fitted(source.state_dict(), name="test_resnet", args={})
        assert model.num_classes == 3 and same(model, source, 64)

    def test_a_given_number_of_classes_is_not_overruled(self) -> None:
        with pytest.raises(ModelError, match=r"2 of another shape \(head.weight, head.bias\)"):
            fitted(tiny_vit(num_classes=5).state_dict(), classes=7)

    def test_a_classifier_can_be_left_out(self) -> None:
        source = tiny_vit(num_classes=5)
        model, notes = fitted(source.state_dict(), headless=True)
        source.reset_classifier(0)
        assert model.num_classes == 0 and same(model, source) and not notes

    def test_a_prefix_that_all_names_share(self) -> None:
        source = tiny_vit(num_classes=4)
        model, notes = fitted({f"model.{n}": t for n, t in source.state_dict().items()})
        assert same(model, source) and "prefix model." in notes[0]

    def test_the_least_misfit_is_told(self) -> None:
        tensors = {f"net.{n}": t for n, t in tiny_vit(num_classes=4).state_dict().items() if n != "norm.bias"}
        with pytest.raises(ModelError, match=r"does not fit the model: 1 missing \(norm.bias\); check"):
            fitted(tensors)

    def test_published_names_are_translated_by_timm_and_that_is_said(self) -> None:
        """The original DINOv2 files hold a mask token that timm's model has not."""
        source = dino()
        tensors = {**source.state_dict(), "mask_token": torch.zeros(1, 32)}
        model, notes = fitted(tensors, name=DINO, args=DINO_ARGS)
        assert same(model, source, 56)
        counts = f"({len(tensors)} tensors became {len(tensors) - 1})"
        assert notes == [f"w.pt: timm's filter for published weights translated it {counts}."]

    def test_registers_of_the_original_files(self) -> None:
        """There the class token has a position embedding of its own; timm's model holds their sum."""
        name = "vit_small_patch14_reg4_dinov2"
        torch.manual_seed(4)
        source = timm.create_model(name, **DINO_ARGS)
        tensors = dict(source.state_dict())
        position = torch.randn(1, 1, 32)
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([position, tensors["pos_embed"]], 1)
        tensors["cls_token"] = tensors["cls_token"] - position
        tensors["mask_token"] = torch.zeros(1, 32)
        model, notes = fitted(tensors, name=name, args=DINO_ARGS)
        torch.testing.assert_close(model.cls_token, source.cls_token)
        assert torch.equal(model.reg_token, source.reg_token) and len(notes) == 1

    @pytest.mark.parametrize("extra", [{}, {"mask_token": torch.zeros(1, 32)}], ids=["timm's", "original"])
    def test_position_embeddings_are_not_resampled(self, extra: dict[str, Tensor]) -> None:
        """timm's filter would do it without a word."""
        tensors = {**dino(img_size=70).state_dict(), **extra}
        with pytest.raises(ModelError, match="for 25 patches and are not resampled: .* --input-size 3,70,70") as caught:
            fitted(tensors, name=DINO, args=DINO_ARGS)
        assert "\n" not in str(caught.value)

    def test_position_embeddings_of_no_square(self) -> None:
        with pytest.raises(ModelError, match="for 12 patches .* --input-size 3,HEIGHT,WIDTH"):
            fitted(dino(img_size=(42, 56)).state_dict(), name=DINO, args=DINO_ARGS)

    def test_weights_of_another_network(self) -> None:
        torch.manual_seed(0)
        with pytest.raises(ModelError, match="w.pt does not fit the model: .* missing .* unknown .*; check"):
            fitted(timm.create_model("test_resnet").state_dict())
