"""The demonstration network as an archive, calibrated on a handful of pictures: for tests that only need a model."""

from __future__ import annotations

from pathlib import Path

from elude_runtime.cli.archive import build_archive
from elude_runtime.demo.images import make_set, write_folder
from elude_runtime.demo.model import load_demo_model
from elude_runtime.demo.rewrite import rewrite_demo


def demo_archive(folder: Path) -> Path:
    """`folder/store/demo.mar`; the pictures are in `folder/images`, the checkpoint in `folder/ckpt`."""
    model, config = load_demo_model()
    write_folder(folder / "images", make_set(24, seed=1))
    rewrite_demo(model, config, folder / "images", folder / "ckpt")
    return build_archive(folder / "ckpt", folder / "store", name="demo")
