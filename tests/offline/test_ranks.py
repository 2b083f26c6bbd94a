"""Several processes under torchrun: the same partition as one, whatever their number."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import write_pictures

from elude_runtime.errors import SettingsError
from elude_runtime.offline.ranks import Ranks, joined, launched

RUN = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import elude_runtime.offline.input_cache as cache
import elude_runtime.partition.sign_split as split
cache.BUDGET = {budget!r}
split.CHUNK_FLOATS = 30 * 128 * 5  # chunks of a few neurons, so that the processes share the clustering too
from support import VIT_ARGS, VIT_DATA, tiny_vit
from elude_runtime.checkpoint.manifest import ModelSource
from elude_runtime.errors import EludeError
from elude_runtime.offline.rewrite import BaseModel, rewrite_checkpoint
from elude_runtime.partition import SplitConfig

rank = int(os.environ.get("RANK", 0))
said = Path({said!r}, str(rank)).open("w")  # one file a process: what two print at once gets mixed
calls = 0
def progress(stage, done, total):
    global calls
    print(stage, done, file=said, flush=True)
    if stage == {kill_at!r} and done:
        calls += 1
        if calls == 2:
            os.kill(os.getpid(), signal.SIGKILL)

model, images = tiny_vit(), Path({images!r})
{prepare}
try:
    result = rewrite_checkpoint(
        BaseModel(model, ModelSource(kind="timm", name="vit_tiny_patch16_224", args=VIT_ARGS)), images, Path({out!r}),
        SplitConfig(4, 30), layers=["blocks.0.attn.proj", "blocks.1.mlp.fc2"], concepts=4, data_config=VIT_DATA,
        batch_size=4, save_every=0, progress=progress,
    )
    print("made", result.manifest.partition_sha256, result.manifest.calibration.skipped, file=said)
except EludeError as error:
    print("refused:", error, file=said, flush=True)
    sys.exit(2)
"""


@dataclass(frozen=True)
class Ended:
    """code: the launcher's; lines: what each process said, by rank; err: their standard error."""

    code: int
    lines: list[list[str]]
    err: str


def run(out: Path, images: Path, processes: int, budget: int = 2**30, kill_at: str = "", prepare: str = "") -> Ended:
    """Rewrite to `out` in several processes; prepare: code that may change `model` and `images` of a `rank`."""
    said = out.parent / f"said by {out.name}"
    said.mkdir(exist_ok=True)
    file = said / "run.py"
    file.write_text(
        RUN.format(
            tests=str(Path(__file__).parent.parent), images=str(images), out=str(out), said=str(said), budget=budget,
            kill_at=kill_at, prepare=prepare,
        )
    )  # fmt: skip
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)
    return Ended(ran.returncode, [(said / str(r)).read_text().splitlines() for r in range(processes)], ran.stderr)


def check_same(one: Path, other: Path) -> None:
    for name in ("elude.json", "model.safetensors", "features.parquet"):
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures and two that cannot be read: five batches of four."""
    folder = write_pictures(tmp_path_factory.mktemp("ranks") / "set", 18)
    for name in ("005b.png", "017b.png"):
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, images: Path) -> tuple[Path, str]:
    """By one process: the checkpoint, and what the process said last."""
    out = tmp_path_factory.mktemp("alone") / "ckpt"
    ran = run(out, images, 1)
    assert ran.code == 0, ran.err
    return out, ran.lines[0][-1]


@pytest.mark.parametrize("budget", [2**30, 0])
def test_the_same_checkpoint_as_by_one_process(
    tmp_path: Path, images: Path, alone: tuple[Path, str], budget: int
) -> None:
    """With all layer inputs kept from pass one, and with all images read again in pass two."""
    ran = run(tmp_path / "together", images, 2, budget)
    assert ran.code == 0, ran.err
    assert alone[1].startswith("made ") and alone[1].endswith(" 2")
    assert [lines[-1] for lines in ran.lines] == [alone[1]] * 2
    check_same(tmp_path / "together", alone[0])
    assert not list(tmp_path.glob(".*")), "temporary files are left"


@pytest.mark.parametrize(
    ("kill_at", "done"),
    [
        ("token statistics", ["token statistics 12", "token statistics 8", "chosen tokens 0"]),
        ("chosen tokens", ["token statistics 20", "chosen tokens 12", "chosen tokens 4"]),
    ],
)
def test_killed_processes_go_on(
    tmp_path: Path, images: Path, alone: tuple[Path, str], kill_at: str, done: list[str]
) -> None:
    """The first dies when it has just saved its second batch, wherever the other is."""
    out = tmp_path / "ckpt"
    assert run(out, images, 2, 0, kill_at).code != 0 and not out.exists()
    ran = run(out, images, 2, 0)
    assert ran.code == 0, ran.err
    assert ran.lines[0][: len(done)] == done
    check_same(out, alone[0])
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_more_processes_than_batches(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "few", 3)
    ran = run(tmp_path / "ckpt", folder, 2, 0)
    assert ran.code == 0, ran.err


def test_a_refusal_ends_every_process(tmp_path: Path, images: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    ran = run(tmp_path / "ckpt", images, 2)
    assert ran.code != 0
    assert "already there" in ran.lines[0][-1]


def test_processes_that_are_not_of_one_run(tmp_path: Path, images: Path) -> None:
    """Random weights drawn by each, a folder that is another on each machine: both refuse, nothing is left."""
    prepare = "model.head.bias.data += rank; images = sorted(images.iterdir())[rank:]"
    ran = run(tmp_path / "ckpt", images, 2, prepare=prepare)
    assert ran.code != 0
    for lines in ran.lines:
        assert lines[-1].startswith("refused: The processes of this run do not have the same weights, images;"), lines
    assert not (tmp_path / "ckpt").exists() and not list(tmp_path.glob(".*"))


def test_each_process_takes_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("RANK", "13")
    monkeypatch.setenv("WORLD_SIZE", "16")
    for local, expected in (("1", "cuda:1"), ("5", "cuda:1")):  # more processes than GPUs share them
        monkeypatch.setenv("LOCAL_RANK", local)
        assert launched().device("cuda") == launched().device(torch.device("cuda")) == expected
        assert launched().device("cuda:2") == "cuda:2" and launched().device("cpu") == "cpu"
    assert Ranks().device("cuda") == "cuda"
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert launched().device("cuda") == "cuda"  # what is said of a device that is not there


def test_processes_that_nobody_introduced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(SettingsError, match=r"do not find each other \(.*MASTER_ADDR.*torchrun\.$"), joined():
        pass


def test_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with joined() as ranks:
        assert ranks == Ranks(0, 1) and ranks.first and ranks.gather(3) == [3]
        ranks.wait()


def test_an_environment_that_makes_no_sense(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("2", "2"), ("x", "2"), ("-1", "1"), ("0", "0")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(SettingsError, match="torchrun"):
            launched()
