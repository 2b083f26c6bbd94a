"""The images that pages look at, in memory: sent once, then named by their digest while sliders move."""

from __future__ import annotations

import hashlib
from collections import OrderedDict


class ImageStore:
    """The last few encoded images. A page whose image is gone sends it again."""

    def __init__(self, count: int = 8, total_bytes: int = 64_000_000) -> None:
        self._count, self._total = count, total_bytes
        self._images: OrderedDict[str, bytes] = OrderedDict()

    def put(self, encoded: bytes) -> str:
        """Keeps an image; gives its SHA-256, by which it is asked for."""
        name = hashlib.sha256(encoded).hexdigest()
        self._images[name] = encoded
        self._images.move_to_end(name)
        while len(self._images) > 1 and (len(self._images) > self._count or self._bytes() > self._total):
            self._images.popitem(last=False)
        return name

    def get(self, name: str) -> bytes | None:
        if name in self._images:
            self._images.move_to_end(name)
        return self._images.get(name)

    def _bytes(self) -> int:
        return sum(map(len, self._images.values()))
