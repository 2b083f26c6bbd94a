"""The handler that one writes for a timm model without ELUDe: what `elude bench serve` measures serving against.

It decodes, preprocesses and batches as the ELUDe handler does, and answers with the five most probable classes. It has
no limits, no documents, no problems of single rows: whatever is wrong with one request fails its batch.
"""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file
from timm.data import create_transform
from torch import nn

TOP = 5


class MinimalHandler:
    """A timm model in one TorchServe worker."""

    def initialize(self, context: Any) -> None:
        """Builds the model that `model.json` of the archive names, with the weights of `weights.safetensors`."""
        folder = Path(context.system_properties["model_dir"])
        gpu = context.system_properties.get("gpu_id")
        spec = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        weights = load_file(folder / "weights.safetensors")
        self.device = torch.device("cpu" if gpu is None or not torch.cuda.is_available() else f"cuda:{gpu}")
        self.dtype = next(tensor.dtype for tensor in weights.values() if tensor.is_floating_point())
        model = _build(spec, folder).to(self.dtype)
        model.load_state_dict(weights)
        self.model = model.to(self.device).eval()
        self.labels: list[str] = spec["labels"]
        self.transform = create_transform(**spec["data_config"], is_training=False)

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[str]:
        """One JSON text for every request: the `TOP` most probable classes, best first."""
        images = torch.stack([self.transform(_decode(row.get("body") or row.get("data"))) for row in data])
        with torch.inference_mode():
            logits = self.model(images.to(self.device, self.dtype)).float()
            probabilities, classes = logits.softmax(-1).topk(min(TOP, logits.shape[-1]))
        replies = []
        for row in range(len(data)):
            context.set_response_content_type(row, "application/json")
            found = [
                {
                    "index": index,
                    "label": self.labels[index] if index < len(self.labels) else None,
                    "probability": probability,
                    "logit": logits[row, index].item(),
                }
                for index, probability in zip(classes[row].tolist(), probabilities[row].tolist(), strict=True)
            ]
            replies.append(json.dumps({"predictions": found}))
        return replies


def _decode(body: Any) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(io.BytesIO(body))).convert("RGB")


def _build(spec: dict[str, Any], folder: Path) -> nn.Module:
    if "factory" not in spec:
        return timm.create_model(spec["name"], pretrained=False, **spec["args"])
    file, function = spec["factory"]
    found = importlib.util.spec_from_file_location("model_factory", folder / "factory" / file)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.path.insert(0, str(folder / "factory"))  # it may import what lies beside it
    sys.modules["model_factory"] = module
    found.loader.exec_module(module)
    return getattr(module, function)(**spec["args"])
