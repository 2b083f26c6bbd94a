"""The images that stand for many features at once, kept while images stream by; what is kept does not grow with them.

Images come in one order, each once; places are their positions in the source, `NOWHERE` where there is none.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from elude_runtime.offline.collect import State

NOWHERE = -1
HEAT_LEVELS = 127


class _Kept:
    """Tensors that are saved and restored by their names."""

    names: tuple[str, ...] = ()
    places: Tensor

    def state(self) -> State:
        return {name: getattr(self, name) for name in self.names}

    def restore(self, state: State) -> None:
        for name in self.names:
            setattr(self, name, state[name])


class BestImages(_Kept):
    """Of each of F features the `keep` images with the largest keys above 0, best first; of equal keys the image that
    came first.

    keys float32, places int64, tokens int32 [keep, F], keys 0 where there is no image; heat int8 [heats, F, T] and
    heat_scales float32 [heats, F]: the activation on every token of the first `heats` images is heat / 127 *
    heat_scale.
    """

    names = ("keys", "places", "tokens", "heat", "heat_scales")

    def __init__(self, features: int, keep: int, heats: int = 0, tokens: int = 0) -> None:
        self.keys = torch.zeros(keep, features)
        self.places = torch.full((keep, features), NOWHERE)
        self.tokens = torch.zeros(keep, features, dtype=torch.int32)
        self.heat = torch.zeros(heats, features, tokens, dtype=torch.int8)
        self.heat_scales = torch.zeros(heats, features)

    def add(self, places: Tensor, keys: Tensor, tokens: Tensor, values: Callable[[Tensor, Tensor], Tensor]) -> None:
        """Take in images: places int64 [B]; keys and tokens [B, F]. values(images, features), int64 [N] each: the
        activations [N, T] of these features on all tokens of these images of the call."""
        better = keys > self.keys[-1]
        features = better.any(0).nonzero()[:, 0]
        if not len(features):
            return
        whole = len(features) == keys.shape[1]
        chosen: slice | Tensor = slice(None) if whole else features
        keep, offered = len(self.keys), torch.where(better[:, chosen], keys[:, chosen], 0)
        ranked = torch.cat([self.keys[:, chosen], offered]).sort(dim=0, descending=True, stable=True)
        order = ranked.indices[:keep]
        if len(self.heat):
            self._move_heat(features, order[: len(self.heat)], ranked.values[: len(self.heat)] > 0, values)
        fresh = order - keep
        comes = fresh >= 0
        stays, fresh = order.clamp(max=keep - 1), fresh.clamp(min=0)
        self.keys[:, chosen] = ranked.values[:keep]
        own = torch.where(comes, tokens[:, chosen].gather(0, fresh).int(), self.tokens[:, chosen].gather(0, stays))
        self.tokens[:, chosen] = own
        own = torch.where(comes, places[fresh], self.places[:, chosen].gather(0, stays))
        self.places[:, chosen] = own.masked_fill_(ranked.values[:keep] <= 0, NOWHERE)

    def _move_heat(
        self, features: Tensor, order: Tensor, there: Tensor, values: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        """Move the heat of images that stay, take that of those that come. An image only ever falls."""
        keep, heats = len(self.keys), len(self.heat)
        moved = (order != torch.arange(heats)[:, None]).any(0)
        features, order, there = features[moved], order[:, moved], there[:, moved]
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


class NearestImages(_Kept):
    """Of each of F features and L levels the image with an activation nearest to it, of those images whose place leaves
    the level's number when divided by L: so no two levels have the same image.

    levels float32 [F, L]; distances, activations float32, places int64, tokens int32 [L, F].
    """

    names = ("distances", "activations", "places", "tokens")

    def __init__(self, levels: Tensor) -> None:
        self.levels = levels.T
        self.distances = torch.full(self.levels.shape, torch.inf)
        self.activations = torch.zeros(self.levels.shape)
        self.places = torch.full(self.levels.shape, NOWHERE)
        self.tokens = torch.zeros(self.levels.shape, dtype=torch.int32)

    def add(self, places: Tensor, activations: Tensor, tokens: Tensor) -> None:
        """Take in images: places int64 [B]; activations float32 [B, F], each at the image's token, int64 [B]."""
        for number, level in enumerate(self.levels):
            images = (places % len(self.levels) == number).nonzero()[:, 0]
            if not len(images):
                continue
            distance, first = (activations[images] - level).abs().min(0)
            features = (distance < self.distances[number]).nonzero()[:, 0]
            image = images[first[features]]
            self.distances[number, features] = distance[features]
            self.activations[number, features] = activations[image, features]
            self.places[number, features] = places[image]
            self.tokens[number, features] = tokens[image].int()


class DrawnImages(_Kept):
    """The `keep` images with the smallest priorities, smallest first, the same for all features: priorities float32
    [keep]; places int64 [keep]; activations float32, tokens int32 [keep, F]."""

    names = ("priorities", "places", "activations", "tokens")

    def __init__(self, features: int, keep: int) -> None:
        self.priorities = torch.full((keep,), torch.inf)
        self.places = torch.full((keep,), NOWHERE)
        self.activations = torch.zeros(keep, features)
        self.tokens = torch.zeros(keep, features, dtype=torch.int32)

    def add(self, places: Tensor, priorities: Tensor, activations: Tensor, tokens: Tensor) -> None:
        """Take in images: places, priorities [B]; activations and tokens [B, F], where the former is largest."""
        ranked = torch.cat([self.priorities, priorities]).sort(stable=True)
        order = ranked.indices[: len(self.priorities)]
        if int(order.max()) < len(self.priorities):
            return
        self.priorities = ranked.values[: len(self.priorities)]
        self.places = torch.cat([self.places, places])[order]
        self.activations = torch.cat([self.activations, activations])[order]
        self.tokens = torch.cat([self.tokens, tokens.int()])[order]
