"""What one feature writes to its layer's output: the rows of the weight that its own neurons have, and no others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elude_runtime.analysis.features import Feature
from elude_runtime.partition.sums import full_width, neuron_groups

if TYPE_CHECKING:
    from elude_runtime.analysis.split_state import SplitState


@dataclass(frozen=True, eq=False)
class FeatureWrite:
    """The write of one feature: y_k changes with it at F of the layer's neurons, by a linear map of the input.

    neurons int64 [F]; rows [F, groups * n, q]: the weight of the feature's edges, zero elsewhere; mean float32 [F]: the
    calibration mean of what they add up to; rise float32 [F]: by how much y_k rises with the concept's activation,
    the sum of its members' signed standard deviations (dead members have none); of a sub-unit its own, in its concept.
    """

    neurons: Tensor
    rows: Tensor
    mean: Tensor
    rise: Tensor


def feature_write(state: SplitState, feature: Feature) -> FeatureWrite:
    """The write of a concept or sub-unit of this layer. Depends on the checkpoint only."""
    partition, token_type = state.partition, feature.token_type
    weight, slot = state.linear.weight(), state.slot(feature)
    if feature.neuron is not None:
        neurons = torch.tensor([feature.neuron], device=weight.device)
        members = torch.arange(partition.subunits + 1, device=weight.device)[None] == slot
    else:
        members = state.indices(token_type).concept_slots == slot  # [d, M + 1]
        neurons = members.any(1).nonzero()[:, 0]
        members = members[neurons]
    edges = members.gather(1, partition.slots(token_type, neurons))  # [F, n]
    rows = weight[neurons] * edges[..., None].to(weight.dtype)
    groups = state.linear.groups
    group = neuron_groups(state.linear.neurons, groups, weight.device)[neurons]
    return FeatureWrite(
        neurons,
        full_width(rows, group, groups),
        (partition.mean[token_type, neurons] * members).sum(1),
        (partition.signed_std(token_type)[neurons] * members).sum(1),
    )


def share_subunit(state: SplitState, one: Feature, other: Feature) -> bool:
    """Whether two features of a layer have a sub-unit in common: the same one, or a concept and one of its members."""
    if one.token_type != other.token_type:
        return False
    if (one.neuron is None) == (other.neuron is None):
        return one == other
    concept, subunit = (one, other) if one.neuron is None else (other, one)
    members = state.indices(one.token_type).concept_slots
    return int(members[subunit.neuron, state.slot(subunit)]) == state.slot(concept)
