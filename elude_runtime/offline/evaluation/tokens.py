"""Streaming over a layer's tokens: a sample with what they read, and every feature's extremes in every image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.offline.collect import token_inputs
from elude_runtime.offline.evaluation.feature_set import FeatureSet

_FLOATS = 16_000_000  # activations held at once: 64 MB
_BYTES = 600_000_000  # of a token sample
TOKENS = 60_000


class TokenReader:
    """What the tokens of one type of a layer read, as rows [tokens, G n q]."""

    def __init__(self, state: SplitState, token_type: int) -> None:
        self.state, self.token_type = state, token_type
        self.span = state.layout.slices[token_type]
        self.tokens = len(range(state.layout.total)[self.span])
        self.width = state.linear.groups * state.linear.inputs * state.linear.positions

    def read(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """(images, [b, T_p, G n q]) of the layer's input [B, ...], some images at a time, on the CPU."""
        for images, reads in token_inputs(self.state.linear, x):
            yield images, reads[:, self.span].flatten(2).cpu()


class TokenSample:
    """Tokens drawn at random, equally many of every image; of more images than tokens, images spread over all of them.

    What is drawn depends on the image's number and the seed alone. images: how many there will be at most.
    """

    def __init__(self, reader: TokenReader, images: int, seed: int, size: int = TOKENS) -> None:
        size = max(1, min(size, _BYTES // (4 * reader.width)))
        self._reader, self._seed, self._images, self._size = reader, seed, max(1, images), size
        self.each = max(1, min(reader.tokens, size // self._images))
        self._rows: list[Tensor] = []
        self._count = 0

    def add(self, x: Tensor) -> None:
        """The layer's input [B, ...] at the images that follow."""
        for _, reads in self._reader.read(x):
            for own in reads:
                number, self._count = self._count, self._count + 1
                if self._images > self._size and number * self._size // self._images == (
                    (number + 1) * self._size // self._images
                ):
                    continue
                generator = torch.Generator().manual_seed((self._seed * 1_000_003 + number) % 2**63)
                self._rows.append(own[torch.randperm(len(own), generator=generator)[: self.each]].clone())

    def inputs(self) -> Tensor:
        """float32 [S, G n q]."""
        return torch.cat(self._rows)


@dataclass(eq=False)
class Peaks:
    """Every image's largest and smallest activation of every feature, [N, F], and at which token, int32 [N, F]."""

    high: Tensor
    low: Tensor
    high_token: Tensor
    low_token: Tensor

    @classmethod
    def empty(cls, images: int, features: int) -> Peaks:
        values = [torch.empty(images, features) for _ in range(2)]
        return cls(*values, *(torch.empty(images, features, dtype=torch.int32) for _ in range(2)))

    def put(self, images: slice, activations: Tensor) -> None:
        """activations [b, T_p, F] of these images."""
        self.high[images], token = activations.max(1)
        self.high_token[images] = token.int()
        self.low[images], token = activations.min(1)
        self.low_token[images] = token.int()

    def ends(self) -> tuple[Tensor, Tensor]:
        """(values [2, N, F], tokens int64 [2, N, F]) of the positive and the negative end, most active largest."""
        return torch.stack([self.high, -self.low]), torch.stack([self.high_token, self.low_token]).long()


class PeakStream:
    """The extremes of several feature sets, filled batch by batch. Memory: images times features."""

    def __init__(self, reader: TokenReader, sets: Sequence[FeatureSet], images: int) -> None:
        self._reader, self._sets = reader, sets
        self.peaks = [Peaks.empty(images, len(one.share)) for one in sets]
        self.count = 0

    def add(self, x: Tensor) -> None:
        """The layer's input [B, ...] at the images that follow."""
        for _, reads in self._reader.read(x):
            for one, peaks in zip(self._sets, self.peaks, strict=True):
                step = max(1, _FLOATS // (self._reader.tokens * max(1, len(one.share))))
                for start in range(0, len(reads), step):
                    part = reads[start : start + step]
                    values = one.activations(part.flatten(0, 1)).unflatten(0, part.shape[:2])
                    first = self.count + start
                    peaks.put(slice(first, first + len(part)), values)
            self.count += len(reads)
