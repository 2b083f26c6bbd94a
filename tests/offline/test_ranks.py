"""Several processes under torchrun: the same partition as one, whatever their number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from support import write_pictures

from elude_runtime.errors import SettingsError
from elude_runtime.offline.ranks import Ranks, joined, launched

RUN = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
from support import VIT_ARGS, VIT_DATA, tiny_vit
import elude_runtime as elude
from elude_runtime.errors import EludeError
try:
    model = elude.rewrite(
        tiny_vit(), {images!r}, out={out!r}, layers=["blocks.0.attn.proj", "blocks.1.mlp.fc2"], subunits=4, concepts=4,
        tokens=30, data_config=VIT_DATA, model_args=VIT_ARGS, batch_size=4,
        progress=lambda stage, done, total: print("progress", stage, flush=True),
    )
    print("loaded", model.manifest.partition_sha256, model.manifest.calibration.skipped, flush=True)
except EludeError as error:
    print("refused:", error, flush=True)
    sys.exit(2)
"""


def run(tmp_path: Path, out: Path, images: Path, processes: int) -> subprocess.CompletedProcess[str]:
    file = tmp_path / "run.py"
    file.write_text(RUN.format(tests=str(Path(__file__).parent.parent), images=str(images), out=str(out)))
    command = [sys.executable, str(file)]
    if processes > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *launcher, str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """18 pictures and two that cannot be read: five batches of four."""
    folder = write_pictures(tmp_path_factory.mktemp("ranks") / "set", 18)
    for name in ("005b.png", "017b.png"):
        (folder / name).write_bytes(b"no picture")
    return folder


@pytest.mark.parametrize("processes", [2])
def test_the_same_checkpoint_as_by_one_process(
    tmp_path: Path, images: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # chunks of a few neurons, so that the processes share the clustering too
    (tmp_path / "sitecustomize.py").write_text(
        "import elude_runtime.partition.sign_split as split\nsplit.CHUNK_FLOATS = 30 * 128 * 5\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    alone = run(tmp_path, tmp_path / "alone", images, 1)
    together = run(tmp_path, tmp_path / "together", images, processes)
    assert alone.returncode == 0, alone.stderr
    assert together.returncode == 0, together.stderr
    loaded = [line for line in together.stdout.splitlines() if line.startswith("loaded")]
    assert len(loaded) == processes and set(loaded) == {alone.stdout.splitlines()[-1]}
    assert loaded[0].endswith(" 2")
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("alone", "together"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[n].view(torch.uint8), second[n].view(torch.uint8)) for n in first)
    tables = [pq.read_table(tmp_path / name / "features.parquet") for name in ("alone", "together")]
    assert tables[0].equals(tables[1])
    manifests = [json.loads((tmp_path / name / "elude.json").read_text()) for name in ("alone", "together")]
    assert manifests[0] == manifests[1]
    assert not list(tmp_path.glob(".*")), "temporary files are left"


def test_more_processes_than_batches(tmp_path: Path) -> None:
    folder = write_pictures(tmp_path / "few", 3)
    ran = run(tmp_path, tmp_path / "ckpt", folder, 2)
    assert ran.returncode == 0, ran.stderr


def test_a_refusal_ends_every_process(tmp_path: Path, images: Path) -> None:
    (tmp_path / "ckpt").mkdir()
    ran = run(tmp_path, tmp_path / "ckpt", images, 2)
    assert ran.returncode != 0
    assert "already there" in ran.stdout


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
