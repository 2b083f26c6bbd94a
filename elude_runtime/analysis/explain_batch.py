"""Explanations of several images of one recorded pass: requests of one layer share its tails."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elude_runtime.analysis.ablation import by_effect, true_effects, with_effects
from elude_runtime.analysis.attribution import (
    ABLATION,
    AUTO,
    INTEGRATED,
    ExplainRequest,
    Explanation,
    LayerExplanation,
    describe,
    top_features,
)
from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.pixels import PixelRequest, pixel_maps
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tail import Recording

if TYPE_CHECKING:
    from elude_runtime.analysis.model import EludeModel


@torch.inference_mode(False)
@torch.no_grad()
def explain_batch(
    model: EludeModel, recording: Recording, requests: Sequence[ExplainRequest]
) -> list[list[Explanation]]:
    """Of every request one explanation a target, in order; its layers in network order.

    LayerError for a layer that is not split, TargetError for a class or direction that the model does not have. A
    request's numbers depend on the others only through the shape of the batches that they share.
    """
    for request in requests:
        for layer in request.layers:
            model.state(layer)
    with model.lock:
        values = [[float(t.value(recording.logits[r.row : r.row + 1])) for t in r.targets] for r in requests]
        layers: list[list[list[LayerExplanation]]] = [[[] for _ in r.targets] for r in requests]
        for layer in model.layers:
            asking = [i for i, r in enumerate(requests) if layer in r.layers and r.targets]
            if not asking:
                continue
            explained = _explain_layer(
                model, recording, layer, [requests[i] for i in asking], [values[i] for i in asking]
            )
            for i, own in zip(asking, explained, strict=True):
                for target, found in zip(layers[i], own, strict=True):
                    target.append(found)
        _add_pixels(model, recording, requests, layers)
    return [
        [Explanation(*found) for found in zip(r.targets, own_values, own, strict=True)]
        for r, own_values, own in zip(requests, values, layers, strict=True)
    ]


def _explain_layer(
    model: EludeModel,
    recording: Recording,
    layer: str,
    requests: Sequence[ExplainRequest],
    values: Sequence[Sequence[float]],
) -> list[list[LayerExplanation]]:
    """One layer's part of every request's explanations."""
    state = model.states[layer]
    methods = [state.entry.attribution.auto if r.options.method == AUTO else r.options.method for r in requests]
    questions = [
        Question(r.row, r.targets, r.options.steps if method == INTEGRATED else None, r.change)
        for r, method in zip(requests, methods, strict=True)
    ]
    tails = LayerTails(model.tails, recording, model.states, layer, questions)
    gradients = tails.gradients()
    found = [
        [
            _by_gradient(tails.state, tails.x(i), gradient, value, float(target.value(baseline)), method, request)
            for target, value, gradient in zip(request.targets, values[i], gradients[i], strict=True)
        ]
        for i, (request, method, baseline) in enumerate(zip(requests, methods, tails.baselines(), strict=True))
    ]
    ablated = [i for i, r in enumerate(requests) if methods[i] == ABLATION or r.options.effects]
    if ablated:
        tails = LayerTails(model.tails, recording, model.states, layer, [questions[i] for i in ablated])
        for i, effects in zip(ablated, true_effects(tails, [found[i] for i in ablated]), strict=True):
            sign = requests[i].options.sign
            found[i] = [
                by_effect(e, own, sign) if methods[i] == ABLATION else with_effects(e, own)
                for e, own in zip(found[i], effects, strict=True)
            ]
    return found


def _by_gradient(
    state: SplitState, x: Tensor, gradient: Tensor, value: float, baseline: float, method: str, request: ExplainRequest
) -> LayerExplanation:
    """A layer's features and edit by gradient x activation: x [1, ...], gradient [T, d] at y or of a whole path."""
    options, change = request.options, request.change.get(state.name)
    subunits = state.attributions(x, gradient[None])
    edit = None if change is None else float((gradient * change).sum(dtype=torch.float64))
    total = sum((float(v.sum(dtype=torch.float64)) for v in subunits.values()), edit or 0.0)
    listed = describe(state, x, top_features(state, subunits, options), heatmaps=options.heatmaps)
    return LayerExplanation(state.name, method, baseline, total - (value - baseline), listed, edit)


def _add_pixels(
    model: EludeModel,
    recording: Recording,
    requests: Sequence[ExplainRequest],
    layers: list[list[list[LayerExplanation]]],
) -> None:
    """Put the pixel maps of the listed features where they were asked for."""
    asking = [i for i, r in enumerate(requests) if r.options.pixels]
    wanted = [
        PixelRequest(
            recording.images[requests[i].row],
            {f.feature: f.token for target in layers[i] for layer in target for f in layer.features},
            requests[i].change,
        )
        for i in asking
    ]
    for i, maps in zip(asking, pixel_maps(model, wanted), strict=True):
        for target in layers[i]:
            target[:] = [replace(e, features=[replace(f, pixels=maps[f.feature]) for f in e.features]) for e in target]
