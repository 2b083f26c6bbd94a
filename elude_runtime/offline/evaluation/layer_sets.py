"""All feature sets of one layer and token type: the checkpoint's own, its controls and the baselines."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from elude_runtime.analysis.model import EludeModel
from elude_runtime.analysis.split_state import SplitState
from elude_runtime.offline.evaluation.baselines import baseline_sets
from elude_runtime.offline.evaluation.feature_set import FeatureSet
from elude_runtime.offline.evaluation.options import EvaluateOptions
from elude_runtime.offline.evaluation.own_sets import CONCEPTS, SUBUNITS, Split, own_sets, own_split
from elude_runtime.offline.evaluation.phases import Phases
from elude_runtime.offline.evaluation.tokens import TokenSample
from elude_runtime.offline.images import Progress
from elude_runtime.partition.sums import full_width, neuron_groups

_LOGITS = 100_000_000  # numbers: of a larger table the control that reads the logits is left out


def scored_neurons(state: SplitState, options: EvaluateOptions) -> Tensor:
    """int64, ascending: those whose sub-units are scored."""
    generator = torch.Generator().manual_seed(options.seed)
    return torch.randperm(state.linear.neurons, generator=generator)[: options.neurons].sort().values


def layer_sets(
    model: EludeModel, state: SplitState, token_type: int, sample: TokenSample, logits: Tensor,
    options: EvaluateOptions, phases: Phases, report: Progress,
) -> tuple[list[FeatureSet], dict[str, float]]:  # fmt: skip
    """The sets that have any feature, and what of the output's variance no concept and no sub-unit carries. logits
    [N, C]: of the calibration images."""
    inputs = sample.inputs()
    with phases("own features"):
        split = own_split(state, token_type, inputs)
        made = own_sets(split, scored_neurons(state, options), inputs, options.seed)
    for one in _baselines(model, state, split, inputs, _of_tokens(logits, sample.each, len(inputs)), options, report):
        phases.add(f"baseline {one.facts['baseline']}", one.facts["seconds"])
        made.append(one)
    return [one for one in made if len(one.share)], {CONCEPTS: split.rest_share, SUBUNITS: split.rest_edges_share}


def _baselines(
    model: EludeModel, state: SplitState, split: Split, inputs: Tensor, logits: Tensor | None,
    options: EvaluateOptions, report: Progress,
) -> Iterator[FeatureSet]:  # fmt: skip
    if options.baselines is None:
        return
    weight = full_width(split.weight, neuron_groups(len(split.weight), split.groups), split.groups)
    yield from baseline_sets(
        inputs, weight.flatten(1), concepts=split.partition.concepts(0) or max(2, len(split.weight) // 2),
        subunits=split.partition.subunits, neurons=scored_neurons(state, options).tolist(), logits=logits,
        heads=_heads(model, state.name), seed=options.seed, options=options.baselines, progress=report,
    )  # fmt: skip


def _of_tokens(logits: Tensor, each: int, tokens: int) -> Tensor | None:
    """[S, C]: the logits of each token's image; None where the sample took tokens of some images only, or the table
    would be too large."""
    if len(logits) * each != tokens or tokens * logits.shape[1] > _LOGITS:
        return None
    return logits.repeat_interleave(each, 0)


def _heads(model: EludeModel, layer: str) -> int | None:
    """The attention heads whose outputs a layer merges, where it is an attention's last projection."""
    parent, _, own = layer.rpartition(".")
    heads = getattr(dict(model.base.named_modules()).get(parent), "num_heads", None)
    return heads if own == "proj" and isinstance(heads, int) and heads > 1 else None
