"""What the model says of the images that are exemplars, and how often it says so of all."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from elude_runtime.offline.collect import State
from elude_runtime.offline.image_loading import HASH_BYTES

CLASSES = 10  # first classes kept of an image
SAMPLE = 500  # images drawn at random
_LARGEST = float(torch.finfo(torch.float16).max)
_SPARE = 1000  # images that may be kept beside those needed before the others are let go


class Answers:
    """Of the images still needed: places int64 [N] ascending, hashes uint8 [N, 16], logits float16 [N, K], each image's
    mean taken off, and probabilities float32 [N, <= 10] of its first classes int32 [N, <= 10]. Of all `count` images:
    the sum of those logits and of their squares, float64 [K]; sample float16 [S, K]: those of the S <= 500 images drawn
    first. Of an embedding there are no classes."""

    def __init__(self) -> None:
        self.count = 0
        self.total = torch.zeros(0, dtype=torch.float64)
        self.squares = torch.zeros(0, dtype=torch.float64)
        self.places = torch.zeros(0, dtype=torch.int64)
        self.hashes = torch.zeros(0, HASH_BYTES, dtype=torch.uint8)
        self.logits = torch.zeros(0, 0, dtype=torch.float16)
        self.classes = torch.zeros(0, 0, dtype=torch.int32)
        self.probabilities = torch.zeros(0, 0)
        self.sample = torch.zeros(0, 0, dtype=torch.float16)
        self._drawn = torch.zeros(0)
        self._needed = 0

    @property
    def mean(self) -> Tensor:
        """float64 [K]: of each class's centred logit, over all images."""
        return self.total / max(1, self.count)

    @property
    def std(self) -> Tensor:
        """float64 [K]: its standard deviation."""
        return (self.squares / max(1, self.count) - self.mean.square()).clamp(min=0).sqrt()

    def add(self, places: Tensor, hashes: bytes, logits: Tensor | None, drawn: Tensor) -> None:
        """logits [B, K]; None where the model's output is an embedding. drawn [B]: lots, the smallest of which win."""
        answers = torch.zeros(len(places), 0) if logits is None else logits.float().cpu()
        first = answers.softmax(1).topk(min(CLASSES, answers.shape[1]), dim=1)
        centred = answers - answers.mean(1, keepdim=True) if answers.shape[1] else answers
        total, squares = centred.sum(0, dtype=torch.float64), centred.square().sum(0, dtype=torch.float64)
        digests = torch.frombuffer(bytearray(hashes), dtype=torch.uint8).view(-1, HASH_BYTES)
        half = centred.clamp(-_LARGEST, _LARGEST).half()
        if not self.count:
            self.total, self.squares, self.logits = total, squares, half
            self.classes, self.probabilities = first.indices.int(), first.values
        else:
            self.total += total
            self.squares += squares
            self.logits = torch.cat([self.logits, half])
            self.classes = torch.cat([self.classes, first.indices.int()])
            self.probabilities = torch.cat([self.probabilities, first.values])
        lots = torch.cat([self._drawn, drawn])
        winners = lots.topk(min(SAMPLE, len(lots)), largest=False).indices.sort().values
        self.sample = (torch.cat([self.sample, half]) if self.count else half)[winners]
        self._drawn = lots[winners]
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
        self.logits, self.classes, self.probabilities = self.logits[own], self.classes[own], self.probabilities[own]
        self._needed = len(self.places)

    def rows(self, places: Tensor) -> Tensor:
        """int64: where these places, all of them kept, stand."""
        return torch.searchsorted(self.places, places)

    def state(self) -> State:
        names = (
            "count", "total", "squares", "places", "hashes", "logits", "classes", "probabilities", "sample", "_drawn",
            "_needed",
        )  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def restore(self, state: State) -> None:
        for name, value in state.items():
            setattr(self, name, value)
