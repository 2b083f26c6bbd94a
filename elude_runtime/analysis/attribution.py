"""Attribution: how one layer's features share out target(x) - target(y := c), for one image of a recorded pass."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError
from elude_runtime.network.tail import Recording, TailRunner

GRADIENT, INTEGRATED, ABLATION, AUTO = "gradient", "integrated_gradients", "ablation", "auto"
METHODS = (AUTO, GRADIENT, INTEGRATED, ABLATION)
_TAIL_ROWS = 16  # copies of one image in a tail batch


@dataclass(frozen=True)
class ExplainOptions:
    """method: one of `METHODS`; steps: integration nodes; level: "concepts" or "subunits"; sign: which attributions
    are listed ("both" by absolute value); heatmaps: activation of each listed feature on the token grid."""

    method: str = AUTO
    steps: int = 4
    level: str = "concepts"
    top_features: int = 10
    sign: str = "both"
    heatmaps: bool = False

    def __post_init__(self) -> None:
        for value, known, what in (
            (self.method, METHODS, "method"),
            (self.level, ("concepts", "subunits"), "level"),
            (self.sign, ("both", "positive", "negative"), "sign"),
        ):
            if value not in known:
                raise EludeError(f"There is no {what} {value!r}; use one of {', '.join(known)}.")
        if self.steps < 1 or self.top_features < 1:
            raise EludeError("steps and top_features must be at least 1.")


@dataclass(frozen=True)
class FeatureAttribution:
    """activation: at the token where it is largest in absolute value (index `token`); effect: target with the feature
    ablated minus without (null edit in the same tail batch); heatmap [rows, columns]: activations, where asked for."""

    feature: Feature
    activation: float
    token: int
    attribution: float
    effect: float | None = None
    ablation_error: float | None = None
    heatmap: np.ndarray | None = None


@dataclass(frozen=True)
class LayerExplanation:
    """completeness_error: sum of ALL attributions of the layer (listed or not) minus (value - baseline); None for
    ablation, which measures the listed features only."""

    layer: str
    method: str
    baseline: float
    completeness_error: float | None
    features: list[FeatureAttribution] = field(default_factory=list)


@dataclass(frozen=True)
class Explanation:
    target: Target
    value: float
    layers: list[LayerExplanation]


def explain_row(
    runner: TailRunner,
    recording: Recording,
    row: int,
    state: SplitState,
    targets: list[Target],
    options: ExplainOptions,
) -> list[LayerExplanation]:
    """One layer's explanation of each target for image `row` of a recorded pass."""
    baseline_output = state.baseline()
    x = recording.x[state.name][row : row + 1].detach().clone()
    y = recording.y[state.name][row : row + 1].detach().clone()
    c = state.linear.untokens(baseline_output[None].to(y.dtype), y)
    rows = torch.tensor([row], device=y.device)
    with torch.no_grad():
        baseline_logits = runner.run(recording, state.name, c, rows)
    method = state.entry.attribution.auto if options.method == AUTO else options.method
    steps = options.steps if method == INTEGRATED else None
    explained = []
    for target, gradient in zip(targets, gradients(runner, recording, row, state, y, c, targets, steps), strict=True):
        baseline = float(target.value(baseline_logits))
        value = float(target.value(recording.logits[row : row + 1]))
        with torch.no_grad():
            subunits = state.attributions(x, gradient)
        total = math.fsum(float(subunits[t].sum(dtype=torch.float64)) for t in range(len(subunits)))
        top = _top(state, subunits, options)
        listed = _describe(state, x, top, options)
        error: float | None = total - (value - baseline)
        if method == ABLATION:
            listed = _ablated(runner, recording, row, state, x, y, target, listed, options.sign)
            error = None
        explained.append(LayerExplanation(state.name, method, baseline, error, listed))
    return explained


@torch.inference_mode(False)
def gradients(
    runner: TailRunner,
    recording: Recording,
    row: int,
    state: SplitState,
    y: Tensor,
    c: Tensor,
    targets: list[Target],
    steps: int | None,
) -> list[Tensor]:
    """d target / d y of each target, float32 [1, T, d]: at y itself, or averaged along c + a (y - c).

    The path integral (integrated gradients, Sundararajan et al. 2017, section 3) uses `steps` Gauss-Legendre nodes in
    one tail batch. One forward tail serves all targets.
    """
    if steps is None:
        path, weights = y.clone(), torch.ones(1, device=y.device)
    else:
        nodes = torch.tensor(path_nodes(steps), device=y.device)
        a, weights = nodes[:, 0].to(y.dtype), nodes[:, 1].float()
        path = c + a.view(-1, *[1] * (y.dim() - 1)) * (y - c)
    found = [torch.zeros_like(state.linear.tokens(y), dtype=torch.float32) for _ in targets]
    for part, part_weights in zip(path.split(_TAIL_ROWS), weights.split(_TAIL_ROWS), strict=True):
        with torch.enable_grad():
            leaf = part.detach().requires_grad_()
            logits = runner.run(recording, state.name, leaf, torch.full((len(leaf),), row, device=y.device))
            for position, target in enumerate(targets):
                last = position == len(targets) - 1
                (gradient,) = torch.autograd.grad(target.value(logits).sum(), leaf, retain_graph=not last)
                tokens = state.linear.tokens(gradient).float()
                found[position] += (tokens * part_weights[:, None, None]).sum(0, keepdim=True)
    return found


def path_nodes(steps: int | None) -> list[tuple[float, float]]:
    """(a, weight) of the points c + a (y - c) whose gradients are averaged: Gauss-Legendre on (0, 1), or y itself."""
    if steps is None:
        return [(1.0, 1.0)]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [((a + 1) / 2, w / 2) for a, w in zip(nodes.tolist(), weights.tolist(), strict=True)]


def _top(state: SplitState, subunits: list[Tensor], options: ExplainOptions) -> list[tuple[Feature, float]]:
    """The listed features with their attributions, largest first."""
    values, locate = [], []
    for token_type in state.live_types:
        per_type = subunits[token_type]
        flat = state.by_concept(per_type, token_type) if options.level == "concepts" else per_type.flatten()
        values.append(flat)
        locate += [token_type] * len(flat)
    flat = torch.cat(values)
    key = {"both": flat.abs(), "positive": flat, "negative": -flat}[options.sign]
    keep = min(options.top_features, len(flat))
    order = torch.argsort(key, descending=True, stable=True)[:keep].tolist()
    wanted = [i for i in order if float(key[i]) > 0]
    first = {t: locate.index(t) for t in state.live_types}
    width = state.partition.subunits + 1
    chosen = []
    for i in wanted:
        token_type, local = locate[i], i - first[locate[i]]
        if options.level == "concepts":
            index = None if local == state.partition.concepts(token_type) else local
            feature = Feature(state.name, token_type, index)
        else:
            neuron, slot = divmod(local, width)
            feature = Feature(state.name, token_type, None if slot == width - 1 else slot, neuron)
        chosen.append((feature, float(flat[i])))
    return chosen


def _describe(
    state: SplitState, x: Tensor, top: list[tuple[Feature, float]], options: ExplainOptions
) -> list[FeatureAttribution]:
    """Activation, token and heatmap of the listed features."""
    out = []
    concepts: dict[int, Tensor] = {}  # one product gives all concepts of a token type
    for feature, attribution in top:
        with torch.no_grad():
            if feature.neuron is not None:
                activation = state.activations(x, feature)[0]
            else:
                if feature.token_type not in concepts:
                    concepts[feature.token_type] = state.concept_activations(x, feature.token_type)[0]
                activation = concepts[feature.token_type][:, state.slot(feature)]
        local = int(activation.abs().argmax())
        heatmap = None
        if options.heatmaps and feature.token_type == 0 and state.layout.grid is not None:
            heatmap = activation.reshape(state.layout.grid).cpu().numpy()
        token = local + state.layout.slices[feature.token_type].start
        out.append(FeatureAttribution(feature, float(activation[local]), token, attribution, heatmap=heatmap))
    return out


def ablation_effects(
    runner: TailRunner,
    recording: Recording,
    row: int,
    state: SplitState,
    x: Tensor,
    y: Tensor,
    target: Target,
    features: list[Feature],
) -> list[float]:
    """target with the feature at its calibration mean minus target without an edit, both in the same tail batch."""
    effects: list[float] = []
    for start in range(0, len(features), _TAIL_ROWS):
        part = features[start : start + _TAIL_ROWS]
        with torch.no_grad():
            writes = torch.cat([torch.zeros_like(state.linear.tokens(y)), *(state.write(x, f) for f in part)])
            edited = state.changed(y.expand(len(writes), *y.shape[1:]), -writes)
            rows = torch.full((len(edited),), row, device=y.device)
            values = target.value(runner.run(recording, state.name, edited, rows))
        effects += (values[1:] - values[0]).tolist()
    return effects


def _ablated(
    runner: TailRunner,
    recording: Recording,
    row: int,
    state: SplitState,
    x: Tensor,
    y: Tensor,
    target: Target,
    listed: list[FeatureAttribution],
    sign: str,
) -> list[FeatureAttribution]:
    """The listed features (chosen by gradient) with their true effect as attribution; those whose effect turns out to
    have the other sign than asked for are left out."""
    effects = ablation_effects(runner, recording, row, state, x, y, target, [f.feature for f in listed])
    measured = [
        FeatureAttribution(f.feature, f.activation, f.token, -effect, effect, 0.0, f.heatmap)
        for f, effect in zip(listed, effects, strict=True)
    ]
    wanted = {"both": (-1, 0, 1), "positive": (1,), "negative": (-1,)}[sign]
    kept = [f for f in measured if (f.attribution > 0) - (f.attribution < 0) in wanted]
    return sorted(kept, key=lambda f: -abs(f.attribution))
