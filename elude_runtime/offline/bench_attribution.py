"""Whether attributions tell the true effects: each method's numbers beside what ablation really does, image by image.

The true effect of a feature is what the target loses when the feature is ablated. Within an image, Spearman's
correlation says whether features are ranked right, the least-squares slope of true effect on attribution whether they
are sized right: 1 where an attribution is the effect, below 1 where it overstates.
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from elude_runtime.analysis.ablation import pair_effects
from elude_runtime.analysis.attribution import GRADIENT, INTEGRATED, ExplainOptions, top_features
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError
from elude_runtime.network.tail import Recording
from elude_runtime.offline.image_files import Progress

STEPS = {GRADIENT: None, INTEGRATED: ExplainOptions().steps}
LEVELS = ("concepts", "subunits")
SETS = ("top", "top positive", "top negative", "random")
_ALL = 2**31


@dataclass(frozen=True)
class Summary:
    """Mean over images with its 95 % bootstrap interval, and median; images: those that have the figure."""

    mean: float
    low: float
    high: float
    median: float
    images: int

    @classmethod
    def of(cls, values: Sequence[float], seed: int = 0) -> Summary | None:
        """None without a finite value."""
        kept = [v for v in values if np.isfinite(v)]
        if not kept:
            return None
        draws = np.random.default_rng(seed).choice(kept, (2_000, len(kept))).mean(1)
        low, high = np.quantile(draws, (0.025, 0.975))
        mean, middle = statistics.fmean(kept), statistics.median(kept)
        return cls(round(mean, 4), round(float(low), 4), round(float(high), 4), round(middle, 4), len(kept))

    def __str__(self) -> str:
        return f"{self.mean:6.3f} ({self.low:6.3f} to {self.high:6.3f})"


@dataclass(frozen=True)
class Agreement:
    """Attribution against true effect over a set of one image's features; NaN where either does not vary."""

    spearman: float
    slope: float

    @classmethod
    def of(cls, attributions: Sequence[float], effects: Sequence[float]) -> Agreement:
        a, e = np.asarray(attributions, np.float64), np.asarray(effects, np.float64)
        if len(a) < 2 or np.ptp(a) == 0 or np.ptp(e) == 0:
            return cls(float("nan"), float("nan"))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nearly constant values: the figure stands for itself
            spearman = float(spearmanr(a, e).statistic)
        centred = a - a.mean()
        return cls(spearman, float((centred * (e - e.mean())).sum() / (centred**2).sum()))


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
                    {"method": method, "level": level, "set": which, **_figures(found)}
                    for (owner, method, level, which), found in agreements.items()
                    if owner == name
                ],
                "pairs": pair_figures(interactions[name]),
            }
            for name in names
        ],
    }


def layer_agreements(
    model: EludeModel, recording: Recording, layer: str, targets: Sequence[Target], top: int, draws: random.Random
) -> dict[tuple[str, str, str], list[Agreement]]:
    """By method, level and set of features, the agreement in every image of a recorded pass."""
    sets: dict[tuple[str, str, str], list[list[tuple[Feature, float]]]] = {}
    for method, steps in STEPS.items():
        for attributions in layer_attributions(model, recording, layer, targets, steps):
            for level, listed in attributions.items():
                chosen = {
                    "top": listed[:top],
                    "top positive": [fa for fa in listed if fa[1] > 0][:top],
                    "top negative": [fa for fa in listed if fa[1] < 0][:top],
                    "random": draws.sample(listed, min(top, len(listed))),
                }
                for name, features in chosen.items():
                    sets.setdefault((method, level, name), []).append(features)
    rows = range(len(targets))
    wanted = [list(dict.fromkeys(f for by_row in sets.values() for f, _ in by_row[row])) for row in rows]
    true = true_effects(model, recording, layer, targets, wanted)
    return {
        key: [Agreement.of([a for _, a in by_row[row]], [true[row][f] for f, _ in by_row[row]]) for row in rows]
        for key, by_row in sets.items()
    }


def layer_attributions(
    model: EludeModel,
    recording: Recording,
    layer: str,
    targets: Sequence[Target],
    steps: int | None,
    rows: Sequence[int] | None = None,
) -> list[dict[str, list[tuple[Feature, float]]]]:
    """Of every image (or of these rows) all features of a layer that have an attribution, largest first, by level.

    targets: one an image. steps: integration nodes, None for the gradient at the output itself.
    """
    rows = range(len(targets)) if rows is None else rows
    questions = [Question(row, [target], steps) for row, target in zip(rows, targets, strict=True)]
    tails, state = LayerTails(model.tails, recording, model.states, layer, questions), model.states[layer]
    found = []
    with model.lock, torch.inference_mode(False):
        for number, gradient in enumerate(tails.gradients()):
            subunits = state.attributions(tails.x(number), gradient)
            found.append(
                {
                    level: top_features(state, subunits, ExplainOptions(level=level, top_features=_ALL))
                    for level in LEVELS
                }
            )
    return found


def true_effects(
    model: EludeModel,
    recording: Recording,
    layer: str,
    targets: Sequence[Target],
    features: Sequence[Sequence[Feature]],
) -> list[dict[Feature, float]]:
    """Of every image what its target loses with each of its features ablated: all of them share tail passes."""
    questions = [Question(row, [target]) for row, target in enumerate(targets)]
    tails, state = LayerTails(model.tails, recording, model.states, layer, questions), model.states[layer]

    def removal(row: int, feature: Feature) -> Callable[[], Tensor]:
        return lambda: -state.write(tails.x(row), feature)

    with model.lock:
        effects = tails.effects([[removal(row, f) for f in own] for row, own in enumerate(features)])
    return [dict(zip(own, (-e[0]).tolist(), strict=True)) for own, e in zip(features, effects, strict=True)]


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


def _figures(agreements: Sequence[Agreement]) -> dict[str, Any]:
    spearman, slope = Summary.of([a.spearman for a in agreements]), Summary.of([a.slope for a in agreements])
    return {"spearman": spearman and asdict(spearman), "slope": slope and asdict(slope)}
