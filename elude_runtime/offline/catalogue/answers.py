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

    def __init__(self, classes: int) -> None:
        first = min(CLASSES, classes)
        self.count = 0
        self.total = torch.zeros(classes, dtype=torch.float64)
        self.places = torch.zeros(0, dtype=torch.int64)
        self.hashes = torch.zeros(0, HASH_BYTES, dtype=torch.uint8)
        self.classes = torch.zeros(0, first, dtype=torch.int32)
        self.probabilities = torch.zeros(0, first)
        self._needed = 0

    @property
    def base_rate(self) -> Tensor:
        """float64 [K]: the mean probability of each class."""
        return self.total / max(1, self.count)

    def add(self, places: Tensor, hashes: bytes, output: Tensor) -> None:
        """output [B, K]: the model's logits, or an embedding."""
        self.count += len(places)
        probabilities = output.float().softmax(1).cpu() if len(self.total) else output.new_zeros(len(places), 0).cpu()
        self.total += probabilities.sum(0, dtype=torch.float64)
        first = probabilities.topk(self.classes.shape[1], dim=1)
        self.places = torch.cat([self.places, places])
        digests = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, HASH_BYTES)
        self.hashes = torch.cat([self.hashes, digests])
        self.classes = torch.cat([self.classes, first.indices.int()])
        self.probabilities = torch.cat([self.probabilities, first.values.float()])

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
