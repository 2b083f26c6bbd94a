"""Trains the demo network from scratch on generated pictures: `python -m elude_runtime.demo.train --out DIR`."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.functional import cross_entropy

from elude_runtime.demo.images import CLASSES, make_set, to_arrays
from elude_runtime.demo.model import (
    CONFIG_FILE,
    MEAN,
    MODEL_ARGS,
    MODEL_NAME,
    STD,
    WEIGHTS_FILE,
    build_model,
    preprocess,
)

SHIFT = 2  # random shift of a training image, in pixels


def jitter(images: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Shift uint8 images [n, 64, 64, 3] by a few pixels, vary brightness and contrast; returns network input."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    moved = np.empty_like(images)
    for number, (down, right) in enumerate(rng.integers(0, 2 * SHIFT + 1, (len(images), 2))):
        moved[number] = padded[number, down : down + height, right : right + width]
    contrast, brightness = torch.from_numpy(rng.normal(0, 0.08, (2, len(images), 1, 1, 1)).astype(np.float32))
    return preprocess(moved) * (1 + contrast) + brightness


def fit(
    model: nn.Module, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int, lr: float = 1e-3, batch: int = 128
) -> None:
    """Train in place with AdamW, linear warm-up and cosine decay."""
    rng = np.random.default_rng(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, lr, total_steps=steps, pct_start=0.08, cycle_momentum=False, final_div_factor=1e3
    )
    targets = torch.from_numpy(labels)
    model.train()
    began = time.monotonic()
    for epoch in range(epochs):
        order = rng.permutation(len(images))
        right = 0
        for rows in order[: len(images) // batch * batch].reshape(-1, batch):
            logits = model(jitter(images[rows], rng))
            loss = cross_entropy(logits, targets[rows])
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            right += int((logits.argmax(1) == targets[rows]).sum())
        share = right / (len(images) // batch * batch)
        print(
            f"epoch {epoch + 1:3d}/{epochs}  training accuracy {share:.4f}  {time.monotonic() - began:.0f} s",
            flush=True,
        )
    model.eval()


def save(model: nn.Module, folder: Path, training: dict[str, float | int | str]) -> None:
    """Write the float16 weights and the configuration that rebuilds the network."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: weight.half().contiguous() for name, weight in model.state_dict().items()}, folder / WEIGHTS_FILE.name
    )
    config = {
        "timm_name": MODEL_NAME,
        "timm_args": MODEL_ARGS,
        "labels": list(CLASSES),
        "mean": list(MEAN),
        "std": list(STD),
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "input_size": [3, MODEL_ARGS["img_size"], MODEL_ARGS["img_size"]],
        "training": training,
    }
    (folder / CONFIG_FILE.name).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    """Generate the pictures, train and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for the weights and their configuration")
    parser.add_argument("--images", type=int, default=30000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    images, labels, _ = to_arrays(make_set(args.images, args.seed, "train", workers=args.threads))
    print(f"{len(images)} pictures in {time.monotonic() - began:.0f} s", flush=True)
    model = build_model()
    fit(model, images, labels, args.epochs, args.seed)
    training = {"images": args.images, "epochs": args.epochs, "seed": args.seed, "threads": args.threads}
    save(model, args.out, training | {"torch": torch.__version__, "seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()
