"""The second look at the images that became exemplars: their sizes and thumbnails."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from elude_runtime.checkpoint.storage import storage_error
from elude_runtime.errors import ImagesError
from elude_runtime.offline.catalogue.thumbnails import Picture, picture
from elude_runtime.offline.collect import State
from elude_runtime.offline.image_loading import image_hash
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.resume import Resume

_AT_ONCE = 64  # images, decoded and encoded by threads
_BLOB, _STATE = "thumbnails", "pictures"


@dataclass(frozen=True, eq=False)
class Pictures:
    """Of every exemplar image: sizes (width, height), windows, and the bytes that its thumbnail takes, 0 for none;
    blob: the thumbnails one after the other; missing: (file, reason) of images that were not found again."""

    blob: Path
    sizes: list[tuple[int, int]]
    windows: list[tuple[float, float, float, float]]
    lengths: list[int]
    missing: list[tuple[str, str]]

    def add(self, name: str, found: Picture | str) -> bytes:
        """Take in what became of the next image; its thumbnail, nothing where there is none."""
        if isinstance(found, str):
            self.missing.append((name, found))
            found = Picture(0, 0, (0.0, 0.0, 0.0, 0.0), None)
        self.sizes.append((found.width, found.height))
        self.windows.append(found.window)
        self.lengths.append(len(found.thumbnail or b""))
        return found.thumbnail or b""

    def state(self) -> State:
        return {name: getattr(self, name) for name in ("sizes", "windows", "lengths", "missing")}

    def unpack(self, folder: Path) -> list[str | None]:
        """Write the thumbnails to a folder, each under the number of its image; their names."""
        names: list[str | None] = []
        try:
            with self.blob.open("rb") as stream:
                for number, length in enumerate(self.lengths):
                    names.append(f"{number:06}.webp" if length else None)
                    if length:
                        (folder / f"{number:06}.webp").write_bytes(stream.read(length))
        except OSError as error:
            raise storage_error(error, folder) from error
        return names


def take_pictures(
    source: ImageSource,
    places: NDArray[np.int64],
    hashes: Sequence[bytes],
    budget: int,
    resume: Resume,
    report: Progress,
) -> Pictures:
    """Look again at the images at these places, each with an equal part of the budget of bytes. hashes: what their
    contents were; an image that is not there any more, or is another one, goes without."""
    blob = resume.folder / _BLOB
    kept = resume.load(_STATE) if blob.is_file() else None
    done = Pictures(blob, **kept) if kept else Pictures(blob, [], [], [], [])
    most = budget // len(places)

    def look(number: int) -> Picture | str:
        return _look(source, int(places[number]), hashes[number], most)

    report("pictures", len(done.sizes), len(places))
    try:
        with blob.open("ab") as stream, ThreadPoolExecutor(max(source.workers, os.cpu_count() or 1)) as pool:
            stream.truncate(sum(done.lengths))
            for start in range(len(done.sizes), len(places), _AT_ONCE):
                part = range(start, min(start + _AT_ONCE, len(places)))
                for number, found in zip(part, pool.map(look, part), strict=True):
                    stream.write(done.add(source.name(int(places[number])), found))
                report("pictures", len(part), len(places))
                if resume.due():
                    stream.flush()
                    os.fsync(stream.fileno())
                    resume.save(_STATE, done.state())
    except OSError as error:
        raise storage_error(error, blob) from error
    return done


def _look(source: ImageSource, place: int, known: bytes, most: int) -> Picture | str:
    """The picture, or why there is none."""
    try:
        data = source.read(place)
        if image_hash(data) != known:
            return "It is another image than when it was read first."
        return picture(data, source.config, most)
    except (ImagesError, OSError) as error:
        return f"{error.strerror}." if isinstance(error, OSError) and error.strerror else str(error)
