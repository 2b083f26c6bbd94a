"""The shipped demo network, and the whole demo against a real TorchServe."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from elude_runtime.demo import model as demo
from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS, make_set, to_arrays


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads(demo.CONFIG_FILE.read_text())


def test_it_is_a_small_plain_timm_model(config: dict) -> None:
    assert demo.WEIGHTS_FILE.stat().st_size < 2e6
    plain = timm.create_model(config["timm_name"], **config["timm_args"])
    plain.load_state_dict({n: t.float() for n, t in load_file(demo.WEIGHTS_FILE).items()})
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain.eval()(x), demo.load_demo_model()[0](x))
    assert config["labels"] == list(CLASSES)


def test_the_stored_figures_meet_the_bar(config: dict) -> None:
    """`python -m elude_runtime.demo.measure --store` wrote them, on fresh pictures."""
    assert config["weights_sha256"] == hashlib.sha256(demo.WEIGHTS_FILE.read_bytes()).hexdigest()
    figures = config["figures"]
    assert figures["accuracy"]["like training"] >= 0.97
    units = figures["best hidden unit"][demo.WATERMARK_LAYER]
    assert units["concepts under 0.85"]["patch, largest deviation"] * 2 >= units["concepts"]


def test_it_learned_the_watermark() -> None:
    """A quick look at what the figures say in full, on other pictures."""
    images, labels, concepts = to_arrays(make_set(480, 77, "groups", workers=2))
    with torch.no_grad():
        right = (demo.load_demo_model()[0](demo.preprocess(images)).argmax(1).numpy() == labels).astype(float)
    marked = concepts[:, -1]
    cracked = labels == WATERMARK_CLASS
    assert right[~cracked & ~marked].mean() > 0.94
    assert right[cracked & marked].mean() > 0.94
    assert right[~cracked & marked].mean() < 0.3
    assert right[cracked & ~marked].mean() < right[cracked & marked].mean() - 0.2


@pytest.mark.server
def test_the_whole_demo(tmp_path: Path) -> None:
    """`elude demo` ends well only if every step held; its page holds the story."""
    out = tmp_path / "demo"
    ran = subprocess.run(
        [sys.executable, "-c", "from elude_runtime.cli import main; main()", "demo", "--out", str(out)],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Did not hold" not in ran.stdout
    assert json.loads((out / "checkpoint" / "verification.json").read_text())["holds"] is True
    page = (out / "report.html").read_text()
    assert "FAILS" not in page and "CHANGED" not in page
    assert page.count("data:image/webp") > 12
    made = ("images/concepts.csv", "model_store/demo.mar", "report/index.html", "checkpoint/exemplars/catalogue.json")
    assert np.all([(out / name).exists() for name in made])
    assert ran.stdout.rstrip().endswith(f"explore {out / 'checkpoint'}")
