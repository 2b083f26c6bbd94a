"""Intruder detection: whether an encoder names the one image that does not belong to four exemplars of a feature.

The task that people are given (Chang et al. 2009; of a network's features Klein et al. 2023, arXiv 2307.05471, ask a
like one), put to an encoder: of four of a feature's most active images and one that it is not active on, the odd one
out is the one with the lowest mean cosine to the other four. Drawn at random it would be found once in five.
"""

from __future__ import annotations

from itertools import combinations

import torch
from torch import Tensor

from elude_runtime.offline.evaluation.metrics import EXEMPLARS

SHOWN = 4  # exemplars beside the intruder
CHANCE = 1 / (SHOWN + 1)
CANDIDATES = 12  # images of an end's lower half from which its intruders come
_OF_ALL = 40  # draws a feature's end, among all images
_TRIALS, _LEAST, _MOST = 4000, 2, 16  # among each half: of all ends together, and of one at least and at most
_FLOATS = 2_000_000
_PAIRS = tuple(combinations(range(SHOWN), 2))
_SUBSETS = torch.tensor(list(combinations(range(EXEMPLARS), SHOWN)))


def far_images(activations: Tensor, ranked: int, seed: int, count: int = CANDIDATES) -> Tensor:
    """int64 [F, count]: images drawn at random from the lower half of every feature's ranking, none of them among its
    first `ranked`; an image may come twice. activations [N, F]. Of equal ones the later rank lower, as in
    `ranked_images`."""
    images = len(activations)
    first = min(max(-(-images // 2), ranked), images - 1)
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part in activations.T.split(1024):
        lower = part.sort(dim=1, descending=True, stable=True).indices[:, first:]
        parts.append(lower.gather(1, torch.randint(images - first, (len(part), count), generator=generator)))
    return torch.cat(parts) if parts else torch.empty(0, count, dtype=torch.int64)


def named(among: Tensor, apart: Tensor) -> Tensor:
    """bool [...]: whether the intruder has the lowest mean cosine to the other images, strictly. among [6, ...]: the
    cosines of the exemplars' pairs (0, 1), (0, 2), ... (2, 3); apart [4, ...]: of each of them with the intruder."""
    own = apart.clone()
    for cosine, (i, j) in zip(among, _PAIRS, strict=True):
        own[i] += cosine
        own[j] += cosine
    return apart.sum(0) < own.amin(0)


def intruder_scores(vectors: Tensor, ranked: Tensor, far: Tensor, halves: Tensor, ends: Tensor, seed: int) -> Tensor:
    """float32 [F, 2, draws + 1]: how often the intruder is named, first among all images, then among every half.

    vectors [N, D]: unit; ranked int64 [F, 2, K]: images of every end, best first; far int64 [F, 2, P] from
    `far_images`; halves bool [N, draws + 1]; ends bool [F, 2]. The exemplars are drawn from the best `EXEMPLARS` images
    of the half, the intruder from the far ones in it. NaN where an end is none, or a half has too few images for it.
    """
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((*ends.shape, halves.shape[1]), torch.nan)
    found = out.flatten(0, 1)
    chosen = ends.flatten().nonzero()[:, 0]
    best, other = ranked.flatten(0, 1)[chosen], far.flatten(0, 1)[chosen]
    # the average over a set's ends is what is reported: of many ends few draws each make it as sure as many of few
    a_half = min(_MOST, max(_LEAST, _TRIALS // max(1, len(chosen))))
    rows = halves.shape[1]
    step = max(1, _FLOATS // max(ranked.shape[2] * max(rows, vectors.shape[1]), 10 * rows * a_half))
    for start in range(0, len(chosen), step):
        part = slice(start, start + step)
        shown, intruders = vectors[best[part]], vectors[other[part]]
        cosines, apart = shown @ shown.mT, shown @ intruders.mT
        for columns, trials in ((slice(0, 1), _OF_ALL), (slice(1, None), a_half)):
            own, away = halves[:, columns][best[part]], halves[:, columns][other[part]]
            found[chosen[part], columns] = _accuracy(cosines, apart, own, away, trials, generator)
    return out


def _accuracy(
    cosines: Tensor, apart: Tensor, own: Tensor, away: Tensor, trials: int, generator: torch.Generator
) -> Tensor:
    """float32 [f, R] of `trials` draws each. cosines [f, K, K], apart [f, K, P]; own bool [f, K, R], away [f, P, R]:
    which of the images are in each half."""
    features, ranks, rows = own.shape
    candidates = away.sum(1)  # [f, R]
    usable = (own.sum(1) >= EXEMPLARS) & (candidates > 0)
    best, order = _first(own, EXEMPLARS), _first(away, away.shape[1])
    drawn = _SUBSETS[torch.randint(len(_SUBSETS), (features, trials, rows), generator=generator)]  # [f, trials, R, 4]
    number = (torch.rand(features, trials, rows, generator=generator) * candidates[:, None]).long()
    intruder = order.gather(1, number)
    four = [best.gather(1, place) for place in drawn.unbind(-1)]  # 4 x [f, trials, R]
    between = torch.stack([four[i] * ranks + four[j] for i, j in _PAIRS])
    across = torch.stack([one * apart.shape[2] + intruder for one in four])
    right = named(*(_read(*each) for each in ((cosines, between), (apart, across))))
    return right.float().mean(1).where(usable, torch.nan)


def _first(there: Tensor, count: int) -> Tensor:
    """int64 [f, count, R]: along dim 1 of a mask [f, K, R] the places of the first ones that are set; 0 beyond."""
    number = there.cumsum(1, dtype=torch.int16)
    index = torch.where(there & (number <= count), number - 1, count).long()
    places = torch.arange(there.shape[1])[:, None].expand_as(index)
    out = torch.zeros(len(there), count + 1, there.shape[2], dtype=torch.int64)
    return out.scatter_(1, index, places)[:, :count]


def _read(table: Tensor, index: Tensor) -> Tensor:
    """table [f, ...] read at flat places index [n, f, ...] of its own row."""
    flat = table.flatten(1)
    offset = torch.arange(len(flat)).view(1, -1, *[1] * (index.dim() - 2)) * flat.shape[1]
    return flat.reshape(-1)[(index + offset).flatten()].view_as(index)
