"""Contrast: what sets two groups of images apart at one layer, as weights of concepts, as edits and as a direction."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elude_runtime.analysis.activations import concept_activations, peak, record_layer
from elude_runtime.analysis.edits import Edit
from elude_runtime.analysis.features import parse_feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.errors import ImagesError

_FOLDS = 5
_STILL = 1e-5  # of the standard deviation over both groups: a spread within them below it is rounding


@dataclass(frozen=True)
class FeatureContrast:
    """weight: difference of the two groups' mean peaks over the pooled standard deviation within them, positive where
    the positive images have more; share: its square over the sum of the squares of all concepts of the layer."""

    feature: str
    weight: float
    share: float


@dataclass(frozen=True, eq=False)
class Contrast:
    """features: all concepts of the live token types, `rest` among them, largest weight first; edits: `add` on the top
    ones; direction float32 [d]: mean output of the positive images minus that of the negative ones, over the live
    tokens; auc: of the weighted peaks on images held out; positive, negative: images in each group."""

    layer: str
    features: list[FeatureContrast]
    edits: tuple[Edit, ...]
    direction: NDArray[np.float32]
    auc: float | None
    positive: int
    negative: int


def contrast(
    model: EludeModel, layer: str, positive: Iterable[Tensor], negative: Iterable[Tensor], top: int = 10
) -> Contrast:
    """Compare two groups of images, each as batches [B, 3, H, W] that are run through once.

    The edits are the profile that moves a negative image towards the positive ones: each of the `top` concepts with the
    largest weights (without `rest`) shifted on all its tokens by the difference of the groups' mean activations over
    tokens, so that the steered negative images' mean is the positive ones'.

    auc: area under the ROC curve of the score sum_f w_f peak_f / std_f, weights and std from the other images, mean
    over five folds (fewer where a group has fewer than five images); None with fewer than two images in a group.

    LayerError for a layer that the checkpoint does not split; ImagesError for an empty group, or for activations that
    are not finite.
    """
    sides = [_Side(model, layer, batches) for batches in (positive, negative)]
    for side, name in zip(sides, ("positive", "negative"), strict=True):
        if not side.count:
            raise ImagesError(f"There are no {name} images; a contrast needs at least one on each side.")
    ours, theirs = sides
    weights = _weights(ours.peaks, theirs.peaks)[0]
    total = float(np.square(weights).sum())
    shares = np.square(weights) / total if total > 0 else np.zeros_like(weights)
    shift = ours.mean_activation - theirs.mean_activation
    names = model.concept_names(layer)
    # of equal weights (a single image on each side has only those) the larger shift comes first
    order = np.lexsort((-np.abs(shift), -np.abs(weights))).tolist()
    numbered = [i for i in order if parse_feature(names[i], [layer]).index is not None and weights[i] != 0]
    return Contrast(
        layer=layer,
        features=[FeatureContrast(names[i], float(weights[i]), float(shares[i])) for i in order],
        edits=tuple(Edit(names[i], "add", float(np.float32(shift[i]))) for i in numbered[:top] if shift[i] != 0),
        direction=(ours.mean_output - theirs.mean_output).astype(np.float32),
        auc=_held_out_auc(ours.peaks, theirs.peaks),
        positive=ours.count,
        negative=theirs.count,
    )


class _Side:
    """One group of images, run through once. peaks float64 [N, K]; mean_activation [K] and mean_output [d]: over its
    images and their live tokens."""

    def __init__(self, model: EludeModel, layer: str, batches: Iterable[Tensor]) -> None:
        state = model.state(layer)
        slices = [state.layout.slices[t] for t in state.live_types]
        found: list[NDArray[np.float32]] = []
        activation: NDArray[np.float64] | float = 0.0
        output: NDArray[np.float64] | float = 0.0
        for images in batches:
            recording = record_layer(model, images, layer)
            of_types = [a for _, a in concept_activations(state, recording.x[layer])]
            found.append(torch.cat([peak(a).values for a in of_types], -1).cpu().numpy())
            activation += torch.cat([a.mean(1, dtype=torch.float64).sum(0) for a in of_types]).cpu().numpy()
            tokens = state.linear.tokens(recording.y[layer])
            live = torch.cat([tokens[:, s] for s in slices], 1) if len(slices) > 1 else tokens[:, slices[0]]
            output += live.mean(1, dtype=torch.float64).sum(0).cpu().numpy()
        self.count = sum(map(len, found))
        if not self.count:
            return
        self.peaks = np.concatenate(found).astype(np.float64)
        self.mean_activation: NDArray[np.float64] = np.asarray(activation) / self.count
        self.mean_output: NDArray[np.float64] = np.asarray(output) / self.count
        if not all(np.isfinite(v).all() for v in (self.peaks, self.mean_activation, self.mean_output)):
            raise ImagesError(
                f"The activations of {layer} are not finite on these images; check the images and the base model's "
                "weights."
            )


def _weights(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """(weights, standard deviations) [K] of peaks [N, K]: the difference of the means over the pooled deviation.

    Where nothing varies within the groups the deviation over both together takes its place, so that a perfect
    separation has a finite weight; where nothing varies at all the weight is 0.
    """
    counts = len(positive), len(negative)
    difference = positive.mean(0) - negative.mean(0)
    within = np.sqrt((counts[0] * positive.var(0) + counts[1] * negative.var(0)) / sum(counts))
    everything = np.concatenate([positive, negative])
    overall = everything.std(0)
    std = np.where(within > _STILL * overall, within, overall)
    std = np.where(overall > _STILL * np.abs(everything).max(0), std, np.inf)
    return difference / std, std


def _held_out_auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float | None:
    folds = min(_FOLDS, len(positive), len(negative))
    if folds < 2:
        return None
    found = []
    for fold in range(folds):
        held = [np.arange(len(side)) % folds == fold for side in (positive, negative)]
        weights, std = _weights(positive[~held[0]], negative[~held[1]])
        found.append(_auc(positive[held[0]] @ (weights / std), negative[held[1]] @ (weights / std)))
    return float(np.mean(found))


def _auc(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> float:
    """How often a positive score is above a negative one, a tie counting half."""
    ordered = np.sort(negative)
    below, not_above = np.searchsorted(ordered, positive, "left"), np.searchsorted(ordered, positive, "right")
    return float((below + not_above).mean() / 2 / len(negative))
