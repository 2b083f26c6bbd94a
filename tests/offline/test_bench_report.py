"""The benchmark of a report's pages measures what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_checkpoint import checkpoint

from elude_runtime.errors import EludeError
from elude_runtime.offline import bench_report


def test_it_measures_pages_and_keystrokes(tmp_path: Path) -> None:
    if bench_report.chromium() is None:
        pytest.skip("no Chromium on this machine (Debian or Ubuntu: sudo apt-get install chromium)")
    pytest.importorskip("playwright", reason="playwright is not installed (pip install '.[dev]')")
    found = bench_report.measure_report(checkpoint(tmp_path / "ckpt"), 300, 1)
    assert found["megabytes"] > 0.1 and found["gallery"]["features"] >= 300
    assert set(found["pages_ms"]) == {"index.html", "features.html", "feature page", "class page"}
    assert all(times["largest"] >= times["median"] > 0 for times in found["pages_ms"].values())
    keys = found["gallery"]["keystroke_ms"]
    assert keys["keystrokes"] > 40 and keys["shown_median"] >= keys["script_median"] > 0


def test_without_a_browser_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EludeError, match="apt-get install chromium"), bench_report.browser():
        pass
