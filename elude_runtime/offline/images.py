"""Images as numbered batches: files, shards or tensors, timm's transform, unreadable images skipped and named."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from elude_runtime.errors import ImagesError, SettingsError
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.image_files import ImageFiles, Progress, find_images, spread
from elude_runtime.offline.image_loading import HASH_BYTES, Batch, image_hash, load

__all__ = ["Batch", "ImageHashes", "ImageReport", "ImageSource", "Progress", "image_hash"]


class ImageHashes(Sequence[bytes]):
    """Content hashes as a sequence, 16 bytes each in memory."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data)

    def extend(self, data: bytes) -> None:
        """Add hashes that stand one after the other."""
        self.data += data

    def in_order(self) -> bytes:
        """All of them sorted, one after the other: the same as b"".join(sorted(self)), without an object a hash."""
        halves = np.frombuffer(bytes(self.data), ">u8").reshape(-1, 2)
        return halves[np.lexsort((halves[:, 1], halves[:, 0]))].tobytes()

    def __len__(self) -> int:
        return len(self.data) // HASH_BYTES

    @overload
    def __getitem__(self, index: int) -> bytes: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytes]: ...
    def __getitem__(self, index: int | slice) -> bytes | list[bytes]:
        chosen = range(len(self))[index]
        if isinstance(chosen, range):
            return [self[i] for i in chosen]
        return bytes(self.data[chosen * HASH_BYTES : (chosen + 1) * HASH_BYTES])

    def __eq__(self, other: object) -> bool:
        return list(self) == list(other) if isinstance(other, Sequence) else NotImplemented

    __hash__ = None  # type: ignore[assignment]


@dataclass
class ImageReport:
    """What was met on the way: content hashes (first 16 bytes of SHA-256) and files skipped with the reason."""

    hashes: ImageHashes = field(default_factory=ImageHashes)
    skipped: list[tuple[str, str]] = field(default_factory=list)


def none_read(skipped: Sequence[tuple[str, str]], count: int | None = None) -> ImagesError:
    """The error where no image could be read. skipped: (file, reason), or the first of them where there are `count`."""
    first = f" The first: {': '.join(skipped[0])}" if skipped else ""
    return ImagesError(f"None of the {len(skipped) if count is None else count} images could be read.{first}")


class ImageSource:
    """Images that can be read again and again, in the same batches each time: `[B, 3, H, W]` float32.

    images: a folder of images or of tar shards, a text file of paths (.txt, .lst), a tar shard, a brace pattern
    (`train-{0000..1023}.tar`), a list of image files or of shards; or a tensor [N, 3, H, W], or an iterable of such
    batches (or of tuples that begin with one) that can be iterated twice, resized and normalised for the model.
    workers: processes that decode files. limit: use that many, of files spread evenly over them, of tensors the first.
    ImagesError for a source that is not there, is empty or is none of these.
    """

    def __init__(
        self,
        images: str | Path | Sequence[str | Path] | Tensor | Iterable[Tensor],
        config: DataConfig,
        *,
        batch_size: int = 25,
        workers: int = 0,
        limit: int | None = None,
        progress: Progress | None = None,
    ) -> None:
        if batch_size < 1 or workers < 0 or (limit is not None and limit < 1):
            raise SettingsError("The batch size and the number of images are at least 1, workers at least 0.")
        self.batch_size, self.workers, self.config, self.limit = batch_size, workers, config, limit
        self.report = ImageReport()
        self._files: ImageFiles | None = None
        self._tensors: Tensor | Iterable[Any] = ()
        self._chosen: Tensor | None = None  # of what `at` gives: the places in this source's files or tensor
        if isinstance(images, str | Path) or (
            isinstance(images, list | tuple) and images and all(isinstance(i, str | Path) for i in images)
        ):
            files = find_images(list(images) if isinstance(images, tuple) else images, progress)
            self._files = files if limit is None or limit >= len(files) else files.take(spread(len(files), limit))
        elif isinstance(images, Tensor):
            self._check(images)
            self._tensors = images[:limit]
        else:
            try:
                once = iter(images) is images
            except TypeError:
                raise _of_no_kind(images) from None
            if once:
                raise ImagesError("The images are read twice: give a list of batches or a DataLoader, not a generator.")
            self._tensors = images

    @property
    def has_files(self) -> bool:
        """Whether there are encoded images behind it, for `name`, `read` and `encoded`, and not tensors."""
        return self._files is not None

    @property
    def count(self) -> int | None:
        """Number of images, readable or not, where it is known beforehand."""
        if self._chosen is not None:
            return len(self._chosen)
        if self._files is not None:
            return len(self._files)
        return len(self._tensors) if isinstance(self._tensors, Tensor) else None

    @property
    def places(self) -> Tensor:
        """int64: where the images stand in the files or the tensor, readable or not; of an iterable of batches it is
        not known."""
        assert self.count is not None
        return torch.arange(self.count) if self._chosen is None else self._chosen

    @cached_property
    def digest(self) -> str:
        """SHA-256 over what makes the batches: names and sizes of the files (wherever they lie) or the content of the
        tensors, batch size, limit and data configuration. Empty for an iterable that is no list: it cannot be told."""
        settings = {"batch_size": self.batch_size, "limit": self.limit, "data": self.config.as_dict()}
        sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        given: Iterable[Any] = self._tensors.split(1) if isinstance(self._tensors, Tensor) else self._tensors
        if self._files is not None:
            for part in self._files.identity():
                sha.update(part)
        elif not isinstance(given, list | tuple):
            return ""
        for batch in map(_tensor_of, given):
            sha.update(f"{list(batch.shape)} {batch.dtype}".encode())
            sha.update(batch.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        if self._chosen is not None:
            sha.update(self._chosen.numpy().tobytes())
        return sha.hexdigest()

    def at(self, places: Tensor) -> ImageSource:
        """The images at these places (int64, ascending) alone, in batches of their own numbers that still tell the
        places in this source. An iterable of batches cannot be reached by place: the source itself."""
        if self._files is None and not isinstance(self._tensors, Tensor):
            return self
        part = copy.copy(self)
        part.__dict__.pop("digest", None)
        part._chosen, part.report = places.cpu(), ImageReport()
        return part

    def numbered(self, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """The batches whose number is at least `start` and leaves `rank` when divided by `world`, in order.

        The others are not read (an iterable of batches has to be run through, though). A batch without a single
        readable image comes too, with an empty `images`. `report` stays as it is. ImagesError when a decoding process
        dies, or for a batch that is no [N, 3, H, W].
        """
        assert start >= 0 and 0 <= rank < world
        select = slice(start + (rank - start) % world, None, world)
        if self._files is not None:
            places = None if self._chosen is None else self._chosen.numpy()
            return load(self._files, places, self.config, self.batch_size, select, self.workers)
        if isinstance(self._tensors, Tensor):
            return self._of_tensor(self._tensors, select)
        return self._of_batches(self._tensors, select)

    def batches(self) -> Iterator[Tensor]:
        """One pass over all images, [B, 3, H, W] with B > 0; fills `report` afresh. ImagesError when not a single image
        could be read."""
        self.report = report = ImageReport()
        for batch in self.numbered():
            report.hashes.extend(batch.hashes)
            report.skipped += batch.skipped
            if len(batch.images):
                yield batch.images
        if not len(report.hashes) and not report.skipped:
            raise ImagesError("There are no images; give at least one.")
        if not len(report.hashes):
            raise none_read(report.skipped)

    def name(self, place: int) -> str:
        """The file at a place (`shard.tar/member.jpg` in a shard); for tensors, the place."""
        return self._files.name(place) if self._files is not None else str(place)

    def read(self, place: int) -> bytes:
        """The encoded image at a place. OSError or ImagesError where it cannot be read or there are no files."""
        if self._files is None:
            raise ImagesError("These images are tensors; give files for what needs the pictures themselves.")
        return self._files.read(place)

    def encoded(self, limit: int | None = None) -> Iterator[bytes]:
        """The encoded images, as they lie in their files; at most `limit`, spread evenly over the source, less those
        that cannot be read. None at all for tensors."""
        files, chosen = self._files, self._chosen
        if files is None:
            return
        places = np.arange(len(files)) if chosen is None else chosen.numpy()
        for place in places if limit is None else places[spread(len(places), limit)]:
            try:
                data = files.read(int(place))
            except (ImagesError, OSError):
                continue
            yield data

    def _of_tensor(self, images: Tensor, select: slice) -> Iterator[Batch]:
        places = torch.arange(len(images)) if self._chosen is None else self._chosen
        for number in range(-(-len(places) // self.batch_size))[select]:
            where = places[number * self.batch_size : (number + 1) * self.batch_size]
            yield _given(number, where, images[where.to(images.device)])

    def _of_batches(self, batches: Iterable[Any], select: slice) -> Iterator[Batch]:
        place = 0
        for number, batch in enumerate(map(_tensor_of, batches)):
            self._check(batch)
            batch = batch[: None if self.limit is None else self.limit - place]
            if number >= select.start and (number - select.start) % select.step == 0:
                yield _given(number, torch.arange(place, place + len(batch)), batch)
            place += len(batch)
            if place == self.limit:
                return

    def _check(self, batch: Tensor) -> None:
        if batch.dim() != 4 or tuple(batch.shape[1:]) != tuple(self.config.input_size):
            expected = ", ".join(map(str, self.config.input_size))
            raise ImagesError(f"A batch of images has the shape [N, {expected}], not {list(batch.shape)}.")
        if not batch.is_floating_point():
            raise ImagesError(
                f"A batch of images holds floating-point numbers, normalised for the model, not {batch.dtype}; give it "
                "so, or give the files."
            )


def _tensor_of(item: Any) -> Tensor:
    """The images of what a DataLoader gives: a tensor, or images with labels. ImagesError for anything else."""
    images = item[0] if isinstance(item, list | tuple) and item else item
    if not isinstance(images, Tensor):
        raise _of_no_kind(images)
    return images


def _of_no_kind(images: Any) -> ImagesError:
    return ImagesError(
        "Images are a folder, a list of files, tar shards, a tensor [N, 3, H, W] or an iterable of such tensors, not "
        f"{type(images).__name__}."
    )


def _given(number: int, places: Tensor, images: Tensor) -> Batch:
    images = images.detach().float()
    return Batch(
        number, places, images, b"".join(image_hash(i.contiguous().numpy().tobytes()) for i in images.cpu()), []
    )
