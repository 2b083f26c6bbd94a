"""What a partition makes of a weight matrix: masked weights, concept read-outs, sums of edges by sub-unit or concept.

Everything here is linear in the layer's input, so a sub-unit's sum, a concept's activation and a concept's write are
each one linear map with a weight of its own. Weights are `[d, n, q]`: d neurons, n input channels per group, q kernel
positions (1 for nn.Linear).
"""

from __future__ import annotations

import torch
from torch import Tensor

from elude_runtime.partition.partition import Partition


def wide_weight(weight: Tensor, slots: Tensor, width: int) -> Tensor:
    """Masked rows of `weight`, one per sub-unit: the explicit form's weight.

    weight [d, n, q], slots int64 [d, n] in 0..width-1 -> [d, width, n, q]; summing over `width` gives `weight` back
    exactly, since every edge stands in one row and is zero in the others.
    """
    mask = torch.nn.functional.one_hot(slots, width).movedim(-1, 1)  # [d, width, n]
    return weight[:, None] * mask[..., None].to(weight.dtype)


def full_width(rows: Tensor, groups: Tensor, total_groups: int) -> Tensor:
    """Rows of a grouped convolution as rows over all input channels.

    rows [F, n, q], groups int64 [F] (the group of each row's neuron) -> [F, total_groups * n, q], zero outside the
    row's own group. With one group nothing changes.
    """
    if total_groups == 1:
        return rows
    out = rows.new_zeros(rows.shape[0], total_groups, *rows.shape[1:])
    out[torch.arange(rows.shape[0], device=rows.device), groups] = rows
    return out.flatten(1, 2)


def neuron_groups(neurons: int, groups: int, device: torch.device | None = None) -> Tensor:
    """int64 [d]: the convolution group of every neuron."""
    return torch.arange(neurons, device=device) // (neurons // groups)


def subunit_weight(
    weight: Tensor, partition: Partition, token_type: int, neurons: Tensor, slots: Tensor, groups: int = 1
) -> Tensor:
    """The read-out of chosen sub-units: neurons int64 [F], slots int64 [F] (M = rest) -> [F, groups * n, q]."""
    mask = partition.slots(token_type, neurons) == slots[:, None]
    rows = weight[neurons] * mask[..., None].to(weight.dtype)
    return full_width(rows, neuron_groups(weight.shape[0], groups, weight.device)[neurons], groups)


def concept_weight(weight: Tensor, partition: Partition, token_type: int, concept: int) -> Tensor:
    """The write of one concept: weight [d, n, q] with every edge outside the concept set to zero.

    Applied to x and centred by `concept_mean` it gives u_concept, the concept's part of the layer's output.
    """
    mask = partition.edge_concepts(token_type) == concept
    return weight * mask[..., None].to(weight.dtype)


def concept_mean(partition: Partition, token_type: int, concept: int) -> Tensor:
    """float32 [d]: the calibration mean of a concept's uncentred write, sum of its members' means per neuron."""
    members = partition.concept_slots(token_type) == concept
    return (partition.mean[token_type] * members).sum(1)


def concept_readout(weight: Tensor, partition: Partition, token_type: int, groups: int = 1) -> tuple[Tensor, Tensor]:
    """The linear read-out of all concept activations, `rest` last.

    A concept's activation is the mean over its live members of sign_km t_km / std_km (interface: term *activation*),
    which is linear in x: p = A x + a. Returns A [K + 1, groups * n, q] and a [K + 1], in the dtype of `weight`.
    """
    neurons, inputs, positions = weight.shape
    concepts, live = partition.concept_slots(token_type), partition.live(token_type)
    total = partition.concepts(token_type) + 1
    size = weight.new_zeros(total).index_add_(0, concepts.flatten(), live.flatten().to(weight.dtype))
    signed = live.to(weight.dtype) * partition.sign[token_type].to(weight.dtype)
    scale = signed / partition.member_std(token_type).to(weight.dtype) / size.clamp(min=1)[concepts]
    slots = partition.slots(token_type)
    edges = weight * scale.gather(1, slots)[..., None]
    group = neuron_groups(neurons, groups, weight.device)
    columns = group[:, None] * inputs + torch.arange(inputs, device=weight.device)  # [d, n]
    index = concepts.gather(1, slots) * (groups * inputs) + columns
    readout = weight.new_zeros(total * groups * inputs, positions)
    readout.index_add_(0, index.flatten(), edges.flatten(0, 1))
    offset = weight.new_zeros(total)
    offset.index_add_(0, concepts.flatten(), -(partition.mean[token_type].to(weight.dtype) * scale).flatten())
    return readout.view(total, groups * inputs, positions), offset


def sum_edges(values: Tensor, slots: Tensor, width: int) -> Tensor:
    """Sum per-edge values by sub-unit: values [..., d, n], slots int64 [d, n] -> [..., d, width]."""
    out = values.new_zeros(*values.shape[:-1], width)
    return out.scatter_add_(-1, slots.expand_as(values), values)


def sum_subunits(values: Tensor, concepts: Tensor, total: int) -> Tensor:
    """Sum per-sub-unit values by concept: values [..., d, M + 1], concepts int64 [d, M + 1] -> [..., total]."""
    flat = values.flatten(-2)
    out = flat.new_zeros(*flat.shape[:-1], total)
    return out.index_add_(-1, concepts.flatten(), flat)
