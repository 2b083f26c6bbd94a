"""Where encoded images lie: folders, lists of files and tar shards, held compactly and read by place."""

from __future__ import annotations

import codecs
import os
import stat
from array import array
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from braceexpand import braceexpand
from numpy.typing import NDArray

from elude_runtime.errors import ImagesError
from elude_runtime.offline.tar_index import DAMAGE, ELSEWHERE, tar_images

Progress = Callable[[str, int, int | None], None]  # (stage, newly done, total if known)
SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"})
SCANNERS = 8  # threads
LIST_SUFFIXES = frozenset({".txt", ".lst"})
SHARD_SUFFIXES = frozenset({".tar"})
_COMPRESSED_SHARDS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst", ".tar.lz4")  # known, to say what to do


class ImageFiles(Protocol):
    """Encoded images, each at its place 0 ... len - 1. Small enough for a million of them and for forked workers:
    a few arrays, no objects."""

    def __len__(self) -> int: ...

    def name(self, place: int) -> str:
        """For people: bytes that are no UTF-8 are written as escapes."""
        ...

    def read(self, place: int) -> bytes:
        """The file's bytes. OSError or ImagesError where there are none."""
        ...

    def take(self, places: NDArray[np.int64]) -> ImageFiles:
        """Those images alone, in that order."""
        ...

    def identity(self) -> Iterator[bytes]:
        """Bytes that change when an image is added, removed, renamed or of another size, wherever the files lie."""
        ...


def find_images(images: str | Path | list[str | Path], progress: Progress | None = None) -> ImageFiles:
    """The images of a folder, of a text file of paths, of a tar shard or a brace pattern of shards, or of a list of
    paths. ImagesError for what is not there, is nothing of these or names no image."""
    progress = progress or (lambda *_: None)
    if isinstance(images, list):
        return _of_paths(b"", (os.fsencode(p) for p in images), "The list of images", progress)
    path = Path(images)
    if path.is_dir():
        return _in_folder(path, progress)
    if path.exists():
        if path.suffix.lower() in LIST_SUFFIXES:
            return _of_paths(os.fsencode(path.parent), _listed(path), str(path), progress)
        if _is_shard(path.name):
            return _of_shards([str(path)], str(path), progress)
        raise ImagesError(f"{path} is no folder, list of files (.txt, .lst) or tar shard; give one of these.")
    if "{" in str(images):
        return _of_pattern(str(images), progress)
    raise ImagesError(f"{path} is not there; give a folder of images, a list of them (.txt, .lst) or tar shards.")


def spread(count: int, limit: int) -> NDArray[np.int64]:
    """The places of at most `limit` of `count` images, spread evenly."""
    return np.arange(limit, dtype=np.int64) * count // limit if limit < count else np.arange(count, dtype=np.int64)


class Names:
    """Byte strings end to end, with where each ends."""

    def __init__(self, names: Iterable[bytes]) -> None:
        blob, ends = bytearray(), array("q", [0])
        for name in names:
            blob += name
            ends.append(len(blob))
        self.blob, self.ends = bytes(blob), np.array(ends, dtype=np.int64)

    @classmethod
    def joined(cls, parts: list[Names]) -> Names:
        made = cls(())
        starts = np.cumsum([0] + [len(p.blob) for p in parts])
        made.blob = b"".join(p.blob for p in parts)
        made.ends = np.concatenate([[0], *(start + p.ends[1:] for start, p in zip(starts[:-1], parts, strict=True))])
        return made

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> bytes:
        return self.blob[self.ends[index] : self.ends[index + 1]]


@dataclass(frozen=True)
class FileList:
    """Image files by their paths, relative to `root` where they are not absolute."""

    root: bytes
    names: Names

    def __len__(self) -> int:
        return len(self.names)

    def path(self, place: int) -> bytes:
        return os.path.join(self.root, self.names[place])

    def name(self, place: int) -> str:
        return readable(self.path(place))

    def read(self, place: int) -> bytes:
        path = self.path(place)
        if path.endswith(b"/"):
            raise ImagesError("The folder cannot be listed; what lies in it is left out.")
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would be waited for
            raise ImagesError("This is not a file.")
        with open(path, "rb") as file:
            return file.read()

    def take(self, places: NDArray[np.int64]) -> FileList:
        return FileList(self.root, Names(self.names[i] for i in places))

    def identity(self) -> Iterator[bytes]:
        for place in range(len(self)):
            yield b"%d %d %s\n" % (len(self.names[place]), _size(self.path(place)), self.names[place])


@dataclass(frozen=True)
class ShardList:
    """Images in tar shards: of each the shard's number, the member's name, first byte and size (tar_index.Entry)."""

    shards: tuple[str, ...]
    shard: NDArray[np.int32]
    names: Names
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]

    @classmethod
    def scan(cls, shards: list[str], progress: Progress) -> ShardList:
        """Read the headers of all shards. ImagesError for one that is no tar file."""
        pool = ThreadPoolExecutor(SCANNERS)  # waiting for a disk or a network, more than computing
        try:
            parts = []
            for part in pool.map(_scan, shards):
                parts.append(part)
                progress("index of the shards", 1, len(shards))
        finally:
            pool.shutdown(cancel_futures=True)
        counts = [len(names) for names, _, _ in parts]
        return cls(
            tuple(shards),
            np.repeat(np.arange(len(shards), dtype=np.int32), counts),
            Names.joined([names for names, _, _ in parts]),
            np.concatenate([offsets for _, offsets, _ in parts]),
            np.concatenate([sizes for _, _, sizes in parts]),
        )

    def __len__(self) -> int:
        return len(self.names)

    def name(self, place: int) -> str:
        shard, member = self.shards[self.shard[place]], self.names[place]
        return readable(os.fsencode(shard) + (b"/" + member if member else b""))

    def read(self, place: int) -> bytes:
        offset, size = int(self.offsets[place]), int(self.sizes[place])
        if size == DAMAGE:
            raise ImagesError(f"The shard is damaged or cut off at byte {offset}; what comes after is left out.")
        if size == ELSEWHERE:
            raise ImagesError(
                "The shard holds only a link or a sparse file here; pack it with --dereference, without --sparse."
            )
        with open(self.shards[self.shard[place]], "rb", buffering=0) as file:
            file.seek(offset)
            data = file.read(size)
            while len(data) < size and (more := file.read(size - len(data))):
                data += more
        if len(data) < size:
            raise ImagesError("The shard is cut off inside this image.")
        return data

    def take(self, places: NDArray[np.int64]) -> ShardList:
        chosen = Names(self.names[i] for i in places)
        return ShardList(self.shards, self.shard[places], chosen, self.offsets[places], self.sizes[places])

    def identity(self) -> Iterator[bytes]:
        for path in self.shards:
            yield b"%d %s\n" % (_size(os.fsencode(path)), os.path.basename(os.fsencode(path)))
        yield from (self.shard.tobytes(), self.offsets.tobytes(), self.sizes.tobytes(), self.names.blob)


def _scan(shard: str) -> tuple[Names, NDArray[np.int64], NDArray[np.int64]]:
    offsets, sizes = array("q"), array("q")

    def names() -> Iterator[bytes]:
        for name, offset, size in tar_images(shard, SUFFIXES):
            offsets.append(offset)
            sizes.append(size)
            yield name

    return Names(names()), np.array(offsets, np.int64), np.array(sizes, np.int64)


def _size(path: bytes) -> int:
    """In bytes; -1 for what is not there."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def readable(path: bytes) -> str:
    """For people: what is no UTF-8 as escapes."""
    return path.decode("utf-8", "backslashreplace")


def _in_folder(folder: Path, progress: Progress) -> ImageFiles:
    shards: list[bytes] = []

    def pictures() -> Iterator[bytes]:
        for path in _walk(folder, SUFFIXES | SHARD_SUFFIXES):
            if _is_shard(os.fsdecode(path)):
                shards.append(path)
            else:
                yield path

    files = FileList(os.fsencode(folder), Names(pictures()))
    if any(not files.names[i].endswith(b"/") for i in range(len(files))):
        if shards:
            raise ImagesError(
                f"{folder} holds tar shards and image files; give one kind: a folder of it alone, a list (.txt), or "
                "shards as train-{0000..1023}.tar."
            )
        return files
    if not shards:
        raise ImagesError(
            f"{folder} holds no images ({', '.join(sorted(SUFFIXES))}) and no tar shards; give a folder of typical "
            "inputs."
        )
    return _of_shards([os.path.join(folder, os.fsdecode(s)) for s in shards], str(folder), progress)


def _walk(folder: Path, suffixes: frozenset[str]) -> Iterator[bytes]:
    """The paths below `folder` with one of the suffixes, relative to it, in the order of their bytes. A folder that
    cannot be listed comes as its path with a slash at the end. Links are followed, and no folder is entered twice."""
    root, wanted = os.fsencode(folder), {s.encode() for s in suffixes}
    entered = set()
    waiting = [b""]  # the last comes first
    while waiting:
        path = waiting.pop()
        if path and not path.endswith(b"/"):
            yield path
            continue
        try:
            facts = os.stat(os.path.join(root, path))
            if (facts.st_dev, facts.st_ino) in entered:
                continue
            entered.add((facts.st_dev, facts.st_ino))
            with os.scandir(os.path.join(root, path)) as entries:
                found = [path + name for entry in entries if (name := _wanted(entry, wanted))]
        except OSError as error:
            if not path:
                raise ImagesError(f"The image folder {folder} cannot be listed ({error.strerror}).") from error
            yield path
            continue
        # With the slash behind folders, the order of siblings is the order of all that lies below them.
        found.sort(reverse=True)
        waiting += found


def _wanted(entry: os.DirEntry[bytes], suffixes: set[bytes]) -> bytes:
    """The name of a file with one of the suffixes; a folder's with a slash; nothing for all else. A link that leads
    nowhere counts as a file: it is named when it cannot be read."""
    chosen = entry.name if os.path.splitext(entry.name)[1].lower() in suffixes else b""
    try:
        if entry.is_dir():
            return entry.name + b"/"
        return chosen if chosen and (entry.is_file() or not os.path.exists(entry.path)) else b""
    except OSError:  # links in a circle
        return chosen


def _listed(file: Path) -> Iterator[bytes]:
    """The paths in a text file: one a line; blank lines and lines that begin with # are left out."""
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines):
                line = (line.removeprefix(codecs.BOM_UTF8) if number == 0 else line).strip()
                if line and not line.startswith(b"#"):
                    yield line
    except OSError as error:
        raise ImagesError(f"The list {file} cannot be read ({error.strerror}).") from error


def _of_paths(root: bytes, paths: Iterable[bytes], origin: str, progress: Progress) -> ImageFiles:
    names = Names(paths)
    if not len(names):
        raise ImagesError(f"{origin} is empty; name at least one image.")
    if b"\0" in names.blob:
        raise ImagesError(f"{origin} is no UTF-8 text; write one path a line.")
    shards = sum(_is_shard(os.fsdecode(names[i])) for i in range(len(names)))
    if shards == len(names):
        return _of_shards([os.fsdecode(os.path.join(root, names[i])) for i in range(len(names))], origin, progress)
    if shards:
        raise ImagesError(f"{origin} names tar shards and image files; give one kind.")
    return FileList(root, names)


def _of_pattern(pattern: str, progress: Progress) -> ImageFiles:
    try:
        shards = list(braceexpand(pattern))
    except ValueError as error:
        raise ImagesError(f"The braces of {pattern} do not match; write shards as train-{{0000..1023}}.tar.") from error
    if not all(map(_is_shard, shards)):
        raise ImagesError(f"{pattern} names other files than .tar; a pattern with braces stands for tar shards.")
    return _of_shards(shards, pattern, progress)


def _is_shard(name: str) -> bool:
    return name.lower().endswith((*SHARD_SUFFIXES, *_COMPRESSED_SHARDS))


def _of_shards(shards: list[str], origin: str, progress: Progress) -> ImageFiles:
    missing = [s for s in shards if not os.path.exists(s)]
    if missing:
        raise ImagesError(f"{len(missing)} of the {len(shards)} shards of {origin} are not there, first {missing[0]}.")
    files = ShardList.scan(shards, progress)
    if not len(files):
        raise ImagesError(f"{origin} holds no images ({', '.join(sorted(SUFFIXES))}); give shards of typical inputs.")
    return files
