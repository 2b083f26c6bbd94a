"""Pixels: which patches of the input image a feature's peak activation rests on."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import held_change
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tokens import by_image

if TYPE_CHECKING:
    from elude_runtime.analysis.model import EludeModel

GRID = (14, 14)  # of a layer whose tokens have none
_IMAGES = 4  # at once: the gradients of a whole network take much memory


@dataclass(frozen=True)
class PixelRequest:
    """Features of one image [C, H, W], with the token of each whose activation is asked about. change: what edits
    added to the outputs of layers, [T, d] each, which is held fixed."""

    image: Tensor
    peaks: Mapping[Feature, int]
    change: Mapping[str, Tensor] = field(default_factory=dict)


@torch.inference_mode(False)
def pixel_maps(model: EludeModel, requests: Sequence[PixelRequest]) -> list[dict[Feature, np.ndarray]]:
    """Of every request, for each feature the gradient of its activation at its token with respect to the input image,
    times the input (0 is the mean colour), summed over the channels and pixels of each patch: float32 [rows, columns]
    of the layer's grid, or 14 x 14, at most the image's pixels. The patches add up to the whole gradient x input.

    One forward pass for a few images at once, stopped at the last layer that is asked about; a backward pass a feature.
    """
    found: list[dict[Feature, np.ndarray]] = []
    with model.lock:
        for start in range(0, len(requests), _IMAGES):
            part = requests[start : start + _IMAGES]
            found += _maps(model, part) if any(r.peaks for r in part) else [{} for _ in part]
    return found


def _maps(model: EludeModel, requests: Sequence[PixelRequest]) -> list[dict[Feature, np.ndarray]]:
    found: list[dict[Feature, np.ndarray]] = [{} for _ in requests]
    with torch.enable_grad():
        images = torch.stack([r.image for r in requests]).detach().requires_grad_()
        inputs = _inputs(model, images, requests)
        peaks = [_peaks(model, inputs, place, r.peaks) for place, r in enumerate(requests)]
        most = max(len(p) for p in peaks)
        for number in range(most):
            asked = [(place, *p[number]) for place, p in enumerate(peaks) if number < len(p)]
            total = torch.stack([activation for *_, activation in asked]).sum()
            (gradient,) = torch.autograd.grad(total, images, retain_graph=number + 1 < most)
            products = (gradient * images.detach()).float().sum(1)  # [R, H, W]
            for place, feature, _ in asked:
                grid = model.states[feature.layer].layout.grid or GRID
                found[place][feature] = patch_sums(products[place], grid).cpu().numpy()
    return found


def _peaks(
    model: EludeModel, inputs: Mapping[str, Tensor], place: int, peaks: Mapping[Feature, int]
) -> list[tuple[Feature, Tensor]]:
    """The activations of one image's features at their tokens, differentiable."""
    found = []
    groups: dict[tuple[str, int], list[Feature]] = {}
    for feature in peaks:
        groups.setdefault((feature.layer, feature.token_type), []).append(feature)
    for (layer, token_type), features in groups.items():
        state = model.states[layer]
        activations = state.feature_activations(inputs[layer][place : place + 1], features)[0]
        first = state.layout.slices[token_type].start
        found += [(f, activations[peaks[f] - first, column]) for column, f in enumerate(features)]
    return found


class _Stop(Exception):
    """Ends the forward pass where nothing further is needed."""


def _inputs(model: EludeModel, images: Tensor, requests: Sequence[PixelRequest]) -> dict[str, Tensor]:
    """What each layer that is asked about sees of the images, differentiable; edited layers before it put out what
    they did."""
    wanted = {f.layer for r in requests for f in r.peaks}
    inputs: dict[str, Tensor] = {}

    def seeing(layer: str) -> Callable[..., None]:
        def look(_: nn.Module, args: Any) -> None:
            # a copy: glue code may change it in place later
            inputs[layer] = by_image(args[0].clone(), len(images))
            if len(inputs) == len(wanted):
                raise _Stop

        return look

    def changing(state: SplitState, changes: list[Tensor | None]) -> Callable[..., Tensor]:
        change = held_change(state, changes)
        return lambda _, args, y: change(args[0], by_image(y, len(images))).reshape(y.shape)

    handles = [model.states[n].linear.module.register_forward_pre_hook(seeing(n)) for n in wanted]
    for layer in {n: None for r in requests for n in r.change}:
        state, changes = model.states[layer], [r.change.get(layer) for r in requests]
        handles.append(state.linear.module.register_forward_hook(changing(state, changes)))
    try:
        model.base(images)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def patch_sums(values: Tensor, grid: tuple[int, int]) -> Tensor:
    """Pixels [H, W] added up by patch: [rows, columns], at most [H, W]. Every pixel counts once; patches differ by a
    pixel where the grid does not divide the image."""
    height, width = values.shape
    rows, columns = min(grid[0], height), min(grid[1], width)
    row_of = torch.arange(height, device=values.device) * rows // height
    column_of = torch.arange(width, device=values.device) * columns // width
    by_row = values.new_zeros(rows, width).index_add_(0, row_of, values)
    return by_row.new_zeros(rows, columns).index_add_(1, column_of, by_row)
