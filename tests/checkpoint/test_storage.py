"""The checkpoint directory: there and back, all that can be wrong with it, and writing it whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Rewritten
from safetensors.torch import load_file, save_file
from support import SECOND, manifest_of, random_partition, tamper
from torch import Tensor

import elude_runtime as elude
from elude_runtime.checkpoint import storage
from elude_runtime.checkpoint.manifest import read_manifest
from elude_runtime.checkpoint.storage import (
    new_directory,
    partition_tensors,
    read_checkpoint,
    read_partition,
    tensors_sha256,
    write_file,
    write_json,
    write_tensors,
)
from elude_runtime.errors import CheckpointError, EludeError, StorageError
from elude_runtime.offline.feature_table import read_table, replace_table

PARTITION = f"elude.{SECOND}.partition"


def refused(path: Path, said: str) -> None:
    with pytest.raises(CheckpointError, match=said) as caught:
        elude.load(path)
    text = str(caught.value)
    assert "\n" not in text and text.endswith(".")


def test_there_and_back(vit: Rewritten) -> None:
    manifest, base, partitions = read_checkpoint(vit.path)
    assert [e.name for e in manifest.layers] == list(partitions) == vit.model.layers
    expected = vit.base.state_dict()
    assert set(base) == set(expected)
    assert all(base[n].dtype == t.dtype and torch.equal(base[n], t) for n, t in expected.items())
    for name, partition in partitions.items():
        held = vit.model.state(name).partition
        for part in ("edges", "counts", "mean", "std", "concept", "sign"):
            assert torch.equal(getattr(partition, part), getattr(held, part))


def test_tensors_have_the_names_and_types_of_the_interface(vit: Rewritten) -> None:
    stored = load_file(vit.path / "model.safetensors")
    shapes = {
        "partition": (torch.uint8, (2, 32, 128)),
        "subunits": (torch.uint8, (2, 32)),
        "mean": (torch.float32, (2, 32, 5)),
        "std": (torch.float32, (2, 32, 5)),
        "concept": (torch.uint16, (2, 32, 5)),
        "sign": (torch.int8, (2, 32, 5)),
    }
    for part, (dtype, shape) in shapes.items():
        tensor = stored[f"elude.{SECOND}.{part}"]
        assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape)


def test_the_identity_is_the_hash_of_the_canonical_manifest(vit: Rewritten) -> None:
    values = json.loads((vit.path / "elude.json").read_text())
    (copied := manifest_of(vit.path)).canonical()
    assert copied.checkpoint_sha256 == vit.model.manifest.checkpoint_sha256
    reordered = dict(reversed(list(values.items())))
    assert type(copied).model_validate(reordered).checkpoint_sha256 == copied.checkpoint_sha256
    assert copied.model_copy(update={"seed": 99}).checkpoint_sha256 != copied.checkpoint_sha256


def test_digests_see_names_types_shapes_and_bytes() -> None:
    tensor = torch.arange(6.0)
    variants: list[dict[str, Tensor]] = [
        {"a": tensor},
        {"b": tensor},
        {"a": tensor.reshape(2, 3)},
        {"a": tensor.view(torch.int32)},
        {"a": -tensor},
        {"a": tensor, "b": torch.empty(0)},
    ]
    assert len({tensors_sha256(v) for v in variants}) == len(variants)
    assert tensors_sha256({"a": tensor, "b": -tensor}) == tensors_sha256({"b": -tensor, "a": tensor.clone()})
    assert tensors_sha256({"a": torch.arange(12.0)[::2]}) == tensors_sha256({"a": torch.arange(12.0)[::2].contiguous()})


def test_partitions_of_any_kind_there_and_back(vit: Rewritten) -> None:
    entry = vit.model.manifest.layers[1]
    partition = random_partition(3, entry.neurons, entry.inputs, types=2, subunits=entry.subunits)
    again = read_partition(partition_tensors(entry.name, partition), entry)
    for part in ("edges", "counts", "mean", "std", "concept", "sign"):
        assert torch.equal(getattr(again, part), getattr(partition, part))


class TestDamage:
    """Everything that is wrong with a checkpoint is one sentence."""

    def test_not_there(self, tmp_path: Path) -> None:
        refused(tmp_path / "none", "is not a directory")
        (tmp_path / "file").write_text("x")
        refused(tmp_path / "file", "is not a directory")

    def test_foreign_folder(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text("{}")
        refused(tmp_path, "is not an ELUDe checkpoint")

    @pytest.mark.parametrize(
        "text",
        [
            b"",
            b"{",
            b"\xff\xfe\x00",
            b"[]",
            b"null",
            b"3",
            b"{}",
            b'{"format_version": "1"}',
            b"[" * 100_000,
            b'{"format_version": true}',
        ],
        ids=lambda t: repr(t[:20]),
    )
    def test_damaged_manifest(self, vit: Rewritten, tmp_path: Path, text: bytes) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        (tmp_path / "c" / "elude.json").write_bytes(text)
        refused(tmp_path / "c", "damaged|foreign")

    def test_newer_format(self, vit: Rewritten, tmp_path: Path) -> None:
        refused(
            tamper(vit.path, tmp_path / "c", manifest=lambda m: m.update(format_version=2)),
            "format version 2.*install a newer",
        )

    @pytest.mark.parametrize(
        "change",
        [
            lambda m: m.pop("layers"),
            lambda m: m.update(extra=1),
            lambda m: m.update(seed="0"),
            lambda m: m["layers"][0].update(kind="attention"),
            lambda m: m["layers"][0].update(neurons=7),
            lambda m: m["layers"][1].update(subunits=9),
            lambda m: m["layers"][1].update(name="blocks.9.mlp.fc2"),
            lambda m: m["layers"][1].update(name="blocks.1"),
            lambda m: m["layers"][1]["token_types"].pop(),
            lambda m: m["layers"][1].update(prefix=30),
            lambda m: m["layers"][1].update(grid=[5, 5]),
            lambda m: m["model"].update(kind="url"),
        ],
    )  # fmt: skip
    def test_manifests_that_do_not_fit(
        self, vit: Rewritten, tmp_path: Path, change: Callable[[dict[str, Any]], None]
    ) -> None:
        refused(tamper(vit.path, tmp_path / "c", manifest=change), ".")

    @pytest.mark.parametrize("keep", [0, 7, 200, 0.5, 0.99])
    def test_truncated_tensors(self, vit: Rewritten, tmp_path: Path, keep: float) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        file = tmp_path / "c" / "model.safetensors"
        data = file.read_bytes()
        file.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
        refused(tmp_path / "c", "damaged or cut off")

    def test_missing_file(self, vit: Rewritten, tmp_path: Path) -> None:
        shutil.copytree(vit.path, tmp_path / "c")
        (tmp_path / "c" / "model.safetensors").unlink()
        refused(tmp_path / "c", "lacks model.safetensors")

    @pytest.mark.parametrize("part", ["partition", "subunits", "mean", "std", "concept"])
    def test_missing_and_misshapen_tensors(self, vit: Rewritten, tmp_path: Path, part: str) -> None:
        name = f"elude.{SECOND}.{part}"
        refused(tamper(vit.path, tmp_path / "a", lambda t: t.pop(name)), f"lacks the tensor {name}")  # type: ignore[arg-type,return-value]
        refused(
            tamper(vit.path, tmp_path / "b", lambda t: t.update({name: t[name][:, 1:].contiguous()})),
            "the manifest says",
        )
        refused(
            tamper(vit.path, tmp_path / "c", lambda t: t.update({name: t[name].to(torch.int64)})), "the manifest says"
        )

    def test_a_checkpoint_from_before_members_could_fall(self, vit: Rewritten, tmp_path: Path) -> None:
        """Without signs every member rises with its concept."""
        path = tamper(vit.path, tmp_path / "a", lambda t: [t.pop(f"elude.{name}.sign") for name in vit.model.layers])  # type: ignore[arg-type,return-value]
        table = read_table(path)
        replace_table(path, table.drop_columns("sign"))
        assert set(read_table(path)["sign"].to_pylist()) == {1}
        for name in vit.model.layers:
            held, old = vit.model.state(name).partition, elude.load(path).state(name).partition
            assert bool((old.sign == 1).all()) and bool((held.sign == -1).any())
            assert torch.equal(old.concept, held.concept)
        refused(tamper(vit.path, tmp_path / "b", lambda t: t[f"elude.{SECOND}.sign"].fill_(2)), "neither 1 nor -1")  # type: ignore[arg-type,return-value]

    def test_a_base_tensor_that_is_gone(self, vit: Rewritten, tmp_path: Path) -> None:
        path = tamper(vit.path, tmp_path / "c", lambda t: t.pop("head.weight"))  # type: ignore[arg-type,return-value]
        with pytest.raises(EludeError, match=r"1 missing \(head.weight\)"):
            elude.load(path)

    @pytest.mark.parametrize(
        ("name", "which"), [("head.weight", "base"), (f"elude.{SECOND}.mean", "partition"), (PARTITION, "partition")]
    )
    def test_digests(self, vit: Rewritten, tmp_path: Path, name: str, which: str) -> None:
        def flip(tensors: dict[str, Tensor]) -> None:
            data = tensors[name].clone().view(torch.uint8)
            data.view(-1)[3] ^= 1
            tensors[name] = data.view(tensors[name].dtype)

        refused(tamper(vit.path, tmp_path / "c", flip, seal=False), f"its {which} tensors hash to")

    def test_indices_out_of_range(self, vit: Rewritten, tmp_path: Path) -> None:
        def change(tensors: dict[str, Tensor]) -> None:
            tensors[PARTITION][1, 2, 3] = 77

        refused(tamper(vit.path, tmp_path / "c", change), "sub-unit 77")

    def test_never_unpickles(self, vit: Rewritten, tmp_path: Path) -> None:
        class Trap:
            def __reduce__(self) -> tuple:
                return (Path(tmp_path / "ran").touch, ())

        shutil.copytree(vit.path, tmp_path / "c")
        torch.save({"a": Trap()}, tmp_path / "c" / "model.safetensors")
        refused(tmp_path / "c", "damaged or cut off")
        assert not (tmp_path / "ran").exists()


class TestWritingADirectory:
    def test_it_appears_when_it_is_complete(self, tmp_path: Path) -> None:
        out = tmp_path / "deep" / "ckpt"
        with new_directory(out) as work:
            (work / "a").write_text("x")
            assert not out.exists() and work.parent == out.parent
        assert (out / "a").read_text() == "x" and list(out.parent.iterdir()) == [out]
        assert out.stat().st_mode & 0o777 == 0o755

    def test_an_error_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "ckpt") as work:
            (work / "a").write_text("x")
            raise KeyboardInterrupt
        assert list(tmp_path.iterdir()) == []

    def test_an_existing_one_is_refused_or_replaced_at_the_end(self, tmp_path: Path) -> None:
        out = tmp_path / "ckpt"
        out.mkdir()
        (out / "old").write_text("x")
        with pytest.raises(StorageError, match="--force"), new_directory(out):
            raise AssertionError("not reached")
        with pytest.raises(StorageError, match="not a checkpoint"), new_directory(out, force=True):
            raise AssertionError("not reached")
        (out / "old").rename(out / "elude.json")
        with pytest.raises(ValueError, match="planted"), new_directory(out, force=True):
            raise ValueError("planted")
        assert [p.name for p in out.iterdir()] == ["elude.json"]
        with new_directory(out, force=True) as work:
            (work / "new").write_text("y")
            assert (out / "elude.json").exists()
        assert [p.name for p in out.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [out]

    def test_one_that_appeared_meanwhile_is_not_lost(self, tmp_path: Path) -> None:
        out = tmp_path / "ckpt"
        with pytest.raises(StorageError), new_directory(out) as work:
            (work / "new").write_text("y")
            out.mkdir()
            (out / "other").write_text("someone else's")
        assert (out / "other").read_text() == "someone else's"

    def test_an_existing_one_survives_a_failing_rename(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "ckpt"
        out.mkdir()
        (out / "old").write_text("x")
        replace = os.replace

        def fail(source: Any, target: Any) -> None:
            if Path(target) == out and (Path(source) / "new").exists():
                raise OSError(errno.EIO, "planted")
            replace(source, target)

        monkeypatch.setattr(storage.os, "replace", fail)
        with pytest.raises(StorageError), new_directory(out, force=True) as work:
            (work / "new").write_text("y")
        assert (out / "old").read_text() == "x"

    @pytest.mark.parametrize(
        ("number", "said"),
        [
            (errno.ENOSPC, "disk is full"),
            (errno.EDQUOT, "disk is full"),
            (errno.EROFS, "cannot be written to"),
            (errno.EIO, "could not be written"),
        ],
    )
    def test_what_the_disk_says(self, tmp_path: Path, number: int, said: str) -> None:
        with pytest.raises(StorageError, match=said) as caught, new_directory(tmp_path / "ckpt"):
            raise OSError(number, os.strerror(number))
        assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("force", [False, True])
    def test_a_name_that_no_file_can_have(self, tmp_path: Path, force: bool) -> None:
        out = tmp_path / ("c" * 300)
        with pytest.raises(StorageError, match="could not be written"), new_directory(out, force=force):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_parent_that_is_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("x")
        with pytest.raises(StorageError), new_directory(tmp_path / "file" / "ckpt"):
            pass


class TestWritingAFile:
    def test_whole_or_not_at_all(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write_file(tmp_path / "a.json", b"old")

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(storage.os, "fsync", full)
        with pytest.raises(StorageError, match="disk is full"):
            write_file(tmp_path / "a.json", b"new")
        assert (tmp_path / "a.json").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1

    def test_json_has_no_nan(self, tmp_path: Path) -> None:
        write_json(tmp_path / "a.json", {"ä": 1.5})
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1.5}
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(tmp_path / "a.json", {"a": float("nan")})
        assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"ä": 1.5}


def test_tied_and_strided_tensors_are_stored(tmp_path: Path) -> None:
    tied = torch.arange(12.0).reshape(3, 4)
    write_tensors(tmp_path, {"a": tied, "b": tied, "c": tied.T, "d": tied[:, 1]})
    stored = load_file(tmp_path / "model.safetensors")
    assert torch.equal(stored["a"], tied) and torch.equal(stored["b"], tied)
    assert torch.equal(stored["c"], tied.T) and torch.equal(stored["d"], tied[:, 1])


def test_a_full_disk_while_tensors_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise storage.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(storage, "save_file", full)
    with pytest.raises(StorageError, match="disk is full"):
        write_tensors(tmp_path, {"a": torch.zeros(2)})


def test_reading_the_manifest_alone(vit: Rewritten) -> None:
    assert read_manifest(vit.path) == vit.model.manifest


def test_extra_tensors_of_ours_are_noticed(vit: Rewritten, tmp_path: Path) -> None:
    shutil.copytree(vit.path, tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    save_file({**load_file(file), "elude.other.partition": torch.zeros(1, dtype=torch.uint8)}, file)
    refused(tmp_path / "c", "its partition tensors hash to")
