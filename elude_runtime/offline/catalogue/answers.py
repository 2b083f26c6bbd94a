"""What the model says of the images that are exemplars, and how often it says so of all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from elude_runtime.offline.collect import State
from elude_runtime.offline.image_loading import HASH_BYTES

CLASSES = 10  # first classes kept of an image
_SPARE = 1000  # images that may be kept beside those needed before the others are let go


class Answers:
    """places int64 [N] ascending, hashes uint8 [N, 16], classes int32 and probabilities float32 [N, <= 10], largest
    first, of the images still needed; total float64 [K]: the sum of all images' probabilities, over `count` images.
    Of an embedding there are no classes."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(0, dtype=torch.float64)
        self.places = torch.zeros(0, dtype=torch.int64)
        self.hashes = torch.zeros(0, HASH_BYTES, dtype=torch.uint8)
        self.classes = torch.zeros(0, 0, dtype=torch.int32)
        self.probabilities = torch.zeros(0, 0)
        self._needed = 0

    @property
    def base_rate(self) -> Tensor:
        """float64 [K]: the mean probability of each class."""
        return self.total / max(1, self.count)

    def add(self, places: Tensor, hashes: bytes, logits: Tensor | None) -> None:
        """logits [B, K]; None where the model's output is an embedding."""
        probabilities = torch.zeros(len(places), 0) if logits is None else logits.float().softmax(1).cpu()
        first = probabilities.topk(min(CLASSES, probabilities.shape[1]), dim=1)
        total = probabilities.sum(0, dtype=torch.float64)
        digests = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, HASH_BYTES)
        if not self.count:
            self.total, self.classes, self.probabilities = total, first.indices.int(), first.values
        else:
            self.total += total
            self.classes = torch.cat([self.classes, first.indices.int()])
            self.probabilities = torch.cat([self.probabilities, first.values])
        self.count += len(places)
        self.places = torch.cat([self.places, places])
        self.hashes = torch.cat([self.hashes, digests])

    @property
    def crowded(self) -> bool:
        """Whether it is time to let go of images that nothing needs."""
        return len(self.places) > 2 * self._needed + _SPARE

    def keep(self, needed: Iterable[Tensor]) -> None:
        """Let go of all images but these."""
        wanted = torch.cat([n.flatten().unique() for n in needed]).unique()
        own = torch.isin(self.places, wanted)
        self.places, self.hashes = self.places[own], self.hashes[own]
        self.classes, self.probabilities = self.classes[own], self.probabilities[own]
        self._needed = len(self.places)

    def rows(self, places: Tensor) -> Tensor:
        """int64: where these places, all of them kept, stand."""
        return torch.searchsorted(self.places, places)

    def state(self) -> State:
        names = ("count", "total", "places", "hashes", "classes", "probabilities", "_needed")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)
