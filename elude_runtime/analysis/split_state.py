"""One split layer of a loaded model: its activations, sums and writes, each a linear map of the layer's input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from functools import cached_property

import torch
from torch import Tensor, nn

from elude_runtime.analysis.features import Feature
from elude_runtime.analysis.writes import FeatureWrite, feature_write
from elude_runtime.checkpoint.manifest import LayerEntry
from elude_runtime.errors import FeatureError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import LETTERS, TokenLayout
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import (
    concept_readout,
    subunit_weight,
    sum_edges,
    sum_subunits,
    wide_weight,
)

_WRITES_KEPT = 32  # of a layer; each has the weights of its own neurons
_PARTS = tuple(field.name for field in fields(Partition))


class TypeIndices:
    """Where edges and sub-units of one token type go, worked out once: every request asks for it."""

    def __init__(self, partition: Partition, token_type: int) -> None:
        self._partition, self._token_type = partition, token_type

    @cached_property
    def slots(self) -> Tensor:
        """int64 [d, n]: the sub-unit of every edge, `rest` as M."""
        return self._partition.slots(self._token_type)

    @cached_property
    def concepts(self) -> int:
        """K, `rest` not counted."""
        return self._partition.concepts(self._token_type)

    @cached_property
    def concept_slots(self) -> Tensor:
        """int64 [d, M + 1]: the concept of every sub-unit, `rest` as K."""
        return self._partition.concept_slots(self._token_type)


class SplitState(nn.Module):
    """A layer with its partition. The partition's tensors are buffers, so that they follow `.to(device)`; what is
    worked out from them is kept until they are replaced."""

    def __init__(self, entry: LayerEntry, module: nn.Module, partition: Partition) -> None:
        super().__init__()
        self.entry = entry
        self.name = entry.name
        self.linear = LinearMap(module, entry.name)  # not an nn.Module: the base model owns the weights
        grid = (entry.grid[0], entry.grid[1]) if entry.grid else None
        self.layout = TokenLayout(entry.total, entry.prefix, grid)
        for part in _PARTS:
            self.register_buffer(part, getattr(partition, part), persistent=False)
        self.live_types = [t for t, token_type in enumerate(entry.token_types) if token_type.live]
        """Token types that can change the output at all; only these are served."""
        self._partition: Partition | None = None
        self._indices: dict[int, TypeIndices] = {}
        self._readouts: dict[int, tuple[Tensor, Tensor]] = {}
        self._writes: dict[Feature, FeatureWrite] = {}
        self._baseline: Tensor | None = None

    @property
    def partition(self) -> Partition:
        # the means are replaced both by another device and by another dtype
        if self._partition is None or self._partition.mean is not self._buffers["mean"]:
            self._partition = Partition(*(self.get_buffer(p) for p in _PARTS))
            self._indices, self._readouts, self._writes = {}, {}, {}
            self._baseline = None
        return self._partition

    def indices(self, token_type: int) -> TypeIndices:
        """The indices of one token type, kept."""
        partition = self.partition
        if token_type not in self._indices:
            self._indices[token_type] = TypeIndices(partition, token_type)
        return self._indices[token_type]

    def baseline(self) -> Tensor:
        """c [T, d]: the output with every sub-unit at its calibration mean."""
        partition = self.partition  # forgets the one that was kept when it was replaced
        if self._baseline is None:
            with torch.inference_mode(False), torch.no_grad():
                c = self.linear.bias() + partition.mean.sum(-1)  # [P, d]
                self._baseline = c.new_empty(self.layout.total, c.shape[-1])
                for token_type, tokens in enumerate(self.layout.slices):
                    self._baseline[tokens] = c[token_type]
        return self._baseline

    def concept_names(self) -> list[str]:
        """Names of all concepts of the live token types, each type's `rest` after its numbered ones."""
        return [f.name for t in self.live_types for f in self.concept_features(t)]

    def concept_features(self, token_type: int) -> list[Feature]:
        numbered = range(self.indices(token_type).concepts)
        return [*(Feature(self.name, token_type, i) for i in numbered), Feature(self.name, token_type, None)]

    def check(self, feature: Feature) -> Feature:
        """The feature itself. FeatureError if this layer has none of that name, or its tokens have no effect."""
        letter = LETTERS[feature.token_type]
        if feature.token_type >= self.layout.types:
            raise FeatureError(
                f"{feature} does not exist: {self.name} has no class token, only '{LETTERS[0]}' features."
            )
        if feature.token_type not in self.live_types:
            raise FeatureError(
                f"{feature} has no effect: no such token of {self.name} can change the output; choose its other type."
            )
        if feature.neuron is None:
            known = self.indices(feature.token_type).concepts
            if feature.index is not None and feature.index >= known:
                raise FeatureError(
                    f"{feature} does not exist: {self.name} has {letter.upper()}0 to {letter.upper()}{known - 1}."
                )
        else:
            if feature.neuron >= self.linear.neurons:
                raise FeatureError(f"{feature} does not exist: {self.name} has neurons 0 to {self.linear.neurons - 1}.")
            known = int(self.partition.counts[feature.token_type, feature.neuron])
            if feature.index is not None and feature.index >= known:
                raise FeatureError(
                    f"{feature} does not exist: neuron {feature.neuron} has {known} sub-units and {letter}rest."
                )
        return feature

    def slot(self, feature: Feature) -> int:
        """The feature's index on the axis K + 1 (concepts) or M + 1 (sub-units), `rest` last."""
        if feature.index is not None:
            return feature.index
        return self.indices(feature.token_type).concepts if feature.neuron is None else self.partition.subunits

    def concept_activations(self, x: Tensor, token_type: int) -> Tensor:
        """x in the layer's input layout [B, ...] -> activations [B, T_p, K + 1] on that type's tokens, `rest` last."""
        readout, offset = self._concept_readout(token_type)
        return self._on(x, token_type, readout, groups=1) + offset

    def activations(self, x: Tensor, feature: Feature) -> Tensor:
        """[B, T_p]: the activation of one feature on its own token type's tokens (interface: term *activation*)."""
        return self.feature_activations(x, [feature])[..., 0]

    def feature_activations(self, x: Tensor, features: Sequence[Feature]) -> Tensor:
        """The activations [B, T_p, F] of some features of one token type, on its tokens. Differentiable in x."""
        (token_type,) = {f.token_type for f in features}
        slots = [self.slot(f) for f in features]
        rows, offsets = [], []
        if any(f.neuron is None for f in features):
            readout, offset = self._concept_readout(token_type)
            chosen = torch.tensor([s for f, s in zip(features, slots, strict=True) if f.neuron is None]).to(x.device)
            rows.append(readout[chosen])
            offsets.append(offset[chosen])
        if any(f.neuron is not None for f in features):
            pairs = [(f.neuron, s) for f, s in zip(features, slots, strict=True) if f.neuron is not None]
            neurons, own = torch.tensor(pairs).to(x.device).unbind(1)
            weight = self.linear.weight()
            rows.append(subunit_weight(weight, self.partition, token_type, neurons, own, self.linear.groups))
            offsets.append(-self.partition.mean[token_type, neurons, own])
        found = self._on(x, token_type, torch.cat(rows), groups=1) + torch.cat(offsets)
        if len(rows) == 1:
            return found
        # concepts were put first
        order = sorted(range(len(features)), key=lambda i: features[i].neuron is not None)
        back = sorted(range(len(features)), key=order.__getitem__)
        return found[..., back]

    def _concept_readout(self, token_type: int) -> tuple[Tensor, Tensor]:
        partition = self.partition
        if token_type not in self._readouts:
            self._readouts[token_type] = concept_readout(
                self.linear.weight(), partition, token_type, self.linear.groups
            )
        return self._readouts[token_type]

    def sums(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uncentred sub-unit sums s [B, T, d, M + 1], `rest` last, each token by its own type's partition."""
        width = self.partition.subunits + 1
        parts = []
        for token_type in range(self.layout.types):
            wide = wide_weight(self.linear.weight(dtype), self.partition.slots(token_type), width).flatten(0, 1)
            parts.append(self._on(x, token_type, wide).unflatten(-1, (-1, width)))
        return torch.cat(parts[::-1], 1)  # prefix tokens come first

    def feature_write(self, feature: Feature) -> FeatureWrite:
        """The weights that one feature writes with; those of the features asked for last are kept."""
        _ = self.partition  # forgets what was kept when it was replaced
        found = self._writes.pop(feature, None)
        if found is None:
            with torch.inference_mode(False):
                found = feature_write(self, feature)
            if len(self._writes) >= _WRITES_KEPT:
                self._writes.pop(next(iter(self._writes)))
        self._writes[feature] = found
        return found

    def written(self, x: Tensor, feature: Feature) -> Tensor:
        """[B, T_p, F]: the feature's centred part of the output, on its own type's tokens and at the F neurons of its
        `feature_write`; of a sub-unit this is its activation."""
        write = self.feature_write(feature)
        return self._on(x, feature.token_type, write.rows, groups=1) - write.mean

    def write(self, x: Tensor, feature: Feature) -> Tensor:
        """u [B, T, d]: the feature's centred part of the layer's output, zero on tokens of the other type."""
        out = torch.zeros(x.shape[0], self.layout.total, self.linear.neurons, device=x.device)
        tokens, neurons = self.layout.slices[feature.token_type], self.feature_write(feature).neurons
        out[:, tokens, neurons] = self.written(x, feature)
        return out

    def changed(self, y: Tensor, change: Tensor) -> Tensor:
        """The layer's output y (module layout) with `change` [R, T, d] added in float32 and cast once."""
        return (y.float() + self.linear.untokens(change, y)).to(y.dtype)

    def attributions(self, x: Tensor, gradient: Tensor) -> dict[int, Tensor]:
        """Gradient x centred activation of every sub-unit, summed over tokens, for one image: [d, M + 1] of each live
        token type; the others have no gradient.

        x [1, ...] in the layer's layout, gradient [1, T, d]. The contribution of an edge is linear in its weight, so
        all sub-units come from one product of gradient and input (design "Attribution").
        """
        partition, weight = self.partition, self.linear.weight()
        slices = {t: self.layout.slices[t] for t in self.live_types}
        per_edge = self.linear.edge_gradient(x, gradient, list(slices.values()))
        found = {}
        for (token_type, tokens), edges in zip(slices.items(), per_edge, strict=True):
            summed = (edges * weight).sum(-1) if weight.shape[-1] > 1 else (edges * weight)[..., 0]  # [d, n]
            uncentred = sum_edges(summed, self.indices(token_type).slots, partition.subunits + 1)
            total = gradient[0, tokens].sum(0)  # [d]
            found[token_type] = torch.addcmul(uncentred, total[:, None], partition.mean[token_type], value=-1)
        return found

    def by_concept(self, subunits: Tensor, token_type: int) -> Tensor:
        """Per-sub-unit values [d, M + 1] added up by concept: [K + 1], `rest` last."""
        indices = self.indices(token_type)
        return sum_subunits(subunits, indices.concept_slots, indices.concepts + 1)

    def _on(self, x: Tensor, token_type: int, weight: Tensor, groups: int | None = None) -> Tensor:
        """The linear map `weight` on the tokens of one type: [B, T_p, D]."""
        if self.layout.types > 1:
            x = x[:, self.layout.slices[token_type]]
        return self.linear.apply(x, weight, groups)
