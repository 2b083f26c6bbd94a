"""The explicit form: a split layer as a wider linear layer whose neurons are the sub-units, and the merge that adds
them up again. Any PyTorch tool can look at its neurons."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import wide_weight


class SubUnits(nn.Module):
    """The wide layer: x in the split layer's input layout -> sub-unit sums [B, T, D], D = d * (M + 1), no bias.

    With two token types it computes each token with its own type's weight `weight_p`, `weight_c`.
    """

    def __init__(self, linear: LinearMap, partition: Partition, layout: TokenLayout) -> None:
        super().__init__()
        self.layout = layout
        self._linear = (linear,)  # in a tuple: the wide layer does not own the original module
        width = partition.subunits + 1
        source = linear.module.weight.dtype
        self.weights = nn.ParameterList(
            wide_weight(linear.weight(source), partition.slots(t), width).flatten(0, 1) for t in range(partition.types)
        )

    def forward(self, x: Tensor) -> Tensor:
        linear = self._linear[0]
        if len(self.weights) == 1:
            return linear.apply(x, self.weights[0].to(x.dtype))
        parts = [linear.apply(x[:, s], w.to(x.dtype)) for s, w in zip(self.layout.slices, self.weights, strict=True)]
        return torch.cat(parts[::-1], 1)  # prefix tokens come first


class ExplicitLayer(nn.Module):
    """Drop-in replacement of a split layer: `subunits` (the wide layer), then reshape and sum, the bias once.

    Input and output layouts, shapes and dtype are those of the layer it replaces.
    """

    def __init__(self, linear: LinearMap, partition: Partition, layout: TokenLayout) -> None:
        super().__init__()
        self.subunits = SubUnits(linear, partition, layout)
        self.neurons = linear.neurons
        bias = linear.module.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        wide = self.subunits(x)
        merged = wide.unflatten(-1, (self.neurons, -1)).sum(-1)
        if self.bias is not None:
            merged = merged + self.bias.to(merged.dtype)
        linear = self.subunits._linear[0]
        if linear.is_conv:
            grid = self.subunits.layout.grid
            if grid is None:
                raise ValueError("a convolution always has a grid")
            return merged.transpose(1, 2).unflatten(2, grid)
        return merged.reshape(*x.shape[:-1], self.neurons)


def explicit_model(model: nn.Module, layers: dict[str, tuple[Partition, TokenLayout]]) -> nn.Module:
    """A copy of `model` with each named layer in its explicit form; the original is left as it is."""
    wide = copy.deepcopy(model)
    for name, (partition, layout) in layers.items():
        parent, _, child = name.rpartition(".")
        owner = wide.get_submodule(parent) if parent else wide
        linear = LinearMap(wide.get_submodule(name), name)
        setattr(owner, child, ExplicitLayer(linear, partition, layout))
    return wide.eval()
