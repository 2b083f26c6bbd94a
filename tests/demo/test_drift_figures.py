"""Drift on the demo's network names the watermark's features, and no feature without a watermark."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drift_reference import EXPECTED, index, null

from elude_runtime.demo.drift import drift_figures
from elude_runtime.metrics.drift import chance_of_psi, stability_index


def test_drift_names_what_the_watermark_changes(tmp_path: Path) -> None:
    figures = drift_figures(tmp_path, 120)
    guilty = figures["changed most by the watermark"].split(", ")
    marked, without = figures["with it"], figures["without the watermark"]
    assert set(list(marked["above chance, the first"])[:2]) <= set(guilty)
    assert min(list(marked["above chance, the first"].values())[:2]) > 4
    assert max(without["above chance, the first"].values()) < 1
    assert without["median"] == pytest.approx(figures["index that chance makes"], rel=0.4)


def test_the_index_is_the_tests_own() -> None:
    counts = np.random.default_rng(0).multinomial(300, EXPECTED)
    assert stability_index(counts) == pytest.approx(index(counts)) and chance_of_psi(300, 500) == null(300, 500)
