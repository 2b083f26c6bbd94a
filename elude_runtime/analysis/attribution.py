"""Attribution: what an explanation is asked by and says, and which features of a layer it lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.errors import EludeError

GRADIENT, INTEGRATED, ABLATION, AUTO = "gradient", "integrated_gradients", "ablation", "auto"
METHODS = (AUTO, GRADIENT, INTEGRATED, ABLATION)


@dataclass(frozen=True)
class ExplainOptions:
    """method: one of `METHODS`; steps: integration nodes; level: "concepts" or "subunits"; sign: which attributions
    are listed ("both" by absolute value); effects: the listed features are ablated too, one by one; heatmaps:
    activation of each listed feature on the token grid; pixels: what of the input image each listed feature's peak
    activation rests on."""

    method: str = AUTO
    steps: int = 4
    level: str = "concepts"
    top_features: int = 10
    sign: str = "both"
    effects: bool = False
    heatmaps: bool = False
    pixels: bool = False

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
class ExplainRequest:
    """What is asked about image `row` of a recorded pass.

    change: for a pass that was steered, what the edits added to each edited layer's output for this image, [T, d] a
    layer. The explanation holds it fixed: the features share out what the layers' own weights give, and the edits of
    later layers stay in place in every tail.
    """

    row: int
    targets: Sequence[Target]
    layers: Sequence[str]
    options: ExplainOptions = ExplainOptions()
    change: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class FeatureAttribution:
    """activation: at the token where it is largest in absolute value (index `token`); effect: target with the feature
    ablated minus without (null edit in the same tail batch); where asked for, heatmap [rows, columns]: activations,
    and pixels [rows, columns]: gradient of `activation` with respect to the image times the image, 0 the mean colour,
    summed over the channels and pixels of each patch."""

    feature: Feature
    activation: float
    token: int
    attribution: float
    effect: float | None = None
    ablation_error: float | None = None
    heatmap: np.ndarray | None = None
    pixels: np.ndarray | None = None


@dataclass(frozen=True)
class LayerExplanation:
    """completeness_error: sum of ALL attributions of the layer (listed or not, an edit's with them) minus
    (value - baseline); None for ablation, which measures the listed features only. edit_attribution: of what an edit
    added to the layer's output, by the same method; None where the layer was not edited."""

    layer: str
    method: str
    baseline: float
    completeness_error: float | None
    features: list[FeatureAttribution] = field(default_factory=list)
    edit_attribution: float | None = None


@dataclass(frozen=True)
class Explanation:
    """value: the target read off the recorded pass; layers: in network order."""

    target: Target
    value: float
    layers: list[LayerExplanation]


def path_nodes(steps: int | None) -> list[tuple[float, float]]:
    """(a, weight) of the points c + a (y - c) whose gradients are averaged: Gauss-Legendre on (0, 1), or y itself.

    The path integral: integrated gradients, Sundararajan et al. 2017, section 3.
    """
    if steps is None:
        return [(1.0, 1.0)]
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    return [((a + 1) / 2, w / 2) for a, w in zip(nodes.tolist(), weights.tolist(), strict=True)]


def top_features(
    state: SplitState, subunits: Mapping[int, Tensor], options: ExplainOptions
) -> list[tuple[Feature, float]]:
    """The features to list with their attributions, largest first. subunits: [d, M + 1] by live token type."""
    concepts = options.level == "concepts"
    values = [state.by_concept(v, t) if concepts else v.flatten() for t, v in subunits.items()]
    flat = torch.cat(values)
    key = {"both": flat.abs(), "positive": flat, "negative": -flat}[options.sign]
    best, order = key.topk(min(options.top_features, len(flat)))
    chosen = []
    for index, attribution, size in zip(order.tolist(), flat[order].tolist(), best.tolist(), strict=True):
        if not size > 0:
            continue
        for token_type, of_type in zip(subunits, values, strict=True):
            if index < len(of_type):
                chosen.append((_feature(state, token_type, index, concepts=concepts), attribution))
                break
            index -= len(of_type)
    return chosen


def _feature(state: SplitState, token_type: int, index: int, *, concepts: bool) -> Feature:
    """The feature at a place of the axis K + 1, or of d * (M + 1)."""
    if concepts:
        return Feature(state.name, token_type, None if index == state.indices(token_type).concepts else index)
    rest = state.partition.subunits
    neuron, slot = divmod(index, rest + 1)
    return Feature(state.name, token_type, None if slot == rest else slot, neuron)


def describe(
    state: SplitState, x: Tensor, top: list[tuple[Feature, float]], *, heatmaps: bool = False
) -> list[FeatureAttribution]:
    """The listed features of one image, x [1, ...] in the layer's layout, with activation, token and heatmap."""
    found: dict[Feature, FeatureAttribution] = {}
    for token_type in state.live_types:
        own = [(f, attribution) for f, attribution in top if f.token_type == token_type]
        if not own:
            continue
        activations = state.feature_activations(x, [f for f, _ in own])[0]  # [T_p, F]
        tokens = activations.abs().argmax(0)
        peaks = activations.gather(0, tokens[None])[0].tolist()
        first = state.layout.slices[token_type].start
        maps: Sequence[np.ndarray | None] = [None] * len(own)
        if heatmaps and token_type == 0 and state.layout.grid is not None:
            maps = list(activations.T.unflatten(1, state.layout.grid).cpu().numpy())
        for (feature, attribution), peak, token, heatmap in zip(own, peaks, tokens.tolist(), maps, strict=True):
            found[feature] = FeatureAttribution(feature, peak, token + first, attribution, heatmap=heatmap)
    return [found[f] for f, _ in top]
