"""Activations of a recorded pass: of chosen features, and of all concepts or sub-units of a layer.

Peak: the activation at the token where its absolute value is largest (interface: term *activation*).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.errors import EludeError
from elude_runtime.network.tail import Recording, record_layers
from elude_runtime.partition.sums import subunit_weight

REDUCTIONS = ("peak", "mean", "tokens")
_WEIGHT_FLOATS = 16_000_000  # of masked weights held at once
_SUM_FLOATS = 16_000_000  # of sub-unit activations on all tokens held at once where only their peaks are kept


class Peaks(NamedTuple):
    """values float32 [B, F]; tokens int64 [B, F], the token of each on the layer's axis T."""

    values: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class FeatureActivation:
    """value: the peak or the mean over the tokens of the feature's type; token: of a peak, on the layer's axis T;
    values [T_p]: every token of its type, where all were asked for."""

    feature: Feature
    value: float | None = None
    token: int | None = None
    values: NDArray[np.float32] | None = None


def record_layer(model: EludeModel, images: Tensor, layer: str) -> Recording:
    """A pass over images [B, 3, H, W] that keeps one layer's input and output, without planning any tail."""
    state = model.state(layer)
    with model.lock, torch.no_grad():
        return record_layers(model.base, images, {layer: state.linear.module})


def peaks(model: EludeModel, recording: Recording, layer: str, rows: Sequence[int] | None = None) -> Peaks:
    """Peaks of all concepts of a layer's live token types, columns as `model.concept_names(layer)`; rows: of these
    images only. LayerError for a layer that the checkpoint does not split."""
    state = model.state(layer)
    x = recording.x[layer] if rows is None else recording.x[layer][list(rows)]
    values, tokens = [], []
    for token_type, activations in concept_activations(state, x):
        value, token = peak(activations)
        values.append(value)
        tokens.append(token + state.layout.slices[token_type].start)
    return Peaks(torch.cat(values, -1), torch.cat(tokens, -1))


def concept_activations(state: SplitState, x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """(token type, activations [B, T_p, K + 1] with `rest` last) of each live token type; x [B, ...], the layer's
    input."""
    with torch.no_grad():
        for token_type in state.live_types:
            yield token_type, state.concept_activations(x.float(), token_type)


def peak(activations: Tensor) -> Peaks:
    """[B, T_p, F] -> the activation of largest absolute value over the tokens, and its token among those T_p."""
    tokens = activations.abs().argmax(1)
    return Peaks(activations.gather(1, tokens[:, None])[:, 0], tokens)


def feature_activation(
    state: SplitState, recording: Recording, row: int, feature: Feature, reduce: str = "peak"
) -> FeatureActivation:
    """One feature's activation on image `row` of a recorded pass. EludeError for an unknown reduction."""
    return feature_activations(state, recording, row, [feature], reduce)[0]


def feature_activations(
    state: SplitState, recording: Recording, row: int, features: Sequence[Feature], reduce: str = "peak"
) -> list[FeatureActivation]:
    """The same of several features of one layer; those of a token type come from one product.

    reduce: "peak"; "mean", over the tokens of the feature's own type; or "tokens", each of these.
    """
    if reduce not in REDUCTIONS:
        raise EludeError(f"There is no reduction {reduce!r} of activations; use one of {', '.join(REDUCTIONS)}.")
    x = recording.x[state.name][row : row + 1].float()
    values: dict[Feature, Tensor] = {}  # [T_p] each
    with torch.no_grad():
        for token_type in {f.token_type for f in features}:
            ours = [f for f in features if f.token_type == token_type]
            values.update(zip(ours, state.feature_activations(x, ours)[0].unbind(-1), strict=True))
    return [_reduced(state, feature, values[feature], reduce) for feature in features]


def _reduced(state: SplitState, feature: Feature, values: Tensor, reduce: str) -> FeatureActivation:
    if reduce == "tokens":
        return FeatureActivation(feature, values=values.float().cpu().numpy())
    if reduce == "mean":
        return FeatureActivation(feature, float(values.mean(dtype=torch.float64)))
    token = int(values.abs().argmax())
    return FeatureActivation(feature, float(values[token]), token + state.layout.slices[feature.token_type].start)


def subunit_peaks(state: SplitState, x: Tensor) -> Tensor:
    """Peaks of all sub-units on each token type: float32 [B, P, d, M + 1], `rest` last; x [B, ...], the layer's input.

    In memory at once: the result, some masked weights, and a few images' activations of a few neurons.
    """
    d, width = state.linear.neurons, state.partition.subunits + 1
    out = torch.empty(len(x), state.layout.types, d, width, device=x.device)
    with torch.no_grad():
        for token_type in range(state.layout.types):
            for neurons, weight, mean in _readouts(state, token_type):
                rows = max(1, _SUM_FLOATS // (len(weight) * state.layout.total))
                for part, into in zip(x.split(rows), out.split(rows), strict=True):
                    values = peak(_on_tokens(state, part, token_type, weight) - mean).values
                    into[:, token_type, neurons] = values.unflatten(-1, (-1, width))
    return out


def subunit_tokens(state: SplitState, x: Tensor) -> Tensor:
    """Centred activations of all sub-units on every token: float32 [B, T, d, M + 1], `rest` last, each token by its own
    type's partition; x [B, ...], the layer's input."""
    d, width = state.linear.neurons, state.partition.subunits + 1
    out = torch.empty(len(x), state.layout.total, d, width, device=x.device)
    with torch.no_grad():
        for token_type, tokens in enumerate(state.layout.slices):
            for neurons, weight, mean in _readouts(state, token_type):
                values = _on_tokens(state, x, token_type, weight) - mean
                out[:, tokens, neurons] = values.unflatten(-1, (-1, width))
    return out


def _readouts(state: SplitState, token_type: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(neurons, read-outs [F, c, q] of all their sub-units, their means [F]), a few neurons at a time."""
    linear, partition = state.linear, state.partition
    width = partition.subunits + 1
    step = max(1, _WEIGHT_FLOATS // (width * linear.groups * linear.inputs * linear.positions))
    for start in range(0, linear.neurons, step):
        chosen = torch.arange(start, min(start + step, linear.neurons), device=partition.edges.device)
        neurons = chosen.repeat_interleave(width)
        slots = torch.arange(width, device=chosen.device).repeat(len(chosen))
        weight = subunit_weight(linear.weight(), partition, token_type, neurons, slots, linear.groups)
        part = slice(start, start + len(chosen))
        yield part, weight, partition.mean[token_type, part].flatten()


def _on_tokens(state: SplitState, x: Tensor, token_type: int, weight: Tensor) -> Tensor:
    """The linear map `weight` on the tokens of one type: [B, T_p, F]."""
    if state.layout.types > 1:
        x = x[:, state.layout.slices[token_type]]
    return state.linear.apply(x.float(), weight, groups=1)
