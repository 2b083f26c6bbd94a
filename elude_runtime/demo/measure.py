"""Measures the demo network: accuracy by group, concepts in hidden units, where the watermark's effect flows.

`python -m elude_runtime.demo.measure` prints the figures; `--store` also writes them into the configuration file;
`--features` prints those of the rewritten network's features instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elude_runtime.demo.images import CLASSES, CONCEPTS, WATERMARK_CLASS, make_set, make_twins, to_arrays
from elude_runtime.demo.model import CONFIG_FILE, WATERMARK_LAYER, WEIGHTS_FILE, load_demo_model, preprocess

OTHERS = [index for index in range(len(CLASSES)) if index != WATERMARK_CLASS]


@contextmanager
def hooked(layer: nn.Module, hook: Callable[..., Any], before: bool = False) -> Iterator[None]:
    """Run with a forward hook (or forward pre-hook) on a layer."""
    handle = layer.register_forward_pre_hook(hook) if before else layer.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.inference_mode()
def run(model: nn.Module, images: np.ndarray, batch: int = 256) -> Tensor:
    """Logits [n, classes] of uint8 images [n, 64, 64, 3]."""
    return torch.cat([model(preprocess(images[start : start + batch])) for start in range(0, len(images), batch)])


def accuracy_by_class(logits: Tensor, labels: np.ndarray) -> list[float]:
    """Accuracy of each class, in class order."""
    right = logits.argmax(1).numpy() == labels
    return [float(right[labels == index].mean()) for index in range(len(CLASSES))]


def groups(model: nn.Module, n: int, workers: int) -> dict[str, Any]:
    """Accuracies on pictures like the training ones and on sets balanced over (class, watermark)."""
    images, labels, _ = to_arrays(make_set(n, 901, "train", workers))
    figures: dict[str, Any] = {"like training": float((run(model, images).argmax(1).numpy() == labels).mean())}
    images, labels, concepts = to_arrays(make_set(2 * n, 903, "groups", workers))
    marked = concepts[:, CONCEPTS.index("watermark")]
    logits = run(model, images)
    for name, rows in (("without", ~marked), ("with", marked)):
        each = accuracy_by_class(logits[torch.from_numpy(rows)], labels[rows])
        figures[f"by class {name} watermark"] = dict(zip(CLASSES, each, strict=True))
        figures[f"other classes {name} watermark"] = float(np.mean([each[index] for index in OTHERS]))
        figures[f"worst other class {name} watermark"] = min(each[index] for index in OTHERS)
        figures[f"{CLASSES[WATERMARK_CLASS]} {name} watermark"] = each[WATERMARK_CLASS]
    misread = (logits.argmax(1).numpy() == WATERMARK_CLASS)[marked & (labels != WATERMARK_CLASS)]
    figures["other classes with watermark read as " + CLASSES[WATERMARK_CLASS]] = float(misread.mean())
    return figures


def hidden_readings(model: nn.Module, layer: nn.Module, images: np.ndarray) -> dict[str, np.ndarray]:
    """Each image's reading [n, hidden units] of a layer's inputs, for several ways to read the tokens."""
    seen: list[Tensor] = []
    with hooked(layer, lambda _, inputs: seen.append(inputs[0].detach()), before=True):
        run(model, images[:512])
    mean = torch.cat(seen)[:, 1:].mean((0, 1))
    parts: list[dict[str, Tensor]] = []

    def read(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        patches = inputs[0][:, 1:]
        strongest = (patches - mean).abs().argmax(1, keepdim=True)
        parts.append(
            {
                "patch, largest deviation": patches.gather(1, strongest)[:, 0],
                "patch, maximum": patches.amax(1),
                "patch, minimum": patches.amin(1),
                "class token": inputs[0][:, 0],
            }
        )

    with hooked(layer, read, before=True):
        run(model, images)
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]}


def auc(values: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """AUC [units, concepts] of values [n, units] for truth bool [n, concepts]."""
    ranks, positives = values.argsort(0).argsort(0) + 1, truth.sum(0)
    total = ranks.T @ truth
    return (total - positives * (positives + 1) / 2) / (positives * (len(truth) - positives))


def concept_auc(
    model: nn.Module, layer: nn.Module, images: np.ndarray, truth: np.ndarray
) -> dict[str, dict[str, float]]:
    """Held-out AUC of each concept's best hidden unit, unit and sign chosen on the first half."""
    half = len(images) // 2
    found: dict[str, dict[str, float]] = {}
    for name, values in hidden_readings(model, layer, images).items():
        chosen, tested = auc(values[:half], truth[:half]), auc(values[half:], truth[half:])
        unit, column = np.abs(chosen - 0.5).argmax(0), np.arange(len(CONCEPTS))
        held_out = np.where(chosen[unit, column] > 0.5, tested[unit, column], 1 - tested[unit, column])
        found[name] = dict(zip(CONCEPTS, held_out.tolist(), strict=True))
    return found


def mediation(
    model: nn.Module, plain: np.ndarray, marked: np.ndarray, labels: np.ndarray
) -> dict[str, dict[str, float]]:
    """Activation patching: each layer's output in the watermarked run is replaced by that of the plain twin.

    `removed` is the share of the watermark's effect on (watermark-class logit - mean logit) that this takes away.
    """

    def score(logits: Tensor) -> float:
        return float((logits[:, WATERMARK_CLASS] - logits.mean(1)).mean())

    base, effect = score(run(model, plain)), score(run(model, marked)) - score(run(model, plain))
    table: dict[str, dict[str, float]] = {}
    for name, layer in model.named_modules():
        if not name.startswith("blocks.") or not name.endswith(("mlp.fc2", "attn.proj")):
            continue
        outputs: list[Tensor] = []
        with hooked(layer, lambda _, __, output, keep=outputs: keep.append(output)):
            run(model, plain)
        row: dict[str, float] = {}
        for tokens, part in (("all", slice(None)), ("class token", slice(0, 1)), ("patches", slice(1, None))):
            twins = iter(outputs)

            def swap(_: nn.Module, __: Any, output: Tensor, twins: Iterator = twins, part: slice = part) -> Tensor:
                output = output.clone()
                output[:, part] = next(twins)[:, part]
                return output

            with hooked(layer, swap):
                logits = run(model, marked)
            row[f"removed, {tokens}"] = 1 - (score(logits) - base) / effect
            if tokens == "all":
                each = accuracy_by_class(logits, labels)
                row["accuracy of other classes"] = float(np.mean([each[index] for index in OTHERS]))
                row["worst other class"] = min(each[index] for index in OTHERS)
                row[CLASSES[WATERMARK_CLASS]] = each[WATERMARK_CLASS]
        table[name] = row
    return table


def hidden_ablation(
    model: nn.Module,
    images: np.ndarray,
    marked_rows: np.ndarray,
    plain: np.ndarray,
    marked: np.ndarray,
    labels: np.ndarray,
) -> dict[str, dict[str, float]]:
    """Mean-ablate, on patch tokens, the hidden units of WATERMARK_LAYER that best tell watermarked pictures apart.

    images, marked_rows choose the units; plain, marked (twins) and labels test them. A whole unit is a blunt tool.
    """
    layer = model.get_submodule(WATERMARK_LAYER)
    seen: list[Tensor] = []
    with hooked(layer, lambda _, inputs: seen.append(inputs[0].detach()), before=True):
        run(model, images[:512])
    mean = torch.cat(seen)[:, 1:].mean((0, 1))
    readings = hidden_readings(model, layer, images)["patch, largest deviation"]
    order = np.abs(auc(readings, marked_rows[:, None])[:, 0] - 0.5).argsort()[::-1].copy()
    rows: dict[str, dict[str, float]] = {}
    for count in (4, 8, 16, 32):
        units = torch.from_numpy(order[:count])

        def ablate(_: nn.Module, inputs: tuple[Tensor, ...], units: Tensor = units) -> tuple[Tensor]:
            hidden = inputs[0].clone()
            hidden[:, 1:, units] = mean[units]
            return (hidden,)

        with hooked(layer, ablate, before=True):
            with_mark, without = (accuracy_by_class(run(model, twins), labels) for twins in (marked, plain))
        rows[f"{count} units"] = {
            "other classes with watermark": float(np.mean([with_mark[index] for index in OTHERS])),
            "worst of them": min(with_mark[index] for index in OTHERS),
            "other classes without watermark": float(np.mean([without[index] for index in OTHERS])),
        }
    return rows


def show(figures: dict[str, Any], indent: str = "") -> None:
    """Print nested figures, one a line."""
    for name, value in figures.items():
        if isinstance(value, dict):
            print(f"{indent}{name}")
            show(value, indent + "  ")
        else:
            print(f"{indent}{name}: {value:.3f}" if isinstance(value, float) else f"{indent}{name}: {value}")


def measure(model: nn.Module, n: int = 2400, workers: int = 2) -> dict[str, Any]:
    """All figures, on freshly drawn pictures (n of a kind)."""
    figures: dict[str, Any] = {"accuracy": groups(model, n, workers)}
    images, _, truth = to_arrays(make_set(2 * n, 902, "natural", workers))
    hidden: dict[str, Any] = {}
    for name, layer in model.named_modules():
        if name.endswith("mlp.fc2"):
            found = concept_auc(model, layer, images, truth)
            count = {reading: sum(value < 0.85 for value in each.values()) for reading, each in found.items()}
            hidden[name] = {"concepts": len(CONCEPTS), "concepts under 0.85": count, "auc": found}
    figures["best hidden unit"] = hidden
    twins = make_twins(n // 2, 904)
    plain, labels, _ = to_arrays([pair[0] for pair in twins])
    marked = to_arrays([pair[1] for pair in twins])[0]
    figures["watermark mediation"] = mediation(model, plain, marked, labels)
    marked_rows = truth[:, CONCEPTS.index("watermark")]
    figures["hidden units ablated"] = hidden_ablation(model, images, marked_rows, plain, marked, labels)
    return figures


def main() -> None:
    """Measure, print and perhaps store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=CONFIG_FILE.parent, help="where the weights lie")
    parser.add_argument("--pictures", type=int, default=2400, help="pictures of a kind")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--store", action="store_true", help="write the figures into the configuration file")
    parser.add_argument("--features", action="store_true", help="rewrite the shipped network; what its features do")
    parser.add_argument("--drift", action="store_true", help="the same; whether drift names the watermark's features")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.features or args.drift:
        if args.store or args.folder != CONFIG_FILE.parent:
            parser.error("--features and --drift rewrite the shipped network as the demo does, and store nothing")
        with TemporaryDirectory() as folder:
            if args.features:
                from elude_runtime.demo.features import feature_figures  # it needs what `.[evaluate]` installs

                show(feature_figures(Path(folder), args.pictures))
            else:
                from elude_runtime.demo.drift import drift_figures

                show(drift_figures(Path(folder), args.pictures))
        return
    model, config = load_demo_model(args.folder)
    figures = measure(model, args.pictures, args.threads)
    show(figures)
    if args.store:
        path = args.folder / CONFIG_FILE.name
        digest = hashlib.sha256((args.folder / WEIGHTS_FILE.name).read_bytes()).hexdigest()
        measured = config | {"weights_sha256": digest, "figures": figures}
        path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
