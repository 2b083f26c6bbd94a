"""What features of one layer and token type do to the model's answer: taken out, steered, beside their attributions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.offline.evaluation.attribution_effects import EffectRow, measure_agreement
from elude_runtime.offline.evaluation.class_groups import GroupImages
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.group_steering import GroupSteering, steer_groups
from elude_runtime.offline.evaluation.images import spread_places
from elude_runtime.offline.evaluation.interventions import Effects, measure_effects
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, RANDOM_CONCEPTS, random_state
from elude_runtime.offline.evaluation.phases import Phases
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource, Progress

_INTERVENED = ("hidden", "pca", "groups", "kmeans", "sae")


@dataclass(frozen=True)
class LayerEffects:
    """Nothing where the model has no classes, or no image is to be used."""

    taken_out: list[Effects] = field(default_factory=list)
    agreement: list[EffectRow] = field(default_factory=list)
    steering: list[GroupSteering] = field(default_factory=list)


def layer_effects(
    model: EludeModel, reader: TokenReader, sets: Sequence[FeatureSet], means: Sequence[Tensor], inputs: Tensor,
    scoring: ImageSource, places: Tensor, groups: Sequence[GroupImages], options: EvaluateOptions, phases: Phases,
    report: Progress,
) -> LayerEffects:  # fmt: skip
    """On some scoring images, spread over all of them, and on those of the class groups.

    means [F] of each set: activations' means over the calibration tokens; inputs [S, m]: what these read; places [N]:
    of the scoring images.
    """
    if not options.effect_images or not len(places) or model.manifest.output != "logits":
        return LayerEffects()
    state = reader.state
    wanted = [(one, mean) for one, mean in zip(sets, means, strict=True) if _intervened(one)]
    chosen, averages = [one for one, _ in wanted], [mean for _, mean in wanted]
    source = scoring.at(spread_places(places, options.effect_images))
    with phases("effects"):
        taken_out = measure_effects(model, reader, chosen, averages, source, report)
        random = random_state(state, reader.token_type, inputs, options.seed)
        agreement = measure_agreement(model, state.name, reader.token_type, random, source, options.seed, report)
    with phases("class groups"):
        steering = steer_groups(model, reader, chosen, averages, groups, scoring, report)
    return LayerEffects(taken_out, agreement, steering)


def _intervened(one: FeatureSet) -> bool:
    """Sets that are taken out of the layer and steered by: those that divide the whole layer, one SAE of each size."""
    if one.ablation is None:
        return False
    facts = one.facts
    if facts.get("baseline") == "sae":
        return (facts.get("kind"), facts.get("reads")) == ("TopK", "y")
    return one.name in (CONCEPTS, RANDOM_CONCEPTS) or facts.get("baseline") in _INTERVENED
