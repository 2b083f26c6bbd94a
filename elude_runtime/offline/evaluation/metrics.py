"""How clear features are: pure functions of activations and embeddings, with the source of each formula."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EXEMPLARS = 9
QUANTILE = 0.98
_FLOATS = 8_000_000  # of embeddings held at once: 32 MB

Vectors = Callable[[Tensor, Tensor], Tensor]
"""(images int64 [...], tokens int64 [...]) -> unit embeddings [..., D]."""


def centred_units(embeddings: Tensor) -> Tensor:
    """Embeddings [N, D] less their mean over the images, each of unit length (0 where nothing is left)."""
    return torch.nn.functional.normalize(embeddings - embeddings.mean(0), dim=-1)


def monosemanticity(activations: Tensor, embeddings: Tensor) -> Tensor:
    """MS [F]: the mean cosine of all pairs of images, weighted by the product of their activations.

        MS = (|sum_n a_n e_n|^2 - sum_n a_n^2) / ((sum_n a_n)^2 - sum_n a_n^2)

    activations [N, F], scaled here to 0..1 over the images; embeddings [N, D], centred and of unit length (the length
    makes |e_n|^2 = 1, which the formula relies on). NaN where a feature is active on fewer than two images. Source:
    Pach et al. 2025 (arXiv 2504.02821), section 3; their embeddings are not centred, so that theirs are larger.
    """
    low, high = torch.aminmax(activations, dim=0)
    out = []
    for part, least, span in zip(*(x.split(4096, -1) for x in (activations, low, high - low)), strict=True):
        a = ((part - least) / span).nan_to_num(0.0).double()
        squares = a.square().sum(0)
        pairs = a.sum(0).square() - squares
        same = (a.T @ embeddings.double()).square().sum(1) - squares
        out.append(torch.where(pairs > 1e-9, same / pairs.clamp(min=1e-9), torch.nan))
    return torch.cat(out).float()


def upper_part(activations: Tensor, quantile: float = QUANTILE) -> Tensor:
    """What of activations [N, F] lies above their quantile over the images: MS of it asks about the top alone, so that
    sparse and dense features can be compared (design "Metrics")."""
    edge = torch.cat([part.quantile(quantile, dim=0) for part in activations.split(256, dim=1)])
    return (activations - edge).clamp(min=0)


def ranked_images(activations: Tensor, count: int) -> Tensor:
    """int64 [F, count]: the images at which every feature is most active, best first, equal ones in order.
    activations [N, F]."""
    parts = []
    for part in activations.T.split(1024):
        parts.append(part.sort(dim=1, descending=True, stable=True).indices[:, :count].clone())
    return torch.cat(parts)


def pairwise_cosines(vectors: Tensor) -> Tensor:
    """[F, k, k] of unit vectors [F, k, D]."""
    return vectors @ vectors.mT


def mean_pairwise_cosine(vectors: Tensor) -> Tensor:
    """img-k and tok-k [F]: the mean cosine of all k (k - 1) / 2 pairs of unit vectors [F, k, D] (design "Metrics")."""
    count = vectors.shape[-2]
    total = vectors.double().sum(-2).square().sum(-1) - vectors.double().square().sum((-1, -2))
    return (total / max(1, count * (count - 1))).float()


def subset_cosines(cosines: Tensor, chosen: Tensor) -> Tensor:
    """The mean pairwise cosine of subsets: cosines [F, k, k], chosen 0 or 1 [F, k, R] -> [F, R]; NaN below two."""
    mask = chosen.to(cosines.dtype)
    count = mask.sum(1)
    own = (cosines.diagonal(dim1=1, dim2=2)[..., None] * mask).sum(1)
    total = (mask * (cosines @ mask)).sum(1) - own
    return torch.where(count > 1, total / (count * (count - 1)).clamp(min=1), torch.nan)


def image_chance(embeddings: Tensor) -> float:
    """The mean cosine of all pairs of different images: what random exemplars come to. embeddings [N, D], unit."""
    return float(mean_pairwise_cosine(embeddings[None])[0])


def image_ceiling(embeddings: Tensor, k: int = EXEMPLARS, anchors: int = 1000, seed: int = 0) -> float:
    """What exemplars chosen by this encoder itself come to: the mean over images of the mean pairwise cosine of each
    image and its k - 1 nearest neighbours. anchors: at most so many images, drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(embeddings), generator=generator)[:anchors]
    k = min(k, len(embeddings))
    found = []
    for part in chosen.split(256):
        near = (embeddings[part] @ embeddings.T).topk(k, dim=1).indices
        found.append(mean_pairwise_cosine(embeddings[near]))
    return float(torch.cat(found).mean())


def token_ceiling(
    vectors: Vectors, images: int, tokens: int, k: int = EXEMPLARS, anchors: int = 200, seed: int = 0
) -> float:
    """The same of patches: a random patch and its nearest patch in each of the k - 1 images that have the nearest ones.
    Of many images, 2,000 at most are searched."""
    generator = torch.Generator().manual_seed(seed)
    searched = torch.randperm(images, generator=generator)[:2000]
    k = min(k, len(searched))
    anchor = searched[torch.randint(len(searched), (anchors,), generator=generator)]
    places = torch.randint(tokens, (anchors,), generator=generator)
    first = vectors(anchor, places)
    best = torch.full((anchors, len(searched)), -torch.inf)
    at = torch.zeros(anchors, len(searched), dtype=torch.int64)
    step = max(1, _FLOATS // (tokens * first.shape[1]))
    every = torch.arange(tokens)
    for start in range(0, len(searched), step):
        part = searched[start : start + step]
        near = vectors(part[:, None].expand(-1, tokens), every.expand(len(part), -1))
        cosine = torch.einsum("ad,ntd->ant", first, near)
        best[:, start : start + step], at[:, start : start + step] = cosine.max(-1)
    best[searched[None] == anchor[:, None]] = -torch.inf  # one patch an image
    near = best.topk(k - 1, dim=1).indices
    others = vectors(searched[near], at.gather(1, near))
    return float(mean_pairwise_cosine(torch.cat([first[:, None], others], 1)).mean())


def same_position_null(vectors: Vectors, tokens: Tensor, images: int, seed: int = 0) -> Tensor:
    """tok-k's null [F]: random images at the positions of a feature's own exemplars, tokens int64 [F, k]. What a
    feature that only knows a place in the image comes to."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.stack([torch.randperm(images, generator=generator)[: tokens.shape[1]] for _ in range(len(tokens))])
    step = max(1, _FLOATS // (1280 * tokens.shape[1]))
    parts = zip(drawn.split(step), tokens.split(step), strict=True)
    return torch.cat([mean_pairwise_cosine(vectors(image, token)) for image, token in parts])


def normalised(score: float, chance: float, ceiling: float) -> float:
    """(score - chance) / (ceiling - chance): 0 for random exemplars, 1 for the encoder's own neighbourhoods."""
    return (score - chance) / (ceiling - chance) if ceiling > chance else float("nan")


def flat_ends(activations: Tensor, part: float = 1 - QUANTILE) -> Tensor:
    """bool [F, 2] (positive, negative): ends that are none, since several and more than `part` of the tokens
    [S, F] share the extreme value: the zeros of a sparse latent, the clip of a saturated unit. Their exemplars would be
    arbitrary."""
    low, high = torch.aminmax(activations, dim=0)
    at = [(activations == edge).sum(0) > max(1.0, part * len(activations)) for edge in (high, low)]
    return torch.stack(at, 1)


def thresholds(activations: Tensor, quantile: float = QUANTILE) -> Tensor:
    """[F, 2]: the quantile of a token sample [S, F], and the one as far from the other end."""
    parts = [part.quantile(torch.tensor([quantile, 1 - quantile]), dim=0).T for part in activations.split(128, dim=1)]
    return torch.cat(parts)


def live_features(high: Tensor, low: Tensor, edges: Tensor) -> Tensor:
    """bool [F]: at least 10 held-out images with a token beyond the calibration tokens' 98th percentile (at the
    negative end: below the 2nd), at either end. With N < 500 images, 10 N / 500 of them, rounded up, at least 2.

    high, low [N, F]: every image's maximum and minimum; edges [F, 2] from `thresholds`.
    """
    needed = max(2, -(-10 * min(len(high), 500) // 500))
    beyond = torch.stack([(high > edges[:, 0]).sum(0), (low < edges[:, 1]).sum(0)])
    return beyond.amax(0) >= needed
