"""Known properties of images: how well the best feature of each kind tells them, and by how much ours differ.

The feature and its end are chosen on half of the images and read on the others (design "Metrics", Concept AUC). The
best of two sets together has more to choose from than the best of one, so that it is compared with the best of equally
many random features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elude_runtime.offline.evaluation.agreement import ConceptAuc, concept_auc
from elude_runtime.offline.evaluation.estimates import number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, OWN, RANDOM_CONCEPTS, RANDOM_SUBUNITS, SUBUNITS
from elude_runtime.offline.evaluation.tokens import Peaks

OURS, RANDOM, HIDDEN, SPARSE = "concept or sub-unit", "random concept or sub-unit", "hidden unit", "SAE latent"
_PAIRS = 16_000_000  # of images, compared at once
ABOVE, BELOW, EVEN = "above by two standard errors", "below by two standard errors", "not told apart"


def choosing_half(images: int, seed: int) -> Tensor:
    """bool [N]: the images that choose features, drawn at random: files often come in the order of their classes."""
    order = torch.randperm(images, generator=torch.Generator().manual_seed(seed))
    chosen = torch.zeros(images, dtype=torch.bool)
    chosen[order[: (images + 1) // 2]] = True
    return chosen


def property_auc(
    peaks: Peaks, truth: Mapping[str, Tensor], choosing: Tensor, features: int | None = None
) -> dict[str, ConceptAuc]:
    """Of every property, bool [N], the best of a set's (first) features."""
    high, low = peaks.high[:, :features], peaks.low[:, :features]
    if not truth:
        return {}
    found = concept_auc(high, low, torch.stack(list(truth.values())), choosing)
    return dict(zip(truth, found, strict=True))


@dataclass(frozen=True, eq=False)
class Contender:
    """The best features of one kind. features: of how many; values {property: [R]}: of the best one on the reporting
    images, its end upwards; reported {property: AUC on these}; sets: the names of those that were chosen from."""

    name: str
    sets: tuple[str, ...]
    features: int
    reported: dict[str, float]
    values: dict[str, np.ndarray]

    @property
    def mean(self) -> float:
        return float(np.nanmean(list(self.reported.values())))


@dataclass(frozen=True)
class Difference:
    """Mean over properties of AUC by one kind's best feature less AUC by another's. standard_error: of draws of images
    and properties together, the same for both kinds."""

    one: str
    other: str
    mean: float
    standard_error: float

    @property
    def verdict(self) -> str:
        edge = 2 * self.standard_error
        return ABOVE if self.mean > edge else BELOW if self.mean < -edge else EVEN


@dataclass(eq=False)
class KnownProperties:
    """means {set: mean reported AUC over properties}; contenders: the kinds that are compared."""

    means: dict[str, float]
    contenders: dict[str, Contender]
    differences: list[Difference] = field(default_factory=list)

    def document(self) -> dict[str, object]:
        return {
            "mean_auc": {name: number(mean) for name, mean in self.means.items()},
            "best": {
                c.name: {"mean_auc": number(c.mean), "features": c.features, "sets": list(c.sets)}
                for c in self.contenders.values()
            },
            "differences": [
                {
                    "best": d.one, "against": d.other, "mean": number(d.mean),
                    "standard_error": number(d.standard_error), "verdict": d.verdict,
                }
                for d in self.differences
            ],
        }  # fmt: skip


def known_properties(
    sets: Sequence[FeatureSet], peaks: Sequence[Peaks], found: Sequence[Mapping[str, ConceptAuc]],
    truth: Mapping[str, Tensor], choosing: Tensor, draws: int, seed: int,
) -> KnownProperties:  # fmt: skip
    """found: `property_auc` of every set, with all of its features."""
    means = {
        one.name: float(np.nanmean([a.reported for a in aucs.values()])) for one, aucs in zip(sets, found, strict=True)
    }
    named = {one.name: (one, p, a) for one, p, a in zip(sets, peaks, found, strict=True)}
    contenders = {c.name: c for c in _contenders(named, means, truth, choosing)}
    marks = {name: has[~choosing].numpy() for name, has in truth.items()}
    drawn = _Draws(marks, draws, seed)
    auc = {name: drawn.auc(c.values) for name, c in contenders.items()}
    differences = []
    for one in (n for n in (OURS, *OWN) if n in contenders):
        for other in (n for n in (HIDDEN, SPARSE, RANDOM) if n in contenders):
            mean = contenders[one].mean - contenders[other].mean
            differences.append(Difference(one, other, mean, drawn.error(auc[one] - auc[other])))
    return KnownProperties(means, contenders, differences)


_Named = Mapping[str, tuple[FeatureSet, Peaks, Mapping[str, ConceptAuc]]]


def _contenders(
    named: _Named, means: Mapping[str, float], truth: Mapping[str, Tensor], choosing: Tensor
) -> Iterator[Contender]:
    """What there is of: concepts, sub-units, both, as many random ones, hidden units, and of the SAEs the one whose
    latents do best on the reporting images, which no other kind is granted."""
    random = {CONCEPTS: RANDOM_CONCEPTS, SUBUNITS: RANDOM_SUBUNITS}
    own = [n for n in OWN if n in named and random[n] in named]
    # a random sub-unit that never varies is left out of its set: then ours is cut to as many
    count = {n: min(len(named[m][0].share) for m in (n, random[n])) for n in own}
    for name in (n for n in OWN if n in named):
        yield _best(name, [name], named, truth, choosing)
    if own:
        yield _best(OURS, own, named, truth, choosing, [count[n] for n in own])
        yield _best(RANDOM, [random[n] for n in own], named, truth, choosing, [count[n] for n in own])
    if "hidden units" in named:
        yield _best(HIDDEN, ["hidden units"], named, truth, choosing)
    sparse = [n for n, (one, *_) in named.items() if one.facts.get("baseline") == "sae"]
    if sparse:
        yield _best(SPARSE, [max(sparse, key=means.__getitem__)], named, truth, choosing)


def _best(
    name: str, sets: Sequence[str], named: _Named, truth: Mapping[str, Tensor], choosing: Tensor,
    counts: Sequence[int] | None = None,
) -> Contender:  # fmt: skip
    """The best feature of some sets, or of the first `counts` features of each, by the choosing images."""
    sizes = [len(named[s][0].share) for s in sets]
    counts = sizes if counts is None else list(counts)
    aucs = [
        named[s][2] if count == size else property_auc(named[s][1], truth, choosing, count)
        for s, size, count in zip(sets, sizes, counts, strict=True)
    ]
    reported, values = {}, {}
    for prop in truth:
        owner, best = max(zip(sets, (a[prop] for a in aucs), strict=True), key=lambda pair: _known(pair[1].chosen))
        peaks = named[owner][1]
        side = peaks.high if best.sign > 0 else -peaks.low
        reported[prop], values[prop] = best.reported, side[~choosing, best.feature].numpy()
    return Contender(name, tuple(sets), sum(counts), reported, values)


def _known(value: float) -> float:
    return value if value == value else -1.0


class _Draws:
    """Draws of the reporting images, and of the properties, with replacement."""

    def __init__(self, marks: Mapping[str, np.ndarray], draws: int, seed: int) -> None:
        """marks {property: bool [R]}"""
        generator = np.random.default_rng(seed)
        images, self.marks = len(next(iter(marks.values()))), marks
        self.counts = generator.multinomial(images, np.full(images, 1 / images), draws).astype(np.float32)
        self.properties = generator.integers(len(marks), size=(draws, len(marks)))

    def auc(self, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """[draws, P]: AUC of every property's values [R] in every draw; NaN where it has one kind of image alone."""
        found = []
        for name, marks in self.marks.items():
            high, low = values[name][marks][:, None], values[name][~marks][None]
            having, lacking = self.counts[:, marks], self.counts[:, ~marks]
            won = np.zeros(len(having))
            step = max(1, _PAIRS // max(1, low.shape[1]))
            for start in range(0, len(high), step):
                part = high[start : start + step]
                wins = (part > low) + np.float32(0.5) * (part == low)
                won += (having[:, start : start + step] @ wins * lacking).sum(1)
            with np.errstate(invalid="ignore"):
                found.append(won / (having.sum(1) * lacking.sum(1)))
        return np.stack(found, 1)

    def error(self, differences: np.ndarray) -> float:
        """The standard deviation over draws of the mean over properties of [draws, P]."""
        return float(np.nanstd(np.nanmean(np.take_along_axis(differences, self.properties, 1), 1), ddof=1))
