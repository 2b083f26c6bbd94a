"""The explicit form: a split layer as a wider linear layer whose neurons are the sub-units, and the merge that adds
them up again. Any PyTorch tool can look at its neurons."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from elude_runtime.network.linear_map import LinearMap
from elude_runtime.network.tokens import TokenLayout
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import wide_weight

_SIZES = "in_features out_features in_channels out_channels kernel_size stride padding dilation groups".split()


class SubUnits(nn.Module):
    """The wide layer: x in the split layer's input layout -> sub-unit sums [B, T, D], D = d * (M + 1), no bias.

    With two token types it computes each token with its own type's weight `weight_p`, `weight_c`.
    """

    def __init__(self, linear: LinearMap, partition: Partition, layout: TokenLayout) -> None:
        super().__init__()
        self.layout = layout
        self._linear = (linear,)  # in a tuple: the wide layer does not own the original module
        width = partition.subunits + 1
        weight = linear.weight(linear.dtype)
        self.weights = nn.ParameterList(
            wide_weight(weight, partition.slots(t), width).flatten(0, 1) for t in range(partition.types)
        )

    def forward(self, x: Tensor) -> Tensor:
        linear = self._linear[0]
        if len(self.weights) == 1:
            return linear.apply(x, self.weights[0].to(x.dtype))
        parts = [linear.apply(x[:, s], w.to(x.dtype)) for s, w in zip(self.layout.slices, self.weights, strict=True)]
        return torch.cat(parts[::-1], 1)  # prefix tokens come first


class ExplicitLayer(nn.Module):
    """Drop-in replacement of a split layer: `subunits` (the wide layer), then reshape and sum, the bias once.

    Input and output layouts, shapes and dtype are those of the layer it replaces. weight: what the sub-units add up to,
    in the layer's own shape.
    """

    def __init__(self, linear: LinearMap, partition: Partition, layout: TokenLayout) -> None:
        super().__init__()
        self.subunits = SubUnits(linear, partition, layout)
        self.neurons = linear.neurons
        self.bias = nn.Parameter(linear.bias(linear.dtype).clone()) if linear.has_bias else None
        for name in _SIZES:  # which glue code may ask for
            if hasattr(linear.module, name):
                setattr(self, name, getattr(linear.module, name))
        # PyTorch's encoder layer takes the weight of a layer without hooks and never calls it
        self.register_forward_hook(_look_on)

    @property
    def weight(self) -> Tensor:
        """[d, n] or [d, n, rows, columns]. Glue code may ask for it, or for its dtype and device only."""
        edges = self.subunits.weights[0].unflatten(0, (self.neurons, -1)).sum(1)  # one sub-unit has each edge
        linear = self.subunits._linear[0]
        return edges.unflatten(-1, linear.kernel) if linear.is_conv else edges[..., 0]

    def forward(self, x: Tensor) -> Tensor:
        merged = self.subunits(x).unflatten(-1, (self.neurons, -1)).sum(-1)
        if self.bias is not None:
            merged = merged + self.bias.to(merged.dtype)
        linear = self.subunits._linear[0]
        if linear.is_conv:
            return merged.transpose(1, 2).unflatten(2, linear.output_size(x))
        return merged.reshape(*x.shape[:-1], self.neurons)


def _look_on(*_: Any) -> None:
    """A hook that changes nothing."""


def explicit_model(
    model: nn.Module, layers: dict[str, tuple[Partition, TokenLayout]], dtype: torch.dtype | None = None
) -> nn.Module:
    """A copy of `model` with each named layer in its explicit form; the original is left as it is.

    dtype: of the copy, the model's own by default. A weight that the layer computes is computed in that dtype, which
    `.to(dtype)` of a finished explicit form cannot do.
    """
    wide = copy.deepcopy(model)
    if dtype is not None:
        wide = wide.to(dtype)
    for name, (partition, layout) in layers.items():
        split = wide.get_submodule(name)
        explicit = ExplicitLayer(LinearMap(split, name), partition, layout)
        for owner in [module for module in wide.modules() if split in module.children()]:  # under all its names
            for child in [child for child, module in owner.named_children() if module is split]:
                setattr(owner, child, explicit)
    return wide.eval()
