"""One split layer of a loaded model: its activations, sums and writes, each a linear map of the layer's input."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from elude_runtime.analysis.features import Feature
from elude_runtime.checkpoint.manifest import LayerEntry
from elude_runtime.errors import FeatureError
from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import LETTERS, TokenLayout
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import (
    concept_mean,
    concept_readout,
    concept_weight,
    subunit_weight,
    sum_edges,
    sum_subunits,
    wide_weight,
)


class SplitState(nn.Module):
    """A layer with its partition. The partition's tensors are buffers, so that they follow `.to(device)`."""

    def __init__(self, entry: LayerEntry, module: nn.Module, partition: Partition) -> None:
        super().__init__()
        self.entry = entry
        self.name = entry.name
        self.linear = LinearMap(module, entry.name)  # not an nn.Module: the base model owns the weights
        grid = (entry.grid[0], entry.grid[1]) if entry.grid else None
        self.layout = TokenLayout(entry.total, entry.prefix, grid)
        for part in ("edges", "counts", "mean", "std", "concept"):
            self.register_buffer(part, getattr(partition, part), persistent=False)
        self._readouts: dict[tuple[int, torch.device], tuple[Tensor, Tensor]] = {}

    @property
    def partition(self) -> Partition:
        return Partition(*(self.get_buffer(p) for p in ("edges", "counts", "mean", "std", "concept")))

    @property
    def live_types(self) -> list[int]:
        """Token types that can change the output at all; only these are served."""
        return [t for t, entry in enumerate(self.entry.token_types) if entry.live]

    def baseline(self) -> Tensor:
        """c [T, d]: the output with every sub-unit at its calibration mean."""
        c = self.linear.bias() + self.partition.mean.sum(-1)  # [P, d]
        out = c.new_empty(self.layout.total, c.shape[-1])
        for token_type, tokens in enumerate(self.layout.slices):
            out[tokens] = c[token_type]
        return out

    def concept_names(self) -> list[str]:
        """Names of all concepts of the live token types, each type's `rest` after its numbered ones."""
        return [f.name for t in self.live_types for f in self.concept_features(t)]

    def concept_features(self, token_type: int) -> list[Feature]:
        numbered = range(self.partition.concepts(token_type))
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
            known = self.partition.concepts(feature.token_type)
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
        p = self.partition
        return p.concepts(feature.token_type) if feature.neuron is None else p.subunits

    def concept_activations(self, x: Tensor, token_type: int) -> Tensor:
        """x in the layer's input layout [B, ...] -> activations [B, T_p, K + 1] on that type's tokens, `rest` last."""
        key = (token_type, x.device)
        if key not in self._readouts:
            self._readouts[key] = concept_readout(self.linear.weight(), self.partition, token_type, self.linear.groups)
        readout, offset = self._readouts[key]
        return self._on(x, token_type, readout, groups=1) + offset

    def activations(self, x: Tensor, feature: Feature) -> Tensor:
        """[B, T_p]: the activation of one feature on its own token type's tokens (interface: term *activation*)."""
        if feature.neuron is None:
            return self.concept_activations(x, feature.token_type)[..., self.slot(feature)]
        neuron = torch.tensor([feature.neuron], device=x.device)
        slot = torch.tensor([self.slot(feature)], device=x.device)
        row = subunit_weight(self.linear.weight(), self.partition, feature.token_type, neuron, slot, self.linear.groups)
        mean = self.partition.mean[feature.token_type, feature.neuron, self.slot(feature)]
        return self._on(x, feature.token_type, row, groups=1)[..., 0] - mean

    def sums(self, x: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uncentred sub-unit sums s [B, T, d, M + 1], `rest` last, each token by its own type's partition."""
        width = self.partition.subunits + 1
        parts = []
        for token_type in range(self.layout.types):
            wide = wide_weight(self.linear.weight(dtype), self.partition.slots(token_type), width).flatten(0, 1)
            parts.append(self._on(x, token_type, wide).unflatten(-1, (-1, width)))
        return torch.cat(parts[::-1], 1)  # prefix tokens come first

    def write(self, x: Tensor, feature: Feature) -> Tensor:
        """u [B, T, d]: the feature's centred part of the layer's output, zero on tokens of the other type."""
        tokens = self.layout.slices[feature.token_type]
        out = torch.zeros(x.shape[0], self.layout.total, self.linear.neurons, device=x.device)
        if feature.neuron is not None:
            out[:, tokens, feature.neuron] = self.activations(x, feature)
            return out
        concept = self.slot(feature)
        weight = concept_weight(self.linear.weight(), self.partition, feature.token_type, concept)
        out[:, tokens] = self._on(x, feature.token_type, weight) - concept_mean(
            self.partition, feature.token_type, concept
        )
        return out

    def changed(self, y: Tensor, change: Tensor) -> Tensor:
        """The layer's output y (module layout) with `change` [R, T, d] added in float32 and cast once."""
        return (y.float() + self.linear.untokens(change, y)).to(y.dtype)

    def attributions(self, x: Tensor, gradient: Tensor) -> list[Tensor]:
        """Gradient x centred activation of every sub-unit, summed over tokens, for one image: [d, M + 1] a token type.

        x [1, ...] in the layer's layout, gradient [1, T, d]. The contribution of an edge is linear in its weight, so
        all sub-units come from one product of gradient and input (design "Attribution").
        """
        slices, p = self.layout.slices, self.partition
        per_edge = self.linear.edge_gradient(x, gradient, slices)
        found = []
        for token_type, tokens in enumerate(slices):
            edges = (per_edge[token_type] * self.linear.weight()).sum(-1)  # [d, n]
            uncentred = sum_edges(edges, p.slots(token_type), p.subunits + 1)
            total = gradient[0, tokens].sum(0)  # [d]
            found.append(uncentred - total[:, None] * p.mean[token_type])
        return found

    def by_concept(self, subunits: Tensor, token_type: int) -> Tensor:
        """Per-sub-unit values [d, M + 1] added up by concept: [K + 1], `rest` last."""
        p = self.partition
        return sum_subunits(subunits, p.concept_slots(token_type), p.concepts(token_type) + 1)

    def _on(self, x: Tensor, token_type: int, weight: Tensor, groups: int | None = None) -> Tensor:
        """The linear map `weight` on the tokens of one type: [B, T_p, D]."""
        if self.layout.types > 1:
            x = x[:, self.layout.slices[token_type]]
        return self.linear.apply(x, weight, groups)
