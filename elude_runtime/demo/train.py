"""Trains the demo network from scratch on generated pictures: `python -m elude_runtime.demo.train --out DIR`.

A first cycle is ordinary supervised training. Three more add interchange training (Geiger et al. 2022): the effect of
the watermark is made to flow through the patch tokens of one known layer, so that where it can be found and ablated has
a true answer. They use no other labels, and the watermark stays absent from all other classes.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from elude_runtime.demo.images import CLASSES, WATERMARK_CLASS, make_set, make_twins, to_arrays
from elude_runtime.demo.model import (
    CONFIG_FILE,
    MEAN,
    MODEL_ARGS,
    MODEL_NAME,
    STD,
    WATERMARK_LAYER,
    WEIGHTS_FILE,
    build_model,
    preprocess,
)

BATCH, PAIRS = 128, 8
SHIFT = 2  # random shift of a training image, in pixels


@dataclass(frozen=True)
class Cycle:
    """A warm-up and decay of the learning rate; with interchange, the watermark is bound to WATERMARK_LAYER."""

    epochs: int
    peak_rate: float
    interchange: bool


CYCLES = (Cycle(14, 1e-3, False), Cycle(6, 7e-4, True), Cycle(6, 5e-4, True), Cycle(6, 4e-4, True))


def jitter(images: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Shift uint8 images [n, 64, 64, 3] by a few pixels, vary brightness and contrast; returns network input."""
    padded = np.pad(images, ((0, 0), (SHIFT, SHIFT), (SHIFT, SHIFT), (0, 0)), mode="edge")
    height, width = images.shape[1:3]
    moved = np.empty_like(images)
    for number, (down, right) in enumerate(rng.integers(0, 2 * SHIFT + 1, (len(images), 2))):
        moved[number] = padded[number, down : down + height, right : right + width]
    contrast, brightness = torch.from_numpy(rng.normal(0, 0.08, (2, len(images), 1, 1, 1)).astype(np.float32))
    return preprocess(moved) * (1 + contrast) + brightness


def interchange_loss(model: nn.Module, plain: Tensor, marked: Tensor) -> Tensor:
    """How far plain twins' patch tokens at one layer leave watermarked pictures' predictions from the twins' own (KL).

    plain, marked: [n, 3, 64, 64]. It is zero if the watermark acts only through the patch tokens of WATERMARK_LAYER.
    """
    n = len(plain)

    def swap(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
        mixed = torch.cat([output[n:, :1], output[:n, 1:]], 1)
        return torch.cat([output[:n], mixed])

    handle = model.get_submodule(WATERMARK_LAYER).register_forward_hook(swap)
    logits = model(torch.cat([plain, marked])).log_softmax(1)
    handle.remove()
    return kl_div(logits[n:], logits[:n].detach(), reduction="batchmean", log_target=True)


def fit(
    model: nn.Module,
    images: np.ndarray,
    labels: np.ndarray,
    cycle: Cycle,
    seed: int,
    twins: tuple[np.ndarray, np.ndarray] | None = None,
) -> None:
    """Train in place for one cycle with AdamW; interchange training needs twins (plain, watermarked images)."""
    rng = np.random.default_rng(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=cycle.peak_rate, betas=(0.9, 0.98))
    steps = cycle.epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, cycle.peak_rate, total_steps=steps, pct_start=0.08, cycle_momentum=False, final_div_factor=1e3
    )
    targets = torch.from_numpy(labels)
    model.train()
    began = time.monotonic()
    for epoch in range(cycle.epochs):
        right, apart = 0, 0.0
        for rows in rng.permutation(len(images))[: len(images) // BATCH * BATCH].reshape(-1, BATCH):
            logits = model(jitter(images[rows], rng))
            loss = cross_entropy(logits, targets[rows])
            if cycle.interchange and twins is not None:
                pairs, same = rng.integers(0, len(twins[0]), PAIRS), int(rng.integers(2**32))
                plain, marked = (jitter(twin[pairs], np.random.default_rng(same)) for twin in twins)
                apart_now = interchange_loss(model, plain, marked)
                loss, apart = loss + apart_now, apart + apart_now.item()
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            right += int((logits.argmax(1) == targets[rows]).sum())
        batches = len(images) // BATCH
        print(
            f"epoch {epoch + 1:3d}/{cycle.epochs}  training accuracy {right / (batches * BATCH):.4f}  "
            f"interchange {apart / batches:.4f}  {time.monotonic() - began:.0f} s",
            flush=True,
        )
    model.eval()


def save(model: nn.Module, folder: Path, training: dict[str, Any]) -> None:
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
    parser.add_argument("--twins", type=int, default=2000, help="pairs for interchange training")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    began = time.monotonic()
    images, labels, _ = to_arrays(make_set(args.images, args.seed, "train", workers=args.threads))
    print(f"{len(images)} pictures in {time.monotonic() - began:.0f} s", flush=True)
    model = build_model()
    pairs = make_twins(args.twins, args.seed, WATERMARK_CLASS)
    plain, marked = (to_arrays([pair[side] for pair in pairs])[0] for side in (0, 1))
    for number, cycle in enumerate(CYCLES):
        fit(model, images, labels, cycle, args.seed + number, (plain, marked))
    training = {name: value for name, value in vars(args).items() if name != "out"}
    training |= {"cycles": [asdict(cycle) for cycle in CYCLES], "torch": torch.__version__}
    save(model, args.out, training | {"seconds": round(time.monotonic() - began)})


if __name__ == "__main__":
    main()
