"""From the images kept of each feature to its exemplars, role by role."""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.checkpoint.exemplars import NEAR_MISS, NEGATIVE, NEITHER, POSITIVE, QUANTILE, RANDOM, TOP
from elude_runtime.offline.catalogue.answers import Answers
from elude_runtime.offline.catalogue.best_images import NOWHERE, BestImages
from elude_runtime.offline.catalogue.layer_pass import TOP as TOP_IMAGES
from elude_runtime.offline.catalogue.layer_pass import Block, Ends
from elude_runtime.offline.catalogue.tables import RoleColumns

NEAR_MISSES = 4
PREDICTED = 3  # first classes of an image that count as what the model takes it for


def block_roles(block: Block, answers: Answers, shown: dict[str, Tensor]) -> list[RoleColumns]:
    """All exemplars of a block's features. shown: of each end the classes int64 [F, n] that its label names, -1 where
    there is none."""
    parts = []
    for end, best in ((POSITIVE, block.positive), (NEGATIVE, block.negative)):
        sign = 1.0 if end == POSITIVE else -1.0
        parts.append(_top(end, best, sign))
        parts.append(_ranked(NEAR_MISS, end, best, near_misses(best, answers, shown[end]), sign))
    nearest, drawn = block.quantile, block.random
    places = drawn.places[:, None].expand_as(drawn.tokens)
    parts.append(_columns(QUANTILE, NEITHER, nearest.places, nearest.tokens, nearest.activations))
    parts.append(_columns(RANDOM, NEITHER, places, drawn.tokens, drawn.activations))
    return parts


def neuron_roles(ends: Ends) -> list[RoleColumns]:
    """The exemplars of neurons: the images at their two ends."""
    return [_top(POSITIVE, ends.positive, 1.0), _top(NEGATIVE, ends.negative, -1.0)]


def input_roles(best: BestImages) -> list[RoleColumns]:
    """The exemplars of input channels: what they are at their largest."""
    return [_top(POSITIVE, best, 1.0)]


def near_misses(best: BestImages, answers: Answers, shown: Tensor) -> Tensor:
    """int64 [4, F], ranks of an end's near misses, -1 where there are fewer: of the images just below the top set the
    highest of which the model's first three classes are none of those that the label names. So they speak against the
    label; where it names none, they are the next images."""
    below = torch.arange(TOP_IMAGES, len(best.keys))
    places = best.places[below]  # [n, F]
    found = places != NOWHERE
    if answers.classes.shape[1]:
        rows = answers.rows(places).clamp(max=len(answers.places) - 1)
        taken = answers.classes[rows, :PREDICTED]  # [n, F, 3]
        found &= ~(taken[..., None] == shown[:, None]).flatten(2).any(2)
    number = found.cumsum(0) - 1
    out = torch.full((NEAR_MISSES, places.shape[1]), -1)
    row, feature = (found & (number < NEAR_MISSES)).nonzero(as_tuple=True)
    out[number[row, feature], feature] = below[row]
    return out


def _top(end: str, best: BestImages, sign: float) -> RoleColumns:
    top = slice(0, TOP_IMAGES)
    carried = (best.heat, best.heat_scales) if len(best.heat) else None
    return _columns(TOP, end, best.places[top], best.tokens[top], sign * best.keys[top], carried)


def _ranked(role: str, end: str, best: BestImages, ranks: Tensor, sign: float) -> RoleColumns:
    """Exemplars at ranks [n, F] among the images kept, -1 for none."""
    at = ranks.clamp(min=0)
    places = torch.where(ranks >= 0, best.places.gather(0, at), NOWHERE)
    return _columns(role, end, places, best.tokens.gather(0, at), sign * best.keys.gather(0, at))


def _columns(
    role: str,
    end: str,
    places: Tensor,
    tokens: Tensor,
    activations: Tensor,
    heat: tuple[Tensor, Tensor] | None = None,
) -> RoleColumns:
    """places, tokens and activations [n, F]; heat: [n, F, T] and its scales [n, F]."""
    feature, rank = (places.T != NOWHERE).nonzero(as_tuple=True)
    at = rank, feature
    return RoleColumns(
        role,
        end,
        feature.numpy(),
        rank.numpy(),
        places[at].numpy(),
        tokens[at].numpy(),
        activations[at].numpy(),
        None if heat is None else heat[0][at].numpy(),
        None if heat is None else heat[1][at].numpy(),
    )
