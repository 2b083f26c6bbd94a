"""The demo network's rewrite: the same pictures, options and checkpoint wherever it is made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from torch import nn

from elude_runtime.checkpoint.manifest import Manifest, ModelSource
from elude_runtime.demo.images import make_set, write_folder
from elude_runtime.network.preprocessing import DataConfig
from elude_runtime.offline.rewrite import BaseModel, rewrite_checkpoint
from elude_runtime.partition import SplitConfig

CALIBRATION = 500
_SEED, _CONCEPTS = 1, 32


def demo_data_config(config: dict[str, Any]) -> DataConfig:
    """What the network's configuration says of its pictures."""
    return DataConfig.parse({k: config[k] for k in ("input_size", "mean", "std", "interpolation", "crop_pct")})


def write_calibration(folder: Path) -> None:
    """The pictures that the rewrite is calibrated on; those of an earlier version would be calibrated on too."""
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder, make_set(CALIBRATION, seed=_SEED, split="train", workers=2))


def rewrite_demo(model: nn.Module, config: dict[str, Any], pictures: Path, checkpoint: Path) -> Manifest:
    """The network's checkpoint, calibrated on a folder of pictures."""
    source = ModelSource(kind="timm", name=config["timm_name"], args=config["timm_args"])
    return rewrite_checkpoint(
        BaseModel(model, source), pictures, checkpoint, SplitConfig(), concepts=_CONCEPTS, batch_size=50,
        data_config=demo_data_config(config), labels=list(config["labels"]), force=True,
    ).manifest  # fmt: skip
