"""Fixtures shared by all tests: tiny random models, rewritten once a session, and the real networks of ELUDE_SHARED."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from browser_visits import chrome, reports, visits  # noqa: F401
from hypothesis import settings
from support import (
    CONV_DATA,
    FIRST,
    LABELS,
    SECOND,
    VIT_ARGS,
    VIT_DATA,
    Ran,
    Run,
    input_tensor,
    tiny_mobilenet,
    tiny_vit,
    write_pictures,
)
from torch import Tensor, nn

import elude_runtime as elude
from elude_runtime.analysis.model import EludeModel
from elude_runtime.cli import main
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.catalogue.run import make_catalogue

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED_FILES = ("weights/deit_tiny_3bit.safetensors", "weights/mobilenetv2_100.safetensors", "data/imagenet")

# Examples are the same in every run, so that a failure is somebody's change and not the day's luck.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@dataclass(frozen=True)
class Rewritten:
    """A tiny network and its checkpoint. images: three preprocessed pictures it was not calibrated on."""

    path: Path
    base: nn.Module
    data: DataConfig
    model: EludeModel
    images: Tensor
    folder: Path | None = None

    @property
    def layer(self) -> str:
        return self.model.layers[-1]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors are slower on several threads than on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 24 generated pictures."""
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set", 24)


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Rewritten:
    """A ViT with a class token, two split layers, calibrated on a folder."""
    out = tmp_path_factory.mktemp("vit") / "ckpt"
    base = tiny_vit()
    model = elude.rewrite(
        base, pictures, out=out, layers=[SECOND, FIRST], subunits=4, concepts=6, tokens=24, batch_size=8,
        data_config=VIT_DATA, model_args=VIT_ARGS, labels=LABELS,
    )  # fmt: skip
    return Rewritten(out, base, VIT_DATA, model, input_tensor(VIT_DATA, 3), pictures)


@pytest.fixture(scope="session")
def registers(tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """A ViT with a class token and two register tokens, split in its default layer, calibrated on a tensor."""
    out = tmp_path_factory.mktemp("registers") / "ckpt"
    base = tiny_vit(reg_tokens=2, depth=2)
    model = elude.rewrite(
        base, input_tensor(VIT_DATA, 12, 0), out=out, subunits=4, concepts=5, tokens=16, data_config=VIT_DATA,
        model_args={**VIT_ARGS, "reg_tokens": 2, "depth": 2},
    )  # fmt: skip
    return Rewritten(out, base, VIT_DATA, model, input_tensor(VIT_DATA, 3))


@pytest.fixture(scope="session")
def mobilenet(tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """A convolutional network, split in its default layer."""
    out = tmp_path_factory.mktemp("mobilenet") / "ckpt"
    base = tiny_mobilenet()
    model = elude.rewrite(
        base, input_tensor(CONV_DATA, 8, 0), out=out, subunits=4, concepts=6, tokens=16, data_config=CONV_DATA
    )
    return Rewritten(out, base, CONV_DATA, model, input_tensor(CONV_DATA, 3))


@pytest.fixture(scope="session")
def headless(tmp_path_factory: pytest.TempPathFactory) -> Rewritten:
    """A ViT without a head: its output is an embedding."""
    out = tmp_path_factory.mktemp("headless") / "ckpt"
    args = {**VIT_ARGS, "num_classes": 0, "depth": 2}
    base = tiny_vit(num_classes=0, depth=2)
    model = elude.rewrite(
        base,
        input_tensor(VIT_DATA, 8, 0),
        out=out,
        subunits=2,
        concepts=3,
        tokens=12,
        data_config=VIT_DATA,
        model_args=args,
    )
    return Rewritten(out, base, VIT_DATA, model, input_tensor(VIT_DATA, 3))


@pytest.fixture(scope="session")
def catalogued(tmp_path_factory: pytest.TempPathFactory, vit: Rewritten, pictures: Path) -> Path:
    """The tiny ViT's checkpoint with a catalogue of the pictures. Only to be read."""
    out = tmp_path_factory.mktemp("catalogued") / "ckpt"
    shutil.copytree(vit.path, out)
    make_catalogue(out, pictures, batch_size=7)
    return out


@pytest.fixture(params=["vit", "registers", "mobilenet"])
def rewritten(request: pytest.FixtureRequest) -> Rewritten:
    """Each of the tiny networks with classes in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real networks and images: the environment variable ELUDE_SHARED, else ../shared."""
    folder = Path(os.environ.get("ELUDE_SHARED", REPOSITORY.parent / "shared")).resolve()
    missing = [name for name in SHARED_FILES if not (folder / name).exists()]
    if missing:
        pytest.skip(f"{folder} lacks {missing[0]}; set ELUDE_SHARED to the folder that has it")
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`elude ARGUMENTS`, in this process."""

    def call(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["elude", *map(str, arguments)])
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        captured = capsys.readouterr()
        return Ran(code, captured.out, captured.err)

    return call
