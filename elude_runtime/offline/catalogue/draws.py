"""What is drawn at random for each image: the same numbers in whatever order and run the images come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Draws:
    """Of the image at each place a priority and one of its tokens, by the seed and the place alone."""

    seed: int

    def of(self, places: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """(priorities float32 [B] in 0..1, tokens int64 [B] in 0..tokens - 1)."""
        priority, token = (_uniform(places, 2 * self.seed + number) for number in range(2))
        return torch.from_numpy(priority.astype(np.float32)), torch.from_numpy((token * tokens).astype(np.int64))


def _uniform(places: Tensor, seed: int) -> np.ndarray:
    """SplitMix64 (Steele, Lea and Flood 2014) of the places, as float64 in [0, 1)."""
    with np.errstate(over="ignore"):
        z = places.numpy().astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 & _MASK)
        z = z * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53
