"""What one pass over images keeps of a layer: the best images of features, neurons and inputs, and moments of inputs.

All activations of a feature are one linear map of what a token reads, so a stretch of features costs one product a
batch; what is kept is arrays over features, whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from elude_runtime.analysis.activations import Peaks
from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.network.tokens import POSITION
from elude_runtime.offline.catalogue.best_images import BestImages, DrawnImages, NearestImages
from elude_runtime.offline.catalogue.draws import Draws
from elude_runtime.offline.catalogue.moments import Moments
from elude_runtime.offline.collect import State, token_inputs
from elude_runtime.partition.sums import concept_readout, full_width, neuron_groups, subunit_weight

TOP = 9
CANDIDATES = 21  # of an end: the top set, and what near misses are taken from
RANDOM = 4
PEAK_IMAGES = 512  # drawn at random, whose peaks tell how a feature is distributed over images
LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)  # calibration quantiles
_READOUT_FLOATS = 16_000_000  # of a block
_VALUE_FLOATS = 8_000_000  # activations worked on at once


@dataclass(frozen=True, eq=False)
class TypeFeatures:
    """The features of one layer and token type that vary, in the table's order. rows int64 [F]: of each in the table;
    std [F]: of its activation; levels [F, 5]: its calibration quantiles at `LEVELS`; dead: how many never vary."""

    token_type: int
    features: list[Feature]
    rows: Tensor
    std: Tensor
    levels: Tensor
    dead: int


class Ends:
    """A stretch of linear read-outs of one token type, and the best images at both ends of each.

    readout float32 [F, C], offset [F]: the activations are readout @ reads + offset; keep: images of each end.
    """

    roles: tuple[str, ...] = ("positive", "negative")

    def __init__(self, readout: Tensor, offset: Tensor, keep: int, tokens: int, heat: bool) -> None:
        self.readout, self.offset = readout, offset
        self.positive, self.negative = (BestImages(len(readout), keep, TOP if heat else 0, tokens) for _ in range(2))

    def add(self, places: Tensor, reads: Tensor, draws: Draws, start: int) -> None:
        """reads [B, T_p, C] of the images at `places`; start: the first token's place on the axis T."""
        step = max(1, _VALUE_FLOATS // (len(self.readout) * reads.shape[1]))
        for own, part in zip(places.split(step), reads.split(step), strict=True):
            self._add(own, part, draws, start)

    def _add(self, places: Tensor, reads: Tensor, draws: Draws, start: int) -> tuple[Tensor, Peaks, Peaks]:
        """(products [B, F, T_p] without the offset, largest activations, smallest ones)."""
        raw = self.readout @ reads.transpose(1, 2)
        high, low = raw.max(2), raw.min(2)
        # adding rounds in the same way everywhere, so the largest stays the largest
        largest = Peaks((high.values + self.offset).cpu(), (high.indices + start).cpu())
        smallest = Peaks((low.values + self.offset).cpu(), (low.indices + start).cpu())

        def values(images: Tensor, features: Tensor) -> Tensor:
            images, features = images.to(raw.device), features.to(raw.device)
            return (raw[images, features] + self.offset[features, None]).cpu()

        self.positive.add(places, largest.values, largest.tokens, values)
        self.negative.add(places, -smallest.values, smallest.tokens, values)
        return raw, largest, smallest

    def state(self) -> State:
        return {name: getattr(self, name).state() for name in self.roles}

    def restore(self, state: State) -> None:
        for name, kept in state.items():
            getattr(self, name).restore(kept)


class Block(Ends):
    """A stretch of features; beside their ends, images near their quantiles, images drawn at random, and the peaks on
    many of these."""

    roles = ("positive", "negative", "quantile", "random")

    def __init__(self, readout: Tensor, offset: Tensor, levels: Tensor, tokens: int, heat: bool) -> None:
        super().__init__(readout, offset, CANDIDATES, tokens, heat)
        self.quantile = NearestImages(levels)
        self.random = DrawnImages(len(readout), RANDOM)
        self.peaks = DrawnImages(len(readout), PEAK_IMAGES)

    def _add(self, places: Tensor, reads: Tensor, draws: Draws, start: int) -> tuple[Tensor, Peaks, Peaks]:
        raw, largest, smallest = super()._add(places, reads, draws, start)
        priority, token = draws.of(places, reads.shape[1])
        upper = largest.values >= -smallest.values
        peaks = torch.where(upper, largest.values, smallest.values)
        tokens = torch.where(upper, largest.tokens, smallest.tokens)
        self.random.add(places, priority, peaks, tokens)
        self.peaks.add(places, priority, peaks, tokens)
        images = torch.arange(len(places), device=raw.device)
        drawn = (raw[images, :, token.to(raw.device)] + self.offset).cpu()
        self.quantile.add(places, drawn, token + start)
        return raw, largest, smallest

    def sampled_peaks(self) -> Tensor:
        """float32 [N, F] of the images drawn, `PEAK_IMAGES` at most."""
        return self.peaks.activations[torch.isfinite(self.peaks.priorities)]

    def state(self) -> State:
        return {**super().state(), "peaks": self.peaks.state()}

    def restore(self, state: State) -> None:
        self.peaks.restore(state["peaks"])
        super().restore({name: kept for name, kept in state.items() if name != "peaks"})


class TypePass:
    """One token type of a layer."""

    def __init__(self, state: SplitState, own: TypeFeatures) -> None:
        self.own, self.start = own, state.layout.slices[own.token_type].start
        tokens = state.layout.slices[own.token_type].stop - self.start
        heat = own.token_type == POSITION and state.layout.grid is not None
        self.blocks = [
            Block(*readouts(state, own.features[part]), own.levels[part], tokens, heat)
            for part in _parts(state, len(own.features), tokens)
        ]
        rows, means = neuron_readouts(state, own.token_type)
        self.neurons = [
            Ends(rows[part], means[part], TOP, tokens, heat) for part in _parts(state, len(rows), tokens)
        ]  # fmt: skip
        columns = state.linear.groups * state.linear.inputs * state.linear.positions
        self.moments = Moments(columns, state.partition.mean.device)

    def add(self, places: Tensor, reads: Tensor, draws: Draws) -> None:
        for block in (*self.blocks, *self.neurons):
            block.add(places, reads, draws, self.start)
        self.moments.add(reads)

    def state(self) -> State:
        blocks = [b.state() for b in (*self.blocks, *self.neurons)]
        return {"blocks": blocks, "moments": self.moments.state()}

    def restore(self, state: State) -> None:
        for block, kept in zip((*self.blocks, *self.neurons), state["blocks"], strict=True):
            block.restore(kept)
        self.moments.restore(state["moments"])


class LayerPass:
    """All live token types of a layer, and its input channels at the tokens of the first of them."""

    def __init__(self, state: SplitState, types: Sequence[TypeFeatures]) -> None:
        self.split = state
        self.types = [TypePass(state, own) for own in types]
        self.input_type = types[0].token_type
        span = state.layout.slices[self.input_type]
        heat = self.input_type == POSITION and state.layout.grid is not None
        channels = state.linear.groups * state.linear.inputs
        self.inputs = BestImages(channels, TOP, TOP if heat else 0, span.stop - span.start)

    def add(self, places: Tensor, x: Tensor, draws: Draws) -> None:
        """x [B, ...]: the layer's input on the images at `places`."""
        for images, reads in token_inputs(self.split.linear, x):
            for one in self.types:
                own = reads[:, self.split.layout.slices[one.own.token_type]]
                one.add(places[images], own.flatten(2), draws)
                if one.own.token_type == self.input_type:
                    self._add_inputs(places[images], own.flatten(2, 3).amax(3), one.start)

    def _add_inputs(self, places: Tensor, channels: Tensor, start: int) -> None:
        """channels [B, T_p, G * n]: the largest that a token reads of each."""
        by_channel = channels.transpose(1, 2).contiguous()
        high = by_channel.max(2)
        largest, tokens = high.values.cpu(), (high.indices + start).cpu()
        self.inputs.add(places, largest, tokens, lambda images, own: by_channel[images, own].cpu())

    def places(self) -> Iterator[Tensor]:
        """Of all images that are kept, in any order, some of them `NOWHERE`."""
        yield self.inputs.places
        for one in self.types:
            for block in (*one.blocks, *one.neurons):
                yield from (getattr(block, name).places for name in block.roles)

    def state(self) -> State:
        return {"types": [t.state() for t in self.types], "inputs": self.inputs.state()}

    def restore(self, state: State) -> None:
        for one, kept in zip(self.types, state["types"], strict=True):
            one.restore(kept)
        self.inputs.restore(state["inputs"])


def readouts(state: SplitState, features: Sequence[Feature]) -> tuple[Tensor, Tensor]:
    """(read-outs [F, C], offsets [F]) of features of one token type, concepts first."""
    (token_type,) = {f.token_type for f in features}
    linear, partition = state.linear, state.partition
    rows, offsets = [], []
    slots = torch.tensor([state.slot(f) for f in features], device=partition.mean.device)
    concepts = sum(f.neuron is None for f in features)
    if concepts:
        readout, offset = concept_readout(linear.weight(), partition, token_type, linear.groups)
        rows.append(readout[slots[:concepts]])
        offsets.append(offset[slots[:concepts]])
    if concepts < len(features):
        neurons = torch.tensor([f.neuron for f in features[concepts:]], device=slots.device)
        own = slots[concepts:]
        rows.append(subunit_weight(linear.weight(), partition, token_type, neurons, own, linear.groups))
        offsets.append(-partition.mean[token_type, neurons, own])
    return torch.cat(rows).flatten(1).contiguous(), torch.cat(offsets)


def neuron_readouts(state: SplitState, token_type: int) -> tuple[Tensor, Tensor]:
    """(weights [d, C], offsets [d]) of the layer's neurons themselves, each around its calibration mean."""
    linear = state.linear
    weight = linear.weight()
    rows = full_width(weight, neuron_groups(linear.neurons, linear.groups, weight.device), linear.groups)
    return rows.flatten(1), -state.partition.mean[token_type].sum(-1)


def _parts(state: SplitState, features: int, tokens: int) -> list[slice]:
    """Stretches of features whose read-outs, and whose activations on one image, are not too many."""
    columns = state.linear.groups * state.linear.inputs * state.linear.positions
    step = max(1, min(_READOUT_FLOATS // columns, _VALUE_FLOATS // tokens))
    return [slice(start, min(start + step, features)) for start in range(0, features, step)]
