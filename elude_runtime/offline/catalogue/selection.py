"""From the best images kept of each feature to its exemplars, role by role."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from elude_runtime.checkpoint.exemplars import NEAR_MISS, NEGATIVE, NEITHER, POSITIVE, QUANTILE, RANDOM, TOP
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.best_images import NOWHERE, BestImages
from elude_runtime.offline.catalogue.layer_pass import TOP as TOP_IMAGES
from elude_runtime.offline.catalogue.layer_pass import Block
from elude_runtime.offline.catalogue.tables import RoleColumns

NEAR_MISSES = 4
PREDICTED = 3  # first classes of an image that count as what the model takes it for


def block_roles(block: Block, answers: Answers, shown: dict[str, Tensor]) -> list[RoleColumns]:
    """All exemplars of a block's features. shown: of each end the classes int32 [F, n] that its top images show, -1
    where there is none."""
    parts = []
    for end, best in ((POSITIVE, block.positive), (NEGATIVE, block.negative)):
        parts.append(_columns(TOP, end, best, torch.arange(TOP_IMAGES)[:, None].expand(-1, best.keys.shape[1])))
        parts.append(_columns(NEAR_MISS, end, best, near_misses(best, answers, shown[end]), heat=False))
    parts.append(_quantiles(block))
    parts.append(
        _columns(
            RANDOM,
            NEITHER,
            block.random,
            torch.arange(len(block.random.keys))[:, None].expand(-1, block.random.keys.shape[1]),
        )
    )
    return parts


def input_roles(best: BestImages) -> list[RoleColumns]:
    return [_columns(TOP, POSITIVE, best, torch.arange(len(best.keys))[:, None].expand(-1, best.keys.shape[1]))]


def near_misses(best: BestImages, answers: Answers, shown: Tensor) -> Tensor:
    """int64 [4, F], ranks of an end's near misses, -1 where there are fewer: of the images below the top set the
    highest that the model takes for none of the classes that the top set shows."""
    below = torch.arange(TOP_IMAGES, len(best.keys))
    places = best.places[below]  # [n, F]
    found = places != NOWHERE
    if answers.classes.shape[1]:
        taken = answers.classes[answers.rows(places.clamp(min=0)).clamp(max=len(answers.places) - 1), :PREDICTED]
        found &= ~(taken[..., None] == shown[None, :, None, :]).flatten(2).any(2)
    number = found.cumsum(0) - 1
    out = torch.full((NEAR_MISSES, places.shape[1]), -1)
    row, feature = (found & (number < NEAR_MISSES)).nonzero(as_tuple=True)
    out[number[row, feature], feature] = below[row]
    return out


def _columns(role: str, end: str, best: BestImages, ranks: Tensor, heat: bool = True) -> RoleColumns:
    """Exemplars at the given ranks [n, F] among the images kept, -1 for none."""
    ranks = ranks.clone()
    ranks[best.places.gather(0, ranks.clamp(min=0)) == NOWHERE] = -1
    feature, number = (ranks.T >= 0).nonzero(as_tuple=True)
    at = ranks[number, feature], feature
    carried = heat and best.heat.shape[0] > 0 and len(feature) > 0
    return RoleColumns(
        role, end, feature.numpy(), number.numpy(), best.places[at].numpy(), best.tokens[at].numpy(),
        best.activations[at].numpy(), best.heat[at].numpy() if carried else None,
        best.heat_scales[at].numpy() if carried else None,
    )  # fmt: skip


def _quantiles(block: Block) -> RoleColumns:
    """At each level the image nearest to it that no lower level has."""
    best, (features, levels) = block.quantile, block.levels.shape
    places = best.places.view(-1, features, levels)
    ranks = torch.full((levels, features), -1)
    chosen = torch.full((levels, features), NOWHERE)
    for level in range(levels):
        own = places[:, :, level]
        free = (own != NOWHERE) & ~(own[:, None] == chosen[None]).any(1)
        first = free.int().argmax(0)
        ranks[level] = torch.where(free.any(0), first, -1)
        chosen[level] = torch.where(free.any(0), own.gather(0, first[None])[0], NOWHERE)
    feature, level = (ranks.T >= 0).nonzero(as_tuple=True)
    at = ranks[level, feature], feature * levels + level
    return RoleColumns(
        QUANTILE, NEITHER, feature.numpy(), level.numpy(), best.places[at].numpy(), best.tokens[at].numpy(),
        best.activations[at].numpy(),
    )  # fmt: skip


def places_of(parts: list[RoleColumns]) -> NDArray[np.int64]:
    return np.unique(np.concatenate([p.place for p in parts]))
