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

from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation.estimates import Estimate, number
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.tokens import TokenReader
from elude_runtime.offline.images import ImageSource, Progress

FRACTIONS = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
"""Of the features, in the order of their attributions."""
SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
DROP = 0.25  # of what the layer gives the target, value - baseline
NORM = 0.2  # of the centred output
_STEPS = 4
_LEAST_VALUE = 1e-3  # of the largest logit: below it the layer gives the target nothing to take


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
        """Means over images with bootstrap draws of the images, the same in every set."""
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


@dataclass(frozen=True, eq=False)
class _Image:
    """One image of a recorded pass. reads [T_p, m]; gradient [T_p, d]: of the target, averaged over the path from the
    baseline of all tokens; value, baseline: of the target, as it is and with this type's tokens at their baseline."""

    row: int
    target: Target
    reads: Tensor
    gradient: Tensor
    value: float
    baseline: float
    spread: float  # norm of the centred output


def measure_effects(
    model: EludeModel, reader: TokenReader, sets: Sequence[FeatureSet], means: Sequence[Tensor], source: ImageSource,
    report: Progress,
) -> list[Effects]:  # fmt: skip
    """Deletion, insertion and steering of every set on the images. means [F] of each set: activations' means over the
    calibration tokens. Images to whose target the layer gives nothing take no part."""
    found = [Effects(one.name, torch.zeros(len(one.share))) for one in sets]
    layer = reader.state.name
    for batch in source.numbered():
        if not len(batch.places):
            continue
        parameter = next(model.base.parameters())
        with torch.inference_mode(False):
            recording = model.record(batch.images.to(parameter.device, parameter.dtype), [layer])
            for image in _images(model, reader, recording):
                for one, mean, effects in zip(sets, means, found, strict=True):
                    _one_image(model, reader, recording, image, one, mean, effects)
        report(f"effects: {layer}", len(batch.places), source.count)
    return found


def _images(model: EludeModel, reader: TokenReader, recording: Recording) -> list[_Image]:
    """The images of a pass to whose target the layer gives something."""
    state = reader.state
    targets = [Target(int(logits.argmax())) for logits in recording.logits]
    questions = [Question(row, [target], _STEPS) for row, target in enumerate(targets)]
    with model.lock:
        tails = LayerTails(model.tails, recording, {state.name: state}, state.name, questions)
        gradients = tails.gradients()
    reads = torch.cat([part for _, part in reader.read(recording.x[state.name].detach())])
    found = []
    for row, target in enumerate(targets):
        logits = recording.logits[row : row + 1]
        y = state.linear.tokens(recording.y[state.name][row : row + 1].float())[0]
        centred = (y - state.baseline())[reader.span].cpu()
        without = target.value(_logits(model, reader, recording, row, [-centred])).tolist()
        value = float(target.value(logits)[0])
        baseline = value + without[1] - without[0]
        if value - baseline > _LEAST_VALUE * float(logits.float().abs().max()):
            gradient = gradients[row][0, reader.span].cpu()
            found.append(_Image(row, target, reads[row], gradient, value, baseline, float(centred.norm())))
    return found


def _one_image(
    model: EludeModel, reader: TokenReader, recording: Recording, image: _Image, one: FeatureSet, mean: Tensor,
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
    count = int((attribution[order].clamp(min=0).cumsum(0) < wanted).sum()) + 1
    change = -removed(one, image.reads, order[:count])
    norm = float(change.norm())
    if not norm > 0:
        effects.side.append(float("inf"))
        effects.per_norm.append(0.0)
        return
    scales = [*SCALES, NORM * image.spread / norm]
    logits = _logits(model, reader, recording, image.row, [s * change for s in scales])
    drop, side = _selectivity(logits, int(image.target.index or 0))
    reached = (drop[:-1] >= wanted).nonzero()
    effects.side.append(_at(drop[:-1], side[:-1], wanted, int(reached[0])) / wanted if len(reached) else float("inf"))
    effects.per_norm.append(float(drop[-1] / side[-1].clamp(min=1e-12)))


def _at(drop: Tensor, side: Tensor, wanted: float, first: int) -> float:
    """The side effect at the wanted drop: between the last scale below it (0 has none) and the first that reaches
    it."""
    before = (float(drop[first - 1]), float(side[first - 1])) if first else (0.0, 0.0)
    step = (wanted - before[0]) / max(1e-12, float(drop[first]) - before[0])
    return before[1] + step * (float(side[first]) - before[1])


def _selectivity(logits: Tensor, target: int) -> tuple[Tensor, Tensor]:
    """(drop of the target, mean |change| of the others) of each row [R - 1] against the first: centred logits."""
    centred = logits.float() - logits.float().mean(1, keepdim=True)
    change = (centred[1:] - centred[0]).cpu()
    others = torch.ones(change.shape[1], dtype=torch.bool)
    others[target] = False
    return -change[:, target], change[:, others].abs().mean(1)


def removed(one: FeatureSet, reads: Tensor, features: Tensor) -> Tensor:
    """[S, d]: what these features' parts of the layer's output are at tokens [S, m]; zero without features."""
    assert one.ablation is not None
    if not len(features):
        return one.ablation(reads, torch.tensor([0])) * 0
    return one.ablation(reads, features)


def attributions(one: FeatureSet, reads: Tensor, gradient: Tensor, mean: Tensor) -> Tensor:
    """[F]: gradient x part of the output, summed over tokens; gradient [T_p, d]. mean [F]: of the activations."""
    if one.write is not None:
        return ((one.activations(reads) - mean) * (gradient @ one.write.T)).sum(0)
    features = range(len(one.share))
    return torch.stack([(removed(one, reads, torch.tensor([f])) * gradient).sum() for f in features])


def covers_output(one: FeatureSet) -> bool:
    """Whether the parts of this set add up to (nearly) all of the layer's output: not those of some neurons only."""
    return float(one.share.sum()) > 0.4


def _targets(
    model: EludeModel, reader: TokenReader, recording: Recording, image: _Image, changes: Sequence[Tensor]
) -> Tensor:
    """The target [C] with each change [T_p, d] of the layer's output, on the scale of the recorded value."""
    logits = _logits(model, reader, recording, image.row, changes)
    values = image.target.value(logits).cpu()
    return values[1:] - values[0] + image.value


def _logits(
    model: EludeModel, reader: TokenReader, recording: Recording, row: int, changes: Sequence[Tensor]
) -> Tensor:
    """[C + 1, K]: the model's output with each change [T_p, d], the first with none."""
    state = reader.state
    y = recording.y[state.name][row : row + 1]
    edits = torch.zeros(len(changes) + 1, state.layout.total, state.linear.neurons)
    edits[1:, reader.span] = torch.stack(list(changes))
    with model.lock, torch.no_grad():
        return model.tails.run(
            recording, state.name, state.changed(y.expand(len(edits), *y.shape[1:]), edits.to(y.device)),
            torch.full((len(edits),), row, device=y.device),
        )  # fmt: skip
