"""Going on after a kill: the same bytes as a run that nobody disturbed, and nothing read twice without need."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import VIT_ARGS, VIT_DATA, tiny_vit, write_pictures

import elude_runtime as elude
from elude_runtime.checkpoint.storage import new_directory
from elude_runtime.errors import StorageError
from elude_runtime.offline.ranks import Ranks
from elude_runtime.offline.resume import Resume, resume_folder

RUN = """
import os, signal, sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import elude_runtime.partition.sign_split as split
split.CHUNK_FLOATS = 40 * 128 * 5
import elude_runtime.offline.input_cache as cache
cache.BUDGET = {budget!r}
from support import VIT_ARGS, VIT_DATA, tiny_vit
from elude_runtime.network.build import build_timm
from elude_runtime.checkpoint.manifest import ModelSource
from elude_runtime.errors import EludeError
from elude_runtime.offline.rewrite import BaseModel, rewrite_checkpoint
from elude_runtime.partition import SplitConfig
from pathlib import Path

kill_at = {kill_at!r}
calls = 0
def progress(stage, done, total):
    global calls
    print(stage, done, flush=True)
    if kill_at and stage == kill_at[0] and done:
        calls += 1
        if calls == kill_at[1]:
            os.kill(os.getpid(), signal.SIGKILL)

base = BaseModel(tiny_vit(), ModelSource(kind="timm", name="vit_tiny_patch16_224", args=VIT_ARGS))
try:
    rewrite_checkpoint(
        base, Path({images!r}), Path({out!r}), SplitConfig(4, 40, seed={seed}), layers=["blocks.1.mlp.fc2"],
        concepts=4, data_config=VIT_DATA, batch_size=4, save_every=0, progress=progress,
    )
except EludeError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
"""

FACTORY = """
import timm

def make(**args):
    size = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)
    return timm.create_model("vit_tiny_patch16_224", **size, **args)
"""


def run(
    out: Path, images: Path, kill_at: tuple[str, int] | None = None, seed: int = 0, budget: int = 0
) -> tuple[int, list[str]]:
    """(exit code, progress lines); budget: bytes of layer inputs that pass one may leave on disk"""
    tests = str(Path(__file__).parent.parent)
    code = RUN.format(tests=tests, images=str(images), out=str(out), kill_at=kill_at, seed=seed, budget=budget)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "Traceback" not in ran.stderr, ran.stderr
    return ran.returncode, ran.stdout.splitlines()


def images_done(lines: list[str], stage: str) -> list[int]:
    return [int(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(stage)]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_pictures(tmp_path_factory.mktemp("resume") / "set", 18)
    (folder / "003b.png").write_bytes(b"no picture")  # skipped before the kill, and counted after it
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "ckpt"
    assert run(out, images)[0] == 0
    return out


@pytest.mark.parametrize(
    ("kill_at", "done"),
    [
        (("token statistics", 3), {"token statistics": [12, 4, 3], "chosen tokens": [0, 4, 4, 4, 4, 2]}),
        (("chosen tokens", 3), {"token statistics": [19], "chosen tokens": [12, 4, 2]}),
        (("partition of blocks.1.mlp.fc2", 4), {"token statistics": [19], "chosen tokens": [18]}),
    ],
)
def test_a_killed_rewrite_goes_on(
    tmp_path: Path, images: Path, undisturbed: Path, kill_at: tuple[str, int], done: dict[str, list[int]]
) -> None:
    """Killed when the third batch of four has just been saved: what was done is shown as done, and not done again."""
    out = tmp_path / "ckpt"
    assert run(out, images, kill_at)[0] == -9
    assert not out.exists() and resume_folder(out).is_dir()
    code, lines = run(out, images)
    assert code == 0
    assert {stage: images_done(lines, stage) for stage in done} == done
    for name in ("elude.json", "model.safetensors", "features.parquet"):
        assert (out / name).read_bytes() == (undisturbed / name).read_bytes(), name
    assert [p.name for p in tmp_path.iterdir()] == ["ckpt"]


def test_other_settings_begin_anew(tmp_path: Path, images: Path) -> None:
    out = tmp_path / "ckpt"
    run(out, images, ("chosen tokens", 2))
    code, lines = run(out, images, seed=1)
    assert code == 0 and images_done(lines, "token statistics")[:2] == [0, 4]


@pytest.mark.parametrize(
    ("kill_at", "name", "size", "first"),
    [
        (("chosen tokens", 3), "statistics.0.pt", 0, "token statistics 0"),
        (("token statistics", 3), "inputs.1", 90, "token statistics 12"),
        (("chosen tokens", 3), "tokens.0.0", 4096, "chosen tokens 0"),
        (("chosen tokens", 3), "tokens.0.pt", 90, "chosen tokens 0"),
        (("partition of blocks.1.mlp.fc2", 4), "edges.blocks.1.mlp.fc2.0.0.pt", 0, "chosen tokens 18"),
        (("partition of blocks.1.mlp.fc2", 4), "settings", 0, "token statistics 0"),
    ],
)
def test_a_damaged_file_is_made_again(
    tmp_path: Path, images: Path, undisturbed: Path, kill_at: tuple[str, int], name: str, size: int, first: str
) -> None:
    """As a machine that fails leaves it: empty or cut off."""
    out, budget = tmp_path / "ckpt", 2**30 if name == "inputs.1" else 0
    assert run(out, images, kill_at, budget=budget)[0] == -9
    assert (resume_folder(out) / name).stat().st_size > size
    os.truncate(resume_folder(out) / name, size)
    code, lines = run(out, images, budget=budget)
    assert code == 0 and first in lines
    for file in ("elude.json", "model.safetensors", "features.parquet"):
        assert (out / file).read_bytes() == (undisturbed / file).read_bytes(), file


def test_whatever_the_result_depends_on_begins_anew(
    tmp_path: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[dict[str, Any]] = []

    class Begun(Exception):
        pass

    class Alone(Ranks):
        def gather(self, value: Any) -> list[Any]:
            return [value]

    def note(out: Path, settings: dict[str, Any], *_: Any) -> None:
        found.append(settings)
        raise Begun

    monkeypatch.setattr("elude_runtime.offline.rewrite.Resume", note)
    others = write_pictures(tmp_path / "others", 18)
    factory = tmp_path / "factory.py"
    factory.write_text(FACTORY)
    (tmp_path / "edited").mkdir()
    (tmp_path / "edited" / "factory.py").write_text(FACTORY + "# edited\n")
    of_factory = {"model_args": {}, "factory": f"{factory}:make"}
    changes: list[dict[str, Any]] = [
        {}, {"layers": ["blocks.0.mlp.fc2"]}, {"subunits": 6}, {"tokens": 41}, {"seed": 1}, {"batch_size": 5},
        {"max_images": 7}, {"data_config": replace(VIT_DATA, mean=(0.4, 0.5, 0.5))}, {"images": others},
        {"weights": 1}, {"threads": 2}, {"processes": "2"}, {"model_args": {**VIT_ARGS, "act_layer": "relu"}},
        of_factory, {**of_factory, "model_args": {"act_layer": "relu"}},
        {**of_factory, "factory": f"{tmp_path}/edited/factory.py:make"},
    ]  # fmt: skip
    for change in changes:
        arguments = {
            "layers": ["blocks.1.mlp.fc2"], "data_config": VIT_DATA, "images": images, "model_args": VIT_ARGS, **change
        }  # fmt: skip
        model = tiny_vit(**arguments["model_args"])
        with torch.no_grad():
            model.head.bias += arguments.pop("weights", 0)
        before = torch.get_num_threads()
        torch.set_num_threads(arguments.pop("threads", before))
        ranks = Alone(0, int(arguments.pop("processes", 1)))
        monkeypatch.setattr("elude_runtime.offline.rewrite.joined", lambda ranks=ranks: nullcontext(ranks))
        try:
            with pytest.raises(Begun):
                elude.rewrite(model, arguments.pop("images"), out=tmp_path / "c", **arguments)
        finally:
            torch.set_num_threads(before)
    assert len({json.dumps(settings, sort_keys=True) for settings in found}) == len(changes)


def test_the_progress_of_other_images_is_not_used(tmp_path: Path) -> None:
    folder, out = write_pictures(tmp_path / "set", 12), tmp_path / "ckpt"
    run(out, folder, ("chosen tokens", 2))
    write_pictures(folder, 1, first=12)
    code, lines = run(out, folder)
    assert code == 0 and images_done(lines, "token statistics")[:2] == [0, 4]


class TestFolder:
    def test_what_was_saved_is_loaded_by_the_same_settings_only(self, tmp_path: Path) -> None:
        out, state = tmp_path / "c", {"next": 3, "sums": [None, (torch.arange(3.0), torch.zeros(3))]}
        with pytest.raises(KeyboardInterrupt), Resume(out, {"seed": 0}, Ranks()) as resume:
            assert resume.load("statistics") is None
            resume.save("statistics", state)
            raise KeyboardInterrupt
        with pytest.raises(KeyboardInterrupt), Resume(out, {"seed": 0}, Ranks()) as resume:
            loaded = resume.load("statistics")
            assert loaded is not None and loaded["next"] == 3 and torch.equal(loaded["sums"][1][0], torch.arange(3.0))
            raise KeyboardInterrupt
        with Resume(out, {"seed": 1}, Ranks()) as resume:
            assert resume.load("statistics") is None
        assert list(tmp_path.iterdir()) == []

    def test_what_was_saved_on_another_basis_is_not_loaded(self, tmp_path: Path) -> None:
        with Resume(tmp_path / "c", {}, Ranks()) as resume:
            resume.save("statistics", {"next": 1})
            resume.basis = "of these images"
            assert resume.load("statistics") is None
            resume.save("tokens", {"next": 2})
            assert resume.load("tokens") == {"next": 2}
            resume.basis = "of others"
            assert resume.load("tokens") is None

    def test_an_error_says_that_progress_was_kept(self, tmp_path: Path) -> None:
        out = tmp_path / "c"
        with pytest.raises(ValueError, match="x") as caught, Resume(out, {}, Ranks()) as resume:
            resume.save("statistics", {})
            raise ValueError("x")
        assert caught.value.__notes__ == [
            f"Progress is kept in {resume_folder(out)}; the same command goes on from it."
        ]
        with Resume(out, {}, Ranks()):
            with pytest.raises(StorageError, match="Another") as refused, Resume(out, {}, Ranks()):
                pass
            assert not hasattr(refused.value, "__notes__")

    def test_nothing_saved_nothing_left(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="x"), Resume(tmp_path / "c", {}, Ranks()):
            raise ValueError("x")
        assert list(tmp_path.iterdir()) == []

    def test_a_second_run_is_refused_while_the_first_goes_on(self, tmp_path: Path) -> None:
        with Resume(tmp_path / "c", {}, Ranks()) as first:
            first.save("statistics", {"next": 1})
            with pytest.raises(StorageError, match="Another run"), Resume(tmp_path / "c", {}, Ranks()):
                pass
            assert first.load("statistics") == {"next": 1}

    def test_a_run_that_waited_for_the_lock_of_one_that_ended(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The file it opened is gone when it gets the lock on it: a third run would lock a new one."""
        first, flock = Resume(tmp_path / "c", {}, Ranks()).__enter__(), fcntl.flock

        def late(handle: int, how: int) -> None:
            monkeypatch.setattr(fcntl, "flock", flock)
            first.__exit__(None, None, None)
            flock(handle, how)

        monkeypatch.setattr(fcntl, "flock", late)
        second, third = (Resume(tmp_path / "c", {}, Ranks()) for _ in range(2))
        with second, pytest.raises(StorageError, match="Another run"), third:
            pass
        assert list(tmp_path.iterdir()) == []

    def test_a_neighbours_files_are_left_alone(self, tmp_path: Path) -> None:
        """Names that begin with this one's, or that it would match as a pattern."""
        for name, other in (("run", "run.v2"), ("ck[1]", "ck1"), ("run", "run.resume")):
            with (
                Resume(tmp_path / other, {}, Ranks()) as theirs,
                new_directory(tmp_path / other, within=theirs.folder) as work,
                new_directory(tmp_path / f"{other}.b") as beside,
            ):
                theirs.save("statistics", {})
                with Resume(tmp_path / name, {}, Ranks()):
                    pass
                assert work.is_dir() and beside.is_dir() and theirs.load("statistics") == {}

    def test_what_a_killed_run_was_writing_is_removed(self, tmp_path: Path) -> None:
        out = tmp_path / "c"
        left = resume_folder(out) / ".c.abcdefgh.part"
        left.mkdir(parents=True)
        (left / "model.safetensors").write_text("x")
        with Resume(out, {}, Ranks()) as resume:
            assert {p.name for p in resume.folder.iterdir()} == {"lock", "settings"}

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        with pytest.raises(StorageError, match="could not be written"), Resume(tmp_path / ("c" * 250), {}, Ranks()):
            pass
        assert list(tmp_path.iterdir()) == []

    def test_images_that_cannot_be_told_from_others_are_never_due(self, tmp_path: Path) -> None:
        with Resume(tmp_path / "c", None, Ranks(), every=0) as resume:
            assert not resume.due()
        with Resume(tmp_path / "c", {}, Ranks(), every=0) as resume:
            assert resume.due()

    def test_saved_at_intervals(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = itertools.count(0, 25)
        monkeypatch.setattr(time, "monotonic", lambda: next(clock))
        with Resume(tmp_path / "c", {}, Ranks(), every=60) as resume:  # made at 0
            assert [resume.due() for _ in range(3)] == [False, False, True]
            resume.save("statistics", {})  # at 100
            assert not resume.due()

    def test_each_process_has_its_own_share(self, tmp_path: Path) -> None:
        with Resume(tmp_path / "c", {}, Ranks()) as resume:
            resume.save("statistics", {"next": 1})
            other = Resume(tmp_path / "c", {}, Ranks())
            other.ranks = Ranks(1, 2)
            assert other.load("statistics") is None
