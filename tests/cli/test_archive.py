"""`elude archive`: what is in the archive, and one clear sentence for what goes wrong."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("model_archiver")
from elude_runtime import package_files
from elude_runtime.api.config import ServingConfig
from elude_runtime.checkpoint.manifest import Calibration, Manifest, ModelSource, read_manifest
from elude_runtime.cli.archive import archive, build_archive, default_name
from elude_runtime.cli.server_settings import read_properties
from elude_runtime.errors import CheckpointError, EludeError, StorageError


def write_manifest(folder: Path, model: str) -> None:
    manifest = Manifest(
        format_version=1,
        elude_version="1",
        model=ModelSource(kind="timm", name=model),
        output="logits",
        data_config={},
        labels=[],
        layers=[],
        method={},
        seed=0,
        threads=1,
        versions={},
        calibration=Calibration(images=0, sha256=""),
        base_sha256="",
        partition_sha256="",
    )
    (folder / "elude.json").write_bytes(manifest.canonical())


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    folder = tmp_path / "ckpt"
    (folder / "factory").mkdir(parents=True)
    (folder / "exemplars").mkdir()
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    write_manifest(folder, "vit_tiny_patch16.augreg")
    (folder / "labels.csv").write_text("0,cat\n")
    (folder / "factory" / "build.py").write_text("x = 1\n")
    (folder / "exemplars" / "picture.png").write_bytes(b"png")
    return folder


def names(archive_file: Path) -> set[str]:
    with zipfile.ZipFile(archive_file) as content:
        return set(content.namelist())


def test_holds_checkpoint_package_handler_and_configuration(checkpoint: Path, tmp_path: Path) -> None:
    made = build_archive(checkpoint, tmp_path / "store", name="vit", version="2.1")
    assert made == tmp_path / "store" / "vit.mar"
    held = names(made)
    assert {"elude_handler.py", "model-config.yaml", "MAR-INF/MANIFEST.json"} <= held
    assert {"checkpoint/model.safetensors", "checkpoint/elude.json", "checkpoint/labels.csv"} <= held
    assert {"checkpoint/factory/build.py", "elude_runtime/__init__.py", "elude_runtime/errors.py"} <= held
    assert not [n for n in held if n.startswith("checkpoint/exemplars") or "__pycache__" in n or "shipped" in n]
    package = [name for name in held if name.startswith("elude_runtime/")]
    assert not [name for name in package if name.endswith((".safetensors", ".js", ".css", ".jinja"))]
    with zipfile.ZipFile(made) as content:
        assert content.read("checkpoint/model.safetensors") == b"weights" * 100
        model = json.loads(content.read("MAR-INF/MANIFEST.json"))["model"]
    assert model == {
        "modelName": "vit", "handler": "elude_handler.py", "modelVersion": "2.1", "configFile": "model-config.yaml"
    }  # fmt: skip
    assert os.listdir(tmp_path / "store") == ["vit.mar"]


def test_the_carried_package_runs_from_where_it_is_unpacked(checkpoint: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(build_archive(checkpoint, tmp_path / "store", name="vit")) as content:
        content.extractall(tmp_path / "unpacked")
    code = "import elude_runtime.errors as e; print(e.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "unpacked", capture_output=True, text=True, check=True
    ).stdout
    assert Path(found.strip()) == tmp_path / "unpacked" / "elude_runtime" / "errors.py"


def test_shipped_files_are_found_in_a_wheel_and_in_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package_files, "_PACKAGE", tmp_path / "elude_runtime")
    with pytest.raises(StorageError, match="install the package again"):
        package_files.shipped_file("deploy/x")
    for root in (tmp_path, tmp_path / "elude_runtime" / "shipped"):
        (root / "deploy").mkdir(parents=True)
        (root / "deploy" / "x").write_text("")
        assert package_files.shipped_file("deploy/x") == root / "deploy" / "x"


def test_takes_its_name_from_the_timm_model(checkpoint: Path) -> None:
    assert default_name(checkpoint) == "vit_tiny_patch16-augreg"
    write_manifest(checkpoint, "hf-hub:me/näme")
    assert default_name(checkpoint) == "hf-hub-me-n-me"
    write_manifest(checkpoint, "")
    assert default_name(checkpoint) == "ckpt"
    (checkpoint / "elude.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        default_name(checkpoint)


@pytest.mark.parametrize("missing", ["model.safetensors", "elude.json"])
def test_refuses_an_incomplete_checkpoint(checkpoint: Path, tmp_path: Path, missing: str) -> None:
    (checkpoint / missing).unlink()
    with pytest.raises(CheckpointError, match=missing):
        build_archive(checkpoint, tmp_path / "store", name="vit")
    assert not (tmp_path / "store").exists()


def test_never_replaces_an_archive_unasked(checkpoint: Path, tmp_path: Path) -> None:
    made = build_archive(checkpoint, tmp_path, name="vit")
    before = made.read_bytes()
    with pytest.raises(StorageError, match="--force"):
        build_archive(checkpoint, tmp_path, name="vit", version="9")
    assert made.read_bytes() == before
    build_archive(checkpoint, tmp_path, name="vit", version="9", force=True)
    assert made.read_bytes() != before


@pytest.mark.parametrize(
    ("code", "words"), [(errno.ENOSPC, "is full"), (errno.EACCES, "cannot be written"), (errno.EIO, "failed")]
)
def test_a_refusal_of_the_disk_is_one_sentence_and_leaves_the_old_archive(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    made = build_archive(checkpoint, tmp_path / "store", name="vit")
    before = made.read_bytes()

    def write(self: Any, *arguments: Any, **options: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(zipfile.ZipFile, "write", write)
    with pytest.raises(StorageError, match=words):
        build_archive(checkpoint, tmp_path / "store", name="vit", force=True)
    assert made.read_bytes() == before and os.listdir(tmp_path / "store") == ["vit.mar"]


def test_a_full_disk_while_copying_is_recognised(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`shutil.copytree` reports it inside a list of its own."""

    def copy(source: Any, target: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfile", copy)
    with pytest.raises(StorageError, match="is full"):
        build_archive(checkpoint, tmp_path / "store", name="vit")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", disk], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("megabytes", [1.0, 8.0], ids=["while packing", "before the weights are packed"])
def test_a_disk_that_is_full_keeps_the_old_archive_and_no_part_of_the_new(
    checkpoint: Path, small_disk: Path, megabytes: float
) -> None:
    made = build_archive(checkpoint, small_disk, name="vit")
    before = made.read_bytes()
    filler = small_disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(small_disk).free - 4_500_000))
    (checkpoint / "model.safetensors").write_bytes(os.urandom(int(megabytes * 1e6)))
    with pytest.raises(
        StorageError, match=r"^The disk of \S+ is full: packing \S+ needs up to \d+ MB there\.$"
    ) as said:
        build_archive(checkpoint, small_disk, name="vit", force=True)
    assert int(str(said.value).split(" MB")[0].split()[-1]) > 4.5
    assert made.read_bytes() == before and sorted(os.listdir(small_disk)) == ["filler", "vit.mar"]
    filler.unlink()
    if megabytes < 2:
        build_archive(checkpoint, small_disk, name="vit", force=True)
        assert made.read_bytes() != before


def test_a_file_that_may_not_grow_is_one_sentence_and_leaves_nothing(checkpoint: Path, tmp_path: Path) -> None:
    """A quota of the process in place of a full disk, which needs no root."""
    (checkpoint / "model.safetensors").write_bytes(os.urandom(3_000_000))
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000));"
        "from elude_runtime.cli import main; main()"
    )
    arguments = ["archive", str(checkpoint), "--out", str(tmp_path / "store"), "--name", "vit"]
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert ran.returncode == 2 and "Traceback" not in ran.stderr
    assert re.fullmatch(r"elude: Packing .* failed: .*File too large.*", ran.stderr.strip().splitlines()[-1])
    assert os.listdir(tmp_path / "store") == []


def test_leaves_a_folder_of_the_models_name_in_the_temporary_folder_alone(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The archiver itself would delete $TMPDIR/NAME."""
    (tmp_path / "tmp" / "vit").mkdir(parents=True)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    build_archive(checkpoint, tmp_path / "store", name="vit")
    assert os.listdir(tmp_path / "tmp") == ["vit"]
    assert tempfile.gettempdir() == str(tmp_path / "tmp")


@pytest.mark.parametrize("name", ["a b", "../x", "", "-x", "ä", "a/b", "a.b"])
def test_refuses_names_that_do_not_fit_into_an_address(checkpoint: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(EludeError, match="name"):
        build_archive(checkpoint, tmp_path / "store", name=name)


def test_refuses_a_configuration_that_the_server_would_refuse(checkpoint: Path, tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    refused = {
        "a: [": "YAML",
        "- 1": "keys and values",
        "elude: [1]": "keys and values",
        "elude: {no_such_key: 1}": "no_such_key",
    }
    for text, words in refused.items():
        config.write_text(text)
        with pytest.raises(EludeError, match=words):
            build_archive(checkpoint, tmp_path / "store", name="vit", config=config)
    config.write_text("batchSize: 3\nelude: {}\n")
    with zipfile.ZipFile(build_archive(checkpoint, tmp_path / "store", name="vit", config=config)) as content:
        assert content.read("model-config.yaml") == config.read_bytes()


def test_the_shipped_configuration_shows_every_key_with_its_default() -> None:
    text = package_files.shipped_file("deploy/model-config.yaml").read_text()
    assert yaml.safe_load(text)["elude"] == {}
    shown = yaml.safe_load("\n".join(re.findall(r"^#  (\w+: .*)$", text, re.MULTILINE)))
    assert shown == ServingConfig().model_dump()
    properties = read_properties(package_files.shipped_file("deploy/config.properties"))
    assert ServingConfig().max_response_bytes < int(properties["max_response_size"])
    assert ServingConfig().max_image_bytes * 4 / 3 < int(properties["max_request_size"])


def test_the_command_prints_one_json_document(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive(checkpoint, out=tmp_path / "store", name=None, version="1.0", config=None, force=False, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    made = tmp_path / "store" / "vit_tiny_patch16-augreg.mar"
    assert printed == {
        "archive": str(made), "name": "vit_tiny_patch16-augreg", "version": "1.0", "bytes": made.stat().st_size,
        "sha256": hashlib.sha256(made.read_bytes()).hexdigest(),
        "checkpoint_sha256": read_manifest(checkpoint).checkpoint_sha256,
    }  # fmt: skip
    with pytest.raises(CheckpointError, match="elude rewrite"):
        archive(tmp_path / "nothing")
