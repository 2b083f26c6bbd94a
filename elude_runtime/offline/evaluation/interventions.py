"""What taking a feature set's parts out of a layer does to the model: deletion and insertion curves, and steering.

Of every image the target is its top logit less the mean logit. All changes are tail re-runs, each measured against a
null edit in the same pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation.estimates import Estimate, number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.images import layer_recordings
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

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Of the features, in the order of their attributions."""
DROP = 0.25  # of what the layer gives the target, value - baseline
NORM = 0.2  # of the centred output


@dataclass(eq=False)
class Effects:
    """One feature set on some images. deletion, insertion [images, FRACTIONS]: the part of value - baseline that is
    left with the first features taken out, or there with nothing but them; empty where the set's parts do not add up.

    side [images]: mean |change| of the other centred logits where the target has dropped by `DROP` of value - baseline,
    over that drop, infinite where it is never reached; per_norm [images]: the target's drop over that mean, with the
    change as large as `NORM` of the centred output. attribution [F]: |attribution| summed over the images.
    """

    name: str
    attribution: Tensor = field(default_factory=lambda: torch.zeros(0))
    deletion: list[list[float]] = field(default_factory=list)
    insertion: list[list[float]] = field(default_factory=list)
    side: list[float] = field(default_factory=list)
    per_norm: list[float] = field(default_factory=list)

    def areas(self) -> dict[str, np.ndarray]:
        """Of every image the area under its curve over the fraction of features, 0..1."""
        return {
            name: np.trapezoid(np.array(curve), FRACTIONS, axis=1)
            for name, curve in (("deletion", self.deletion), ("insertion", self.insertion))
            if curve
        }

    def figures(self, draws: int, seed: int) -> dict[str, Estimate]:
        """Medians over images with bootstrap draws of the images, the same in every set."""
        values = {f"{k}_area": v for k, v in self.areas().items()}
        values |= {"side_effect": np.array(self.side), "drop_per_side_effect": np.array(self.per_norm)}
        return {name: _median(v, draws, seed) for name, v in values.items()}

    def document(self, draws: int, seed: int) -> dict[str, object]:
        found: dict[str, object] = {k: v.document() for k, v in self.figures(draws, seed).items()}
        if self.deletion:
            for name, curve in (("deletion", self.deletion), ("insertion", self.insertion)):
                found[f"{name}_curve"] = [number(float(v)) for v in np.mean(curve, axis=0)]
        return found | {"images": len(self.side), "drop_not_reached": int(np.isinf(self.side).sum())}


def _median(values: np.ndarray, draws: int, seed: int) -> Estimate:
    """The median over images (ratios have heavy tails, and some are infinite) with its bootstrap draws."""
    if not len(values):
        return Estimate(float("nan"), np.full(draws, np.nan))
    picked = np.random.default_rng(seed).integers(len(values), size=(draws, len(values)))
    with np.errstate(invalid="ignore"):
        return Estimate(float(np.median(values)), np.median(values[picked], axis=1))


def measure_effects(
    model: EludeModel, reader: TokenReader, sets: Sequence[FeatureSet], means: Sequence[Tensor], source: ImageSource,
    report: Progress,
) -> list[Effects]:  # fmt: skip
    """Deletion, insertion and steering of every set on the images. means [F] of each set: activations' means over the
    calibration tokens. Images to whose target the layer gives nothing take no part."""
    found = [Effects(one.name, torch.zeros(len(one.share))) for one in sets]
    layer = reader.state.name
    with torch.inference_mode(False):
        for recording in layer_recordings(model, layer, source, report, f"effects: {layer}"):
            targets = [Target(int(logits.argmax())) for logits in recording.logits]
            for image in recorded_images(model, reader, recording, targets):
                for one, mean, effects in zip(sets, means, found, strict=True):
                    _one_image(model, reader, recording, image, one, mean, effects)
    return found


def _one_image(
    model: EludeModel, reader: TokenReader, recording: Recording, image: RecordedImage, one: FeatureSet, mean: Tensor,
    effects: Effects,
) -> None:  # fmt: skip
    attribution = attributions(one, image.reads, image.gradient, mean)
    effects.attribution += attribution.abs()
    order = attribution.argsort(descending=True, stable=True)
    whole = image.value - image.baseline
    if one.lossless and covers_output(one):
        changes = []
        for fraction in FRACTIONS:
            count = round(fraction * len(order))
            changes.append(-removed(one, image.reads, order[:count]))
            changes.append(-removed(one, image.reads, order[count:]))
        values = _targets(model, reader, recording, image, changes)
        left = ((values - image.baseline) / whole).tolist()
        effects.deletion.append(left[0::2])
        effects.insertion.append(left[1::2])
    # the fewest features whose attributions come to the drop that is asked for
    wanted = DROP * whole
    change = -removed(one, image.reads, fewest(attribution, wanted))
    norm = float(change.norm())
    if not norm > 0:
        effects.side.append(float("inf"))
        effects.per_norm.append(0.0)
        return
    scales = [*SCALES, NORM * image.spread / norm]
    logits = outputs_with(model, reader, recording, image.row, [s * change for s in scales])
    drop, side = _selectivity(logits, int(image.target.index or 0))
    effects.side.append(at_drop(drop[:-1], side[:-1], wanted) / wanted)
    effects.per_norm.append(float(drop[-1] / side[-1].clamp(min=1e-12)))


def _selectivity(logits: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """(drop of the target, mean |change| of the others) of each row [R - 1] against the first: centred logits."""
    centred = logits.float() - logits.float().mean(1, keepdim=True)
    change = (centred[1:] - centred[0]).cpu()
    others = torch.ones(change.shape[1], dtype=torch.bool)
    others[target] = False
    return -change[:, target], change[:, others].abs().mean(1)


def covers_output(one: FeatureSet) -> bool:
    """Whether the parts of this set add up to (nearly) all of the layer's output: not those of some neurons only."""
    return float(one.share.sum()) > 0.4


def _targets(
    model: EludeModel, reader: TokenReader, recording: Recording, image: RecordedImage, changes: Sequence[Tensor]
) -> Tensor:
    """The target [C] with each change [T_p, d] of the layer's output, on the scale of the recorded value."""
    logits = outputs_with(model, reader, recording, image.row, changes)
    values = image.target.value(logits).cpu()
    return values[1:] - values[0] + image.value
