"""`elude bench serve` once, as small as it gets: two real servers, asked in turns. How fast they are is not tested."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from conftest import Rewritten
from support import Run, refused, write_pictures

from elude_runtime.cli.bench_serve import _show

SMALL = ("--pairs", 1, "--clients", 2, "--seconds", 0.05, "--threads", 1, "--max-images", 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("asked") / "set", 3)


def shown(found: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    _show(found)
    return capsys.readouterr().out


@pytest.mark.server
def test_plain_and_mixed(vit: Rewritten, folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("bench", "serve", vit.path, "--images", folder, *SMALL, "--mixed-seconds", 0.5, "--load", 0.1)
    ran = run(*asked, "--starts", 0, "--json")
    assert ran.code == 0, ran.err
    found = ran.document
    (plain,) = found["plain"]
    assert plain["clients"] == 2 and plain["requests"] % 2 == 0 and found["images"] == 2 and "start" not in found
    assert all(value > 0 for one in ("per_second", "p50_ms") for value in plain[one].values())
    mixed = found["mixed"]
    assert mixed["plain_rows"] >= 9 and mixed["explained_p50_ms"] > 0 and mixed["p99"]["pairs"] == 1
    assert found["settings"]["batchSize"] == 8 and found["environment"]["threads"] == 1
    text = shown(found, capsys)
    assert text.count("at least 0.97: ") == 1 and text.count("at most 1.03: ") == text.count("at most 1.3: ") == 1
    assert "10% of rows explained" in text and "READY" not in text


@pytest.mark.server
@pytest.mark.long
def test_starts(vit: Rewritten, folder: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("bench", "serve", vit.path, "--images", folder, *SMALL, "--mixed-seconds", 0, "--starts", 1, "--json")
    found = run(*asked).document
    assert "mixed" not in found and all(seconds > 0 for seconds in found["start"]["seconds"].values())
    assert "a worker READY" in shown(found, capsys)


def test_what_cannot_be_measured(vit: Rewritten, headless: Rewritten, folder: Path, run: Run, tmp_path: Path) -> None:
    refused(run("bench", "serve", headless.path, "--images", folder), "no classes")
    refused(run("bench", "serve", tmp_path, "--images", folder), "elude.json")
    (tmp_path / "model-config.yaml").write_text("- 1\n")
    asked = ("bench", "serve", vit.path, "--images", folder, "--config", tmp_path / "model-config.yaml")
    refused(run(*asked), "model-config.yaml cannot be read")
