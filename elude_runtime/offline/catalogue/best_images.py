"""The best images of many features at once, kept while images stream by; what is kept does not grow with them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elude_runtime.offline.collect import State

NOWHERE = -1  # the place of no image
HEAT_LEVELS = 127
_NONE = -torch.inf  # the key of no image
_KEPT = ("keys", "activations", "places", "tokens")


class BestImages:
    """Of each of F features the `keep` images with the largest keys, best first; of equal keys the image that came
    first. Images come in one order, each once.

    keys, activations float32 [keep, F]; places int64 [keep, F], `NOWHERE` beyond the last; tokens int32 [keep, F];
    heat int8 [heats, F, T] and heat_scales float32 [heats, F]: the feature's activation on every token of its first
    `heats` images is heat / 127 * heat_scale.
    """

    def __init__(self, features: int, keep: int, *, least: float = _NONE, heats: int = 0, tokens: int = 0) -> None:
        self.least = least  # keys have to be larger
        self.keys = torch.full((keep, features), _NONE)
        self.activations = torch.zeros(keep, features)
        self.places = torch.full((keep, features), NOWHERE)
        self.tokens = torch.zeros(keep, features, dtype=torch.int32)
        self.heat = torch.zeros(heats, features, tokens, dtype=torch.int8)
        self.heat_scales = torch.zeros(heats, features)

    def add(
        self, places: Tensor, keys: Tensor, activations: Tensor, tokens: Tensor,
        values: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Take in images: places int64 [B]; keys, activations, tokens [B, F]. values(images, features), int64 [N] each:
        the activations [N, T] of these features on all tokens of these images of the call."""
        better = keys > self.keys[-1].clamp(min=self.least)
        features = better.any(0).nonzero()[:, 0]
        if not len(features):
            return
        keep = len(self.keys)
        offered = torch.where(better[:, features], keys[:, features], _NONE)
        ranked = torch.cat([self.keys[:, features], offered]).sort(dim=0, descending=True, stable=True)
        order = ranked.indices[:keep]
        if len(self.heat) and values is not None:
            self._move_heat(features, order[: len(self.heat)], ranked.values[: len(self.heat)] > _NONE, values)
        self.keys[:, features] = ranked.values[:keep]
        fresh = {"activations": activations, "places": places[:, None].expand_as(keys), "tokens": tokens}
        for name, own in fresh.items():
            kept = getattr(self, name)
            kept[:, features] = torch.cat([kept[:, features], own[:, features].to(kept.dtype)]).gather(0, order)
        self.places[self.keys == _NONE] = NOWHERE

    def _move_heat(
        self, features: Tensor, order: Tensor, there: Tensor, values: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Move the heat of images that stay, take that of those that come. An image only ever falls."""
        keep, heats = len(self.keys), len(self.heat)
        stays = order.clamp(max=heats - 1)
        heat, scales = self.heat[stays, features], self.heat_scales[stays, features]
        rank, column = (there & (order >= keep)).nonzero(as_tuple=True)
        if len(rank):
            fresh = values(order[rank, column] - keep, features[column])
            scale = fresh.abs().amax(1)
            per_level = HEAT_LEVELS / scale.clamp(min=torch.finfo(torch.float32).tiny)
            heat[rank, column] = (fresh * per_level[:, None]).round().to(torch.int8)
            scales[rank, column] = scale
        self.heat[:, features], self.heat_scales[:, features] = heat, scales

    def state(self) -> State:
        return {name: getattr(self, name) for name in (*_KEPT, "heat", "heat_scales")}

    def restore(self, state: State) -> None:
        for name, kept in state.items():
            setattr(self, name, kept)
