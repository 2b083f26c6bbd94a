"""Whether attributions tell the true effects: each method's numbers beside what ablation really does, image by image.

The true effect of a feature is what the target loses when the feature is ablated. Within an image, Spearman's
correlation says whether features are ranked right, the least-squares slope of true effect on attribution whether they
are sized right: 1 where an attribution is the effect, below 1 where it overstates (design "Metrics", Faithfulness).
"""

from __future__ import annotations

import random
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from elude_runtime.analysis.attribution import GRADIENT, INTEGRATED, ExplainOptions, top_features
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation.images import layer_recordings
from elude_runtime.offline.images import ImageSource, Progress

STEPS = {GRADIENT: None, INTEGRATED: ExplainOptions().steps}
LEVELS = ("concepts", "subunits")
SETS = ("top", "top positive", "top negative", "random")
EVALUATED = ("top", "random")  # in an evaluation
OWN, RANDOM = "own", "random partition"
TOP = 10  # features of a set
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


def layer_agreements(
    model: EludeModel,
    recording: Recording,
    layer: str,
    targets: Sequence[Target],
    top: int,
    draws: random.Random,
    *,
    states: Mapping[str, SplitState] | None = None,
    token_type: int | None = None,
    wanted: Sequence[str] = SETS,
) -> dict[tuple[str, str, str], list[Agreement]]:
    """By method, level and set of features (those `wanted`, each of `top` features), the agreement in every image of a
    recorded pass. states: whose features; default: the model's own. token_type: features of this one alone."""
    sets: dict[tuple[str, str, str], list[list[tuple[Feature, float]]]] = {}
    for method, steps in STEPS.items():
        for attributions in layer_attributions(model, recording, layer, targets, steps, states=states):
            for level, every in attributions.items():
                listed = [fa for fa in every if token_type in (None, fa[0].token_type)]
                chosen = {
                    "top": listed[:top],
                    "top positive": [fa for fa in listed if fa[1] > 0][:top],
                    "top negative": [fa for fa in listed if fa[1] < 0][:top],
                    "random": draws.sample(listed, min(top, len(listed))),
                }
                for name in wanted:
                    sets.setdefault((method, level, name), []).append(chosen[name])
    rows = range(len(targets))
    features = [list(dict.fromkeys(f for by_row in sets.values() for f, _ in by_row[row])) for row in rows]
    true = true_effects(model, recording, layer, targets, features, states=states)
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
    *,
    states: Mapping[str, SplitState] | None = None,
) -> list[dict[str, list[tuple[Feature, float]]]]:
    """Of every image (or of these rows) all features of a layer that have an attribution, largest first, by level.

    targets: one an image. steps: integration nodes, None for the gradient at the output itself.
    """
    rows = range(len(targets)) if rows is None else rows
    questions = [Question(row, [target], steps) for row, target in zip(rows, targets, strict=True)]
    states = states or model.states
    tails, state = LayerTails(model.tails, recording, states, layer, questions), states[layer]
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
    *,
    states: Mapping[str, SplitState] | None = None,
) -> list[dict[Feature, float]]:
    """Of every image what its target loses with each of its features ablated: all of them share tail passes."""
    questions = [Question(row, [target]) for row, target in enumerate(targets)]
    states = states or model.states
    tails, state = LayerTails(model.tails, recording, states, layer, questions), states[layer]

    def removal(row: int, feature: Feature) -> Callable[[], Tensor]:
        return lambda: -state.write(tails.x(row), feature)

    with model.lock:
        effects = tails.effects([[removal(row, f) for f in own] for row, own in enumerate(features)])
    return [dict(zip(own, (-e[0]).tolist(), strict=True)) for own, e in zip(features, effects, strict=True)]


def agreement_figures(agreements: Sequence[Agreement]) -> dict[str, Any]:
    """Means over images of what agrees in each; None without a figure."""
    spearman, slope = Summary.of([a.spearman for a in agreements]), Summary.of([a.slope for a in agreements])
    return {"spearman": spearman and asdict(spearman), "slope": slope and asdict(slope)}


@dataclass(frozen=True)
class EffectRow:
    """features: the checkpoint's own or those of a random partition; method, level, set as in `layer_agreements`."""

    features: str
    method: str
    level: str
    set: str
    spearman: Summary | None
    slope: Summary | None

    def document(self) -> dict[str, Any]:
        figures = {k: v and asdict(v) for k, v in (("spearman", self.spearman), ("slope", self.slope))}
        return {"features": self.features, "method": self.method, "level": self.level, "set": self.set, **figures}


@torch.no_grad()
def measure_agreement(
    model: EludeModel, layer: str, token_type: int, random_state: SplitState, source: ImageSource, seed: int,
    report: Progress,
) -> list[EffectRow]:  # fmt: skip
    """Agreement of one token type's features, and of those that a random partition of the same sizes has, on images
    each of whose target is its top class."""
    partitions = {OWN: model.states, RANDOM: {**model.states, layer: random_state}}
    draws = {name: random.Random(seed) for name in partitions}
    found: dict[tuple[str, str, str, str], list[Agreement]] = {}
    for recording in layer_recordings(model, layer, source, report, f"attribution: {layer}"):
        targets = [Target(int(index)) for index in recording.logits.argmax(-1)]
        for name, states in partitions.items():
            agreements = layer_agreements(
                model, recording, layer, targets, TOP, draws[name],
                states=states, token_type=token_type, wanted=EVALUATED,
            )  # fmt: skip
            for key, by_image in agreements.items():
                found.setdefault((name, *key), []).extend(by_image)
    return [
        EffectRow(*key, Summary.of([a.spearman for a in by_image]), Summary.of([a.slope for a in by_image]))
        for key, by_image in found.items()
    ]
