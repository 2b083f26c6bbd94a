"""Steering selectivity: what it costs the other classes to take a group of classes out of the model's answer.

Of every feature set those features are taken out whose attributions, summed over some images of the group, come to the
drop that is asked for; what that does is read on other images of the group (design "Metrics", Faithfulness).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation.class_groups import ClassGroup, GroupImages
from elude_runtime.offline.evaluation.estimates import LEVEL, Estimate, number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.images import layer_recordings
from elude_runtime.offline.evaluation.interventions import NORM
from elude_runtime.offline.evaluation.own_sets import CONCEPTS
from elude_runtime.offline.evaluation.removal import (
    SCALES,
    RecordedImage,
    at_drop,
    attributions,
    fewest,
    outputs_with,
    recorded_images,
    removed,
)
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource, Progress

AT_DROP, AT_NORM = "side_effect_at_equal_drop", "side_effect_at_equal_norm"
FIGURES = (AT_DROP, AT_NORM)
DROP = 0.1
"""Of the group's target itself. What one layer gives the mean of a group can be nothing, or less, though it moves its
classes a lot."""
HALF = "hidden units"
"""The set whose side effects ours should halve; those of the others they should stay below."""
HOLDS, FAILS, OPEN = "holds", "does not hold", "not told"


@dataclass(eq=False)
class GroupSteering:
    """One feature set. taken: number of features taken out for each group; side: {figure: {group: [reported images]}},
    mean |change| of the other classes' centred logits per drop of the group's target: with the target down by `DROP` of
    itself (infinite where it never is), and with the change as large as `NORM` of the centred output
    (infinite where the target does not drop)."""

    name: str
    taken: dict[str, int] = field(default_factory=dict)
    side: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {figure: {} for figure in FIGURES})

    def estimate(self, figure: str, draws: int, seed: int, group: str | None = None) -> Estimate:
        """The median over a group's images, or over all groups' images, with bootstrap draws of the images within each
        group, the same for every set."""
        by_group = {g: np.array(v) for g, v in self.side[figure].items() if group in (None, g) and v}
        if not by_group:
            return Estimate(float("nan"), np.full(draws, np.nan))
        drawn = []
        for own, values in by_group.items():
            generator = np.random.default_rng([seed, list(self.side[figure]).index(own)])
            drawn.append(values[generator.integers(len(values), size=(draws, len(values)))])
        with np.errstate(invalid="ignore"):
            medians = np.median(np.concatenate(drawn, axis=1), axis=1)
            return Estimate(float(np.median(np.concatenate(list(by_group.values())))), medians)


@dataclass(frozen=True, eq=False)
class SideEffects:
    """Our side effect a beside another set's b. share: a / (a + b), which infinite ones have too (1/2 if both are), so
    that no draw is lost; bar: what a / b should be below; the verdict is open while the interval has it inside."""

    figure: str
    against: str
    share: Estimate
    bar: float

    @property
    def ratio(self) -> tuple[float, float, float]:
        """a / b and its 95 % interval, from the quantiles of the draws themselves: images are drawn with replacement,
        and a bounded share is not shifted. Infinite where only theirs reaches the drop."""
        low, high = np.quantile(self.share.draws, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
        value, low, high = (float(s / (1 - s)) if s < 1 else float("inf") for s in (self.share.value, low, high))
        return value, low, high

    @property
    def verdict(self) -> str:
        _, low, high = self.ratio
        return HOLDS if high < self.bar else FAILS if low > self.bar else OPEN

    def document(self) -> dict[str, object]:
        ratio = dict(zip(("value", "low", "high"), map(number, self.ratio), strict=True))
        return {
            "figure": self.figure, "set": CONCEPTS, "against": self.against, "ratio": ratio, "bar": self.bar,
            "verdict": self.verdict,
        }  # fmt: skip


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / (a + b) of side effects, each at least 0 or infinite."""
    with np.errstate(invalid="ignore"):
        finite = np.where(a + b > 0, a / (a + b), 0.5)
    return np.select([np.isinf(a) & np.isinf(b), np.isinf(a), np.isinf(b)], [0.5, 1.0, 0.0], finite)


def compare(sets: Sequence[GroupSteering], draws: int, seed: int) -> Iterator[SideEffects]:
    """Concepts against every other set, paired: both on the same draws of images."""
    own = next((s for s in sets if s.name == CONCEPTS), None)
    if own is None or not own.taken:
        return
    for other in (s for s in sets if s is not own):
        for figure in FIGURES:
            a, b = own.estimate(figure, draws, seed), other.estimate(figure, draws, seed)
            if np.isnan(a.value) or np.isnan(b.value):  # no image was reported
                continue
            share = Estimate(float(_share(np.array(a.value), np.array(b.value))), _share(a.draws, b.draws))
            yield SideEffects(figure, other.name, share, 0.5 if other.name == HALF else 1.0)


def steering_document(
    groups: Sequence[GroupImages], sets: Sequence[GroupSteering], draws: int, seed: int
) -> dict[str, object]:
    """What evaluation.json holds of one layer."""

    def figures(one: GroupSteering, group: str | None) -> dict[str, object]:
        found = {figure: one.estimate(figure, draws, seed, group).document() for figure in FIGURES}
        return found | ({} if group is None else {"features_taken": one.taken.get(group)})

    return {
        "drop": DROP,
        "norm": NORM,
        "groups": {
            g.group.name: {
                "classes": len(g.group.members), "choosing_images": len(g.choosing),
                "reported_images": len(sets[0].side[AT_DROP].get(g.group.name, [])) if sets else 0,
            }
            for g in groups
        },
        "sets": [
            {
                "name": one.name, "all": figures(one, None),
                "groups": {g: figures(one, g) for g in one.taken},
                "not_reached": sum(int(np.isinf(v).sum()) for v in one.side[AT_DROP].values()),
            }
            for one in sets
        ],
        "comparisons": [c.document() for c in compare(sets, draws, seed)],
    }  # fmt: skip


def steer_groups(
    model: EludeModel, reader: TokenReader, sets: Sequence[FeatureSet], means: Sequence[Tensor],
    groups: Sequence[GroupImages], source: ImageSource, report: Progress,
) -> list[GroupSteering]:  # fmt: skip
    """Every set on every group. means [F] of each set: activations' means over the calibration tokens. Images in which
    the group is not ahead of the others on average take no part, nor a group without an image left to choose on."""
    found = [GroupSteering(one.name) for one in sets]
    for own in groups:
        group, totals, wanted = own.group, [torch.zeros(len(one.share)) for one in sets], 0.0
        for _, image in _images(model, reader, group, source.at(own.choosing), report):
            wanted += DROP * image.value
            for one, mean, total in zip(sets, means, totals, strict=True):
                total += attributions(one, image.reads, image.gradient, mean)
        if not wanted > 0:
            continue
        chosen = [fewest(total, wanted) for total in totals]
        for result, features in zip(found, chosen, strict=True):
            result.taken[group.name] = len(features)
            for figure in FIGURES:
                result.side[figure][group.name] = []
        for recording, image in _images(model, reader, group, source.at(own.reporting), report):
            for one, features, result in zip(sets, chosen, found, strict=True):
                figures = _side_effects(model, reader, recording, image, group, removed(one, image.reads, features))
                for figure, value in zip(FIGURES, figures, strict=True):
                    result.side[figure][group.name].append(value)
    return found


def _images(
    model: EludeModel, reader: TokenReader, group: ClassGroup, source: ImageSource, report: Progress
) -> Iterator[tuple[Recording, RecordedImage]]:
    layer = reader.state.name
    for recording in layer_recordings(model, layer, source, report, f"steering {group.name}: {layer}"):
        with torch.inference_mode(False):
            found = recorded_images(model, reader, recording, [group.target] * len(recording.logits), every=True)
        yield from ((recording, image) for image in found if image.value > 0)


def _side_effects(
    model: EludeModel, reader: TokenReader, recording: Recording, image: RecordedImage, group: ClassGroup, part: Tensor
) -> tuple[float, float]:
    """Per drop of the target: at equal drop, at equal norm. part [T_p, d]: what is taken out."""
    norm = float(part.norm())
    if not norm > 0:
        return float("inf"), float("inf")
    scales = [*SCALES, NORM * image.spread / norm]
    drop, side = group.selectivity(outputs_with(model, reader, recording, image.row, [-s * part for s in scales]))
    wanted = DROP * image.value
    fallen = float(drop[-1])
    return at_drop(drop[:-1], side[:-1], wanted) / wanted, float(side[-1]) / fallen if fallen > 0 else float("inf")
