"""Which classes a feature raises and lowers: the measured change of the model's answer when it is more active.

In a class-token model what a patch token carries reaches the answer only through later attention, so the effect is
that of the whole network after the layer, by tails, on a few images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tail import Recording
from elude_runtime.offline.catalogue.layer_pass import LayerPass, TypeFeatures
from elude_runtime.offline.image_files import spread
from elude_runtime.offline.images import ImageSource, Progress
from elude_runtime.offline.resume import Resume

LISTED = 5  # classes of each direction
_STATE = "effects"
_IMAGES = 8  # of one tail


@dataclass(frozen=True, eq=False)
class Directions:
    """What the features of a layer and token type add to its output when they rise, each on all tokens of its type:
    change float32 [D, d]; source int64 [F]: of each feature the row; factor [F]: its own change over the row's. All
    sub-units of a neuron write to the same output, so they share a row, and each has its part of what that does."""

    token_type: int
    change: Tensor
    source: Tensor
    factor: Tensor


def directions(state: SplitState, own: TypeFeatures) -> Directions:
    """Rows for the concepts (every member moved, by its sign, by one standard deviation of the concept's activation, in
    its own standard deviations), then for the neurons with a sub-unit among the features (risen by the root mean square
    of their sub-units' standard deviations)."""
    neurons = torch.tensor([-1 if f.neuron is None else f.neuron for f in own.features], dtype=torch.int64)
    concepts = int((neurons < 0).sum())
    std = own.std
    change = torch.zeros(concepts, state.linear.neurons)
    for row, feature in enumerate(own.features[:concepts]):
        write = state.feature_write(feature)
        change[row, write.neurons.cpu()] = write.rise.cpu() * std[row]
    used, which = neurons[concepts:].unique(return_inverse=True)
    count = torch.bincount(which, minlength=len(used))
    square = torch.zeros(len(used)).index_add_(0, which, std[concepts:].square())
    step = (square / count).sqrt()
    of_neurons = torch.zeros(len(used), state.linear.neurons)
    of_neurons[torch.arange(len(used)), used] = step
    source = torch.cat([torch.arange(concepts), concepts + which])
    factor = torch.cat([torch.ones(concepts), std[concepts:] / step[which]])
    return Directions(own.token_type, torch.cat([change, of_neurons]), source, factor)


@dataclass(frozen=True, eq=False)
class ClassEffects:
    """Of each of F features: classes int64 [F, n] that it raises most and effects float32 [F, n], largest first, and
    the same of those it lowers; effects of 0 mean that there is none."""

    raised: Tensor
    raises: Tensor
    lowered: Tensor
    lowers: Tensor


def measure_effects(
    model: EludeModel,
    layers: Mapping[str, LayerPass],
    source: ImageSource,
    count: int,
    resume: Resume,
    report: Progress,
) -> dict[str, list[ClassEffects | None]]:
    """Of each layer's token types, the effects on at most `count` images spread over the source. None for a model
    without classes, with `count` 0, and where none of these images can be read."""
    if model.manifest.output != "logits" or not count:
        return {name: [None] * len(one.types) for name, one in layers.items()}
    sums = {name: [_Sums(one.split, directions(one.split, t.own)) for t in one.types] for name, one in layers.items()}
    every = [one for of_layer in sums.values() for one in of_layer]
    passes = [(one, number) for one in every for number in range(len(one.directions.change))]  # of some images
    few = source.at(torch.from_numpy(spread(source.count or 0, count)))
    few.batch_size = _IMAGES
    done, images = 0, 0
    if kept := resume.load(_STATE):
        done, images = kept["done"], kept["images"]
        for one, total in zip(every, kept["totals"], strict=True):
            one.total = total
    report("classes", done, len(passes) * -(-(few.count or 0) // _IMAGES))
    begun, skip = divmod(done, max(1, len(passes)))
    for batch in few.numbered(begun):
        if len(batch.places):
            images += 0 if skip else len(batch.places)  # those of a pass that was cut short are counted
            recording = model.record(batch.images.to(next(model.base.parameters())), list(layers))
            for one, number in passes[skip:]:
                one.add(model, recording, number)
                done += 1
                report("classes", 1, None)
                if resume.due():
                    totals = [one.total for one in every]
                    resume.save(_STATE, {"done": done, "images": images, "totals": totals})
        done, skip = (batch.number + 1) * len(passes), 0
    return {name: [one.classes(images) for one in of_layer] for name, of_layer in sums.items()}


class _Sums:
    """What each direction of a token type did to the centred logits, summed over images: total [D, K]."""

    def __init__(self, state: SplitState, own: Directions) -> None:
        self.state, self.directions = state, own
        self.total = torch.zeros(len(own.change), 0)

    @torch.no_grad()
    def add(self, model: EludeModel, recording: Recording, number: int) -> None:
        """One direction on all images of a recorded pass. The tail has its shape, so it is the null edit."""
        state, y = self.state, recording.y[self.state.name]
        change = torch.zeros(1, state.layout.total, state.linear.neurons, device=y.device)
        change[:, state.layout.slices[self.directions.token_type]] = self.directions.change[number].to(y.device)
        rows = torch.arange(len(y), device=y.device)
        with model.lock:
            out = model.tails.run(recording, state.name, state.changed(y, change), rows)
        moved = out.float() - recording.logits.float()
        if not self.total.shape[1]:
            self.total = torch.zeros(len(self.total), moved.shape[1])
        self.total[number] += (moved - moved.mean(1, keepdim=True)).sum(0).cpu()

    def classes(self, images: int) -> ClassEffects | None:
        if not images:
            return None
        mean = self.total / images
        few = min(LISTED, mean.shape[1])
        source, factor = self.directions.source, self.directions.factor[:, None]
        raised, lowered = mean.topk(few, dim=1), (-mean).topk(few, dim=1)
        return ClassEffects(
            raised.indices[source],
            raised.values[source].clamp(min=0) * factor,
            lowered.indices[source],
            -lowered.values[source].clamp(min=0) * factor,
        )
