"""`elude archive`: packs a checkpoint, the handler and this package into one model archive for TorchServe."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from elude_runtime.api.config import ServingConfig
from elude_runtime.checkpoint.catalogue import FEATURES_JSON, FEATURES_PARQUET, features_json
from elude_runtime.checkpoint.manifest import MANIFEST, read_manifest
from elude_runtime.cli.archive_digest import archive_sha256
from elude_runtime.errors import CheckpointError, EludeError, StorageError
from elude_runtime.package_files import package_directory, shipped_file

# What serving reads from a checkpoint. Exemplars stay behind: they are pictures for people, and large. The feature
# table goes as JSON, so that a server needs no pyarrow.
TENSORS = "model.safetensors"
_BESIDE = ("factory", "labels.csv", "policies.json", "vectors", "verification.json")
# Of the package, code travels; pages, the demonstration's weights and other data do not.
_DATA_SUFFIXES = {".safetensors", ".npz", ".parquet", ".png", ".jpg", ".webp", ".pyc", ".js", ".css", ".jinja"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def default_name(checkpoint: Path) -> str:
    """The name of the model in `elude.json`, made of letters, digits, `_` and `-`; else the folder's name."""
    return _safe(read_manifest(checkpoint).model.name) or _safe(checkpoint.resolve().name) or "elude"


def build_archive(
    checkpoint: Path, out: Path, *, name: str, version: str = "1.0", config: Path | None = None, force: bool = False
) -> Path:
    """Writes `out/NAME.mar` and gives its path; the file appears complete or not at all.

    A stock TorchServe whose environment has torch, timm, safetensors and pydantic loads it without an installation
    step: the archive holds `checkpoint/`, `elude_runtime/`, the handler and `model-config.yaml`.
    Raises `EludeError` with one sentence: an incomplete checkpoint, a file that is already there, a full disk.
    """
    if not _NAME.fullmatch(name):
        raise EludeError(f"The name {name!r} must be of letters, digits, _ and -, and begin with a letter or digit.")
    if not _VERSION.fullmatch(version):
        raise EludeError(f"The version {version!r} must be of letters, digits, '.', _ and -.")
    read_manifest(checkpoint)
    if not (checkpoint / TENSORS).is_file():
        raise CheckpointError(f"{checkpoint} is incomplete: it has no {TENSORS}; run `elude rewrite` again.")
    settings = config or shipped_file("deploy/model-config.yaml")
    _check_settings(settings)
    target = out / f"{name}.mar"
    if target.exists() and not force:
        raise StorageError(f"{target} exists already; give --force to replace it, or another --name.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Beside the target, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".elude-archive-", dir=out) as scratch:
            os.replace(_pack(checkpoint, Path(scratch), name, version, settings), target)
    except OSError as error:
        raise _storage_error(error, checkpoint, out) from error
    return target


def archive(
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint folder made by `elude rewrite`.")],
    out: Annotated[Path, typer.Option(help="Model store: the folder that gets NAME.mar.")] = Path("model_store"),
    name: Annotated[str | None, typer.Option(help="Model name in the URL; default: from the timm model.")] = None,
    version: Annotated[str, typer.Option(help="Model version in the URL.")] = "1.0",
    config: Annotated[Path | None, typer.Option(help="Your own model-config.yaml.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an archive of the same name.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Pack a checkpoint into a model archive (.mar) for TorchServe."""
    model = name or default_name(checkpoint)
    with Console(stderr=True).status(f"Packing {model}"):
        path = build_archive(checkpoint, out, name=model, version=version, config=config, force=force)
    size, digest = path.stat().st_size, archive_sha256(path)
    served = read_manifest(checkpoint).checkpoint_sha256
    if as_json:
        facts = {"archive": str(path), "name": model, "version": version, "bytes": size, "sha256": digest}
        facts["checkpoint_sha256"] = served
        print(json.dumps(facts))
    else:
        print(f"{path}  ({size / 1e6:.1f} MB, model {model}, version {version})")
        print(f"sha256 {digest}, of its checkpoint {served}")
        print(f"Serve it: elude serve --model-store {out} --models {path.name} --foreground")


def _pack(checkpoint: Path, scratch: Path, name: str, version: str, settings: Path) -> Path:
    """Stages the content in `scratch` and runs the archiver there; gives the archive's path inside `scratch`."""
    stage = scratch / "stage"
    (stage / "checkpoint").mkdir(parents=True)
    for file in (MANIFEST, TENSORS, *_BESIDE):
        if (checkpoint / file).exists():
            # A link: the archiver copies what it points to, and large weights need not be copied twice.
            (stage / "checkpoint" / file).symlink_to((checkpoint / file).resolve())
    if any((checkpoint / table).exists() for table in (FEATURES_JSON, FEATURES_PARQUET)):
        (stage / "checkpoint" / FEATURES_JSON).write_bytes(features_json(checkpoint))
    _copy_package(stage / "elude_runtime")
    return run_archiver(stage, scratch, name, version, settings, "handler/elude_handler.py")


def run_archiver(stage: Path, scratch: Path, name: str, version: str, settings: Path, handler: str) -> Path:
    """Packs what lies in `stage`, with a shipped handler and the model's settings; gives the archive's path inside
    `scratch`."""
    from model_archiver.model_archiver_config import ModelArchiverConfig
    from model_archiver.model_archiver_error import ModelArchiverError
    from model_archiver.model_packaging import generate_model_archive

    made, temporary = scratch / "made", scratch / "tmp"
    for folder in (made, temporary):
        folder.mkdir(parents=True)
    shutil.copyfile(settings, scratch / "model-config.yaml")
    try:
        with _private_archiver(temporary):
            generate_model_archive(
                ModelArchiverConfig(
                    model_name=name,
                    version=version,
                    handler=str(shipped_file(handler)),
                    extra_files=str(stage),
                    export_path=str(made),
                    config_file=str(scratch / "model-config.yaml"),
                    # Weights do not compress, and a stored file loads faster.
                    archive_format="zip-store",  # type: ignore[arg-type, unused-ignore]
                )
            )
    except ModelArchiverError as error:
        raise EludeError(f"The archiver refused: {' '.join(str(error).split())}") from error
    return made / f"{name}.mar"


@contextmanager
def _private_archiver(temporary: Path) -> Iterator[None]:
    """Gives the archiver a temporary folder of its own, for it deletes $TMPDIR/NAME first; and keeps it from logging.

    Two archivers may run at the same time, and a user may have a folder of the model's name there.
    """
    before, disabled = tempfile.tempdir, logging.root.manager.disable
    tempfile.tempdir = str(temporary)
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        tempfile.tempdir = before
        logging.disable(disabled)


def _copy_package(target: Path) -> None:
    """Copies the running package's code, without data, caches and the files that are shipped to be copied elsewhere."""

    def unwanted(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if name in {"__pycache__", "shipped"} or Path(name).suffix in _DATA_SUFFIXES}

    shutil.copytree(package_directory(), target, ignore=unwanted)


def _check_settings(settings: Path) -> None:
    """Refuses a model-config.yaml that the server would refuse later, when nobody looks."""
    import yaml

    try:
        content: Any = yaml.safe_load(settings.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EludeError(f"{settings} cannot be read as YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or not isinstance(content.get("elude") or {}, dict):
        raise EludeError(f"{settings} and its section `elude` must hold keys and values, such as `batchSize: 8`.")
    ServingConfig.resolve(content.get("elude"))


def _storage_error(error: OSError, checkpoint: Path, out: Path) -> StorageError:
    """The one sentence for what the operating system refused."""
    if isinstance(error, shutil.Error):  # of `copytree`: a list of (source, destination, reason as text)
        reason = str(error.args[0][0][2]) if error.args and isinstance(error.args[0], list) else str(error)
        full = os.strerror(errno.ENOSPC) in reason
        error = OSError(errno.ENOSPC if full else errno.EIO, reason)
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        # the archiver copies before it packs, and the package is gathered before that
        need = (2 * _bytes(checkpoint) + 3 * _bytes(package_directory())) / 1e6
        return StorageError(f"The disk of {out} is full: packing {checkpoint} needs up to {need:.0f} MB there.")
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return StorageError(f"{out} cannot be written to ({error.strerror}); give another folder with --out.")
    return StorageError(f"Packing {checkpoint} into {out} failed: {error}")


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-_")
