"""The checkpoint's own features as feature sets, and the controls that are partitions too: random, another neuron's."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from elude_runtime.analysis.split_state import SplitState
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.feature_matching import agreeing_signs, shuffle_concepts, shuffle_edges
from elude_runtime.partition import Partition
from elude_runtime.partition.sums import concept_readout, full_width, neuron_groups, subunit_weight, wide_weight

CONCEPTS, SUBUNITS = "concepts", "sub-units"
RANDOM_CONCEPTS, RANDOM_SUBUNITS = "random concepts", "random sub-units"
OTHER_NEURON = "another neuron's sub-units"
CONCEPTS_RANDOM_WEIGHTS, SUBUNITS_RANDOM_WEIGHTS = f"{CONCEPTS}, random weights", f"{SUBUNITS}, random weights"
OWN = (CONCEPTS, SUBUNITS)
NEURON_OF = "neuron_of_feature"
"""In a set's facts: the neuron of every feature, where features of one neuron are siblings."""
_SAMPLE = 4000  # tokens that statistics of a random partition and shares are taken from
_CHUNK_FLOATS = 16_000_000


@dataclass(frozen=True, eq=False)
class Split:
    """One token type of a layer as matrices. weight [d, n, q]; partition: of this type alone; share [d, M + 1]: part of
    the output's variance in every sub-unit, on the calibration tokens."""

    weight: Tensor
    groups: int
    partition: Partition
    share: Tensor

    @property
    def rest_share(self) -> float:
        """Part of the output's variance that no numbered concept carries."""
        concepts = self.partition.concepts(0)
        return float(self.share[self.partition.concept_slots(0) == concepts].sum())

    @property
    def rest_edges_share(self) -> float:
        """The same of sub-units: in edges that belong to no numbered sub-unit."""
        return float(self.share[:, -1].sum())


def own_split(state: SplitState, token_type: int, inputs: Tensor) -> Split:
    """The checkpoint's partition; inputs [S, G n q] of calibration tokens."""
    whole, t = state.partition, slice(token_type, token_type + 1)
    own = Partition(*(getattr(whole, f.name)[t].cpu() for f in fields(whole)))
    weight = state.linear.weight().cpu()
    *_, share = _statistics(weight, state.linear.groups, own, inputs)
    return Split(weight, state.linear.groups, own, share)


def random_split(split: Split, inputs: Tensor, seed: int) -> Split:
    """Edges dealt anew among a neuron's sub-units, and sub-units among concepts; `rest`, sizes and edges' signs kept.

    The sign of an edge says a good deal about its sub-unit, and members that cancel out would be no concept, so a
    control without either would be too easy to beat: a sub-unit counts with the sign that it correlates with.
    """
    generator = torch.Generator().manual_seed(seed)
    slots = shuffle_edges(split.partition.slots(0), split.weight.sum(-1).sign(), generator)
    concept = shuffle_concepts(split.partition.concept[0], generator)
    return _with(split, slots, split.partition.counts[0], concept, inputs)


def other_neurons_split(split: Split, inputs: Tensor, seed: int) -> Split:
    """Every neuron with the partition of another one: what is left is what all neurons have in common."""
    order = torch.randperm(len(split.weight), generator=torch.Generator().manual_seed(seed))
    other = torch.empty_like(order)
    other[order] = order.roll(1)  # one cycle: nobody keeps its own
    own = split.partition
    return _with(split, own.slots(0)[other], own.counts[0][other], own.concept[0][other], inputs)


def _with(split: Split, slots: Tensor, counts: Tensor, concept: Tensor, inputs: Tensor) -> Split:
    edges = torch.where(slots == split.partition.subunits, 255, slots).to(torch.uint8)
    made = replace(split.partition, edges=edges[None], counts=counts[None], concept=concept[None])
    mean, std, share = _statistics(split.weight, split.groups, made, inputs)
    made = replace(made, mean=mean[None], std=std[None])
    sample = inputs[:: max(1, len(inputs) // _SAMPLE)]
    sign = agreeing_signs(split.weight, split.groups, made, 0, sample)
    return replace(split, partition=replace(made, sign=sign[None]), share=share)


def _statistics(weight: Tensor, groups: int, partition: Partition, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, std, share) [d, M + 1] of every sub-unit on calibration tokens, some neurons at a time."""
    neurons, width = weight.shape[0], partition.subunits + 1
    step = max(1, len(inputs) // _SAMPLE)
    mean_input, sample = inputs.mean(0), inputs[::step]
    sample = sample - sample.mean(0)
    own = neuron_groups(neurons, groups)
    found = [torch.zeros(neurons, width) for _ in range(3)]
    variance = 0.0
    for chosen in torch.arange(neurons).split(max(1, _CHUNK_FLOATS // (width * max(len(sample), inputs.shape[1])))):
        rows = wide_weight(weight[chosen], partition.slots(0, chosen), width).flatten(0, 1)  # [c (M + 1), n, q]
        rows = full_width(rows, own[chosen].repeat_interleave(width), groups).flatten(1)
        t = (sample @ rows.T).unflatten(1, (-1, width))  # [S, c, M + 1]
        y = t.sum(2, keepdim=True)
        found[0][chosen] = (rows @ mean_input).unflatten(0, (-1, width))
        found[1][chosen] = t.square().mean(0).sqrt()
        found[2][chosen] = (t * y).mean(0)
        variance += float(y.square().mean(0).sum())
    # what only rounding moves counts as still
    found[1][found[1] <= 1e-6 * found[1].max()] = 0
    return found[0], found[1], found[2] / variance if variance else found[2]


def concept_set(split: Split, name: str, **facts: Any) -> FeatureSet:
    """All numbered concepts. A concept has no constant write: its part of y is a linear map of the input."""
    partition = split.partition
    readout, offset = concept_readout(split.weight, partition, 0, split.groups)
    rows, shift = readout[:-1].flatten(1), offset[:-1]
    number = len(rows)
    slots, edges = partition.concept_slots(0), partition.edge_concepts(0)
    groups = neuron_groups(len(split.weight), split.groups)

    def ablation(inputs: Tensor, features: Tensor) -> Tensor:
        mean = (partition.mean[0] * torch.isin(slots, features)).sum(1)
        masked = split.weight * torch.isin(edges, features)[..., None].to(split.weight.dtype)
        return inputs @ full_width(masked, groups, split.groups).flatten(1).T - mean

    def attribution(inputs: Tensor, gradient: Tensor) -> Tensor:
        by_edge = (gradient.T @ inputs).unflatten(1, (split.groups, *split.weight.shape[1:]))  # [d, G, n, q]
        by_edge = (by_edge[torch.arange(len(groups)), groups] * split.weight).sum(-1)
        means = gradient.sum(0)[:, None] * partition.mean[0]
        total = torch.zeros(number + 1).index_add_(0, edges.flatten(), by_edge.flatten())
        return total.index_add_(0, slots.flatten(), -means.flatten())[:-1]

    share = torch.zeros(number + 1).index_add_(0, slots.flatten(), split.share.flatten())[:-1]
    sizes = torch.bincount(slots.flatten(), minlength=number + 1)[:-1]
    facts = {"rest_share": split.rest_share, "members_median": float(sizes.float().median()), **facts}
    whole = partial(_put_together, split, by_concept=True)
    return FeatureSet(name, lambda x: x @ rows.T + shift, share, True, None, ablation, whole, attribution, facts)


def subunit_set(split: Split, name: str, neurons: Tensor, **facts: Any) -> FeatureSet:
    """The numbered sub-units of some neurons; activations in standard deviations."""
    partition = split.partition
    numbered = torch.arange(partition.subunits) < partition.counts[0].long()[neurons, None]
    row, slot = (numbered & (partition.std[0, neurons, :-1] > 0)).nonzero().T
    own = neurons[row]
    rows = subunit_weight(split.weight, partition, 0, own, slot, split.groups).flatten(1)
    mean, std = partition.mean[0, own, slot], partition.std[0, own, slot]
    write = torch.zeros(len(own), len(split.weight))
    write[torch.arange(len(own)), own] = std

    def activations(inputs: Tensor) -> Tensor:
        return (inputs @ rows.T - mean) / std

    def ablation(inputs: Tensor, features: Tensor) -> Tensor:
        return activations(inputs)[:, features] @ write[features]

    facts = {"rest_share": split.rest_edges_share, "neurons": len(neurons), NEURON_OF: own.tolist(), **facts}
    share = split.share[own, slot]
    whole = partial(_put_together, split, by_concept=False)
    return FeatureSet(name, activations, share, True, write, ablation, whole, facts=facts)


def _put_together(split: Split, inputs: Tensor, by_concept: bool) -> Tensor:
    """[S, d]: the output less its bias from its parts at inputs [S, G n q]: c plus what every sub-unit of every neuron
    adds, `rest` with them, or what every concept does, each computed by itself and then added up."""
    weight, partition = split.weight, split.partition
    width = partition.subunits + 1
    own, parts = neuron_groups(len(weight), split.groups), partition.concept_slots(0)  # [d, M + 1]
    total = partition.concepts(0) + 1 if by_concept else width
    out = torch.empty(len(inputs), len(weight))
    for chosen in torch.arange(len(weight)).split(max(1, _CHUNK_FLOATS // (total * max(len(inputs), inputs.shape[1])))):
        rows = wide_weight(weight[chosen], partition.slots(0, chosen), width).flatten(0, 1)
        rows = full_width(rows, own[chosen].repeat_interleave(width), split.groups).flatten(1)
        mean = partition.mean[0, chosen]
        t = (inputs @ rows.T).unflatten(1, (-1, width)) - mean  # [S, c, M + 1]
        if by_concept:
            u = torch.zeros(*t.shape[:2], total)
            t = u.scatter_add_(2, parts[chosen].expand_as(t), t)  # every concept's part of each neuron's output
        out[:, chosen] = mean.sum(1) + t.sum(2)
    return out


def siblings(one: FeatureSet) -> Tensor | None:
    """int64 [F]: the neuron of every feature, of a set that some neurons were divided for; None for any other. Facts
    say it feature by feature, or name the `neurons`, to each of which equally many features belong, in turn."""
    features, listed = len(one.share), one.facts.get(NEURON_OF, one.facts.get("neurons"))
    if not isinstance(listed, list) or not listed or features % len(listed):
        return None
    return torch.tensor(listed).repeat_interleave(features // len(listed))


def random_state(state: SplitState, token_type: int, inputs: Tensor, seed: int) -> SplitState:
    """The layer with a random partition of one token type, as `random_split` makes it; the other type keeps its own."""
    made, own = random_split(own_split(state, token_type, inputs), inputs, seed).partition, state.partition
    parts = [getattr(own, f.name).clone() for f in fields(own)]
    for part, field in zip(parts, fields(own), strict=True):
        part[token_type] = getattr(made, field.name)[0]
    return SplitState(state.entry, state.linear.module, Partition(*parts)).eval()


def own_sets(split: Split, neurons: Tensor, inputs: Tensor, seed: int) -> list[FeatureSet]:
    """The checkpoint's concepts and sub-units, and the partitions to compare them with."""
    random, other = random_split(split, inputs, seed), other_neurons_split(split, inputs, seed)
    sets = [subunit_set(split, SUBUNITS, neurons), subunit_set(random, RANDOM_SUBUNITS, neurons)]
    sets.append(subunit_set(other, OTHER_NEURON, neurons))
    if split.partition.concepts(0):
        sets = [concept_set(split, CONCEPTS), concept_set(random, RANDOM_CONCEPTS), *sets]
    return sets
