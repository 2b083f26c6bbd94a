"""`elude report`: what it prints and refuses."""

from __future__ import annotations

import json
from pathlib import Path

from report_checkpoint import checkpoint
from support import Run


def test_it_names_the_page_to_open(run: Run, tmp_path: Path) -> None:
    ran = run("report", checkpoint(tmp_path / "ckpt"), "--out", tmp_path / "report")
    assert ran.code == 0 and ran.out.startswith(f"{tmp_path / 'report' / 'index.html'}: ")
    assert (tmp_path / "report" / "index.html").is_file()


def test_without_a_catalogue_it_says_which_command_makes_one(run: Run, tmp_path: Path) -> None:
    ran = run("report", checkpoint(tmp_path / "ckpt", catalogue=False), "--out", tmp_path / "report", "--json")
    assert ran.code == 0 and "elude catalogue ckpt" in ran.err
    assert json.loads(ran.out)["images"] == 0


def test_bad_input_is_one_sentence(run: Run, tmp_path: Path) -> None:
    ran = run("report", tmp_path / "none", "--out", tmp_path / "report")
    assert ran.code == 2 and "is not a directory" in ran.err and "Traceback" not in ran.err
