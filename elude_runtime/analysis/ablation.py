"""Ablation: the true effect of features at their calibration mean, alone and in pairs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elude_runtime.analysis.attribution import LayerExplanation
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.analysis.targets import Target
from elude_runtime.analysis.writes import share_subunit
from elude_runtime.errors import FeatureError
from elude_runtime.network.tail import Recording

if TYPE_CHECKING:
    from elude_runtime.analysis.model import EludeModel


@dataclass(frozen=True)
class PairEffect:
    """What ablating two features together does to a target, beside what each does alone."""

    features: tuple[Feature, Feature]
    effect: float
    alone: tuple[float, float]

    @property
    def interaction(self) -> float:
        """0 where the two do not depend on one another; with the sign of `effect` where each hides the other's
        absence."""
        return self.effect - sum(self.alone)


def pair_effects(
    model: EludeModel, recording: Recording, row: int, target: Target, features: Sequence[Feature]
) -> list[PairEffect]:
    """The effects of ablating every two of some features of one layer, for image `row` of a recorded pass.

    FeatureError when they are of several layers, or two of them share a sub-unit.
    """
    if len({f.layer for f in features}) > 1:
        raise FeatureError("Features of different layers are no pair; give features of one layer.")
    pairs = list(combinations(range(len(features)), 2))
    if not pairs:
        return []
    with model.lock, torch.inference_mode(False), torch.no_grad():
        state = model.states[features[0].layer]
        for i, j in pairs:
            if share_subunit(state, features[i], features[j]):
                raise FeatureError(f"{features[i]} and {features[j]} share a sub-unit; keep one of them.")
        tails = LayerTails(model.tails, recording, model.states, state.name, [Question(row, [target])])
        changes = [*((i,) for i in range(len(features))), *pairs]
        removed = [_removal(state, tails.x(0), [features[i] for i in chosen]) for chosen in changes]
        effects = tails.effects([removed])[0][0].tolist()
    alone, together = effects[: len(features)], effects[len(features) :]
    return [
        PairEffect((features[i], features[j]), effect, (alone[i], alone[j]))
        for (i, j), effect in zip(pairs, together, strict=True)
    ]


@dataclass(frozen=True)
class Effects:
    """What ablating each of some features of a layer does to one target; edit: of taking out what edits added to the
    layer's output, None where it was not edited."""

    features: Mapping[Feature, float]
    edit: float | None


def true_effects(tails: LayerTails, explained: Sequence[Sequence[LayerExplanation]]) -> list[list[Effects]]:
    """Of the features that explanations list, a question and target each. A feature listed for several targets is
    ablated once."""
    state = tails.state
    features = [list(dict.fromkeys(f.feature for e in own for f in e.features)) for own in explained]
    changes: list[list[Callable[[], Tensor]]] = []
    for i, own in enumerate(features):
        changes.append([_removal(state, tails.x(i), [f]) for f in own])
        edit = tails.questions[i].change.get(state.name)
        if edit is not None:
            changes[i].append(partial(torch.neg, edit[None]))
    return [
        [
            Effects(dict(zip(own, row, strict=False)), row[-1] if len(row) > len(own) else None)
            for row in effects.tolist()
        ]
        for own, effects in zip(features, tails.effects(changes), strict=True)
    ]


def by_effect(explained: LayerExplanation, effects: Effects, sign: str) -> LayerExplanation:
    """The explanation with minus the true effect as attribution, largest first; those left out whose effect turns out
    to have the other sign than asked for. It does not add up: only the listed features were measured."""
    wanted = {"both": (-1, 0, 1), "positive": (1,), "negative": (-1,)}[sign]
    listed = []
    for f in explained.features:
        effect = effects.features[f.feature]
        if (effect < 0) - (effect > 0) in wanted:
            listed.append(replace(f, attribution=-effect, effect=effect, ablation_error=0.0))
    listed.sort(key=lambda f: -abs(f.attribution))
    edited = None if effects.edit is None else -effects.edit
    return replace(explained, completeness_error=None, features=listed, edit_attribution=edited)


def with_effects(explained: LayerExplanation, effects: Effects) -> LayerExplanation:
    """The explanation with the true effect of every listed feature beside its attribution."""
    listed = []
    for f in explained.features:
        effect = effects.features[f.feature]
        listed.append(replace(f, effect=effect, ablation_error=f.attribution + effect))
    return replace(explained, features=listed)


def _removal(state: SplitState, x: Tensor, features: Sequence[Feature]) -> Callable[[], Tensor]:
    """Makes the change [1, T, d] of the layer's output that puts features at their calibration mean."""
    return lambda: -sum((state.write(x, f) for f in features[1:]), state.write(x, features[0]))
