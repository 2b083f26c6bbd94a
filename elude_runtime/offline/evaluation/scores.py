"""The scores of one feature set: how clear its features are to each encoder, how many live, how many are the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elude_runtime.offline.evaluation import metrics
from elude_runtime.offline.evaluation.agreement import ConceptAuc, distinct_sets, near_duplicates
from elude_runtime.offline.evaluation.embeddings import Embeddings, TokenVectors
from elude_runtime.offline.evaluation.estimates import Estimate, FeatureDraws, number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.fidelity import TopKept
from elude_runtime.offline.evaluation.intruder import CHANCE, far_images, intruder_scores
from elude_runtime.offline.evaluation.own_sets import NEURON_OF, siblings
from elude_runtime.offline.evaluation.tokens import Peaks

IMG, TOK, MS, MS_TOP, INTRUDER = "img9", "tok9", "ms", "ms_top", "intruder"
ENDS = ("positive", "negative")
AVERAGES = ("weighted", "plain", *(f"{end}_{how}" for end in ENDS for how in ("weighted", "plain")))
"""`weighted` and `plain`: over both ends, by share of variance or all alike; the others of one end."""
_RANKED = 32  # images of a feature's end that random halves choose their exemplars from
_FLOATS = 8_000_000


@dataclass(frozen=True, eq=False)
class Judge:
    """One encoder on the scoring images and one layer's grid, with what random exemplars and its own neighbourhoods
    come to. tokens: None where the layer or the encoder has no grid."""

    name: str
    images: Tensor
    tokens: TokenVectors | None
    chance: dict[str, float]
    ceiling: dict[str, float]

    @classmethod
    def of(cls, embeddings: Embeddings, grid: tuple[int, int] | None, seed: int) -> Judge:
        vectors, tokens = embeddings.image_vectors(), embeddings.on(grid)
        chance, ceiling = {IMG: metrics.image_chance(vectors)}, {IMG: metrics.image_ceiling(vectors, seed=seed)}
        if tokens is not None:
            ceiling[TOK] = metrics.token_ceiling(tokens, len(vectors), tokens.tokens, seed=seed)
        return cls(embeddings.name, vectors, tokens, chance, ceiling)

    def vectors(self) -> dict[str, metrics.Vectors]:
        """What img9 and tok9 read."""
        found: dict[str, metrics.Vectors] = {IMG: lambda images, _: self.images[images]}
        return found | ({} if self.tokens is None else {TOK: self.tokens})


@dataclass(eq=False)
class Clarity:
    """One encoder's scores of one set. averages: {metric: {one of `AVERAGES`: figure}}; chance: of this set's own
    exemplars (for tok9 random images at their positions); features [F, 2]: img9 and tok9 of every feature and end."""

    averages: dict[str, dict[str, Estimate]]
    chance: dict[str, float]
    ceiling: dict[str, float]
    features: dict[str, Tensor]

    def document(self) -> dict[str, object]:
        found: dict[str, object] = {}
        for metric, figures in self.averages.items():
            entry: dict[str, object] = {name: figure.document() for name, figure in figures.items()}
            if metric in self.ceiling:
                chance, ceiling = self.chance[metric], self.ceiling[metric]
                scaled = metrics.normalised(figures["weighted"].value, chance, ceiling)
                entry |= {"chance": number(chance), "ceiling": number(ceiling), "normalised": number(scaled)}
            elif metric in self.chance:
                entry["chance"] = number(self.chance[metric])
            found[metric] = entry
        return found


@dataclass(eq=False)
class SetScores:
    """One feature set with everything measured of it. ends: bool [F, 2], which ends it has at all; top1_kept: with its
    reconstruction in place, where it has one."""

    set: FeatureSet
    ends: Tensor
    live: Tensor
    duplicates: Tensor
    distinct: float
    auc: dict[str, ConceptAuc] = field(default_factory=dict)
    clarity: dict[str, Clarity] = field(default_factory=dict)
    top1_kept: TopKept | None = None

    @property
    def name(self) -> str:
        return self.set.name

    def document(self) -> dict[str, object]:
        features = len(self.set.share)
        facts = {k: _plain(v) for k, v in self.set.facts.items() if k not in (NEURON_OF, "sizes")}
        return {
            "name": self.name,
            "features": features,
            "lossless": self.set.lossless,
            "share_of_variance": number(float(self.set.share.sum())),
            "live": number(float(self.live.float().mean())),
            "near_duplicates": number(float(self.duplicates.float().mean())),
            "distinct_exemplar_sets": number(self.distinct),
            "one_sided": int((self.ends.sum(1) == 1).sum()),
            "without_an_end": int((~self.ends).all(1).sum()),
            "top1_kept": None if self.top1_kept is None else self.top1_kept.document(),
            "facts": facts,
            "auc": {name: {k: number(v) for k, v in vars(one).items()} for name, one in self.auc.items()},
            "clarity": {name: one.document() for name, one in self.clarity.items()},
        }


def _plain(value: object) -> object:
    """What JSON can hold of a fact."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(v) for v in value]
    return value if isinstance(value, str | int | bool | None) else str(value)


def score_set(
    one: FeatureSet, peaks: Peaks, calibration: Tensor, held_out: Tensor, judges: Sequence[Judge], halves: Tensor,
    seed: int, auc: Mapping[str, ConceptAuc] | None = None,
) -> SetScores:  # fmt: skip
    """calibration, held_out [S, F]: activations at sampled tokens of the calibration and of the scoring images; halves
    bool [N, draws + 1] from `image_halves`; auc: how well the best feature tells each known property."""
    ends = ~metrics.flat_ends(calibration)
    live = metrics.live_features(peaks.high, peaks.low, metrics.thresholds(calibration))
    features, draws = len(one.share), halves.shape[1] - 1
    values, tokens = peaks.ends()
    ranked = torch.stack([metrics.ranked_images(v, min(_RANKED, len(v))) for v in values], 1)  # [F, 2, K]
    at = torch.stack([t.T.gather(1, ranked[:, e]) for e, t in enumerate(tokens)], 1)
    far = torch.stack([far_images(v, ranked.shape[2], seed + e) for e, v in enumerate(values)], 1)
    best = ranked[:, :, : metrics.EXEMPLARS]
    distinct = distinct_sets(best[ends]) / max(1, int(ends.sum()))
    found = SetScores(one, ends, live, near_duplicates(held_out), distinct, dict(auc or {}))
    drawn = FeatureDraws.of(one.name, features, draws, seed, siblings(one))
    weight = _weights(one.share, ends)
    for judge, scores in zip(judges, _exemplar_scores([j.vectors() for j in judges], ranked, at, halves), strict=True):
        chance = {**judge.chance, INTRUDER: CHANCE}
        if judge.tokens is not None:
            positions = at[:, :, : metrics.EXEMPLARS]
            null = [metrics.same_position_null(judge.tokens, positions[:, e], len(halves), seed) for e in range(2)]
            chance[TOK] = drawn.average(torch.stack(null, 1), weight["weighted"]).value
        plain = {
            MS: torch.stack([metrics.monosemanticity(v, judge.images) for v in values], 1),
            MS_TOP: torch.stack([metrics.monosemanticity(metrics.upper_part(v), judge.images) for v in values], 1),
            INTRUDER: intruder_scores(judge.images, ranked, far, halves, ends, seed),
        }
        averages = {
            metric: {name: drawn.average(score, weight[name]) for name in AVERAGES}
            for metric, score in (*scores.items(), *plain.items())
        }
        features_scores = {metric: score[..., 0].where(ends, torch.nan) for metric, score in scores.items()}
        found.clarity[judge.name] = Clarity(averages, chance, judge.ceiling, features_scores)
    return found


def _weights(share: Tensor, ends: Tensor) -> dict[str, Tensor]:
    """[F, 2] for each of `AVERAGES`: a feature's share of variance is divided among the ends that it has."""
    there = ends.float()
    both = {"plain": there, "weighted": share.clamp(min=0)[:, None] * there / there.sum(1, keepdim=True).clamp(min=1)}
    found = dict(both)
    for e, end in enumerate(ENDS):
        only = torch.zeros(2)
        only[e] = 1
        found |= {f"{end}_{how}": weight * only for how, weight in both.items()}
    return found


def _exemplar_scores(
    judges: Sequence[Mapping[str, metrics.Vectors]], ranked: Tensor, tokens: Tensor, halves: Tensor
) -> list[dict[str, Tensor]]:
    """float32 [F, 2, draws + 1] of each of the judges' vectors: the mean pairwise cosine of the best `EXEMPLARS` images
    of every end, first among all images, then among every half. ranked, tokens [F, 2, K]."""
    count, rows = ranked.shape[2], halves.shape[1]
    images, places = ranked.flatten(0, 1), tokens.flatten(0, 1)
    out = [{metric: torch.empty(*ranked.shape[:2], rows) for metric in vectors} for vectors in judges]
    step = max(1, _FLOATS // (count * max(rows, 1280)))
    for start in range(0, len(images), step):
        part = slice(start, start + step)
        kept = halves[images[part]]  # [f, K, R]
        mask = (kept & (kept.cumsum(1, dtype=torch.int32) <= metrics.EXEMPLARS)).float()
        for vectors, found in zip(judges, out, strict=True):
            for metric, read in vectors.items():
                cosines = metrics.pairwise_cosines(read(images[part], places[part]))
                found[metric].flatten(0, 1)[part] = metrics.subset_cosines(cosines, mask)
    return out
