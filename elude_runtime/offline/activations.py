"""`elude activations`: all features of a layer on all images of a source, streamed into one .npz file."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from zipfile import ZIP_DEFLATED, ZipFile, ZipInfo

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from elude_runtime.analysis.activations import concept_activations, peak, subunit_peaks, subunit_tokens
from elude_runtime.analysis.model import EludeModel, load
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.checkpoint.storage import storage_error, sync_file
from elude_runtime.errors import ImagesError, LayerError, SettingsError, StorageError
from elude_runtime.network.tokens import by_image
from elude_runtime.offline.collect import StopForward, layer_inputs
from elude_runtime.offline.images import ImageSource, Progress, none_read

LEVELS = ("concepts", "subunits")
ENDING = ".npz"
_FLOATS = 16_000_000  # activations in memory at once: 64 MB of float32
_MB = 1_000_000
_COPIED = 16 * _MB  # bytes copied at once
_NAMES = 10_000  # file names in memory at once
_LARGEST = float(torch.finfo(torch.float16).max)
_FEW_DIGITS = float(torch.finfo(torch.float16).smallest_normal)  # float16 keeps fewer than three digits below it
_SMALL_SHARE = 0.01  # of the sub-units, from which a spread below that is worth a warning


@dataclass(frozen=True)
class Activations:
    """Which numbers: all concepts or all sub-units of a layer, at their peak or on every token."""

    state: SplitState
    level: str
    per_token: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one image: [K] or [T, K], [P, d, M + 1] or [T, d, M + 1]."""
        state = self.state
        if self.level == "concepts":
            concepts = len(state.concept_names())
            return (state.layout.total, concepts) if self.per_token else (concepts,)
        tokens = state.layout.total if self.per_token else state.layout.types
        return tokens, state.linear.neurons, state.partition.subunits + 1

    @property
    def dtype(self) -> np.dtype:
        """In the file. Of sub-units there are many: half precision."""
        return np.dtype("<f4" if self.level == "concepts" else "<f2")

    def of(self, x: Tensor) -> Iterator[Tensor]:
        """float32 [b, *shape] of a few images at a time; x [B, ...], the layer's input."""
        for part in x.split(max(1, _FLOATS // math.prod(self.shape))):
            yield self._of(part.float())

    def _of(self, x: Tensor) -> Tensor:
        state = self.state
        if self.level == "subunits":
            return subunit_tokens(state, x) if self.per_token else subunit_peaks(state, x)
        if not self.per_token:
            return torch.cat([peak(a).values for _, a in concept_activations(state, x)], -1)
        out, start = torch.zeros(len(x), *self.shape, device=x.device), 0
        for token_type, own in concept_activations(state, x):
            out[:, state.layout.slices[token_type], start : start + own.shape[-1]] = own
            start += own.shape[-1]
        return out


@dataclass(frozen=True)
class ActivationsFile:
    """What was written. shape: of its `activations`; size: bytes; skipped: images that could not be read, with the
    reason; warnings: a sentence each."""

    path: Path
    checkpoint_sha256: str
    layer: str
    level: str
    per_token: bool
    shape: tuple[int, ...]
    dtype: str
    size: int
    skipped: list[tuple[str, str]]
    warnings: list[str]


def write_activations(
    checkpoint: str | Path,
    images: str | Path | list[str] | list[Path] | Tensor,
    layer: str | None,
    out: str | Path,
    *,
    level: str = "concepts",
    per_token: bool = False,
    batch_size: int = 25,
    workers: int = 0,
    limit: int | None = None,
    device: str | torch.device = "cpu",
    trust_factory: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> ActivationsFile:
    """Write the centred activations of a layer's features on images to a .npz file, for `numpy.load`. It holds

    activations: of concepts float32 [N, K], each at the token where its absolute value is largest, or with per_token
    [N, T, K], 0 where a concept is of the other token type; of sub-units float16 [N, P, d, M + 1], such peaks on each
    token type, or [N, T, d, M + 1], each token by its own type's partition; `rest` last. names [K]: of the concepts, as
    `concept_names(layer)`. files [N].

    layer: may be None where the checkpoint splits only one. Images that cannot be read are left out. Memory does not
    grow with N; the disk holds the numbers twice until the file is complete and takes its name. Sub-units beyond
    float16 are cut to its largest number, which a warning says.

    LayerError, SettingsError or CheckpointError for what was asked; ImagesError when no image can be read or an
    activation is not finite; StorageError for a file that is already there (unless force), a folder that is not, or too
    small a disk.
    """
    report = progress or (lambda *_: None)
    if level not in LEVELS:
        raise SettingsError(f"There is no level {level[:40]!r}; use {' or '.join(LEVELS)}.")
    out = Path(out)
    _check_target(out, force)
    model = load(checkpoint, device, trust_factory=trust_factory)
    wanted = Activations(model.state(_layer(model, layer)), level, per_token)
    source = ImageSource(
        images, model.data_config, batch_size=batch_size, workers=workers, limit=limit, progress=report
    )
    _check_room(out, wanted, source.count)
    warnings = _few_digits(wanted)
    with _new_file(out, force) as work:
        raw, made = work / "activations", work / out.name
        with _disk(out), raw.open("wb") as stream:
            written = _stream(model, wanted, source, stream, report)
        names = wanted.state.concept_names() if level == "concepts" else None
        with _disk(out), ZipFile(made, "w", allowZip64=True) as file:
            shape = (len(written.places), *wanted.shape)
            _add(file, "activations", wanted.dtype, shape, _read(raw, report), compress=False)
            if names is not None:
                _add_texts(file, "names", names)
            _add_texts(file, "files", _Files(source, written.places))
    if written.cut:
        warnings.append(
            f"{written.cut} numbers were beyond float16 and were cut to {_LARGEST:.0f}, the largest was "
            f"{written.largest:.4g}; concepts are kept in float32."
        )
    return ActivationsFile(
        out, model.manifest.checkpoint_sha256, wanted.state.name, level, per_token, shape, wanted.dtype.name,
        out.stat().st_size, written.skipped, warnings,
    )  # fmt: skip


# --- before the work --------------------------------------------------------------------------------------------------


def _check_target(out: Path, force: bool) -> None:
    """StorageError unless a file can be put there."""
    if out.suffix != ENDING:
        raise StorageError(f"{out} cannot be the file's name; choose one that ends in {ENDING}.")
    if not out.absolute().parent.is_dir():
        raise StorageError(f"There is no folder {out.parent} for {out.name}; make it, or choose another --out.")
    if out.is_dir():
        raise StorageError(f"{out} is a folder; choose another --out.")
    if not force and os.path.lexists(out):
        raise StorageError(f"{out} is already there; choose another --out, or --force to replace it.")


def _layer(model: EludeModel, layer: str | None) -> str:
    if layer is None and len(model.layers) > 1:
        raise LayerError(f"The checkpoint splits {', '.join(model.layers)}; choose one with --layer.")
    return model.layers[0] if layer is None else layer


def _check_room(out: Path, wanted: Activations, images: int | None) -> None:
    """StorageError for more numbers than the disk has room for, twice."""
    each = math.prod(wanted.shape) * wanted.dtype.itemsize
    with _disk(out):
        free = shutil.disk_usage(out.absolute().parent).free
    if images is None or 2 * images * each <= free:
        return
    less = [f"--max-images (at most {free // (2 * each)})"] if free >= 2 * each else []
    less += ["peaks (without --per-token)"] if wanted.per_token else []
    less += ["--level concepts"] if wanted.level == "subunits" else []
    ask = f"; ask for {', or '.join(less)}, or choose another disk." if less else "; choose another disk."
    raise StorageError(
        f"The activations of {images} images take {size_text(images * each)} ({size_text(each)} an image), and as much "
        f"again while the file is made, and {out.absolute().parent} has {size_text(free)} free{ask}"
    )


def _few_digits(wanted: Activations) -> list[str]:
    """A warning where float16 keeps little of many sub-units."""
    std = wanted.state.partition.std
    moving = std[std > 0]
    small = int((moving < _FEW_DIGITS).sum())
    if wanted.level == "concepts" or small <= _SMALL_SHARE * len(moving):
        return []
    return [
        f"{small} of {len(moving)} sub-units vary by less than {_FEW_DIGITS:.1g}, where float16 has few digits or "
        "none; concepts are kept in float32."
    ]


def size_text(count: int) -> str:
    """A number of bytes for people."""
    value, units = count / 1000, ["kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"


# --- the passes over images and file ----------------------------------------------------------------------------------


@dataclass
class _Written:
    """places: of the images in the source, 8 bytes each; cut: numbers beyond float16, the largest of which was
    `largest`."""

    places: array[int] = field(default_factory=lambda: array("q"))
    skipped: list[tuple[str, str]] = field(default_factory=list)
    cut: int = 0
    largest: float = 0.0


def _stream(
    model: EludeModel, wanted: Activations, source: ImageSource, stream: BinaryIO, report: Progress
) -> _Written:
    """One pass over the images that writes their activations one after the other."""
    written, seen = _Written(), dict[str, tuple[Tensor, Tensor]]()
    parameter, name = next(model.base.parameters()), wanted.state.name
    with layer_inputs(model.base, [name], seen), torch.no_grad():
        for batch in source.numbered():
            written.skipped += batch.skipped
            if len(batch.places):
                seen.clear()
                with suppress(StopForward):
                    model.base(batch.images.to(parameter.device, parameter.dtype))
                places = batch.places.tolist()
                for values in wanted.of(by_image(seen[name][0], len(places))):
                    _check_finite(values, wanted, source, places[: len(values)])
                    stream.write(_packed(values, wanted.dtype, written).data.cast("B"))
                    del places[: len(values)]
                written.places.extend(batch.places.tolist())
            report("activations", len(batch.places) + len(batch.skipped), source.count)
    if not written.places:
        raise none_read(written.skipped)
    return written


def _check_finite(values: Tensor, wanted: Activations, source: ImageSource, places: list[int]) -> None:
    broken = (~torch.isfinite(values.flatten(1))).any(1).nonzero()
    if len(broken):
        raise ImagesError(
            f"The activations of {wanted.state.name} are not finite on {source.name(places[int(broken[0])])}; check "
            "the base model's weights, or leave this image out."
        )


def _packed(values: Tensor, dtype: np.dtype, written: _Written) -> np.ndarray:
    """The numbers as they lie in the file."""
    if dtype.itemsize == 2:
        size = values.abs()
        if cut := int((size > _LARGEST).sum()):
            written.cut, written.largest = written.cut + cut, max(written.largest, float(size.max()))
            values = values.clamp(-_LARGEST, _LARGEST)
        values = values.half()
    return values.cpu().contiguous().numpy().astype(dtype, copy=False)


class _Files:
    """The names of the images at some places, again and again."""

    def __init__(self, source: ImageSource, places: array[int]) -> None:
        self.source, self.places = source, places

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[str]:
        return map(self.source.name, self.places)


def _add_texts(file: ZipFile, name: str, texts: list[str] | _Files) -> None:
    dtype = np.dtype(f"<U{max(map(len, texts))}")

    def parts() -> Iterator[bytes]:
        some: list[str] = []
        for text in texts:
            some.append(text)
            if len(some) == _NAMES:
                yield np.array(some, dtype).tobytes()
                some.clear()
        yield np.array(some, dtype).tobytes()

    _add(file, name, dtype, (len(texts),), parts(), compress=True)


def _add(
    file: ZipFile, name: str, dtype: np.dtype, shape: tuple[int, ...], parts: Iterator[bytes], *, compress: bool
) -> None:
    """An array, row by row, as a member that `numpy.load` finds under its name."""
    info = ZipInfo(f"{name}.npy")  # the same bytes on any day
    if compress:
        info.compress_type = ZIP_DEFLATED
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with file.open(info, "w", force_zip64=True) as member:
        npy.write_array_header_1_0(member, header)
        for part in parts:
            member.write(part)


def _read(raw: Path, report: Progress) -> Iterator[bytes]:
    total = -(-raw.stat().st_size // _COPIED)
    with raw.open("rb") as stream:
        while part := stream.read(_COPIED):
            yield part
            report(f"file, times {_COPIED // _MB} MB", 1, total)


@contextmanager
def _new_file(out: Path, force: bool) -> Iterator[Path]:
    """A temporary folder beside `out`, whose file of that name takes its place when the block ends well; nothing stays
    otherwise."""
    with _disk(out):
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".part", dir=out.absolute().parent))
    try:
        yield work
        with _disk(out):
            made = work / out.name
            made.chmod(0o644)
            sync_file(made)
            if not force and os.path.lexists(out):
                raise StorageError(f"{out} appeared while this was being made; it was left as it is.")
            os.replace(made, out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """StorageError for what the operating system says of the disk."""
    try:
        yield
    except OSError as error:
        raise storage_error(error, out.absolute()) from error
