"""Writing and reading a checkpoint directory: safetensors with digests, atomically, never unpickling."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from elude_runtime.checkpoint.manifest import MANIFEST, LayerEntry, Manifest, read_manifest
from elude_runtime.errors import CheckpointError, StorageError
from elude_runtime.partition import Partition

TENSORS = "model.safetensors"
PREFIX = "elude."
CALIBRATION_TENSOR = "elude.calibration_images"


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over sorted (name, dtype, shape, bytes): the digest of a set of tensors, whatever file they lie in."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{tuple(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return digest.hexdigest()


def partition_tensors(layer: str, partition: Partition) -> dict[str, Tensor]:
    """A partition under its names on disk (design "Checkpoint")."""
    return {
        f"elude.{layer}.partition": partition.edges,
        f"elude.{layer}.subunits": partition.counts,
        f"elude.{layer}.mean": partition.mean,
        f"elude.{layer}.std": partition.std,
        f"elude.{layer}.concept": partition.concept.to(torch.uint16),
        f"elude.{layer}.sign": partition.sign,
    }


def read_partition(tensors: Mapping[str, Tensor], entry: LayerEntry) -> Partition:
    """The partition of one layer. CheckpointError when tensors are missing or do not have the manifest's shapes."""
    types, width = len(entry.token_types), entry.subunits + 1
    shapes = {
        "partition": (torch.uint8, (types, entry.neurons, entry.inputs)),
        "subunits": (torch.uint8, (types, entry.neurons)),
        "mean": (torch.float32, (types, entry.neurons, width)),
        "std": (torch.float32, (types, entry.neurons, width)),
        "concept": (torch.uint16, (types, entry.neurons, width)),
        "sign": (torch.int8, (types, entry.neurons, width)),
    }
    found = {}
    for part, (dtype, shape) in shapes.items():
        name = f"elude.{entry.name}.{part}"
        tensor = tensors.get(name)
        if tensor is None and part == "sign":  # of a checkpoint from before concepts had members that fall
            tensor = torch.ones(shape, dtype=dtype)
        if tensor is None:
            raise CheckpointError(f"The checkpoint lacks the tensor {name}; make it again with `elude rewrite`.")
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"The tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, the manifest says {dtype} {shape}; "
                "the checkpoint is damaged, make it again with `elude rewrite`."
            )
        found[part] = tensor
    found["concept"] = found["concept"].to(torch.int32)
    return Partition(*(found[part] for part in shapes))


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(base tensors, ELUDe's own) of a checkpoint's file."""
    base = {n: t for n, t in tensors.items() if not n.startswith(PREFIX)}
    return base, {n: t for n, t in tensors.items() if n.startswith(PREFIX)}


@contextmanager
def new_directory(
    out: Path,
    *,
    force: bool = False,
    within: Path | None = None,
    known_by: str | None = MANIFEST,
    what: str = "a checkpoint",
) -> Iterator[Path]:
    """A temporary directory beside `out` that takes its name when the block ends well, and is gone otherwise.

    within: where it is made instead, a directory on the same disk. known_by: a file that shows that a folder `out` may
    be replaced, None for one that always may; what it then is. StorageError for an existing `out` (unless force: it is
    replaced only at the end) or a disk that refuses.
    """
    out = out.absolute()
    within = within or out.parent
    try:
        ours = out.is_dir() and (known_by is None or (out / known_by).is_file() or not any(out.iterdir()))
        if force and out.exists() and not ours:
            raise StorageError(f"{out} is not {what}, so --force does not replace it; choose another --out.")
        if out.exists() and not force:
            raise StorageError(f"{out} is already there; choose another --out, or --force to replace it.")
        within.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=within))
    except OSError as error:
        raise storage_error(error, out) from error
    try:
        yield work
        for file in sorted(work.rglob("*")):
            if file.is_file():
                file.chmod(0o644)  # another user may serve it
                sync_file(file)
        work.chmod(0o755)
        if not out.exists():
            os.replace(work, out)
        elif force:
            _swap(work, out)
        else:
            raise StorageError(f"{out} appeared while this was being made; it was left as it is, choose another --out.")
    except OSError as error:
        raise storage_error(error, out) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _swap(work: Path, out: Path) -> None:
    """Put `work` in the place of `out`, which stays when that fails."""
    aside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    os.replace(out, aside / out.name)
    try:
        os.replace(work, out)
    except OSError:
        os.replace(aside / out.name, out)
        aside.rmdir()
        raise
    shutil.rmtree(aside, ignore_errors=True)


def storage_error(error: OSError, where: Path) -> StorageError:
    """What the operating system said, as a sentence that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"The disk is full at {where.parent}; free some space and run again, nothing was changed.")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return StorageError(f"{where.parent} cannot be written to; choose another place.")
    return StorageError(f"{where} could not be written: {error.strerror or error}.")


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all (temporary name, then rename)."""
    handle, temporary = -1, ""
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
        raise storage_error(error, path) from error


def write_json(path: Path, value: Any) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    # what UTF-8 has no bytes for, half a surrogate pair, becomes its JSON escape
    write_file(path, text.encode("utf-8", "backslashreplace") + b"\n")


def write_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """model.safetensors. Tensors that share memory (tied weights) are stored each under its own name."""
    own: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        storage = plain.untyped_storage()
        if storage.data_ptr() in taken or storage.nbytes() != plain.nbytes:  # safetensors takes no shared memory
            plain = plain.clone()
        taken.add(plain.untyped_storage().data_ptr())
        own[name] = plain
    try:
        save_file(own, directory / TENSORS, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError):
            raise storage_error(error, directory / TENSORS) from error
        full = "No space" in str(error) or "os error 28" in str(error)
        cause = OSError(errno.ENOSPC, "No space left on device") if full else OSError(errno.EIO, str(error))
        raise storage_error(cause, directory / TENSORS) from error


def write_manifest(directory: Path, manifest: Manifest) -> None:
    write_json(directory / MANIFEST, manifest.model_dump(mode="json"))


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint. CheckpointError if the file is missing, truncated or no safetensors file."""
    path = directory / TENSORS
    if not path.is_file():
        raise CheckpointError(f"{directory} lacks {TENSORS}; copy the whole checkpoint, or make it again.")
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut off ({error}); copy it again or make it again.") from error


def read_checkpoint(directory: Path) -> tuple[Manifest, dict[str, Tensor], dict[str, Partition]]:
    """(manifest, base tensors, partitions by layer), every tensor checked against the manifest's digests."""
    manifest = read_manifest(directory)
    base, own = split_tensors(read_tensors(directory))
    partitions = {entry.name: read_partition(own, entry) for entry in manifest.layers}
    images = own.pop(CALIBRATION_TENSOR, torch.empty(0, dtype=torch.uint8))
    for name, found, expected in (
        ("base", tensors_sha256(base), manifest.base_sha256),
        ("partition", tensors_sha256(own), manifest.partition_sha256),
        ("calibration", hashlib.sha256(images.numpy().tobytes()).hexdigest(), manifest.calibration.sha256),
    ):
        if found != expected:
            raise CheckpointError(
                f"{directory / TENSORS} does not fit {MANIFEST}: its {name} tensors hash to {found[:12]}…, "
                f"{MANIFEST} says {expected[:12]}…; the file was changed or damaged, make the checkpoint again."
            )
    return manifest, base, partitions


def sync_file(path: Path) -> None:
    """Once this returns, what was written to the file survives the machine's failure."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
