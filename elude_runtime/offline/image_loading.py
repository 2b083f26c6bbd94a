"""From image files to numbered batches: decoding, timm's transform, several processes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from elude_runtime.errors import ImagesError
from elude_runtime.network.preprocessing import DataConfig, decode_image, to_input
from elude_runtime.offline.image_files import ImageFiles

HASH_BYTES = 16


def image_hash(data: bytes) -> bytes:
    """Content hash of an image file (or of a preprocessed tensor's bytes): the first 16 bytes of its SHA-256."""
    return hashlib.sha256(data).digest()[:HASH_BYTES]


@dataclass(frozen=True, eq=False)
class Batch:
    """The images of one stretch of the source, the places [number * batch_size, (number + 1) * batch_size).

    places: int64 [B], where each image stands in the source, with gaps for images that could not be read; images:
    float32 [B, 3, H, W], B may be 0; hashes: 16 bytes an image, one after the other; skipped: (file, reason).
    """

    number: int
    places: Tensor
    images: Tensor
    hashes: bytes
    skipped: list[tuple[str, str]]


def load(
    files: ImageFiles, places: NDArray[np.int64] | None, config: DataConfig, size: int, select: slice, workers: int
) -> Iterator[Batch]:
    """The images at `places` (None: at all) in batches of `size`, of these batches those that `select` takes, in order.

    Read by `workers` processes, each a whole batch at a time, or by this process. ImagesError when one of them dies.
    """
    stretches = _Stretches(files, places, config, size)
    numbers = range(len(stretches))[select]
    parallel = min(workers, len(numbers))
    found = _by_workers(stretches, numbers, parallel) if parallel else map(stretches.__getitem__, numbers)
    for number, read, images, hashes, skipped in found:
        yield Batch(number, torch.tensor(read, dtype=torch.int64), images, hashes, skipped)


class _Stretches(Dataset):
    """What can be read of each batch's places: (number, places read, images, hashes, skipped)."""

    def __init__(self, files: ImageFiles, places: NDArray[np.int64] | None, config: DataConfig, size: int) -> None:
        self.files, self.places = files, range(len(files)) if places is None else places
        self.size, self.shape, self.transform = size, config.input_size, config.transform()

    def __len__(self) -> int:
        return -(-len(self.places) // self.size)

    def __getitem__(self, number: int) -> tuple[int, list[int], Tensor, bytes, list[tuple[str, str]]]:
        stretch = self.places[number * self.size : (number + 1) * self.size]
        images = torch.empty(len(stretch), *self.shape)
        read: list[int] = []
        hashes, skipped = bytearray(), []
        for place in map(int, stretch):
            try:
                data = self.files.read(place)
                images[len(read)] = to_input(decode_image(data), self.transform)
            except (ImagesError, OSError) as error:
                reason = f"{error.strerror}." if isinstance(error, OSError) and error.strerror else str(error)
                skipped.append((self.files.name(place), reason))
                continue
            read.append(place)
            hashes += image_hash(data)
        return number, read, images[: len(read)], bytes(hashes), skipped


def _by_workers(stretches: _Stretches, numbers: range, workers: int) -> Iterator[Any]:
    # A generator of its own: the loader would draw from the global one. One thread a worker is the loader's own rule.
    loader = DataLoader(
        stretches, batch_size=None, sampler=numbers, num_workers=workers, collate_fn=_as_it_is,
        generator=torch.Generator(),
    )  # fmt: skip
    started = _started(loader)
    del loader
    while True:
        died = ""
        try:
            item = next(started)
        except StopIteration:
            return
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            died = str(error).splitlines()[0]
        if died:  # outside the handler: the error's frames would keep the other processes alive
            del started
            raise ImagesError(
                f"A process that decodes images died ({died}); memory, or shared memory in /dev/shm, may be too small: "
                "use fewer workers or smaller batches."
            )
        yield item


def _started(loader: DataLoader) -> Iterator[Any]:
    """The loader's iterator, made in a thread: there torch leaves the process's SIGCHLD handler alone, which would
    raise the death of a worker in the middle of whatever the consumer is doing; here it is raised when its batch is
    due."""
    made: Future[Iterator[Any]] = Future()

    def make() -> None:
        try:
            made.set_result(iter(loader))
        except BaseException as error:
            made.set_exception(error)

    Thread(target=make).start()
    return made.result()


def _as_it_is(item: Any) -> Any:
    return item
