"""Figures with intervals: bootstrap over features and images together, and paired differences of two feature sets.

Images are drawn as random halves without replacement: an image drawn twice would stand beside itself in a set of
exemplars, with cosine 1. Such halves have the variance of the whole sample's figure (the delete-half jackknife, Shao &
Wu 1989). Features are drawn with replacement, those of one neuron together, since siblings are not independent.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class Estimate:
    """A figure with its bootstrap draws. The draws' own mean is taken off: half the images have less extreme ends."""

    value: float
    draws: np.ndarray

    @property
    def interval(self) -> tuple[float, float]:
        found = self.draws[np.isfinite(self.draws)]
        if not np.isfinite(self.value) or len(found) < 2:
            return float("nan"), float("nan")
        low, high = np.quantile(found - found.mean(), ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        return self.value + float(low), self.value + float(high)

    def __sub__(self, other: Estimate) -> Estimate:
        """The paired difference: both were drawn on the same halves of the images."""
        return Estimate(self.value - other.value, self.draws - other.draws)

    def document(self) -> dict[str, float | None]:
        low, high = self.interval
        return {"value": number(self.value), "low": number(low), "high": number(high)}


def number(value: float | None, digits: int = 5) -> float | None:
    """For JSON: rounded, None where it is no number."""
    return None if value is None or not np.isfinite(value) else round(float(value), digits)


def image_halves(images: int, draws: int, seed: int) -> Tensor:
    """bool [N, draws + 1]: all images first, then random halves."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(draws, images, generator=generator).argsort(1)
    halves = torch.zeros(draws, images, dtype=torch.bool).scatter_(1, order[:, : (images + 1) // 2], True)
    return torch.cat([torch.ones(1, images, dtype=torch.bool), halves]).T.contiguous()


@dataclass(frozen=True, eq=False)
class FeatureDraws:
    """How often each feature was drawn: float32 [draws + 1, F], once each in the first row."""

    counts: Tensor

    @classmethod
    def of(cls, name: str, features: int, draws: int, seed: int, neurons: Tensor | None = None) -> FeatureDraws:
        """neurons int64 [F]: features of one neuron are drawn together, and alike for every set of the same neurons, so
        that sets made of the same neurons are compared in pairs."""
        clusters = torch.arange(features) if neurons is None else neurons.unique(return_inverse=True)[1]
        own = 0 if neurons is not None else zlib.crc32(name.encode())
        generator = np.random.default_rng([seed, own])
        number = int(clusters.max()) + 1 if features else 0
        counts = [np.ones((1, number)), generator.multinomial(number, np.full(number, 1 / max(1, number)), draws)]
        return cls(torch.from_numpy(np.concatenate(counts)).float()[:, clusters])

    def average(self, scores: Tensor, weights: Tensor) -> Estimate:
        """The weighted mean of scores [F, E, draws + 1] (or [F, E]: the same in every draw) over features and E ends,
        with weights [F, E]; a score that is NaN takes no part."""
        draws = len(self.counts)
        scores = scores[..., None].expand(*scores.shape, draws) if scores.dim() == 2 else scores
        there = torch.isfinite(scores)
        weight = weights[..., None] * there * self.counts.T[:, None]
        total = weight.double().sum((0, 1))
        found = (weight * scores.nan_to_num(0.0)).double().sum((0, 1)) / total
        values = found.numpy()
        return Estimate(float(values[0]), values[1:])
