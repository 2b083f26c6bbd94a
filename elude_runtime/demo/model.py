"""The embedded demo network: a small plain timm ViT, rebuilt from its name and arguments with its weights loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from elude_runtime.demo.images import CLASSES
from elude_runtime.demo.paint import SIZE

MODEL_NAME = "vit_tiny_patch16_224"
MODEL_ARGS: dict[str, Any] = {
    "img_size": SIZE,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 3,
    "mlp_ratio": 2.0,
    "num_classes": len(CLASSES),
}
WATERMARK_LAYER = "blocks.1.mlp.fc2"  # the layer through whose patch tokens the watermark is made to act
MEAN = STD = (0.5, 0.5, 0.5)
WEIGHTS_FILE = Path(__file__).with_name("demo_vit.safetensors")
CONFIG_FILE = Path(__file__).with_name("demo_vit.json")


def build_model() -> nn.Module:
    """Build the network with fresh weights."""
    return timm.create_model(MODEL_NAME, pretrained=False, **MODEL_ARGS)


def preprocess(images: np.ndarray) -> torch.Tensor:
    """Turn uint8 images [n, 64, 64, 3] into normalised float32 [n, 3, 64, 64]."""
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def load_demo_model(folder: Path | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Load the float16 weights into a float32 network in eval mode; returns it with its configuration."""
    folder = folder or CONFIG_FILE.parent
    config = json.loads((folder / CONFIG_FILE.name).read_text(encoding="utf-8"))
    model = timm.create_model(config["timm_name"], pretrained=False, **config["timm_args"])
    weights = load_file(folder / WEIGHTS_FILE.name)
    model.load_state_dict({name: weight.float() for name, weight in weights.items()})
    return model.eval(), config
