"""`elude bench attribution`: attributions beside true effects on layers of a checkpoint, and how far pairs add up."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from elude_runtime.analysis.ablation import pair_effects
from elude_runtime.analysis.attribution import INTEGRATED
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError
from elude_runtime.offline.evaluation.attribution_effects import (
    STEPS,
    Agreement,
    Summary,
    agreement_figures,
    layer_agreements,
    layer_attributions,
)
from elude_runtime.offline.image_files import Progress


@torch.no_grad()
def measure_attribution(
    model: EludeModel,
    batches: Iterable[Tensor],
    layers: Sequence[str] | None = None,
    *,
    top: int = 10,
    paired: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """batches: images [B, 3, H, W]; the target is each image's top class. layers: default all. top: features of a set;
    paired: concepts, best by integrated gradients, whose pairs are ablated too.

    LayerError for an unknown layer; EludeError for a model without classes.
    """
    if model.manifest.output != "logits":
        raise EludeError("The model has no classes to explain; give `elude bench attribution` one with a head.")
    names = [model.state(name).name for name in layers] if layers else model.layers
    tell = progress or (lambda *_: None)
    agreements: dict[tuple[str, str, str, str], list[Agreement]] = {}
    interactions: dict[str, list[list[tuple[float, float]]]] = {name: [] for name in names}
    draws, images = random.Random(seed), 0
    for batch in batches:
        recording = model.record(batch.to(next(model.base.parameters())), names)
        targets = [Target(int(index)) for index in recording.logits.argmax(-1)]
        for name in names:
            for key, found in layer_agreements(model, recording, name, targets, top, draws).items():
                agreements.setdefault((name, *key), []).extend(found)
            for row, target in enumerate(targets):
                listed = layer_attributions(model, recording, name, [target], STEPS[INTEGRATED], [row])[0]["concepts"]
                best = [f for f, _ in listed[:paired]]
                effects = pair_effects(model, recording, row, target, best)
                interactions[name].append([(p.effect, sum(p.alone)) for p in effects])
        images += len(batch)
        tell("images", len(batch), None)
    return {
        "images": images,
        "layers": [
            {
                "layer": name,
                "agreement": [
                    {"method": method, "level": level, "set": which, **agreement_figures(found)}
                    for (owner, method, level, which), found in agreements.items()
                    if owner == name
                ],
                "pairs": pair_figures(interactions[name]),
            }
            for name in names
        ],
    }


def pair_figures(images: Sequence[Sequence[tuple[float, float]]]) -> dict[str, Any] | None:
    """How far pairs are from adding up. images: of each its pairs' (effect of both together, sum of each alone).

    interaction: |effect - sum| / |sum|, median over the pairs of an image, summed up over images; `median` over all
    pairs; redundant: share of pairs that do more together than the sum, each hiding the other's absence.
    """
    pairs = [pair for own in images for pair in own if pair[1] != 0]
    if not pairs:
        return None
    sizes = [[abs(e - s) / abs(s) for e, s in own if s != 0] for own in images]
    medians = Summary.of([statistics.median(own) for own in sizes if own])
    assert medians is not None
    return {
        "pairs": len(pairs),
        "median": round(statistics.median(v for own in sizes for v in own), 4),
        "over_images": asdict(medians),
        "redundant": round(sum(abs(e) > abs(s) for e, s in pairs) / len(pairs), 4),
    }
