"""The population stability index, and what chance makes of it, written down once more: in numpy, from counts."""

from __future__ import annotations

from typing import Any

import numpy as np

EXPECTED = np.array([0.01, 0.09, *[0.1] * 8, 0.09, 0.01])


def bucket_shares(activations: Any, edges: Any) -> np.ndarray:
    """[N, T] of one feature -> [N, 12], the share of an image's tokens in each bucket."""
    return np.stack(
        [np.bincount(np.searchsorted(edges, row), minlength=12) / len(row) for row in np.asarray(activations)]
    )


def index(buckets: np.ndarray) -> tuple[float, np.ndarray]:
    """Counts [12] -> the index and the shares, with one image of the expected shares added."""
    shares = (buckets + EXPECTED) / (buckets.sum() + 1)
    return float(((shares - EXPECTED) * np.log(shares / EXPECTED)).sum()), shares


def null(buckets: np.ndarray, squares: float, calibration: int) -> float:
    """The index's mean where nothing moved: of n images against N of the calibration."""
    n = buckets.sum()
    _, shares = index(buckets)
    return max(0.0, squares / n - float((shares**2 / EXPECTED).sum())) * (1 / n + 1 / calibration)
