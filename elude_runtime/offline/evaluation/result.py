"""What an evaluation found in one layer and token type: figures with intervals, and comparisons."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from elude_runtime.network.tokens import TYPE_NAMES
from elude_runtime.offline.evaluation.attribution_effects import EffectRow
from elude_runtime.offline.evaluation.class_groups import GroupImages
from elude_runtime.offline.evaluation.encoders import PIXELS
from elude_runtime.offline.evaluation.estimates import Estimate, number
from elude_runtime.offline.evaluation.group_steering import GroupSteering, steering_document
from elude_runtime.offline.evaluation.interventions import Effects
from elude_runtime.offline.evaluation.known_properties import KnownProperties
from elude_runtime.offline.evaluation.own_sets import OWN, RANDOM_CONCEPTS
from elude_runtime.offline.evaluation.scores import IMG, INTRUDER, TOK, Judge, SetScores

CLEARER, LESS, EVEN = "clearer", "less clear", "not told apart"


@dataclass(frozen=True, eq=False)
class Comparison:
    """The paired difference of one of the checkpoint's sets and another set, in one encoder's eyes; weighted over both
    ends. Clearer or less clear where its 95 % interval excludes zero."""

    own: str
    other: str
    encoder: str
    metric: str
    difference: Estimate
    ratio: float

    @property
    def verdict(self) -> str:
        low, high = self.difference.interval
        return CLEARER if low > 0 else LESS if high < 0 else EVEN

    def document(self) -> dict[str, object]:
        return {
            "set": self.own,
            "against": self.other,
            "encoder": self.encoder,
            "metric": self.metric,
            "difference": self.difference.document(),
            "ratio": number(self.ratio, 3),
            "verdict": self.verdict,
        }


@dataclass(eq=False)
class LayerResult:
    """One layer and token type. rest: part of the output's variance that no numbered concept, and that no numbered
    sub-unit carries; stability: beside another rewrite, where there is one; agreement: of attributions with true
    effects; steering: of each set, on the class groups; properties: how well known ones are told."""

    layer: str
    token_type: int
    calibration_tokens: int
    rest: dict[str, float]
    judges: list[Judge]
    sets: list[SetScores]
    effects: list[Effects] = field(default_factory=list)
    stability: dict[str, Any] = field(default_factory=dict)
    agreement: list[EffectRow] = field(default_factory=list)
    groups: list[GroupImages] = field(default_factory=list)
    steering: list[GroupSteering] = field(default_factory=list)
    properties: KnownProperties | None = None

    @property
    def tokens(self) -> str:
        return TYPE_NAMES[self.token_type]

    def named(self, name: str) -> SetScores | None:
        return next((s for s in self.sets if s.name == name), None)

    def comparisons(self) -> Iterator[Comparison]:
        """Each of the checkpoint's own sets against all others."""
        for own in filter(None, map(self.named, OWN)):
            for other in (s for s in self.sets if s is not own):
                for judge in self.judges:
                    ours, theirs = own.clarity[judge.name].averages, other.clarity[judge.name].averages
                    for metric in (m for m in (IMG, TOK, INTRUDER) if m in ours):
                        a, b = ours[metric]["weighted"], theirs[metric]["weighted"]
                        ratio = a.value / b.value if b.value > 0 else float("nan")
                        yield Comparison(own.name, other.name, judge.name, metric, a - b, ratio)

    def verdicts(self, own: str) -> dict[str, list[str]]:
        """{verdict: other sets}: by img9 and tok9 of all encoders but the pixels, where they agree; else not told
        apart. Intruder detection is compared, but has no say: it asks about the images of img9 once more."""
        found: dict[str, list[str]] = {CLEARER: [], EVEN: [], LESS: []}
        said: dict[str, set[str]] = {}
        trained = [j.name for j in self.judges if j.name != PIXELS] or [PIXELS]
        for one in self.comparisons():
            if one.own == own and one.encoder in trained and one.metric != INTRUDER:
                said.setdefault(one.other, set()).add(one.verdict)
        for other, verdicts in said.items():
            found[verdicts.pop() if len(verdicts) == 1 else EVEN].append(other)
        return found

    def by_attribution(self, effects: Effects) -> dict[str, dict[str, dict[str, float | None]]]:
        """{encoder: {metric: ...}} of a set that was taken out: its clarity weighted by share of |attribution|, and the
        share of |attribution| in features clearer (at their clearer end) than 95 % of the random concepts."""
        one, random = self.named(effects.name), self.named(RANDOM_CONCEPTS)
        if one is None or not effects.side:
            return {}
        share = effects.attribution / effects.attribution.sum()
        found: dict[str, dict[str, dict[str, float | None]]] = {}
        for judge, clarity in one.clarity.items():
            found[judge] = {}
            for metric, scores in clarity.features.items():
                mean, best = scores.nanmean(1), scores.nan_to_num(-1).amax(1)
                there = torch.isfinite(mean)
                weighted = float((share * mean.nan_to_num(0))[there].sum() / share[there].sum())
                entry = {"weighted_by_attribution": number(weighted)}
                if random is not None:
                    level = random.clarity[judge].features[metric].nan_to_num(-1).amax(1).quantile(0.95)
                    entry["attribution_above_random"] = number(float(share[best > level].sum()))
                found[judge][metric] = entry
        return found

    def document(self, draws: int, seed: int) -> dict[str, object]:
        return {
            "layer": self.layer,
            "tokens": self.tokens,
            "calibration_tokens": self.calibration_tokens,
            "rest_share": {k: number(v) for k, v in self.rest.items()},
            "encoders": {
                j.name: {m: {"chance": number(j.chance.get(m)), "ceiling": number(v)} for m, v in j.ceiling.items()}
                for j in self.judges
            },
            "sets": [s.document() for s in self.sets],
            "comparisons": [c.document() for c in self.comparisons()],
            "effects": {e.name: e.document(draws, seed) | {"clarity": self.by_attribution(e)} for e in self.effects},
            "attribution_against_effect": [row.document() for row in self.agreement],
            "class_groups": steering_document(self.groups, self.steering, draws, seed) if self.groups else None,
            "known_properties": self.properties and self.properties.document(),
            "stability": self.stability,
        }
