"""What pass one read at which place, so that whoever reads an image again knows that it is the same."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elude_runtime.errors import ImagesError
from elude_runtime.offline.image_loading import HASH_BYTES
from elude_runtime.offline.images import Batch, ImageReport, ImageSource


@dataclass
class SeenImages(ImageReport):
    """An ImageReport with the place of every image in the source, ascending: 24 bytes an image."""

    numbers: array[int] = field(default_factory=lambda: array("q"))

    @classmethod
    def of(cls, states: Iterable[dict[str, Any]]) -> Self:
        """From the states of processes that each read their own batches."""
        made, shares = cls(), list(states)
        places = np.concatenate([share["places"].numpy() for share in shares])
        hashes = np.concatenate([share["hashes"].numpy().reshape(-1, HASH_BYTES) for share in shares])
        order = np.argsort(places)
        made.numbers.frombytes(places[order].tobytes())
        made.hashes.extend(hashes[order].tobytes())
        made.skipped = [(file, reason) for share in shares for file, reason in share["skipped"]]
        return made

    def state(self) -> dict[str, Any]:
        hashes = torch.tensor(self.hashes.data, dtype=torch.uint8)
        return {"places": self.places, "hashes": hashes, "skipped": self.skipped}

    def add(self, batch: Batch) -> None:
        """Take in a batch that comes after the others."""
        self.numbers.frombytes(batch.places.numpy().tobytes())
        self.hashes.extend(batch.hashes)
        self.skipped += batch.skipped

    @property
    def places(self) -> Tensor:
        """int64 [N]."""
        return torch.tensor(self.numbers, dtype=torch.int64)

    @property
    def digest(self) -> str:
        """SHA-256 over places and contents."""
        return hashlib.sha256(self.numbers.tobytes() + self.hashes.data).hexdigest()

    def check(self, batch: Batch, source: ImageSource) -> None:
        """ImagesError unless these are the images that were read at the batch's places, all of them."""
        advice = "the images have to stay as they are, and in their order, until the rewrite is done."
        for file, reason in batch.skipped:
            raise ImagesError(f"{file} could be read before and cannot any more ({reason.rstrip('.')}); {advice}")
        known, hashes = np.frombuffer(self.numbers, np.int64), _pairs(self.hashes.data)
        rows = np.searchsorted(known, batch.places.numpy())
        there = rows < len(known)
        rows = np.where(there, rows, 0)
        same = there & (known[rows] == batch.places.numpy()) & (hashes[rows] == _pairs(batch.hashes)).all(1)
        if not same.all():
            place = int(batch.places[int(np.argmin(same))])
            raise ImagesError(f"Image {source.name(place)} is another than when it was first read; {advice}")


def _pairs(hashes: bytes | bytearray) -> NDArray[np.uint64]:
    """Hashes of 16 bytes as [N, 2]."""
    return np.frombuffer(hashes, np.uint64).reshape(-1, 2)
