"""The population stability index, and what chance makes of it, written down once more in numpy."""

from __future__ import annotations

from typing import Any

import numpy as np

EXPECTED = np.array([0.01, 0.09, *[0.1] * 8, 0.09, 0.01])


def peaks(activations: Any) -> np.ndarray:
    """[N, T] of one feature -> [N]: the activation of largest absolute value."""
    values = np.asarray(activations)
    return values[np.arange(len(values)), np.abs(values).argmax(1)]


def index(buckets: np.ndarray) -> float:
    """Of counts [12], with one image of the expected shares added."""
    shares = (buckets + EXPECTED) / (buckets.sum() + 1)
    return float(((shares - EXPECTED) * np.log(shares / EXPECTED)).sum())


def null(images: float, expected_images: float) -> float:
    """The index's mean where nothing moved."""
    return (len(EXPECTED) - 1) * (1 / images + 1 / expected_images)
