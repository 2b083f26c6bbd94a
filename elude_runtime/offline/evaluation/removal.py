"""Taking parts out of a layer's output: images of a recorded pass with their gradients, and the model's output with
changes of the layer's. All changes are tail re-runs, each beside a null edit in the same pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.layer_tails import LayerTails, Question
from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.targets import Target
from elude_runtime.network.tail import Recording
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.tokens import TokenReader

SCALES = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0)
"""Of a change, at which its effect is read."""
_STEPS = 4
_LEAST_VALUE = 1e-3  # of the largest logit: below it the layer gives the target nothing to take


@dataclass(frozen=True, eq=False)
class RecordedImage:
    """One image of a recorded pass. reads [T_p, m]; gradient [T_p, d]: of the target, averaged over the path from the
    baseline of all tokens; value, baseline: of the target, as it is and with this type's tokens at their baseline."""

    row: int
    target: Target
    reads: Tensor
    gradient: Tensor
    value: float
    baseline: float
    spread: float  # norm of the centred output


def recorded_images(
    model: EludeModel, reader: TokenReader, recording: Recording, targets: Sequence[Target], *, every: bool = False
) -> list[RecordedImage]:
    """The images of a pass, with one target an image, to whose target the layer gives something; or every one."""
    state = reader.state
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
        without = target.value(outputs_with(model, reader, recording, row, [-centred])).tolist()
        value = float(target.value(logits)[0])
        baseline = value + without[1] - without[0]
        if every or value - baseline > _LEAST_VALUE * float(logits.float().abs().max()):
            gradient = gradients[row][0, reader.span].cpu()
            found.append(RecordedImage(row, target, reads[row], gradient, value, baseline, float(centred.norm())))
    return found


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
    assert one.attribution is not None
    return one.attribution(reads, gradient)


def fewest(attribution: Tensor, wanted: float) -> Tensor:
    """The fewest features, largest attribution [F] first, whose attributions come to a drop; where not even all
    positive ones do, those."""
    order = attribution.argsort(descending=True, stable=True)
    enough = int((attribution[order].clamp(min=0).cumsum(0) < wanted).sum()) + 1
    return order[: min(enough, max(1, int((attribution > 0).sum())))]


def at_drop(drop: Tensor, side: Tensor, wanted: float) -> float:
    """The side effect at the wanted drop of the target: between the last scale below it (0 has none) and the first that
    reaches it; infinite where none does. drop, side [scales]."""
    reached = (drop >= wanted).nonzero()
    if not len(reached):
        return float("inf")
    first = int(reached[0])
    before = (float(drop[first - 1]), float(side[first - 1])) if first else (0.0, 0.0)
    step = (wanted - before[0]) / max(1e-12, float(drop[first]) - before[0])
    return before[1] + step * (float(side[first]) - before[1])


def outputs_with(
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
